"""Which files a corpus path names: files, folders and globs, in an order that does not depend on the machine."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Collection, Sequence
from pathlib import Path

from secateur.errors import CorpusError

COMPRESSED = ".gz"
"""May follow any known suffix."""


def source_files(paths: str | Sequence[str], known: Collection[str]) -> list[Path]:
    """Return the files that ``paths`` name, each once, in the order given; folders and globs are sorted.

    Args:
        paths: files, folders (searched to the bottom; hidden and unknown files are passed over) or globs (``**``
            crosses folders). ``~`` is the home folder.
        known: the suffixes that can be read, such as ``".txt"``; each may be followed by ``.gz``.

    Raises:
        CorpusError: there is no path, a path is missing, a glob matches nothing, a folder or glob has no file with a
            known suffix, or a named file has an unknown one.
    """
    entries = [paths] if isinstance(paths, str) else list(paths)
    if not entries:
        raise CorpusError("the list of corpus paths is empty. Name at least one file, folder or glob.")
    found = [file for entry in entries for file in _entry_files(entry, known)]
    return list(dict.fromkeys(found))


def data_suffix(path: Path) -> str:
    """Return the suffix that names the format, in lower case: ``.jsonl`` for ``Notes.JSONL.gz``."""
    name = path.name.lower().removesuffix(COMPRESSED)
    return Path(name).suffix


def _entry_files(entry: str, known: Collection[str]) -> list[Path]:
    if not entry.strip():
        raise CorpusError(f"corpus path {entry!r} is blank. Name a file, a folder or a glob.")
    path = Path(entry).expanduser()
    if path.is_dir():
        return _folder_files(path, known)
    if path.exists():
        if data_suffix(path) not in known:
            raise CorpusError(f"cannot read {path}: unknown suffix {data_suffix(path)!r}. Known: {_suffixes(known)}.")
        return [path]
    if glob.has_magic(entry):
        return _glob_files(str(path), known)
    raise CorpusError(f"corpus path {path} does not exist.{_nearest(path)} Correct the path (seen from {Path.cwd()}).")


def _folder_files(folder: Path, known: Collection[str]) -> list[Path]:
    files = _walk(folder, known)
    if not files:
        raise CorpusError(f"folder {folder} holds no file that can be read. Known suffixes: {_suffixes(known)}.")
    return files


def _walk(folder: Path, known: Collection[str]) -> list[Path]:
    files: list[Path] = []
    for root, folders, names in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if data_suffix(file) in known)


def _refuse(error: OSError) -> None:
    raise CorpusError(f"cannot list folder {error.filename}: {error.strerror}. Check its rights.")


def _glob_files(pattern: str, known: Collection[str]) -> list[Path]:
    matches = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise CorpusError(f"glob {pattern} matches nothing. Correct the pattern (seen from {Path.cwd()}).")
    files: list[Path] = []
    for match in matches:
        if match.is_dir():
            files += _walk(match, known)
        elif data_suffix(match) in known:
            files.append(match)
    if not files:
        raise CorpusError(f"glob {pattern} matches no file that can be read. Known suffixes: {_suffixes(known)}.")
    return sorted(files)


def _nearest(path: Path) -> str:
    if not path.parent.is_dir():
        return ""
    near = difflib.get_close_matches(path.name, sorted(os.listdir(path.parent)), n=1)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _suffixes(known: Collection[str]) -> str:
    return f"{', '.join(sorted(known))}, each also with {COMPRESSED}"
