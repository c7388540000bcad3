"""Several texts that decide together: their evidence as one, or the score of whichever needs a unit most.

``mean`` is no work for this room: statistics of several texts add up before a method sees them. ``union`` scores the
units on each text alone. With r_b(u) the rank of unit u in its layer on text b, a share in 0..1, the score is the
largest r_b(u). So a unit goes only if no text needs it: cut at score p, what stays is the union of what each text alone
would keep at p, and what goes is the intersection of the lowest shares p of all. Cus-Prun (Zhao et al. 2025, arXiv
2506.02561) takes that intersection over documents of several dimensions; this takes it of any method's scores.

Ranks and not scores, because means, losses and gradients of one text are louder than those of another, and the largest
score would be that of the loudest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.impacts import competition_ranks
from secateur.score.method import METHODS


def most_needed(scores: Sequence[Float64[Tensor, " units"]]) -> Float64[Tensor, " units"]:
    """Return for each unit of a layer its largest rank among several scores: the share of units that score no higher.

    Units of equal score share the lowest place.
    """
    ranks = competition_ranks(torch.stack(list(scores)).double()).double()
    return ranks.amax(0) / ranks.shape[1]


def require_union(method: str, options: Mapping[str, Any], buckets: Sequence[str]) -> None:
    """Refuse a union that would be none.

    Args:
        method: registered name of the method that scores on each text.
        options: its options.
        buckets: names of the texts that decide.

    Raises:
        ConfigError: one text alone decides, or the method's own options already say how to look at these texts.
    """
    if len(buckets) < 2:
        raise ConfigError(
            f"combine: union needs two texts that decide, and there is {', '.join(buckets) or 'none'}. Name more under "
            "prune.buckets, or use combine: mean."
        )
    if METHODS[method].merge is not None:
        raise ConfigError(
            f"method {method} merges experts by what they do on all texts together, and combine: union looks at texts "
            "one by one. Use combine: mean."
        )
    named = [name for name in METHODS[method].named_buckets(options) if name in buckets]
    if named:
        raise ConfigError(
            f"method {method} looks at {', '.join(named)} by its own options, and combine: union would show it one "
            "text after another. Use combine: mean, or leave these texts out of the options or of prune.buckets."
        )


def union_note(buckets: Sequence[str]) -> str:
    """Return what a plan says of how its units were scored."""
    return (
        f"units were scored on {', '.join(buckets)} one by one, and each counts by the text that needs it most "
        "(combine: union); scores are ranks in the layer"
    )
