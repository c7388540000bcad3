"""REAP: how much the expert adds, with its weight, where the router asks it.

Source: Lasby et al. 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999: the
mean over the tokens sent to the expert of g_e ||E_e(h)||.

Where we differ. The weight is the one that the model uses. The released code divides the weights of a token's chosen
experts by their sum since 2026; that is what the models that renormalise do themselves. An expert that no token of the
text was sent to scores 0.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register
from secateur.score.routed import Guard, guarded

ROUTED_FLOOR = 1e-12
"""Below any number of tokens: mixtures weigh them, so an expert may have less than one."""


@register(
    "reap",
    measures="length of the expert's weighted output, mean over the tokens that are sent to it",
    formula="score_e = mean over tokens t sent to e of g_et ||E_e(h_t)||",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="an expert that few tokens of the domain need counts as much as one that all need; for one domain, sums as "
    "in easy_ep ask the better question",
    source="Lasby et al. 2025, REAP, arXiv 2510.13999",
    kinds=(EXPERT,),
)
def reap(evidence: Evidence, /, *, guard: Guard = 0.0) -> Float64[Tensor, " experts"]:
    """Return each expert's mean weighted output length over its own tokens, in units of the residual stream.

    Args:
        evidence: what the pass says of the layer's experts.
        guard: above 0, experts whose largest activation exceeds that many times the layer's median stay in any case.
    """
    routing = evidence.load_routing()
    return guarded(routing.gate_norm / routing.routed.clamp_min(ROUTED_FLOOR), routing, guard)
