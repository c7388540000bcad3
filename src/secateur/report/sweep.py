"""A sweep as words and tables, for the terminal and for its page."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from secateur.records.evaluation import CONFIDENCE_95
from secateur.records.sweep import BEHIND, FRONT, LEVEL, BucketScore, Sweep, SweepPoint
from secateur.report.tables import Table, format_bytes, format_count, with_error

WITHIN = 0.05
"""The rise in perplexity that the verdict asks about."""

STANDINGS: Mapping[str, str] = {
    FRONT: "on the front: no other point has fewer parameters and a lower loss",
    LEVEL: "level: another point has both, but not by more than the standard error",
    BEHIND: "behind: another point has both, with 95 % confidence",
}

_MOST_NAMES = 8


def shown_ratio(score: BucketScore) -> str:
    """Return perplexity over the dense model's, with its standard error."""
    return with_error(score.ratio, math.inf if score.ratio_stderr is None else score.ratio_stderr)


def is_within(point: SweepPoint, domains: Sequence[str], rise: float = WITHIN) -> bool:
    """Return whether a point's perplexity rises by no more than ``rise`` on every domain, with 95 % confidence."""
    scores = [point.text[domain] for domain in domains]
    return all(
        score.ratio_stderr is not None and score.ratio + CONFIDENCE_95 * score.ratio_stderr <= 1 + rise
        for score in scores
    )


def smallest_within(sweep: Sweep, rise: float = WITHIN) -> SweepPoint | None:
    """Return the point with the fewest parameters that surely stays within ``rise`` of the dense model.

    The least loss decides among equal ones.
    """
    fitting = [point for point in sweep.done if point.is_comparable and is_within(point, sweep.domains, rise)]
    return min(fitting, key=lambda point: (point.parameters or 0, point.loss or 0.0), default=None)


def best_point(sweep: Sweep) -> SweepPoint | None:
    """Return the point with the least loss on the domains."""
    compared = [point for point in sweep.done if point.is_comparable and point.loss is not None]
    return min(compared, key=lambda point: point.loss or 0.0, default=None)


def sweep_verdict(sweep: Sweep) -> str:
    """Return how many points there are and the smallest model within 5 % of the dense one, with its numbers."""
    done, words = len(sweep.done), f"{len(sweep.points)} point{'s' * (len(sweep.points) != 1)}"
    left = [f"{n} {status}" for status in ("failed", "skipped") if (n := _count(sweep, status))]
    counted = f"{words}, {', '.join(left)}" if left else words
    if not done:
        return f"{counted}: nothing was measured."
    where, share = " and ".join(sweep.domains), f"{WITHIN:.0%}".replace("%", " %")
    smallest = smallest_within(sweep)
    if smallest is not None:
        return (
            f"{counted}; smallest model whose perplexity on held-out {where} text is, with 95 % confidence, within "
            f"{share} of the dense model's: {describe(smallest, sweep.domains)}."
        )
    best = best_point(sweep)
    assert best is not None, "some point is done"
    return (
        f"{counted}; no model's perplexity on held-out {where} text is, with 95 % confidence, within {share} of the "
        f"dense model's. The nearest: {describe(best, sweep.domains)}."
    )


def _count(sweep: Sweep, status: str) -> int:
    return sum(point.status == status for point in sweep.points)


def describe(point: SweepPoint, domains: Sequence[str]) -> str:
    """Return a point with its size and loss in a few words."""
    if point.pruning_ratio is None:
        return f"{point.name}, {point.status}: {point.message}"
    losses = ", ".join(f"{domain} {shown_ratio(point.text[domain])} x the dense model's" for domain in domains)
    return f"{point.name}, {point.pruning_ratio:.1%} fewer parameters, perplexity on {losses}"


def sweep_table(sweep: Sweep) -> Table:
    """Return the points for a terminal: size, loss on every text, and how each stands to the others."""
    columns = ["point", "status", "parameters", "removed", *(f"{bucket} ppl / dense" for bucket in sweep.buckets)]
    columns += [f"{asked} acc" for asked in sweep.question_sets]
    rows = []
    for point in sweep.points:
        row = [point.name, point.standing or _status(point), *_size(point)]
        row += [shown_ratio(point.text[bucket]) if bucket in point.text else "" for bucket in sweep.buckets]
        row += [_shown_accuracy(point, asked) for asked in sweep.question_sets]
        rows.append(row)
    return Table("points (± one standard error)", columns, rows)


