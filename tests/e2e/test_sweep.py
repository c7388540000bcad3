"""Sweeps on a pico model: points equal plain runs, what is shared is made once, and a stopped sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur import pipeline
from secateur.errors import ConfigError, CorpusError, PlanError
from secateur.pipeline.trials import Trial, TrialResult, run_trials
from secateur.recipe import parse_recipe, with_overrides
from secateur.records.evaluation import Evaluation
from tests.pico import Pico

RECOVER = {
    "max_tokens": 256,
    "learning_rate": 1e-3,
    "evaluations": 1,
    "evaluation_tokens": 64,
    "baselines": ["dense"],
}
QUICK = {"evaluate.controls": []}
TRIALS = [
    Trial("gradients", {"prune.method": "fisher", **QUICK}),
    Trial("grams", {"prune.method": "wanda", "prune.reconstruct": "dense", **QUICK}),
    Trial("trained", {"prune.method": "wanda", "recover": RECOVER, **QUICK}),
    Trial("again", {"prune.method": "fisher", "recover": RECOVER, "prune.budget": {"channels": 0.5}, **QUICK}),
    Trial("tokens", {"prune.vocabulary": {"min_count": 1}, **QUICK}),
]


def numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Return what was measured, without how fast."""
    data = evaluation.to_dict()
    scores = [score for model in data["models"].values() for score in model["text"].values()]
    scores += [effect[kind] for effect in data["vocabulary"].values() for kind in ("resegmented", "restricted")]
    for score in scores:
        del score["tokens_per_s"]
    return data


def stages(result: TrialResult) -> dict[str, Any]:
    """Return the record of each stage of a trial."""
    found: dict[str, Any] = json.loads((result.folder / "manifest.json").read_text())["stages"]
    return found


@pytest.fixture(scope="module")
def results(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> list[TrialResult]:
    """Trials that need different statistics, two of them trained; nobody changes them."""
    recipe = parse_recipe(pico.recipe(tmp_path_factory.mktemp("trials") / "out"))
    return run_trials(recipe, TRIALS)


@pytest.fixture(scope="module", autouse=True)
def no_pages() -> Iterator[None]:
    """Points have pages of their own, which are slow to build and tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("secateur.pipeline.measuring.try_page", lambda folder: (None, ""))
        patch.setattr("secateur.pipeline.sweep.try_sweep_page", lambda folder: (None, ""))
        yield


def test_a_trial_is_a_plain_run_of_its_recipe(pico: Pico, results: Sequence[TrialResult], tmp_path: Path) -> None:
    """The same plan and the same numbers, bit for bit, whatever it took from others."""
    assert [result.message for result in results] == [""] * len(TRIALS)
    for result in results:
        if result.trial.name in ("again", "tokens"):
            recipe = parse_recipe(pico.recipe(tmp_path / result.trial.name))
            plain = pipeline.run(with_overrides(recipe, result.trial.overrides), until="evaluate")
            assert plain.evaluation is not None and result.evaluation is not None
            assert result.plan == plain.plan
            assert numbers(result.evaluation) == numbers(plain.evaluation)
            assert result.summary == plain.summary


def test_what_several_trials_need_is_made_once(results: Sequence[TrialResult]) -> None:
    """Statistics, the dense model's row and its fine-tuned copy carry the record of the one that made them."""
    by_name = {result.trial.name: stages(result) for result in results}
    for stage, names in {
        "calibrate:medical": list(by_name),
        "calibrate:general": list(by_name),
        "evaluate:dense": list(by_name),
        "gradients:medical": ["gradients", "again"],
        "recover:dense_finetuned": ["trained", "again"],
        "evaluate:dense_finetuned": ["trained", "again"],
    }.items():
        assert len({json.dumps(by_name[name][stage]) for name in names}) == 1, stage
    assert "gradients:medical" not in by_name["trained"]
    own = {by_name[name]["evaluate:pruned"]["key"] for name in by_name}
    assert len(own) == len(TRIALS)


def test_all_trials_are_measured_on_the_same_text(results: Sequence[TrialResult]) -> None:
    """Also those that read further documents for training or counting."""
    found = [result.evaluation.models["dense"].text for result in results if result.evaluation]
    assert len({text["medical"].corpus_fingerprint for text in found}) == 1
    assert len({text["general"].corpus_fingerprint for text in found}) == 1


def test_models_go_and_a_trial_makes_its_own_again(pico: Pico, results: Sequence[TrialResult], tmp_path: Path) -> None:
    """What stays is small; `secateur run` on the recipe in the folder, elsewhere here, gives the model."""
    assert not list(results[0].folder.parent.rglob("model.safetensors"))
    recipe = secateur.load_recipe(results[0].folder / "recipe.yml", {"output": str(tmp_path / "made")})
    made = pipeline.run(recipe, until="shrink")
    assert made.plan == results[0].plan


def sweep_of(pico: Pico, output: Path, **sweep: Any) -> dict[str, Any]:
    """Return a sweep on the pico project without controls."""
    quick = {"evaluate": {"max_tokens": 768, "controls": []}, "general": None}
    return {**pico.recipe(output, **quick), "sweep": sweep}


def test_a_sweep_records_failures_and_goes_on_where_it_stopped(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point that fails at run time does not stop the others; what is done is not run again, what failed is."""
    data = sweep_of(
        pico,
        tmp_path / "out",
        grid={"prune.budget": [{"channels": 0.2}, {"channels": 0.5}]},
        points=[{"name": "nothing", "prune.budget": {"threshold": 1e9}, "prune.min_keep_ratio": 0.99}],
        keep_models="front",
    )
    first = secateur.sweep(data, max_time=0.0).sweep
    assert [point.status for point in first.points] == ["skipped"] * 3
    sweep = secateur.sweep(data, only=["channels_0.2"]).sweep
    assert [point.status for point in sweep.points] == ["done", "skipped", "skipped"]
    called = []
    plain = pipeline.run
    monkeypatch.setattr("secateur.pipeline.trials.run", lambda *a, **k: called.append(a[0].output) or plain(*a, **k))
    result = secateur.sweep(data)
    assert [Path(output).name for output in called] == ["channels_0.5", "nothing"]
    assert [point.status for point in result.sweep.points] == ["done", "done", "failed"]
    assert "threshold" in result.sweep.points[2].message
    assert json.loads((result.folder / "sweep.json").read_text()) == json.loads(json.dumps(result.sweep.to_dict()))
    for point in result.sweep.done:
        assert (result.folder / point.folder / "model").is_dir() == (point.standing == "front")
    called.clear()
    assert secateur.sweep(data).sweep.points[:2] == result.sweep.points[:2]
    assert [Path(output).name for output in called] == ["nothing"]


def test_a_point_that_can_never_work_is_refused_by_name_before_any_runs(pico: Pico, tmp_path: Path) -> None:
    """Unknown keys, impossible budgets and too little text are known before the first point."""
    good = {"channels": 0.2}
    for bad, error, message in (
        ({"prune.methd": "wanda"}, ConfigError, "methd"),
        ({"prune.budget": {"channels": 0.001}}, PlanError, "rounds to none"),
        ({"calibrate.max_tokens": 64, "prune.method": "obs", "calibrate.block_size": 16}, CorpusError, "Gram"),
    ):
        data = sweep_of(pico, tmp_path / "out", points=[{"prune.budget": good}, {"name": "bad", **bad}])
        with pytest.raises(error, match=f"(?s)point bad cannot be run: .*{message}"):
            secateur.sweep(data)
        assert not (tmp_path / "out").exists()
