"""Slow measurements on a real model; rewrites the generated part of BENCHMARKS.md.

    python benchmarks/run.py                 everything that is not there yet
    python benchmarks/run.py --only speed    one part
    python benchmarks/run.py --again         measure again what is there

Each part keeps its rows in runs/bench, so a stopped run goes on where it was. Default model and text are those of
`secateur demo`; `--domain NAME=PATH[::TEMPLATE]` adds a corpus, `--domain NAME=CALIBRATION,TEST[::TEMPLATE]` one that
its owner has split.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import quality
import speed
import vocabulary

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "runs" / "bench"
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def main() -> None:
    """Run the chosen parts and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["speed", "quality", "vocabulary"])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH[,TEST][::TEMPLATE]")
    options = parser.parse_args()
    parts: dict[str, Callable[[], str]] = {
        "speed": lambda: speed.measure(STORE),
        "quality": lambda: quality.measure(STORE, options.domain),
        "vocabulary": lambda: vocabulary.measure(STORE, options.domain),
    }
    STORE.mkdir(parents=True, exist_ok=True)
    for name, measure in parts.items():
        file = STORE / f"{name}.md"
        if options.only not in (None, name) or (file.is_file() and not options.again):
            continue
        file.write_text(measure(), encoding="utf-8")
    tables = "\n".join((STORE / f"{name}.md").read_text() for name in parts if (STORE / f"{name}.md").is_file())
    page = ROOT / "BENCHMARKS.md"
    text = page.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    page.write_text(f"{head}{BEGIN}\n{machine()}\n\n{tables}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"wrote {page}")


def machine() -> str:
    """Return one line on where this was measured."""
    import os

    import torch
    import transformers

    facts = {
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return "Measured on: " + ", ".join(f"{key} {value}" for key, value in facts.items()) + "."


if __name__ == "__main__":
    main()
