"""``secateur export``: a GGUF file that was read back, a plain word on what was not verified, and clear refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFReader

from secateur.errors import ExportError
from tests.command import call
from tests.pico import save_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; nobody changes it."""
    return save_model_folder(tmp_path_factory.mktemp("export") / "model")


def test_a_file_is_written_beside_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after folder and type; what was compared is said, and what was not."""
    answer = call(capsys, "export", folder, "--quantize", "Q8_0", "--no-verify")
    assert answer.code == 0, answer.err
    file = folder.with_name("model.Q8_0.gguf")
    assert "llama, Q8_0" in answer.out and str(file) in answer.out
    assert "read back and compared" in answer.out and "not run in llama.cpp: --no-verify was given" in answer.out
    assert GGUFReader(file).get_field("general.architecture") is not None


def test_without_the_engine_it_says_how_to_get_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is kept, because it was read back, and success is not claimed for llama.cpp."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else found(name, *a))
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf", "--json")
    assert answer.code == 0 and answer.json()["verified"] is None
    assert "pip install xllamacpp" in answer.json()["not_verified"]
    assert (tmp_path / "a.gguf").is_file()


def test_a_file_that_fails_in_the_engine_does_not_keep_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept under a name that says so, and the exit code is an error's."""

    def refuse(*_: object, **__: object) -> None:
        raise ExportError("llama.cpp answers otherwise.")

    monkeypatch.setattr("secateur.export.llama_cpp.verify_in_llama_cpp", refuse)
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf")
    assert answer.code == 2 and "llama.cpp answers otherwise. The file is kept as" in answer.err
    assert [file.name for file in tmp_path.iterdir()] == ["a.failed-verification.gguf"]


def test_an_unknown_type_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The known ones are listed, and nothing is written."""
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf", "-q", "Q4_K_M")
    assert answer.code == 2 and "Q8_0" in answer.err
    assert not list(tmp_path.iterdir())
