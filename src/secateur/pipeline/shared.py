"""What runs of one sweep have in common: the first that needs a result makes it, the others find it here.

A result lies under its stage and the hash of everything it depends on, the same hash by which a run knows its own
results again. So what is found is what the run would have made, and results of other settings lie beside each other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from secateur.files import replacing_path
from secateur.store.artifacts import atomic_folder, disk_errors, read_json, write_json
from secateur.store.run_folder import RunFolder

STAGES = (
    "calibrate:",
    "gram:",
    "gradients:",
    "impacts:",
    "masks:",
    "count:",
    "search:",
    "prompts:",
    "answer:",
    "recover:text",
    "recover:dense_finetuned",
    "evaluate:dense",
    "tasks:dense",
)
"""How the names of stages begin that several runs may have in common: those that know nothing of the plan, and those
that the hash of the plan is part of, where runs of the same plan may meet. Rows of the dense model, fine-tuned too, are
among them."""

RECORD = "stage.json"
"""Beside the files of a result: what the run recorded of it."""

_ROW = "evaluate:"
_GROWING = ("search:cuts", "search:depth")
"""What is measured of single cuts and of whole blocks grows with the units and budgets that ask for it."""

_LINKED = ".safetensors"
"""Large files, which are always replaced as a whole; others are copied."""


class SharedStages:
    """Results of stages in a folder, each in ``<stage>/<hash>``.

    Several processes may use the same folder: a result appears whole, and whoever makes one a second time replaces it
    by its equal.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def find(self, folder: RunFolder, stage: str, key: str) -> bool:
        """Put a result into a run folder, with its record; return whether there is one."""
        place = self._place(stage, key)
        if not stage.startswith(STAGES) or not _is_whole(place):
            return False
        found = read_json(place / RECORD)
        if stage.startswith(_ROW):
            _add_row(folder.path / "evaluation.json", stage.removeprefix(_ROW), found["evaluation"])
        for name in found["files"]:
            _put(place / "files" / name, folder.path / name)
        folder.manifest["stages"][stage] = found["record"]
        folder.save()
        return True

    def keep(self, folder: RunFolder, stage: str, files: Sequence[Path]) -> None:
        """Take a finished result of a run folder, if it is of a kind that is shared."""
        if not stage.startswith(STAGES):
            return
        record = folder.manifest["stages"][stage]
        place = self._place(stage, record["key"])
        if _is_whole(place) and not stage.startswith(_GROWING):
            return
        data: dict[str, Any] = {"record": record}
        names = [str(file.relative_to(folder.path)) for file in files] + list(record.get("files", ()))
        if stage.startswith(_ROW):
            data["evaluation"] = _only_row(read_json(folder.path / "evaluation.json"), stage.removeprefix(_ROW))
            names = []
        with disk_errors(self.path), atomic_folder(place) as work:
            for name in names:
                _put(folder.path / name, work / "files" / name)
            write_json(work / RECORD, {**data, "files": names})

    def _place(self, stage: str, key: str) -> Path:
        return self.path / stage.replace(":", "-") / key[:32]


def _is_whole(place: Path) -> bool:
    """Return whether a result lies there, and all of it."""
    if not (place / RECORD).is_file():
        return False
    return all((place / "files" / name).is_file() for name in read_json(place / RECORD)["files"])


def _put(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` where that is safe and possible, else a copy."""
    with replacing_path(target) as temporary:
        try:
            if source.suffix != _LINKED:
                raise OSError
            os.link(source, temporary)
        except OSError:
            shutil.copy2(source, temporary)


def _only_row(evaluation: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return an evaluation's plain data with one row only."""
    return {**evaluation, "models": {name: evaluation["models"][name]}, "vocabulary": {}}


def _add_row(file: Path, name: str, found: Mapping[str, Any]) -> None:
    """Put a row into an evaluation on disk, or begin one with it."""
    own = read_json(file) if file.is_file() else {**found, "models": {}}
    write_json(file, {**own, "models": {**own["models"], name: found["models"][name]}})
