"""How often each token id occurs in a text: what is known of a corpus from its tokens alone, without running a model.

Counts are sums over documents, so those of two shards add up to the counts of both.

Dims: ``ids`` token ids, ``documents``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Sums over the documents of one split of one corpus bucket.

    Attributes:
        counts: how often each token id occurred, indexed by id; tokens that a tokenizer puts before or after a text by
            itself are not among them.
        num_tokens: tokens in total.
        num_bytes: UTF-8 bytes of the text.
        num_documents: different documents.
        documents: their 63-bit hashes, ascending, each once.
        fingerprint: identifies the split, the documents and the tokenizer.
    """

    counts: Int64[Tensor, " ids"]
    num_tokens: int
    num_bytes: int
    num_documents: int
    documents: Int64[Tensor, " documents"]
    fingerprint: str


def merge_token_counts(first: TokenCounts, second: TokenCounts) -> TokenCounts:
    """Return the counts of both shards together.

    A document in both shards is one document, but its tokens and bytes are counted twice.

    Raises:
        ValueError: the counts are over vocabularies of different size.
    """
    if len(first.counts) != len(second.counts):
        raise ValueError(f"counts of {len(first.counts)} and of {len(second.counts)} token ids cannot be merged")
    documents = torch.unique(torch.cat([first.documents, second.documents]))
    texts = {*first.fingerprint.split("+"), *second.fingerprint.split("+")}
    return TokenCounts(
        counts=first.counts + second.counts,
        num_tokens=first.num_tokens + second.num_tokens,
        num_bytes=first.num_bytes + second.num_bytes,
        num_documents=len(documents),
        documents=documents,
        fingerprint="+".join(sorted(texts)),
    )
