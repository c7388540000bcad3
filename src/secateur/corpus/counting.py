"""How often each token id occurs in a split of a corpus, in one pass over its text; no blocks, no model.

Documents are read as they come and forgotten at once; only their hashes stay, so a corpus may be far larger than
memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from secateur.corpus.hashes import DocumentHashes, HashSet
from secateur.corpus.readers import open_source, require_documents
from secateur.corpus.split import Split, assign_split, document_hash
from secateur.corpus.tokenizing import require_fast, tokenize
from secateur.errors import CorpusError
from secateur.progress import Progress, silent
from secateur.recipe import CorpusSpec, SplitRatios
from secateur.records.token_counts import TokenCounts

_BATCH_DOCUMENTS = 512
_BATCH_CHARACTERS = 1 << 20


def count_split_tokens(
    source: CorpusSpec | Sequence[str],
    split: Split,
    tokenizer: Any,
    *,
    num_ids: int,
    max_tokens: int | None = None,
    exclude: Collection[int] = (),
    name: str = "corpus",
    progress: Progress = silent,
) -> TokenCounts:
    """Return how often each token id occurs in the documents of a split.

    Documents are the same as those of ``load_split``, whole and each once, but in reading order: of texts that share a
    hash the first is counted. Memory grows by about eight bytes per document.

    Args:
        source: a corpus spec, or documents in memory (split by hash with the default shares).
        split: the one wanted.
        tokenizer: a fast ``transformers`` tokenizer; special tokens that it adds by itself are not counted.
        num_ids: token ids of the model, the length of the counts.
        max_tokens: stops after the document that reaches this many tokens (at least 1), in reading order; another
            order of the files or records is another sample. None counts everything.
        exclude: hashes of documents that must not be counted, such as those of a test split.
        name: of the corpus, for messages.
        progress: told about counted tokens.

    Raises:
        CorpusError: the text cannot be read, the split has none, the tokenizer is not a fast one, or it gives a token
            id that the model does not have.
        UnavailableError: a hub data set could not be had.
    """
    require_fast(tokenizer)
    documents, ratios = open_source(source, split, name)
    reading = SplitReading(documents, split, ratios, exclude)
    counts = np.zeros(num_ids, dtype=np.int64)
    num_tokens = num_bytes = 0
    left_over: list[int] = []
    with progress(f"count tokens of {name}", max_tokens, "tokens") as task:
        for batch in reading.batches():
            tokens = tokenize([text for _, text in batch], tokenizer)
            taken = _documents_within(tokens, None if max_tokens is None else max_tokens - num_tokens)
            ids = np.concatenate([np.array(document, dtype=np.int64) for document in tokens[:taken]])
            counts += _bincount(ids, num_ids)
            num_tokens += len(ids)
            num_bytes += sum(len(text.encode()) for _, text in batch[:taken])
            task.advance(len(ids))
            if max_tokens is not None and num_tokens >= max_tokens:
                left_over = [digest for digest, _ in batch[taken:]]
                break
    hashes = reading.taken.hashes()
    if left_over:
        hashes = np.setdiff1d(hashes, np.array(left_over, dtype=np.int64), assume_unique=True)
    require_documents(reading.num_seen, len(hashes), len(reading.met_excluded), split, name)
    return TokenCounts(
        counts=torch.from_numpy(counts),
        num_tokens=num_tokens,
        num_bytes=num_bytes,
        num_documents=len(hashes),
        documents=torch.from_numpy(hashes),
        fingerprint=_fingerprint(split, hashes, counts, tokenizer),
    )


class SplitReading:
    """The documents of a split as they come, each once, and what was passed over."""

    def __init__(
        self, documents: Iterable[str], split: Split, ratios: SplitRatios | None, exclude: Collection[int]
    ) -> None:
        self._documents = documents
        self._split = split
        self._ratios = ratios
        self._excluded = DocumentHashes.of(exclude)
        self.taken = HashSet()
        self.met_excluded = HashSet()
        self.num_seen = 0

    def batches(self) -> Iterator[list[tuple[int, str]]]:
        """Yield runs of (hash, text), none of them empty: many documents or much text, whichever comes first."""
        batch: list[tuple[int, str]] = []
        num_characters = 0
        for text in self._documents:
            if not text.strip():
                continue
            self.num_seen += 1
            digest = document_hash(text)
            if not self._is_wanted(digest):
                continue
            batch.append((digest, text))
            num_characters += len(text)
            if len(batch) >= _BATCH_DOCUMENTS or num_characters >= _BATCH_CHARACTERS:
                yield batch
                batch, num_characters = [], 0
        if batch:
            yield batch

    def _is_wanted(self, digest: int) -> bool:
        if self._ratios is not None and assign_split(digest, self._ratios) != self._split:
            return False
        if digest in self._excluded:
            self.met_excluded.add(digest)
            return False
        return self.taken.add(digest)


def _documents_within(tokens: Sequence[Sequence[int]], max_tokens: int | None) -> int:
    """Return how many of the documents are taken until their tokens reach the limit."""
    if max_tokens is None:
        return len(tokens)
    reached = np.cumsum([len(document) for document in tokens])
    return min(len(tokens), int(np.searchsorted(reached, max_tokens)) + 1)


def _bincount(ids: Int64[np.ndarray, " tokens"], num_ids: int) -> Int64[np.ndarray, " ids"]:
    largest = int(ids.max(initial=0))
    if largest >= num_ids:
        raise CorpusError(
            f"the tokenizer gives token id {largest}, but the model has {num_ids} ids: tokenizer and model belong to "
            "different models. Use the tokenizer that came with the model."
        )
    return np.bincount(ids, minlength=num_ids).astype(np.int64, copy=False)


def _fingerprint(
    split: Split, hashes: Int64[np.ndarray, " documents"], counts: Int64[np.ndarray, " ids"], tokenizer: Any
) -> str:
    """Return a hex digest of split, documents and tokenizer; counts are in it because a hash ignores spacing."""
    met = np.flatnonzero(counts)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([split, len(hashes), len(tokenizer), tokenizer.backend_tokenizer.to_str()]).encode())
    for numbers in (hashes, met, counts[met]):
        digest.update(numbers.astype("<i8").tobytes())
    return digest.hexdigest()
