"""Every chart of a run's page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from secateur.records.choices import ChoicesScore
from secateur.records.evaluation import TWO_SIDED_95
from secateur.records.units import PARTS, UNIT_NAMES
from secateur.report.choices import COMMON_WORDS, GUESSING, NO_SIGNAL, SAME_ANSWER
from secateur.report.page.chart import (
    ONCE,
    ROW_HEIGHT,
    Chart,
    dashed_line,
    equals,
    interval_layers,
    log_ticks,
    make_chart,
    models_axis,
    nice_step,
    quantile,
    ratio_scale,
)
from secateur.report.page.importance import ImportanceBin, parameters_by_layer
from secateur.report.page.records import DENSE, TIMES, Ratio, RunRecords, ratio
from secateur.report.page.theme import CATEGORIES, color
from secateur.report.tables import format_count

_TOKENS_AXIS = {"labelExpr": "datum.value ? format(datum.value, '~s') : '0'", "labelOverlap": True, "grid": False}

_PART_COLORS = {"embedding": "orange", "attention": "blue", "ffn": "accent", "head": "purple", "other": "other"}
_REMOVED = "removed"


# -- losses ----------------------------------------------------------------------------------------------------------


def loss_charts(records: RunRecords, buckets: Sequence[str]) -> list[Chart]:
    """Return per bucket every model's perplexity over the dense model's with its 95 % interval, on one scale."""
    ratios = {
        bucket: {
            name: ratio(model.text[bucket], records.dense.text[bucket])
            for name, model in records.evaluation.models.items()
            if name != DENSE
        }
        for bucket in records.dense.text
    }
    scale = ratio_scale([one for models in ratios.values() for one in models.values()])
    return [_loss_chart(bucket, ratios[bucket], scale, records.result.name) for bucket in buckets]


def _loss_chart(bucket: str, ratios: Mapping[str, Ratio], scale: Mapping[str, Any], result: str) -> Chart:
    rows = [
        {
            "model": name,
            "ratio": one.value,
            "low": one.low,
            "high": one.high,
            "shown": f"{one.short()} {TIMES}",
            "interval": one.interval() or "unknown",
        }
        for name, one in ratios.items()
    ]
    highlight = {"condition": {"test": equals("model", result), "value": color("accent")}, "value": color("other")}
    place: dict[str, Any] = {"field": "ratio", "type": "quantitative", "scale": scale}
    axis = {"title": "perplexity ÷ dense model's", "format": "~g", "labelOverlap": True}
    if scale["type"] == "log":
        axis["values"] = log_ticks(*scale["domain"])
    tip = [
        {"field": "model", "title": "model"},
        {"field": "shown", "title": "perplexity ÷ dense"},
        {"field": "interval", "title": "95 % interval"},
    ]
    layers = [dashed_line(1.0), *interval_layers(place, axis, highlight, tip)]
    told = "; ".join(f"{row['model']} {row['shown']} (95 % interval {row['interval']})" for row in rows)
    return make_chart(
        f"loss-{bucket}",
        f"Perplexity on {bucket} text, relative to the dense model",
        f"Perplexity on {bucket} over the dense model's, where 1 is no difference and lower is better: {told}.",
        rows,
        height=ROW_HEIGHT * len(rows),
        layer=layers,
    )


def document_charts(records: RunRecords) -> list[Chart]:
    """Return per domain how the loss of single documents changed; none where documents are few."""
    charts = []
    for bucket in records.domains:
        changes = document_changes(records, bucket)
        if len(changes) >= 10:
            charts.append(_document_chart(bucket, changes, records.result.name))
    return charts


def document_changes(records: RunRecords, bucket: str) -> list[float]:
    """Return the result's loss over the dense model's, less 1, of every test document with a loss."""
    result, dense = records.result.text[bucket].document_nll, records.dense.text[bucket].document_nll
    return [after / before - 1 for after, before in zip(result, dense, strict=True) if before > 0]


def _document_chart(bucket: str, changes: Sequence[float], result: str) -> Chart:
    ordered = sorted(changes)
    low, high = quantile(ordered, 0.01), quantile(ordered, 0.99)
    low, high = min(low, 0.0), max(high, 0.0)
    width = nice_step((high - low) / 24 or 0.01)
    counts: dict[int, int] = {}
    edges = math.floor(low / width), math.floor(high / width)
    for change in ordered:
        place = min(max(math.floor(change / width), edges[0]), edges[1])
        counts[place] = counts.get(place, 0) + 1
    rows = [
        {
            "from": place * width,
            "to": (place + 1) * width,
            "documents": counts.get(place, 0),
            "range": f"{'below ' if place == edges[0] else ''}{place * width:+.1%} to {(place + 1) * width:+.1%}"
            f"{' and above' if place == edges[1] else ''}",
        }
        for place in range(edges[0], edges[1] + 1)
    ]
    worse = sum(change > 0 for change in ordered) / len(ordered)
    return make_chart(
        f"documents-{bucket}",
        f"Change in loss of each of {len(ordered):,} {bucket} documents",
        f"Histogram of the change in loss of single {bucket} documents from the dense model to {result}: the median is "
        f"{quantile(ordered, 0.5):+.1%}, one in ten is at {quantile(ordered, 0.9):+.1%} or worse, and {worse:.0%} of "
        "documents got worse.",
        rows,
        height=4 * ROW_HEIGHT,
        layer=[
            {
                "mark": {"type": "bar", "tooltip": True, "binSpacing": 1},
                "encoding": {
                    "x": {
                        "field": "from",
                        "type": "quantitative",
                        "bin": "binned",
                        "title": "change in the document's loss (right: worse)",
                        "axis": {"format": "+~%", "grid": False, "labelOverlap": True},
                    },
                    "x2": {"field": "to"},
                    "y": {"field": "documents", "type": "quantitative", "axis": {"tickMinStep": 1, "tickCount": 4}},
                    "color": {
                        "condition": {"test": "datum.from >= 0", "value": color("red")},
                        "value": color("other"),
                    },
                    "tooltip": [
                        {"field": "range", "title": "change in loss"},
                        {"field": "documents", "title": "documents"},
                    ],
                },
            },
            dashed_line(0.0),
        ],
    )


# -- answers ---------------------------------------------------------------------------------------------------------


def choices_charts(records: RunRecords) -> list[Chart]:
    """Return per set of questions every model's share of right answers with its 95 % interval, beside no model's."""
    charts = []
    for name, reference in records.dense.choices.items():
        rows = [
            _share_row(model.name, score.acc, score.interval(), score.num_items)
            for model in records.evaluation.models.values()
            if (score := model.choices.get(name)) is not None
        ]
        spread = TWO_SIDED_95 * reference.overlap_stderr
        words = (max(0.0, reference.overlap - spread), min(1.0, reference.overlap + spread))
        rows += [
            _share_row(GUESSING, reference.chance, None, reference.num_items),
            _share_row(SAME_ANSWER, reference.majority, None, reference.num_items),
            _share_row(COMMON_WORDS, reference.overlap, words, reference.num_items),
        ]
        charts.append(_choices_chart(name, rows, reference, records.result.name))
    return charts


def _share_row(name: str, share: float, interval: tuple[float, float] | None, count: int) -> dict[str, Any]:
    low, high = interval or (None, None)
    return {"model": name, "acc": share, "low": low, "high": high, "shown": f"{share:.1%}", "questions": count}


def _choices_chart(name: str, rows: Sequence[Mapping[str, Any]], dense: ChoicesScore, result: str) -> Chart:
    highlight = {"condition": {"test": equals("model", result), "value": color("accent")}, "value": color("other")}
    ends = [end for row in rows for end in (row["acc"], row["low"], row["high"]) if end is not None]
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low)
    scale = {"domain": [max(0.0, low - room), min(1.0, high + room)], "zero": False, "nice": False}
    place: dict[str, Any] = {"field": "acc", "type": "quantitative", "scale": scale}
    axis = {"title": "questions answered right", "format": ".0%", "labelOverlap": True}
    tip = [
        {"field": "model"},
        {"field": "shown", "title": "right"},
        {"field": "low", "title": "95 % interval from", "format": ".1%"},
        {"field": "high", "title": "to", "format": ".1%"},
        {"field": "questions", "format": ","},
    ]
    return make_chart(
        f"choices-{name}",
        f"Multiple choice: {name}" + ("" if dense.has_signal() else f" ({NO_SIGNAL})"),
        f"Share of right answers to {name}; {dense.to_beat:.1%} need no knowledge: "
        + "; ".join(
            f"{row['model']} {row['shown']}"
            + ("" if row["low"] is None else f" ({row['low']:.1%} to {row['high']:.1%})")
            for row in rows
        )
        + ("." if dense.has_signal() else "; the dense model's interval holds that share, so that there is no signal."),
        rows,
        height=ROW_HEIGHT * len(rows),
        layer=[
            dashed_line(dense.to_beat),
            *interval_layers(place, axis, highlight, tip),
        ],
    )


# -- recovery --------------------------------------------------------------------------------------------------------


def recovery_charts(records: RunRecords) -> list[Chart]:
    """Return the curves of all trainings: validation loss per bucket, accuracy per set, and what was lowered."""
    points = [(name, recovery, point) for name, recovery in records.recoveries.items() for point in recovery.points]
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, recovery, point in points:
        kept = {"training": name, "tokens": point.tokens, "kept": point is recovery.best}
        for bucket, loss in point.losses.items():
            curves.setdefault(f"Validation loss on {bucket}, nats per token", []).append({**kept, "value": loss})
        for asked, share in point.accuracy.items():
            curves.setdefault(f"Accuracy on {asked}", []).append({**kept, "value": share})
        if point.train_loss is not None:
            curves.setdefault("Training objective", []).append({**kept, "value": point.train_loss})
    trained = list(records.recoveries)
    charts = [_curve_chart(title, rows, trained) for title, rows in curves.items() if len(rows) > 1]
    return sorted(charts, key=lambda chart: chart.title == "Training objective")


def _curve_chart(title: str, rows: Sequence[Mapping[str, Any]], trained: Sequence[str]) -> Chart:
    domain = [name for name in trained if any(row["training"] == name for row in rows)]
    names = {"recovered": "accent", "dense_finetuned": "blue", "random_recovered": "orange"}
    used = {
        "field": "training",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": domain, "range": [color(names.get(name, "other")) for name in domain]},
        "legend": {"title": None, "symbolType": "circle", "columns": 2},
    }
    place = {
        "x": {
            "field": "tokens",
            "type": "quantitative",
            "title": "training tokens",
            "axis": {**_TOKENS_AXIS, "tickCount": 4},
        },
        "y": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
        "color": used,
    }
    tip = [
        {"field": "training"},
        {"field": "tokens", "title": "training tokens", "format": ","},
        {"field": "value", "title": title, "format": ".4f"},
    ]
    ends = "; ".join(
        f"{name} from {mine[0]['value']:.3f} to {mine[-1]['value']:.3f}"
        for name in domain
        if (mine := [row for row in rows if row["training"] == name])
    )
    return make_chart(
        f"recovery-{title}",
        title,
        f"{title} over training tokens: {ends}. A ring marks the weights that were kept.",
        rows,
        height=5 * ROW_HEIGHT,
        layer=[
            {"mark": {"type": "line"}, "encoding": place},
            {
                "mark": {"type": "point", "filled": True, "size": 45, "opacity": 1},
                "encoding": {**place, "tooltip": tip},
            },
            {
                "transform": [{"filter": "datum.kept"}],
                "mark": {"type": "point", "filled": False, "size": 190, "strokeWidth": 2, "opacity": 1},
                "encoding": {**place, "tooltip": tip},
            },
        ],
    )


# -- parameters and units --------------------------------------------------------------------------------------------


def parts_chart(records: RunRecords) -> Chart:
    """Return the parameters of the dense and of the pruned model, by part."""
    sides = {"dense": records.plan.parameters_dense, "pruned": records.plan.parameters_pruned}
    parts = [part for part in PARTS if any(counts.get(part) for counts in sides.values())]
    rows = [
        {
            "model": model,
            "part": part,
            "order": place,
            "parameters": counts.get(part, 0),
            "share": counts.get(part, 0) / max(1, sum(counts.values())),
        }
        for model, counts in sides.items()
        for place, part in enumerate(parts)
    ]
    told = "; ".join(f"{model} {format_count(sum(counts.values()))}" for model, counts in sides.items())
    return make_chart(
        "parameters",
        "Parameters by part",
        f"Stacked bars of parameters by part: {told}. The table has every number.",
        rows,
        height=ROW_HEIGHT * len(sides),
        is_wide=True,
        mark={"type": "bar"},
        encoding={
            "y": models_axis(),
            "x": {
                "field": "parameters",
                "type": "quantitative",
                "title": "parameters",
                "axis": {**_TOKENS_AXIS, "grid": True, "tickCount": 5},
            },
            "order": {"field": "order", "type": "quantitative"},
            "color": _part_color(parts),
            "tooltip": [
                {"field": "model"},
                {"field": "part"},
                {"field": "parameters", "format": ","},
                {"field": "share", "title": "of the model", "format": ".1%"},
            ],
        },
    )


def _part_color(parts: Sequence[str]) -> dict[str, Any]:
    names = {**_PART_COLORS, _REMOVED: "ghost"}
    return {
        "field": "part",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": list(parts), "range": [color(names[part]) for part in parts]},
        "legend": {"title": None, "columns": 4},
    }


def layers_chart(records: RunRecords) -> Chart | None:
    """Return the parameters of every layer, those that went in grey; None where the plan does not tell them."""
    by_part = parameters_by_layer(records.plan)
    if not by_part:
        return None
    rows: list[dict[str, Any]] = []
    for order, (part, layers) in enumerate(by_part.items()):
        for layer, (before, after) in enumerate(layers):
            rows.append({"layer": layer, "part": part, "order": order, "parameters": round(after)})
            if round(before - after):
                gone = {"layer": layer, "part": _REMOVED, "order": 9, "parameters": round(before - after)}
                rows.append({**gone, "of": part})
    gone_in_all = sum(row["parameters"] for row in rows if row["part"] == _REMOVED)
    shown = [part for part in (*by_part, _REMOVED) if part != _REMOVED or gone_in_all]
    return make_chart(
        "layers",
        "Parameters by layer",
        f"Stacked bars of every layer's parameters; {format_count(gone_in_all)} went from the layers in all.",
        rows,
        height=5 * ROW_HEIGHT,
        is_wide=True,
        mark={"type": "bar"},
        encoding={
            "x": {
                "field": "layer",
                "type": "ordinal",
                "title": "layer, from input to output",
                "axis": {"labelAngle": 0, "labelOverlap": "parity"},
            },
            "y": {"field": "parameters", "type": "quantitative", "title": None, "axis": {**_TOKENS_AXIS, "grid": True}},
            "order": {"field": "order", "type": "quantitative"},
            "color": _part_color(shown),
            "tooltip": [
                {"field": "layer"},
                {"field": "part"},
                *([{"field": "of", "title": "removed from"}] if gone_in_all else []),
                {"field": "parameters", "format": ","},
            ],
        },
    )


def importance_charts(records: RunRecords) -> list[Chart]:
    """Return per kind of unit a map of layers by rank: how important units are, and which stay."""
    return [_importance_chart(kind, bins) for kind, bins in records.importance.items() if bins]


def _importance_chart(kind: str, bins: Sequence[ImportanceBin]) -> Chart:
    rows = [
        {
            "l": one.layer,
            "a": round(one.start, 4),
            "b": round(one.end, 4),
            "n": one.num_units,
            "p": round(one.percentile, 1),
            "s": f"{one.score:.4g}",
            "k": round(one.kept_ratio, 4),
        }
        for one in bins
    ]
    layers = len({one.layer for one in bins})
    kept = sum(one.num_units * one.kept_ratio for one in bins) / sum(one.num_units for one in bins)
    what = UNIT_NAMES[kind]

    def ramp(title: str, low: str, high: str) -> dict[str, Any]:
        legend = {"title": f"{title}: importance", "gradientLength": 130, "values": [0, 50, 100], "offset": 6}
        scale = {"domain": [0, 100], "range": [color(low), color(high)]}
        return {"field": "p", "type": "quantitative", "scale": scale, "legend": legend}

    place = {
        "x": {
            "field": "a",
            "type": "quantitative",
            "bin": "binned",
            "title": f"{what} of the layer, most important first",
            "scale": {"domain": [0, 1], "nice": False},
            "axis": {"format": ".0%", "grid": False, "values": [0, 0.25, 0.5, 0.75, 1]},
        },
        "x2": {"field": "b"},
        "y": {
            "field": "l",
            "type": "ordinal",
            "title": "layer",
            "scale": {"paddingInner": 0.08},
            "axis": {"labelOverlap": "parity", "labelSeparation": 2},
        },
        "tooltip": [
            {"field": "l", "title": "layer"},
            {"field": "a", "title": "ranks from", "format": ".0%"},
            {"field": "b", "title": "to", "format": ".0%"},
            {"field": "n", "title": "units here", "format": ","},
            {"field": "s", "title": "mean score"},
            {"field": "p", "title": "percentile in the model", "format": ".1f"},
            {"field": "k", "title": "kept", "format": ".0%"},
        ],
    }
    mark = {"type": "rect", "binSpacing": 0}
    return make_chart(
        f"importance-{kind}",
        f"Importance and fate of {what}",
        f"Map of {layers} layers by rank of their {what}: darker cells are more important in the whole model (a "
        f"percentile of their score), coloured cells stay ({kept:.1%} of all) and grey ones went.",
        rows,
        height=(11 if layers <= 48 else 7) * max(layers, 4),
        is_wide=True,
        layer=[
            {"mark": mark, "encoding": {**place, "color": ramp("removed", "gone_low", "gone_high")}},
            {
                "transform": [{"filter": "datum.k > 0"}],
                "mark": mark,
                "encoding": {
                    **place,
                    "color": ramp("kept", "ramp_low", "ramp_high"),
                    "opacity": {
                        "field": "k",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [0, 1]},
                        "legend": None,
                    },
                },
            },
        ],
        resolve={"scale": {"color": "independent"}},
    )


# -- vocabulary ------------------------------------------------------------------------------------------------------


def frequency_chart(records: RunRecords) -> Chart | None:
    """Return how often each domain's token ids occur, and how many ids stayed; None where nothing was counted."""
    rows = [
        {
            "domain": name,
            "rank": point.rank,
            "uses": point.per_million,
            "covered": point.coverage,
        }
        for name, curve in records.frequencies.items()
        for point in curve.points
    ]
    if not rows:
        return None
    names = list(dict.fromkeys(str(row["domain"]) for row in rows))
    palette = ["accent"] if len(names) == 1 else [CATEGORIES[i % len(CATEGORIES)] for i in range(len(names))]
    last = max(curve.num_used for curve in records.frequencies.values())
    vocabulary = records.plan.vocabulary
    ends = [last, *((len(vocabulary.keep), vocabulary.num_tokens) if vocabulary else ())]
    place = {
        "x": {
            "field": "rank",
            "type": "quantitative",
            "scale": {"type": "log", "domain": [1, max(ends)], "nice": False},
            "title": "token ids, most used first",
            "axis": {**_TOKENS_AXIS, "values": [10**power for power in range(math.ceil(math.log10(max(ends))) + 1)]},
        },
        "y": {
            "field": "uses",
            "type": "quantitative",
            "scale": {"type": "log"},
            "title": "uses per million tokens",
            "axis": {
                "labelExpr": "format(datum.value, datum.value < 1000 ? '~g' : '~s')",
                "labelOverlap": True,
                "tickCount": 5,
            },
        },
    }
    series = {
        "field": "domain",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": names, "range": [color(name) for name in palette]},
        "legend": {"title": None, "symbolType": "circle"} if len(names) > 1 else None,
    }
    tip = [
        {"field": "domain"},
        {"field": "rank", "format": ","},
        {"field": "uses", "title": "uses per million", "format": ",.4~g"},
        {"field": "covered", "title": "text covered up to here", "format": ".2%"},
    ]
    layers: list[dict[str, Any]] = [
        {"mark": {"type": "line"}, "encoding": {**place, "color": series}},
        {
            "mark": {"type": "point", "filled": True, "size": 60, "opacity": 0},
            "encoding": {**place, "tooltip": tip},
        },
    ]
    told = "; ".join(f"{name} uses {curve.num_used:,} ids" for name, curve in records.frequencies.items())
    if vocabulary is not None:
        cut = {"datum": len(vocabulary.keep), "type": "quantitative"}
        label = f"{len(vocabulary.keep):,} of {vocabulary.num_tokens:,} ids stay"
        told += f"; {label}"
        layers += [
            dashed_line(float(len(vocabulary.keep))),
            {
                "data": ONCE,
                "mark": {"type": "text", "align": "right", "baseline": "top", "dx": -6, "dy": 2},
                "encoding": {"x": cut, "y": {"value": 0}, "text": {"value": label}},
            },
        ]
    return make_chart(
        "token-frequency",
        "How often token ids are used",
        f"Uses of each token id by rank, both axes logarithmic: {told}.",
        rows,
        height=6 * ROW_HEIGHT,
        is_wide=True,
        layer=layers,
    )
