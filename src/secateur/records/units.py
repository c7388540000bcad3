"""The kinds of unit that can be removed whole, and the words for parts of a model.

``ffn_channel``: one hidden channel of a feed-forward layer, with every weight row and column that serves only it.
``gqa_group``: one key/value head together with the query heads that read it (one head in plain multi-head attention).
``query_head``: one query head of a GQA group; every group of a layer loses as many, because query head i reads
key/value head i // (query heads per group).
``expert``: one routed expert of a mixture-of-experts (MoE) layer, with its row of the router.
``expert_channel``: one hidden channel of one routed expert; every expert of a layer keeps as many. Unit
``e * width + c`` is channel c of expert e.
``shared_channel``: one hidden channel of the shared expert, which every token of a MoE layer goes through.
``vocabulary``: one token id, with its rows of embedding and head; there is one vocabulary, not one per layer.
``attention``, ``ffn``: a layer's whole attention or feed-forward sub-layer, with the norms that serve only it.
``layer``: a whole decoder layer.
"""

from __future__ import annotations

FFN_CHANNEL = "ffn_channel"
GQA_GROUP = "gqa_group"
QUERY_HEAD = "query_head"
EXPERT = "expert"
EXPERT_CHANNEL = "expert_channel"
SHARED_CHANNEL = "shared_channel"
VOCABULARY = "vocabulary"
ATTENTION = "attention"
FFN = "ffn"
LAYER = "layer"
REQUIRED_UNIT_KINDS: tuple[str, ...] = (FFN_CHANNEL, GQA_GROUP, QUERY_HEAD)
"""Kinds that every family describes as an axis; ``ffn_channel`` is about dense feed-forward layers only."""
MOE_UNIT_KINDS: tuple[str, ...] = (EXPERT, EXPERT_CHANNEL, SHARED_CHANNEL)
"""Kinds that families with mixture-of-experts layers may describe besides."""
LAYER_UNIT_KINDS: tuple[str, ...] = (*REQUIRED_UNIT_KINDS, *MOE_UNIT_KINDS)
"""Kinds that every decoder layer has its own units of, side by side, or none of; a family describes each as an axis."""
FUSED_KINDS: tuple[str, ...] = (EXPERT, EXPERT_CHANNEL)
"""Kinds whose units live in tensors that hold all experts of a layer; their reader is no linear layer."""
SITE_OF: dict[str, str] = {kind: GQA_GROUP if kind == QUERY_HEAD else kind for kind in LAYER_UNIT_KINDS}
"""Per axis kind, the kind under whose name statistics of the projection that reads the units are kept; query heads and
their groups are the same channels of the same projection."""
SITE_KINDS: tuple[str, ...] = tuple(dict.fromkeys(SITE_OF.values()))
"""Axis kinds with statistics of their own."""
BLOCK_KINDS: tuple[str, ...] = (ATTENTION, FFN, LAYER)
"""Kinds with one unit per layer: the whole sub-layer or the whole layer."""
SUBLAYER_OF: dict[str, str] = {kind: ATTENTION if kind in (GQA_GROUP, QUERY_HEAD) else FFN for kind in LAYER_UNIT_KINDS}
"""Per axis kind, the sub-layer that its units are in."""
WHOLE_KINDS: tuple[str, ...] = (FFN_CHANNEL, GQA_GROUP, EXPERT)
"""Axis kinds whose units make up a sub-layer: where none of them stays, it goes."""
AXES_OF: dict[str, tuple[str, ...]] = {
    block: tuple(kind for kind in WHOLE_KINDS if SUBLAYER_OF[kind] == block) for block in (ATTENTION, FFN)
}
"""Per sub-layer kind, the units that it consists of; an FFN sub-layer consists of channels or of experts."""
AXIS_OF: dict[str, str] = {block: kinds[0] for block, kinds in AXES_OF.items()}
"""The first of those, which every family describes."""
UNIT_KINDS: tuple[str, ...] = (*LAYER_UNIT_KINDS, *BLOCK_KINDS, VOCABULARY)

UNIT_NAMES = {
    FFN_CHANNEL: "FFN channels",
    GQA_GROUP: "GQA groups",
    QUERY_HEAD: "query heads",
    EXPERT: "experts",
    EXPERT_CHANNEL: "expert channels",
    SHARED_CHANNEL: "shared-expert channels",
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
