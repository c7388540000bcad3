"""Perplexity drop: whole blocks go one after another, each time the one without which the model predicts best.

Source: Zhong et al. 2024, "BlockPruner: Fine-grained Pruning for Large Language Models", arXiv 2406.10594. In every
round each attention and FFN sub-layer that is left is taken out for a moment, the perplexity on calibration text is
measured, and the block with the lowest one goes.

Where we differ. Whole layers can be measured the same way. The loss is measured, whose order is that of the perplexity.
Our text is the domain's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import BLOCK_KINDS
from secateur.score.method import Evidence, register


@register(
    "perplexity_drop",
    measures="the model's loss on the domain's text once the layer or sub-layer is gone, together with those that went "
    "before it",
    formula="score_b = L(model without b and all blocks that went before b), L the mean loss in nats per token; the "
    "next block to go is the lowest",
    needs="measured removals",
    cost="a pass over prune.search.tokens of text for each block that is left, again for every block that goes",
    caveat="greedy: a block that went never comes back; on little text small differences are noise",
    source="Zhong et al. 2024, BlockPruner, arXiv 2406.10594",
    kinds=BLOCK_KINDS,
    measure="loss",
)
def perplexity_drop(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return what was measured without the block."""
    assert evidence.removal_loss is not None, "only measured blocks have a loss"
    return torch.tensor([evidence.removal_loss], dtype=torch.float64)
