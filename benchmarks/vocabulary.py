"""The vocabulary cut by several rules: ids kept, size saved, and what held-out text loses, split into its causes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import secateur
from secateur.corpus import load_split, resegment, segmentation_change
from secateur.demo import demo_recipe, prepare
from secateur.evaluate import evaluate_resegmented, evaluate_text
from secateur.families.loader import family_of
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import TextScore, VocabularyEffect, paired_bits_per_byte
from secateur.records.plan import Plan
from secateur.report.tables import format_bytes
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

DOMAIN_TOKENS, GENERAL_TOKENS = 32_768, 8_192
RULES: dict[str, dict[str, Any]] = {
    "count >= 1": {"vocabulary": {"min_count": 1}},
    "14 % of all parameters": {"units": ["vocabulary"], "budget": {"parameters": 0.14}},
    "count >= 5": {"vocabulary": {"min_count": 5}},
    "count >= 20": {"vocabulary": {"min_count": 20}},
    "coverage 99.9 %": {"vocabulary": {"coverage": 0.999}},
    "coverage 99 %": {"vocabulary": {"coverage": 0.99}},
}


def parse_domain(text: str) -> tuple[str, CorpusSpec]:
    """Return name and corpus of ``NAME=PATH[::TEMPLATE]``, or of ``NAME=CALIBRATION[,VALIDATION],TEST[::TEMPLATE]``."""
    name, _, where = text.partition("=")
    paths, _, template = where.partition("::")
    first, *others = paths.split(",")
    places = {"path": first}
    if others:
        places = {"calibration": first, "test": others[-1]} | ({"validation": others[0]} if len(others) > 1 else {})
    return name, CorpusSpec(**places, text=template or None)


class _Bench:
    def __init__(self, store: Path, extra: Sequence[str]) -> None:
        recipe = demo_recipe(prepare(), store / "unused")
        assert recipe.general is not None
        self.general = recipe.general
        self.domains = {"medical": recipe.domain["medical"], **dict(map(parse_domain, extra))}
        self.store = store / "vocabulary"
        self.store.mkdir(parents=True, exist_ok=True)
        checkpoint = resolve_model(recipe.model)
        self.bytes_per_parameter = checkpoint.dtype.itemsize
        self.model = load_model(checkpoint)
        self.tokenizer = load_tokenizer(checkpoint)
        self.family = family_of(self.model.config.model_type)

    def blocks(self, corpus: CorpusSpec, max_tokens: int, exclude: frozenset[int]) -> Any:
        return load_split(
            corpus,
            "test",
            self.tokenizer,
            block_size=512,
            max_tokens=max_tokens,
            exclude=exclude,
            keep_text=True,
        )

    def rows(self, domain: str) -> list[str]:
        counts = secateur.count_tokens(self.tokenizer, self.domains[domain])
        seen = frozenset(counts.documents.tolist())
        texts = {
            domain: self.blocks(self.domains[domain], DOMAIN_TOKENS, seen),
            "general": self.blocks(self.general, GENERAL_TOKENS, seen),
        }
        dense = {name: self.dense(domain, name, blocks) for name, blocks in texts.items()}
        rows = []
        for rule, options in RULES.items():
            plan = secateur.plan(self.model, tokenizer=self.tokenizer, token_counts=counts, **options)
            effects = {name: self.effect(domain, rule, name, blocks, plan) for name, blocks in texts.items()}
            cells = [_cells(effect, dense[name], whole=name == domain) for name, effect in effects.items()]
            rows.append(f"| {rule} | {self.size(plan)} | {' | '.join(cells)} |")
        head = f"#### {domain}: {counts.num_tokens:,} tokens counted, {texts[domain].num_tokens:,} test tokens"
        columns = ["rule", "ids kept", "parameters removed", "saved", "tokens that went", "inflation", "segmentation",
                   "softmax", "bits/byte in all", "general: inflation", "general: bits/byte in all"]  # fmt: skip
        rule = "|---|" + "---:|" * (len(columns) - 1)
        return [head, "", "| " + " | ".join(columns) + " |", rule, *rows, ""]

    def size(self, plan: Plan) -> str:
        assert plan.vocabulary is not None
        gone = plan.total_dense - plan.total_pruned
        share = f"{gone:,} ({gone / plan.total_dense:.2%})"
        return f"{len(plan.vocabulary.keep):,} | {share} | {format_bytes(gone * self.bytes_per_parameter)}"

    def dense(self, domain: str, bucket: str, blocks: Any) -> TextScore:
        file = self.store / f"{domain}--dense--{bucket}.json"
        if not file.is_file():
            score = evaluate_text(self.model, blocks, self.family)
            file.write_text(json.dumps(asdict(score)))
            print(f"dense on {bucket}: {score.bits_per_byte:.4f} bits/byte", flush=True)
        return _read(json.loads(file.read_text()))

    def effect(self, domain: str, rule: str, bucket: str, blocks: Any, plan: Plan) -> VocabularyEffect:
        assert plan.vocabulary is not None
        file = self.store / f"{domain}--{''.join(c if c.isalnum() else '_' for c in rule)}--{bucket}.json"
        if not file.is_file():
            keep = torch.tensor(plan.vocabulary.keep)
            after = resegment(blocks, secateur.shrink_tokenizer(self.tokenizer, plan))
            scores = evaluate_resegmented(self.model, after, self.family, keep)
            change = asdict(segmentation_change(blocks, after, keep))
            file.write_text(json.dumps([*map(asdict, scores), change]))
            print(f"{rule} of {domain} on {bucket}: {scores[1].bits_per_byte:.4f} bits/byte", flush=True)
        full, restricted, change = json.loads(file.read_text())
        return VocabularyEffect(_read(full), _read(restricted), **change)


def _read(data: dict[str, Any]) -> TextScore:
    for key in ("document_nll", "document_tokens", "document_bytes"):
        data[key] = tuple(data[key])
    return TextScore(**data)


def _cells(effect: VocabularyEffect, dense: TextScore, *, whole: bool) -> str:
    def change(first: TextScore, second: TextScore) -> str:
        difference = paired_bits_per_byte(first, second)
        error = 100 * difference.stderr / dense.bits_per_byte
        assert math.isfinite(error), "several documents are measured"
        return f"{100 * difference.mean / dense.bits_per_byte:+.2f} % ± {error:.2f}"

    inflation = f"{effect.tokens_after / effect.tokens_before - 1:+.2%}"
    in_all = change(effect.restricted, dense)
    if not whole:
        return f"{inflation} | {in_all}"
    lost = f"{effect.tokens_lost / effect.tokens_before:.2%}"
    causes = [change(effect.resegmented, dense), change(effect.restricted, effect.resegmented)]
    return " | ".join([lost, inflation, *causes, in_all])


def measure(store: Path, extra: Sequence[str]) -> str:
    """Return the vocabulary tables as Markdown."""
    bench = _Bench(store, extra)
    lines = [
        "### Vocabulary cut by several rules, no training (SmolLM2-135M-Instruct)",
        "",
        "Tokens are counted on all of the domain's calibration text; losses are on documents that were not counted, in",
        "bits/byte relative to the dense model, paired, ± one standard error over documents. *Segmentation* is the",
        "dense model reading the text as the smaller tokenizer cuts it; *softmax* is what leaving the removed ids out",
        "of the softmax gives back. Saved bytes are of float32 weights. General text is the encyclopedia.",
        "",
    ]
    for domain in bench.domains:
        lines += bench.rows(domain)
    return "\n".join(lines)
