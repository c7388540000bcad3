"""The page's section on size and speed: what the models take beside each other, and how fast they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.records.speed import ModelSpeed, SpeedComparison, Spread, Timing
from secateur.report.page.chart import ROW_HEIGHT, Chart, make_chart
from secateur.report.page.document import Section
from secateur.report.page.records import TIMES
from secateur.report.page.theme import CATEGORIES, color
from secateur.report.speed import (
    describe_measurement,
    describe_speed,
    footprint_table,
    ratio_words,
    speed_words,
    timings_table,
)
from secateur.report.tables import format_bytes, format_count

_PARAMETERS = "parameters"
"""The measure that is a number and not one of bytes."""

_BAR_HEIGHT = 26
"""Pixels of a chart, per bar of a group."""

_ROOM = 1.5
"""How far an axis goes, in longest bars, so that there is room for the numbers behind them."""


def speed_section(speed: SpeedComparison) -> Section:
    """Return the section on how large and how fast models are."""
    return Section(
        "speed",
        "How fast and how large is it?",
        [" ".join(describe_speed(speed)), *describe_measurement(speed)],
        [size_chart(speed), prefill_chart(speed), decode_chart(speed)],
        [footprint_table(speed), timings_table(speed)],
    )


def size_chart(speed: SpeedComparison) -> Chart:
    """Return what every model takes as a share of the first one: parameters, weights, cache and peak of memory."""
    models = list(speed.models.values())
    measures: dict[str, list[int | None]] = {
        _PARAMETERS: [model.total_parameters for model in models],
        "weights": [model.total_memory_bytes for model in models],
        "KV cache / token": [model.kv_cache.bytes_per_token for model in models],
        "peak memory": [model.peak_bytes for model in models],
    }
    rows = [row for what, sizes in measures.items() for row in _size_rows(speed, what, sizes)]
    told = "; ".join(f"{row['what']} of {row['model']} {row['shown']}" for row in rows)
    whole = f"share of {speed.reference.name}"
    place: dict[str, Any] = {
        "y": _groups("what"),
        "yOffset": _within(speed),
        "x": {
            "field": "share",
            "type": "quantitative",
            "title": whole,
            "scale": {"domain": [0, 1.15 * _ROOM * max(row["share"] for row in rows)], "nice": False},
            "axis": {"format": ".0%", "labelOverlap": True, "values": [0, 0.25, 0.5, 0.75, 1]},
        },
    }
    tip = [
        {"field": "what", "title": "what"},
        {"field": "model"},
        {"field": "amount", "title": "size"},
        {"field": "share", "title": whole, "format": ".1%"},
    ]
    return make_chart(
        "size",
        f"Size, as a share of {speed.reference.name}",
        f"Bars of what each model takes: {told}.",
        rows,
        height=_height(speed, len({row["what"] for row in rows})),
        layer=[
            {"mark": {"type": "bar"}, "encoding": {**place, "color": _colors(speed), "tooltip": tip}},
            _labels(place),
        ],
    )


def _size_rows(speed: SpeedComparison, what: str, sizes: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return a row per model whose size is known; none where the first one's is not."""
    whole, show = sizes[0], format_count if what == _PARAMETERS else format_bytes
    if not whole:
        return []
    return [
        {
            "what": what,
            "model": name,
            "amount": show(size),
            "share": size / whole,
            "shown": show(size) + (f" ({size / whole:.0%})" if place else ""),
        }
        for place, (name, size) in enumerate(zip(speed.models, sizes, strict=True))
        if size is not None
    ]


def prefill_chart(speed: SpeedComparison) -> Chart:
    """Return how fast every model reads prompts, per setting."""
    return _speed_chart(speed, "prefill", "Reading prompts, tokens per second")


def decode_chart(speed: SpeedComparison) -> Chart:
    """Return how fast every model adds tokens, per setting."""
    return _speed_chart(speed, "decode", "Adding tokens, tokens per second")


