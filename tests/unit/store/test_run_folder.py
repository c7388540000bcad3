"""The run folder: which folders are taken, and when a stage's result may be reused."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from secateur.errors import ExportError
from secateur.store.run_folder import RunFolder


def finished(path: Path, **facts: object) -> RunFolder:
    """Return a run folder in which stage ``plan`` is done with key ``k`` and file ``plan.json``."""
    run = RunFolder.open(path)
    run.write_text("plan.json", "{}")
    run.finish("plan", "k", time.perf_counter(), **facts)
    return run


def test_opening_writes_nothing(tmp_path: Path) -> None:
    """A run that is refused leaves no folder; an empty folder may be used."""
    RunFolder.open(tmp_path / "deep" / "run")
    assert not (tmp_path / "deep").exists()
    (tmp_path / "empty").mkdir()
    RunFolder.open(tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    """A folder with other files, and a file, are named and left alone."""
    (tmp_path / "zebra").write_text("z")
    (tmp_path / "apple").write_text("a")
    with pytest.raises(ExportError, match=r"not empty and is not a run of secateur \(it holds apple\)"):
        RunFolder.open(tmp_path)
    with pytest.raises(ExportError, match="zebra is a file"):
        RunFolder.open(tmp_path / "zebra")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"zebra": "z", "apple": "a"}


@pytest.mark.parametrize(
    "content", ['{"name": "My extension", "manifest_version": 3}', "{", "[]", '{"stages": ["dev"]}']
)
def test_somebody_elses_manifest_is_not_overwritten(tmp_path: Path, content: str) -> None:
    """Many tools have a manifest.json; a folder with another one is no run of ours."""
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match=r"is not a run of secateur \(it holds manifest\.json\)"):
        RunFolder.open(tmp_path)
    assert (tmp_path / "manifest.json").read_text() == content


def test_what_was_recorded_is_there_when_the_folder_is_opened_again(tmp_path: Path) -> None:
    """Stages with time and facts, and facts about the run, survive in manifest.json."""
    finished(tmp_path / "run", tokens=5).describe(seed=3, versions={"secateur": "0"})
    again = RunFolder.open(tmp_path / "run")
    assert again.manifest["seed"] == 3
    entry = again.manifest["stages"]["plan"]
    assert (entry["key"], entry["tokens"]) == ("k", 5)
    assert 0 <= entry["seconds"] < 60
    assert entry["finished"].endswith("+00:00")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text()) == again.manifest


def test_a_result_is_reused_only_for_the_same_inputs(tmp_path: Path) -> None:
    """Another key or another stage is not done."""
    run = finished(tmp_path)
    file = tmp_path / "plan.json"
    assert run.is_done("plan", "k", file)
    assert not run.is_done("plan", "other", file)
    assert not run.is_done("shrink", "k", file)


def test_a_result_is_reused_only_while_its_files_are_there(tmp_path: Path) -> None:
    """The files asked for must exist, and those that were recorded with the stage."""
    run = finished(tmp_path, files=["plan.json", "model/a"])
    assert not run.is_done("plan", "k")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_text("1")
    assert run.is_done("plan", "k")
    assert not run.is_done("plan", "k", tmp_path / "b")


def test_a_forgotten_stage_is_not_done(tmp_path: Path) -> None:
    """Also for whoever opens the folder next; forgetting what is not there is no error."""
    run = finished(tmp_path)
    run.forget("plan")
    run.forget("plan")
    assert not run.is_done("plan", "k")
    assert not RunFolder.open(tmp_path).is_done("plan", "k")


@pytest.mark.parametrize("content", ["{", "[]", '"x"', ""])
def test_a_broken_manifest_means_nothing_is_known(tmp_path: Path, content: str) -> None:
    """The folder is still a run, as its recipe shows; every stage is done again."""
    finished(tmp_path).write_text("recipe.yml", "model: m\n")
    (tmp_path / "manifest.json").write_text(content)
    run = RunFolder.open(tmp_path)
    assert not run.is_done("plan", "k")
    run.finish("plan", "k", time.perf_counter())
    assert RunFolder.open(tmp_path).is_done("plan", "k")
