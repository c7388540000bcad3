"""Cuts a checkpoint from disk to disk in a process of its own and prints how much memory that took at most.

Usage: python -m tests.on_disk_child SMALL LARGE OUTPUT, where SMALL is a tiny model of the same family, on which all
that is imported and kept is imported and made first.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from secateur.evaluate.peak_memory_child import _most_held
from secateur.pipeline.on_disk import shrink_checkpoint
from secateur.records.units import EXPERT, FFN_CHANNEL
from secateur.store.checkpoints import resolve_model
from tests.pruning import choose_units, plan_keeping


def cut(source: str, target: Path) -> None:
    """Cut half of the FFN channels, or of the experts where the model has any."""
    checkpoint = resolve_model(source)
    kind = EXPERT if EXPERT in checkpoint.geometry.axes else FFN_CHANNEL
    plan = plan_keeping(checkpoint.geometry, choose_units(checkpoint.geometry, [kind], "uniform"), "uniform")
    shrink_checkpoint(checkpoint, plan, target, device="cpu")


def main() -> None:
    """Print the growth of the peak in bytes."""
    small, large, output = sys.argv[1:]
    torch.set_num_threads(1)
    cut(small, Path(output) / "small")
    resolve_model(large)
    before = _most_held()
    cut(large, Path(output) / "large")
    after = _most_held()
    print(json.dumps(None if before is None or after is None else after - before))


if __name__ == "__main__":
    main()
