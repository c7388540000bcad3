"""Every scoring method at equal size, every allocation at equal size, and the best of all units together."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vocabulary import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import (
    Evaluation,
    ModelScore,
    PairedDifference,
    TextScore,
    paired_difference,
    relative_rise,
)
from secateur.score import METHODS
from secateur.store.artifacts import read_json, write_json

CALIBRATION_TOKENS, TEST_TOKENS = 32_768, 8_192
HEADLINE_TOKENS = 16_384
"""Test tokens of each text in the tables of allocations and units, at least."""
CUTS = ((0.2, "none"), (0.2, "dense"), (0.4, "dense"))
"""Share of channels removed, and the reconstruction."""
GREEDY = {"method": "obs", "options": {"greedy": True}}
BEST = {"method": "kfac", "reconstruct": "pruned"}
"""What the rows share that compare something else."""
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "obs, greedy": GREEDY,
    "taylor, second order": {"method": "taylor", "options": {"order": "second"}},
}
"""Rows beside those of every registered method with its defaults."""

SEARCH = {"tokens": 4096, "time_limit": "15m"}
_UNEVEN = {**BEST, "shape": "uneven", "search": SEARCH}
ALLOCATIONS: Mapping[str, Mapping[str, Any]] = {
    "uniform": {**BEST, "budget": {"channels": 0.4}},
    **{
        name: {**_UNEVEN, "allocation": name, "budget": {"channels": 0.4}}
        for name in ("global", "log_increase", "block_influence", "knapsack", "search")
    },
}
_ALL = {"units": ["ffn_channel", "gqa_group", "attention", "ffn", "vocabulary"], "vocabulary": {"size": 16_512}}
TOGETHER: Mapping[str, Mapping[str, Any]] = {
    "vocabulary and channels, uniform": {
        **BEST,
        "units": ["ffn_channel", "vocabulary"],
        "vocabulary": {"size": 16_512},
        "budget": {"parameters": 0.25},
    },
    "all units, knapsack": {**_UNEVEN, **_ALL, "allocation": "knapsack", "budget": {"parameters": 0.25}},
    "all units, search": {**_UNEVEN, **_ALL, "allocation": "search", "budget": {"parameters": 0.25}},
}


@dataclass(frozen=True, slots=True)
class _Bench:
    """Runs recipes in one run folder, so that the calibration serves all, and keeps each row.

    Attributes:
        store: where rows are kept.
        domain: name of the domain's bucket.
        recipe: what all rows share.
    """

    store: Path
    domain: str
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def headline_tokens(self) -> int:
        return max(HEADLINE_TOKENS, self.recipe["evaluate"]["max_tokens"])

    def row(self, name: str, prune: Mapping[str, Any], test_tokens: int | None = None) -> Evaluation:
        """Return the measurements of a cut and of the dense model; measured once, then read back."""
        file = self.store / f"{name.replace(' ', '_').replace(',', '')}.json"
        if not file.is_file():
            tokens = test_tokens or self.recipe["evaluate"]["max_tokens"]
            options = prune.get("options", {})
            named = METHODS[prune.get("method", "activation_norm")].named_buckets(options)
            buckets = list(dict.fromkeys([self.domain, *named]))
            recipe = {
                **self.recipe,
                "calibrate": {**self.recipe["calibrate"], "buckets": buckets},
                "prune": {"buckets": [self.domain], **prune} if len(buckets) > 1 else dict(prune),
                "evaluate": {"max_tokens": tokens, "controls": []},
            }
            result = secateur.run(recipe)
            assert result.evaluation is not None
            write_json(file, {"summary": result.summary, "evaluation": result.evaluation.to_dict()})
            print(f"{name}: {result.summary}", flush=True)
        return Evaluation.from_dict(read_json(file)["evaluation"])


def _bench(store: Path, extra: Sequence[str], sizes: tuple[int, int]) -> _Bench:
    demo = demo_recipe(prepare(), store / "unused")
    assert demo.general is not None
    domains: dict[str, CorpusSpec] = {"medical": demo.domain["medical"], **dict(map(parse_domain, extra))}
    domain = list(domains)[-1]
    folder = store / "methods" / f"{domain}-{sizes[0]}-{sizes[1]}"
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": demo.model,
        "domain": {domain: domains[domain].model_dump(exclude_defaults=True)},
        "general": demo.general.model_dump(exclude_defaults=True),
        "calibrate": {"max_tokens": sizes[0], "buckets": [domain]},
        "evaluate": {"max_tokens": sizes[1]},
        "output": str(folder / "run"),
    }
    return _Bench(folder, domain, recipe)


def _method_rows() -> dict[str, Mapping[str, Any]]:
    kinds = {name: method for name, method in METHODS.items() if "ffn_channel" in method.kinds}
    rows: dict[str, Mapping[str, Any]] = {
        name: {"method": name} for name, method in kinds.items() if not method.control
    }
    controls: dict[str, Mapping[str, Any]] = {name: {"method": name} for name, m in kinds.items() if m.control}
    return {**rows, **VARIANTS, **controls}


def measure(store: Path, extra: Sequence[str], sizes: tuple[int, int] = (CALIBRATION_TOKENS, TEST_TOKENS)) -> str:
    """Return the tables of methods, allocations and units as Markdown.

    Args:
        store: where finished rows are kept.
        extra: ``--domain`` options; the last one's text is the domain, by default the demo's.
        sizes: calibration tokens, and test tokens of each text.
    """
    bench = _bench(store, extra, sizes)
    lines = _methods_table(bench, sizes) + _allocations_table(bench) + _together_table(bench)
    shutil.rmtree(bench.store / "run" / "model", ignore_errors=True)
    return "\n".join(lines)


def _methods_table(bench: _Bench, sizes: tuple[int, int]) -> list[str]:
    heads = [
        f"{ratio:.0%}{' refit' * (how != 'none')}: {text}" for ratio, how in CUTS for text in ("domain", "general")
    ]
    lines = [
        f"### Every method at equal size, no training (SmolLM2-135M-Instruct, {bench.domain})",
        "",
        "Perplexity over dense, ± one standard error of the pair, on held-out text of the domain and on the",
        f"encyclopedia ({sizes[1]:,} test tokens each). 20 % and 40 % of the FFN channels go, the same number in every",
        f"layer; {sizes[0]:,} calibration tokens of the domain. *Refit*: with `reconstruct: dense`.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name, options in _method_rows().items():
        cells = []
        for ratio, reconstruct in CUTS:
            prune = {**options, "budget": {"channels": ratio}, "reconstruct": reconstruct}
            found = bench.row(f"{name} {ratio:g} {reconstruct}", prune)
            cells += [_ratio(found, bucket) for bucket in (bench.domain, "general")]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _allocations_table(bench: _Bench) -> list[str]:
    lines = [
        "### How layers share 40 % of the FFN channels",
        "",
        "kfac, `reconstruct: pruned`; perplexity over dense, and over that of the uniform row, on",
        f"{bench.headline_tokens:,} test tokens of each text.",
        "",
        "| allocation | parameters | domain / dense | domain / uniform | general / dense |",
        "|---|---:|---:|---:|---:|",
    ]
    uniform: ModelScore | None = None
    for name, prune in ALLOCATIONS.items():
        found = bench.row(f"allocation {name}", prune, bench.headline_tokens)
        pruned = found.models["pruned"]
        uniform = uniform or pruned
        beside = _exp(paired_difference(pruned.text[bench.domain], uniform.text[bench.domain]))
        lines.append(
            f"| {name} | {pruned.total_parameters:,} | {_ratio(found, bench.domain)} | {beside} | "
            f"{_ratio(found, 'general')} |"
        )
    return [*lines, ""]


def _together_table(bench: _Bench) -> list[str]:
    lines = [
        "### A quarter of all parameters",
        "",
        f"bits/byte over dense on the same {bench.headline_tokens:,} test tokens, ± one standard error of the pair.",
        "",
        "| units | parameters | domain | general |",
        "|---|---:|---:|---:|",
    ]
    for name, prune in TOGETHER.items():
        found = bench.row(f"together {name}", prune, bench.headline_tokens)
        texts = (_rise(found, bucket) for bucket in (bench.domain, "general"))
        lines.append(f"| {name} | {found.models['pruned'].total_parameters:,} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def _pair(found: Evaluation, bucket: str) -> tuple[TextScore, TextScore]:
    return found.models["pruned"].text[bucket], found.models["dense"].text[bucket]


def _ratio(found: Evaluation, bucket: str) -> str:
    return _exp(paired_difference(*_pair(found, bucket)))


def _exp(difference: PairedDifference) -> str:
    ratio = math.exp(difference.mean)
    if ratio >= 100:
        return f"{ratio:,.0f}"
    return f"{ratio:.3f} ± {ratio * difference.stderr:.3f}"


def _rise(found: Evaluation, bucket: str) -> str:
    rise = relative_rise(*_pair(found, bucket))
    return f"{1 + rise.mean:.3f} ± {rise.stderr:.3f}"
