"""The page of a sweep: size against quality, all points in one table, what failed, and how to have a point's model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from secateur.records.evaluation import TWO_SIDED_95
from secateur.records.sweep import FRONT, Sweep, SweepPoint
from secateur.report.page.chart import ONCE, Chart, equals, log_ticks, make_chart, ratio_scale
from secateur.report.page.document import Document, Section, Tile
from secateur.report.page.records import RECOVERED, TIMES, Ratio
from secateur.report.page.theme import CATEGORIES, color
from secateur.report.sweep import (
    STANDINGS,
    all_table,
    best_point,
    failures,
    shown_ratio,
    smallest_within,
    sweep_cautions,
    sweep_table,
    sweep_verdict,
)
from secateur.report.tables import Table, format_bytes, format_count, with_error

_HEIGHT = 340
_APART, _SPREAD = 0.008, 0.06
"""Shares of the axis: between neighbours of nearly the same size, and that all of them together take at most."""

_ALL_DOMAINS = "all domains"
_OTHERS = "other methods"


def sweep_document(sweep: Sweep) -> Document:
    """Return what the page of a sweep says."""
    name = _short(sweep.model)
    return Document(
        kind="Sweep",
        title=f"{name}, ",
        subject=f"{len(sweep.points)} ways to prune it for {', '.join(sweep.domains)}",
        verdict=sweep_verdict(sweep),
        sections=[section for make in _SECTIONS if (section := make(sweep)) is not None],
        tiles=_tiles(sweep),
        cautions=sweep_cautions(sweep),
        made=[_made(sweep)],
        recipe_yaml=sweep.recipe_yaml,
        commands=_commands(sweep),
        version=sweep.versions.get("secateur", ""),
    )


def _short(model: str) -> str:
    """Return a model's name without the folders of the machine it lay on."""
    name = model.replace("\\", "/").rstrip("/")
    return name.rpartition("/")[2] if name.startswith(("/", ".", "~")) or name[1:3] == ":/" else name


def _commands(sweep: Sweep) -> list[str]:
    chosen = smallest_within(sweep) or best_point(sweep)
    made = [f"secateur run {chosen.folder}/recipe.yml   # the model of that point, with its exports"] if chosen else []
    return ["secateur sweep sweep.yml", *made, "secateur report SWEEP_FOLDER"]


def _tiles(sweep: Sweep) -> list[Tile]:
    are_all = len(sweep.done) == len(sweep.points)
    told = "were measured" if are_all else "were measured; the others failed or wait"
    found = [Tile("points", f"{len(sweep.done)} of {len(sweep.points)}", told)]
    smallest, best = smallest_within(sweep), best_point(sweep)
    if smallest is not None and smallest.parameters is not None and smallest.pruning_ratio is not None:
        detail = f"{format_count(smallest.parameters)} parameters, {smallest.name}"
        found.append(Tile("smallest within 5 % of dense", f"\u2212{smallest.pruning_ratio:.1%}", detail))
    elif sweep.done:
        found.append(Tile("smallest within 5 % of dense", "none", "with 95 % confidence", is_missing=True))
    if best is not None and best.pruning_ratio is not None:
        for domain in sweep.domains:
            value = shown_ratio(best.text[domain]).partition(" ± ")[0]
            detail = f"{best.pruning_ratio:.1%} fewer parameters, {best.name}"
            found.append(Tile(f"least loss: perplexity on {domain}", f"{value} {TIMES}", detail))
    if sweep.dense is not None:
        size = f"{format_bytes(sweep.dense.size_bytes)} of weights"
        found.append(Tile("dense model", format_count(sweep.dense.parameters), size))
    return found


# -- sections ----------------------------------------------------------------------------------------------------------


def _front(sweep: Sweep) -> Section:
    if not sweep.done:
        return Section("front", "How small can it be?", ["No point is done yet."])
    told = "; ".join(f"{len(of_kind)} {words}" for of_kind, words in _by_standing(sweep) if of_kind)
    return Section(
        "front",
        "How small can it be?",
        [
            "Each point is a model: the share of the dense model's parameters that it has, and its perplexity divided "
            "by the dense model's on the same documents; lower is better, and the dashed line is the dense model. Bars "
            "are 95 % intervals. Filled points, joined by a line, are the front of size and quality. Models of nearly "
            "the same size stand side by side; diamonds were trained after the cut.",
            f"Of {len(sweep.done)} points, {told}. Differences between points are paired by document, so they are "
            "surer than the bars suggest.",
        ],
        _charts(sweep, list(sweep.domains)),
        [_front_table(sweep), sweep_table(sweep)],
    )


