"""The page's section on tasks of the lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from secateur.records.evaluation import TWO_SIDED_95
from secateur.records.tasks import TaskMetric, TaskResults
from secateur.report.page.chart import Chart, equals, make_chart
from secateur.report.page.document import Section
from secateur.report.page.theme import color
from secateur.report.tasks import describe_tasks, tasks_table

_MOST_ROWS = 30
"""Numbers that a chart still shows legibly."""

_LABEL_WIDTH = 150
"""Pixels that the name of a task may take."""


def tasks_section(results: TaskResults) -> Section:
    """Return the section on how dense model and result do on tasks."""
    shares = list(_shares(results))
    chart = [_chart(results, shares[:_MOST_ROWS])] if shares else []
    text = [" ".join(describe_tasks(results))]
    if chart:
        left = len(shares) - _MOST_ROWS
        text.append(
            "The chart has what lies between 0 and 1 and is better when higher, with 95 % intervals of each number by "
            "itself. The table has all, and differences paired, which are surer."
            + (f" {left} more are in the table only." if left > 0 else "")
        )
    return Section("tasks", "How does it do on other tasks?", text, chart, [tasks_table(results)])


def _shares(results: TaskResults) -> Iterator[tuple[str, TaskMetric, TaskMetric]]:
    """Yield a name and both models' numbers, of every metric that is a share and better when higher."""
    for task, score in results.models[results.result].items():
        dense = results.dense.get(task)
        for metric in score.metrics:
            before = dense.find(metric.name, metric.filter) if dense else None
            if before is None or metric.higher_is_better is False:
                continue
            if all(0 <= one.value <= 1 for one in (before, metric)):
                yield f"{metric.label}: {task}", before, metric


def _chart(results: TaskResults, shares: list[tuple[str, TaskMetric, TaskMetric]]) -> Chart:
    rows = [
        _row(name, model, metric)
        for name, before, after in shares
        for model, metric in (("dense", before), (results.result, after))
    ]
    highlight = {
        "condition": {"test": equals("model", results.result), "value": color("accent")},
        "value": color("other"),
    }
    y: dict[str, Any] = {
        "y": {
            "field": "task",
            "type": "nominal",
            "sort": None,
            "title": None,
            "axis": {"labelColor": color("ink"), "labelLimit": _LABEL_WIDTH},
        },
        "yOffset": {"field": "model", "type": "nominal", "sort": ["dense", results.result]},
        "color": highlight,
        "tooltip": [
            {"field": "task"},
            {"field": "model"},
            {"field": "shown", "title": "value"},
            {"field": "low", "title": "95 % interval from", "format": ".3f"},
            {"field": "high", "title": "to", "format": ".3f"},
        ],
    }
    ends = [end for row in rows for end in (row["value"], row["low"], row["high"]) if end is not None]
    room = 0.06 * max(max(ends) - min(ends), 0.02)
    place = {
        "type": "quantitative",
        "title": "value",
        "scale": {"domain": [max(0.0, min(ends) - room), min(1.0, max(ends) + room)], "zero": False, "nice": False},
        "axis": {"labelOverlap": True, "tickCount": 6},
    }
    told = "; ".join(f"{row['task']}: {row['model']} {row['shown']}" for row in rows)
    return make_chart(
        "tasks",
        f"Tasks: dense (grey) and {results.result} (coloured)",
        f"Numbers of dense model and {results.result} on tasks, better when higher. {told}.",
        rows,
        is_wide=True,
        height=44 * len(shares),
        layer=[
            {
                "transform": [{"filter": "isValid(datum.low)"}],
                "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round"},
                "encoding": {**y, "x": {**place, "field": "low"}, "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 1},
                "encoding": {**y, "x": {**place, "field": "value"}},
            },
        ],
    )


def _row(task: str, model: str, metric: TaskMetric) -> dict[str, Any]:
    spread = None if metric.stderr is None else TWO_SIDED_95 * metric.stderr
    return {
        "task": task,
        "model": model,
        "value": metric.value,
        "low": None if spread is None else max(0.0, metric.value - spread),
        "high": None if spread is None else min(1.0, metric.value + spread),
        "shown": f"{metric.value:.3f}",
    }
