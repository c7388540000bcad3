"""How a long stage says where it is, without knowing who listens: a terminal, a log, or nobody."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable


@runtime_checkable
class Task(Protocol):
    """One piece of work in progress."""

    def advance(self, amount: int) -> None:
        """Say that ``amount`` more units of work are done."""


@runtime_checkable
class Progress(Protocol):
    """Opens a task; the task is closed when the context ends, also by an error."""

    def __call__(self, label: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
        """Open a task of ``total`` units (``None``: not known) named ``label``."""


class _Silent:
    def advance(self, amount: int) -> None:
        del amount


def silent(label: str, total: int | None, unit: str) -> AbstractContextManager[Task]:
    """Return a task that says nothing (the default of every function of the Python API)."""
    del label, total, unit
    return nullcontext(_Silent())
