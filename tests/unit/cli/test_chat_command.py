"""``secateur chat`` and ``secateur serve``: answers on stdout and nothing else there, and clear refusals."""

from __future__ import annotations

import io
import json
import socket
from pathlib import Path

import pytest

from tests.command import call
from tests.pico import save_model_folder


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with a model in it."""
    folder = tmp_path_factory.mktemp("chat")
    save_model_folder(folder / "model")
    (folder / "manifest.json").write_text("{}")
    return folder


def chat(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return what a greedy chat says on stdout."""
    answer = call(capsys, "chat", *arguments, "--max-new-tokens", "6", "--temperature", "0", "--device", "cpu")
    assert answer.code == 0, answer.err
    return answer.out


def test_a_prompt_is_answered_once(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same each time; a run's folder stands for the model in it."""
    said = chat(capsys, run_folder, "--prompt", "The patient")
    as_json = json.loads(chat(capsys, run_folder, "-p", "The patient", "--json"))
    assert as_json == {"model": str(run_folder / "model"), "answer": said.removesuffix("\n")}
    assert "Give --prompt" in call(capsys, "chat", run_folder, "--json").err
    assert said.strip() and said == chat(capsys, run_folder / "model", "--prompt", "The patient")


def test_lines_are_answered_until_they_end(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each as if asked alone, because this model has no chat template; what is not an answer goes to stderr."""
    monkeypatch.setattr("sys.stdin", io.StringIO("The patient\nA child\n"))
    both = chat(capsys, run_folder)
    assert both == "".join(chat(capsys, run_folder, "-p", text) for text in ("The patient", "A child"))


def test_ctrl_c_ends_it_politely(
    run_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a stack of errors nor an error's exit code."""

    class Interrupted(io.StringIO):
        def readline(self, *_: object) -> str:  # type: ignore[override]
            raise KeyboardInterrupt

    monkeypatch.setattr("sys.stdin", Interrupted())
    assert chat(capsys, run_folder) == ""


@pytest.mark.parametrize("command", ["chat", "serve"])
def test_what_is_no_model_is_refused(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line each: nothing there, another folder, another file."""
    other = tmp_path / "notes.md"
    other.write_text("# Notes")
    for place, words in ((tmp_path / "none", "does not exist"), (tmp_path, "no config.json"), (other, "no GGUF file")):
        answer = call(capsys, command, place)
        assert answer.code == 2 and words in answer.err and len(answer.err.splitlines()) == 1


def test_a_taken_port_is_named(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the model is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = call(capsys, "serve", run_folder, "--port", port)
    assert answer.code == 2 and f"nothing can listen on 127.0.0.1:{port}" in answer.err
