"""Made-up runs to compare: models by the losses of their documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.records.choices import ChoicesScore
from secateur.records.comparison import ComparedRun, Comparison, compare_runs
from secateur.records.evaluation import ModelScore, TextScore
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan

from .records import asked, plan, text_score

PARTS = {"embedding": 1_000_000, "attention": 500_000, "ffn": 2_000_000, "head": 0, "other": 1_000}


def documents(losses: Sequence[float]) -> TextScore:
    """Return a score of documents of 10 tokens and 40 bytes with these losses in nats."""
    count = len(losses)
    return text_score(
        sum(losses) / (10 * count),
        num_tokens=10 * count,
        num_bytes=40 * count,
        num_documents=count,
        document_nll=tuple(losses),
        document_tokens=(10,) * count,
        document_bytes=(40,) * count,
    )


def varied(nll: float, step: int = 7, count: int = 40) -> TextScore:
    """Return a score of 40 documents around a loss per token; other steps vary otherwise."""
    return documents([10 * nll * (1 + 0.01 * (i % step - step // 2)) for i in range(count)])


def model(name: str, text: Mapping[str, TextScore], ffn: int = 1_500_000, **changes: Any) -> ModelScore:
    """Return a row of a result."""
    parts = {**PARTS, "ffn": ffn}
    return ModelScore(name, parts, 2 * sum(parts.values()), text, **changes)


def compared_run(
    name: str,
    *,
    dense: Sequence[float] = (20.0, 20.0),
    result: Sequence[float] = (21.0, 23.0),
    buckets: Sequence[str] = ("medical",),
    plan: Plan = plan(),  # noqa: B008
) -> ComparedRun:
    """Return a run whose models lose this much on the documents of every bucket."""
    return ComparedRun(
        name=name,
        folder=f"runs/{name}",
        model="org/pico",
        model_fingerprint="f" * 32,
        domains=("medical",),
        dense=model("dense", dict.fromkeys(buckets, documents(dense)), 2_000_000),
        result=model("pruned", dict.fromkeys(buckets, documents(result))),
        plan=plan,
        recipe={},
        chosen={},
    )


def full_comparison(names: Sequence[str] = ("first", "second", "third"), bucket: str = "medical") -> Comparison:
    """Return a comparison of runs with something in every section: better and worse, cut otherwise, asked questions."""
    runs = []
    for place, name in enumerate(names):
        answers = [True, False, place > 0, True]
        choices: Mapping[str, ChoicesScore] = asked(pruned=answers).models["pruned"].choices
        text = {bucket: varied(2.1 - 0.05 * place, 7 + place), "general": varied(2.4 + 0.3 * place, 5)}
        layers = tuple(LayerPlan(8, tuple(range(place + layer, 6 + layer))) for layer in range(3))
        cut = plan(layers={"ffn_channel": layers}, shape="uneven" if place else "uniform")
        run = replace(
            compared_run(name),
            domains=(bucket,),
            dense=model("dense", {bucket: varied(2.0), "general": varied(2.2)}, 2_000_000, choices=choices),
            result=model("pruned", text, 1_500_000 - 100_000 * place, choices=choices),
            plan=replace(cut, vocabulary=VocabularyPlan(10, (0, 1, place + 2))),
            recipe={"prune": {"method": name, "seed": 0}},
            chosen={"prune": {"method": name}},
        )
        runs.append(run)
    return compare_runs(runs)
