"""Text in, token blocks out: read documents, split them by their own hash, pack their tokens."""

from __future__ import annotations

from secateur.corpus.counting import count_split_tokens
from secateur.corpus.packing import PackedBlocks, load_split
from secateur.corpus.readers import check_sources, read_documents
from secateur.corpus.resegment import resegment, segmentation_change
from secateur.corpus.signature import source_signature
from secateur.corpus.split import Selection, document_hash, select_documents

__all__ = [
    "PackedBlocks",
    "Selection",
    "check_sources",
    "count_split_tokens",
    "document_hash",
    "load_split",
    "read_documents",
    "resegment",
    "segmentation_change",
    "select_documents",
    "source_signature",
]
