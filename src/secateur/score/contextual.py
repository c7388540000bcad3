"""Contextual importance: how strongly a unit responds, on average, to the domain's tokens.

Source: Valicenti, Vidal, Patnaik, "Mini-GPTs: Efficient Large Language Models through Contextual Pruning", 2023,
arXiv 2312.12682, Eq. 1: m_j = (1/n) sum_b |a_jb|; a unit with m_j <= epsilon is removed.

Where we differ. n counts tokens, not windows. Units are removed whole, with every weight that serves them, where the
paper's code writes zeros. The paper's second rule, which also removes a neuron whose output is near its bias, needs no
statistic here: a unit that is constant on the calibration text is folded into the next bias when it is removed.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.score.method import Evidence, register


@register(
    "contextual",
    measures="mean absolute activation of the unit over the domain's tokens",
    formula="score_j = (1/n) sum_t |a_tj|, mean over the unit's channels",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="ignores how strongly the next layer reads the unit; absolute thresholds mean different things in "
    "different layers and models",
    source="Valicenti et al. 2023, Mini-GPTs, arXiv 2312.12682, Eq. 1",
)
def contextual(
    evidence: Evidence, /, *, at: Literal["activation", "linear"] = "activation"
) -> Float64[Tensor, " units"]:
    """Return the mean absolute activation per unit, in units of the activation itself.

    Args:
        evidence: calibration sums.
        at: ``activation``: what the reading projection receives, that is phi(W x + b), times the linear branch in
            gated layers (the paper's activation pruning). ``linear``: the output of the dense layer before the
            activation function (the paper's linear pruning); the smaller of gate and up in gated layers, because
            either branch near zero silences the unit. ``linear`` exists for FFN channels and those of shared experts.

    Raises:
        ConfigError: ``linear`` was asked for a unit kind without a dense layer of its own.
    """
    count = evidence.moments.count
    if at == "activation":
        return (evidence.moments.sum_abs / count).reshape(evidence.num_units, evidence.width).mean(1)
    if not evidence.linear_abs:
        raise ConfigError(
            "contextual with at: linear is defined for ffn_channel and shared_channel only; got "
            f"{evidence.kind}. Use at: activation."
        )
    return torch.stack([total / count for total in evidence.linear_abs]).amin(0)
