"""Results of tasks of the lm-evaluation-harness as a table, for the terminal, for Markdown and for the page alike."""

from __future__ import annotations

import math

from secateur.records.evaluation import TWO_SIDED_95
from secateur.records.tasks import TaskMetric, TaskResults, TaskScore
from secateur.report.tables import Table, with_error


def tasks_table(results: TaskResults) -> Table:
    """Return every metric of every task for both models, and the difference paired by document where it is known."""
    rows = []
    for task, score in results.models[results.result].items():
        dense = results.dense.get(task)
        for metric in score.metrics:
            before = dense.find(metric.name, metric.filter) if dense else None
            rows.append(
                [
                    task,
                    metric.label + _direction(metric),
                    with_error(before.value, before.stderr or 0.0) if before else "",
                    with_error(metric.value, metric.stderr or 0.0),
                    _difference(results, score, metric),
                    f"{score.num_samples:,}",
                    "" if score.num_fewshot is None else str(score.num_fewshot),
                    score.version,
                ]
            )
    columns = ["task", "metric", "dense", results.result, "paired difference", "documents", "shots", "version"]
    return Table(f"tasks (lm-eval {results.harness}, ± one standard error)", columns, rows)


def describe_tasks(results: TaskResults) -> list[str]:
    """Return in sentences where the numbers come from, and which of them are worse beyond doubt."""
    told = [
        f"Numbers and their errors are those of the lm-evaluation-harness {results.harness}. The difference of two "
        "means is taken document by document, so its error is that of the difference itself."
    ]
    if results.limit is not None:
        asked = f"{results.limit:.0%}" if results.limit < 1 else f"the first {results.limit:,.0f}"
        told.append(f"Only {asked} of each task's documents were asked.")
    if worse := _surely_worse(results):
        told.append(f"The {results.result} model is worse beyond its 95 % interval on {', '.join(worse)}.")
    return told


def tasks_lines(results: TaskResults | None) -> list[str]:
    """Return Markdown paragraphs, below a heading; nothing where there are no tasks."""
    if results is None:
        return []
    return ["## Tasks", " ".join(describe_tasks(results)), tasks_table(results).markdown()]


def _surely_worse(results: TaskResults) -> list[str]:
    found = []
    for task, score in results.models[results.result].items():
        for metric in score.metrics:
            gap = results.difference(task, metric)
            if gap is None or metric.higher_is_better is None or not math.isfinite(gap.stderr):
                continue
            loss = -gap.mean if metric.higher_is_better else gap.mean
            if loss > TWO_SIDED_95 * gap.stderr:
                found.append(f"{task} ({metric.label})")
    return found


def _direction(metric: TaskMetric) -> str:
    return ", lower is better" if metric.higher_is_better is False else ""


def _difference(results: TaskResults, score: TaskScore, metric: TaskMetric) -> str:
    gap = results.difference(score.task, metric)
    if gap is None:
        return ""
    return f"{'+' if gap.mean > 0 else ''}{with_error(gap.mean, gap.stderr)}"
