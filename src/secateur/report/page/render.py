"""A page to one HTML file, and single charts to SVG and PNG files.

Text of the run (names, recipes, notes) reaches the page as text only: the template escapes it, and the JSON of the
charts has no ``<`` in it. A content security policy forbids every address and every script but the two that are
written here, so the page cannot reach a network whatever is in it.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from secateur.errors import UnavailableError
from secateur.report.page.chart import Chart
from secateur.report.page.document import Document
from secateur.report.page.theme import COLORS, config, with_colors

HOW_TO_INSTALL = "pip install 'secateur[report]'"

_TEMPLATES = Path(__file__).parent / "templates"
_FILE_WIDTHS = {True: 860, False: 560}
"""Pixels, of charts that are wide and others."""


def is_available() -> bool:
    """Return whether the package that draws charts is installed."""
    return importlib.util.find_spec("vl_convert") is not None


def render_page(document: Document) -> str:
    """Return a page as one HTML text that needs nothing else.

    Raises:
        UnavailableError: vl-convert-python is not installed.
    """
    anchors = {id(chart): f"chart-{number}" for number, chart in enumerate(document.charts, start=1)}
    charts = {anchors[id(chart)]: chart.spec for chart in document.charts}
    data = {"config": config(), "colors": COLORS, "charts": charts}
    library, script = _library(), _read("page.js")
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; style-src 'unsafe-inline'; img-src data:; "
        f"script-src 'unsafe-eval' {_hash(library)} {_hash(script)}"
    )
    return (
        _environment()
        .get_template("page.html.j2")
        .render(
            anchor=lambda chart: anchors[id(chart)],
            colors=COLORS,
            data=Markup(json_for_html(data)),
            library=Markup(library),
            page=document,
            policy=Markup(policy),
            script=Markup(script),
            style=Markup(_read("page.css")),
        )
    )


def json_for_html(data: Any) -> str:
    """Return JSON that can stand in a script element: no character in it ends one or begins a tag.

    Raises:
        ValueError: a number is not finite, which JSON cannot say.
    """
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def save_charts(document: Document, *, svg: Path | None = None, png: Path | None = None) -> list[Path]:
    """Write every chart of the page, on a white ground, into folders; return the files.

    Args:
        document: the page.
        svg: folder for SVG files; None for none.
        png: folder for PNG files, at twice the size in pixels; None for none.

    Raises:
        UnavailableError: vl-convert-python is not installed.
        OSError: a folder cannot be written.
    """
    convert = _converter()
    files = []
    for number, chart in enumerate(document.charts, start=1):
        name = f"{number:02d}-{_slug(chart.name)}"
        spec = chart_for_file(chart)
        if svg is not None:
            svg.mkdir(parents=True, exist_ok=True)
            files.append(svg / f"{name}.svg")
            files[-1].write_text(convert.vegalite_to_svg(spec, allowed_base_urls=[]), encoding="utf-8")
        if png is not None:
            png.mkdir(parents=True, exist_ok=True)
            files.append(png / f"{name}.png")
            files[-1].write_bytes(convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[]))
    return files


def chart_for_file(chart: Chart) -> dict[str, Any]:
    """Return a chart's specification by itself: light colours, a fixed width, its title and a white ground."""
    spec: dict[str, Any] = with_colors(dict(chart.spec), "light")
    title = {"text": chart.title, "anchor": "start", "fontSize": 14, "fontWeight": 600, "offset": 12}
    settings = with_colors(config(), "light") | {"background": COLORS["light"]["page"], "padding": 14}
    return {**spec, "width": _FILE_WIDTHS[chart.is_wide], "title": title, "config": settings}


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError:
        raise UnavailableError(
            f"the page's charts need vl-convert-python, which is not installed. Install it: {HOW_TO_INSTALL}"
        ) from None
    return vl_convert


@cache
def _library() -> str:
    """Return Vega, Vega-Lite and what sets them up as one script, which gives the page ``vegaEmbed``."""
    script: str = _converter().javascript_bundle("window.vegaEmbed=vegaEmbed;")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalized"] = lambda text: text[:1].upper() + text[1:]
    return environment


@cache
def _read(name: str) -> str:
    return (_TEMPLATES / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-").lower() or "chart"
