"""Cus-Prun: how much the units are needed by any document of a language, of a domain, of a task.

Source: Zhao et al. 2025, "Cus-Prun: pruning general large language models into customized expert models", arXiv
2506.02561. The impact of a unit N on a document c is ||h_without_N(c) - h(c)||_2, h the output of the layer. A unit is
irrelevant to a dimension (a corpus of one language, one domain or one task) if its impact is small on every document of
it, and what is irrelevant to every dimension goes: the sets are intersected.

Why one score holds all such cuts. Let r_d(u) be the largest rank of unit u over the documents of dimension d, a rank
being the share of the layer's units that have less impact on that document. Unit u is among the lowest p on every
document of d exactly if r_d(u) <= p, and it is so in every dimension exactly if max_d r_d(u) <= p. That maximum is the
score. So whatever share is removed, lowest score first, it is the intersection at the threshold p that the last removed
unit's score says; and ``budget: {threshold: p}`` removes exactly the intersection at p. Ranks may be replaced by
impacts, p by the paper's epsilon, and the argument stays.

Where we differ. Units go whole and physically; the paper zeroes rows and columns of single matrices, among them those
of queries and keys, which no stock model can lose. The threshold is a rank in the layer, because impacts of layers and
of documents of different length do not compare; ``relevance: impact`` is the threshold on the impact itself. With the
published rule and one threshold for all, what a document is filed under makes no difference: dimensions only matter
with ``thresholds: per_dimension``, where each marks the same share of the layer's units. Over many documents a maximum
is decided by the oddest of them; ``high_rank`` asks of nine documents in ten, ``mean_rank`` of the average one.
Impacts of FFN channels are those on the layer's output; those of groups and query heads on the attention block's, the
units' queries and keys going with them. The released detector of the same authors' earlier work scores plain sums of
activations instead, without the weights that read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Literal

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.impacts import UnitImpacts, competition_ranks
from secateur.records.units import UNIT_NAMES
from secateur.score.method import BUCKET, Evidence, Outcome, register

HIGH_SHARE = 0.9
"""Share of the documents whose ranks ``high_rank`` does not let a unit exceed."""

IRRELEVANT = 0.5
"""Where nothing else is said, a unit among this share of its layer, on every document, is called irrelevant."""

Relevance = Literal["rank", "high_rank", "mean_rank", "impact"]
Dimensions = Annotated[dict[str, list[str]], BUCKET]


def notes(outcome: Outcome) -> list[str]:
    """Return which dimensions hold the same text, and how far the units that all dimensions can do without reach."""
    options = outcome.options
    found = _same_text(options.get("dimensions") or {}, outcome.fingerprints)
    if options.get("relevance", "rank") == "impact":
        return found
    return found + _reach(outcome, float(options.get("irrelevant", IRRELEVANT)))


def _same_text(dimensions: Mapping[str, Sequence[str]], fingerprints: Mapping[str, str]) -> list[str]:
    return [
        f"dimensions {one} and {other} hold the same text ({first} and {second}): intersecting them changes nothing"
        for (one, firsts), (other, seconds) in combinations(dimensions.items(), 2)
        for first in firsts
        for second in seconds
        if first == second or fingerprints.get(first, first) == fingerprints.get(second, second)
    ]


def _reach(outcome: Outcome, irrelevant: float) -> list[str]:
    """Return per kind of unit how many are irrelevant at a threshold, and which threshold the budget took."""
    found = []
    for kind, layers in outcome.plan.layers.items():
        if kind not in outcome.scores:
            continue
        scores = torch.cat(list(outcome.scores[kind]))
        gone = torch.cat([_removed(layer.num_units, layer.keep) for layer in layers])
        if not bool(gone.any()):
            continue
        below = scores <= irrelevant
        said = (
            f"{float(below.double().mean()):.1%} of the {UNIT_NAMES[kind]} are among the lowest {irrelevant:.0%} of "
            f"their layer for every dimension; the cut takes {float(gone.double().mean()):.1%} of them, and reaches "
            f"up to the lowest {float(scores[gone].max()):.1%}"
        )
        filled = float((gone & ~below).double().mean())
        if filled:
            said += (
                f". The {filled:.1%} that these do not fill were chosen by rank alone, and some dimension needs them"
            )
        found.append(said)
    return found


def _removed(num_units: int, keep: Sequence[int]) -> Tensor:
    gone = torch.ones(num_units, dtype=torch.bool)
    gone[list(keep)] = False
    return gone


@register(
    "cus_prun",
    measures="the most that any document of any dimension (language, domain, task) needs the unit, by how the layer's "
    "output changes without it",
    formula="score_j = max over dimensions d of max over documents c of d of rank_j(c), the share of the layer's units "
    "with less impact on c; impact_j(c) = sqrt(sum_t ||W_j a_tj||^2), W_j the unit's columns of the projection that "
    "reads it, and through the norm after it where there is one",
    needs="impacts",
    cost="a few percent of the calibration pass; where a norm follows the sub-layer, up to two more products with its "
    "last projection",
    caveat="over many documents the largest rank is decided by the oddest of them; one threshold for all makes the "
    "dimensions one pooled text",
    source="Zhao et al. 2025, Cus-Prun, arXiv 2506.02561",
    impact=True,
    notes=notes,
)
def cus_prun(
    evidence: Evidence,
    /,
    *,
    dimensions: Dimensions = {},  # noqa: B006 - only read
    relevance: Relevance = "rank",
    thresholds: Literal["shared", "per_dimension"] = "shared",
    irrelevant: Annotated[float, Field(gt=0.0, lt=1.0)] = IRRELEVANT,
) -> Float64[Tensor, " units"]:
    """Return the largest relevance of each unit to a dimension: a rank, 0..1, or an impact in units of the output.

    Args:
        evidence: what single documents say, text by text.
        dimensions: names of buckets by dimension, such as ``{language: [zh], domain: [law], task: [qa]}``; every bucket
            that decides is in one. By default all of them are one dimension.
        relevance: of a unit to a dimension. ``rank``: the largest rank over its documents. ``high_rank``: the rank that
            nine documents in ten do not exceed. ``mean_rank``: the mean rank. ``impact``: the largest impact.
        thresholds: ``shared``: the same for every dimension. ``per_dimension``: each dimension's own, so that each
            marks the same share of the layer's units.
        irrelevant: share of a layer's units that count as irrelevant; it only decides what the plan says of how far
            these reach.

    Raises:
        ConfigError: a dimension without text, or a bucket that decides and is in none.
    """
    del irrelevant
    _require_text(dimensions, evidence.buckets)
    if not dimensions:
        found = [_relevance(evidence.load_impacts(), relevance)]
    else:
        found = [
            _relevance(_together([evidence.of_bucket(name).load_impacts() for name in names]), relevance)
            for names in dimensions.values()
        ]
    if thresholds == "per_dimension":
        found = [competition_ranks(values[None])[0].double() / evidence.num_units for values in found]
    return torch.stack(found).amax(0)


def _require_text(dimensions: Mapping[str, Sequence[str]], buckets: Sequence[str]) -> None:
    for dimension, names in dimensions.items():
        if not names:
            raise ConfigError(
                f"option dimensions of method cus_prun has no text for {dimension}. Name one or more buckets, or leave "
                "the dimension out."
            )
    named = [name for names in dimensions.values() for name in names]
    left_out = [name for name in buckets if dimensions and name not in named]
    if left_out:
        raise ConfigError(
            f"option dimensions of method cus_prun leaves out {', '.join(left_out)}, whose text decides. Put it under "
            "a dimension, or leave it out of prune.buckets."
        )


def _together(impacts: Sequence[UnitImpacts]) -> UnitImpacts:
    first, *rest = impacts
    for other in rest:
        first = first + other
    return first


def _relevance(impacts: UnitImpacts, relevance: Relevance) -> Float64[Tensor, " units"]:
    if relevance == "rank":
        return impacts.rank_max
    if relevance == "high_rank":
        return impacts.rank_quantile(HIGH_SHARE)
    return impacts.impact_max if relevance == "impact" else impacts.rank_sum / impacts.count
