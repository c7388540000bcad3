"""Output divergence: whole blocks go one after another, each time the one without which the outputs change least.

Source: Zhang et al. 2024, "FinerCut: Finer-grained Interpretable Layer Pruning for Large Language Models", arXiv
2405.18218. In every round each attention and FFN sub-layer that is left is taken out for a moment, the outputs are
compared with those of the dense model, and the block with the smallest change goes.

Where we differ. Whole layers can be measured the same way. Of the paper's measures there is one, the Jensen-Shannon
divergence JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, a mean over all predicted tokens; early layers
are not spared. Our text is the domain's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import BLOCK_KINDS
from secateur.score.method import Evidence, register


@register(
    "output_divergence",
    measures="how far the next-token distributions are from the dense model's once the layer or sub-layer is gone, "
    "together with those that went before it",
    formula="score_b = (1/n) sum_t JS(p_t, q_t), p of the dense model, q of the model without b and all blocks that "
    "went before b; the next block to go is the lowest",
    needs="measured removals",
    cost="a pass over prune.search.tokens of text for each block that is left, again for every block that goes",
    caveat="greedy: a block that went never comes back; keeps what the dense model says, right or wrong",
    source="Zhang et al. 2024, FinerCut, arXiv 2405.18218",
    kinds=BLOCK_KINDS,
    measure="js",
)
def output_divergence(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return what was measured without the block."""
    assert evidence.removal_loss is not None, "only measured blocks have a divergence"
    return torch.tensor([evidence.removal_loss], dtype=torch.float64)
