"""Minitron: how much a unit is used, as the norm over sequences of its mean absolute activation in each.

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv
2407.14679, width importance with the aggregation (mean over tokens, L2 over the batch), as in NVIDIA's Model Optimizer:
sqrt(sum over sequences b of (mean over tokens t of |x_btj|)^2) at the input of the projection that reads the units. A
group's score is the L2 norm of its channels' scores.

Where we differ. A sequence is a calibration block without its padding, which may hold several short documents; NVIDIA's
are samples of one length, padding included. A group's channels are those of its own query heads; the released code
views the channels as (heads per group, groups, head_dim), so that a group's norm there runs over every groups-th head.
There the residual stream can lose channels too. Minitron expects distillation afterwards and does not compensate.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "minitron",
    measures="norm over the text's sequences of the unit's mean absolute activation in each",
    formula="score_j = sqrt(sum_b ((1/n_b) sum_{t in b} |a_tj|)^2), L2 norm over the unit's channels",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="ignores how strongly the next layer reads the unit; made to be followed by distillation",
    source="Muralidharan et al. 2024, Minitron, arXiv 2407.14679; as in NVIDIA Model Optimizer",
)
def minitron(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return the norm over sequences of each unit's mean absolute activation, in units of the activation itself."""
    return evidence.sequences.mean_abs_sq.reshape(evidence.num_units, evidence.width).sum(1).sqrt()
