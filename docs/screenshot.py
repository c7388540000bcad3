"""Take the picture of a report that stands in the README: ``python docs/screenshot.py [REPORT] [PICTURE]``.

Needs Chromium or Chrome on the path. The report is by default that of ``make demo``.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
WIDTH, HEIGHT = 1120, 1640
"""Pixels of the picture: the top of the page as a laptop shows it."""


def screenshot(page: Path, picture: Path) -> None:
    """Draw the top of a page in a headless browser and write it as a PNG file.

    Raises:
        SystemExit: there is no such page, or no browser.
    """
    if not page.is_file():
        raise SystemExit(f"{page} is missing. Run `make demo` first, or name another report.")
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"none of {', '.join(BROWSERS)} is on the path. Install Chromium.")
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as profile:
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            "--virtual-time-budget=20000",
            f"--user-data-dir={profile}",
            f"--window-size={WIDTH},{HEIGHT}",
            f"--screenshot={picture.resolve()}",
            page.resolve().as_uri(),
        ]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    given = [Path(argument) for argument in sys.argv[1:3]]
    defaults = [ROOT / "runs" / "demo" / "report.html", ROOT / "docs" / "images" / "report.png"]
    screenshot(*[*given, *defaults[len(given) :]])
