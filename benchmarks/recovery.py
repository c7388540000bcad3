"""Recovery at several sizes and by several objectives: pruned and trained, beside the dense model trained alike.

    python benchmarks/recovery.py                                       all rows that are not there yet
    python benchmarks/recovery.py --rows "25 %"                         one row
    python benchmarks/recovery.py --domain 'NAME=CALIBRATION,VALIDATION,TEST::TEMPLATE'

All rows of a domain share a run folder, so the dense model is calibrated, fine-tuned (once for each way to train) and
measured there for all of them.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from peers import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import Evaluation, paired_bits_per_byte, paired_difference
from secateur.records.recovery import Recovery
from secateur.store.artifacts import digest, read_json, write_json

CALIBRATION_TOKENS, TRAINING_TOKENS, TEST_TOKENS = 32_768, 65_536, 16_384
_CUT = {"method": "kfac", "reconstruct": "pruned"}
_VOCABULARY = {"units": ["ffn_channel", "vocabulary"], "vocabulary": {"size": 16_512}}
SIZES: Mapping[str, Mapping[str, Any]] = {
    "10 %": {"units": ["vocabulary"], "budget": {"parameters": 0.10}},
    "25 %": {**_CUT, **_VOCABULARY, "budget": {"parameters": 0.25}},
    "41.9 %": {
        **_CUT,
        "units": ["ffn_channel", "gqa_group", "vocabulary"],
        "vocabulary": {"size": 16_512},
        "budget": {"parameters": 0.419},
    },
}
"""The ``prune`` section by the share of all parameters that goes."""
MIDDLE = "25 %"
"""The size at which ways to train are compared."""
TAUGHT = {"method": "distill", "distill": {"teacher": "dense_finetuned", "text_weight": 0.5, "logits_weight": 0.5}}
FINETUNE = {"method": "finetune"}
OBJECTIVES: Mapping[str, Mapping[str, Any]] = {
    "fine-tuned": FINETUNE,
    "distilled from the dense model": {"method": "distill"},
    "distilled from the fine-tuned dense model and the text": TAUGHT,
    "fine-tuned, LoRA": {**FINETUNE, "lora": True, "learning_rate": 1e-3},
    "fine-tuned, a fifth of it general text": {**FINETUNE, "replay": 0.2},
}
"""Ways to train the middle size at equal tokens."""
OPTIONS = {"learning_rate": 3e-4, "batch_size": 2, "evaluations": 3, "evaluation_tokens": 4096}


class _Bench:
    def __init__(self, store: Path, name: str, corpus: CorpusSpec | None, tokens: int) -> None:
        demo = demo_recipe(prepare(), store / "unused")
        assert demo.general is not None
        self.name, self.folder = name, store / "recovery" / f"{name}-{tokens}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.recipe = {
            "model": demo.model,
            "domain": {name: (corpus or demo.domain["medical"]).model_dump(exclude_defaults=True)},
            "general": demo.general.model_dump(exclude_defaults=True),
            "calibrate": {"max_tokens": CALIBRATION_TOKENS, "buckets": [name]},
            "evaluate": {"max_tokens": TEST_TOKENS, "controls": ["random"]},
            "output": str(self.folder / "run"),
        }
        self.tokens = tokens

    def row(self, title: str, prune: Mapping[str, Any], recover: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a run measured; run once, then read back."""
        section = {**OPTIONS, "max_tokens": self.tokens, **recover}
        name = "".join(c if c.isalnum() else "_" for c in title)
        file = self.folder / f"{name}-{digest(prune, section)[:8]}.json"
        if not file.is_file():
            result = secateur.run({**self.recipe, "prune": dict(prune), "recover": section})
            assert result.evaluation is not None
            data = {
                "summary": result.summary,
                "evaluation": result.evaluation.to_dict(),
                "recoveries": {name: recovery.to_dict() for name, recovery in result.recoveries.items()},
            }
            write_json(file, data)
            print(f"{title}: {result.summary}", flush=True)
        return dict(read_json(file))


def _exp(first: Evaluation, name: str, reference: str, bucket: str) -> str:
    if name not in first.models or reference not in first.models:
        return ""
    difference = paired_difference(first.models[name].text[bucket], first.models[reference].text[bucket])
    ratio = math.exp(min(difference.mean, 50.0))
    return f"{ratio:,.0f}" if ratio >= 100 else f"{ratio:.3f} ± {ratio * difference.stderr:.3f}"


def _bytes(first: Evaluation, name: str, reference: str, bucket: str) -> str:
    if name not in first.models or reference not in first.models:
        return ""
    scores = first.models[name].text[bucket], first.models[reference].text[bucket]
    difference, whole = paired_bits_per_byte(*scores), scores[1].bits_per_byte
    return f"{1 + difference.mean / whole:.3f} ± {difference.stderr / whole:.3f}"


COLUMNS = (
    "row",
    "parameters",
    "domain perplexity / dense",
    "/ dense fine-tuned",
    "bits/byte / dense",
    "bits/byte / dense fine-tuned",
    "general / dense",
    "tokens/s",
)
ROWS = ("dense_finetuned", "pruned", "recovered", "random", "random_recovered")


def _lines(title: str, data: Mapping[str, Any], bucket: str, rows: Sequence[str]) -> list[str]:
    evaluation = Evaluation.from_dict(data["evaluation"])
    recoveries = {name: Recovery.from_dict(recovery) for name, recovery in data["recoveries"].items()}
    lines = []
    for name in rows:
        if name not in evaluation.models:
            continue
        speed = f"{recoveries[name].tokens_per_s:,.0f}" if name in recoveries else ""
        cells = [
            f"{title}: {name.replace('_', ' ')}",
            f"{evaluation.models[name].total_parameters:,}",
            _exp(evaluation, name, "dense", bucket),
            _exp(evaluation, name, "dense_finetuned", bucket),
            _bytes(evaluation, name, "dense", bucket),
            _bytes(evaluation, name, "dense_finetuned", bucket),
            _exp(evaluation, name, "dense", "general"),
            speed,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def measure(
    store: Path, extra: Sequence[str], tokens: int = TRAINING_TOKENS, wanted: Sequence[str] | None = None
) -> str:
    """Return the tables as Markdown.

    Args:
        store: where finished rows are kept.
        extra: ``--domain`` options; the last one's text is the domain, by default the demo's.
        tokens: of domain text that is trained on, once.
        wanted: titles of the rows to run; None for all.
    """
    name, corpus = parse_domain(extra[-1]) if extra else ("medical", None)
    bench = _Bench(store, name, corpus, tokens)
    sizes, objectives = [], []
    for title, prune in SIZES.items():
        if wanted is None or title in wanted:
            sizes += _lines(title, bench.row(title, prune, TAUGHT), name, ROWS)
        for objective, recover in OBJECTIVES.items() if title == MIDDLE else ():
            if wanted is None or objective in wanted:
                row = bench.row(objective, prune, {**recover, "baselines": ["dense"]})
                objectives += _lines(objective, row, name, ("recovered",))
    head = [f"| {' | '.join(COLUMNS)} |", f"|---|{'---:|' * (len(COLUMNS) - 1)}"]
    return "\n".join(
        [
            f"### Recovery (SmolLM2-135M-Instruct, {name})",
            "",
            f"{tokens:,} tokens of training text, one pass; {TEST_TOKENS:,} test tokens of each text. Perplexity",
            "ratios are per token of the dense model, ± one standard error of the pair. *Random*: as many units, drawn",
            "at random, with the same least-squares fit and the same training. Trained by",
            f"`{TAUGHT}` and `{OPTIONS}`.",
            "",
            *head,
            *sizes,
            "",
            f"Ways to train the model that is {MIDDLE} smaller, on the same tokens:",
            "",
            *head,
            *objectives,
            "",
        ]
    )


def main() -> None:
    """Measure and print; the page of all benchmarks is left alone."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=PATH[,[VALIDATION,]TEST][::TEMPLATE]")
    parser.add_argument("--training-tokens", type=int, default=TRAINING_TOKENS)
    parser.add_argument("--rows", action="append", metavar="TITLE")
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    store = Path(__file__).resolve().parent.parent / "runs" / "bench"
    print(measure(store, options.domain, options.training_tokens, options.rows))


if __name__ == "__main__":
    main()
