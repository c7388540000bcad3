"""How a model answers multiple-choice questions: plain numbers, imports without torch; comparisons are elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


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
        num_items: questions.
        num_truncated: questions whose prompt was cut at its start to fit.
        fingerprint: identifies the questions, as they are asked, whatever the tokenizer.
        tokens_per_s: speed of this measurement.
        item_correct: per question, whether ``acc`` counts it (kept for paired comparisons).
        item_correct_norm: the same for ``acc_norm``.
        item_margin: per question, its margin in nats.
    """

    acc: float
    acc_stderr: float
    acc_norm: float
    acc_norm_stderr: float
    margin: float
    margin_stderr: float
    chance: float
    num_items: int
    num_truncated: int
    fingerprint: str
    tokens_per_s: float
    item_correct: tuple[bool, ...] = field(repr=False)
    item_correct_norm: tuple[bool, ...] = field(repr=False)
    item_margin: tuple[float, ...] = field(repr=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ChoicesScore:
        """Return the score with these fields, as ``dataclasses.asdict`` and JSON give them.

        Raises:
            KeyError: the answers per question are missing.
            TypeError: another field is missing, or there is one that does not belong.
        """
        items = {name: tuple(data[name]) for name in ("item_correct", "item_correct_norm", "item_margin")}
        return cls(**{**data, **items})
