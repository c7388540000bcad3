"""The sections with answers side by side and with tasks: what stands where, and text that is shown as text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from secateur.report.page import is_available, render_page
from secateur.report.page.document import Document
from secateur.report.page.generations import generations_section
from secateur.report.page.sections import sections
from secateur.report.page.tasks import tasks_section
from tests.browser import CHROMIUM, browser

from ..answers import generations, metric, results
from .runs import ATTACK, full_run

needs_vega = pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")


def page(text: str = "Why?") -> str:
    """Return a page of both sections in which a text stands everywhere."""
    parts = [tasks_section(results(text)), generations_section(generations(text, f" {text}"))]
    return render_page(Document("Report", "t", "v", parts))


def test_an_exchange_is_plain_as_far_as_the_answers_agree() -> None:
    """White space before the token that differs is not marked; equal answers have no mark."""
    exchange = generations_section(generations("Why?\nNow.")).exchanges[0]
    assert (exchange.title, exchange.prompt) == ("medical: Why? Now.", "Why?\nNow.")
    assert exchange.detail == "greedy differ after 2 tokens; sampled equal"
    dense, pruned, sampled, _ = exchange.sayings
    assert (dense.who, dense.common, dense.differing, dense.rest) == ("dense, greedy", "To be ", "safe", " .")
    assert (pruned.who, pruned.differing, pruned.detail) == ("pruned, greedy", "rest", "3 tokens, cut there")
    assert (sampled.common, sampled.differing, sampled.rest) == ("To be safe .", "", "")


def test_an_answer_that_ends_early_says_so() -> None:
    saying = generations_section(generations()).exchanges[1].sayings[0]
    assert saying.detail == "1 token, ended by the model; says nothing more where the other goes on"


def test_sections_are_there_only_where_something_was_asked() -> None:
    names = [section.name for section in sections(full_run())]
    assert not {"tasks", "generations"} & set(names)
    names = [section.name for section in sections(full_run(tasks=results(), generations=generations()))]
    assert names[2:4] == ["tasks", "generations"]


def test_the_chart_has_what_is_a_share_and_better_when_higher() -> None:
    """Both models' numbers with their 95 % intervals; a perplexity is in the table only."""
    section = tasks_section(results())
    rows = section.charts[0].spec["data"]["values"]
    assert [(row["task"], row["model"], row["value"]) for row in rows] == [
        ("acc: terms", "dense", 1.0),
        ("acc: terms", "pruned", 0.5),
    ]
    assert (rows[1]["low"], rows[1]["high"], rows[0]["high"]) == (0.5 - 0.196, 0.5 + 0.196, 1.0)
    assert "acc: terms: pruned 0.500" in section.charts[0].description


def test_many_tasks_are_shortened_in_the_chart_alone() -> None:
    whole = results()
    models = {
        name: {f"t{n}": replace(row["terms"], task=f"t{n}", metrics=(metric("acc", (1.0, 0.0)),)) for n in range(40)}
        for name, row in whole.models.items()
    }
    section = tasks_section(replace(whole, models=models))
    assert len(section.charts[0].spec["data"]["values"]) == 2 * 30
    assert len(section.tables[0].rows) == 40
    assert section.text[-1].endswith("10 more are in the table only.")


@needs_vega
def test_corpus_text_is_shown_as_text() -> None:
    """No tag of a prompt, an answer or a task's name reaches the page."""
    assert ATTACK not in page(ATTACK)
    assert page(ATTACK).count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 5


@needs_vega
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_answers_fit_on_a_telephone(tmp_path: Path) -> None:
    """With everything open nothing is wider than the screen, whatever the words; answers stand in one column there."""
    file = tmp_path / "page.html"
    file.write_text(page(ATTACK + "x" * 300), encoding="utf-8")
    with browser() as chromium:
        for width, columns in ((390, 1), (1280, 2)):
            chromium.open(file, width=width)
            assert chromium.complaints == []
            chromium.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
            assert chromium.evaluate("document.documentElement.scrollWidth") <= width
            places = "new Set([...document.querySelectorAll('.sayings > div')].map((s) => s.offsetLeft)).size"
            assert chromium.evaluate(places) == columns
        assert "alert(1)" in chromium.evaluate("document.querySelector('.prompt').textContent")
