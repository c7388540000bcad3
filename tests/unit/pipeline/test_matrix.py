"""The domain matrix: which trials it asks for, what it makes of their results, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError, ConfigError
from secateur.pipeline import matrix as module
from secateur.pipeline.matrix import MATRIX, read_matrix, run_matrix
from secateur.pipeline.trials import Trial, TrialResult
from secateur.recipe import Recipe, parse_recipe, with_overrides
from secateur.records.evaluation import Evaluation
from tests.command import call
from tests.pico import Pico, build_pico, write_yaml

from ..report.matrices import scores
from ..report.records import plan

MEASURED, DENSE = scores(("medical", "legal"))


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


class Trials:
    """Stands in for ``run_trials``: remembers what is asked, and answers with made-up results."""

    def __init__(self, *failing: str) -> None:
        self.failing = failing
        self.base: Recipe | None = None
        self.asked: list[Trial] = []

    def __call__(self, base: Recipe, trials: Sequence[Trial], **_: Any) -> list[TrialResult]:
        """Return one made-up result per trial."""
        self.base, self.asked = base, list(trials)
        return [self._result(trial) for trial in trials]

    def _result(self, trial: Trial) -> TrialResult:
        folder = Path("trials") / trial.name
        if trial.name in self.failing:
            return TrialResult(trial, folder, "failed", "out of luck", 1.0, False, None, None, "")
        [bucket] = trial.overrides["prune.buckets"]
        models = {"dense": DENSE, "pruned": MEASURED[bucket][1]}
        if trial.overrides["evaluate.controls"]:
            models["random"] = MEASURED["random cut"][1]
        return TrialResult(trial, folder, "done", "", 1.0, False, plan(), Evaluation(models, seed=0), "")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> Trials:
    """Made-up trials in the place of real ones."""
    stand_in = Trials()
    monkeypatch.setattr(module, "run_trials", stand_in)
    return stand_in


def test_every_text_is_a_row_and_the_control_comes_once(trials: Trials, tmp_path: Path) -> None:
    """One trial per text, calibrated on that alone; the random cut is measured beside the first."""
    matrix = run_matrix(recipe(tmp_path)).matrix
    assert [trial.name for trial in trials.asked] == [f"{row}-channels-0.2" for row in ("medical", "legal", "general")]
    assert [trial.overrides["prune.buckets"] for trial in trials.asked] == [["medical"], ["legal"], ["general"]]
    assert [bool(trial.overrides["evaluate.controls"]) for trial in trials.asked] == [True, False, False]
    [size] = matrix.sizes
    assert [(row.name, row.kind) for row in size.rows] == [
        ("medical", "domain"),
        ("legal", "domain"),
        ("general", "general"),
        ("random cut", "control"),
    ]
    assert list(matrix.texts) == ["medical", "legal", "general"]
    assert read_matrix(tmp_path) == matrix


def test_several_budgets_are_several_matrices(trials: Trials, tmp_path: Path) -> None:
    """In the unit of the recipe's budget, each with its own control."""
    matrix = run_matrix(recipe(tmp_path), budgets=[0.1, 0.4]).matrix
    assert [size.budget for size in matrix.sizes] == [{"channels": 0.1}, {"channels": 0.4}]
    assert all(size.row("random cut") is not None for size in matrix.sizes)
    assert trials.asked[3].overrides["prune.budget"] == {"channels": 0.4}


def test_what_would_blur_the_rows_is_left_out_and_said(trials: Trials, tmp_path: Path) -> None:
    """Training, exports, questions and mixtures; every trial is a recipe that parses."""
    asked = recipe(
        tmp_path,
        recover={"epochs": 1},
        export=["gguf"],
        prune={"budget": {"channels": 0.2}, "mix": {"medical": 0.5, "general": 0.5}, "vocabulary": {"min_count": 2}},
        evaluate={"choices": {"exam": "exam.jsonl"}, "controls": ["random", "reversed"]},
        calibrate={"buckets": ["medical", "general"]},
    )
    notes = " ".join(run_matrix(asked).matrix.notes)
    for part in ("recover, export, evaluate.choices", "would hide", "prune.mix"):
        assert part in notes
    assert trials.base is not None
    for trial in trials.asked:
        whole = with_overrides(trials.base, trial.overrides)
        assert (whole.recover, whole.export, whole.evaluate.choices, whole.prune.mix) == (None, [], {}, None)
        assert (whole.calibrate.buckets, whole.prune.vocabulary) == (None, asked.prune.vocabulary)


