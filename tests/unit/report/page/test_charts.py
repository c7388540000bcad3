"""Charts say what the records say, and every one of them can be drawn."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from secateur.records.evaluation import paired_difference
from secateur.report.page.chart import Chart, log_ticks, nice_step, quantile, ratio_scale
from secateur.report.page.charts import loss_charts
from secateur.report.page.records import Ratio, RunRecords, ratio
from secateur.report.page.render import chart_for_file
from secateur.report.page.sections import sections
from secateur.report.page.theme import COLORS, with_colors

from ..records import evaluation, text_score
from .runs import full_run, hostile_run


def charts_of(records: RunRecords) -> list[Chart]:
    """Return all charts of a page."""
    return [chart for section in sections(records) for chart in section.charts]


def named_values(node: Any) -> list[str]:
    """Return every colour name that is left in plain data."""
    if isinstance(node, dict):
        return ["$color"] * ("$color" in node) + [name for value in node.values() for name in named_values(value)]
    return [name for value in node for name in named_values(value)] if isinstance(node, list) else []


def test_a_full_run_has_every_chart() -> None:
    """One chart per question that the records answer, each with a name of its own and a description."""
    charts = charts_of(full_run())
    names = [chart.name for chart in charts]
    assert len(set(names)) == len(names)
    for wanted in ("loss-medical", "loss-general", "documents-medical", "choices-exam", "parameters", "layers"):
        assert wanted in names
    for wanted in ("importance-ffn_channel", "token-frequency"):
        assert wanted in names
    assert sum(name.startswith("recovery-") for name in names) == 3
    assert all(chart.description.endswith(".") for chart in charts)


@pytest.mark.parametrize("records", [full_run(), hostile_run()], ids=["plain", "hostile"])
def test_every_chart_is_drawn_by_vega(records: RunRecords) -> None:
    """Vega-Lite compiles each chart without a warning, and the picture holds marks; hostile names stay text."""
    convert = pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts")
    for chart in charts_of(records):
        svg = convert.vegalite_to_svg(chart_for_file(chart), allowed_base_urls=[], show_warnings=True)
        assert svg.count("<path") > 3, chart.name
        assert "<script" not in svg
        assert "NaN" not in re.sub(r">[^<]*<", "><", svg), chart.name


def test_losses_are_paired_ratios_with_intervals_of_95_percent() -> None:
    """Points and ends are exp of the paired difference and of 1.96 standard errors beside it."""
    run = full_run()
    [chart] = loss_charts(run, ["medical"])
    rows = {row["model"]: row for row in chart.spec["data"]["values"]}
    assert list(rows) == ["dense_finetuned", "pruned", "recovered", "random"]
    models = run.evaluation.models
    for name, row in rows.items():
        difference = paired_difference(models[name].text["medical"], models["dense"].text["medical"])
        assert row["ratio"] == pytest.approx(math.exp(difference.mean))
        assert row["low"] == pytest.approx(math.exp(difference.mean - 1.96 * difference.stderr))
        assert row["high"] == pytest.approx(math.exp(difference.mean + 1.96 * difference.stderr))


def test_a_single_document_has_no_interval() -> None:
    """Its error is unknown, and JSON knows no infinity."""
    one = text_score(2.2, document_nll=(22.0,), document_tokens=(10,), document_bytes=(40,))
    dense = text_score(2.0, document_nll=(20.0,), document_tokens=(10,), document_bytes=(40,))
    found = ratio(one, dense)
    assert (found.low, found.high, found.interval()) == (None, None, "")
    measured = evaluation(dense=2.0, pruned=2.2)
    scores = {"dense": dense, "pruned": one}
    models = {name: replace(model, text={"medical": scores[name]}) for name, model in measured.models.items()}
    run = full_run(evaluation=replace(measured, models=models), recoveries={}, exports=[])
    [chart] = loss_charts(run, ["medical"])
    assert chart.spec["data"]["values"][0]["low"] is None
    json.dumps(chart.spec, allow_nan=False)


def test_the_scale_is_logarithmic_only_where_a_model_is_far_away() -> None:
    """It holds every interval and the dense model's 1."""
    near, far = Ratio(1.02, 0.01, 1.0, 1.04), Ratio(30.0, 1.0, 28.0, 32.0)
    assert ratio_scale([near])["type"] == "linear"
    scale = ratio_scale([near, far])
    assert scale["type"] == "log"
    low, high = scale["domain"]
    assert 0 < low < 1
    assert high > 32


@pytest.mark.parametrize(("low", "high"), [(0.9, 3.5), (0.5, 120.0), (0.99, 1e9), (1e-3, 1e40)])
def test_ticks_of_a_log_axis_are_few_and_inside(low: float, high: float) -> None:
    """Between two and seven round numbers."""
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low <= tick <= high for tick in ticks)


def test_quantiles_and_steps() -> None:
    """Quantiles interpolate; steps are round and wide enough."""
    assert quantile([0.0, 10.0], 0.25) == 2.5
    assert quantile([3.0], 0.9) == 3.0
    assert [nice_step(width) for width in (0.011, 0.2, 3.0, 7.0)] == pytest.approx([0.02, 0.2, 5.0, 10.0])


def test_colours_are_named_in_both_schemes_and_data_keep_theirs() -> None:
    """Every name becomes a colour in light and dark, and rows of data are never read as names."""
    assert COLORS["light"].keys() == COLORS["dark"].keys()
    data = {"data": {"values": [{"$color": "accent"}]}, "mark": {"color": {"$color": "accent"}}}
    assert with_colors(data, "dark")["data"] == data["data"]
    assert with_colors(data, "dark")["mark"] == {"color": COLORS["dark"]["accent"]}
    for chart in charts_of(full_run()):
        assert not named_values(chart_for_file(chart))


def test_charts_stay_small_for_large_models() -> None:
    """A map of importance has at most 40 cells a layer, however many units there are."""
    [chart] = [chart for chart in charts_of(full_run()) if chart.name.startswith("importance")]
    assert len(chart.spec["data"]["values"]) == 8
    assert len(json.dumps(chart.spec)) < 6000
