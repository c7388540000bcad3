"""Checkpoints of a training that count only when they are complete, and the state that a training resumes from.

A checkpoint is a folder ``checkpoint-STEP``. Its last file, written under another name and renamed, lists all the
others with their sizes; a folder without that file, or with other files than it lists, was cut off in the middle and is
deleted. So is one of a training on other text, weights or options, which has another key.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.store.artifacts import disk_errors, read_json, write_json

MARKER = "complete.json"
WEIGHTS = "weights.safetensors"
_STATE = "state.json"
_PREFIX = "checkpoint-"
_HASHED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        folder: where they are; other files in it are left alone.
        key: identifies all that the training depends on.
    """

    folder: Path
    key: str

    def place(self, step: int) -> Path:
        """Return the folder of a step's checkpoint."""
        return self.folder / f"{_PREFIX}{step}"

    def resumable(self) -> int | None:
        """Return the step of the newest checkpoint to go on from, None without one, and delete those that do not count.

        Going on from a checkpoint also needs the one of the best step until then.
        """
        steps = [step for step in _steps(self.folder) if self._counts(step)]
        for step in _steps(self.folder):
            if step not in steps:
                _delete(self.place(step))
        for step in sorted(steps, reverse=True):
            if self.read_state(step)["best_step"] in steps:
                return step
            _delete(self.place(step))
        return None

    def read_state(self, step: int) -> dict[str, Any]:
        """Return the state that was written with a complete checkpoint."""
        return read_json(self.place(step) / _STATE)

    def complete(self, step: int, state: Mapping[str, Any]) -> None:
        """Add the state to a checkpoint's files, put all of them on the disk, and mark it complete.

        Args:
            step: of the checkpoint.
            state: plain data; ``best_step`` in it says whose weights are the best so far.

        Raises:
            ExportError: the disk is full.
        """
        place = self.place(step)
        with disk_errors(place):
            write_json(place / _STATE, state)
            files = [file for file in sorted(place.rglob("*")) if file.is_file()]
            for file in files:
                _sync(file)
            listed = {file.relative_to(place).as_posix(): _describe(file) for file in files}
            temporary = place / f".{MARKER}.part"
            temporary.write_text(json.dumps({"key": self.key, "step": step, "files": listed}), encoding="utf-8")
            _sync(temporary)
            os.replace(temporary, place / MARKER)
            _sync(place)
            _sync(self.folder)

    def keep_only(self, steps: Collection[int]) -> None:
        """Delete the checkpoints of all other steps."""
        for step in _steps(self.folder):
            if step not in steps:
                _delete(self.place(step))

    def write_weights(self, step: int, weights: Mapping[str, Tensor]) -> None:
        """Write a step's weights into the folder of its checkpoint.

        Raises:
            ExportError: the disk is full.
        """
        place = self.place(step)
        with disk_errors(place):
            place.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, place / WEIGHTS)

    def read_weights(self, step: int) -> dict[str, Tensor]:
        """Return the weights of a complete checkpoint, on the CPU."""
        weights: dict[str, Tensor] = load_file(self.place(step) / WEIGHTS)
        return weights

    def _counts(self, step: int) -> bool:
        place = self.place(step)
        try:
            marker = json.loads((place / MARKER).read_text(encoding="utf-8"))
            return bool(marker["key"] == self.key) and all(
                _describe(place / name) == described for name, described in marker["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def forget(folder: Path) -> None:
    """Delete all checkpoints in a folder, whatever their key, and the folder too if nothing else is in it."""
    for step in _steps(folder):
        _delete(folder / f"{_PREFIX}{step}")
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _steps(folder: Path) -> list[int]:
    """Return the steps of all checkpoints in a folder, complete or not."""
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*") if path.is_dir()]
    return sorted(int(name) for name in names if name.isdecimal())


def _describe(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    small = hashlib.sha256(file.read_bytes()).hexdigest() if size <= _HASHED_BYTES else None
    return {"size": size, "sha256": small}


def _delete(place: Path) -> None:
    """Delete a checkpoint, first what says that it is complete."""
    (place / MARKER).unlink(missing_ok=True)
    shutil.rmtree(place)


def _sync(path: Path) -> None:
    """Put a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
