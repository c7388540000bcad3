"""The page's section on size and speed."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from secateur.records.speed import SpeedComparison
from secateur.report.page.render import chart_for_file
from secateur.report.page.sections import sections
from secateur.report.page.speed import decode_chart, prefill_chart, size_chart, speed_section

from ..speeds import speed_comparison
from .runs import ATTACK, full_run


def several() -> SpeedComparison:
    """Return four models, one of them with a hostile name."""
    speed = speed_comparison()
    names = {"dense": "dense", "b": "pruned", "c": "pruned", ATTACK: "pruned"}
    return replace(speed, models={name: replace(speed.models[of], name=name) for name, of in names.items()})


def test_a_page_has_the_section_only_where_speed_was_measured() -> None:
    """With its charts and a table for each of them."""
    assert all(section.name != "speed" for section in sections(full_run(speed=None)))
    [section] = [section for section in sections(full_run(speed=speed_comparison())) if section.name == "speed"]
    assert [chart.name for chart in section.charts] == ["size", "speed-prefill", "speed-decode"]
    assert [table.title.partition(" ")[0] for table in section.tables] == ["size", "speed"]
    assert "Abacus 9" in " ".join(section.text)


@pytest.mark.parametrize("speed", [speed_comparison(), several()], ids=["two", "several"])
def test_every_chart_is_drawn(speed: SpeedComparison) -> None:
    """Vega-Lite compiles them without a warning, and names stay text."""
    convert = pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts")
    for chart in speed_section(speed).charts:
        svg = convert.vegalite_to_svg(chart_for_file(chart), allowed_base_urls=[], show_warnings=True)
        assert svg.count("<path") > 3, chart.name
        assert "<script" not in svg
        assert "NaN" not in re.sub(r">[^<]*<", "><", svg), chart.name


def test_bars_are_shares_of_the_first_model() -> None:
    """Every measure of it is 1, and the others stand beside it."""
    rows = [(row["what"], row["model"], row["share"]) for row in size_chart(speed_comparison()).spec["data"]["values"]]
    assert ("weights", "dense", 1.0) in rows
    assert ("weights", "pruned", 0.75) in rows
    assert ("KV cache / token", "pruned", 0.5) in rows
    assert ("peak memory", "pruned", 0.75) in rows
    speed = speed_comparison()
    models = {
        name: replace(model, timings=tuple(replace(timing, peak_bytes=None) for timing in model.timings))
        for name, model in speed.models.items()
    }
    without = size_chart(replace(speed, models=models)).spec["data"]["values"]
    assert {row["what"] for row in without} == {"parameters", "weights", "KV cache / token"}


def test_speeds_have_lines_from_the_slowest_to_the_fastest_round() -> None:
    """Medians, ends and ratios are those of the record."""
    rows = {(row["setting"], row["model"]): row for row in decode_chart(speed_comparison()).spec["data"]["values"]}
    short = rows["1 x 10 tokens", "pruned"]
    assert (short["low"], short["value"], short["high"]) == (10.0, 20.0, 20.0)
    assert short["shown"] == "20.0 (4.00 \u00d7)"
    assert (
        "pruned at 1 x 10 tokens 100 tokens/s, 2.00 (2.00 to 2.00) times dense"
        in prefill_chart(speed_comparison()).description
    )
