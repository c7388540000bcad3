"""The Gram matrices' part of a run: taken where a method or the reconstruction needs them, and the reconstruction.

They are large, so they lie in files of their own, and are read one site at a time. Those of validation text judge which
ridge holds on text that was not fitted. How much text they need is said here too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.corpus.split import Split
from secateur.errors import CorpusError
from secateur.families.geometry import Geometry, UnitAxis
from secateur.records.gram import Grams, GramsInMemory, MixedGrams, effective_tokens
from secateur.records.statistics import normalised
from secateur.records.units import UNIT_NAMES
from secateur.shrink.reconstruct import choose_reconstruction, reconstruct
from secateur.store.artifacts import digest
from secateur.store.gram_files import read_grams, write_grams
from secateur.store.run_folder import RunFolder

TOKENS_PER_CHANNEL_LEAST = 1
"""Below this a Gram matrix is singular, because each token adds one direction; what the ridge then fills in is not
knowledge of the text, so it is refused."""

TOKENS_PER_CHANNEL_FEW = 5
"""Below this a person is told. Least squares over k channels on n tokens errs on other text by about k / (n - k) more
than its best: 11 % at 10 tokens per channel, 25 % at 5, 100 % at 2 (normal inputs, no ridge; a ridge softens it)."""

TOKENS_PER_CHANNEL_ENOUGH = 10
"""What is recommended: from here on, more text improves the fit by a tenth at most."""


@dataclass(frozen=True, slots=True)
class Supply:
    """How many tokens Gram matrices rest on, against the widest projection of each kind.

    Attributes:
        tokens: that count; of a mixture, the equally weighted tokens that say as much.
        channels: by unit kind, input channels of the widest reading projection.
        mixed: whether the tokens are weighed unequally.
    """

    tokens: float
    channels: Mapping[str, int]
    mixed: bool = False

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        kinds: Iterable[str],
        tokens: Mapping[str, int],
        mix: Mapping[str, float] | None = None,
    ) -> Supply:
        """Return the supply of texts, by their tokens, for the reading projections of some kinds of unit."""
        widths = {kind: [axis.num_units * axis.reader_width for axis in geometry.axes[kind]] for kind in kinds}
        channels = {kind: max(found, default=0) for kind, found in widths.items()}
        if mix is None:
            return cls(float(sum(tokens.values())), channels)
        shares = normalised(mix)
        effective = effective_tokens([tokens[name] for name in shares], list(shares.values()))
        return cls(effective, channels, mixed=len(shares) > 1)

    def require(self) -> None:
        """Raise CorpusError where Gram matrices would be singular."""
        for kind, channels in self.channels.items():
            if self.tokens < TOKENS_PER_CHANNEL_LEAST * channels:
                raise CorpusError(
                    f"{self._has(kind, channels)}, and Gram matrices need {TOKENS_PER_CHANNEL_LEAST} at the very "
                    f"least. {self._advice(channels)}, or use a method and a recipe without Gram matrices."
                )

    def notes(self) -> list[str]:
        """Return a sentence for every kind whose Gram matrices rest on little text."""
        return [
            f"{self._has(kind, channels)}; least squares and methods that read Gram matrices want "
            f"{TOKENS_PER_CHANNEL_ENOUGH}. {self._advice(channels)}"
            for kind, channels in self.channels.items()
            if self.tokens < TOKENS_PER_CHANNEL_FEW * channels
        ]

    def _has(self, kind: str, channels: int) -> str:
        weighed = ", as the mixture weighs them," if self.mixed else ""
        per_channel = int(10 * self.tokens / channels) / 10  # rounded down, so that too few never look enough
        return (
            f"the projection that reads {UNIT_NAMES[kind]} has {per_channel:.1f} calibration tokens per "
            f"channel ({int(self.tokens):,} tokens{weighed} for {channels:,} channels)"
        )

    def _advice(self, channels: int) -> str:
        wanted = TOKENS_PER_CHANNEL_ENOUGH * channels
        return f"Calibrate on {wanted:,} tokens or more (calibrate.max_tokens, and as much text)"


def judging_tokens(max_tokens: int | None, block_size: int) -> int | None:
    """Return how many validation tokens judge fits on ``max_tokens`` calibration tokens: a quarter, a block at least.

    They choose one ridge per projection, and so can be far fewer than those that are fitted.
    """
    return None if max_tokens is None else max(block_size, max_tokens // 4)


@dataclass(frozen=True, slots=True)
class GramStage:
    """Takes and keeps the Gram matrices of one run, each once.

    Attributes:
        kinds: unit kinds whose matrices are needed; empty where none are.
        buckets: names of the texts.
        judged: whether those of validation text are needed too.
        folder: the run's folder.
        facts: what to record beside every file.
        key: hash of what a bucket's calibration depends on, by name.
        collect: runs a split of a bucket through the dense model.
        mix: weight of each bucket's mean; None counts every token the same.
        references: names of texts that are looked at one by one.
    """

    kinds: Sequence[str]
    buckets: Sequence[str]
    judged: bool
    folder: RunFolder
    facts: Mapping[str, Any]
    key: Callable[[str], str]
    collect: Callable[[str, Split], GramsInMemory]
    mix: Mapping[str, float] | None = None
    references: Sequence[str] = ()

    def splits(self, name: str) -> list[Split]:
        """Return the splits of a bucket whose matrices are needed."""
        if not self.kinds or name not in (*self.buckets, *self.references):
            return []
        if name not in self.buckets:
            return ["calibration"]
        return ["calibration", "validation"] if self.judged else ["calibration"]

    def missing(self, name: str) -> list[Split]:
        """Return the splits of a bucket whose matrices are still to be taken."""
        return [split for split in self.splits(name) if not self._is_done(name, split)]

    def take(self, name: str) -> list[str]:
        """Take what is missing of a bucket; return the stages that were there already."""
        reused = [self._stage(name, split) for split in self.splits(name) if self._is_done(name, split)]
        for split in self.missing(name):
            self.folder.forget(self._stage(name, split))
            started = time.perf_counter()
            self.write(name, split, self.collect(name, split), started)
        return reused

    def write(self, name: str, split: Split, grams: GramsInMemory, started: float) -> None:
        """Keep the matrices of a split; ``started`` is when the work on them began."""
        self.folder.forget(self._stage(name, split))
        facts = {"bucket": name, "split": split, **self.facts}
        write_grams(self._file(name, split), grams, sorted(grams.sums), facts)
        self.folder.finish(self._stage(name, split), self._key(name), started, tokens=grams.count)

    def load(self, split: Split) -> Grams | None:
        """Return the matrices of all buckets together, still on disk; None where none are needed."""
        if not self.kinds:
            return None
        return together({name: read_grams(self._file(name, split))[0] for name in self.buckets}, self.mix)

    def load_bucket(self, name: str) -> Grams | None:
        """Return the matrices of one bucket's calibration text, still on disk; None where they are not needed."""
        return read_grams(self._file(name, "calibration"))[0] if self.splits(name) else None

    def reconstructor(self) -> Reconstructor:
        """Return what fits on calibration text and is judged on validation text."""
        fitted, held_out = self.load("calibration"), self.load("validation")
        assert fitted is not None and held_out is not None, "reconstruction needs Gram matrices"
        return Reconstructor(fitted, held_out)

    def _stage(self, name: str, split: Split) -> str:
        return f"gram:{name}:{split}"

    def _file(self, name: str, split: Split) -> Path:
        return self.folder.path / "statistics" / f"{name}.{split}.gram.safetensors"

    def _key(self, name: str) -> str:
        return digest(self.key(name), list(self.kinds))

    def _is_done(self, name: str, split: Split) -> bool:
        file = self._file(name, split)
        return self.folder.is_done(self._stage(name, split), self._key(name), file, file.with_suffix(".json"))


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """How one projection, or the scales of one layer's experts, were reconstructed.

    Attributes:
        module: name of the projection, or of the module that holds the experts.
        ridge: relative ridge, infinite where all experts of a layer have one scale; None where all stayed as it was
            because nothing was better on held-out text.
        error_before: held-out relative squared output error without reconstruction; ``error_after`` with it.
    """

    module: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass
class Reconstructor:
    """Gives the weight of a projection that lost input channels, fitted on one text and judged on another.

    The ridge that judges best is then used once more on both texts together, because more text fits better; the errors
    in ``reports`` are those of the first fit, on text that it did not see.

    Attributes:
        fitted: Gram matrices of the calibration text.
        held_out: Gram matrices of the validation text.
        reports: one entry per projection, in the order in which they were asked for; those of experts come first.
        scales: by layer, of the routed experts that stay, where some fitted better than 1.
    """

    fitted: Grams
    held_out: Grams
    reports: list[ModuleReport] = field(default_factory=list)
    scales: Mapping[int, Tensor] = field(default_factory=dict)

    def __call__(self, axis: UnitAxis, keep: Sequence[int], weight: Tensor) -> Tensor:
        """Return the weight of the kept channels, out x kept.

        Raises:
            PlanError: too little text for so many channels.
        """
        site = axis.site
        fitted, held_out = (grams.load(site).to(weight.device) / grams.count for grams in (self.fitted, self.held_out))
        kept = torch.tensor(list(keep))
        chosen = choose_reconstruction(weight, fitted, held_out, kept)
        self.reports.append(ModuleReport(axis.reader, chosen.ridge, chosen.error_before, chosen.error_after))
        if chosen.ridge is None:
            return chosen.kept_weight
        both = together({"fitted": self.fitted, "held_out": self.held_out})
        return reconstruct(weight, both.load(site).to(weight.device), kept, ridge=chosen.ridge)


def together(grams: Mapping[str, Grams], mix: Mapping[str, float] | None = None) -> Grams:
    """Return the Gram matrices of several texts as those of one.

    Args:
        grams: by name of the text.
        mix: weight of each text's mean, of any scale; those without one are left out. None counts every token the same.
    """
    shares = normalised(mix or {name: part.count for name, part in grams.items()})
    parts = [grams[name] for name in shares]
    return parts[0] if len(parts) == 1 else MixedGrams(parts, list(shares.values()))


def summary(reports: Sequence[ModuleReport]) -> Mapping[str, float]:
    """Return means over projections of the held-out error before and after, and how many stayed as they were."""
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "error_before": mean([report.error_before for report in reports]),
        "error_after": mean([report.error_after for report in reports]),
        "unchanged": sum(report.ridge is None for report in reports),
        "projections": len(reports),
    }
