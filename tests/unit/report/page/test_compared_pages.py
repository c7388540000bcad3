"""The pages of comparisons and of domain matrices: what they say, and that every chart is drawn and fits."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from secateur.records.comparison import compare_runs
from secateur.report.comparison import comparison_markdown, comparison_notes, comparison_verdict
from secateur.report.matrix import matrix_notes, matrix_verdict
from secateur.report.page import Document, is_available, render_page
from secateur.report.page.chart import Chart
from secateur.report.page.compare import comparison_document, difference_chart
from secateur.report.page.experts import experts_document
from secateur.report.page.matrix import matrix_chart, matrix_document, own_chart
from secateur.report.page.records import TIMES
from secateur.report.page.render import chart_for_file
from tests.browser import CHROMIUM, Page, browser

from ..compared import compared_run, full_comparison
from ..families import full_family
from ..matrices import full_matrix
from .runs import ATTACK

DOCUMENTS: dict[str, Document] = {
    "comparison": comparison_document(full_comparison((ATTACK, "a" * 90, "<img src=x onerror=alert(2)>"), ATTACK)),
    "matrix": matrix_document(full_matrix((ATTACK, "a" * 60), model=ATTACK)),
    "experts": experts_document(full_family((ATTACK, "a" * 60), model=ATTACK)),
}
"""Pages in which every name tries to become a script, or is too long."""


def rows_of(chart: Chart, key: str) -> dict[str, dict[str, object]]:
    """Return a chart's rows by one field."""
    return {row[key]: row for row in chart.spec["data"]["values"]}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_chart_is_drawn_by_vega(name: str) -> None:
    """Without a warning; hostile names stay text; each has a name and a description of its own."""
    convert = pytest.importorskip("vl_convert", reason="vl-convert-python draws the charts")
    charts = DOCUMENTS[name].charts
    assert len({chart.name for chart in charts}) == len(charts)
    assert all(chart.description.endswith(".") for chart in charts)
    for chart in charts:
        svg = convert.vegalite_to_svg(chart_for_file(chart), allowed_base_urls=[], show_warnings=True)
        assert svg.count("<path") > 1, chart.name
        assert "<script" not in svg
        assert "NaN" not in re.sub(r">[^<]*<", "><", svg), chart.name


def test_differences_are_coloured_by_their_judgement() -> None:
    """Points are ratios to the baseline, and the words of the tooltip are those of the table."""
    comparison = full_comparison()
    rows = rows_of(difference_chart(comparison, "medical"), "model")
    for one in (one for one in comparison.texts if one.bucket == "medical"):
        assert rows[one.run]["ratio"] == pytest.approx(math.exp(one.nll.mean))
        assert rows[one.run]["judgement"] == one.judgement == "better"
    assert {one.judgement for one in comparison.texts if one.bucket == "general"} == {"worse"}


def test_a_comparison_says_size_and_loss_of_each() -> None:
    """In a sentence for a few runs, in counts for many; what weakens it is said."""
    few = comparison_verdict(full_comparison())
    assert few.startswith("second has 3.3% fewer parameters than first; on held-out medical text its perplexity is 0.9")
    assert f"{TIMES} that of first: better, surer than chance (95 % interval" in few
    many = full_comparison([f"run{number}" for number in range(6)])
    assert "has the lowest loss of 6 runs; against run0, 5 are better and 0 worse" in comparison_verdict(many)
    notes = " ".join(comparison_notes(many))
    assert "15 differences are judged here" in notes
    assert "not of one size" in notes
    assert "Tokenizers differ" in notes


def test_two_equal_runs_are_the_same() -> None:
    """No verdict is invented for a run and its copy."""
    comparison = compare_runs([compared_run("a"), compared_run("b")])
    assert comparison_verdict(comparison) == (
        "b has as many parameters as a; on held-out medical text its loss is the same."
    )
    assert "Measured on fewer than 30 documents: medical (2)." in comparison_notes(comparison)[0]


