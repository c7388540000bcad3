"""A tiny wheel and the asset that pins it."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from secateur.demo import Asset

from .fakes import CONTENT


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with one data file, one module that must never run, and one member with a hostile path."""
    path = tmp_path / "registry" / "tiny_data-1.2-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_data/__init__.py", "raise SystemExit('executed')")
        archive.writestr("tiny_data/data/words.txt", CONTENT)
        archive.writestr("../../escaped.txt", "outside")
    return path


@pytest.fixture
def asset(wheel: Path) -> Asset:
    """The asset that pins the tiny wheel."""
    return Asset(
        package="tiny-data",
        version="1.2",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        member="tiny_data/data/words.txt",
        file_name="words.txt",
        licence="CC0-1.0",
        attribution="Nobody in particular.",
    )


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder that does not exist yet."""
    return tmp_path / "cache"
