"""The kinds of unit that can be removed whole, and the words for parts of a model.

``ffn_channel``: one hidden channel of a feed-forward layer, with every weight row and column that serves only it.
``gqa_group``: one key/value head together with the query heads that read it (one head in plain multi-head attention).
"""

from __future__ import annotations

FFN_CHANNEL = "ffn_channel"
GQA_GROUP = "gqa_group"
UNIT_KINDS: tuple[str, ...] = (FFN_CHANNEL, GQA_GROUP)

PARTS: tuple[str, ...] = ("embedding", "attention", "ffn", "head", "other")
"""Where parameters are; ``other`` holds the norms. A head tied to the embedding has no parameters of its own."""
