"""Text in, token blocks out: read documents, split them by their own hash, pack their tokens."""

from __future__ import annotations

from secateur.corpus.counting import count_split_tokens
from secateur.corpus.near_duplicates import distinct_documents
from secateur.corpus.packing import PackedBlocks, load_split, restrict
from secateur.corpus.prompts import Prompts, load_prompts
from secateur.corpus.readers import check_prompts, check_sources, read_documents
from secateur.corpus.resegment import resegment, segmentation_change
from secateur.corpus.responses import renumber_responses, response_blocks
from secateur.corpus.selection import select_documents_for_training
from secateur.corpus.signature import source_signature
from secateur.corpus.split import Selection, document_hash, select_documents

__all__ = [
    "PackedBlocks",
    "Prompts",
    "Selection",
    "check_prompts",
    "check_sources",
    "count_split_tokens",
    "distinct_documents",
    "document_hash",
    "load_prompts",
    "load_split",
    "read_documents",
    "renumber_responses",
    "resegment",
    "response_blocks",
    "restrict",
    "segmentation_change",
    "select_documents",
    "select_documents_for_training",
    "source_signature",
]
