"""What calibration, evaluation and planning cost, against plain forward passes in the same interleaved run."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur import pipeline
from secateur.calibrate import collect
from secateur.corpus import load_split
from secateur.demo import demo_recipe, prepare
from secateur.evaluate import evaluate_text
from secateur.recipe import Recipe, parse_recipe
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model
from secateur.stream.forward import run_backbone, run_logits

ROUNDS = 12
TOKENS = 2048


def _recipe(output: Path, **changes: Any) -> Recipe:
    data = demo_recipe(prepare(), output).model_dump(exclude_none=True)
    data["prune"] = {"budget": {"channels": 0.1}}
    for key, value in changes.items():
        data[key] = {**data[key], **value}
    return parse_recipe(data)


def _setup(split: str = "calibration") -> tuple[Any, Any, Any]:
    recipe = _recipe(Path("runs/unused"))
    checkpoint = resolve_model(recipe.model)
    blocks = load_split(
        recipe.domain["medical"], split, load_tokenizer(checkpoint), block_size=512, max_tokens=TOKENS, name="medical"
    )
    return load_model(checkpoint), blocks, checkpoint.geometry


def _plain(model: Any, blocks: Any, geometry: Any, run: Callable[..., torch.Tensor]) -> None:
    with torch.inference_mode():
        for batch in blocks.batches(4):
            run(model, batch, geometry.family)


def _ratios(first: Callable[[], Any], second: Callable[[], Any]) -> tuple[list[float], list[float]]:
    """Return the seconds of both, in turn after a warm-up each; the jobs are short, so that noise hits both alike."""
    first(), second()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(ROUNDS):
        for job, kept in zip((first, second), times, strict=True):
            started = time.perf_counter()
            job()
            kept.append(time.perf_counter() - started)
    return times


def _row(name: str, ours: list[float], plain: list[float], target: str) -> str:
    speed = [b / a for a, b in zip(ours, plain, strict=True)]
    return (
        f"| {name} | {TOKENS / statistics.median(ours):,.0f} | {TOKENS / statistics.median(plain):,.0f} | "
        f"{statistics.median(speed):.3f} ({min(speed):.3f} to {max(speed):.3f}) | {target} |"
    )


PEAK_SCRIPT = """
import resource, sys
sys.path.insert(0, {folder!r})
import speed
model, blocks, geometry = speed._setup()
if {mode!r} == "calibrate":
    speed.collect(model, blocks, geometry, batch_size=4)
else:
    speed._plain(model, blocks, geometry, speed.run_backbone)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def _peak_kib(mode: str) -> int:
    """Return the peak resident memory of a fresh process that loads the model and does one thing."""
    script = PEAK_SCRIPT.format(folder=str(Path(__file__).parent), mode=mode)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _plan_seconds(store: Path) -> tuple[float, float]:
    """Return the seconds of a whole ``secateur plan`` process and of the planning in it, on cached statistics."""
    recipe = _recipe(store / "speed-run", calibrate={"max_tokens": TOKENS}, evaluate={"max_tokens": 4096})
    pipeline.run(recipe, until="plan")
    file = store / "speed.yml"
    file.write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "secateur", "plan", str(file), "--budget", "channels=0.25", "--json", "--quiet"]
    started = time.perf_counter()
    subprocess.run(command, capture_output=True, check=True)
    whole = time.perf_counter() - started
    manifest = json.loads((store / "speed-run" / "manifest.json").read_text())
    return whole, manifest["stages"]["plan"]["seconds"]


def measure(store: Path) -> str:
    """Return the speed table as Markdown."""
    model, blocks, geometry = _setup()
    calibration = _ratios(
        lambda: collect(model, blocks, geometry, batch_size=4), lambda: _plain(model, blocks, geometry, run_backbone)
    )
    _, test, _ = _setup("test")
    evaluation = _ratios(
        lambda: evaluate_text(model, test, geometry.family, batch_size=4),
        lambda: _plain(model, test, geometry, run_logits),
    )
    peaks = (_peak_kib("calibrate"), _peak_kib("plain"))
    whole, inner = _plan_seconds(store)
    peak_row = (
        f"| peak memory of calibration | {peaks[0] / 1024:,.0f} MiB | {peaks[1] / 1024:,.0f} MiB | "
        f"{peaks[0] / peaks[1]:.3f} | <= 1.15 |"
    )
    return "\n".join(
        [
            "### Cost of the passes (SmolLM2-135M-Instruct, float32, blocks of 512, batches of 4)",
            "",
            f"Median of {ROUNDS} interleaved rounds over the same {TOKENS:,} tokens; ratio = ours / plain per round.",
            "",
            "| what | ours | plain forward | ratio (min to max) | target |",
            "|---|---:|---:|---:|---:|",
            _row("calibration, tokens/s (plain: no logits)", *calibration, ">= 0.90"),
            _row("evaluation, tokens/s (plain: with logits)", *evaluation, ">= 0.95"),
            peak_row,
            f"| another budget from cached statistics: whole `secateur plan` process | {whole:.1f} s | | | < 5 s |",
            f"| the planning itself | {inner:.2f} s | | | |",
            "",
        ]
    )
