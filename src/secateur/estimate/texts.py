"""How many tokens each part of a run will read: counted where that is cheap, else what the recipe allows at most."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.corpus.files import source_files
from secateur.corpus.formats import FORMATS
from secateur.corpus.readers import explicit_splits, read_documents
from secateur.corpus.split import Split, assign_split, document_hash
from secateur.corpus.tokenizing import tokenize
from secateur.recipe import CorpusSpec

SMALL_BYTES = 16_000_000
"""Files of a corpus up to this size together are read to count their text."""
USUAL_BYTES_PER_TOKEN = 4.0
"""Of text whose tokenizer was not tried; English text has between 3.5 and 5."""
_SAMPLE_BYTES = 100_000


@dataclass(frozen=True, slots=True)
class Amount:
    """How much text is read.

    Attributes:
        tokens: how many.
        at_most: whether there may be fewer.
    """

    tokens: int
    at_most: bool


@dataclass(frozen=True, slots=True)
class _Counted:
    """The text of one split of a corpus that was looked at."""

    num_bytes: int
    bytes_per_token: float

    @property
    def tokens(self) -> int:
        return round(self.num_bytes / self.bytes_per_token)


@dataclass
class TextAmounts:
    """Counts the corpora of a recipe.

    Attributes:
        corpora: by bucket name.
        tokenizer: returns the model's; called once, where text is counted.
        guess: counts nothing, as where a plan is made on paper.
        clock: seconds.
    """

    corpora: dict[str, CorpusSpec]
    tokenizer: Callable[[], Any]
    guess: bool = False
    clock: Callable[[], float] = time.perf_counter
    _known: dict[tuple[str, Split], _Counted | None] = field(default_factory=dict)
    _sizes: dict[str, int | None] = field(default_factory=dict)
    _seconds: float = 0.0
    _bytes: int = 0

    @property
    def bytes_per_s(self) -> float | None:
        """How fast files were read and split while they were counted; None where none were."""
        return self._bytes / self._seconds if self._seconds else None

    def amount(self, name: str, split: Split, limit: int | None) -> Amount:
        """Return how many tokens a split of a bucket gives under a limit.

        Args:
            name: of the bucket.
            split: of it.
            limit: most tokens that are taken; None for all there are.
        """
        counted = self._counted(name, split)
        if counted is not None:
            return Amount(counted.tokens if limit is None else min(limit, counted.tokens), False)
        if limit is not None:
            return Amount(limit, True)
        return Amount(round((self.file_bytes(name) or 0) / USUAL_BYTES_PER_TOKEN), True)

    def file_bytes(self, name: str) -> int | None:
        """Return the size of all files of a bucket; None for a data set on the hub, or where nothing is looked at."""
        if name not in self._sizes:
            self._sizes[name] = None if self.guess else _size(self.corpora[name])
        return self._sizes[name]

    def _counted(self, name: str, split: Split) -> _Counted | None:
        if (name, split) not in self._known:
            started = self.clock()
            self._known[name, split] = found = self._count(name, split)
            if found is not None:
                self._seconds += self.clock() - started
                self._bytes += self.file_bytes(name) or 0
        return self._known[name, split]

    def _count(self, name: str, split: Split) -> _Counted | None:
        size = self.file_bytes(name)
        if size is None or size > SMALL_BYTES:
            return None
        spec = self.corpora[name]
        ratios = None if explicit_splits(spec) else spec.splits
        if ratios is None and split not in explicit_splits(spec):
            return None
        total, sample, sampled = 0, [], 0
        seen: set[int] = set()
        for text in read_documents(spec, split):
            digest = document_hash(text)
            if digest in seen or (ratios is not None and assign_split(digest, ratios) != split):
                continue
            seen.add(digest)
            num_bytes = len(text.encode())
            total += num_bytes
            if sampled < _SAMPLE_BYTES:
                sample.append(text)
                sampled += num_bytes
        tokens = sum(map(len, tokenize(sample, self.tokenizer()))) if sample else 0
        return _Counted(total, sampled / tokens if tokens else USUAL_BYTES_PER_TOKEN)


def _size(spec: CorpusSpec) -> int | None:
    if spec.dataset is not None:
        return None
    places = [spec.path] if spec.path is not None else [getattr(spec, split) for split in explicit_splits(spec)]
    files: set[Path] = {file for place in places for file in source_files(place, FORMATS)}
    packed = any(file.suffix == ".gz" for file in files)
    return sum(file.stat().st_size for file in files) * (4 if packed else 1)
