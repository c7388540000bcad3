"""What all charts are made with: Vega-Lite specifications, plain dictionaries with their rows of data and no address.

Charts are as wide as their place. A chart's description says in words what it shows, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.page.records import Ratio
from secateur.report.page.theme import color

SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
"""Names the language; nothing is fetched from there."""

ROW_HEIGHT = 38
"""Pixels of a chart, per row of models."""

_LOG_FROM = 3.0
"""A ratio from which an axis of ratios is logarithmic."""

ONCE: Mapping[str, Any] = {"values": [{}]}
"""Data of a layer that is drawn once, whatever the chart's rows."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart.

    Attributes:
        name: says which, among those of the page.
        title: a line above it.
        description: what it shows, in a sentence or two.
        spec: in Vega-Lite, with colours by name.
        is_wide: whether it needs the page's whole width.
    """

    name: str
    title: str
    description: str
    spec: Mapping[str, Any]
    is_wide: bool = False


def make_chart(name: str, title: str, description: str, rows: Sequence[Mapping[str, Any]], **spec: Any) -> Chart:
    """Return a chart of rows; ``spec`` is the rest of its specification, and ``is_wide``."""
    is_wide = spec.pop("is_wide", False)
    whole = {
        "$schema": SCHEMA,
        "width": "container",
        "autosize": {"type": "fit-x", "contains": "padding"},
        "data": {"values": list(rows)},
        **spec,
    }
    return Chart(name, title, description, whole, is_wide)


def ratio_scale(ratios: Sequence[Ratio]) -> dict[str, Any]:
    """Return the scale that holds all intervals and 1; logarithmic where the largest is far away."""
    low = min([1.0, *(one.value if one.low is None else one.low for one in ratios)])
    high = max([1.0, *(one.value if one.high is None else one.high for one in ratios)])
    if high / low >= _LOG_FROM:
        room = (high / low) ** 0.06
        return {"type": "log", "domain": [low / room, high * room], "nice": False}
    room = max(0.005, 0.08 * (high - low))
    return {"type": "linear", "domain": [low - room, high + room], "nice": False, "zero": False}


def log_ticks(low: float, high: float) -> list[float]:
    """Return a handful of round numbers between two positive ones, evenly apart on a log scale as far as can be."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [digit * 10.0**power for power in powers for digit in digits if low <= digit * 10.0**power <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 7)]


def interval_layers(
    place: Mapping[str, Any], axis: Mapping[str, Any], highlight: Mapping[str, Any], tip: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return the layers of a chart with one row per model: interval (where it has one), value, and value in words."""
    return [
        {
            "transform": [{"filter": "isValid(datum.low)"}],
            "mark": {"type": "rule", "strokeWidth": 3, "strokeCap": "round"},
            "encoding": {
                "y": models_axis(),
                "x": {**place, "field": "low"},
                "x2": {"field": "high"},
                "color": highlight,
                "tooltip": tip,
            },
        },
        {
            "mark": {"type": "point", "filled": True, "size": 95, "opacity": 1},
            "encoding": {"y": models_axis(), "x": {**place, "axis": axis}, "color": highlight, "tooltip": tip},
        },
        {
            "mark": {"type": "text", "dy": -13, "fontSize": 12},
            "encoding": {"y": models_axis(), "x": place, "text": {"field": "shown"}},
        },
    ]


def dashed_line(place: float) -> dict[str, Any]:
    """Return a layer with a dashed line from bottom to top."""
    across = {"x": {"datum": place, "type": "quantitative"}}
    return {"data": ONCE, "mark": {"type": "rule", "strokeDash": [4, 3]}, "encoding": across}


def models_axis() -> dict[str, Any]:
    """Return the vertical encoding of one row per model, in the order of the data."""
    return {"field": "model", "type": "nominal", "sort": None, "title": None, "axis": {"labelColor": color("ink")}}


def equals(field: str, value: str) -> dict[str, Any]:
    """Return the test that a field has a value, whatever characters are in it."""
    return {"field": field, "equal": value}


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the value below which a share of the ascending values lies, interpolated."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def nice_step(width: float) -> float:
    """Return the least of 1, 2, 5 times a power of ten that is no smaller."""
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))
