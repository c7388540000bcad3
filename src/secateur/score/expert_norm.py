"""Expert norm: how much the expert puts out, over all tokens sent to it, whatever weight that gets.

Source: the expert activation norm (EAN) among the baselines of Lasby et al. 2025, REAP, arXiv 2510.13999: the sum of
||e_et|| over the tokens sent to the expert. Here it is divided by the number of tokens, the same for all experts.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register
from secateur.score.routed import Guard, guarded, per_token


@register(
    "expert_norm",
    measures="length of the expert's output, summed over the tokens sent to it",
    formula="score_e = (1/n) sum over tokens t sent to e of ||E_e(h_t)||",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="ignores the weight that the router gives the output",
    source="expert activation norm, as in Lasby et al. 2025, REAP, arXiv 2510.13999",
    kinds=(EXPERT,),
)
def expert_norm(evidence: Evidence, /, *, guard: Guard = 0.0) -> Float64[Tensor, " experts"]:
    """Return each expert's mean output length over all tokens, in units of the residual stream.

    Args:
        evidence: what the pass says of the layer's experts.
        guard: above 0, experts whose largest activation exceeds that many times the layer's median stay in any case.
    """
    routing = evidence.load_routing()
    return guarded(per_token(routing.norm, routing), routing, guard)
