"""A run's folder: where each stage's result lies, and whether it is still the result of what is asked now.

A stage's result carries a key, a hash of everything it depends on. The same key means it can be reused; another key,
or a missing file, means the stage runs again. Results appear whole or not at all, so a run that was stopped resumes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from secateur.errors import CheckpointError, ExportError
from secateur.store.artifacts import digest, read_json, write_json, write_text

MANIFEST_VERSION = 1


@runtime_checkable
class Shared(Protocol):
    """Results that runs have in common, each under its stage and the hash of what it depends on."""

    def find(self, folder: RunFolder, stage: str, key: str) -> bool:
        """Put a result into a run folder, with its record; return whether there is one."""
        ...

    def keep(self, folder: RunFolder, stage: str, files: Sequence[Path]) -> None:
        """Take a finished result of a run folder, if it is of a kind that is shared."""
        ...


class RunFolder:
    """The folder of one run.

    Attributes:
        path: the folder.
        manifest: stages with keys and timings, versions, fingerprints and seeds.
        read_only: whether nothing is written, because another process of the same run does.
        shared: where results are looked for that are not in the folder; None where the run is by itself.
    """

    def __init__(
        self, path: Path, manifest: dict[str, Any], *, read_only: bool = False, shared: Shared | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.read_only = read_only
        self.shared = shared
        self._files: dict[str, Sequence[Path]] = {}

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, shared: Shared | None = None) -> RunFolder:
        """Return the run folder at ``path``; nothing is written before the first result.

        Raises:
            ExportError: the path is a file, or a folder with something else in it.
        """
        if path.exists() and not path.is_dir():
            raise ExportError(f"output {path} is a file. Choose another output folder.")
        manifest = _own_manifest(path)
        if manifest is not None:
            return cls(path, manifest, read_only=read_only, shared=shared)
        if path.is_dir() and any(path.iterdir()):
            first = sorted(item.name for item in path.iterdir())[0]
            raise ExportError(
                f"output folder {path} is not empty and is not a run of secateur (it holds {first}). "
                "Choose another output, or empty it."
            )
        return cls(path, {"schema_version": MANIFEST_VERSION, "stages": {}}, read_only=read_only, shared=shared)

    def save(self) -> None:
        """Write the manifest."""
        if not self.read_only:
            write_json(self.path / "manifest.json", self.manifest)

    def on_disk(self) -> str:
        """Return what tells the manifest that lies on disk now from others; processes that share a folder agree."""
        file = self.path / "manifest.json"
        return digest(file.read_text("utf-8")) if file.is_file() else "nothing"

    def look_again(self) -> None:
        """Read what another process has finished meanwhile."""
        self.manifest = _own_manifest(self.path) or self.manifest

    def describe(self, **facts: Any) -> None:
        """Record facts about the whole run: versions, fingerprints, seeds."""
        self.manifest.update(facts)
        self.save()

    def is_done(self, stage: str, key: str, *files: Path) -> bool:
        """Return whether a stage's result exists, or was found among shared ones, and was made from the same inputs.

        Args:
            stage: name of the stage.
            key: hash of what it depends on now.
            files: that must be there, besides those recorded when it was finished.
        """
        self._files[stage] = files
        if self._is_here(stage, key, files):
            return True
        found = self.shared is not None and not self.read_only and self.shared.find(self, stage, key)
        return found and self._is_here(stage, key, files)

    def _is_here(self, stage: str, key: str, files: Sequence[Path]) -> bool:
        entry: Mapping[str, Any] = self.manifest["stages"].get(stage, {})
        recorded = [self.path / name for name in entry.get("files", ())]
        return entry.get("key") == key and all(file.exists() for file in (*files, *recorded))

    def finish(self, stage: str, key: str, started: float, **facts: Any) -> None:
        """Record that a stage's result is complete.

        Args:
            stage: name of the stage.
            key: hash of what it depends on.
            started: ``time.perf_counter()`` when it began.
            facts: what else to record about it; ``files`` are the paths in the run folder that belong to it.
        """
        self.manifest["stages"][stage] = {
            "key": key,
            "seconds": round(time.perf_counter() - started, 3),
            "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **facts,
        }
        self.save()
        if self.shared is not None and not self.read_only:
            self.shared.keep(self, stage, self._files.get(stage, ()))

    def forget(self, stage: str) -> None:
        """Drop the record of a stage, before its result is replaced."""
        if self.manifest["stages"].pop(stage, None) is not None:
            self.save()

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file of the run."""
        if not self.read_only:
            write_text(self.path / name, text)
        return self.path / name


def _own_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest in a run folder, an empty one where it is broken; None where the folder is no run."""
    empty = {"schema_version": MANIFEST_VERSION, "stages": {}}
    if not (path / "manifest.json").is_file():
        return None
    try:
        manifest = read_json(path / "manifest.json")
    except CheckpointError:
        return empty if (path / "recipe.yml").is_file() else None
    return {**empty, **manifest} if isinstance(manifest.get("stages"), dict) else None
