"""Block influence: how much a whole layer or sub-layer turns the residual stream.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv
2403.03853: BI_l = 1 - mean over tokens of cos(x_l, x_{l+1}), with x_l the input and x_{l+1} the output of layer
l. Minitron (Muralidharan et al. 2024, arXiv 2407.14679) ranks layers by the same number.

Where we differ. Sub-layers are scored too, by the residual stream before and after each; where attention and
feed-forward run in parallel, each by the layer's input without and with its own output.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import BLOCK_KINDS
from secateur.score.method import Evidence, register


@register(
    "block_influence",
    measures="how much the layer or sub-layer turns the residual stream, on average over the domain's tokens",
    formula="score_l = 1 - (1/n) sum_t cos(x_tl, y_tl), x the residual stream before and y after",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="judges every block as if all others stayed, and does not see a change of length; costly beyond an eighth "
    "of the layers",
    source="Men et al. 2024, ShortGPT, arXiv 2403.03853",
    kinds=BLOCK_KINDS,
)
def block_influence(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return one minus the mean cosine between input and output, from 0 (only scales) to 2 (turns around)."""
    assert evidence.cosine is not None, "only whole layers and sub-layers have a cosine"
    return torch.tensor([1.0 - evidence.cosine], dtype=torch.float64)
