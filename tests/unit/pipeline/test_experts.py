"""A family of experts: which runs it asks for, what it makes of them, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError, ConfigError
from secateur.pipeline import experts as module
from secateur.pipeline.experts import EXPERTS, read_family, run_experts
from secateur.pipeline.trials import Job, Trial, TrialResult
from secateur.recipe import Recipe, parse_recipe, with_overrides
from secateur.records.evaluation import Evaluation

from ..report.matrices import scores
from ..report.records import plan

MEASURED, DENSE = scores(("medical", "legal"))
TRAINED = {"recover": {"max_tokens": 512}}


def recipe(folder: Path, **changes: Any) -> Recipe:
    """Return a recipe of two domains and general text."""
    plain = {
        "model": "org/pico",
        "domain": {"medical": "m.jsonl", "legal": "l.jsonl"},
        "general": "g.txt",
        "prune": {"budget": {"channels": 0.2}},
        "output": str(folder),
    }
    return parse_recipe({**plain, **changes})


class Runs:
    """Stands in for trials: remembers what is asked, and answers with made-up results."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.asked: dict[str, Recipe] = {}

    def prepare(self, base: Recipe, trials: Sequence[Trial], **_: Any) -> list[Job]:
        """Return jobs that are not done."""
        jobs = [Job(trial, with_overrides(base, trial.overrides), "", False) for trial in trials]
        self.asked.update({job.trial.name: job.recipe for job in jobs})
        return jobs

    def run_jobs(self, jobs: Sequence[Job], **_: Any) -> list[TrialResult]:
        """Return one made-up result per job."""
        return [self._result(job.trial, job.recipe) for job in jobs]

    def _result(self, trial: Trial, whole: Recipe) -> TrialResult:
        folder = Path("trials") / trial.name
        if trial.name in self.failing:
            return TrialResult(trial, folder, "failed", "out of luck", 1.0, False, None, None, "")
        models = {"dense": DENSE, "pruned": MEASURED[trial.name][1], "random": MEASURED["random cut"][1]}
        if whole.recover is not None:
            models |= {"recovered": models["pruned"], "random_recovered": models["random"]}
        return TrialResult(trial, folder, "done", "", 1.0, False, plan(), Evaluation(models, seed=0), "")


def stand_in(patch: pytest.MonkeyPatch, *failing: str) -> Runs:
    """Put made-up runs in the place of real ones."""
    runs = Runs(*failing)
    patch.setattr(module, "prepare", runs.prepare)
    patch.setattr(module, "run_jobs", runs.run_jobs)
    return runs


def test_every_expert_has_one_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is calibrated and trained on its domain alone, whatever the recipe says of several; and that is said."""
    runs = stand_in(monkeypatch)
    asked = recipe(
        tmp_path,
        prune={"budget": {"channels": 0.2}, "combine": "union", "vocabulary": {"buckets": ["legal"]}},
        calibrate={"buckets": ["medical", "legal"]},
        **TRAINED,
    )
    family = run_experts(asked).family
    for name, whole in runs.asked.items():
        assert (whole.prune.buckets, whole.prune.combine, whole.calibrate.buckets) == ([name], "mean", None)
        assert whole.prune.vocabulary is not None
        assert whole.prune.vocabulary.buckets is None
        assert whole.trained_domains() == [name]
        assert list(whole.domain) == ["medical", "legal"]
    assert "prune.combine is left out" in " ".join(family.matrix.notes)
    assert [(row.name, row.kind) for row in family.size.rows] == [("medical", "domain"), ("legal", "domain")]
    assert [one.model for one in family.experts] == [f"trials/{name}/recovered" for name in ("medical", "legal")]
    assert all(one.as_cut is not None and one.against_random is not None for one in family.experts)
    assert read_family(tmp_path) == family


def test_an_expert_that_failed_is_missing_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The others stay; only where none is there the family fails."""
    stand_in(monkeypatch, "legal")
    family = run_experts(recipe(tmp_path)).family
    assert [one.name for one in family.experts] == ["medical"]
    assert family.matrix.failures == {"legal": "out of luck"}
    stand_in(monkeypatch, "medical", "legal")
    with pytest.raises(ConfigError, match=r"no expert could be made\. medical: out of luck"):
        run_experts(recipe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "only", "message"),
    [
        ({"domain": {"medical": "m.jsonl"}}, None, "needs two domains, and the recipe has medical alone"),
        ({"prune": {"budget": {"max_domain_loss": 0.05}}}, None, "an expert is for one of them"),
        (
            {"prune": {"method": "cus_prun", "options": {"dimensions": {"domain": ["medical", "legal"]}}}},
            None,
            "all experts would be the same",
        ),
        ({}, ["lega"], "unknown domain 'lega'. Did you mean 'legal'"),
        ({}, [], "name at least one domain"),
    ],
)
def test_what_makes_no_family_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changes: dict[str, Any], only: list[str] | None, message: str
) -> None:
    """Before anything runs."""
    runs = stand_in(monkeypatch)
    with pytest.raises(ConfigError, match=message):
        run_experts(recipe(tmp_path, **changes), only=only)
    assert runs.asked == {}


def test_a_broken_family_is_named_with_the_way_to_make_it_again(tmp_path: Path) -> None:
    """Whatever is in the file."""
    with pytest.raises(CheckpointError, match=r"experts\.json is missing. Make it again: secateur experts"):
        read_family(tmp_path)
    for content in ("{", "{}", '{"schema_version": 0}', "[]"):
        (tmp_path / EXPERTS).write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"secateur experts .*recipe\.yml --output"):
            read_family(tmp_path)
