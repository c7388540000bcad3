"""Results that runs have in common: found under their hash only, whole, and without touching each other."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.pipeline.shared import SharedStages
from secateur.store.run_folder import RunFolder


def folder(place: Path, shared: SharedStages) -> RunFolder:
    """Return an empty run folder."""
    place.mkdir()
    found = RunFolder.open(place, shared=shared)
    found.save()
    return found


def statistics(run: RunFolder) -> tuple[Path, Path]:
    """Return where a run keeps the statistics of a bucket."""
    file = run.path / "statistics" / "d.safetensors"
    return file, file.with_suffix(".json")


def make(run: RunFolder, key: str, text: str) -> None:
    """Do what a stage does: look, write, record."""
    files = statistics(run)
    assert not run.is_done("calibrate:d", key, *files)
    files[0].parent.mkdir(exist_ok=True)
    for file in files:
        file.write_text(text)
    run.finish("calibrate:d", key, 0.0, tokens=7)


def test_a_result_is_found_by_other_runs_under_its_hash_alone(tmp_path: Path) -> None:
    """What other settings gave lies beside it, and the run's record of it comes along."""
    shared = SharedStages(tmp_path / "shared")
    one, two, three = (folder(tmp_path / name, shared) for name in ("one", "two", "three"))
    make(one, "k1", "first")
    make(two, "k2", "second")
    assert not three.is_done("calibrate:d", "k3", *statistics(three))
    assert three.is_done("calibrate:d", "k2", *statistics(three))
    assert statistics(three)[1].read_text() == "second"
    assert three.manifest["stages"]["calibrate:d"] == two.manifest["stages"]["calibrate:d"]
    assert json.loads((three.path / "manifest.json").read_text()) == three.manifest
    assert three.is_done("calibrate:d", "k1", *statistics(three))
    assert statistics(three)[0].read_text() == "first"
    assert statistics(two)[0].read_text() == "second"


def test_large_files_are_not_copied(tmp_path: Path) -> None:
    """The same bytes on disk serve all runs; small ones that somebody may append to are copies."""
    shared = SharedStages(tmp_path / "shared")
    one, two = (folder(tmp_path / name, shared) for name in ("one", "two"))
    make(one, "k", "text")
    assert two.is_done("calibrate:d", "k", *statistics(two))
    assert statistics(one)[0].samefile(statistics(two)[0])
    assert not statistics(one)[1].samefile(statistics(two)[1])


def test_what_depends_on_a_plan_is_not_shared(tmp_path: Path) -> None:
    """Neither plans nor pruned models go from one run to another."""
    shared = SharedStages(tmp_path / "shared")
    one, two = (folder(tmp_path / name, shared) for name in ("one", "two"))
    for stage in ("plan", "shrink", "recover:recovered", "evaluate:pruned", "evaluate:random"):
        one.finish(stage, "k", 0.0)
        assert not two.is_done(stage, "k")
    assert not shared.path.exists()


def test_a_damaged_result_is_made_again_and_replaced(tmp_path: Path) -> None:
    """A file that is missing makes the whole result missing."""
    shared = SharedStages(tmp_path / "shared")
    one, two, three = (folder(tmp_path / name, shared) for name in ("one", "two", "three"))
    make(one, "k", "text")
    next(shared.path.rglob("*.safetensors")).unlink()
    make(two, "k", "text")
    assert three.is_done("calibrate:d", "k", *statistics(three))


def test_rows_of_the_dense_model_join_those_that_are_there(tmp_path: Path) -> None:
    """The evaluation is one file of many rows; only the shared one is put in."""
    shared = SharedStages(tmp_path / "shared")
    one, two = (folder(tmp_path / name, shared) for name in ("one", "two"))
    (one.path / "evaluation.json").write_text(
        json.dumps({"models": {"dense": {"a": 1}, "pruned": {"b": 1}}, "seed": 0, "vocabulary": {"d": 1}})
    )
    one.is_done("evaluate:dense", "k", one.path / "evaluation.json")
    one.finish("evaluate:dense", "k", 0.0)
    own = two.path / "evaluation.json"
    assert two.is_done("evaluate:dense", "k", own)
    assert json.loads(own.read_text()) == {"models": {"dense": {"a": 1}}, "seed": 0, "vocabulary": {}}
    own.write_text(json.dumps({"models": {"pruned": {"c": 1}}, "seed": 5, "vocabulary": {"d": 2}}))
    two.forget("evaluate:dense")
    assert two.is_done("evaluate:dense", "k", own)
    assert json.loads(own.read_text()) == {
        "models": {"pruned": {"c": 1}, "dense": {"a": 1}},
        "seed": 5,
        "vocabulary": {"d": 2},
    }
