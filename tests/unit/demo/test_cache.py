"""The cache: files appear whole or not at all, and count only for what they were made from."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from secateur.demo.cache import is_current, mark, writable
from secateur.errors import UnavailableError
from secateur.files import cache_folder, replacing


def test_the_environment_variable_names_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """SECATEUR_CACHE wins over the system's cache folder."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize("value", [None, ""])
def test_unset_or_empty_means_the_system_folder(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """An empty variable is not the current directory."""
    monkeypatch.delenv("SECATEUR_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("SECATEUR_CACHE", value)
    assert cache_folder().is_absolute()
    assert "secateur" in cache_folder().parts


def test_a_marked_file_is_current_for_its_stamp_only(tmp_path: Path) -> None:
    """Neither another stamp nor a missing marker counts."""
    path = tmp_path / "a.txt"
    path.write_text("text")
    assert not is_current(path, "one")
    mark(path, "one")
    assert is_current(path, "one")
    assert not is_current(path, "two")


def test_a_truncated_or_missing_file_is_not_current(tmp_path: Path) -> None:
    """The marker holds the length, so a cut file is noticed."""
    path = tmp_path / "a.txt"
    path.write_text("text")
    mark(path, "one")
    path.write_text("te")
    assert not is_current(path, "one")
    path.unlink()
    assert not is_current(path, "one")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    """An error in the middle of writing keeps what was there."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as output:
        output.write(b"ne")
        raise RuntimeError
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    """The message names the folder, the room needed and the variable to set."""
    with pytest.raises(UnavailableError, match=r"no space left .* needs about .* MB .* SECATEUR_CACHE"):
        with writable(tmp_path):
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    """A file in the way of the cache folder is the user's to solve."""
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UnavailableError, match=r"cache folder .* cannot be used: .* Set SECATEUR_CACHE"):
        with writable(tmp_path / "cache" / "demo"):
            raise AssertionError("not reached")
