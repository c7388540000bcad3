"""The page of a sweep: what it says of made-up points, that its charts draw, and that 64 points fit and are quick."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.records.sweep import Accuracy, BucketScore, DenseModel, Sweep, SweepPoint
from secateur.report.page import is_available, render_page
from secateur.report.page.render import chart_for_file
from secateur.report.page.sweep import sweep_document
from secateur.report.sweep import all_table, smallest_within, sweep_cautions, sweep_table, sweep_verdict
from tests.browser import CHROMIUM, browser

from .runs import ATTACK


def score(ratio: float, stderr: float = 0.01) -> BucketScore:
    """Return the score of a model at so many times the dense model's perplexity of 12."""
    spread = 1.96 * stderr
    ends = ratio * math.exp(-spread), ratio * math.exp(spread)
    return BucketScore(12 * ratio, 0.3, 0.9 * ratio, 0.02, ratio, ratio * stderr, *ends)


def point(name: str, removed: float, ratio: float, **changes: Any) -> SweepPoint:
    """Return a point that is done."""
    plain: dict[str, Any] = {
        "name": name,
        "overrides": {"prune.method": "wanda", "prune.budget": {"channels": removed}},
        "folder": f"trials/{name}",
        "status": "done",
        "seconds": 65.0,
        "method": "wanda",
        "row": "pruned",
        "parameters": round(1e8 * (1 - removed)),
        "pruning_ratio": removed,
        "size_bytes": round(2e8 * (1 - removed)),
        "text": {"medical": score(ratio), "general": score(2 * ratio)},
        "choices": {"exam": Accuracy(0.4, 0.02, 0.41, 0.02, 0.25, 500)},
        "loss": math.log(ratio),
        "loss_stderr": 0.01,
        "random_ratio": 3.0,
        "beats_random": True,
        "fingerprint": "ab",
        "standing": "front",
    }
    return SweepPoint(**{**plain, **changes})


POINTS = [
    point("small", 0.4, 1.3),
    point("good", 0.2, 1.02, row="recovered"),
    point("unsure", 0.3, 1.045, standing="level"),
    point("poor", 0.1, 1.2, standing="behind", beaten_by="good", method="magnitude", beats_random=False),
    SweepPoint("bad", {"prune.method": "obs"}, "trials/bad", "failed", "too little text"),
]


def sweep(points: list[SweepPoint] | None = None, **changes: Any) -> Sweep:
    """Return a sweep."""
    plain: dict[str, Any] = {
        "model": "org/pico",
        "domains": ["medical"],
        "points": POINTS if points is None else points,
        "dense": DenseModel(
            100_000_000, 200_000_000, {"medical": 12.0, "general": 15.0}, {"medical": 0.9, "general": 1}
        ),
        "varied": ["prune.method", "prune.budget"],
        "recipe_yaml": "model: pico\n",
        "versions": {"secateur": "0.1.0"},
        "model_fingerprint": "m",
        "seed": 0,
    }
    return Sweep(**{**plain, **changes})


