"""The gradients' part of a run: a backward pass over a share of the calibration text, where a method needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.records.gradients import GradientStatistics, merge_gradients
from secateur.records.statistics import normalised
from secateur.store.artifacts import GRADIENTS_VERSION, digest, read_gradients, write_gradients
from secateur.store.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class GradientStage:
    """Takes and keeps the gradients of one run's texts, each once.

    Attributes:
        kinds: unit kinds whose gradients are needed; empty where none are.
        buckets: names of the texts.
        max_tokens: of every text, at most; whole blocks are taken.
        folder: the run's folder.
        facts: what to record beside every file.
        key: hash of what a bucket's calibration depends on, by name.
        outputs: whether the gradients at the outputs of the reading projections are needed too.
        collect: runs a bucket forwards and backwards through the dense model.
        mix: weight of each bucket's mean; None counts every block the same.
        references: names of texts that are looked at one by one.
        sketch: whether projections of the gradients are needed too, so that those of two texts can be compared.
    """

    kinds: Sequence[str]
    buckets: Sequence[str]
    max_tokens: int
    outputs: bool
    folder: RunFolder
    facts: Mapping[str, Any]
    key: Callable[[str], str]
    collect: Callable[[str], GradientStatistics]
    mix: Mapping[str, float] | None = None
    references: Sequence[str] = ()
    sketch: bool = False

    def needs(self, name: str) -> bool:
        """Return whether the gradients of a bucket are needed."""
        return bool(self.kinds) and (name in self.buckets or name in self.references)

    def is_missing(self, name: str) -> bool:
        """Return whether the gradients of a bucket are still to be taken."""
        return self.needs(name) and not self._is_done(name)

    def take(self, name: str) -> list[str]:
        """Take what is missing of a bucket; return the stages that were there already."""
        if not self.needs(name):
            return []
        if self._is_done(name):
            return [self._stage(name)]
        self.folder.forget(self._stage(name))
        started = time.perf_counter()
        gradients = self.collect(name)
        write_gradients(self._file(name), gradients, {"bucket": name, **self.facts})
        self.folder.finish(self._stage(name), self._key(name), started, tokens=gradients.num_tokens)
        return []

    def load(self) -> GradientStatistics | None:
        """Return the gradients of all buckets together; None where none are needed."""
        if not self.kinds:
            return None
        return together({name: read_gradients(self._file(name)) for name in self.buckets}, self.mix)

    def load_bucket(self, name: str) -> GradientStatistics | None:
        """Return the gradients of one bucket; None where they are not needed."""
        return read_gradients(self._file(name)) if self.needs(name) else None

    def keys(self) -> list[str]:
        """Return what identifies the gradients of all buckets, for the plan that rests on them."""
        return [self._key(name) for name in dict.fromkeys([*self.buckets, *self.references]) if self.needs(name)]

    def _stage(self, name: str) -> str:
        return f"gradients:{name}"

    def _file(self, name: str) -> Path:
        return self.folder.path / "statistics" / f"{name}.gradients.safetensors"

    def _key(self, name: str) -> str:
        asked = [word for word, needed in (("outputs", self.outputs), ("sketch", self.sketch)) if needed]
        return digest(self.key(name), list(self.kinds), self.max_tokens, *asked, GRADIENTS_VERSION)

    def _is_done(self, name: str) -> bool:
        file = self._file(name)
        return self.folder.is_done(self._stage(name), self._key(name), file, file.with_suffix(".json"))


def together(gradients: Mapping[str, GradientStatistics], mix: Mapping[str, float] | None = None) -> GradientStatistics:
    """Return the gradients of several texts as those of one.

    Args:
        gradients: by name of the text.
        mix: weight of each text's mean, of any scale; those without one are left out. None counts every block the same.
    """
    if mix is None:
        return merge_gradients(list(gradients.values()))
    shares = normalised(mix)
    return merge_gradients([gradients[name] for name in shares], list(shares.values()))
