"""Masks and recovery at equal training tokens: a quarter of the FFN channels goes, the same number in every layer.

    python benchmarks/masks.py [--training-tokens 65536]
    python benchmarks/masks.py --domain 'NAME=CALIBRATION,VALIDATION,TEST::TEMPLATE' --rows "masks with LoRA"

Every row trains on as many tokens of the same text, in masks, in recovery, or half in each, and is measured on the
same test text. Rows share a run folder, so the dense model is calibrated and measured once. Finished rows are kept: a
stopped run goes on, and another run prints the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from peers import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import Evaluation, paired_difference
from secateur.report.tables import with_error
from secateur.store.artifacts import digest, read_json, write_json

TRAINING_TOKENS, CALIBRATION_TOKENS, TEST_TOKENS, BLOCK_SIZE = 65_536, 32_768, 16_384, 512
BUDGET = {"channels": 0.25}
LORA = {"rank": 16, "alpha": 32}
RECOVER = {
    "method": "finetune",
    "lora": LORA,
    "learning_rate": 1e-3,
    "batch_size": 2,
    "baselines": [],
    "evaluations": 2,
}


@dataclass(frozen=True, slots=True)
class _Way:
    """How a row spends its tokens.

    Attributes:
        masks: share of them that masks are trained on; 0 chooses by ``activation_norm``, which trains nothing.
        lora: whether adapters are trained beside the masks.
    """

    masks: float
    lora: bool = False

    def sections(self, tokens: int, block_size: int) -> dict[str, Any]:
        """Return the sections of the recipe that differ between rows."""
        on_masks = int(tokens * self.masks)
        found: dict[str, Any] = {"prune": {"method": "activation_norm", "budget": BUDGET}}
        if on_masks:
            options = {"target": BUDGET["channels"], "steps": max(1, on_masks // block_size)}
            lora = {**LORA, "learning_rate": RECOVER["learning_rate"]} if self.lora else False
            found["prune"] |= {"method": "learned_mask", "options": {**options, "lora": lora}}
        if tokens > on_masks:
            found["recover"] = {**RECOVER, "max_tokens": tokens - on_masks}
        return {**found, "gradient_tokens": max(on_masks, block_size)}


WAYS: Mapping[str, _Way] = {
    "masks with LoRA": _Way(1.0, lora=True),
    "masks with LoRA, then recovered": _Way(0.5, lora=True),
    "masks, then recovered": _Way(0.5),
    "activation norm, recovered": _Way(0.0),
}


class _Bench:
    def __init__(self, store: Path, options: argparse.Namespace) -> None:
        demo = demo_recipe(prepare(), store / "unused") if options.model is None or options.general is None else None
        name, corpus = parse_domain(options.domain[-1]) if options.domain else ("medical", None)
        spec = corpus or (demo and demo.domain["medical"])
        general = parse_domain(f"general={options.general}")[1] if options.general else demo and demo.general
        assert isinstance(spec, CorpusSpec) and isinstance(general, CorpusSpec)
        self.name, self.tokens, self.options = name, options.training_tokens, options
        sizes = options.training_tokens, options.calibration_tokens, options.test_tokens, options.block_size
        self.recipe: dict[str, Any] = {
            "model": options.model or (demo and demo.model),
            "domain": {name: spec.model_dump(exclude_defaults=True)},
            "general": general.model_dump(exclude_defaults=True),
            "calibrate": {
                "max_tokens": options.calibration_tokens,
                "block_size": options.block_size,
                "buckets": [name],
            },
            "evaluate": {"max_tokens": options.test_tokens, "controls": []},
        }
        self.folder = store / "masks" / f"{name}-{digest(self.recipe, sizes)[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)

    def row(self, title: str, way: _Way) -> dict[str, Any]:
        """Return what a run measured; run once, then read back."""
        sections = way.sections(self.tokens, self.options.block_size)
        file = self.folder / f"{''.join(c if c.isalnum() else '_' for c in title)}-{digest(sections)[:8]}.json"
        if not file.is_file():
            if "recover" in sections:
                sections["recover"]["evaluation_tokens"] = min(4096, self.options.test_tokens)
            calibrate = {**self.recipe["calibrate"], "gradient_tokens": sections.pop("gradient_tokens")}
            recipe = {**self.recipe, **sections, "calibrate": calibrate, "output": str(self.folder / "run")}
            result = secateur.run(recipe)
            assert result.evaluation is not None
            data = {
                "summary": result.summary,
                "evaluation": result.evaluation.to_dict(),
                "seconds": _training_seconds(self.folder / "run"),
            }
            write_json(file, data)
            print(f"{title}: {result.summary}", flush=True)
        return dict(read_json(file))


def _training_seconds(run: Path) -> float:
    """Return how long the masks and the recovery of the run took that was the last in a folder."""
    stages = read_json(run / "manifest.json")["stages"]
    recipe = (run / "recipe.yml").read_text("utf-8")
    counted = [name for name in stages if name.startswith("masks:") and "learned_mask" in recipe]
    counted += ["recover:recovered"] if "\nrecover:" in recipe and "recover:recovered" in stages else []
    return sum(float(stages[name]["seconds"]) for name in counted)


def _ratio(found: Evaluation, bucket: str, name: str) -> str:
    difference = paired_difference(found.models[name].text[bucket], found.models["dense"].text[bucket])
    ratio = math.exp(min(difference.mean, 50.0))
    return with_error(ratio, ratio * difference.stderr)


def measure(store: Path, options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    bench = _Bench(store, options)
    lines = [
        f"### Masks and recovery at equal tokens ({bench.name})",
        "",
        f"25 % of the FFN channels go, the same number in every layer; {bench.tokens:,} training tokens, in masks,",
        f"recovery or both; {options.test_tokens:,} test tokens of each text; perplexity over dense, ± one standard",
        "error of the pair.",
        "",
        "| way | tokens of masks | of recovery | parameters | domain / dense | general / dense | training |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, way in WAYS.items():
        if options.rows and title not in options.rows:
            continue
        data = bench.row(title, way)
        found, on_masks = Evaluation.from_dict(data["evaluation"]), int(bench.tokens * way.masks)
        name = "recovered" if "recovered" in found.models else "pruned"
        lines.append(
            f"| {title} | {on_masks:,} | {bench.tokens - on_masks:,} | {found.models[name].total_parameters:,} | "
            f"{_ratio(found, bench.name, name)} | {_ratio(found, 'general', name)} | {data['seconds']:.0f} s |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="by default the demo's")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH[,[VALIDATION,]TEST][::TEMPLATE]")
    parser.add_argument("--general", metavar="PATH[::TEMPLATE]", help="by default the demo's")
    parser.add_argument("--training-tokens", type=int, default=TRAINING_TOKENS)
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--test-tokens", type=int, default=TEST_TOKENS)
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    parser.add_argument("--rows", action="append", choices=list(WAYS), metavar="TITLE")
    parser.add_argument("--store", type=Path, default=Path(__file__).resolve().parent.parent / "runs" / "bench")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    print(measure(options.store, options))


if __name__ == "__main__":
    main()
