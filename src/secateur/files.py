"""Files that are whole or not there at all, and where the cache is; knows no formats. Imports without torch."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import platformdirs

CACHE_VARIABLE = "SECATEUR_CACHE"
"""The environment variable that names the cache folder."""


def cache_folder() -> Path:
    """Return the folder for downloads: ``SECATEUR_CACHE`` when set, else the user's cache folder of this system."""
    chosen = os.environ.get(CACHE_VARIABLE)
    return Path(chosen).expanduser() if chosen else Path(platformdirs.user_cache_dir("secateur"))


@contextmanager
def replacing_path(target: Path) -> Iterator[Path]:
    """Give a temporary path that becomes ``target`` when the context ends well, and disappears otherwise.

    Raises:
        OSError: the folder of ``target`` cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing(target: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that becomes ``target`` when the context ends well, and disappears otherwise.

    Raises:
        OSError: the folder of ``target`` cannot be written.
    """
    with replacing_path(target) as temporary, temporary.open("xb") as output:
        yield output


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes of this user on this machine out of a folder for as long as they ask too.

    The folder need not be there. Where the system has no locks on files, nothing is kept out.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    locks = cache_folder() / "locks"
    name = hashlib.sha256(os.fsencode(folder.expanduser().resolve())).hexdigest()[:32]
    with suppress(OSError):
        locks.mkdir(parents=True, exist_ok=True)
    try:
        lock = os.open(locks / name, os.O_CREAT | os.O_RDWR, 0o600)
    except OSError:
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield
    finally:
        os.close(lock)
