"""EASY-EP: how much the expert adds, with its weight, to tokens that the layer's experts turn far.

Source: Dong et al. 2025, "Domain-Specific Pruning of Large Mixture-of-Experts Models with Few-shot Demonstrations"
(EASY-EP), arXiv 2504.06792: I_e = sum over tokens t sent to e of g_et ||E_e(h_t)|| s_t with s_t = max(0, 1 - cos(x_t,
x_t + m_t)), x the residual stream before the layer's norm and m what its routed experts together add, shared experts
excluded. The published calibration text is some 25 demonstrations of the domain with the model's own answers.

Several texts: with ``prune.mix`` the score is the sum over texts of their share times I_e / sum_e I_e, which with equal
shares is the published rule for several domains. Without a mix all of them are one text.

Where we differ. The sum is divided by the number of tokens, the same for all experts. What is removed leaves the
router too, where the released code keeps its rows and sets the removed experts' scores to 0, which may still win.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register
from secateur.score.routed import Guard, guarded, per_token


@register(
    "easy_ep",
    measures="length of the expert's weighted output, each token counting by how far the experts turn its residual "
    "stream",
    formula="score_e = (1/n) sum over tokens t sent to e of g_et ||E_e(h_t)|| max(0, 1 - cos(x_t, x_t + m_t)), m_t the "
    "sum of the routed experts' weighted outputs",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="made for one domain: what other text needs counts for nothing",
    source="Dong et al. 2025, EASY-EP, arXiv 2504.06792",
    kinds=(EXPERT,),
)
def easy_ep(evidence: Evidence, /, *, guard: Guard = 0.0) -> Float64[Tensor, " experts"]:
    """Return each expert's contribution per token, in units of the residual stream.

    Args:
        evidence: what the pass says of the layer's experts.
        guard: above 0, experts whose largest activation exceeds that many times the layer's median stay in any case.
    """
    routing = evidence.load_routing()
    return guarded(per_token(routing.gate_norm_change, routing), routing, guard)