def _by_standing(sweep: Sweep) -> list[tuple[list[SweepPoint], str]]:
    return [([point for point in sweep.done if point.standing == name], words) for name, words in STANDINGS.items()]


def _front_table(sweep: Sweep) -> Table:
    """Return the points of the front, the largest first, and how to have the model of each."""
    rows = []
    for point in sweep.front:
        assert point.parameters is not None and point.pruning_ratio is not None
        losses = [shown_ratio(point.text[bucket]) for bucket in sweep.buckets]
        have = f"{point.folder}/{point.row if point.row == 'recovered' else 'model'}"
        model = have if point.has_model else f"secateur run {point.folder}/recipe.yml"
        rows.append([point.name, format_count(point.parameters), f"{point.pruning_ratio:.1%}", *losses, model])
    columns = ["point", "parameters", "removed", *(f"{bucket} ppl / dense" for bucket in sweep.buckets), "its model"]
    return Table("the front of size and quality", columns, rows)


def _forgotten(sweep: Sweep) -> Section | None:
    others = [bucket for bucket in sweep.buckets if bucket not in sweep.domains]
    if not others:
        return None
    return Section(
        "forgotten",
        "What do they forget?",
        ["The same models on text that is not of the domain. Filled points are those of the front above."],
        _charts(sweep, others),
    )


def _points(sweep: Sweep) -> Section:
    return Section(
        "points",
        "What was tried?",
        ["Every point with all its numbers, also in sweep.json and, for data frames, in sweep.parquet."],
        tables=[all_table(sweep)],
    )


def _failed(sweep: Sweep) -> Section | None:
    items = failures(sweep)
    if not items:
        return None
    text = ["The same command tries them again; what is done is not run again."]
    return Section("failed", "What is missing?", text, items=items)


_SECTIONS: Sequence[Callable[[Sweep], Section | None]] = (_front, _forgotten, _points, _failed)


def _made(sweep: Sweep) -> Table:
    facts = [
        ["dense model", sweep.model],
        ["its fingerprint", sweep.model_fingerprint],
        ["seed of the cut", str(sweep.seed)],
        ["varied", ", ".join(sweep.varied)],
        ["test text", ", ".join(dict.fromkeys(point.fingerprint for point in sweep.done))],
        *([name, version] for name, version in sweep.versions.items()),
    ]
    return Table("what it was made from", ["fact", "value"], facts)


# -- charts ------------------------------------------------------------------------------------------------------------


def _charts(sweep: Sweep, buckets: Sequence[str]) -> list[Chart]:
    """Return size against quality on every text, before them on all domains together where there are several."""
    found = []
    if len(sweep.domains) > 1 and list(buckets) == list(sweep.domains):
        found.append(_size_quality(sweep, _ALL_DOMAINS, _mean_ratio, has_line=True))
    for bucket in buckets:
        alone = list(sweep.domains) == [bucket]
        found.append(_size_quality(sweep, bucket, _ratio_on(bucket), has_line=alone))
    return found


def _ratio_on(bucket: str) -> Callable[[SweepPoint], Ratio]:
    def ratio(point: SweepPoint) -> Ratio:
        score = point.text[bucket]
        return Ratio(score.ratio, math.inf if score.ratio_stderr is None else score.ratio_stderr, score.low, score.high)

    return ratio


def _mean_ratio(point: SweepPoint) -> Ratio:
    """Return the geometric mean over the domains of perplexity over the dense model's."""
    assert point.loss is not None, "only asked of points that are done"
    value = math.exp(min(point.loss, 700.0))
    if point.loss_stderr is None:
        return Ratio(value, math.inf, None, None)
    ends = (math.exp(min(point.loss + side * TWO_SIDED_95 * point.loss_stderr, 700.0)) for side in (-1, 1))
    return Ratio(value, value * point.loss_stderr, *ends)


def _series(sweep: Sweep) -> dict[str, str]:
    """Return the name in the legend of every method, the most used first; those beyond the colours are one."""
    counts = Counter(point.method for point in sweep.done)
    names = [name for name, _ in counts.most_common()]
    return {name: name if place < len(CATEGORIES) else _OTHERS for place, name in enumerate(names)}


