"""What a person may name as a model, and what is said of everything else."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.errors import CheckpointError
from secateur.export.given import given_folder, given_model


def touch(*files: Path) -> None:
    """Make empty files with their folders."""
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def test_a_run_stands_for_its_best_model(tmp_path: Path) -> None:
    """The recovered one if there is one; a model folder stands for itself."""
    touch(tmp_path / "manifest.json", tmp_path / "model" / "config.json")
    assert given_model(tmp_path) == tmp_path / "model" == given_folder(tmp_path / "model")
    touch(tmp_path / "recovered" / "config.json")
    assert given_folder(tmp_path) == tmp_path / "recovered"


def test_a_run_without_a_model_is_to_be_finished(tmp_path: Path) -> None:
    """The message says how."""
    touch(tmp_path / "manifest.json")
    with pytest.raises(CheckpointError, match=r"has no model yet. Finish it: secateur run .*recipe.yml"):
        given_folder(tmp_path)


def test_a_gguf_file_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    """Not by its name."""
    file = tmp_path / "a.bin"
    file.write_bytes(b"GGUF....")
    assert given_model(file) == file
    file.write_bytes(b"\x80\x02")
    with pytest.raises(CheckpointError, match=r"is no GGUF file: it starts with b'\\x80\\x02'"):
        given_model(file)


def test_other_things_are_refused(tmp_path: Path) -> None:
    """What is missing, a folder of other things (also with a folder called model), a file where a folder must be."""
    with pytest.raises(CheckpointError, match="none does not exist"):
        given_model(tmp_path / "none")
    touch(tmp_path / "model" / "config.json")
    with pytest.raises(CheckpointError, match=r"has no config.json \(it holds model\)"):
        given_model(tmp_path)
    with pytest.raises(CheckpointError, match="is a file"):
        given_folder(tmp_path / "model" / "config.json")
