"""Run folders set side by side: how they are called, what is refused, and what the command answers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import secateur
from secateur.errors import CheckpointError, ConfigError
from secateur.export.huggingface import PLAN_FILE
from secateur.pipeline.compare import compare, run_names
from secateur.records.evaluation import Evaluation
from secateur.records.plan import LayerPlan
from secateur.report.page import is_available
from tests.command import call

from ..report.compared import documents, model
from ..report.page.runs import recovery
from ..report.records import plan

WIDER = plan(layers={"ffn_channel": (LayerPlan(4, (0, 1, 2)), LayerPlan(4, (1, 2, 3)))})


def write_run(folder: Path, losses: list[float], *, cut: Any = WIDER, **prune: Any) -> Path:
    """Write what a comparison reads of a finished run."""
    recipe = {"model": "org/pico", "domain": {"medical": "a.jsonl"}, "prune": {"budget": {"channels": 0.25}, **prune}}
    dense, row = {"medical": documents([20.0] * len(losses))}, {"medical": documents(losses)}
    models = {"dense": model("dense", dense, 2_000_000), "pruned": model("pruned", row)}
    folder.mkdir(parents=True)
    (folder / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    manifest = {"stages": {}, "versions": {"secateur": "0.1.0"}, "model": "org/pico"}
    evaluation = Evaluation(models, seed=0).to_dict()
    for name, data in {"manifest": manifest, "plan": cut.to_dict(), "evaluation": evaluation}.items():
        (folder / f"{name}.json").write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    """Two runs on the same 40 documents; the second is a little worse on each."""
    first = [21.0 + index % 5 for index in range(40)]
    return [
        write_run(tmp_path / "first", first, cut=plan()),
        write_run(tmp_path / "second", [loss + 0.1 * (1 + index % 2) for index, loss in enumerate(first)], seed=1),
    ]


def test_runs_are_read_and_compared(runs: list[Path]) -> None:
    """Results, kept units and recipes are those in the folders; the API takes paths and baselines alike."""
    comparison = compare(runs)
    [one] = comparison.texts
    assert (one.run, one.judgement) == ("second", "worse")
    assert one.nll.mean == pytest.approx(0.015)
    assert [layer.shared for layer in comparison.plans[0].layers] == [2, 2]
    assert comparison.recipes == {"prune.seed": {"first": "0", "second": "1"}}
    turned = secateur.compare([str(run) for run in runs], baseline=runs[1])
    assert turned.texts[0].judgement == "better"


def test_runs_are_called_by_what_tells_them_apart(tmp_path: Path) -> None:
    """As few of the last parts of their folders as are needed."""
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    with pytest.raises(ConfigError, match="is given twice"):
        run_names([tmp_path / "a", tmp_path / "." / "a"])


def test_other_text_is_refused(runs: list[Path], tmp_path: Path) -> None:
    """Before anything is subtracted."""
    other = write_run(tmp_path / "other", [21.0] * 30)
    with pytest.raises(ConfigError, match=r"first and other were measured on different medical test text: fingerprint"):
        compare([runs[0], other])


@pytest.mark.parametrize("name", ["evaluation.json", "plan.json", "manifest.json", "recipe.yml"])
def test_a_broken_folder_is_named_with_the_way_to_redo_it(runs: list[Path], name: str) -> None:
    """The file, and the command that makes it again."""
    (runs[1] / name).write_text("{", encoding="utf-8")
    with pytest.raises((CheckpointError, ConfigError), match=str(runs[1] / name)) as caught:
        compare(runs)
    if name != "recipe.yml":
        assert f"secateur run {runs[1] / 'recipe.yml'} --output {runs[1]}" in str(caught.value)


def test_the_command_answers_people_and_machines(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Tables and a sentence; one JSON object; Markdown beside either."""
    answer = call(capsys, "compare", *runs)
    assert answer.code == 0, answer.err
    for shown in ("held-out results", "differences from first", "units in common", "worse, surer than chance"):
        assert shown in answer.out
    target = runs[0].parent / "out" / "compare.md"
    found = call(capsys, "compare", *runs, "--baseline", "second", "--md", target, "--json").json()
    assert found["differences"][0]["judgement"] == "better"
    assert found["baseline"] == "second"
    assert found["summary"].startswith("first has as many parameters as second")
    assert target.read_text(encoding="utf-8").startswith("# first against second\n")


def test_the_command_refuses_in_one_line(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One run, a folder that is no run, and a name that is not among them."""
    assert "at least two runs" in call(capsys, "compare", runs[0]).err
    assert "is not a run folder" in call(capsys, "compare", runs[0], runs[0].parent).err
    answer = call(capsys, "compare", *runs, "--baseline", "secnd")
    assert answer.code == 2
    assert answer.err == "error: unknown baseline 'secnd'. Did you mean 'second'? Known: first, second.\n"


@pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")
def test_the_command_writes_a_page(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Where it is asked to, and says so."""
    target = runs[0].parent / "compare.html"
    assert f"page: {target}" in call(capsys, "compare", *runs, "--html", target).out
    assert "Is it different from first?" in target.read_text(encoding="utf-8")


def test_the_plan_of_the_last_round_is_what_the_result_lost(runs: list[Path]) -> None:
    """After several rounds the first plan is not all that went; without the model it stands in for the rest."""
    folder = runs[1]
    recipe = yaml.safe_load((folder / "recipe.yml").read_text(encoding="utf-8"))
    (folder / "recipe.yml").write_text(yaml.safe_dump({**recipe, "recover": {"rounds": 2}}), encoding="utf-8")
    data = Evaluation.from_dict(json.loads((folder / "evaluation.json").read_text(encoding="utf-8")))
    trained = replace(data.models["pruned"], name="recovered")
    grown = replace(data, models={**data.models, "recovered": trained})
    (folder / "evaluation.json").write_text(json.dumps(grown.to_dict()), encoding="utf-8")
    (folder / "recovery").mkdir()
    (folder / "recovery" / "recovered.json").write_text(json.dumps(recovery().to_dict()), encoding="utf-8")
    without = compare(runs)
    assert [layer.kept for layer in without.plans[0].layers] == [3, 3]
    assert without.notes == ("Which units second has lost in its last rounds is not known: its model is gone.",)
    (folder / "recovered").mkdir()
    last = plan(layers={"ffn_channel": (LayerPlan(4, (0,)), LayerPlan(4, (1,)))})
    (folder / "recovered" / PLAN_FILE).write_text(json.dumps(last.to_dict()), encoding="utf-8")
    assert [layer.kept for layer in compare(runs).plans[0].layers] == [1, 1]
