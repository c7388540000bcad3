"""Files that are whole or not there at all, and where the cache is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.files import CACHE_VARIABLE, cache_folder, held, replacing, replacing_path


def test_the_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    """While it is written the name does not exist; afterwards only the name does. Missing folders are made."""
    target = tmp_path / "deep" / "a.bin"
    with replacing(target) as output:
        output.write(b"one")
        output.flush()
        assert not target.exists()
    assert target.read_bytes() == b"one"
    assert list(target.parent.iterdir()) == [target]


def test_readers_see_the_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    """Replacing is one step."""
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with replacing(target) as output:
        output.write(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_after_an_error_the_old_content_is_there_and_nothing_else(tmp_path: Path, error: type[BaseException]) -> None:
    """No part of the new content stays, whatever stopped the writing."""
    target = tmp_path / "a.bin"
    target.write_bytes(b"old")
    with pytest.raises(error), replacing(target) as output:
        output.write(b"half of the n")
        raise error("stop")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_temporary_file_lies_beside_the_target(tmp_path: Path) -> None:
    """Only within one file system is a rename one step; and two writers never share a temporary file."""
    target = tmp_path / "a.bin"
    with replacing_path(target) as first, replacing_path(target) as second:
        assert first.parent == second.parent == tmp_path
        assert first != second
        assert first.name.startswith(".")
        first.write_text("1")
        second.write_text("2")
    assert target.read_text() == "1"


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    """A path that was promised and never written does not pass for a file."""
    with pytest.raises(FileNotFoundError), replacing_path(tmp_path / "a.bin"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_files_have_ordinary_permissions(tmp_path: Path) -> None:
    """What is written may be read by whom the user's umask lets read."""
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.bin") as output:
            output.write(b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "a.bin").stat().st_mode & 0o777 == 0o640


def test_a_held_folder_is_held_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under whatever name it is asked for; it need not be there, nothing is made in it, and it is free again after."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    folder = tmp_path / "runs" / "a"
    with held(folder), held(tmp_path / "runs" / "b"):
        with pytest.raises(BlockingIOError), held(tmp_path / "runs" / "b" / ".." / "a"):
            pass
        assert not folder.exists()
    with held(folder):
        pass


def test_the_cache_folder_can_be_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The environment variable wins; without it, or with an empty one, it is the system's place for caches."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.setenv(CACHE_VARIABLE, "~/somewhere")
    assert cache_folder() == Path.home() / "somewhere"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder().name == "secateur"
    assert cache_folder() != tmp_path
