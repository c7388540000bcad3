"""What commands share on the terminal: tables, progress, JSON; results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from secateur.progress import Task, silent
from secateur.report.tables import Table

_LOG_EVERY_S = 10.0
_QUIET_FOR_S = 2.0


def quiet_libraries() -> None:
    """Stop the libraries below from drawing their own bars and warnings over ours; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("datasets").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


def print_table(table: Table) -> None:
    """Print a table to stdout."""
    width = None if sys.stdout.isatty() else 200
    rich_table = RichTable(title=table.title, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for index, column in enumerate(table.columns):
        rich_table.add_column(column, justify="left" if index == 0 else "right")
    for row in table.rows:
        rich_table.add_row(*(cell.replace("[", r"\[") for cell in row))
    Console(width=width).print(rich_table)


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object to stdout."""
    click.echo(json.dumps(data, ensure_ascii=False))


@contextmanager
def progress_for(as_json: bool, quiet: bool, *, keep: bool = True) -> Iterator[Any]:
    """Give a ``secateur.progress.Progress``: bars on a terminal, a line now and then elsewhere, or nothing.

    Without ``keep`` a bar goes when its task is done, for work of very many tasks.
    """
    if quiet:
        yield silent
    elif sys.stderr.isatty() and not as_json:
        with _bars() as bars:
            yield _BarProgress(bars, keep=keep)
    else:
        yield _LineProgress()


def _bars() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def describe_rate(done: int, total: int | None, unit: str, seconds: float) -> str:
    """Return for example ``8,192/32,768 tokens, 810 tokens/s, 0:30 left``."""
    if not total or not unit:
        return ""
    if not done or seconds <= 0:
        return f"{done:,}/{total:,} {unit}"
    rate = done / seconds
    left = round(max(total - done, 0) / rate)
    shown = f"{rate / 1e6:,.1f} M{unit}" if rate >= 1e6 else f"{rate:,.0f} {unit}"
    return f"{done:,}/{total:,} {unit}, {shown}/s, {left // 60}:{left % 60:02d} left"


class _BarTask:
    def __init__(self, bars: Progress, task: TaskID, label: str, total: int | None, unit: str) -> None:
        self._bars, self._task, self._label, self._total, self._unit = bars, task, label, total, unit
        self._done, self._started = 0, time.perf_counter()

    def advance(self, amount: int) -> None:
        self._done += amount
        state = describe_rate(self._done, self._total, self._unit, time.perf_counter() - self._started)
        self._bars.update(self._task, completed=self._done, state=state)

    def say(self, text: str) -> None:
        self._bars.update(self._task, description=f"{self._label} ({text})")


class _BarProgress:
    """Bars that stay when their task is done, or go."""

    def __init__(self, bars: Progress, *, keep: bool) -> None:
        self._bars = bars
        self._keep = keep

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        return self._open(label, total, unit)

    @contextmanager
    def _open(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        task = self._bars.add_task(label, total=total, state=describe_rate(0, total, unit, 0.0))
        yield _BarTask(self._bars, task, label, total, unit)
        self._bars.update(task, total=total or 1, completed=total or 1)
        if not self._keep:
            self._bars.remove_task(task)


class _LineTask:
    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._unit = label, total, unit
        self._done, self._started = 0, time.perf_counter()
        self._next = self._started + _QUIET_FOR_S
        self._said = ""

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.perf_counter()
        if now >= self._next:
            self._next = now + _LOG_EVERY_S
            state = describe_rate(self._done, self._total, self._unit, now - self._started)
            click.echo(f"{self._label}{self._said}: {state}", err=True)

    def say(self, text: str) -> None:
        self._said = f" ({text})"


class _LineProgress:
    """For logs: says what starts, and every ten seconds how far it is."""

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        return self._open(label, total, unit)

    @contextmanager
    def _open(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        size = f" ({total:,} {unit})" if total else ""
        click.echo(f"{label}{size}", err=True)
        yield _LineTask(label, total, unit)
