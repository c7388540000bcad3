"""The masks' part of a run: gates trained on the calibration text, where a method needs them.

Adapters may be trained beside them. They lie in the same files, and whatever is cut by the masks is cut from the
weights that they are added to; the dense model itself stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError
from secateur.recipe import PruneSpec
from secateur.records.masks import AdapterSettings, LowRank, MaskSettings, MaskStatistics, merge_masks
from secateur.records.statistics import normalised
from secateur.registry import unknown_name
from secateur.score import METHODS
from secateur.store.artifacts import MASKS_VERSION, digest, read_masks, write_masks
from secateur.store.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class MaskStage:
    """Trains and keeps the masks of one run's texts, each once.

    Attributes:
        settings: how to train; None where no method needs masks.
        kinds: unit kinds that get gates.
        buckets: names of the texts that decide.
        references: names of texts that are looked at one by one.
        max_tokens: of every text, at most; whole blocks are taken.
        seed: of what is drawn.
        folder: the run's folder.
        facts: what to record beside every file.
        key: hash of what a bucket's calibration depends on, by name.
        learn: trains the masks of a bucket.
        mix: weight of each bucket; None counts every bucket the same.
    """

    settings: MaskSettings | None
    kinds: Sequence[str]
    buckets: Sequence[str]
    references: Sequence[str]
    max_tokens: int
    seed: int
    folder: RunFolder
    facts: Mapping[str, Any]
    key: Callable[[str], str]
    learn: Callable[[str, MaskSettings], MaskStatistics]
    mix: Mapping[str, float] | None = None

    @property
    def is_needed(self) -> bool:
        """Return whether any masks are needed."""
        return self.settings is not None and bool(self.kinds)

    def is_missing(self, name: str) -> bool:
        """Return whether the masks of a bucket are still to be trained."""
        return self._needs(name) and not self._is_done(name)

    def take(self, name: str) -> list[str]:
        """Train what is missing of a bucket; return the stages that were there already."""
        if not self._needs(name):
            return []
        if self._is_done(name):
            return [self._stage(name)]
        assert self.settings is not None
        self.folder.forget(self._stage(name))
        started = time.perf_counter()
        masks = self.learn(name, self.settings)
        write_masks(self._file(name), masks, {"bucket": name, "settings": self.settings.to_dict(), **self.facts})
        self.folder.finish(self._stage(name), self._key(name), started, tokens=masks.num_tokens, removed=masks.removed)
        return []

    def load(self) -> MaskStatistics | None:
        """Return the masks of all buckets that decide together; None where none are needed."""
        if not self.is_needed:
            return None
        return together({name: read_masks(self._file(name)) for name in self.buckets}, self.mix)

    def load_bucket(self, name: str) -> MaskStatistics | None:
        """Return the masks of one bucket; None where they are not needed."""
        return read_masks(self._file(name)) if self._needs(name) else None

    def keys(self) -> list[str]:
        """Return what identifies the masks of all buckets, for the plan that rests on them."""
        return [self._key(name) for name in dict.fromkeys([*self.buckets, *self.references]) if self._needs(name)]

    @property
    def adapters(self) -> AdapterSettings | None:
        """How weights are trained beside the masks; None where they stay as they are."""
        return self.settings.lora if self.settings is not None and self.is_needed else None

    def learned(self) -> LowRank | None:
        """Return what was trained of the weights beside the masks; None where they stay as they are."""
        return read_masks(self._file(self.buckets[0])).adapters if self.adapters is not None else None

    def _needs(self, name: str) -> bool:
        return self.is_needed and (name in self.buckets or name in self.references)

    def _stage(self, name: str) -> str:
        return f"masks:{name}"

    def _file(self, name: str) -> Path:
        return self.folder.path / "statistics" / f"{name}.masks.safetensors"

    def _key(self, name: str) -> str:
        assert self.settings is not None
        how = list(self.kinds), self.max_tokens, self.seed, self.settings.to_dict()
        return digest(self.key(name), *how, MASKS_VERSION)

    def _is_done(self, name: str) -> bool:
        file = self._file(name)
        return self.folder.is_done(self._stage(name), self._key(name), file, file.with_suffix(".json"))


LORA_KEY = "prune.options.lora"


def require_adaptable(prune: PruneSpec, buckets: Sequence[str]) -> None:
    """Refuse adapters beside masks where something else rests on the dense model's own weights, or on several texts.

    Args:
        prune: whose method trains adapters.
        buckets: that decide.

    Raises:
        ConfigError: the two do not go together.
    """
    if len(buckets) > 1:
        raise ConfigError(
            f"{LORA_KEY} trains the weights on one text, and {', '.join(buckets)} decide, each by masks of its own. "
            "Name one under prune.buckets, or give one bucket the paths of all."
        )
    depth = METHODS[prune.depth_method]
    asked = {
        f"reconstruct: {prune.reconstruct}": ("fits weights to the dense model's", prune.reconstruct != "none"),
        "bias_compensation": ("adds means that the dense model's units have", prune.bias_compensation),
        f"allocation: {prune.allocation}": (
            "measures cuts of the dense model",
            prune.allocation in ("knapsack", "search"),
        ),
        f"depth_method: {prune.depth_method}": (
            "measures the dense model without its blocks",
            bool(prune.block_kinds()) and bool(depth.measure),
        ),
    }
    for name, (does, given) in asked.items():
        if given:
            raise ConfigError(
                f"prune.{name} {does}, and {LORA_KEY} trains other weights for the cut. Leave one of them out."
            )


def require_targets(adapters: AdapterSettings, parameters: Mapping[str, Sequence[int]], layers: str) -> None:
    """Refuse ends of names that no linear layer has, before a weight is read.

    Args:
        adapters: that are trained beside masks.
        parameters: shape of every parameter of the dense model, by name.
        layers: what the names of decoder layers begin with.

    Raises:
        ConfigError: such an end is named; the nearest known one is offered.
    """
    names = [
        name.removesuffix(".weight")
        for name, shape in parameters.items()
        if name.startswith(f"{layers}.") and name.endswith(".weight") and len(shape) == 2
    ]
    for target in () if isinstance(adapters.targets, str) else adapters.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise ConfigError(unknown_name(f"{LORA_KEY} target", target, {name.rpartition(".")[2] for name in names}))


def together(masks: Mapping[str, MaskStatistics], mix: Mapping[str, float] | None = None) -> MaskStatistics:
    """Return the masks of several texts as those of one.

    Args:
        masks: by name of the text.
        mix: weight of each text, of any scale; those without one are left out. None counts every text the same.
    """
    if mix is None:
        return merge_masks(list(masks.values()))
    shares = normalised(mix)
    return merge_masks([masks[name] for name in shares], list(shares.values()))
