"""The page: one file, every section with its tables, and text that stays text."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from secateur.errors import UnavailableError
from secateur.report.page import render as render_module
from secateur.report.page import render_page, run_document, save_charts
from secateur.report.page.render import json_for_html

from ..records import evaluation, plan
from .runs import ATTACK, full_run, hostile_run

needs_vega = pytest.mark.skipif(not render_module.is_available(), reason="vl-convert-python is not installed")


class Reader(HTMLParser):
    """Counts elements and keeps attributes that may name an address."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data")]
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> str:
    """A page of a full run, with a stand-in for Vega's own code."""
    monkeypatch.setattr(render_module, "_library", lambda: "window.vegaEmbed=null;")
    return render_page(run_document(full_run()))


def test_every_section_stands_on_the_page_with_its_tables(page: str) -> None:
    """Every heading, every chart beside a folded table, the recipe, and the verdict in words."""
    for heading in ("How good is it on its domain?", "Does it answer questions?", "What did it forget?"):
        assert f">{heading}</h2>" in page
    for heading in ("How did the training go?", "Where did the parameters go?", "Which units stay?"):
        assert f">{heading}</h2>" in page
    for heading in ("Which token ids does the domain use?", "In which other forms", "How was this made?"):
        assert heading in page
    for table in (
        "held-out results",
        "multiple choice",
        "recovery",
        "parameters by layer",
        "plan",
        "token frequency",
        "size",
    ):
        assert f"<summary>Table: {table}" in page
    assert "fewer parameters; perplexity on held-out medical text" in page
    assert '<pre tabindex="0">model: pico\n</pre>' in page
    assert page.count('class="chart"') == page.count("<figcaption>") == 14


def test_sections_without_records_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run without training, questions, exports, scores or counts has no empty heading for them."""
    monkeypatch.setattr(render_module, "_library", lambda: "")
    bare = full_run(
        evaluation=evaluation(), plan=plan(), recoveries={}, exports=[], importance={}, frequencies={}, manifest={}
    )
    text = render_page(run_document(bare))
    for gone in ("answer questions", "training go", "other forms", "token ids does", "Importance and fate"):
        assert gone not in text


def test_the_page_names_no_address_and_allows_only_its_own_scripts(page: str) -> None:
    """Links lead within the page, and its policy forbids everything else."""
    reader = Reader(page)
    assert all(address.startswith("#") or address == "data:," for address in reader.addresses)
    assert not reader.handlers
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert policy[1].count("sha256-") == 2


def test_names_with_markup_are_shown_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever models, buckets, questions, notes and recipes are called, the page has the elements it has without."""
    monkeypatch.setattr(render_module, "_library", lambda: "")
    hostile = render_page(run_document(hostile_run()))
    reader = Reader(hostile)
    assert reader.tags.count("script") == 3
    assert "img" not in reader.tags
    assert not reader.handlers
    assert ATTACK not in hostile
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', hostile, re.DOTALL)
    assert data is not None
    assert any(ATTACK in json.dumps(chart) for chart in json.loads(data[1])["charts"].values())


def test_json_in_a_script_cannot_end_it() -> None:
    """No character of markup is left, and reading it gives the same."""
    text = "</script><!-- & \u2028"
    shown = json_for_html({"a": text})
    assert not set("<>&\u2028") & set(shown)
    assert json.loads(shown) == {"a": text}
    with pytest.raises(ValueError, match="JSON"):
        json_for_html(float("inf"))


def test_paths_of_the_machine_are_not_in_the_title() -> None:
    """A model folder is called by its last name, a hub id by all of it."""
    assert replace(full_run(), model="/home/me/models/pico/").short_model == "pico"
    assert replace(full_run(), model="C:\\models\\pico").short_model == "pico"
    assert full_run().short_model == "org/pico"


def test_without_the_package_that_draws_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is optional, and what is missing has a name."""
    render_module._library.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(UnavailableError, match=r"vl-convert-python.*pip install 'secateur\[report\]'"):
        render_page(run_document(full_run()))


@needs_vega
def test_charts_become_files_whatever_they_are_called(tmp_path: Path) -> None:
    """SVG and PNG files lie in the folders asked for and nowhere else."""
    files = save_charts(run_document(hostile_run()), svg=tmp_path / "svg", png=tmp_path / "png")
    assert len(files) == 2 * 14
    assert {file.parent for file in files} == {tmp_path / "svg", tmp_path / "png"}
    assert sorted(files) == sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert all(re.fullmatch(r"\d\d-[a-z0-9_-]+\.(svg|png)", file.name) for file in files)
    assert all(file.read_bytes().startswith((b"<svg", b"\x89PNG")) for file in files)
