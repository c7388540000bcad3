"""The tasks' part of a run: the dense model's results outlive another cut, and what is broken is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from secateur.errors import CheckpointError, ConfigError
from secateur.pipeline import tasks as stage
from secateur.pipeline.tasks import TasksStage, read_tasks
from secateur.recipe import TasksSpec
from secateur.records.tasks import TaskScore
from secateur.store.run_folder import RunFolder

from ..report.answers import results

SPEC = TasksSpec(names=["terms"])


class Harness:
    """Stands in for the harness: counts what is loaded and run."""

    def __init__(self) -> None:
        self.loaded = 0
        self.ran: list[str] = []

    def load(self, spec: TasksSpec) -> str:
        """Refuse what is not known, as the harness does."""
        self.loaded += 1
        if spec.names != ["terms"]:
            raise ConfigError("unknown task")
        return "manager"

    def run(self, model: Any, tokenizer: Any, spec: TasksSpec, manager: str, **told: Any) -> dict[str, TaskScore]:
        """Return the made-up scores of a model, which is only its name here."""
        assert (tokenizer, manager) == ("tokenizer", "manager")
        self.ran.append(model)
        return dict(results().models["dense" if model == "dense" else "pruned"])


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> Harness:
    """In the place of lm-eval."""
    found = Harness()
    monkeypatch.setattr(stage, "load_tasks", found.load)
    monkeypatch.setattr(stage, "run_tasks", found.run)
    monkeypatch.setattr(stage, "harness_version", lambda: "0.4.13")
    return found


def make(folder: Path, spec: TasksSpec | None = SPEC) -> TasksStage:
    """Return the stage of a run folder, as a new process would."""
    return TasksStage(spec, RunFolder.open(folder))


def run(tasks: TasksStage, cut: str = "cut") -> Any:
    """Run the stage for a cut."""
    return tasks.run("dense key", cut, "pruned", lambda: ("dense", "tokenizer"), lambda: (cut, "tokenizer"))


def test_results_are_kept_and_the_dense_ones_outlive_another_cut(harness: Harness, tmp_path: Path) -> None:
    """A second run does nothing, another cut measures the result alone, other tasks measure both."""
    assert run(make(tmp_path)) == results()
    again = make(tmp_path)
    assert run(again) == results()
    assert (again.reused, harness.ran) == (["evaluate:tasks"], ["dense", "cut"])
    other = make(tmp_path)
    assert run(other, "other cut") == results()
    assert (other.reused, harness.ran[2:]) == (["tasks:dense"], ["other cut"])
    assert run(make(tmp_path, TasksSpec(names=["terms"], limit=3))).limit == 3
    assert harness.ran[3:] == ["dense", "cut"]


def test_tasks_are_looked_up_only_while_the_dense_model_has_not_done_them(harness: Harness, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task"):
        make(tmp_path, TasksSpec(names=["termz"])).check("dense key")
    harness.loaded = 0
    make(tmp_path).check("dense key")
    run(make(tmp_path))
    assert harness.loaded == 2
    make(tmp_path).check("dense key")
    assert harness.loaded == 2


def test_files_beside_a_task_are_part_of_it(harness: Harness, tmp_path: Path) -> None:
    """A changed question is asked again."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "terms.jsonl").write_text("one")
    spec = TasksSpec(names=["terms"], include_path=str(folder))
    run(make(tmp_path / "run", spec))
    (folder / "terms.jsonl").write_text("two")
    run(make(tmp_path / "run", spec))
    assert harness.ran == ["dense", "cut", "dense", "cut"]


def test_without_tasks_nothing_stays(harness: Harness, tmp_path: Path) -> None:
    """Results of an earlier recipe go, and nothing is looked up."""
    run(make(tmp_path))
    quiet = make(tmp_path, None)
    quiet.check("dense key")
    assert run(quiet) is None
    assert not (tmp_path / "tasks.json").exists()


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tasks.json").write_text('{"schema_version": 1}')
    with pytest.raises(CheckpointError, match=r"tasks.json does not hold results of tasks .*Delete it"):
        read_tasks(tmp_path / "tasks.json")
