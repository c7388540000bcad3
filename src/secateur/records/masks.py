"""What trained masks say of the units: with what probability each one's gate was left open.

Dims: ``units`` of one kind in one layer; ``out`` and ``in`` features of a linear layer, whatever its weight's layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from secateur.records.units import SiteKey

MaskObjective = Literal["loss", "kl"]
"""What masks are trained on: the loss on the text, or the divergence of the dense model's predictions from theirs."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """How low-rank adapters are trained beside masks.

    Attributes:
        rank: of each adapter.
        alpha: its scale, times the rank.
        targets: ends of the names of linear layers that get one; or all inside decoder layers.
        learning_rate: of the adapters at the first step, by Adam; it falls to 0 along half a cosine.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] | Literal["all-linear"]
    learning_rate: float


@dataclass(frozen=True, slots=True)
class LowRank:
    """What is added to weights, W + scale B A.

    Attributes:
        scale: of all of them.
        factors: by name of the linear layer, A and B.
    """

    scale: float
    factors: Mapping[str, tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"]]]

    def merged(self, name: str, tensor: Tensor, weight_layout: str) -> Tensor:
        """Return a parameter with what belongs to it added, in its own dtype; others are returned as they are.

        Args:
            name: of the parameter.
            tensor: the parameter.
            weight_layout: of linear layers: "out_in" or "in_out".
        """
        factors = self.factors.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        if factors is None:
            return tensor
        wide = torch.promote_types(tensor.dtype, torch.float32)
        first, second = (factor.to(tensor.device, wide) for factor in factors)
        change = self.scale * (second @ first)
        return (tensor.to(wide) + (change if weight_layout == "out_in" else change.T)).to(tensor.dtype)


@dataclass(frozen=True, slots=True)
class MaskSettings:
    """How masks are trained.

    Attributes:
        target: share of the units' parameters that is to go.
        steps: updates, each on one calibration block.
        learning_rate: of the gates, by Adam.
        objective: what is kept low.
        lora: adapters of the weights that are trained together with the gates; None leaves weights as they are.
    """

    target: float
    steps: int
    learning_rate: float
    objective: MaskObjective
    lora: AdapterSettings | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; without adapters they are not named."""
        data = asdict(self)
        return data if self.lora is not None else {key: value for key, value in data.items() if key != "lora"}


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
        adapters: what was trained of the weights meanwhile; None where they stayed as they were.
    """

    num_tokens: int
    removed: float
    units: Mapping[SiteKey, Float64[Tensor, " units"]]
    steps: tuple[MaskStep, ...] = ()
    adapters: LowRank | None = None


def merge_masks(texts: Sequence[MaskStatistics], shares: Sequence[float] | None = None) -> MaskStatistics:
    """Return the masks of several texts as those of one: every probability is the mean over the texts.

    Args:
        texts: one or more, of the same model and kinds of unit.
        shares: weight of each text, adding up to 1; None counts every text the same.

    Raises:
        ValueError: the texts have different sites, or weights were trained with one of them.
    """
    if len(texts) == 1:
        return texts[0]
    if any(text.units.keys() != texts[0].units.keys() for text in texts):
        raise ValueError("masks at different sites cannot be merged")
    if any(text.adapters is not None for text in texts):
        raise ValueError("masks with adapters of their own cannot be merged")
    weights = list(shares) if shares is not None else [1.0 / len(texts)] * len(texts)
    units = {
        site: torch.stack([text.units[site] * weight for text, weight in zip(texts, weights, strict=True)]).sum(0)
        for site in texts[0].units
    }
    removed = sum(text.removed * weight for text, weight in zip(texts, weights, strict=True))
    return MaskStatistics(sum(text.num_tokens for text in texts), removed, units)
