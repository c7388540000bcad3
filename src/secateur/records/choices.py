"""How a model answers multiple-choice questions: plain numbers, imports without torch; comparisons are elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Measure = Literal["acc", "acc_norm", "acc_perplexity"]
MEASURES: tuple[Measure, ...] = ("acc", "acc_norm", "acc_perplexity")
"""The ways to pick a choice, each with a share of right answers of its own."""

_ITEMS: Mapping[Measure, str] = {
    "acc": "item_correct",
    "acc_norm": "item_correct_norm",
    "acc_perplexity": "item_correct_perplexity",
}
_TWO_SIDED_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class SubjectScore:
    """Answers to the questions of one subject.

    Attributes:
        num_items: questions.
        chance: expected share for a guess.
        acc: share answered right; ``acc_stderr`` its standard error, infinite for a single question. ``acc_norm`` and
            ``acc_perplexity`` are as in ``ChoicesScore``.
    """

    num_items: int
    chance: float
    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    acc_perplexity: float | None = None
    acc_perplexity_stderr: float | None = None


@dataclass(frozen=True, slots=True)
class ChoicesScore:
    """How well one model answers one set of questions; the names are those of the LM evaluation harness.

    Attributes:
        acc: share of questions whose right choice has the highest log-likelihood; of equal ones the first counts.
        acc_stderr: its standard error, sqrt(p (1 - p) / (n - 1)).
        acc_norm: the same with every log-likelihood divided by the UTF-8 bytes of its choice, so that long choices are
            not at a disadvantage; it does not depend on the tokenizer.
        acc_norm_stderr: its standard error.
        margin: mean over questions of the right choice's log-likelihood less that of the best wrong one, in nats. It
            moves before answers flip.
        margin_stderr: its standard error.
        chance: expected share for a guess: the mean of 1 / choices.
        majority: share for the same answer always: the most frequent position of the right one.
        overlap: expected share for whoever picks the choice with the most words of the question, by chance among equal
            ones; no model is needed for it. ``overlap_stderr`` is its standard error.
        num_items: questions.
        num_truncated: questions whose prompt was cut at its start to fit.
        fingerprint: identifies the questions, as they are asked, whatever the tokenizer.
        tokens_per_s: speed of this measurement.
        item_correct: per question, whether ``acc`` counts it (kept for paired comparisons).
        item_correct_norm: the same for ``acc_norm``.
        item_margin: per question, its margin in nats.
        item_chance: per question, 1 / choices.
        acc_perplexity: share of questions for which prompt and right choice together have the lowest perplexity per
            token; None where that was not asked for. ``acc_perplexity_stderr`` is its standard error.
        item_correct_perplexity: per question, whether ``acc_perplexity`` counts it; empty where not asked for.
        item_subject: per question, its subject; empty where questions have none.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    margin: float
    margin_stderr: float
    chance: float
    majority: float
    overlap: float
    overlap_stderr: float
    num_items: int
    num_truncated: int
    fingerprint: str
    tokens_per_s: float
    item_correct: tuple[bool, ...] = field(repr=False)
    item_correct_norm: tuple[bool, ...] = field(repr=False)
    item_margin: tuple[float, ...] = field(repr=False)
    item_chance: tuple[float, ...] = field(repr=False)
    acc_perplexity: float | None = None
    acc_perplexity_stderr: float | None = None
    item_correct_perplexity: tuple[bool, ...] = field(repr=False, default=())
    item_subject: tuple[str, ...] = field(repr=False, default=())

    @property
    def measures(self) -> tuple[Measure, ...]:
        """The measures that there are."""
        return tuple(measure for measure in MEASURES if getattr(self, measure) is not None)

    @property
    def to_beat(self) -> float:
        """The share that needs no knowledge: that of a guess, or of the same answer always, whichever is more."""
        return max(self.chance, self.majority)

    def correct(self, measure: Measure) -> tuple[bool, ...]:
        """Return per question whether a measure counts it."""
        found: tuple[bool, ...] = getattr(self, _ITEMS[measure])
        return found

    def interval(self, measure: Measure = "acc") -> tuple[float, float]:
        """Return the 95 % interval of a measure's share."""
        return share_interval(sum(self.correct(measure)), self.num_items)

    def has_signal(self, measure: Measure = "acc") -> bool:
        """Return whether the share is clearly above what needs no knowledge: the whole 95 % interval is.

        Of a dense model without it, nothing can be said about what pruning did to such answers.
        """
        return self.interval(measure)[0] > self.to_beat

    def subjects(self) -> dict[str, SubjectScore]:
        """Return the answers by subject, in order of name; empty where questions have none."""
        places: dict[str, list[int]] = {}
        for place, subject in enumerate(self.item_subject):
            places.setdefault(subject, []).append(place)
        return {subject: self._of(places[subject]) for subject in sorted(places)}

    def _of(self, places: Sequence[int]) -> SubjectScore:
        shares: dict[str, float] = {}
        for measure in self.measures:
            correct = self.correct(measure)
            shares[measure], shares[f"{measure}_stderr"] = mean_estimate([correct[place] for place in places])
        return SubjectScore(len(places), mean_estimate([self.item_chance[place] for place in places])[0], **shares)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the shares by subject written out for readers."""
        return {**asdict(self), "subjects": {name: asdict(score) for name, score in self.subjects().items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoicesScore:
        """Return the score that ``to_dict`` wrote.

        Raises:
            KeyError: the answers per question are missing.
            TypeError: another field is missing, or there is one that does not belong.
        """
        items = {name: tuple(data[name]) for name in (*_ITEMS.values(), "item_margin", "item_chance", "item_subject")}
        return cls(**{name: value for name, value in {**data, **items}.items() if name != "subjects"})


def mean_estimate(values: Sequence[bool] | Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error, which of a single value is infinite."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.inf
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n * (n - 1)))


def share_interval(num_right: int, num_items: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson's score test, which holds for few questions and shares near 0 or 1.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22, 1927.

    Args:
        num_right: questions that count, from 0 to ``num_items``.
        num_items: questions, at least 1.
    """
    z2 = _TWO_SIDED_95**2
    share = num_right / num_items
    middle = (share + z2 / (2 * num_items)) / (1 + z2 / num_items)
    half = math.sqrt(share * (1 - share) * z2 / num_items + (z2 / (2 * num_items)) ** 2) / (1 + z2 / num_items)
    return (0.0 if num_right == 0 else middle - half), (1.0 if num_right == num_items else middle + half)
