"""The prompts of a split, for a model to answer: its documents' records under another template, or their beginnings.

A prompt belongs to the document that the same record makes under the usual template. It is that document's hash which
decides the split and what is excluded, so that no prompt of a test document is ever answered.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain
from typing import Any

from secateur.corpus.packing import PackedBlocks
from secateur.corpus.pieces import Piece
from secateur.corpus.readers import PROMPT_KEY, explicit_splits, read_prompts, require_documents
from secateur.corpus.split import Split, assign_split, document_hash
from secateur.recipe import CorpusSpec


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a split.

    Attributes:
        texts: the prompts, in ascending order of their documents' hashes.
        documents: those hashes, each once.
    """

    texts: tuple[str, ...]
    documents: tuple[int, ...]


def load_prompts(
    spec: CorpusSpec,
    prompt: str,
    split: Split,
    *,
    exclude: Collection[int] = (),
    max_documents: int | None = None,
    name: str = "corpus",
    key: str = PROMPT_KEY,
) -> Prompts:
    """Return the prompts of a split, one per document; they do not depend on the order of the records.

    Of records that make the same document the longest prompt is taken.

    Args:
        spec: where the records are, how one becomes a document, and the shares of the splits.
        prompt: how a record becomes a prompt: a template such as ``"Question: {question}"``, or the name of a field.
        split: the one wanted.
        exclude: hashes of documents whose prompts must not be taken.
        max_documents: takes the documents with the smallest hashes, at most this many; None takes all.
        name: of the corpus, for messages.
        key: the recipe's key for the template, for messages.

    Raises:
        CorpusError: the text cannot be read or has no fields, the template cannot be used, or the split has no prompt.
        UnavailableError: a hub data set could not be had.
    """
    excluded = frozenset(exclude)
    ratios = None if explicit_splits(spec) else spec.splits
    kept: dict[int, str] = {}
    largest_first: list[int] = []  # negated hashes: heapq keeps the smallest on top
    met_excluded: set[int] = set()
    num_seen = 0
    for document, text in read_prompts(spec, prompt, split, key):
        num_seen += 1
        digest = document_hash(document)
        if ratios is not None and assign_split(digest, ratios) != split:
            continue
        if digest in excluded:
            met_excluded.add(digest)
            continue
        if digest in kept:
            kept[digest] = max(kept[digest], text, key=lambda prompt: (len(prompt), prompt))
            continue
        kept[digest] = text
        heapq.heappush(largest_first, -digest)
        if max_documents is not None and len(kept) > max_documents:
            del kept[-heapq.heappop(largest_first)]
    require_documents(num_seen, len(kept), len(met_excluded), split, name)
    hashes = tuple(sorted(kept))
    return Prompts(tuple(kept[digest] for digest in hashes), hashes)


def document_starts(blocks: PackedBlocks, tokenizer: Any, *, num_documents: int, num_tokens: int) -> tuple[str, ...]:
    """Return the beginnings of a split's first documents, as text: so many tokens, but at most half of a document.

    Args:
        blocks: the split.
        tokenizer: that cut it.
        num_documents: most beginnings to take; those of the documents with the smallest hashes.
        num_tokens: most tokens of a beginning; a character that would be cut is left out.
    """
    first: dict[int, Piece] = {}
    for piece in chain.from_iterable(blocks.blocks):
        known = first.get(piece.document)
        if known is None or _start(piece) < _start(known):
            first[piece.document] = piece
    found: list[str] = []
    for document in sorted(first):
        own = first[document].own_ids.tolist()
        ids = own[: min(num_tokens, max(1, len(own) // 2))]
        text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if (text := text.rstrip("\ufffd")).strip() and text not in found:
            found.append(text)
        if len(found) == num_documents:
            break
    return tuple(found)


def _start(piece: Piece) -> int:
    """Return what is smallest for the first piece of a document: without a span, all but the last fill a block."""
    return piece.span.start if piece.span else -len(piece.ids)
