"""Importance scores: one number per unit, higher = keep, always; they know no budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Scores:
    """What a method thinks of every unit.

    Attributes:
        method: registered name of the method.
        options: the method's own options, as used.
        buckets: names of the corpus buckets the statistics came from.
        values: per unit kind, one float64 vector per layer, in unit order.
        inputs_fingerprint: identifies the statistics and weights that were scored.
        depth_method: registered name of the method that scored whole layers and sub-layers, with its ``depth_options``;
            empty where none were scored.
        cumulative: whether the scores of blocks are those of removals one after another; they compare as they are,
            whatever the size of the blocks.
    """

    method: str
    options: Mapping[str, Any]
    buckets: Sequence[str]
    values: Mapping[str, Sequence[Float64[Tensor, " _units"]]]
    inputs_fingerprint: str = ""
    depth_method: str = ""
    depth_options: Mapping[str, Any] = field(default_factory=dict)
    cumulative: bool = False
