"""The cache folder: where downloads are kept, how a file appears in it whole or not at all, and when it still counts.

A kept file has a marker beside it (``NAME.stamp``) that says what the file was made from and how long it is. Not a
download and not a lock: two runs at once do the work twice and end with the same files.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur.errors import UnavailableError
from secateur.files import CACHE_VARIABLE, replacing

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def is_current(path: Path, stamp: str) -> bool:
    """Return whether ``path`` is complete and was made from what ``stamp`` names."""
    try:
        return _marker(path).read_bytes() == _marker_content(path, stamp)
    except OSError:
        return False


def mark(path: Path, stamp: str) -> None:
    """Write beside ``path`` that it is complete and was made from what ``stamp`` names.

    Raises:
        OSError: ``path`` is missing, or its folder cannot be written.
    """
    content = _marker_content(path, stamp)
    with replacing(_marker(path)) as output:
        output.write(content)


@contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Create ``folder`` and turn any failure to use it into a message with a way out.

    Raises:
        UnavailableError: the disk is full, or the folder cannot be created, read or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise UnavailableError(no_room(folder)) from error
        raise UnavailableError(
            f"the cache folder {folder} cannot be used: {error}. "
            f"Set {CACHE_VARIABLE} to a folder that can be read and written."
        ) from error


def no_room(folder: Path) -> str:
    """Return the message for a full disk."""
    return (
        f"no space left while writing to {folder}; the demo needs about 300 MB there and in the temporary folder. "
        f"Free some space, or set {CACHE_VARIABLE} (and TMPDIR) to a folder on another disk."
    )


def _marker(path: Path) -> Path:
    return path.with_name(f"{path.name}.stamp")


def _marker_content(path: Path, stamp: str) -> bytes:
    return f"{stamp} {path.stat().st_size}\n".encode()
