"""One pico project and one finished run per session; tests that change a run work on a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import secateur
from secateur.files import CACHE_VARIABLE
from tests.pico import Pico, build_pico

CopyRun = Callable[[], Path]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder of this session's own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A model folder, a domain corpus and a general text; nobody changes them."""
    return build_pico(tmp_path_factory.mktemp("pico"))


@pytest.fixture(scope="session")
def finished(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a full run with the default recipe; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "uniform"
    secateur.run(pico.recipe(folder))
    return folder


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that may be changed."""
    return Path(shutil.copytree(finished, tmp_path / "run"))
