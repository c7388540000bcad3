"""Three dimensions and no training: a quarter of the blocks' parameters goes, by Cus-Prun and by baselines.

    python examples/taiwan_legal/prepare.py
    python benchmarks/dimensions.py [--questions law=questions.jsonl]
    python benchmarks/dimensions.py --language 'zh=PATH::{text}' --domain 'law=PATH' --task 'qa=PATH::TEMPLATE' \
        --expert 'expert=PATH::TEMPLATE' --general PATH --questions NAME=PATH

Every method calibrates on the same tokens of the same three texts: ``cus_prun`` keeps them apart, the others pool them.
Widths lose FFN channels and GQA groups, the same number in every layer; depth loses whole layers, so that its size is
only nearly the same. Measured are the text of the expert itself, which has no say in what goes, general text, and
multiple-choice questions. Finished rows are kept: a stopped run goes on, and another run prints the table.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peers import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.families.geometry import parameters_by_part
from secateur.records.evaluation import Evaluation, ModelScore, paired_difference
from secateur.report.tables import with_error
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.checkpoints import resolve_model

SHARE = 0.25
CALIBRATION_TOKENS, TEST_TOKENS, BLOCK_SIZE = 32_768, 16_384, 512
CORPORA = {
    "language": "chinese=corpus/zh-hant.jsonl::{text}",
    "domain": "law=corpus/law.jsonl::{text}",
    "task": "questions=corpus/questions.jsonl::Question: {question}\\nAnswer: {answer}",
    "expert": "expert=corpus/zh-hant-law-questions.jsonl::Question: {question}\\nAnswer: {answer}",
}
"""By default those of ``examples/taiwan_legal``."""
DIMENSIONS = ("language", "domain", "task")
_WIDTHS = {"units": ["ffn_channel", "gqa_group"]}
ROWS: Mapping[str, Mapping[str, Any]] = {
    "cus_prun, three dimensions": {**_WIDTHS, "method": "cus_prun"},
    "cus_prun, three dimensions, mean rank": {**_WIDTHS, "method": "cus_prun", "options": {"relevance": "mean_rank"}},
    "fluctuation (FLAP)": {**_WIDTHS, "method": "fluctuation"},
    "taylor": {**_WIDTHS, "method": "taylor"},
    "block influence, depth (ShortGPT)": {"units": ["layer"], "depth_method": "block_influence"},
    "random": {**_WIDTHS, "method": "random"},
}
"""The ``prune`` section by the name of the row; the budget is the same for all."""


class _Bench:
    def __init__(self, store: Path, options: argparse.Namespace) -> None:
        texts = {role: parse_domain(getattr(options, role)) for role in (*DIMENSIONS, "expert")}
        self.model: str = options.model or demo_recipe(prepare(), store / "unused").model
        self.expert = texts["expert"][0]
        self.dimensions = {role: [texts[role][0]] for role in DIMENSIONS}
        self.buckets = [texts[role][0] for role in DIMENSIONS]
        self.recipe = {
            "model": self.model,
            "domain": {name: spec.model_dump(exclude_defaults=True) for name, spec in texts.values()},
            "general": parse_domain(f"general={options.general}")[1].model_dump(exclude_defaults=True),
            "calibrate": {
                "max_tokens": options.calibration_tokens,
                "gradient_tokens": options.calibration_tokens,
                "block_size": options.block_size,
                "buckets": self.buckets,
            },
            "evaluate": {
                "max_tokens": options.test_tokens,
                "controls": [],
                "choices": {
                    name: {"path": spec.path, "max_items": options.items}
                    for name, spec in map(parse_domain, options.questions)
                },
            },
        }
        self.folder = store / "dimensions" / digest(self.recipe)[:8]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.share = SHARE * self._share_of_blocks()

    def _share_of_blocks(self) -> float:
        checkpoint = resolve_model(self.model)
        parts = parameters_by_part(checkpoint.shapes, checkpoint.geometry)
        return sum(parts.get(part, 0) for part in ("attention", "ffn")) / sum(parts.values())

    def row(self, title: str) -> dict[str, Any]:
        """Return what a run measured; run once, then read back."""
        section = dict(ROWS[title])
        if section.get("method") == "cus_prun":
            section["options"] = {**section.get("options", {}), "dimensions": self.dimensions}
        prune = {**section, "buckets": self.buckets, "budget": {"parameters": round(self.share, 6)}}
        file = self.folder / f"{digest(title, prune)[:8]}.json"
        if not file.is_file():
            result = secateur.run({**self.recipe, "prune": prune, "output": str(self.folder / "run")})
            assert result.evaluation is not None
            write_json(file, {"title": title, "evaluation": result.evaluation.to_dict()})
            print(f"{title}: {result.summary}", flush=True)
        return dict(read_json(file))


def _ratio(model: ModelScore, dense: ModelScore, bucket: str) -> str:
    difference = paired_difference(model.text[bucket], dense.text[bucket])
    ratio = math.exp(min(difference.mean, 50.0))
    return with_error(ratio, ratio * difference.stderr)


def _cells(name: str, model: ModelScore, dense: ModelScore, texts: Sequence[str]) -> str:
    cells = [name, f"{model.total_parameters:,}", f"{1 - model.total_parameters / dense.total_parameters:.1%}"]
    for text in texts:
        cells += [f"{model.text[text].perplexity:,.2f}", _ratio(model, dense, text)]
    cells += [with_error(100 * score.acc_norm, 100 * score.acc_norm_stderr) for score in model.choices.values()]
    return f"| {' | '.join(cells)} |"


def measure(store: Path, options: argparse.Namespace) -> str:
    """Return the table as Markdown."""
    bench = _Bench(store, options)
    texts = [bench.expert, "general"]
    found = {
        title: Evaluation.from_dict(bench.row(title)["evaluation"])
        for title in ROWS
        if not options.rows or title in options.rows
    }
    dense = next(iter(found.values())).models["dense"]
    head = ["row", "parameters", "gone"]
    for text in texts:
        head += [f"{text}: perplexity", "/ dense"]
    head += [f"{name}: right answers, %" for name in dense.choices]
    lines = [
        f"{SHARE:.0%} of the blocks' parameters, without training; {options.calibration_tokens:,} calibration tokens "
        f"of each of {', '.join(bench.buckets)}, up to {options.test_tokens:,} test tokens of each text; ± one "
        "standard error. Perplexity is per token: the ratio compares models of one tokenizer.",
        "",
        f"| {' | '.join(head)} |",
        f"|---|{'---:|' * (len(head) - 1)}",
        _cells("dense", dense, dense, texts),
    ]
    lines += [_cells(title, evaluation.models["pruned"], dense, texts) for title, evaluation in found.items()]
    for text in texts:
        lines.append(f"\n{text}, dense: {dense.text[text].bits_per_byte:.3f} bits/byte")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="by default the demo's")
    for role, corpus in CORPORA.items():
        parser.add_argument(f"--{role}", default=corpus, metavar="NAME=PATH[,[VALIDATION,]TEST][::TEMPLATE]")
    parser.add_argument("--general", default="corpus/general.txt", metavar="PATH[::TEMPLATE]")
    parser.add_argument("--questions", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--items", type=int, default=500, help="questions of each set, at most")
    parser.add_argument("--calibration-tokens", type=int, default=CALIBRATION_TOKENS)
    parser.add_argument("--test-tokens", type=int, default=TEST_TOKENS)
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE)
    parser.add_argument("--rows", action="append", choices=list(ROWS), metavar="TITLE")
    parser.add_argument("--store", type=Path, default=Path(__file__).resolve().parent.parent / "runs" / "bench")
    options = parser.parse_args(arguments)
    print(measure(options.store, options))


if __name__ == "__main__":
    main()
