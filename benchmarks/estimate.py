"""Compare what ``secateur estimate`` predicts with what a run takes, stage by stage, on a machine that may be busy.

    OMP_NUM_THREADS=1 python benchmarks/estimate.py RECIPE.yml [RECIPE.yml ...] --output runs/estimate

Every recipe is estimated, run once, and compared. Processor seconds are compared, which other programs on the machine
change little; for that the probe reads the processor's clock too. The run's processor seconds and its most resident
memory are read from /proc whenever a stage is added to the manifest (Linux only), and the mark of the memory is then
put back, so that each stage has its own. What was measured is kept beside the run folder and used again. One thread
is needed: waiting threads would count as work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

_CLOCK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Measured:
    """What one stage took: processor and wall seconds, and the most resident bytes in it."""

    cpu_s: float
    wall_s: float
    peak_bytes: int


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _CLOCK


def most_resident(pid: int) -> int:
    """Return the most resident memory since the mark was put back, and put it back."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    found = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    Path(f"/proc/{pid}/clear_refs").write_text("5", encoding="utf-8")
    return 1024 * found


def watch(recipe: Path, output: Path) -> dict[str, Measured]:
    """Run a recipe and return what each stage took, by its name in the manifest; ``report`` is the end of the run."""
    process = subprocess.Popen(
        [sys.executable, "-m", "secateur", "run", str(recipe), "-q", "-o", str(output)], stdout=subprocess.DEVNULL
    )
    found: dict[str, Measured] = {}
    seen: set[str] = set()
    cpu, wall, begun = 0.0, time.perf_counter(), False
    now = cpu

    def close(name: str) -> None:
        nonlocal cpu, wall
        found[name] = Measured(now - cpu, time.perf_counter() - wall, peak)
        cpu, wall = now, time.perf_counter()

    peak = 0
    while process.poll() is None:
        time.sleep(0.03)
        try:
            now = cpu_seconds(process.pid)
            stages = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["stages"]
        except (OSError, ValueError, KeyError):
            continue
        new = [name for name in stages if name not in seen]
        if not begun or new:
            peak = most_resident(process.pid)
        if not begun:
            close("start and tokenize")
            begun = True
        if new:
            seen |= set(new)
            close(new[-1])
    close("report")
    for name in [name for name in found if name.endswith(":calibration")]:  # the same pass as the statistics
        _, bucket, _ = name.split(":")
        part, whole = found.pop(name), found[f"calibrate:{bucket}"]
        most = max(part.peak_bytes, whole.peak_bytes)
        found[f"calibrate:{bucket}"] = Measured(part.cpu_s + whole.cpu_s, part.wall_s + whole.wall_s, most)
    if process.returncode:
        raise SystemExit(f"{recipe} ended with exit code {process.returncode}")
    return found


def compare(recipe: Path, output: Path) -> list[str]:
    """Return the rows of one recipe."""
    from secateur.estimate import estimate
    from secateur.recipe import load_recipe

    predicted = estimate(load_recipe(recipe, {"output": str(output)}), clock=time.process_time)
    kept = output.with_suffix(".measured.json")
    if not kept.is_file():
        kept.write_text(json.dumps({name: asdict(took) for name, took in watch(recipe, output).items()}))
    measured = {name: Measured(**took) for name, took in json.loads(kept.read_text()).items()}
    rows, totals = [], [0.0, 0.0, 0.0]
    for stage in predicted.stages:
        took = measured.get(stage.name)
        if took is None or stage.seconds is None:
            continue
        totals = [totals[0] + stage.seconds, totals[1] + took.cpu_s, totals[2] + took.wall_s]
        rows.append(_row(recipe.stem, stage.name, stage.seconds, took, stage.peak_bytes))
    most = max(took.peak_bytes for took in measured.values())
    rows.append(_row(recipe.stem, "**in all**", totals[0], Measured(totals[1], totals[2], most), predicted.peak_bytes))
    disk = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    left = sum(stage.disk_bytes for stage in predicted.stages)
    rows.append(
        f"| {recipe.stem} | disk that stays, MB | {left / 1e6:,.0f} | {disk / 1e6:,.0f} | {left / disk:.2f} | | | | |"
    )
    return rows


def _row(recipe: str, name: str, seconds: float, took: Measured, peak: int) -> str:
    return (
        f"| {recipe} | {name} | {seconds:.1f} | {took.cpu_s:.1f} | {seconds / max(took.cpu_s, 0.01):.2f} "
        f"| {took.wall_s:.0f} | {peak / 1e9:.2f} | {took.peak_bytes / 1e9:.2f} | {peak / took.peak_bytes:.2f} |"
    )


def main() -> None:
    """Print one table of all recipes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("runs/estimate"))
    arguments = parser.parse_args()
    head = "recipe|stage|predicted s|processor s|ratio|wall s|predicted GB|most resident GB|ratio"
    print("| " + " | ".join(head.split("|")) + " |\n|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for recipe in arguments.recipes:
        print("\n".join(compare(recipe, arguments.output / recipe.stem)), flush=True)


if __name__ == "__main__":
    main()
