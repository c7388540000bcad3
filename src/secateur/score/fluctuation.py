"""Fluctuation: how much of the output would be lost if a unit were replaced by its mean.

Source: An, Zhao, Yu, Tang, Wang 2023, "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP,
AAAI 2024), arXiv 2312.11983, the metric WIFV: var(x_j) * ||w_j||^2. For one channel this is exactly the mean squared
error of the output when the channel goes and its mean moves into the projection's bias.

Where we differ. The variance is that of all tokens; the released code updates it batch by batch and loses the first
one, which shrinks all variances alike. The code squares the metric of attention channels before it pools them to
heads; so do we by default (``pool: mean_square``), over the channels of a whole GQA group instead of a query head.
``pool: mean`` keeps it a variance. Layers are compared by the allocator, not here.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "fluctuation",
    measures="output variance that the unit causes: variance of its activation times squared norm of its reading "
    "weights",
    formula="score_j = (E[a_j^2] - E[a_j]^2) * ||w_j||^2; groups: mean over channels of its square (or of itself)",
    needs="statistics and weights",
    cost="reads one projection per layer",
    caveat="takes for granted that a removed unit's mean is made up for; without such compensation a large constant "
    "unit is underrated",
    source="An et al. 2023, FLAP, arXiv 2312.11983, metric WIFV",
)
def fluctuation(
    evidence: Evidence, /, *, pool: Literal["mean_square", "mean"] = "mean_square"
) -> Float64[Tensor, " units"]:
    """Return the variance of the output that each unit causes, in output squared (groups by default its square).

    Args:
        evidence: calibration sums and the reading projection.
        pool: how the channels of a group become one number: the mean of their squares (as FLAP's code does) or their
            mean. Units of a single channel are not pooled.
    """
    count = evidence.moments.count
    variance = (evidence.moments.sum_sq / count - (evidence.moments.sum / count).square()).clamp_min(0.0)
    channels = variance * evidence.load_reader().double().square().sum(0)
    if evidence.width == 1:
        return channels
    pooled = channels.square() if pool == "mean_square" else channels
    return pooled.reshape(evidence.num_units, evidence.width).mean(1)
