"""Gate mass: how much weight the router gives the expert, over all tokens.

Source: the soft form of counting tokens, among the baselines of Dong et al. 2025, EASY-EP, arXiv 2504.06792. The weight
is the one that is used: after the choice of experts, and after whatever the model divides or multiplies it by.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register
from secateur.score.routed import Guard, guarded, per_token


@register(
    "gate_mass",
    measures="weight that the router gives the expert, mean over the text's tokens",
    formula="score_e = (1/n) sum over tokens t sent to e of g_et",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="ignores how large the expert's output is",
    source="baseline; as in Dong et al. 2025, EASY-EP, arXiv 2504.06792",
    kinds=(EXPERT,),
)
def gate_mass(evidence: Evidence, /, *, guard: Guard = 0.0) -> Float64[Tensor, " experts"]:
    """Return the mean over all tokens of each expert's weight, 0 where it is not chosen.

    Args:
        evidence: what the pass says of the layer's experts.
        guard: above 0, experts whose largest activation exceeds that many times the layer's median stay in any case.
    """
    routing = evidence.load_routing()
    return guarded(per_token(routing.gate, routing), routing, guard)
