"""Runs whole jobs with ``memory: by_layer`` in a process of its own and prints how much memory the last took at most.

Usage: python -m tests.by_layer_child PROJECT LARGE, where PROJECT holds a pico project, whose tiny model is run first,
so that all that is imported and kept is imported and made before, and LARGE is a model of the same family.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import secateur
from secateur.evaluate.peak_memory_child import _most_held
from tests.pico import Pico


def job(pico: Pico, model: Path, output: Path) -> None:
    """Cut a quarter of the FFN channels and measure dense, pruned and control."""
    recipe = pico.recipe(
        output,
        model=str(model),
        general=None,
        memory="by_layer",
        calibrate={"max_tokens": 1024, "block_size": 64, "batch_size": 4},
        prune={"method": "activation_norm", "budget": {"channels": 0.25}},
        evaluate={"max_tokens": 256, "batch_size": 2, "controls": ["random"]},
    )
    secateur.run(recipe)


def main() -> None:
    """Print the growth of the peak in bytes."""
    project, large = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    pico = Pico(project / "pico-llama", project / "medical.jsonl", project / "general.txt")
    job(pico, pico.model, project / "first")
    before = _most_held()
    job(pico, large, project / "second")
    after = _most_held()
    print(json.dumps(None if before is None or after is None else after - before))


if __name__ == "__main__":
    main()