def _speed_chart(speed: SpeedComparison, what: str, title: str) -> Chart:
    rows = [
        _speed_row(speed, what, model, number, timing)
        for number, _ in enumerate(speed.settings)
        for model in speed.models.values()
        for timing in [model.timings[number]]
    ]
    place: dict[str, Any] = {"y": _groups("setting"), "yOffset": _within(speed)}
    axis: dict[str, Any] = {
        "type": "quantitative",
        "title": "tokens per second (whole batch)",
        "scale": {"domain": [0, _ROOM * max(row["high"] for row in rows)], "nice": False},
        "axis": {"format": "~s", "labelOverlap": True, "tickCount": 4},
    }
    tip = [
        {"field": "setting", "title": "prompts"},
        {"field": "model"},
        {"field": "value", "title": "tokens/s", "format": ",.4~r"},
        {"field": "low", "title": "slowest round", "format": ",.4~r"},
        {"field": "high", "title": "fastest round", "format": ",.4~r"},
        {"field": "ratio", "title": f"times {speed.reference.name}"},
    ]
    told = "; ".join(f"{row['model']} at {row['setting']} {row['words']}" for row in rows)
    return make_chart(
        f"speed-{what}",
        title,
        f"{title}, median of the rounds with a line from the slowest to the fastest: {told}.",
        rows,
        height=_height(speed, len(speed.settings)),
        layer=[
            {
                "mark": {"type": "bar"},
                "encoding": {**place, "x": {**axis, "field": "value"}, "color": _colors(speed), "tooltip": tip},
            },
            {
                "mark": {"type": "rule", "strokeWidth": 2, "color": color("ink")},
                "encoding": {**place, "x": {**axis, "field": "low"}, "x2": {"field": "high"}, "tooltip": tip},
            },
            _labels({**place, "x": {**axis, "field": "high"}}),
        ],
    )


def _speed_row(speed: SpeedComparison, what: str, model: ModelSpeed, place: int, timing: Timing) -> dict[str, Any]:
    spread = Spread.of(timing.prefill_tokens_per_s if what == "prefill" else timing.decode_tokens_per_s)
    is_reference = model is speed.reference
    ratio = speed.prefill_ratio if what == "prefill" else speed.decode_ratio
    beside = "" if is_reference else ratio_words(ratio(model.name, place))
    shown = speed_words(spread.median)
    words = f"{shown} tokens/s" + (f", {beside} times {speed.reference.name}" if beside else "")
    return {
        "setting": timing.setting.words,
        "model": model.name,
        "value": spread.median,
        "low": spread.low,
        "high": spread.high,
        "ratio": beside or "1",
        "shown": shown + ("" if is_reference else f" ({beside.partition(' ')[0]} {TIMES})"),
        "words": words,
    }


def _groups(field: str) -> dict[str, Any]:
    return {
        "field": field,
        "type": "nominal",
        "sort": None,
        "title": None,
        "axis": {"labelColor": color("ink")},
        "scale": {"paddingInner": 0.25},
    }


def _within(speed: SpeedComparison) -> dict[str, Any]:
    """Return the encoding of bars side by side, in the order of the models."""
    return {"field": "model", "type": "nominal", "sort": None, "scale": {"domain": list(speed.models)}}


def _colors(speed: SpeedComparison) -> dict[str, Any]:
    rest = ["accent", *(name for name in CATEGORIES if name != "green")]
    names = ["other", *(rest[place % len(rest)] for place in range(len(speed.models) - 1))]
    return {
        "field": "model",
        "type": "nominal",
        "sort": None,
        "scale": {"domain": list(speed.models), "range": [color(name) for name in names]},
        "legend": {"title": None, "columns": 2},
    }


def _labels(place: Mapping[str, Any]) -> dict[str, Any]:
    """Return a layer with each bar's number at its end."""
    return {
        "mark": {"type": "text", "align": "left", "dx": 6},
        "encoding": {**place, "text": {"field": "shown"}},
    }


def _height(speed: SpeedComparison, groups: int) -> int:
    return max(ROW_HEIGHT, _BAR_HEIGHT * len(speed.models)) * groups
