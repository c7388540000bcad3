"""Which token ids stay: a rule over how often the domain's text uses each token, and everything that needs to stay.

A token that stays needs the tokens that its spelling is merged from; without them the tokenizer could not make it any
more. Where a size is asked for, tokens are taken by count, higher counts first and lower ids among equals, each with
what it needs, as long as they fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.allocate.budget import Shapes, token_cost
from secateur.allocate.request import Request, parameters_to_remove
from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.records.plan import VocabularyPlan
from secateur.vocabulary import TokenGraph

DEFAULT_RULE: Mapping[str, int] = {"min_count": 1}
NEEDED, COUNTED, ROUNDED = "needed to spell others", "used by the domain's text", "rounding"
_COARSE_VOCABULARY, _COARSE_MULTIPLE = 8192, 64


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What is known of a vocabulary before any is cut.

    Attributes:
        graph: which tokens each token needs.
        num_rows: rows of the embedding; more than the tokenizer has ids where it is padded.
        required: ids that stay whatever the rule says, by reason.
        fingerprint: of the tokenizer.
    """

    graph: TokenGraph
    num_rows: int
    required: Mapping[str, Iterable[int]] = field(default_factory=dict)
    fingerprint: str = ""


def choose_tokens(
    vocabulary: Vocabulary,
    counts: Int64[Tensor, " ids"],
    rule: Mapping[str, int | float],
    *,
    multiple_of: int | Literal["auto"] = "auto",
) -> VocabularyPlan:
    """Return which token ids stay.

    Args:
        vocabulary: tokens, what they need, and which must stay.
        counts: how often the domain's text uses each id.
        rule: one of ``min_count`` (occurrences), ``threshold`` (share of all tokens at or below which an id goes),
            ``coverage`` (share of the text's tokens to keep) and ``size`` (ids to keep in all); empty for the default.
        multiple_of: the number of kept ids is a multiple of this, reached with more real tokens; ``auto`` is 64 from
            8,192 rows on, else 1. A ``size`` is rounded down where a multiple is asked for in so many words.

    Raises:
        PlanError: nothing was counted, the rule removes nothing, or the size is below what must stay.
    """
    frequency = [int(count) for count in counts.tolist()]
    total = sum(frequency)
    if total == 0:
        raise PlanError("no token of the domain's text was counted, so no token id can be chosen. Give text.")
    rule = dict(rule) or dict(DEFAULT_RULE)
    multiple = multiple_of if multiple_of != "auto" else _auto_multiple(vocabulary.num_rows)
    chosen = _Chosen(vocabulary)
    if "size" in rule:
        size = int(rule["size"])
        if multiple_of != "auto":
            size -= size % multiple
        _require_size(size, chosen, vocabulary)
        chosen.take(_by_count(frequency), size, COUNTED)
    else:
        chosen.add(_by_rule(frequency, total, rule), COUNTED)
        chosen.take(_by_count(frequency), -(-len(chosen.reasons) // multiple) * multiple, ROUNDED)
    return _plan(chosen, vocabulary, frequency, rule)


def same_size_tokens(plan: VocabularyPlan, vocabulary: Vocabulary, scores: Float64[Tensor, " ids"]) -> VocabularyPlan:
    """Return a plan that keeps as many ids as ``plan``, but those that ``scores`` prefers; this makes controls."""
    chosen = _Chosen(vocabulary)
    order = sorted(range(len(scores)), key=lambda token: (-float(scores[token]), token))
    chosen.take(order, len(plan.keep), COUNTED)
    keep = tuple(sorted(chosen.reasons))
    return replace(plan, keep=keep, reasons=chosen.summary(), covered_ratio=math.nan)


def smallest_size(vocabulary: Vocabulary) -> int:
    """Return how many ids must stay whatever the rule."""
    return len(_Chosen(vocabulary).reasons)


def size_for_budget(request: Request, geometry: Geometry, shapes: Shapes) -> int:
    """Return how many ids may stay so that the vocabulary alone meets a budget of parameters or bytes.

    Raises:
        PlanError: the budget asks for more than the whole vocabulary holds, or is met already.
    """
    cost, rows = token_cost(geometry, shapes), geometry.dimensions["vocab_size"]
    wanted = parameters_to_remove(request, shapes, geometry)
    if wanted >= cost * rows:
        raise PlanError(
            f"the budget removes {wanted:,.0f} parameters, but the whole vocabulary has {cost * rows:,}. Lower the "
            "budget, or add unit kinds to prune.units."
        )
    return rows - math.ceil(wanted / cost)


def _auto_multiple(num_rows: int) -> int:
    return _COARSE_MULTIPLE if num_rows >= _COARSE_VOCABULARY else 1


def _require_size(size: int, chosen: _Chosen, vocabulary: Vocabulary) -> None:
    if size < len(chosen.reasons):
        parts = ", ".join(f"{count:,} {reason}" for reason, count in chosen.summary().items())
        raise PlanError(
            f"a vocabulary of {size:,} ids is too small: {len(chosen.reasons):,} must stay ({parts}). Ask for at least "
            "that many, or shorten the keep list."
        )
    if size >= vocabulary.num_rows:
        raise PlanError(
            f"a vocabulary of {size:,} ids removes nothing: the model has {vocabulary.num_rows:,}. Ask for fewer."
        )


def _by_count(frequency: Sequence[int]) -> list[int]:
    return sorted(range(len(frequency)), key=lambda token: (-frequency[token], token))


def _by_rule(frequency: Sequence[int], total: int, rule: Mapping[str, int | float]) -> list[int]:
    if "coverage" in rule:
        covered, chosen = 0, []
        for token in _by_count(frequency):
            if covered >= rule["coverage"] * total:
                break
            covered += frequency[token]
            chosen.append(token)
        return chosen
    least = rule["min_count"] if "min_count" in rule else rule["threshold"] * total
    strict = "min_count" not in rule
    return [token for token, count in enumerate(frequency) if (count > least if strict else count >= least)]


def _plan(chosen: _Chosen, vocabulary: Vocabulary, frequency: Sequence[int], rule: Mapping[str, Any]) -> VocabularyPlan:
    keep = tuple(sorted(chosen.reasons))
    if len(keep) == vocabulary.num_rows:
        raise PlanError(
            f"the vocabulary rule {dict(rule)} keeps all {vocabulary.num_rows:,} token ids, so it removes nothing. Ask "
            "for more, or leave vocabulary out of prune."
        )
    total = sum(frequency)
    return VocabularyPlan(
        num_tokens=vocabulary.num_rows,
        keep=keep,
        rule=dict(rule),
        reasons=chosen.summary(),
        counted_tokens=total,
        covered_ratio=sum(frequency[token] for token in keep if token < len(frequency)) / total,
        tokenizer_fingerprint=vocabulary.fingerprint,
    )


class _Chosen:
    """A growing set of token ids in which nothing that a token needs is ever missing; remembers why each stays."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.graph = vocabulary.graph
        self.reasons: dict[int, str] = {}
        for reason, tokens in vocabulary.required.items():
            self.add(tokens, reason)

    def add(self, tokens: Iterable[int], reason: str) -> None:
        for token in tokens:
            self.reasons.setdefault(token, reason)
        for token in list(self.reasons):
            for part in self.graph.needs(token):
                self.reasons.setdefault(part, NEEDED)

    def take(self, order: Iterable[int], size: int, reason: str) -> None:
        """Take tokens in the given order, each with what it needs, as long as they fit into ``size``."""
        for token in order:
            if len(self.reasons) >= size:
                return
            new = [part for part in (token, *self.graph.needs(token)) if part not in self.reasons]
            if token not in self.reasons and len(self.reasons) + len(new) <= size:
                self.reasons |= {part: reason if part == token else NEEDED for part in new}

    def summary(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for reason in self.reasons.values():
            counts[reason] = counts.get(reason, 0) + 1
        return counts
