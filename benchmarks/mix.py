"""How much of the general ability a share of general text keeps, and what it costs the domain: the mixture's curve."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from vocabulary import parse_domain

import secateur
from secateur.demo import demo_recipe, prepare
from secateur.records.evaluation import TextScore, paired_difference
from secateur.records.statistics import Statistics
from secateur.report.tables import with_error
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

CALIBRATION_TOKENS, TEST_TOKENS = 32_768, 8_192
BUDGET, METHOD = {"channels": 0.20}, "obs"
DOMAIN_SHARES = (1.0, 0.9, 0.8, 0.5, 0.0)


class _Bench:
    def __init__(self, store: Path, extra: Sequence[str], sizes: tuple[int, int]) -> None:
        recipe = demo_recipe(prepare(), store / "unused")
        assert recipe.general is not None
        added = dict(map(parse_domain, extra))
        judged = {name: spec for name, spec in added.items() if spec.calibration is None or spec.validation is not None}
        for name in added.keys() - judged.keys():
            print(f"mix leaves out {name}: its owner's split has no validation text to judge fits by", flush=True)
        self.domains = {"medical": recipe.domain["medical"], **judged}
        self.general = recipe.general
        self.calibration_tokens, self.test_tokens = sizes
        self.store = store / "mix" / "-".join(map(str, sizes))
        self.store.mkdir(parents=True, exist_ok=True)
        self.recipe_model = recipe.model

    @cached_property
    def model(self) -> Any:
        return load_model(resolve_model(self.recipe_model))

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(resolve_model(self.recipe_model))

    def rows(self, domain: str) -> list[str]:
        """Return the lines of a domain's table; nothing is run where every row was measured before."""
        texts = {domain: self.domains[domain], "general": self.general}
        statistics = _Once(lambda: self.statistics(texts))
        dense = self.scores(f"{domain}--dense", texts, statistics, lambda: self.model)
        lines = [f"| dense | {_cells(dense, dense)} |"]
        for share in DOMAIN_SHARES:
            scores = self.scores(
                f"{domain}--{share:g}", texts, statistics, lambda share=share: self.pruned(statistics(), domain, share)
            )
            lines.append(f"| {share:g} {domain}, {1 - share:g} general | {_cells(scores, dense)} |")
        return lines

    def statistics(self, texts: Mapping[str, Any]) -> Statistics:
        return secateur.calibrate(
            self.model, self.tokenizer, texts, grams="ffn_channel", max_tokens=self.calibration_tokens
        )

    def pruned(self, statistics: Statistics, domain: str, share: float) -> Any:
        mix = {name: weight for name, weight in {domain: share, "general": 1 - share}.items() if weight > 0}
        plan = secateur.plan(self.model, statistics, budget=BUDGET, method=METHOD, mix=mix)
        return secateur.shrink(self.model, plan, reconstruct=statistics)

    def scores(self, name: str, texts: Mapping[str, Any], statistics: _Once, make: Any) -> dict[str, TextScore]:
        """Return a row's scores on both texts; measured once, then read back."""
        model = _Once(make)
        found = {}
        for bucket, spec in texts.items():
            file = self.store / f"{name}--{bucket}.json"
            if not file.is_file():
                score = secateur.evaluate(
                    model(), self.tokenizer, spec, exclude=statistics(), max_tokens=self.test_tokens
                )
                file.write_text(json.dumps(asdict(score)))
                print(f"{name} on {bucket}: perplexity {score.perplexity:.2f}", flush=True)
            data = json.loads(file.read_text())
            for key in ("document_nll", "document_tokens", "document_bytes"):
                data[key] = tuple(data[key])
            found[bucket] = TextScore(**data)
        return found


class _Once:
    """Something expensive, made when it is first asked for."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self) -> Any:
        return self._made

    @cached_property
    def _made(self) -> Any:
        return self._make()


def _cells(scores: Mapping[str, TextScore], dense: Mapping[str, TextScore]) -> str:
    cells = []
    for bucket, score in scores.items():
        difference = paired_difference(score, dense[bucket])
        ratio = math.exp(difference.mean)
        perplexity = with_error(score.perplexity, score.perplexity_stderr)
        cells.append(f"{perplexity} | {ratio:.3f} ± {ratio * difference.stderr:.3f}")
    return " | ".join(cells)


def measure(store: Path, extra: Sequence[str], sizes: tuple[int, int] = (CALIBRATION_TOKENS, TEST_TOKENS)) -> str:
    """Return the mixture's tables as Markdown.

    Args:
        store: where finished rows are kept.
        extra: corpora beside the demo's domain, as ``--domain`` takes them; those without validation text are left out.
        sizes: calibration tokens per bucket, and test tokens per bucket at most.
    """
    bench = _Bench(store, extra, sizes)
    lines = [
        "### Domain against general: the mixture (SmolLM2-135M-Instruct, 20 % of FFN channels)",
        "",
        f"Method {METHOD}, `reconstruct: dense`, no training. {sizes[0]:,} calibration tokens of each text, up to",
        f"{sizes[1]:,} test tokens; the rows differ only in the weights that form the statistics and the fits. ± one",
        "standard error over documents, paired with the dense model in the ratio. General text is the encyclopedia.",
        "",
    ]
    for domain in bench.domains:
        lines += [
            f"| mixture | {domain} perplexity | / dense | general perplexity | / dense |",
            "|---|---:|---:|---:|---:|",
            *bench.rows(domain),
            "",
        ]
    return "\n".join(lines)
