"""Made-up records to describe: an evaluation of two buckets, and a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from secateur.records.choices import ChoicesScore
from secateur.records.evaluation import Evaluation, ModelScore, TextScore, VocabularyEffect
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan


def text_score(nll: float = 2.0, **changes: Any) -> TextScore:
    """Return a score of two documents of 30 and 70 tokens, with a mean loss of ``nll`` nats per token."""
    plain: dict[str, Any] = {
        "nll_per_token": nll,
        "nll_stderr": 0.01,
        "bits_per_byte": nll / 2,
        "bits_per_byte_stderr": 0.005,
        "num_tokens": 100,
        "num_bytes": 4567,
        "num_documents": 2,
        "num_excluded": 0,
        "corpus_fingerprint": "0123456789abcdef0123",
        "tokens_per_s": 1234.5,
        "document_nll": (30 * nll - 1, 70 * nll + 1),
        "document_tokens": (30, 70),
        "document_bytes": (1370, 3197),
    }
    return TextScore(**{**plain, **changes})


def evaluation(**losses: float) -> Evaluation:
    """Return an evaluation with one row per keyword, on buckets ``medical`` and ``general``."""
    losses = losses or {"dense": 2.0, "pruned": 2.1, "random": 3.0}
    models = {}
    for name, nll in losses.items():
        ffn = 2_000_000 if name == "dense" else 1_500_000
        parts = {"embedding": 1_000_000, "attention": 500_000, "ffn": ffn, "head": 0, "other": 1_000}
        text = {"medical": text_score(nll), "general": text_score(nll + 0.5, num_excluded=3)}
        models[name] = ModelScore(name, parts, 2 * sum(parts.values()), text)
    return Evaluation(models, seed=0)


def choices_score(correct: Sequence[bool], **changes: Any) -> ChoicesScore:
    """Return a score of questions with four choices, answered like this; margins are 1 or -1 nats."""
    share = sum(correct) / len(correct)
    stderr = math.sqrt(share * (1 - share) / (len(correct) - 1))
    plain: dict[str, Any] = {
        "acc": share,
        "acc_stderr": stderr,
        "acc_norm": share,
        "acc_norm_stderr": stderr,
        "margin": 2 * share - 1,
        "margin_stderr": 2 * stderr,
        "chance": 0.25,
        "majority": 0.25,
        "overlap": 0.3,
        "overlap_stderr": 0.1,
        "num_items": len(correct),
        "num_truncated": 1,
        "fingerprint": "fedcba9876543210",
        "tokens_per_s": 4321.0,
        "item_correct": tuple(correct),
        "item_correct_norm": tuple(correct),
        "item_margin": tuple(1.0 if right else -1.0 for right in correct),
        "item_chance": (0.25,) * len(correct),
    }
    return ChoicesScore(**{**plain, **changes})


def asked(**answers: Sequence[bool]) -> Evaluation:
    """Return the evaluation with questions ``exam`` answered like this by the models named."""
    plain = evaluation()
    models = {
        name: replace(model, choices={"exam": choices_score(answers[name])} if name in answers else {})
        for name, model in plain.models.items()
    }
    return replace(plain, models=models)


def plan(**changes: Any) -> Plan:
    """Return a plan that removes one of four channels in each of two layers."""
    layer = LayerPlan(num_units=4, keep=(0, 1, 3), lowest_kept=0.25, highest_removed=0.125)
    parts = {"embedding": 1_000_000, "attention": 500_000, "ffn": 2_000_000, "head": 0, "other": 1_000}
    plain: dict[str, Any] = {
        "family": "llama",
        "model_fingerprint": "f" * 32,
        "shape": "uniform",
        "method": "contextual",
        "options": {},
        "budget": {"channels": 0.25},
        "layers": {"ffn_channel": (layer, layer)},
        "parameters_dense": parts,
        "parameters_pruned": {**parts, "ffn": 1_500_000},
        "calibrated_on": ("medical",),
        "calibration_tokens": 65_536,
    }
    return Plan(**{**plain, **changes})


def vocabulary_plan() -> VocabularyPlan:
    """Return a plan of half of 1,000 token ids."""
    return VocabularyPlan(
        num_tokens=1000,
        keep=tuple(range(500)),
        rule={"min_count": 2},
        reasons={"special": 20, "used": 480},
        counted_tokens=90_000,
        covered_ratio=0.995,
    )


def vocabulary_effect(dense: float, resegmented: float, restricted: float) -> VocabularyEffect:
    """Return an effect on a bucket whose dense loss is ``dense``, in nats per token of the dense segmentation."""
    return VocabularyEffect(text_score(resegmented), text_score(restricted), 102, 110, 3, 1, 2)