def _size_quality(sweep: Sweep, bucket: str, ratio: Callable[[SweepPoint], Ratio], *, has_line: bool) -> Chart:
    series = _series(sweep)
    points = [point for point in sweep.done if point.is_comparable]
    found = {point.name: ratio(point) for point in points}
    legend = [name for name in dict.fromkeys(series.values()) if any(series[p.method] == name for p in points)]
    points.sort(key=lambda point: legend.index(series[point.method]))
    least = 1 - max(point.pruning_ratio or 0.0 for point in points)
    room = 0.05 * (1 - least) or 0.02
    domain = [least - room, 1 + room]
    places = _side_by_side({point.name: 1 - (point.pruning_ratio or 0.0) for point in points}, domain[1] - domain[0])
    rows = [{**_row(point, found[point.name], series[point.method]), "place": places[point.name]} for point in points]
    scale = ratio_scale(list(found.values()))
    palette = dict(zip(legend, CATEGORIES, strict=False))
    axis: dict[str, Any] = {"title": None, "format": "~g", "labelOverlap": True}
    if scale["type"] == "log":
        axis["values"] = log_ticks(*scale["domain"])
    x = {
        "field": "place",
        "type": "quantitative",
        "scale": {"domain": domain, "nice": False, "zero": False},
        "axis": {"title": "parameters left, of the dense model's", "format": ".0%", "labelOverlap": True},
    }
    y = {"field": "ratio", "type": "quantitative", "scale": scale, "axis": axis}
    used = {
        "field": "method",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": legend, "range": [color(palette.get(name, "other")) for name in legend]},
        "legend": {"title": None, "symbolType": "circle", "symbolOpacity": 1, "columns": 2}
        if len(legend) > 1
        else None,
    }
    shape = {
        "field": "row",
        "type": "nominal",
        "scale": {"domain": ["pruned", RECOVERED], "range": ["circle", "diamond"]},
        "legend": None,
    }
    tip = [
        {"field": "point", "title": "point"},
        {"field": "shown", "title": "perplexity ÷ dense"},
        {"field": "interval", "title": "95 % interval"},
        {"field": "size", "title": "parameters"},
        {"field": "standing", "title": "stands"},
    ]
    on_front = equals("standing", FRONT)
    layers: list[dict[str, Any]] = [
        {
            "data": ONCE,
            "mark": {"type": "rule", "strokeDash": [4, 3]},
            "encoding": {"y": {"datum": 1.0, "type": "quantitative", "scale": scale}},
        }
    ]
    if has_line:
        layers.append(
            {
                "transform": [{"filter": on_front}],
                "mark": {"type": "line", "strokeWidth": 1.5, "color": color("other"), "interpolate": "step-after"},
                "encoding": {"x": x, "y": y, "order": {"field": "place", "type": "quantitative"}},
            }
        )
    layers += [
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.45},
            "encoding": {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": used, "tooltip": tip},
        },
        {
            "transform": [{"filter": {"not": on_front}}],
            "mark": {"type": "point", "filled": False, "size": 60, "strokeWidth": 2, "opacity": 1},
            "encoding": {"x": x, "y": y, "color": used, "shape": shape, "tooltip": tip},
        },
        {
            "transform": [{"filter": on_front}],
            "mark": {"type": "point", "filled": True, "size": 110, "opacity": 1},
            "encoding": {"x": x, "y": y, "color": used, "shape": shape, "tooltip": tip},
        },
    ]
    return make_chart(
        f"size-quality-{bucket}",
        f"Perplexity on {bucket}, relative to the dense model, by size",
        _description(bucket, sweep, found),
        rows,
        height=_HEIGHT,
        layer=layers,
        is_wide=True,
    )


def _side_by_side(left: Mapping[str, float], width: float) -> dict[str, float]:
    """Return where points stand on an axis of a width: those that would hide each other a little apart."""
    groups: list[list[str]] = []
    for name in sorted(left, key=lambda name: left[name]):
        if groups and left[name] - left[groups[-1][0]] < _APART * width:
            groups[-1].append(name)
        else:
            groups.append([name])
    order = list(left)
    places = {}
    for group in groups:
        for number, name in enumerate(sorted(group, key=order.index)):
            places[name] = left[name] + (number - (len(group) - 1) / 2) * min(_APART, _SPREAD / len(group)) * width
    return places


def _row(point: SweepPoint, one: Ratio, method: str) -> Mapping[str, Any]:
    assert point.parameters is not None and point.pruning_ratio is not None
    return {
        "point": point.name,
        "method": method,
        "row": point.row,
        "ratio": one.value,
        "low": one.low,
        "high": one.high,
        "shown": with_error(one.value, one.stderr),
        "interval": one.interval() or "unknown",
        "size": f"{format_count(point.parameters)} (\u2212{point.pruning_ratio:.1%})",
        "standing": point.standing,
    }


def _description(bucket: str, sweep: Sweep, found: Mapping[str, Ratio]) -> str:
    front = "; ".join(
        f"{point.name} with {1 - (point.pruning_ratio or 0):.1%} of the parameters at {found[point.name].short()}"
        for point in sweep.front
        if point.name in found
    )
    return (
        f"{len(found)} models by share of parameters left and perplexity on {bucket} over the dense model's, where 1 "
        f"is no difference and lower is better. On the front: {front}."
    )
