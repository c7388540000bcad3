"""The masks' part of a run: gates trained on the calibration text, where a method needs them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.records.masks import MaskSettings, MaskStatistics, merge_masks
from secateur.records.statistics import normalised
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
        write_masks(self._file(name), masks, {"bucket": name, "settings": asdict(self.settings), **self.facts})
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

    def _needs(self, name: str) -> bool:
        return self.is_needed and (name in self.buckets or name in self.references)

    def _stage(self, name: str) -> str:
        return f"masks:{name}"

    def _file(self, name: str) -> Path:
        return self.folder.path / "statistics" / f"{name}.masks.safetensors"

    def _key(self, name: str) -> str:
        assert self.settings is not None
        how = list(self.kinds), self.max_tokens, self.seed, asdict(self.settings)
        return digest(self.key(name), *how, MASKS_VERSION)

    def _is_done(self, name: str) -> bool:
        file = self._file(name)
        return self.folder.is_done(self._stage(name), self._key(name), file, file.with_suffix(".json"))


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