def test_a_row_that_failed_is_missing_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others stay; only where none is there the matrix fails."""
    monkeypatch.setattr(module, "run_trials", Trials("legal-channels-0.2"))
    matrix = run_matrix(recipe(tmp_path)).matrix
    assert matrix.failures == {"legal-channels-0.2": "out of luck"}
    assert {one.domain for one in matrix.sizes[0].differences} == {"medical"}
    every = [f"{row}-channels-0.2" for row in ("medical", "legal", "general")]
    monkeypatch.setattr(module, "run_trials", Trials(*every))
    with pytest.raises(
        ConfigError, match=r"no row of the matrix could be measured\. medical-channels-0\.2: out of luck"
    ):
        run_matrix(recipe(tmp_path))


@pytest.mark.parametrize(
    ("changes", "budgets", "message"),
    [
        ({"domain": {"medical": "m.jsonl"}, "general": None}, None, "the recipe has medical alone"),
        ({"prune": {"budget": {"max_domain_loss": 0.05}}}, None, "each its own. Give a share"),
        ({"prune": {"budget": {"threshold": 0.01}}}, [0.1], "one budget that is a share .*; got threshold"),
        ({"prune": {"budget": {"channels": 0.1, "groups": 0.5}}}, [0.1], "got channels, groups"),
        ({}, [0.1, 1.0], "between 0 and 1; got 1"),
        ({}, [0.1, 0.1], r"give every budget once; got 0\.1, 0\.1"),
        ({}, [], "give every budget once; got none"),
    ],
)
def test_what_makes_no_matrix_is_refused(
    trials: Trials, tmp_path: Path, changes: dict[str, Any], budgets: list[float] | None, message: str
) -> None:
    """Before anything runs."""
    with pytest.raises(ConfigError, match=message):
        run_matrix(recipe(tmp_path, **changes), budgets=budgets)
    assert trials.asked == []


def test_a_broken_matrix_is_named_with_the_way_to_make_it_again(trials: Trials, tmp_path: Path) -> None:
    """Whatever is in the file."""
    with pytest.raises(CheckpointError, match=r"matrix\.json is missing. Make it again: secateur matrix"):
        read_matrix(tmp_path)
    for content in ("{", "{}", '{"schema_version": 0}', "[]"):
        (tmp_path / MATRIX).write_text(content, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"secateur matrix .*recipe\.yml --output"):
            read_matrix(tmp_path)


@pytest.mark.parametrize(("option", "value"), [("--budgets", "0.1;0.2"), ("--max-time", "soon")])
def test_options_that_cannot_be_read_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: str
) -> None:
    """With an example of what can."""
    file = write_yaml(tmp_path / "r.yml", {"model": "m", "domain": {"a": "a.txt", "b": "b.txt"}})
    answer = call(capsys, "matrix", file, option, value)
    assert answer.code == 2
    assert "for example" in answer.err


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A project of one domain and general text."""
    return build_pico(tmp_path_factory.mktemp("pico"))


def test_a_real_matrix_is_run_resumed_and_reported(
    pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Own against general text on a tiny model; the same command again runs nothing; its runs can be compared."""
    text = {"calibrate": {"max_tokens": 512, "block_size": 64}, "evaluate": {"max_tokens": 256}}
    file = pico.write_recipe(tmp_path / "r.yml", tmp_path / "out", **text)
    first = call(capsys, "matrix", file, "--json", "-q")
    assert first.code == 0, first.err
    found = first.json()
    assert found["reused"] == []
    [size] = found["matrix"]["sizes"]
    assert [row["name"] for row in size["rows"]] == ["medical", "general", "random cut"]
    assert {one["other"] for one in size["differences"]} == {"general", "random cut"}
    again = call(capsys, "matrix", file, "-q")
    assert "each domain's own model is best on its text in" in again.out
    assert call(capsys, "report", tmp_path / "out").code == 0
    runs = sorted((tmp_path / "out" / "trials").iterdir())
    assert not any((run / "model").exists() for run in runs)
    beside = call(capsys, "compare", *runs, "--json").json()["recipes"]
    assert beside["prune.buckets"] == {"general-channels-0.25": '["general"]', "medical-channels-0.25": '["medical"]'}
