"""Paths name files in a fixed order, and a path that names nothing is refused with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from secateur.corpus.files import data_suffix, source_files
from secateur.errors import CorpusError

KNOWN = {".txt", ".jsonl"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with known, unknown and hidden files on two levels."""
    for name in ("b.txt", "a.JSONL.gz", "sub/c.txt", "sub/deep/d.txt", ".hidden.txt", ".git/e.txt", "notes.doc"):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "data"


def names(folder: Path, paths: str | list[str]) -> list[str]:
    """Return the files that ``paths`` name, relative to the folder."""
    return [file.relative_to(folder).as_posix() for file in source_files(paths, KNOWN)]


def test_folder_is_searched_in_order(folder: Path) -> None:
    """Known files on all levels, sorted; hidden and unknown ones are passed over."""
    assert names(folder, str(folder)) == ["a.JSONL.gz", "b.txt", "sub/c.txt", "sub/deep/d.txt"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.txt", ["b.txt"]),
        ("**/*.txt", ["b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        ("s*", ["sub/c.txt", "sub/deep/d.txt"]),
        ("*", ["a.JSONL.gz", "b.txt", "sub/c.txt", "sub/deep/d.txt"]),
        ("[b]*", ["b.txt"]),
    ],
)
def test_globs(folder: Path, pattern: str, expected: list[str]) -> None:
    """A glob names files, and folders with all that is in them; each file once."""
    assert names(folder, f"{folder}/{pattern}") == expected


def test_lists_keep_their_order_and_name_each_file_once(folder: Path) -> None:
    """Entries are read in the order given; a file named twice comes once."""
    assert names(folder, [f"{folder}/sub/c.txt", f"{folder}/b.txt", f"{folder}/sub"]) == [
        "sub/c.txt",
        "b.txt",
        "sub/deep/d.txt",
    ]


def test_brackets_in_an_existing_name_are_no_glob(folder: Path) -> None:
    """A file that exists is taken by its name, whatever characters it has."""
    (folder / "x[1].txt").write_text("x")
    assert names(folder, f"{folder}/x[1].txt") == ["x[1].txt"]


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` stands for the home folder, in plain paths and in globs."""
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    assert names(folder, ["~/b.txt", "~/sub/*.txt"]) == ["b.txt", "sub/c.txt"]


@pytest.mark.parametrize(
    ("entry", "fragment"),
    [
        ("{f}/b.tx", "b.tx does not exist. Did you mean '{f}/b.txt'?"),
        ("{f}/nowhere/b.txt", "b.txt does not exist. Correct the path (seen from "),
        ("{f}/*.csv", "*.csv matches nothing"),
        ("{f}/*.doc", "*.doc matches no file that can be read. Known suffixes: .jsonl, .txt, each also with .gz."),
        ("{f}/notes.doc", "notes.doc: unknown suffix '.doc'. Known: .jsonl, .txt, each also with .gz."),
        (" ", "is blank"),
    ],
)
def test_paths_that_name_nothing_are_refused(folder: Path, entry: str, fragment: str) -> None:
    """Each way to name no readable file has its own message."""
    with pytest.raises(CorpusError) as caught:
        source_files(entry.format(f=folder), KNOWN)
    assert fragment.format(f=folder) in str(caught.value)


def test_folder_without_known_files_is_refused(tmp_path: Path) -> None:
    """An empty folder is an error that lists the known suffixes."""
    with pytest.raises(CorpusError, match=r"holds no file that can be read. Known suffixes: \.jsonl, \.txt"):
        source_files(str(tmp_path), KNOWN)


def test_no_paths_are_refused() -> None:
    """An empty list is an error, not an empty corpus."""
    with pytest.raises(CorpusError, match="list of corpus paths is empty"):
        source_files([], KNOWN)


def test_a_folder_that_cannot_be_listed_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that may not be read is reported, not passed over."""
    listing = os.scandir

    def deny(path: str) -> object:
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", deny)
    with pytest.raises(CorpusError, match=r"cannot list folder .*sub: Permission denied. Check its rights"):
        source_files(str(folder), KNOWN)


@pytest.mark.parametrize(
    ("name", "suffix"), [("a.txt", ".txt"), ("a.JSONL.GZ", ".jsonl"), ("a.gz", ""), ("a", ""), ("a.b.csv", ".csv")]
)
def test_data_suffix_looks_under_the_compression(name: str, suffix: str) -> None:
    """The suffix is the format's, in lower case."""
    assert data_suffix(Path(name)) == suffix
