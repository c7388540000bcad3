"""How fast pruned models run in llama.cpp, beside the dense one, in one process and in turn; and what export takes.

    python benchmarks/engines.py                     all sizes, F16 and Q8_0
    python benchmarks/engines.py --type Q8_0 --rounds 6 --threads 1

Needs xllamacpp (`pip install secateur[llama-cpp]`). Speed hangs on shapes alone, so the models are cut by magnitude:
what they say is worth nothing. Each round runs every model once, in another order each time; a ratio is the median of
the rounds' ratios to the dense model, with the smallest and the largest.
"""

from __future__ import annotations

import argparse
import importlib
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from secateur import pipeline
from secateur.demo import demo_recipe, prepare
from secateur.export.gguf import export_gguf
from secateur.export.llama_cpp import verify_in_llama_cpp
from secateur.recipe import parse_recipe
from secateur.store.checkpoints import Checkpoint, resolve_model

PROMPT_TOKENS, NEW_TOKENS = 256, 48
PROMPTS = ("The patient was admitted to hospital with", "Question: What causes anaemia?\nAnswer:")
_GROUPS = {"units": ["ffn_channel", "gqa_group", "vocabulary"], "vocabulary": {"size": 16_512}}
MODELS: Mapping[str, Mapping[str, Any]] = {
    "channels": {"budget": {"parameters": 0.10}, "multiple_of": 32},
    "channels, uneven": {"budget": {"parameters": 0.10}, "multiple_of": 32, "shape": "uneven"},
    "channels and vocabulary": {
        "units": ["ffn_channel", "vocabulary"],
        "vocabulary": {"size": 16_512},
        "budget": {"parameters": 0.25},
        "multiple_of": 32,
    },
    "channels, heads and vocabulary": {**_GROUPS, "budget": {"parameters": 0.419}, "multiple_of": 32},
}
"""The ``prune`` section by what goes."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What speed should hang on.

    Attributes:
        parameters: in all.
        prefill: multiplications and additions for ``PROMPT_TOKENS`` tokens, the head for the last one alone.
    """

    parameters: int
    prefill: int

    @staticmethod
    def of(checkpoint: Checkpoint) -> Shape:
        """Count from the shapes of the weights; attention sees half of the prompt on average."""
        matrices = {name: shape for name, shape in checkpoint.shapes.items() if len(shape) == 2}
        embedding = sum(shape[0] * shape[1] for name, shape in matrices.items() if "embed_tokens" in name)
        inside = sum(shape[0] * shape[1] for name, shape in matrices.items() if ".layers." in name)
        queries = sum(shape[0] for name, shape in matrices.items() if name.endswith("q_proj.weight"))
        attention = 2 * queries * PROMPT_TOKENS // 2
        total = sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values())
        return Shape(total, 2 * (PROMPT_TOKENS * (inside + attention) + embedding))


