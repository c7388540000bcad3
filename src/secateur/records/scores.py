"""Importance scores: one number per unit, higher = keep, always; they know no budget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT


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


def ranked_experts(scores: Scores) -> Iterator[dict[str, Any]]:
    """Yield for each layer with experts its index, its experts in descending order of score, and their scores.

    Plain data, one JSON object per layer, for servers that keep the first of such a list. Among equals the lower index
    comes first. Nothing is yielded where experts were not scored.
    """
    for layer, values in enumerate(scores.values.get(EXPERT, ())):
        if len(values):
            order = values.argsort(descending=True, stable=True)
            yield {"layer": layer, "experts": order.tolist(), "scores": values[order].tolist()}
