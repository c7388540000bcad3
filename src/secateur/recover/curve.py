"""The course of a training in numbers: when it is evaluated, which step was best, and when it should end.

Pure: knows no model and no disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from secateur.records.recovery import CurvePoint, StopReason


@dataclass(frozen=True, slots=True)
class Probe:
    """What an evaluation in the middle of a training found; the fields are those of ``CurvePoint``.

    Attributes:
        losses: per bucket, nats per predicted token of held-out text.
        accuracy: per multiple-choice set, the share answered right; empty where there is none.
    """

    losses: Mapping[str, float]
    accuracy: Mapping[str, float]


def evaluation_steps(num_steps: int, evaluations: int) -> frozenset[int]:
    """Return the steps after which a training of ``num_steps`` is evaluated: evenly spaced, the last one included."""
    return frozenset(max(1, round(num_steps * i / evaluations)) for i in range(1, evaluations + 1))


def domain_loss(losses: Mapping[str, float], domains: Sequence[str]) -> float:
    """Return the mean loss over the domain's buckets."""
    return math.fsum(losses[name] for name in domains) / len(domains)


def best_step(points: Sequence[CurvePoint], domains: Sequence[str]) -> int:
    """Return the step of the least domain loss, the earliest of several."""
    return min(points, key=lambda point: domain_loss(point.losses, domains)).step


def stop_reason(
    points: Sequence[CurvePoint], domains: Sequence[str], *, num_steps: int, target: float | None, patience: int | None
) -> StopReason | None:
    """Return why a training ends at its last point, or None where it goes on.

    - "recovered": the domain loss is at most ``target``.
    - "overfitting": the domain loss was above its best at each of the last ``patience`` points while the training loss
      fell from the first of these to the last (with a patience of one, from the point before).
    - "end": all of its ``num_steps`` steps are done.
    """
    if target is not None and domain_loss(points[-1].losses, domains) <= target:
        return "recovered"
    if patience is not None and _overfits(points, domains, patience):
        return "overfitting"
    return "end" if points[-1].step >= num_steps else None


def _overfits(points: Sequence[CurvePoint], domains: Sequence[str], patience: int) -> bool:
    if len(points) <= patience:
        return False
    losses = [domain_loss(point.losses, domains) for point in points]
    if not all(loss > min(losses) for loss in losses[-patience:]):
        return False
    before, after = points[-max(patience, 2)].train_loss, points[-1].train_loss
    return before is not None and after is not None and after < before
