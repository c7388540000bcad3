"""Recovery in words and tables: what each training was, how its held-out loss went, and why it stopped."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.records.recovery import CurvePoint, Recovery
from secateur.report.tables import Table

_OBJECTIVES = {
    "distill": "trained by distillation",
    "finetune": "fine-tuned",
}
_STOPS = {
    "end": "ran to its end",
    "recovered": "stopped because its target was reached",
    "overfitting": "stopped because held-out text got worse while the training loss fell (overfitting)",
}


def describe_recovery(recovery: Recovery) -> str:
    """Return in a sentence what a training was and how it ended."""
    speed = f" at {recovery.tokens_per_s:,.0f} tokens/s" if recovery.tokens_per_s else ""
    kept = "" if recovery.best_step == recovery.steps else f"; the weights of step {recovery.best_step} were kept"
    if not recovery.steps:
        return f"Training of `{recovery.name}` was not needed: its target was met before the first step."
    return (
        f"`{recovery.name}` was {_OBJECTIVES[recovery.objective]} on {recovery.tokens:,} tokens "
        f"({recovery.epochs:.2f} epochs, {recovery.steps:,} steps, {recovery.trained_parameters:,} parameters trained)"
        f"{speed}; it {_STOPS[recovery.stopped]}{kept}."
    )


def curve_table(recoveries: Mapping[str, Recovery]) -> Table:
    """Return the curves: training loss, held-out loss of every bucket, and accuracy.

    Held-out losses are in nats per token of the dense model. The training loss is the mean of what was lowered, per
    learned token, so those of a distillation and of a fine-tuning are not comparable.
    """
    points = [(name, recovery, point) for name, recovery in recoveries.items() for point in recovery.points]
    buckets = list(points[0][2].losses) if points else []
    sets = list(dict.fromkeys(name for _, _, point in points for name in point.accuracy))
    columns = ["training", "step", "epoch", "tokens", "training objective", *(f"{bucket} loss" for bucket in buckets)]
    columns += [f"{name} accuracy" for name in sets]
    rows = [_point_row(name, recovery, point, buckets, sets) for name, recovery, point in points]
    return Table("recovery (validation text; * marks the weights that were kept)", columns, rows)


def _point_row(name: str, recovery: Recovery, point: CurvePoint, buckets: list[str], sets: list[str]) -> list[str]:
    at_best = [other for other in recovery.points if other.step == recovery.best_step]
    mark = "*" if point is at_best[-1] else ""  # where rounds meet, two points have the same step
    return [
        name,
        f"{point.step:,}{mark}",
        f"{point.epoch:.2f}",
        f"{point.tokens:,}",
        "" if point.train_loss is None else f"{point.train_loss:.4f}",
        *(f"{point.losses[bucket]:.4f}" for bucket in buckets),
        *(f"{point.accuracy[name]:.1%}" if name in point.accuracy else "" for name in sets),
    ]
