"""The terminal: rates a person can read, tables that hold any text, and progress for people, logs and nobody."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from secateur.cli import console
from secateur.cli.console import describe_rate, print_json, print_table, progress_for
from secateur.progress import say, silent
from secateur.report.tables import Table


@pytest.mark.parametrize(
    ("done", "total", "unit", "seconds", "shown"),
    [
        (8192, 32768, "tokens", 10.0, "8,192/32,768 tokens, 819 tokens/s, 0:30 left"),
        (32768, 32768, "tokens", 10.0, "32,768/32,768 tokens, 3,277 tokens/s, 0:00 left"),
        (1, 601, "tokens", 1.0, "1/601 tokens, 1 tokens/s, 10:00 left"),
        (50_000_000, 100_000_000, "bytes", 10.0, "50,000,000/100,000,000 bytes, 5.0 Mbytes/s, 0:10 left"),
        (0, 100, "tokens", 5.0, "0/100 tokens"),
        (10, 100, "tokens", 0.0, "10/100 tokens"),
        (5, None, "bytes", 1.0, ""),
        (1, 2, "", 1.0, ""),
        (120, 100, "tokens", 10.0, "120/100 tokens, 12 tokens/s, 0:00 left"),
    ],
)
def test_a_rate_says_how_much_how_fast_and_how_long(
    done: int, total: int | None, unit: str, seconds: float, shown: str
) -> None:
    """Nothing is guessed before there is something to guess from, and no time is ever negative."""
    assert describe_rate(done, total, unit, seconds) == shown


def test_a_table_is_printed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal nothing is cut, and square brackets are text, not markup."""
    wide = [f"column {i}" for i in range(12)]
    print_table(Table("a title", wide, [["[bold]x[/bold]", *("1,234.5 ± 0.1" for _ in range(11))]]))
    shown = capsys.readouterr().out
    assert "a title" in shown
    assert "[bold]x[/bold]" in shown
    assert shown.count("1,234.5 ± 0.1") == 11
    assert "…" not in shown


def test_json_is_one_line_of_utf_8(capsys: pytest.CaptureFixture[str]) -> None:
    """What machines read is one object on stdout."""
    print_json({"town": "Łódź", "n": [1, 2]})
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1 and "Łódź" in shown
    assert json.loads(shown) == {"town": "Łódź", "n": [1, 2]}


def test_quiet_is_silent() -> None:
    """Asked to be quiet, the command line listens with the API's own silence."""
    with progress_for(as_json=False, quiet=True) as progress:
        assert progress is silent


def test_a_log_gets_a_line_when_something_starts_and_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a terminal: a line at the start, the first rate after two seconds, then one every ten; all on stderr."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with progress_for(as_json=False, quiet=False) as progress, progress("calibrate", 3000, "tokens") as task:
        for _ in range(30):
            now[0] += 1.0
            task.advance(100)
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.splitlines() == [
        "calibrate (3,000 tokens)",
        "calibrate: 200/3,000 tokens, 100 tokens/s, 0:28 left",
        "calibrate: 1,200/3,000 tokens, 100 tokens/s, 0:18 left",
        "calibrate: 2,200/3,000 tokens, 100 tokens/s, 0:08 left",
    ]


def test_what_a_task_says_stands_beside_its_label(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the next line of a log, and at once on a terminal; always the last thing said."""
    now = [100.0]
    monkeypatch.setattr(console.time, "perf_counter", lambda: now[0])
    with progress_for(as_json=False, quiet=False) as progress, progress("train", 300, "tokens") as task:
        say(task, "loss 3.2")
        say(task, "loss 3.1")
        now[0] += 2.0
        task.advance(100)
    assert capsys.readouterr().err.splitlines()[1] == "train (loss 3.1): 100/300 tokens, 50 tokens/s, 0:04 left"

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress_for(as_json=False, quiet=False) as progress, progress("train", 300, "tokens") as task:
        say(task, "loss 2.5")
        task.advance(300)
    assert "train (loss 2.5)" in terminal.getvalue()


class Terminal(io.StringIO):
    """A stderr that is a terminal."""

    def isatty(self) -> bool:
        """Say so."""
        return True


def test_a_terminal_gets_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar per task with its rate; it is full when the task ends, and stays."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with progress_for(as_json=False, quiet=False) as progress:
        with progress("calibrate", 100, "tokens") as task:
            task.advance(60)
            task.advance(40)
        with progress("load the model", None, "") as task:
            task.advance(1)
    shown = terminal.getvalue()
    assert "calibrate" in shown and "load the model" in shown
    assert "100/100 tokens" in shown


def test_json_on_a_terminal_gets_lines_not_bars(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever pipes stdout into a program still reads stderr."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress_for(as_json=True, quiet=False) as progress, progress("calibrate", 100, "tokens"):
        pass
    assert terminal.getvalue() == "calibrate (100 tokens)\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_errors_pass_through_progress(quiet: bool) -> None:
    """A failing stage fails as it would without a listener."""

    def work(progress: Any) -> None:
        with progress("calibrate", 100, "tokens"):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"), progress_for(as_json=False, quiet=quiet) as progress:
        work(progress)
