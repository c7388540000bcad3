"""Made-up runs for a page: a small one with every section, and one whose every name is an attack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from secateur.records.evaluation import Evaluation, TextScore
from secateur.records.exported import Exported
from secateur.records.recovery import CurvePoint, Recovery
from secateur.records.units import FFN_CHANNEL
from secateur.report.page import RunRecords
from secateur.report.page.frequency import frequency_curve
from secateur.report.page.importance import bin_importance

from ..records import choices_score, evaluation, plan, vocabulary_effect, vocabulary_plan
from ..speeds import speed_comparison

ATTACK = "</script><script>alert(1)</script>"


def recovery(name: str = "recovered", bucket: str = "medical") -> Recovery:
    """Return a training of two steps whose second evaluation was kept."""
    points = tuple(
        CurvePoint(
            step, step / 2, 100 * step, None if not step else 2.5 - step, {bucket: 3.0 - step / 4}, {"exam": 0.5}
        )
        for step in range(3)
    )
    return Recovery(name, "finetune", points, 2, 2, 200, 1.0, "end", None, 1.0, 100.0, "abc", 1_000_000)


def full_run(**changes: Any) -> RunRecords:
    """Return a run with something in every section; documents are enough for every chart."""
    measured = many_documents(evaluation(dense=2.0, dense_finetuned=1.8, pruned=2.2, recovered=1.9, random=6.0))
    plain_effect = vocabulary_effect(2.0, 2.05, 2.04)
    resegmented, restricted = spread(plain_effect.resegmented), spread(plain_effect.restricted)
    effect = {"medical": replace(plain_effect, resegmented=resegmented, restricted=restricted)}
    models = {
        name: replace(model, choices={"exam": choices_score([True, False, index > 1, True])})
        for index, (name, model) in enumerate(measured.models.items())
    }
    cut = plan(vocabulary=vocabulary_plan(), notes=("asked for more",))
    scores = [np.array([4.0, 3.0, 1.0, 2.0]), np.array([8.0, 7.0, 5.0, 6.0])]
    plain: dict[str, Any] = {
        "model": "org/pico",
        "domains": ["medical"],
        "plan": cut,
        "evaluation": replace(measured, models=models, vocabulary=effect),
        "manifest": {
            "versions": {"secateur": "0.1.0"},
            "model_fingerprint": "abc",
            "seed": 7,
            "stages": {"plan": {"seconds": 61.0, "finished": "2026-01-01T00:00:00+00:00"}},
        },
        "recipe_yaml": "model: pico\n",
        "recoveries": {"recovered": recovery()},
        "speed": speed_comparison(),
        "exports": [Exported("gguf", Path("a/pico.gguf"), "F16", 1000, "llama, F16", "read back and compared")],
        "importance": {FFN_CHANNEL: bin_importance(scores, cut.layers[FFN_CHANNEL])},
        "frequencies": {"medical": frequency_curve(np.array([5, 0, 1, 100, 20]))},
    }
    return RunRecords(**{**plain, **changes})


def many_documents(measured: Evaluation, count: int = 40) -> Evaluation:
    """Return an evaluation of the same losses on more documents."""
    models = {
        name: replace(model, text={bucket: spread(score, count) for bucket, score in model.text.items()})
        for name, model in measured.models.items()
    }
    return replace(measured, models=models)


def spread(score: TextScore, count: int = 40) -> TextScore:
    """Return a score of the same loss on documents of 10 tokens and 40 bytes, of varied loss."""
    return replace(
        score,
        num_documents=count,
        num_tokens=10 * count,
        document_nll=tuple(10 * score.nll_per_token * (1 + 0.01 * (i % 7 - 3)) for i in range(count)),
        document_tokens=(10,) * count,
        document_bytes=(40,) * count,
    )


def hostile_run() -> RunRecords:
    """Return a run in which every name and text that a user or a corpus can choose tries to become a script."""
    run = full_run()
    models = {
        name: replace(
            model,
            text={ATTACK: model.text["medical"], "<img src=x onerror=alert(2)>": model.text["general"]},
            choices={f"exam{ATTACK}": score for score in model.choices.values()},
        )
        for name, model in run.evaluation.models.items()
    }
    return replace(
        run,
        model=f"org/{ATTACK}",
        domains=[ATTACK],
        evaluation=replace(run.evaluation, models=models, vocabulary={}),
        recipe_yaml=f"model: {ATTACK}\n",
        notes=[ATTACK],
        recoveries={"recovered": recovery(bucket=ATTACK)},
        frequencies={ATTACK: run.frequencies["medical"]},
        manifest={**run.manifest, "versions": {"secateur": ATTACK}},
    )