def test_a_comparison_as_markdown_has_every_table() -> None:
    """Names that look like markup are escaped in its tables."""
    text = comparison_markdown(full_comparison(("first", "<b>|second")))
    for title in ("Held-out results", "Differences from first", "Units in common", "What the recipes have different"):
        assert f"## {title}" in text
    assert r"&lt;b>\|second" in text


def test_the_map_frames_the_own_model_and_ignores_the_control() -> None:
    """A frame per domain; the shades span the calibrated rows alone, and the random cut takes the strongest."""
    matrix = full_matrix()
    chart = matrix_chart(matrix, matrix.sizes[0])
    values = chart.spec["data"]["values"]
    assert [(row["model"], row["text"]) for row in values if row["own"]] == [(name, name) for name in matrix.domains]
    low, high = chart.spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    calibrated = [row["log"] for row in values if row["model"] != "random cut"]
    assert (low, high) == (min(calibrated), max(calibrated))
    assert max(row["log"] for row in values) > high
    assert "calibrated on legal: 1.2" in chart.description


def test_own_charts_leave_the_control_out() -> None:
    """Its distance would hide all others."""
    matrix = full_matrix()
    rows = rows_of(own_chart(matrix.sizes[0], "legal"), "model")
    assert list(rows) == ["medical", "code", "general"]
    assert {row["judgement"] for row in rows.values()} == {"better"}


def test_the_verdict_of_a_matrix_counts_domains_and_names_general_text() -> None:
    """One size in full; several in a sentence each."""
    one = matrix_verdict(full_matrix(shares=(0.2,)))
    assert one.startswith(
        "With 20 % of channels removed, each domain's own model is best on its text in 3 of 3 domains, in 3 surer than"
    )
    assert "Calibrated on its own text and not on general text, a model's perplexity there is 0.9" in one
    several = matrix_verdict(full_matrix())
    assert several.count("each domain's own model") == 2
    assert several.count("beside the model of general text its perplexity is") == 2


def test_a_matrix_says_what_is_missing_and_what_differs() -> None:
    """Failed rows, rows of another size, and no general text."""
    matrix = full_matrix(failures={"code-channels-0.1": "out of luck"})
    rows = matrix.sizes[0].rows
    sizes = (replace(matrix.sizes[0], rows=(replace(rows[0], parameters=1), *rows[1:])),)
    texts = {name: text for name, text in matrix.texts.items() if name != "general"}
    notes = " ".join(matrix_notes(replace(matrix, sizes=sizes, texts=texts)))
    assert "code-channels-0.1 is missing: out of luck" in notes
    assert "the rows keep from 1 to 3.0 M parameters" in notes
    assert "There is no general text" in notes


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    """One browser for all tests here."""
    with browser() as page:
        yield page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
@pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_page_draws_fits_a_phone_and_stays_offline(chromium: Page, tmp_path: Path, name: str) -> None:
    """No complaint, no request but for itself, a picture in every chart, and nothing to scroll sideways."""
    document = DOCUMENTS[name]
    file = tmp_path / "page.html"
    file.write_text(render_page(document), encoding="utf-8")
    for width, dark in ((390, False), (1280, True)):
        chromium.open(file, width=width, dark=dark)
        assert chromium.complaints == []
        assert [one for one in chromium.requests if not one.startswith("data:")] == [file.as_uri()]
        drawn = "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)"
        assert len(chromium.evaluate(drawn)) == len(document.charts)
        assert min(chromium.evaluate(drawn)) > 1
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        wider = "[...document.querySelectorAll('.chart')].filter((c) => c.scrollWidth > c.clientWidth + 1).length"
        assert chromium.evaluate(wider) == 0
        assert chromium.evaluate("document.body.innerText.includes('which lies beside this page')") == bool(
            document.recipe_yaml
        )
