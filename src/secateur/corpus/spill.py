"""Temporary files for what memory does not hold, and the message when there is no room for them."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from secateur.errors import CorpusError

_BUFFER_BYTES = 1 << 16
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SpillFile:
    """A file without a name in the folder for temporary files, gone when nobody holds this object.

    Args:
        memory_bytes: that stay in memory; there is a file only beyond them.

    Attributes:
        stream: to write to and read from.
    """

    def __init__(self, memory_bytes: int = 0) -> None:
        made = (
            tempfile.SpooledTemporaryFile(max_size=memory_bytes, buffering=_BUFFER_BYTES)
            if memory_bytes
            else tempfile.TemporaryFile(buffering=_BUFFER_BYTES)
        )
        self.stream = cast(IO[bytes], made)

    def __del__(self) -> None:
        if hasattr(self, "stream"):
            self.stream.close()


@contextmanager
def room_for(work: str) -> Iterator[None]:
    """Say in words that the disk is full, and which folder is meant.

    Args:
        work: what was being done.

    Raises:
        CorpusError: there was no room.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = tempfile.gettempdir()
        raise CorpusError(
            f"{work} needs room in {place}, and it is full ({shutil.disk_usage(place).free / 1e9:.1f} GB are free). "
            "Free some, name another folder in the environment variable TMPDIR, or lower max_tokens."
        ) from None
