"""What trained masks say of the units: with what probability each one's gate was left open.

Dims: ``units`` of one kind in one layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import SiteKey

MaskObjective = Literal["loss", "kl"]
"""What masks are trained on: the loss on the text, or the divergence of the dense model's predictions from theirs."""


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """How masks are trained.

    Attributes:
        target: share of the units' parameters that is to go.
        steps: updates, each on one calibration block.
        learning_rate: of the gates, by Adam.
        objective: what is kept low.
    """

    target: float
    steps: int
    learning_rate: float
    objective: MaskObjective


@dataclass(frozen=True, slots=True)
class MaskStep:
    """One update.

    Attributes:
        objective: what was kept low, on the step's block, with gates drawn; nats per predicted token.
        removed: share of the units' parameters that was expected to go, before the update.
        target: what that share was held against.
    """

    objective: float
    removed: float
    target: float


@dataclass(frozen=True, slots=True)
class MaskStatistics:
    """The masks that were trained on one text.

    Attributes:
        num_tokens: real tokens of the blocks that were trained on, however often.
        removed: share of the units' parameters that is expected to go, after the last update.
        units: by site (layer, unit kind), the probability that a unit's gate is open, 0..1.
        steps: one entry per update; empty for several texts together.
    """

    num_tokens: int
    removed: float
    units: Mapping[SiteKey, Float64[Tensor, " units"]]
    steps: tuple[MaskStep, ...] = ()


def merge_masks(texts: Sequence[MaskStatistics], shares: Sequence[float] | None = None) -> MaskStatistics:
    """Return the masks of several texts as those of one: every probability is the mean over the texts.

    Args:
        texts: one or more, of the same model and kinds of unit.
        shares: weight of each text, adding up to 1; None counts every text the same.

    Raises:
        ValueError: the texts have different sites.
    """
    if len(texts) == 1:
        return texts[0]
    if any(text.units.keys() != texts[0].units.keys() for text in texts):
        raise ValueError("masks at different sites cannot be merged")
    weights = list(shares) if shares is not None else [1.0 / len(texts)] * len(texts)
    units = {
        site: torch.stack([text.units[site] * weight for text, weight in zip(texts, weights, strict=True)]).sum(0)
        for site in texts[0].units
    }
    removed = sum(text.removed * weight for text, weight in zip(texts, weights, strict=True))
    return MaskStatistics(sum(text.num_tokens for text in texts), removed, units)
