"""The random control: a method is worth something only if it beats this at the same size.

Source: none needed; every pruning paper should print it.
"""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import BLOCK_KINDS, LAYER_UNIT_KINDS
from secateur.score.method import Evidence, register


@register(
    "random",
    measures="nothing",
    formula="score_j ~ U(0, 1), seeded by (seed, unit kind, layer)",
    needs="nothing",
    cost="none",
    caveat="a control",
    source="control",
    control=True,
    kinds=(*LAYER_UNIT_KINDS, *BLOCK_KINDS),
)
def random(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return one uniform number per unit; the same seed gives the same numbers on every machine."""
    place = f"{evidence.seed}/{evidence.kind}/{evidence.layer}"
    generator = torch.Generator().manual_seed(zlib.crc32(place.encode()))
    return torch.rand(evidence.num_units, dtype=torch.float64, generator=generator)