def all_table(sweep: Sweep) -> Table:
    """Return everything that is known of every point, the dense model first."""
    columns = ["point", "status", *sweep.varied, "parameters", "removed", "weights"]
    for bucket in sweep.buckets:
        columns += [f"{bucket} perplexity", f"{bucket} bits/byte", f"{bucket} ppl / dense"]
    columns += [f"{asked} acc" for asked in sweep.question_sets]
    columns += ["random ppl / dense", "time"]
    rows = [_dense_row(sweep, len(columns))] if sweep.dense else []
    for point in sweep.points:
        row = [point.name, point.standing or _status(point)]
        row += [_shown(point.overrides[key]) if key in point.overrides else "" for key in sweep.varied]
        row += [*_size(point), "" if point.size_bytes is None else format_bytes(point.size_bytes)]
        for bucket in sweep.buckets:
            row += _scores(point.text[bucket]) if bucket in point.text else ["", "", ""]
        row += [_shown_accuracy(point, asked) for asked in sweep.question_sets]
        row += ["" if point.random_ratio is None else f"{point.random_ratio:.4g}"]
        row += [str(timedelta(seconds=round(point.seconds)))]
        rows.append(row)
    return Table("all points (± one standard error)", columns, rows)


def _dense_row(sweep: Sweep, width: int) -> list[str]:
    assert sweep.dense is not None, "looked at by the caller"
    dense = sweep.dense
    row = ["dense model", "", *("" for _ in sweep.varied)]
    row += [format_count(dense.parameters), "", format_bytes(dense.size_bytes)]
    for bucket in sweep.buckets:
        row += [f"{dense.perplexity[bucket]:.4g}", f"{dense.bits_per_byte[bucket]:.4g}", "1"]
    return row + [""] * (width - len(row))


def _status(point: SweepPoint) -> str:
    return point.status if point.is_comparable else "other text"


def _size(point: SweepPoint) -> list[str]:
    if point.parameters is None or point.pruning_ratio is None:
        return ["", ""]
    return [format_count(point.parameters), f"{point.pruning_ratio:.1%}"]


def _scores(score: BucketScore) -> list[str]:
    values = ((score.perplexity, score.perplexity_stderr), (score.bits_per_byte, score.bits_per_byte_stderr))
    return [*(with_error(value, math.inf if error is None else error) for value, error in values), shown_ratio(score)]


def _shown_accuracy(point: SweepPoint, asked: str) -> str:
    if asked not in point.choices:
        return ""
    answers = point.choices[asked]
    return with_error(answers.acc, math.inf if answers.acc_stderr is None else answers.acc_stderr)


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_shown(item)}" for key, item in value.items())
    return "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)


def failures(sweep: Sweep) -> list[str]:
    """Return a sentence for every point that failed, with the reason, and one for each reason to skip points."""
    told = [f"{point.name} failed: {point.message}" for point in sweep.points if point.status == "failed"]
    skipped = [point for point in sweep.points if point.status == "skipped"]
    for reason in dict.fromkeys(point.message for point in skipped):
        told.append(f"{_listed([point.name for point in skipped if point.message == reason])}: {reason}")
    return told


def sweep_cautions(sweep: Sweep) -> list[str]:
    """Return what weakens the evidence, in sentences."""
    found = []
    others = [point.name for point in sweep.done if not point.is_comparable]
    if others:
        found.append(
            f"{_listed(others)} measured on other test text than most points (block size, amount or choice of text "
            "differ), so not compared with them."
        )
    beaten = [point.name for point in sweep.done if point.beats_random is False]
    if beaten:
        found.append(f"No better than a random cut of the same size, as far as can be told: {_listed(beaten)}.")
    unknown = [point.name for point in sweep.done if point.beats_random is None]
    if unknown:
        found.append(f"Not compared with a random cut of the same size: {_listed(unknown)}.")
    if len(sweep.done) > 1:
        found.append(
            f"The best of {len(sweep.done)} points is chosen on the text that it is measured on, so it looks a little "
            "better than it is; measure a chosen model on other text of its domain."
        )
    if sweep.dense and not set(sweep.buckets) - set(sweep.domains):
        found.append("No general text was measured, so what the models forgot is not known.")
    return found


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MOST_NAMES])
    return f"{shown} and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else shown
