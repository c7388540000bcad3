"""Vocabulary: which tokens spell which, and a tokenizer.json cut down to fewer of them; plain data in and out.

It reads no files, segments no text and decides nothing about which tokens a domain needs.
"""

from __future__ import annotations

from secateur.vocabulary.anatomy import TokenGraph, read_tokenizer
from secateur.vocabulary.rebuild import rebuild_tokenizer
from secateur.vocabulary.references import referenced_ids, renumber

__all__ = ["TokenGraph", "read_tokenizer", "rebuild_tokenizer", "referenced_ids", "renumber"]