def many(count: int) -> Sweep:
    """Return a sweep of many methods and sizes."""
    points = [
        point(
            f"method{number % 9}-channels_{number // 9}",
            0.05 * (1 + number // 9),
            1 + 0.01 * (number % 9) * (1 + number // 9),
            method=f"method{number % 9}",
            standing="front" if number % 9 == 0 else "behind",
        )
        for number in range(count)
    ]
    return sweep(points)


def hostile() -> Sweep:
    """Return a sweep whose every name tries to become a script."""
    evil = [
        replace(each, name=f"{number}{ATTACK}", method=ATTACK, message=ATTACK) for number, each in enumerate(POINTS)
    ]
    return sweep(
        [replace(each, text={ATTACK: score(1.1)} if each.text else {}, choices={}) for each in evil],
        domains=[ATTACK],
        dense=DenseModel(1, 2, {ATTACK: 1.0}, {ATTACK: 1.0}),
        recipe_yaml=ATTACK,
        model=ATTACK,
    )


def test_the_verdict_names_the_smallest_model_that_is_surely_good_enough() -> None:
    """A ratio of 1.045 with an error of 0.01 may be above 1.05, so the larger model is the answer."""
    found = smallest_within(sweep())
    assert found is not None and found.name == "good"
    verdict = sweep_verdict(sweep())
    assert verdict.startswith(
        "5 points, 1 failed; smallest model whose perplexity on held-out medical text is, with 95 %"
    )
    assert "good, 20.0% fewer parameters, perplexity on medical 1.020 ± 0.010 x the dense model's." in verdict
    nearest = sweep_verdict(sweep([POINTS[0], POINTS[3]]))
    assert "no model's perplexity" in nearest and "poor, 10.0% fewer" in nearest
    assert sweep_verdict(sweep([POINTS[4]], dense=None)) == "1 point, 1 failed: nothing was measured."


def test_cautions_say_what_weakens_the_evidence() -> None:
    """Points no better than chance or on other text, the choice among many, and a text that is missing."""
    told = " ".join(sweep_cautions(sweep()))
    assert "No better than a random cut of the same size, as far as can be told: poor." in told
    assert "The best of 4 points is chosen on the text that it is measured on" in told
    odd = sweep([*POINTS, point("odd", 0.5, 1.0, is_comparable=False, standing="")])
    assert "odd measured on other test text" in sweep_cautions(odd)[0]
    found = smallest_within(odd)
    assert found is not None and found.name == "good"


def test_tables_hold_every_point_and_what_was_varied() -> None:
    """One row each in the order of the file, failed ones too, with the dense model on top of the full table."""
    assert [row[:4] for row in sweep_table(sweep()).rows][1] == ["good", "front", "80.0 M", "20.0%"]
    table = all_table(sweep())
    assert [row[0] for row in table.rows] == ["dense model", *(each.name for each in POINTS)]
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert table.rows[2][2:4] == ["wanda", "channels: 0.2"]
    assert table.rows[-1][1:4] == ["failed", "obs", ""]


def test_charts_hold_comparable_points_and_say_the_front_in_words() -> None:
    """The description names the front; points of nearly the same size stand a little apart."""
    document = sweep_document(sweep([*POINTS, point("twin", 0.2, 1.03, standing="level")]))
    chart = document.charts[0]
    rows = {row["point"]: row for row in chart.spec["data"]["values"]}
    assert set(rows) == {"small", "good", "unsure", "poor", "twin"}
    assert 0 < abs(rows["good"]["place"] - rows["twin"]["place"]) < 0.01
    assert rows["good"]["size"] == "80.0 M (\u221220.0%)"
    assert (
        "good with 80.0% of the parameters at 1.020; small with 60.0% of the parameters at 1.300." in chart.description
    )


@pytest.mark.parametrize(
    "made", [sweep(), hostile(), many(64), sweep([POINTS[0]])], ids=["a", "hostile", "many", "one"]
)
def test_every_chart_is_drawn_by_vega(made: Sweep) -> None:
    """Vega-Lite compiles each chart without a warning; hostile names stay text."""
    convert = pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts")
    for chart in sweep_document(made).charts:
        svg = convert.vegalite_to_svg(chart_for_file(chart), allowed_base_urls=[], show_warnings=True)
        assert svg.count("<path") > 3, chart.name
        assert "<script" not in svg
        assert "NaN" not in re.sub(r">[^<]*<", "><", svg), chart.name


@pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")
def test_a_page_of_64_points_is_quick_and_small() -> None:
    """Within 5 s of this process's time and 5 MB, the charts' library included."""
    started = time.process_time()
    page = render_page(sweep_document(many(64)))
    assert time.process_time() - started < 5
    assert len(page.encode()) < 5_000_000
    assert "method8-channels_6" in page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")
def test_the_page_draws_fits_a_telephone_and_stays_offline(tmp_path: Path) -> None:
    """Plain, large, hostile: no complaint, no request, a picture in every chart, and nothing to scroll sideways."""
    with browser() as page:
        for name, made in {"plain": sweep(), "many": many(64), "hostile": hostile()}.items():
            file = tmp_path / f"{name}.html"
            file.write_text(render_page(sweep_document(made)), encoding="utf-8")
            page.open(file, width=390, dark=name == "many")
            assert page.complaints == []
            assert [address for address in page.requests if not address.startswith("data:")] == [file.as_uri()]
            drawn = "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)"
            assert min(page.evaluate(drawn)) > 3
            page.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            wide = "[...document.querySelectorAll('.chart')].filter((c) => c.scrollWidth > c.clientWidth + 1).length"
            assert page.evaluate(wide) == 0
