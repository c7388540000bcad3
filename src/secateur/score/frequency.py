"""Frequency: how often the router sends a token to the expert.

Source: the plain baseline of expert pruning, as in Lu et al. 2024, "Not All Experts are Equal", arXiv 2402.14800, and
in REAP (Lasby et al. 2025, arXiv 2510.13999), which compares against it.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register
from secateur.score.routed import Guard, guarded, per_token


@register(
    "frequency",
    measures="share of the text's tokens that the router sends to the expert",
    formula="score_e = (1/n) sum_t [e in topk(t)]",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="an expert may be asked often and say little; routers trained for balanced load spread tokens evenly",
    source="baseline; as in Lu et al. 2024, arXiv 2402.14800, and REAP, arXiv 2510.13999",
    kinds=(EXPERT,),
)
def frequency(evidence: Evidence, /, *, guard: Guard = 0.0) -> Float64[Tensor, " experts"]:
    """Return the share of tokens that are sent to each expert, 0..1.

    Args:
        evidence: what the pass says of the layer's experts.
        guard: above 0, experts whose largest activation exceeds that many times the layer's median stay in any case.
    """
    routing = evidence.load_routing()
    return guarded(per_token(routing.routed, routing), routing, guard)
