"""The page in a real browser: it draws, reaches no network, fits a telephone, and is used by keyboard.

Needs a Chromium on the PATH (for example ``apt-get install chromium``); skipped where there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.report.page import is_available, render_page, run_document
from tests.browser import CHROMIUM, Page, browser

from .runs import full_run, hostile_run

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH"),
    pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed"),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain page and a hostile one on disk."""
    folder = tmp_path_factory.mktemp("pages")
    files = {"plain": folder / "plain.html", "hostile": folder / "hostile.html"}
    files["plain"].write_text(render_page(run_document(full_run())), encoding="utf-8")
    files["hostile"].write_text(render_page(run_document(hostile_run())), encoding="utf-8")
    return files


@pytest.fixture(scope="module")
def chromium() -> Iterator[Page]:
    """One browser for all tests here."""
    with browser() as page:
        yield page


@pytest.mark.parametrize("name", ["plain", "hostile"])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_fits_and_stays_offline(
    chromium: Page, pages: dict[str, Path], name: str, dark: bool, width: int
) -> None:
    """No complaint, no request but for itself, a picture in every chart, and nothing to scroll sideways."""
    chromium.open(pages[name], width=width, dark=dark)
    assert chromium.complaints == []
    assert [address for address in chromium.requests if not address.startswith("data:")] == [pages[name].as_uri()]
    drawn = chromium.evaluate(
        "[...document.querySelectorAll('.chart')].map((c) => c.querySelectorAll('svg path').length)"
    )
    assert len(drawn) == 14
    assert min(drawn) > 3
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    wider = "[...document.querySelectorAll('.chart')].filter((c) => c.scrollWidth > c.clientWidth + 1).map((c) => c.id)"
    assert chromium.evaluate(wider) == []
    chromium.evaluate("document.querySelectorAll('details').forEach((part) => { part.open = true; })")
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width


def test_tables_open_by_keyboard(chromium: Page, pages: dict[str, Path]) -> None:
    """Tab reaches a folded table, and Enter opens it."""
    chromium.open(pages["plain"])
    for _ in range(60):
        chromium.press("Tab", 9)
        if chromium.evaluate("document.activeElement.tagName") == "SUMMARY":
            break
    assert chromium.evaluate("document.activeElement.parentElement.open") is False
    chromium.press("Enter", 13, text="\r")
    assert chromium.evaluate("document.activeElement.parentElement.open") is True


def test_numbers_show_on_hover(chromium: Page, pages: dict[str, Path]) -> None:
    """The pointer on a bar shows its numbers as text."""
    chromium.open(pages["plain"])
    bar = "document.querySelector('.chart[aria-label^=\"Stacked bars of parameters\"]')"
    chromium.evaluate(f"{bar}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    place = chromium.evaluate(
        f"(() => {{ const b = {bar}.querySelector('.mark-rect path').getBoundingClientRect();"
        " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
    )
    chromium.hover(place[0] - 3, place[1])
    chromium.hover(*place)
    shown = chromium.evaluate("document.getElementById('tip').hidden ? '' : document.getElementById('tip').innerText")
    assert "1,000,000" in shown


def test_it_prints_on_paper(chromium: Page, pages: dict[str, Path]) -> None:
    """The printed page is a PDF of several pages, with every table open, and folds them again."""
    chromium.open(pages["plain"], dark=True)
    assert chromium.print_pdf().startswith(b"%PDF")
    assert chromium.evaluate("document.querySelectorAll('details[open]').length") <= 2
