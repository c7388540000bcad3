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
class TalkingTask(Protocol):
    """A task that can also show a few words beside its label."""

    def say(self, text: str) -> None:
        """Show ``text``, in the place of what was said before."""


def say(task: Task, text: str) -> None:
    """Show a few words beside a task's label, if the task can."""
    if isinstance(task, TalkingTask):
        task.say(text)


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