class _Engine:
    """One GGUF file, loaded in this process."""

    def __init__(self, file: Path, threads: int, num_ids: int) -> None:
        xllamacpp: Any = importlib.import_module("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(file)
        parameters.n_ctx = PROMPT_TOKENS + NEW_TOKENS + 16
        parameters.n_parallel = 1
        parameters.n_gpu_layers = 0
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(parameters)
        self._num_ids = num_ids

    def speeds(self, seed: int) -> tuple[float, float]:
        """Return tokens per second of reading a prompt and of writing on, as llama.cpp times them."""
        numbers = random.Random(seed)
        prompt = [numbers.randrange(32, self._num_ids) for _ in range(PROMPT_TOKENS)]
        answer = self._server.handle_completions(
            {"prompt": prompt, "n_predict": NEW_TOKENS, "ignore_eos": True, "temperature": 0.0, "cache_prompt": False}
        )
        timings = answer["timings"]
        return timings["prompt_per_second"], timings["predicted_per_second"]


def _folders(store: Path) -> dict[str, Path]:
    """Return the model folders by title, the dense one first; cut once."""
    demo = demo_recipe(prepare(), store / "unused")
    folders = {"dense": resolve_model(demo.model).folder}
    shared = demo.model_dump(exclude_none=True, include={"model", "domain", "general"})
    for title, prune in MODELS.items():
        folder = store / "".join(c if c.isalnum() else "_" for c in title)
        recipe = {
            **shared,
            "prune": {"method": "magnitude", **prune},
            "calibrate": {"max_tokens": 2048, "buckets": ["medical"]},
            "output": str(folder),
        }
        folders[title] = folder / "model"
        if not (folders[title] / "config.json").is_file():
            pipeline.run(parse_recipe(recipe), until="shrink")
    return folders


def _ratio(ours: Sequence[float], dense: Sequence[float]) -> tuple[float, str]:
    ratios = [a / b for a, b in zip(ours, dense, strict=True)]
    middle = statistics.median(ratios)
    return middle, f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def measure(store: Path, types: Sequence[str], rounds: int, threads: int) -> str:
    """Return the table as Markdown.

    Args:
        store: where models and files are kept.
        types: GGUF types.
        rounds: of all models in turn.
        threads: that llama.cpp may use.
    """
    folders = _folders(store)
    shapes = {title: Shape.of(resolve_model(str(folder))) for title, folder in folders.items()}
    lines = [
        f"### Speed in llama.cpp (SmolLM2-135M-Instruct, {threads} threads, {rounds} rounds)",
        "",
        f"{PROMPT_TOKENS} tokens read, {NEW_TOKENS} written, one sequence. Speed-ups over the dense model, median of",
        "rounds in turn (smallest to largest); *of what size promises*: decoding over the ratio of the files' sizes,",
        "prefill over the ratio of arithmetic. Seconds: writing the file, reading it back, running it in llama.cpp.",
        "",
        "| what goes | type | parameters | file | seconds | decoding | of what size promises | prefill | of what "
        "arithmetic promises |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in types:
        files, seconds = {}, {}
        for title, folder in folders.items():
            started = time.perf_counter()
            files[title] = store / f"{folder.parent.name if title != 'dense' else 'dense'}.{kind}.gguf"
            export_gguf(folder, files[title], quantize=kind)
            if title != "dense":  # what is cut by magnitude has logits far apart; its agreement is not judged here
                _verify(files[title], folder)
            seconds[title] = time.perf_counter() - started
        engines = {title: _Engine(file, threads, _num_ids(folders[title])) for title, file in files.items()}
        times: dict[str, list[tuple[float, float]]] = {title: [] for title in engines}
        for number in range(rounds + 1):
            order = list(engines)
            random.Random(number).shuffle(order)
            for title in order:
                speeds = engines[title].speeds(number)
                if number:  # the first round warms up
                    times[title].append(speeds)
        lines += _rows(kind, times, files, shapes, seconds)
        del engines
    return "\n".join([*lines, ""])


def _verify(file: Path, folder: Path) -> None:
    try:
        verify_in_llama_cpp(file, folder, list(PROMPTS))
    except Exception as error:  # the time is what is wanted here
        print(f"{file.name}: {error}", flush=True)


def _num_ids(folder: Path) -> int:
    return next(shape[0] for name, shape in resolve_model(str(folder)).shapes.items() if "embed_tokens" in name)


def _rows(
    kind: str,
    times: Mapping[str, Sequence[tuple[float, float]]],
    files: Mapping[str, Path],
    shapes: Mapping[str, Shape],
    seconds: Mapping[str, float],
) -> list[str]:
    rows, dense, size = [], times["dense"], files["dense"].stat().st_size
    for title, speeds in times.items():
        decoding, told = _ratio([s[1] for s in speeds], [s[1] for s in dense])
        prefill, also = _ratio([s[0] for s in speeds], [s[0] for s in dense])
        own = files[title].stat().st_size
        cells = [
            title,
            kind,
            f"{shapes[title].parameters:,}",
            f"{own / 1e6:.1f} MB",
            f"{seconds[title]:.0f}",
            told,
            f"{decoding / (size / own):.2f}",
            also,
            f"{prefill / (shapes['dense'].prefill / shapes[title].prefill):.2f}",
        ]
        if title == "dense":
            reads, writes = (statistics.median(s[i] for s in speeds) for i in (0, 1))
            cells[5:] = [f"{writes:.1f} tokens/s", "", f"{reads:.0f} tokens/s", ""]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--type", action="append", metavar="TYPE")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    store = Path(__file__).resolve().parent.parent / "runs" / "bench" / "engines"
    store.mkdir(parents=True, exist_ok=True)
    print(measure(store, options.type or ["F16", "Q8_0"], options.rounds, options.threads))


if __name__ == "__main__":
    main()
