"""What a second process brings: calibration by two processes of one thread each against one process of one thread.

    python benchmarks/parallel.py [--rounds 4] [--tokens 4096]

Both run in turn, so that what else the machine does meets both alike. Seconds are those of whole stages in the run
folder's manifest, and so hold the writing and the merging of shares. The text that is timed is the second one of the
run, when the model is loaded in every process.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.demo import demo_recipe, prepare
from secateur.store.artifacts import read_json


def seconds(recipe: Path, output: Path, processes: int) -> tuple[float, float]:
    """Return the seconds of the second text's stage, and tokens per second of its passes."""
    shutil.rmtree(output, ignore_errors=True)
    launch = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)] if processes > 1 else []
    )
    subprocess.run(
        [sys.executable, *launch, "-m", "secateur", "calibrate", str(recipe), "-o", str(output), "-q"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    stages = read_json(output / "manifest.json")["stages"]
    name = [stage for stage in stages if stage.startswith("calibrate:")][-1]
    stage = stages[name]
    bucket = read_json(output / "statistics" / f"{name.removeprefix('calibrate:')}.json")
    return stage["seconds"], bucket["tokens_per_s"]


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4096)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        place = Path(work)
        data = demo_recipe(prepare(), place / "run")
        spec = data.calibrate.model_copy(update={"max_tokens": asked.tokens, "batch_size": 2})
        plain = data.prune.model_copy(update={"method": "activation_norm", "options": {}, "reconstruct": "none"})
        recipe = place / "recipe.yml"
        recipe.write_text(
            data.model_copy(update={"calibrate": spec, "recover": None, "export": [], "prune": plain}).to_yaml()
        )
        rounds = []
        for _ in range(asked.rounds):
            rounds.append([seconds(recipe, place / "run", processes) for processes in (1, 2)])
            print(f"one process, two processes (seconds, tokens/s): {rounds[-1]}", file=sys.stderr, flush=True)
    one, two = ([pair[which] for pair in rounds] for which in (0, 1))
    ratios = sorted(a[0] / b[0] for a, b in rounds)
    print(
        json.dumps(
            {
                "tokens": asked.tokens,
                "load": os.getloadavg(),
                "one_seconds": [s for s, _ in one],
                "two_seconds": [s for s, _ in two],
                "one_tokens_per_s": [round(speed) for _, speed in one],
                "two_tokens_per_s": [round(speed) for _, speed in two],
                "ratio_median": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    )


if __name__ == "__main__":
    main()
