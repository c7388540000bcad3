"""Text in, token blocks out: read documents, split them by their own hash, pack their tokens."""

from __future__ import annotations

from secateur.corpus.packing import PackedBlocks, load_split
from secateur.corpus.readers import check_sources, read_documents
from secateur.corpus.signature import source_signature
from secateur.corpus.split import Selection, document_hash, select_documents

__all__ = [
    "PackedBlocks",
    "Selection",
    "check_sources",
    "document_hash",
    "load_split",
    "read_documents",
    "select_documents",
    "source_signature",
]
