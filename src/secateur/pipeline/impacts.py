"""What single documents say of the units, as a part of a run: heard in the calibration pass where a method needs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError
from secateur.records.impacts import ImpactStatistics, merge_impacts
from secateur.store.artifacts import IMPACTS_VERSION, digest, read_impacts, write_impacts
from secateur.store.run_folder import RunFolder


@dataclass(frozen=True, slots=True)
class ImpactStage:
    """Takes and keeps what the documents of one run's texts say, each once.

    Attributes:
        kinds: unit kinds that are judged; empty where no method asks.
        buckets: names of the texts that decide.
        references: names of texts that are looked at one by one.
        folder: the run's folder.
        facts: what to record beside every file.
        key: hash of what a bucket's calibration depends on, by name.
        collect: runs a bucket through the dense model for this alone.
    """

    kinds: Sequence[str]
    buckets: Sequence[str]
    references: Sequence[str]
    folder: RunFolder
    facts: Mapping[str, Any]
    key: Callable[[str], str]
    collect: Callable[[str], ImpactStatistics]

    def is_missing(self, name: str) -> bool:
        """Return whether what a bucket's documents say is still to be taken."""
        return self._needs(name) and not self._is_done(name)

    def keep(self, name: str, impacts: ImpactStatistics | None, started: float) -> None:
        """Keep what was heard in a pass that began at ``started``; None where nothing was to be heard."""
        if impacts is not None:
            self._write(name, impacts, started)

    def take(self, name: str) -> list[str]:
        """Take what is missing of a bucket; return the stages that were there already."""
        if not self._needs(name):
            return []
        if self._is_done(name):
            return [self._stage(name)]
        started = time.perf_counter()
        self._write(name, self.collect(name), started)
        return []

    def load(self) -> ImpactStatistics | None:
        """Return what the documents of all texts that decide say; None where it is not needed."""
        return merge_impacts([read_impacts(self._file(name)) for name in self.buckets]) if self.kinds else None

    def load_bucket(self, name: str) -> ImpactStatistics | None:
        """Return what the documents of one bucket say; None where it is not needed."""
        return read_impacts(self._file(name)) if self._needs(name) else None

    def keys(self) -> list[str]:
        """Return what identifies all that was heard, for the plan that rests on it."""
        return [self._key(name) for name in dict.fromkeys([*self.buckets, *self.references]) if self._needs(name)]

    def _needs(self, name: str) -> bool:
        return bool(self.kinds) and (name in self.buckets or name in self.references)

    def _write(self, name: str, impacts: ImpactStatistics, started: float) -> None:
        self.folder.forget(self._stage(name))
        write_impacts(self._file(name), impacts, {"bucket": name, **self.facts})
        self.folder.finish(self._stage(name), self._key(name), started, documents=impacts.num_documents)

    def _stage(self, name: str) -> str:
        return f"impacts:{name}"

    def _file(self, name: str) -> Path:
        return self.folder.path / "statistics" / f"{name}.impacts.safetensors"

    def _key(self, name: str) -> str:
        return digest(self.key(name), list(self.kinds), IMPACTS_VERSION)

    def _is_done(self, name: str) -> bool:
        file = self._file(name)
        return self.folder.is_done(self._stage(name), self._key(name), file, file.with_suffix(".json"))


def require_no_mix(method: str, reads_impacts: bool, mix: Mapping[str, float] | None, *, guard: bool = False) -> None:
    """Raise ConfigError where texts are weighed for a method that looks at documents one by one.

    Args:
        method: its name.
        reads_impacts: whether it looks at documents one by one.
        mix: weights that are given.
        guard: whether weights are looked for.
    """
    if reads_impacts and (guard or mix is not None):
        weighs = "combine: guard weighs" if guard else "prune.mix weighs"
        instead = "Use combine: mean" if guard else "Name the texts under prune.buckets instead"
        raise ConfigError(
            f"method {method} looks at documents one by one, and {weighs} texts as a whole. {instead}, or use another "
            "method."
        )
