"""A pico project per session and a cache folder per test."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.files import CACHE_VARIABLE
from tests.pico import Pico, build_pico


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A model folder and corpora; nobody changes them."""
    return build_pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of the test's own, not yet made."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder
