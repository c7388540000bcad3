"""Quality at 10 % of FFN channels: methods against controls, across domains; and what the paper's thresholds remove."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vocabulary import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.errors import PlanError
from secateur.recipe import THRESHOLD_PRESETS
from secateur.records.evaluation import TextScore, paired_difference
from secateur.records.plan import Plan
from secateur.records.statistics import Statistics
from secateur.report.tables import with_error
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

CALIBRATION_TOKENS, TEST_TOKENS = 32_768, 8_192
BUDGET = {"channels": 0.10}


@dataclass(frozen=True, slots=True)
class Row:
    """One pruned model to measure: which text it was judged on, and how."""

    name: str
    calibrated_on: str
    options: Mapping[str, Any] = field(default_factory=dict)


def _rows(domains: Sequence[str]) -> list[Row]:
    first = domains[0]
    return [
        *(Row(f"contextual, calibrated on {name}", name) for name in domains),
        Row("contextual at linear", first, {"options": {"at": "linear"}}),
        Row("contextual, uneven (global ranking)", first, {"shape": "uneven", "normalize": "none"}),
        Row("contextual, uneven (standardised per layer)", first, {"shape": "uneven"}),
        Row("magnitude", first, {"method": "magnitude"}),
        *(Row(f"random, seed {seed}", first, {"method": "random", "seed": seed}) for seed in range(2)),
        Row("reversed contextual", first, {"method": "reversed"}),
    ]


class _Bench:
    def __init__(self, store: Path, extra: Sequence[str]) -> None:
        recipe = demo_recipe(prepare(), store / "unused")
        assert recipe.general is not None
        self.domains = {"medical": recipe.domain["medical"], "encyclopedia": recipe.general}
        self.domains |= dict(map(parse_domain, extra))
        self.store = store / "quality"
        self.store.mkdir(parents=True, exist_ok=True)
        self.checkpoint = resolve_model(recipe.model)
        self.model = load_model(self.checkpoint)
        self.tokenizer = load_tokenizer(self.checkpoint)

    def statistics(self) -> Statistics:
        return secateur.calibrate(self.model, self.tokenizer, self.domains, max_tokens=CALIBRATION_TOKENS)

    def scores(self, name: str, model: Any, exclude: Statistics) -> dict[str, TextScore]:
        """Return the row's scores on every domain; measured once, then read back."""
        found = {}
        for domain, spec in self.domains.items():
            file = self.store / f"{name.replace(' ', '_').replace(',', '')}--{domain}.json"
            if not file.is_file():
                score = secateur.evaluate(model, self.tokenizer, spec, exclude=exclude, max_tokens=TEST_TOKENS)
                file.write_text(json.dumps(asdict(score)))
                print(f"{name} on {domain}: perplexity {score.perplexity:.2f}", flush=True)
            data = json.loads(file.read_text())
            for key in ("document_nll", "document_tokens", "document_bytes"):
                data[key] = tuple(data[key])
            found[domain] = TextScore(**data)
        return found

    def plan(self, statistics: Statistics, row: Row) -> Plan:
        options = {"method": "contextual", **row.options}
        return secateur.plan(self.model, statistics, budget=BUDGET, buckets=[row.calibrated_on], **options)


def _cells(scores: Mapping[str, TextScore], dense: Mapping[str, TextScore]) -> str:
    cells = []
    for domain, score in scores.items():
        difference = paired_difference(score, dense[domain])
        ratio = math.exp(difference.mean)
        perplexity = with_error(score.perplexity, score.perplexity_stderr)
        cells.append(f"{perplexity} | {ratio:.3f} ± {ratio * difference.stderr:.3f}")
    return " | ".join(cells)


def _threshold_rows(bench: _Bench, statistics: Statistics) -> list[str]:
    rows = []
    for at in ("activation", "linear"):
        for name, epsilon in THRESHOLD_PRESETS.items():
            try:
                plan = secateur.plan(
                    bench.model,
                    statistics,
                    budget={"threshold": epsilon},
                    buckets=["medical"],
                    shape="uneven",
                    multiple_of=1,
                    options={"at": at},
                )
                gone = sum(layer.num_removed for layer in plan.layers["ffn_channel"])
                total = sum(layer.num_units for layer in plan.layers["ffn_channel"])
                share = f"{gone:,} of {total:,} | {gone / total:.1%} | {1 - plan.total_pruned / plan.total_dense:.1%}"
            except PlanError:
                share = "0 | 0.0% | 0.0%"
            rows.append(f"| {at} | {name}: {epsilon:g} | {share} |")
    return rows


def measure(store: Path, extra: Sequence[str]) -> str:
    """Return the quality tables as Markdown."""
    bench = _Bench(store, extra)
    statistics = bench.statistics()
    dense = bench.scores("dense", bench.model, statistics)
    heads = " | ".join(f"{domain} perplexity | / dense" for domain in bench.domains)
    lines = [
        "### 10 % of FFN channels, no training (SmolLM2-135M-Instruct)",
        "",
        f"{CALIBRATION_TOKENS:,} calibration tokens of one domain, up to {TEST_TOKENS:,} test tokens of each; ± one "
        "standard error over documents, paired with the dense model in the ratio. Every pruned row has the same",
        "number of parameters, but for the rounding of the uneven one. Rows name the text that was calibrated on; the",
        f"methods below the first {len(bench.domains)} pruned rows were calibrated on medical.",
        "",
        f"| model | parameters | {heads} |",
        "|---|---:|" + "---:|---:|" * len(bench.domains),
        f"| dense | {sum(p.numel() for p in bench.model.parameters()):,} | {_cells(dense, dense)} |",
    ]
    for row in _rows(list(bench.domains)):
        plan = bench.plan(statistics, row)
        scores = bench.scores(row.name, secateur.shrink(bench.model, plan), statistics)
        lines.append(f"| {row.name} | {plan.total_pruned:,} | {_cells(scores, dense)} |")
    lines += [
        "",
        "### What the paper's absolute thresholds remove here",
        "",
        "Uneven shape, medical calibration text; nothing measured but the size.",
        "",
        "| statistic | threshold | FFN channels removed | share | of all parameters |",
        "|---|---|---:|---:|---:|",
        *_threshold_rows(bench, statistics),
        "",
    ]
    return "\n".join(lines)
