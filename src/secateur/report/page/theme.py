"""Colours and manners of all charts, for light and for dark pages.

A specification names a colour as ``color("accent")`` gives it; the name becomes a colour when the chart is drawn, here
for files and in the page's script for the screen. Categories are told apart by the colours of Okabe and Ito (2008),
which people with any common colour blindness can distinguish; the dark ones are the same hues, lighter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COLORS: Mapping[str, Mapping[str, str]] = {
    "light": {
        "page": "#ffffff",
        "ink": "#1d2521",
        "soft": "#5a655f",
        "line": "#dfe4e1",
        "ghost": "#e7ebe8",
        "other": "#8a948e",
        "accent": "#0b7a5a",
        "ramp_low": "#e2f1ea",
        "ramp_high": "#064f3a",
        "gone_low": "#f3f4f3",
        "gone_high": "#8f9893",
        "blue": "#0072b2",
        "orange": "#d98c00",
        "green": "#009e73",
        "red": "#d55e00",
        "purple": "#b8659a",
        "sky": "#56b4e9",
    },
    "dark": {
        "page": "#131715",
        "ink": "#e6ebe8",
        "soft": "#a3ada8",
        "line": "#2c3430",
        "ghost": "#262d29",
        "other": "#7d8782",
        "accent": "#3fc79a",
        "ramp_low": "#12352a",
        "ramp_high": "#8ff0cd",
        "gone_low": "#1b201d",
        "gone_high": "#78827c",
        "blue": "#4fa8dc",
        "orange": "#f0b440",
        "green": "#2fbf94",
        "red": "#f08a4b",
        "purple": "#d894be",
        "sky": "#8fd0f5",
    },
}

CATEGORIES = ("blue", "orange", "purple", "sky", "red", "green")
"""Names of colours for things without an order, most used first."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif'


def color(name: str) -> dict[str, str]:
    """Return how a specification names a colour."""
    assert name in COLORS["light"], name
    return {"$color": name}


def config() -> dict[str, Any]:
    """Return Vega-Lite's configuration for every chart, with colours by name."""
    words = {"labelColor": color("soft"), "titleColor": color("soft"), "titleFontWeight": 500}
    return {
        "background": "transparent",
        "font": FONT,
        "padding": 2,
        "view": {"stroke": None},
        "axis": {
            **words,
            "labelFontSize": 12,
            "titleFontSize": 12,
            "titlePadding": 8,
            "labelPadding": 5,
            "domain": False,
            "ticks": False,
            "grid": False,
            "gridColor": color("line"),
            "labelLimit": 160,
        },
        "axisQuantitative": {"grid": True, "tickCount": 5},
        "legend": {
            **words,
            "orient": "top",
            "labelFontSize": 12,
            "titleFontSize": 12,
            "symbolType": "square",
            "symbolStrokeWidth": 0,
            "symbolSize": 110,
            "columnPadding": 14,
            "labelLimit": 180,
            "offset": 8,
            "layout": {"top": {"anchor": "start", "margin": 28}},
        },
        "rule": {"color": color("other")},
        "text": {"color": color("ink"), "fontSize": 12},
        "line": {"strokeWidth": 2},
        "bar": {"discreteBandSize": {"band": 0.78}},
    }


def with_colors(node: Any, scheme: str) -> Any:
    """Return plain data with every named colour replaced by that of ``light`` or ``dark``; rows of data stay."""
    if isinstance(node, dict):
        if set(node) == {"$color"}:
            return COLORS[scheme][node["$color"]]
        return {key: value if key == "values" else with_colors(value, scheme) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [with_colors(value, scheme) for value in node]
    return node
