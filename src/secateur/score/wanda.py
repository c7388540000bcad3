"""Wanda, structured: how large a unit's input is times how strongly the next layer reads it.

Source: Sun, Liu, Bair, Kolter 2023, "A Simple and Effective Pruning Approach for Large Language Models", arXiv
2306.11695: S_ij = |w_ij| ||x_j||. The structured form (Wanda-sp, metric WIFN) is that of FLAP (An et al. 2023, arXiv
2312.11983): the mean over outputs i per input channel j, summed over the channels of a head.

Where we differ. ||x_j|| is the root mean square over tokens, which differs from the paper's norm by one factor for the
whole model. Every layer is scored on the dense model's activations; Wanda's code scores it on those of the layers
already pruned. A query head never goes alone: the sum is over the channels of a whole GQA group.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "wanda",
    measures="mean absolute weight with which the next layer reads the unit, times its root mean square activation",
    formula="score_j = mean_i |w_ij| * sqrt((1/n) sum_t a_tj^2), sum over the unit's channels",
    needs="statistics and weights",
    cost="reads one projection per layer",
    caveat="judges every unit as if nothing made up for its loss; with least-squares compensation, redundant units "
    "are overrated",
    source="Sun et al. 2023, Wanda, arXiv 2306.11695; structured as in FLAP, arXiv 2312.11983",
)
def wanda(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return the mean absolute contribution per unit, in units of the output."""
    norm = (evidence.moments.sum_sq / evidence.moments.count).sqrt()
    channels = evidence.load_reader().double().abs().mean(0) * norm
    return channels.reshape(evidence.num_units, evidence.width).sum(1)
