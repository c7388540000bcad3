"""What one pass says of the routed experts of a layer: where tokens were sent, and what came back.

Everything but the largest values is a sum over tokens, so two shards add up. Sums are float64; padding never enters
them.

Dims: ``experts`` routed experts of one mixture-of-experts (MoE) layer, ``others`` the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

SUMS = ("routed", "gate", "norm", "gate_norm", "gate_norm_change")
"""The fields that are sums over the tokens sent to an expert."""
EXTREMES = ("max_norm", "max_activation")
"""The fields that are largest values over those tokens; 0 for an expert that no token was sent to."""
ROUTER_SUMS = ("logits", "logit_products")
"""The fields that are sums over all tokens of what the router computes; older files lack them."""


@dataclass(frozen=True, slots=True)
class RoutingSums:
    """Sums over ``count`` tokens, one value per expert; each token counts for the experts that it is sent to.

    With g the weight that the router gives a token's expert (as used: after whatever it divides or multiplies it by), e
    the expert's output before that weight, and s = max(0, 1 - cos(x, x + m)), where x is the residual stream that the
    experts add to and m what all routed experts together add to it.

    Attributes:
        count: tokens that the layer saw.
        routed: tokens that were sent to the expert. A whole number but in mixtures, where texts are weighed.
        gate: sum of g.
        norm: sum of ||e||, Euclidean.
        gate_norm: sum of g ||e||.
        gate_norm_change: sum of g ||e|| s.
        max_norm: largest ||e||.
        max_activation: largest absolute value that entered the expert's down projection.
        logits: sum over all tokens that the layer saw of what the router gives the expert, before it compares or
            corrects anything; None where it was not noted.
        logit_products: sum over the same tokens of the products of two experts' logits.
    """

    count: int
    routed: Float64[Tensor, " experts"]
    gate: Float64[Tensor, " experts"]
    norm: Float64[Tensor, " experts"]
    gate_norm: Float64[Tensor, " experts"]
    gate_norm_change: Float64[Tensor, " experts"]
    max_norm: Float64[Tensor, " experts"]
    max_activation: Float64[Tensor, " experts"]
    logits: Float64[Tensor, " experts"] | None = None
    logit_products: Float64[Tensor, "experts others"] | None = None

    def __add__(self, other: RoutingSums) -> RoutingSums:
        both: dict[str, Any] = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        both |= {name: torch.maximum(getattr(self, name), getattr(other, name)) for name in EXTREMES}
        both |= {name: _added(getattr(self, name), getattr(other, name)) for name in ROUTER_SUMS}
        return RoutingSums(self.count + other.count, **both)


def _added(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return None if first is None or second is None else first + second


def mix_routing(parts: Sequence[RoutingSums], shares: Sequence[float]) -> RoutingSums:
    """Return the sums of a mixture of texts: every sum is first divided by its total over the layer's experts.

    So neither how much text there is nor how loud it is counts among the experts of a layer, only its share. The total
    of the mixture, by which layers compare, is ``count`` times the weighted mean of the texts' totals per token;
    largest values are those of any text, and ``count`` is what was run. Of the router's logits, every mean over tokens
    is the weighted mean of the texts' means.

    Source: the rule for several domains of Dong et al. 2025, EASY-EP, arXiv 2504.06792, as its released code has it,
    there for one score and with equal shares.

    Args:
        parts: of the texts.
        shares: of each text, adding up to 1.
    """
    merged = reduce(add, parts)
    scales = [share * merged.count / max(part.count, 1) for part, share in zip(parts, shares, strict=True)]

    def at_equal_lengths(name: str) -> Tensor:
        return torch.stack([getattr(part, name) * scale for part, scale in zip(parts, scales, strict=True)]).sum(0)

    mixed: dict[str, Any] = {
        name: _mixed([getattr(part, name) for part in parts], shares) * at_equal_lengths(name).sum() for name in SUMS
    }
    mixed |= {name: at_equal_lengths(name) for name in ROUTER_SUMS if getattr(merged, name) is not None}
    return replace(merged, **mixed)


def _mixed(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    totals = [float(part.sum()) for part in parts]
    relative = [part * (share / total) for part, share, total in zip(parts, shares, totals, strict=True) if total]
    return torch.stack(relative).sum(0) if relative else torch.zeros_like(parts[0])
