"""The page of a comparison: all runs on one scale, differences with their intervals, and which units stay in each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.records.comparison import Comparison, Judgement, interval
from secateur.records.evaluation import paired_difference
from secateur.records.units import LAYER_UNIT_KINDS, UNIT_NAMES
from secateur.report.comparison import (
    FEW_SHARED,
    answers_table,
    compared_table,
    comparison_notes,
    comparison_verdict,
    differences_table,
    layer_tables,
    overlap_table,
    recipes_table,
    runs_table,
    shown_interval,
    signed,
    text_table,
    words,
)
from secateur.report.page.chart import (
    ROW_HEIGHT,
    Chart,
    dashed_line,
    equals,
    interval_layers,
    log_ticks,
    make_chart,
    ratio_scale,
)
from secateur.report.page.document import Document, Section, Tile
from secateur.report.page.records import TIMES, Ratio, ratio_of
from secateur.report.page.theme import color

_MOST_TILES = 4
_MOST_NAMES = 3
_JUDGED: Mapping[Judgement, str] = {"better": "accent", "worse": "red"}
"""Colours of judgements; all others are grey."""


def comparison_document(comparison: Comparison, version: str = "") -> Document:
    """Return what the page of a comparison says."""
    base = comparison.baseline.name
    return Document(
        kind="Comparison",
        title=_title(comparison),
        subject=f" against {base}",
        verdict=comparison_verdict(comparison),
        sections=[section for make in _SECTIONS if (section := make(comparison)) is not None],
        tiles=_tiles(comparison),
        cautions=comparison_notes(comparison),
        made=[runs_table(comparison), text_table(comparison)],
        commands=[f"secateur compare {' '.join(run.folder for run in comparison.runs)} --html comparison.html"],
        version=version,
    )


def _title(comparison: Comparison) -> str:
    names = [run.name for run in comparison.others]
    return ", ".join(names) if len(names) <= _MOST_NAMES else f"{len(names)} runs"


def _tiles(comparison: Comparison) -> list[Tile]:
    base, found = comparison.baseline, []
    for one in [one for one in comparison.texts if one.bucket in base.domains][:_MOST_TILES]:
        ratio = ratio_of(one.nll)
        detail = f"95 % interval {ratio.interval() or 'unknown'}: {words(one.judgement)}"
        label = f"perplexity on {one.bucket}: {one.run} relative to {base.name}"
        found.append(Tile(label, f"{ratio.short()} {TIMES}", detail))
    return found


def _loss(comparison: Comparison) -> Section:
    return Section(
        "loss",
        "How good is each?",
        [
            "Each point is a run's perplexity divided by its dense model's on the same documents; lower is better, and "
            f"the dashed line is the dense model. Bars are 95 % intervals. {comparison.baseline.name} is in colour.",
        ],
        [loss_chart(comparison, bucket) for bucket in comparison.buckets],
        [compared_table(comparison)],
    )


def _differences(comparison: Comparison) -> Section:
    base = comparison.baseline.name
    tables = [differences_table(comparison), answers_table(comparison)]
    return Section(
        "differences",
        f"Is it different from {base}?",
        [
            f"Each point is a run's perplexity divided by that of {base} on the same documents, so what makes a "
            "document hard for both is not counted as uncertainty. Where the bar does not reach the dashed line, the "
            "difference is surer than chance at 95 %.",
        ],
        [difference_chart(comparison, bucket) for bucket in comparison.buckets]
        + [answers_chart(comparison, name) for name in comparison.questions],
        [table for table in tables if table.rows],
    )


def _units(comparison: Comparison) -> Section | None:
    if not comparison.plans and not comparison.vocabularies:
        return None
    charts = []
    for kind in (kind for kind in LAYER_UNIT_KINDS if any(plan.kind == kind for plan in comparison.plans)):
        charts += [kept_chart(comparison, kind), alike_chart(comparison, kind)]
    tables = [overlap_table(comparison), *layer_tables(comparison)]
    return Section("units", "Do they keep the same units?", [FEW_SHARED], charts, tables)


def _recipes(comparison: Comparison) -> Section:
    table = recipes_table(comparison)
    text = "Every key of the resolved recipes whose value is not the same in all runs."
    return Section(
        "recipes",
        "What was asked differently?",
        [text if table.rows else "The resolved recipes have no key with different values."],
        tables=[table] if table.rows else [],
    )


_SECTIONS = (_loss, _differences, _units, _recipes)


def loss_chart(comparison: Comparison, bucket: str) -> Chart:
    """Return every run's perplexity over its dense model's on a text."""
    ratios = {
        run.name: ratio_of(paired_difference(run.result.text[bucket], run.dense.text[bucket]))
        for run in comparison.runs
    }
    base = comparison.baseline.name
    highlight = {"condition": {"test": equals("model", base), "value": color("accent")}, "value": color("other")}
    told = "; ".join(f"{name} {shown_interval(one)}" for name, one in ratios.items())
    return ratio_chart(
        f"loss-{bucket}",
        f"Perplexity on {bucket} text, relative to the dense model",
        f"Perplexity on {bucket} over the dense model's, where 1 is no difference and lower is better: {told}.",
        ratios,
        "perplexity ÷ dense model's",
        highlight,
    )


def difference_chart(comparison: Comparison, bucket: str) -> Chart:
    """Return every run's perplexity over the baseline's on a text, coloured by what its interval says."""
    ratios = {one.run: ratio_of(one.nll) for one in comparison.texts if one.bucket == bucket}
    judged = {one.run: one.judgement for one in comparison.texts if one.bucket == bucket}
    base = comparison.baseline.name
    told = "; ".join(f"{name} {shown_interval(one)}, {words(judged[name])}" for name, one in ratios.items())
    return ratio_chart(
        f"difference-{bucket}",
        f"Perplexity on {bucket} text, relative to {base}",
        f"Perplexity on {bucket} over that of {base} on the same documents; below 1 is better: {told}.",
        ratios,
        "perplexity ÷ baseline's (left: better)",
        judgement_color(),
        judged,
    )


def judgement_color() -> dict[str, Any]:
    """Return the colour of a row by its field ``judgement``."""
    conditions = [{"test": equals("judgement", name), "value": color(shade)} for name, shade in _JUDGED.items()]
    return {"condition": conditions, "value": color("other")}


def ratio_chart(
    name: str,
    title: str,
    description: str,
    ratios: Mapping[str, Ratio],
    axis_title: str,
    highlight: Mapping[str, Any],
    judged: Mapping[str, Judgement] | None = None,
) -> Chart:
    """Return a chart with one row per name: a ratio with its 95 % interval, beside a dashed line at 1."""
    rows = [
        {
            "model": label,
            "ratio": one.value,
            "low": one.low,
            "high": one.high,
            "shown": f"{one.short()} {TIMES}",
            "interval": one.interval() or "unknown",
            "judgement": judged[label] if judged else "",
        }
        for label, one in ratios.items()
    ]
    scale = ratio_scale(list(ratios.values()))
    axis: dict[str, Any] = {"title": axis_title, "format": "~g", "labelOverlap": True}
    if scale["type"] == "log":
        axis["values"] = log_ticks(*scale["domain"])
    tip = [
        {"field": "model", "title": "run"},
        {"field": "shown", "title": "ratio"},
        {"field": "interval", "title": "95 % interval"},
        *([{"field": "judgement", "title": "verdict"}] if judged else []),
    ]
    place = {"field": "ratio", "type": "quantitative", "scale": scale}
    layers = [dashed_line(1.0), *interval_layers(place, axis, highlight, tip)]
    return make_chart(name, title, description, rows, height=ROW_HEIGHT * len(rows), layer=layers)


def answers_chart(comparison: Comparison, questions: str) -> Chart:
    """Return the difference of every run's share of right answers from the baseline's."""
    found = [one for one in comparison.answers if one.questions == questions]
    rows: list[dict[str, Any]] = []
    for one in found:
        ends = interval(one.acc)
        rows.append(
            {
                "model": one.run,
                "difference": one.acc.mean,
                "low": ends[0] if ends else None,
                "high": ends[1] if ends else None,
                "shown": signed(one.acc, percent=True).partition(" ±")[0] + " points",
                "judgement": one.judgement,
            }
        )
    ends_of_all = [end for row in rows for end in (row["difference"], row["low"], row["high"]) if end is not None]
    reach = max([0.01, *map(abs, ends_of_all)])
    scale = {"domain": [-1.1 * reach, 1.1 * reach], "zero": True, "nice": False}
    place: dict[str, Any] = {"field": "difference", "type": "quantitative", "scale": scale}
    axis = {"title": "right answers, difference (right: better)", "format": "+.0%", "labelOverlap": True}
    tip = [{"field": "model", "title": "run"}, {"field": "shown", "title": "difference"}, {"field": "judgement"}]
    base = comparison.baseline.name
    told = "; ".join(f"{row['model']} {row['shown']}, {row['judgement']}" for row in rows)
    return make_chart(
        f"answers-{questions}",
        f"Right answers to {questions}, difference from {base}",
        f"Difference in the share of right answers to {questions} from {base}, on the same questions: {told}.",
        rows,
        height=ROW_HEIGHT * len(rows),
        layer=[dashed_line(0.0), *interval_layers(place, axis, judgement_color(), tip)],
    )


def kept_chart(comparison: Comparison, kind: str) -> Chart:
    """Return a map of runs by layers: the share of a kind of unit that stays."""
    what, base = UNIT_NAMES[kind], comparison.baseline.name
    plans = [plan for plan in comparison.plans if plan.kind == kind]
    kept = {base: [(one.kept_baseline, one.num_units) for one in plans[0].layers]}
    kept |= {plan.run: [(one.kept, one.num_units) for one in plan.layers] for plan in plans}
    rows = [
        {"run": run, "layer": layer, "share": count / total if total else 0.0, "count": f"{count:,} of {total:,}"}
        for run, layers in kept.items()
        for layer, (count, total) in enumerate(layers)
    ]
    totals = {
        run: (sum(count for count, _ in layers), sum(total for _, total in layers)) for run, layers in kept.items()
    }
    told = "; ".join(f"{run} keeps {count:,} of {total:,}" for run, (count, total) in totals.items())
    return _layer_map(
        f"kept-{kind}",
        f"{what} kept, by layer",
        f"Map of runs by layers; the stronger a cell, the more {what} stay: {told}.",
        rows,
        "share kept",
        [{"field": "count", "title": "kept"}],
    )


def alike_chart(comparison: Comparison, kind: str) -> Chart:
    """Return a map of runs by layers: how many units of a kind a run has in common with the baseline."""
    what, base = UNIT_NAMES[kind], comparison.baseline.name
    plans = [plan for plan in comparison.plans if plan.kind == kind]
    rows = [
        {"run": plan.run, "layer": layer, "share": one.alike, "count": f"{one.shared:,} in common"}
        for plan in plans
        for layer, one in enumerate(plan.layers)
    ]
    told = "; ".join(f"{plan.run} {plan.total.alike:.0%} (by chance {plan.alike_by_chance:.0%})" for plan in plans)
    return _layer_map(
        f"alike-{kind}",
        f"The same {what} as {base}, by layer",
        f"Map of runs by layers; the stronger a cell, the more of the kept {what} are those of {base}: {told}.",
        rows,
        "alike",
        [{"field": "count", "title": "units"}],
    )


def _layer_map(
    name: str,
    title: str,
    description: str,
    rows: Sequence[Mapping[str, Any]],
    legend: str,
    tip: Sequence[Mapping[str, Any]],
) -> Chart:
    least = math.floor(10 * min(row["share"] for row in rows)) / 10
    scale = {"domain": [min(least, 0.9), 1.0], "range": [color("ramp_low"), color("ramp_high")]}
    num_runs = len({row["run"] for row in rows})
    return make_chart(
        name,
        title[:1].upper() + title[1:],
        description,
        rows,
        height=max(26 * num_runs, 40),
        is_wide=True,
        mark={"type": "rect"},
        encoding={
            "x": {
                "field": "layer",
                "type": "ordinal",
                "title": "layer, from input to output",
                "axis": {"labelAngle": 0, "labelOverlap": "parity"},
                "scale": {"paddingInner": 0.06},
            },
            "y": {
                "field": "run",
                "type": "nominal",
                "sort": None,
                "title": None,
                "axis": {"labelColor": color("ink")},
                "scale": {"paddingInner": 0.12},
            },
            "color": {
                "field": "share",
                "type": "quantitative",
                "scale": scale,
                "legend": {"title": legend, "format": ".0%", "gradientLength": 130, "tickCount": 3},
            },
            "tooltip": [
                {"field": "run"},
                {"field": "layer"},
                {"field": "share", "title": legend, "format": ".1%"},
                *tip,
            ],
        },
    )
