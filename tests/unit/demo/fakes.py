"""What the tests put in the place of pip and of a progress display."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from secateur.progress import Task

CONTENT = b"lorem ipsum " * 1000
"""The file in the tiny wheel."""


@dataclass
class FakePip:
    """Plays pip: copies ``wheel`` to ``--dest``, or fails as told; remembers what it was asked."""

    wheel: Path | None = None
    code: int = 0
    stderr: str = ""
    error: Exception | None = None
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, arguments: Sequence[str], timeout_seconds: float) -> subprocess.CompletedProcess[str]:
        """Remember the arguments and behave as told."""
        self.calls.append([*arguments])
        if self.error is not None:
            raise self.error
        if self.wheel is not None:
            shutil.copy(self.wheel, arguments[list(arguments).index("--dest") + 1])
        return subprocess.CompletedProcess([*arguments], self.code, "", self.stderr)


class Recorder:
    """A progress that remembers; with ``error``, its task fails at the first step."""

    def __init__(self, error: Exception | None = None) -> None:
        self.labels: list[str] = []
        self.done = 0
        self.error = error

    @contextmanager
    def __call__(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        """Remember the label."""
        self.labels.append(label)
        yield self

    def advance(self, amount: int) -> None:
        """Add up, or fail."""
        if self.error is not None:
            raise self.error
        self.done += amount
