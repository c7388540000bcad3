"""Files that are whole or not there at all, and where the cache is; knows no formats. Imports without torch."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
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
