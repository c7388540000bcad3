"""Several processes, as ``accelerate launch`` starts them: one prepares and writes, all of them compute."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

_PATIENCE = timedelta(days=7)
"""How long the others wait for the one that prepares; calibrating a large model may take hours."""


def are_several() -> bool:
    """Return whether this is one of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_main() -> bool:
    """Return whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def main_first() -> Iterator[None]:
    """Let the main process go through the block before the others, which find what it made."""
    if not are_several():
        yield
        return
    with _state().main_process_first():
        yield


def wait() -> None:
    """Wait until every process is here."""
    if are_several():
        _state().wait_for_everyone()


def talk_group() -> Any:
    """Return the group over which processes tell each other small things, by way of main memory.

    It is a group of its own, so that what a trainer sends at the same time cannot be mistaken for it. All processes
    must call this.
    """
    import torch

    _ = _state()
    return torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)


def _state() -> Any:
    import torch
    from accelerate import PartialState  # type: ignore[import-untyped]

    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
