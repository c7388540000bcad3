"""``secateur export``: a GGUF file that was read back, a plain word on what was not verified, and clear refusals."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from gguf import GGUFReader

from secateur.errors import VerificationError
from secateur.export import llama_cpp
from secateur.export.targets import TARGETS
from tests.command import call
from tests.pico import save_model_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder; nobody changes it."""
    return save_model_folder(tmp_path_factory.mktemp("export") / "model")


def test_a_file_is_written_beside_the_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named after folder and type; what was compared is said, and what was not."""
    answer = call(capsys, "export", folder, "--quantize", "q8_0", "--no-verify")
    assert answer.code == 0, answer.err
    file = folder.with_name("model.Q8_0.gguf")
    assert "llama, Q8_0" in answer.out and str(file) in answer.out
    assert "read back and compared" in answer.out and "not verified in an engine: that was not asked for" in answer.out
    assert GGUFReader(file).get_field("general.architecture") is not None


def test_without_the_engine_it_says_how_to_get_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is kept, because it was read back, and success is not claimed for llama.cpp."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else found(name, *a))
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf", "--json")
    assert answer.code == 0 and answer.json()["verified"] == ""
    assert "pip install xllamacpp" in answer.json()["not_verified"]
    assert (tmp_path / "a.gguf").is_file()


def test_a_file_that_fails_in_the_engine_does_not_get_its_name(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is kept under a name that says so, the exit code is 1, and an earlier file stays what it was."""

    def refuse(*_: object, **__: object) -> None:
        raise VerificationError("llama.cpp answers otherwise.")

    (tmp_path / "a.gguf").write_bytes(b"earlier")
    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", refuse)
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf")
    assert answer.code == 1 and "llama.cpp answers otherwise. The file is kept as" in answer.err
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.failed-verification.gguf", "a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"earlier"


def test_the_help_names_every_target(capsys: pytest.CaptureFixture[str]) -> None:
    """A target that is registered is named there."""
    text = call(capsys, "export", "--help").out
    assert all(name in text for name in TARGETS)


def test_zeros_fill_up_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The refusal names the option; with it the cost is said."""
    folder = save_model_folder(tmp_path / "model", intermediate_size=100)
    refused = call(capsys, "export", folder, "-q", "Q8_0", "--no-verify")
    assert refused.code == 2 and "--round-to-fit" in refused.err
    answer = call(capsys, "export", folder, "-q", "Q8_0", "--no-verify", "--round-to-fit")
    assert answer.code == 0, answer.err
    assert "filled up with zeros: layers 0-1 from 100 to 128 FFN channels: 10,752 more parameters" in answer.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("-q", "Q4_X"), ("unknown type of export target gguf 'Q4_X'", "Q8_0", "Q4_K_M")),
        (("--to", "ggfu"), ("unknown export target 'ggfu'. Did you mean 'gguf'?",)),
    ],
)
def test_what_is_unknown_is_refused(
    arguments: tuple[str, ...], words: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The known ones are listed, and nothing is written."""
    answer = call(capsys, "export", folder, "-o", tmp_path / "a.gguf", *arguments)
    assert answer.code == 2 and all(word in answer.err for word in words)
    assert not list(tmp_path.iterdir())
