"""The kinds of unit that can be removed whole, and the words for parts of a model.

``ffn_channel``: one hidden channel of a feed-forward layer, with every weight row and column that serves only it.
``gqa_group``: one key/value head together with the query heads that read it (one head in plain multi-head attention).
``query_head``: one query head of a GQA group; every group of a layer loses as many, because query head i reads
key/value head i // (query heads per group).
``vocabulary``: one token id, with its rows of embedding and head; there is one vocabulary, not one per layer.
``attention``, ``ffn``: a layer's whole attention or feed-forward sub-layer, with the norms that serve only it.
``layer``: a whole decoder layer.
"""

from __future__ import annotations

FFN_CHANNEL = "ffn_channel"
GQA_GROUP = "gqa_group"
QUERY_HEAD = "query_head"
VOCABULARY = "vocabulary"
ATTENTION = "attention"
FFN = "ffn"
LAYER = "layer"
LAYER_UNIT_KINDS: tuple[str, ...] = (FFN_CHANNEL, GQA_GROUP, QUERY_HEAD)
"""Kinds that every decoder layer has its own units of, side by side; a family describes each as an axis."""
SITE_OF: dict[str, str] = {FFN_CHANNEL: FFN_CHANNEL, GQA_GROUP: GQA_GROUP, QUERY_HEAD: GQA_GROUP}
"""Per axis kind, the kind under whose name statistics of the projection that reads the units are kept; query heads and
their groups are the same channels of the same projection."""
SITE_KINDS: tuple[str, ...] = tuple(dict.fromkeys(SITE_OF.values()))
"""Axis kinds with statistics of their own; a sub-layer consists of the units of one of them."""
BLOCK_KINDS: tuple[str, ...] = (ATTENTION, FFN, LAYER)
"""Kinds with one unit per layer: the whole sub-layer or the whole layer."""
SUBLAYER_OF: dict[str, str] = {FFN_CHANNEL: FFN, GQA_GROUP: ATTENTION, QUERY_HEAD: ATTENTION}
"""Per axis kind, the sub-layer that is gone when none of its units stays."""
AXIS_OF: dict[str, str] = {SUBLAYER_OF[kind]: kind for kind in SITE_KINDS}
"""Per sub-layer kind, the units that it consists of."""
UNIT_KINDS: tuple[str, ...] = (*LAYER_UNIT_KINDS, *BLOCK_KINDS, VOCABULARY)

UNIT_NAMES = {
    FFN_CHANNEL: "FFN channels",
    GQA_GROUP: "GQA groups",
    QUERY_HEAD: "query heads",
    ATTENTION: "attention sub-layers",
    FFN: "FFN sub-layers",
    LAYER: "decoder layers",
    VOCABULARY: "token ids",
}
"""What people call many of each."""

PARTS: tuple[str, ...] = ("embedding", "attention", "ffn", "head", "other")
"""Where parameters are; ``other`` holds the norms. A head tied to the embedding has no parameters of its own."""

SiteKey = tuple[int, str]
"""(layer, tap name): where in the model a statistic was taken."""
