"""What methods that score routed experts have in common: sums over no tokens, the guard, and the usual method.

Source of the guard: Su et al. 2025, "Unveiling Super Experts in Mixture-of-Experts Large Language Models", arXiv
2507.23279: a few experts with extreme activations in their down projections carry a model, and removing them ruins it.
There an expert is one whose largest output of the down projection is beyond the 99.5th percentile of all experts of
the model and a tenth of the largest. Where we differ: we look at what enters the down projection, and compare with the
median of the layer, so that a layer can be judged by itself.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.records.routing import RoutingSums
from secateur.records.units import EXPERT
from secateur.score.method import METHODS, Method

Guard = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""How many times the layer's median, of experts that got a token, the largest activation of a super expert exceeds; 0:
there are none."""


def guarded(scores: Float64[Tensor, " experts"], routing: RoutingSums, guard: float) -> Float64[Tensor, " experts"]:
    """Return the scores of a layer's experts with super experts above all others, in the order they had.

    They stay finite, and near the others: scores of layers may be put on one scale. A super expert goes only where
    fewer experts stay than there are super experts.

    Args:
        scores: of the experts.
        routing: of the same.
        guard: as ``Guard``; 0 returns the scores as they are.
    """
    if guard == 0.0:
        return scores
    largest, reached = routing.max_activation, routing.routed > 0
    if not reached.any():
        return scores
    extreme = largest > guard * largest[reached].median()
    spread = float(scores.max() - scores.min()) or 1.0
    return scores + extreme.to(scores.dtype) * (2 * spread)


def per_token(sums: Float64[Tensor, " experts"], routing: RoutingSums) -> Float64[Tensor, " experts"]:
    """Return sums over tokens as means over all tokens that the layer saw."""
    return sums / max(routing.count, 1)


def able_method(name: str, kind: str, *, default: str) -> Method:
    """Return the method that another one names; where it names its default, for experts easy_ep.

    Raises:
        ConfigError: there is no such method, or it cannot score such units.
    """
    method = METHODS["easy_ep" if kind == EXPERT and name == default else name]
    method.require_kinds([kind])
    return method
