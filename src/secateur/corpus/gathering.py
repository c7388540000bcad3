"""The documents of a split, each once and in ascending order of hash, however many there are.

A few stay in memory. Where their text is more than ``MEMORY_BYTES`` they go as sorted runs into temporary files without
a name, which are merged as in an external sort and are gone when nobody holds them (Knuth, The Art of Computer
Programming, volume 3, section 5.4). So memory does not grow with the corpus; the disk holds about as much text as is
taken, twice while runs are merged.
"""

from __future__ import annotations

import heapq
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from secateur.corpus.spill import SpillFile, room_for

MEMORY_BYTES = 32 << 20
"""Of text with its bookkeeping that stays in memory."""

MOST_RUNS = 64
"""Files that are open at a time; more are merged into one."""

_BYTES_PER_DOCUMENT = 400
"""Of Python's objects beside the text of a document in memory, measured."""

_HEADER = struct.Struct("<QQQ")


@dataclass(slots=True)
class Gathered:
    """A document with what is known of its copies.

    Attributes:
        digest: its hash.
        text: the longest of the texts that share the hash; of equally long ones the last in order.
        num_bytes: of that text in UTF-8.
        num_copies: how many more texts shared it.
    """

    digest: int
    text: str
    num_bytes: int
    num_copies: int = 0

    def join(self, other: Gathered) -> int:
        """Take up a document of the same hash, and return by how many bytes this one grew.

        A size that only grows keeps a selection independent of order: what was once too much stays too much.
        """
        growth = max(other.num_bytes - self.num_bytes, 0)
        self.text = max((self.num_bytes, self.text), (other.num_bytes, other.text))[1]
        self.num_bytes += growth
        self.num_copies += other.num_copies + 1
        return growth


class Gathering:
    """Takes documents in any order and gives them back in ascending order of hash.

    Args:
        max_bytes: keeps the documents with the smallest hashes, as few as reach this many bytes of UTF-8 (at least 1);
            None keeps all.
        memory_bytes: what may stay in memory.

    Raises:
        CorpusError: by any method: there is no room on the disk for what memory does not hold.
    """

    def __init__(self, max_bytes: int | None, memory_bytes: int = MEMORY_BYTES) -> None:
        self._max_bytes = max_bytes
        self._memory_bytes = memory_bytes
        self._kept: dict[int, Gathered] = {}
        self._largest_first: list[int] = []  # negated hashes: heapq keeps the smallest on top
        self._num_bytes = 0
        self._runs: list[SpillFile] = []
        self._run_bytes = 0
        self._ceiling: int | None = None

    @property
    def num_runs(self) -> int:
        """Files that hold documents."""
        return len(self._runs)

    def add(self, digest: int, text: str) -> None:
        """Take a document."""
        if self._ceiling is not None and digest >= self._ceiling:
            return
        found = Gathered(digest, text, len(text.encode()))
        if digest in self._kept:
            self._num_bytes += self._kept[digest].join(found)
        else:
            self._kept[digest] = found
            self._num_bytes += found.num_bytes
            if self._max_bytes is not None:
                heapq.heappush(self._largest_first, -digest)
        self._drop_what_is_too_much()
        if self._num_bytes + _BYTES_PER_DOCUMENT * len(self._kept) > self._memory_bytes:
            self._write_run()

    def close(self) -> tuple[int, int]:
        """Bring the documents into order; return how many there are, and how many copies of them were dropped."""
        if not self._runs:
            return len(self._kept), sum(document.num_copies for document in self._kept.values())
        if self._kept:
            self._write_run()
        return self._merge_runs()

    def __iter__(self) -> Iterator[Gathered]:
        """Yield the documents once it is closed, as often as wanted, but not two times at once."""
        if self._runs:
            (run,) = self._runs
            yield from _read(run)
        else:
            for digest in sorted(self._kept):
                yield self._kept[digest]

    def _drop_what_is_too_much(self) -> None:
        while self._max_bytes is not None and self._num_bytes - self._largest.num_bytes >= self._max_bytes:
            self._num_bytes -= self._kept.pop(-heapq.heappop(self._largest_first)).num_bytes

    @property
    def _largest(self) -> Gathered:
        return self._kept[-self._largest_first[0]]

    def _write_run(self) -> None:
        self._runs.append(_written(self._kept[digest] for digest in sorted(self._kept)))
        self._run_bytes += self._num_bytes
        self._kept, self._largest_first, self._num_bytes = {}, [], 0
        is_twice_too_much = self._max_bytes is not None and self._run_bytes > 2 * self._max_bytes
        if len(self._runs) >= MOST_RUNS or is_twice_too_much:
            self._merge_runs()

    def _merge_runs(self) -> tuple[int, int]:
        """Make one run of all, with no more than is wanted; return its documents, and their copies."""
        num_documents = num_copies = num_bytes = 0

        def wanted() -> Iterator[Gathered]:
            nonlocal num_documents, num_copies, num_bytes
            for document in _combined(heapq.merge(*map(_read, self._runs), key=lambda found: found.digest)):
                if self._max_bytes is not None and num_bytes >= self._max_bytes:
                    self._ceiling = document.digest
                    return
                num_documents += 1
                num_copies += document.num_copies
                num_bytes += document.num_bytes
                yield document

        merged = _written(wanted())
        self._runs, self._run_bytes = [merged], num_bytes
        return num_documents, num_copies


def _combined(documents: Iterable[Gathered]) -> Iterator[Gathered]:
    """Yield documents in ascending order, those of one hash as one."""
    current: Gathered | None = None
    for document in documents:
        if current is not None and current.digest == document.digest:
            current.join(document)
            continue
        if current is not None:
            yield current
        current = document
    if current is not None:
        yield current


def _written(documents: Iterable[Gathered]) -> SpillFile:
    """Return a new file without a name that holds the documents."""
    with room_for("sorting the documents of a corpus"):
        file = SpillFile()
        for document in documents:
            file.stream.write(_HEADER.pack(document.digest, document.num_bytes, document.num_copies))
            file.stream.write(document.text.encode())
        file.stream.flush()
    return file


def _read(file: SpillFile) -> Iterator[Gathered]:
    stream = file.stream
    stream.seek(0)
    while header := stream.read(_HEADER.size):
        digest, num_bytes, num_copies = _HEADER.unpack(header)
        yield Gathered(digest, stream.read(num_bytes).decode(), num_bytes, num_copies)
