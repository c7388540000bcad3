"""``secateur push``: shows what would go up, asks for what must be acknowledged, and sends only then."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.command import call
from tests.hub_server import HubServer, hub_server
from tests.pico import save_model_folder

REPO = "me/pico-medical"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder."""
    return save_model_folder(tmp_path_factory.mktemp("push") / "model")


@pytest.fixture
def llama(folder: Path) -> Iterator[Path]:
    """The same, under a licence that asks for more."""
    card = folder / "README.md"
    before = card.read_text()
    card.write_text("---\nlicense: llama3.1\n---\n# Pico\n")
    yield folder
    card.write_text(before)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub on this machine, where the user is logged in."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with hub_server() as server:
        monkeypatch.setattr("huggingface_hub.HfApi", server.api)
        yield server


def test_a_dry_run_shows_and_sends_nothing(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """Every file with its size."""
    answer = call(capsys, "push", folder, REPO, "--dry-run")
    assert answer.code == 0 and not hub.calls
    assert "model.safetensors" in answer.out and "kB" in answer.out and "nothing was sent (--dry-run)" in answer.out
    facts = call(capsys, "push", folder, REPO, "--dry-run", "--json").json()
    assert facts["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert facts["url"] == "" and facts["licence"] == ""


def test_it_is_sent_after_a_yes(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """And says where to."""
    answer = call(capsys, "push", folder, REPO, "--yes", "--private")
    assert answer.code == 0, answer.err
    assert f"sent: {hub.address}/{REPO}/commit/" in answer.out
    assert hub.private == {REPO: True}


def test_nobody_there_to_ask_means_no(folder: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """In a script --yes must be said."""
    answer = call(capsys, "push", folder, REPO)
    assert answer.code == 2 and "Give --yes, or --dry-run" in answer.err and not hub.calls


def test_terms_must_be_acknowledged(llama: Path, hub: HubServer, capsys: pytest.CaptureFixture[str]) -> None:
    """They are shown first, with what this upload does not meet."""
    answer = call(capsys, "push", llama, REPO, "--yes")
    assert answer.code == 2 and not hub.calls
    assert "Llama 3.1 Community License" in answer.err and "--accept-licence-terms" in answer.err
    assert "NOT MET: the repository's name must begin" in answer.out
    answer = call(capsys, "push", llama, "me/Llama-pico", "--yes", "--accept-licence-terms")
    assert answer.code == 0, answer.err
    assert b"Llama 3.1 is licensed" in hub.files["me/Llama-pico"]["Notice"]


def test_what_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one line."""
    answer = call(capsys, "push", tmp_path / "none", REPO)
    assert answer.code == 2 and answer.err.startswith("error: ") and "does not exist" in answer.err
