"""Checkpoints count only when complete, of the right training, and with the best one beside them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from secateur.errors import ExportError
from secateur.recover.checkpoints import MARKER, WEIGHTS, Checkpoints, forget

WEIGHT = {"layer.weight": torch.arange(6.0).view(2, 3)}


def checkpoint(checkpoints: Checkpoints, step: int, best: int) -> Path:
    """Write a complete checkpoint and return its folder."""
    checkpoints.write_weights(step, WEIGHT)
    (checkpoints.place(step) / "optimizer.pt").write_bytes(b"moments")
    checkpoints.complete(step, {"best_step": best, "tokens": 10 * step})
    return checkpoints.place(step)


@pytest.fixture
def three(tmp_path: Path) -> Checkpoints:
    """Checkpoints at the steps 0, 5 and 10, of which 5 was the best until 10."""
    checkpoints = Checkpoints(tmp_path / "work", "key")
    for step, best in ((0, 0), (5, 5), (10, 5)):
        checkpoint(checkpoints, step, best)
    return checkpoints


def test_the_newest_complete_checkpoint_is_gone_on_from(three: Checkpoints) -> None:
    """Its state and weights come back as they were."""
    assert three.resumable() == 10
    assert three.read_state(10) == {"best_step": 5, "tokens": 100}
    assert torch.equal(three.read_weights(10)["layer.weight"], WEIGHT["layer.weight"])
    assert Checkpoints(three.folder.parent / "none", "key").resumable() is None


@pytest.mark.parametrize("harm", ["no marker", "cut marker", "short file", "missing file", "changed state"])
def test_half_written_checkpoints_are_deleted_and_never_picked_up(three: Checkpoints, harm: str) -> None:
    """Whatever is missing; the one before it is taken."""
    place = three.place(10)
    if harm == "no marker":
        (place / MARKER).unlink()
    elif harm == "cut marker":
        (place / MARKER).write_bytes((place / MARKER).read_bytes()[:20])
    elif harm == "short file":
        os.truncate(place / WEIGHTS, 8)
    elif harm == "missing file":
        (place / "optimizer.pt").unlink()
    else:
        (place / "state.json").write_text((place / "state.json").read_text().replace("100", "101"))
    assert three.resumable() == 5
    assert not place.exists()


def test_a_checkpoint_whose_best_is_gone_is_of_no_use(three: Checkpoints) -> None:
    """The final weights could not be had from it."""
    shutil.rmtree(three.place(5))
    assert three.resumable() == 0
    assert not three.place(10).exists()


def test_checkpoints_of_another_training_are_deleted(three: Checkpoints) -> None:
    """They have another key; other files in the folder stay."""
    (three.folder / "notes.txt").write_text("mine")
    assert Checkpoints(three.folder, "other").resumable() is None
    assert [path.name for path in three.folder.iterdir()] == ["notes.txt"]


def test_only_the_wanted_checkpoints_are_kept(three: Checkpoints) -> None:
    """All others go."""
    three.keep_only({5, 10})
    assert sorted(path.name for path in three.folder.iterdir()) == ["checkpoint-10", "checkpoint-5"]


def test_the_marker_is_the_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut off at any moment before its rename, the checkpoint does not count."""
    checkpoints = Checkpoints(tmp_path, "key")

    def cut_off(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    checkpoints.write_weights(1, WEIGHT)
    assert Checkpoints(tmp_path, "key").resumable() is None
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", cut_off)
        checkpoint(checkpoints, 2, 2)
    assert checkpoints.resumable() is None
    assert not any(tmp_path.iterdir())


def test_forgetting_leaves_other_files(three: Checkpoints) -> None:
    """The folder goes too if it is empty then; a folder that is not there is no error."""
    (three.folder / "runs").mkdir()
    forget(three.folder)
    assert [path.name for path in three.folder.iterdir()] == ["runs"]
    (three.folder / "runs").rmdir()
    forget(three.folder)
    assert not three.folder.exists()
    forget(three.folder)


def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    """As everywhere else."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot be written .*Choose another output"):
        Checkpoints(tmp_path / "file", "key").write_weights(1, WEIGHT)
