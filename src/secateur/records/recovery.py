"""What a recovery training went through: its curve, where it stopped and why; plain numbers, imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA_VERSION = 1

StopReason = Literal["end", "recovered", "overfitting"]
"""Why a training ended: its text was used up, the target was reached, or held-out text got worse."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One evaluation in the middle of a training.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the training text done, in fractions.
        tokens: training tokens seen.
        train_loss: mean objective since the point before, in the unit of the objective; None at step 0.
        losses: per bucket, nats per predicted token of held-out text (of validation, never of test).
        accuracy: per multiple-choice set, the share answered right; empty where there is none.
    """

    step: int
    epoch: float
    tokens: int
    train_loss: float | None
    losses: Mapping[str, float]
    accuracy: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Recovery:
    """One finished training.

    Attributes:
        name: of the trained model's row, for example "recovered".
        objective: "distill" or "finetune".
        points: its curve, the first before any step.
        best_step: the step whose weights were kept: the least mean loss over the domain's buckets.
        steps: optimizer steps done; ``tokens`` training tokens seen, ``epochs`` passes over the text.
        stopped: why it ended.
        target: the domain loss that it was to reach, in nats per token; None where there was none.
        seconds: it took, with its evaluations; ``tokens_per_s`` is of the training alone.
        text_fingerprint: identifies the text it was trained on.
        trained_parameters: parameters that were updated.
    """

    name: str
    objective: str
    points: tuple[CurvePoint, ...]
    best_step: int
    steps: int
    tokens: int
    epochs: float
    stopped: StopReason
    target: float | None
    seconds: float
    tokens_per_s: float
    text_fingerprint: str
    trained_parameters: int
    schema_version: int = SCHEMA_VERSION

    @property
    def best(self) -> CurvePoint:
        """The point whose weights were kept."""
        return next(point for point in reversed(self.points) if point.step == self.best_step)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recovery:
        """Return the recovery that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        return cls(**{**data, "points": tuple(CurvePoint(**point) for point in data["points"])})
