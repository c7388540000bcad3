"""Documents come back in order of hash whatever memory there is, and runs that are merged lose and double nothing."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator

import pytest

from secateur.corpus import spill
from secateur.corpus.gathering import MOST_RUNS, Gathered, Gathering
from secateur.errors import CorpusError

LARGE = 1 << 40


def documents(count: int, different: int) -> Iterator[tuple[int, str]]:
    """Yield hashes with texts; some hashes several times, with texts of other lengths."""
    draw = random.Random(0)
    for _ in range(count):
        digest = draw.randrange(different)
        yield digest * 2**40, f"é{digest}" + "x" * draw.randrange(30)


def gathered(max_bytes: int | None, memory_bytes: int) -> tuple[list[Gathered], tuple[int, int], int]:
    """Return the documents, the counts, and the most files there were."""
    gathering = Gathering(max_bytes, memory_bytes)
    most = 0
    for digest, text in documents(300, 90):
        gathering.add(digest, text)
        most = max(most, gathering.num_runs)
    counts = gathering.close()
    assert list(gathering) == list(gathering), "they can be read again"
    return list(gathering), counts, most


@pytest.mark.parametrize("max_bytes", [None, 1, 200, 1000, LARGE])
@pytest.mark.parametrize("memory_bytes", [1, 5000])
def test_documents_do_not_depend_on_memory(max_bytes: int | None, memory_bytes: int) -> None:
    """What goes through files is what stays in memory: texts, order, copies, and where it ends."""
    expected, counts, no_files = gathered(max_bytes, LARGE)
    assert no_files == 0 and [document.digest for document in expected] == sorted({d.digest for d in expected})
    found, found_counts, most = gathered(max_bytes, memory_bytes)
    assert found == expected
    assert found_counts == counts == (len(expected), sum(document.num_copies for document in expected))
    assert 0 < most <= MOST_RUNS or (max_bytes or LARGE) < memory_bytes


def test_documents_are_those_of_a_sort() -> None:
    """Without a limit: every hash once, with its longest text and the number of the others."""
    texts: dict[int, list[str]] = {}
    for digest, text in documents(300, 90):
        texts.setdefault(digest, []).append(text)
    found, _, _ = gathered(None, 3000)
    assert [(d.digest, d.text, d.num_copies) for d in found] == [
        (digest, max(texts[digest], key=lambda text: (len(text.encode()), text)), len(texts[digest]) - 1)
        for digest in sorted(texts)
    ]
    assert all(document.num_bytes == len(document.text.encode()) for document in found)


def test_a_full_disk_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is named, and what can be done; other failures of the disk stay what they are."""

    def full(code: int) -> None:
        raise OSError(code, "no")

    gathering = Gathering(None, 1)
    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda **_: full(errno.ENOSPC))
    with pytest.raises(CorpusError, match=r"sorting the documents of a corpus needs room in /.*TMPDIR"):
        gathering.add(1, "text")
    monkeypatch.setattr(spill.tempfile, "TemporaryFile", lambda **_: full(errno.EACCES))
    with pytest.raises(PermissionError):
        gathering.add(1, "text")
