"""The kinds of unit that can be removed whole, and the words for parts of a model.

``ffn_channel``: one hidden channel of a feed-forward layer, with every weight row and column that serves only it.
``gqa_group``: one key/value head together with the query heads that read it (one head in plain multi-head attention).
``vocabulary``: one token id, with its rows of embedding and head; there is one vocabulary, not one per layer.
"""

from __future__ import annotations

FFN_CHANNEL = "ffn_channel"
GQA_GROUP = "gqa_group"
VOCABULARY = "vocabulary"
LAYER_UNIT_KINDS: tuple[str, ...] = (FFN_CHANNEL, GQA_GROUP)
"""Kinds that every decoder layer has its own units of."""
UNIT_KINDS: tuple[str, ...] = (*LAYER_UNIT_KINDS, VOCABULARY)

UNIT_NAMES = {FFN_CHANNEL: "FFN channels", GQA_GROUP: "GQA groups", VOCABULARY: "token ids"}
"""What people call many of each."""

PARTS: tuple[str, ...] = ("embedding", "attention", "ffn", "head", "other")
"""Where parameters are; ``other`` holds the norms. A head tied to the embedding has no parameters of its own."""
