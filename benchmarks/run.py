"""Slow measurements on a real model; rewrites the generated part of BENCHMARKS.md.

    python benchmarks/run.py                 everything that is not there yet
    python benchmarks/run.py --only speed    one part
    python benchmarks/run.py --again         measure again what is there
    python benchmarks/run.py --only peers    other tools beside secateur; only when asked for, because it installs them

Each part keeps its rows in runs/bench, so a stopped run goes on where it was. Default model and text are those of
`secateur demo`; `--domain NAME=PATH[::TEMPLATE]` adds a corpus, `--domain NAME=CALIBRATION,TEST[::TEMPLATE]` one that
its owner has split (for peers `CALIBRATION,VALIDATION,TEST`, because fitting a reconstruction needs all three).
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import methods
import mix
import peers
import quality
import speed
import vocabulary

ROOT = Path(__file__).resolve().parent.parent
STORE = ROOT / "runs" / "bench"
ON_REQUEST = ("peers",)
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"


def main() -> None:
    """Run the chosen parts and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["speed", "quality", "vocabulary", "methods", "mix", "peers"])
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH[,TEST][::TEMPLATE]")
    parser.add_argument("--calibration-tokens", type=int, help="for methods, mix and peers")
    parser.add_argument("--test-tokens", type=int, help="for methods, mix and peers")
    options = parser.parse_args()

    def sizes(calibration_tokens: int, test_tokens: int) -> tuple[int, int]:
        return options.calibration_tokens or calibration_tokens, options.test_tokens or test_tokens

    parts: dict[str, Callable[[], str]] = {
        "speed": lambda: speed.measure(STORE),
        "quality": lambda: quality.measure(STORE, options.domain),
        "vocabulary": lambda: vocabulary.measure(STORE, options.domain),
        "methods": lambda: methods.measure(
            STORE, options.domain, sizes(methods.CALIBRATION_TOKENS, methods.TEST_TOKENS)
        ),
        "mix": lambda: mix.measure(STORE, options.domain, sizes(mix.CALIBRATION_TOKENS, mix.TEST_TOKENS)),
        "peers": lambda: peers.measure(STORE, options.domain, sizes(peers.CALIBRATION_TOKENS, peers.TEST_TOKENS)),
    }
    STORE.mkdir(parents=True, exist_ok=True)
    for name, measure in parts.items():
        file = STORE / f"{name}.md"
        wanted = name == options.only if options.only else name not in ON_REQUEST
        if not wanted or (file.is_file() and not options.again):
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
