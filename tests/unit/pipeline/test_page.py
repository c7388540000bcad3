"""The page of a run folder: read from disk alone, and clear about a file that is missing or broken."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from secateur.errors import CheckpointError, ConfigError
from secateur.pipeline import page as page_module
from secateur.pipeline.page import PAGE, read_run, try_page
from secateur.records.scores import Scores
from secateur.records.token_counts import TokenCounts
from secateur.report.page import is_available
from secateur.store.artifacts import write_scores, write_token_counts
from tests.command import call

from ..report.page.runs import full_run
from ..report.speeds import speed_comparison

RUN = full_run()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run folder with everything that a page is read from, and no model."""
    recipe = {"model": "org/pico", "domain": {"medical": "medical.jsonl"}, "prune": {"budget": {"channels": 0.25}}}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    stages = {
        "shrink": {"key": "a", "seconds": 1.0, "finished": "2026-01-02T00:00:00+00:00"},
        "export:gguf": export_stage("new.gguf", "2026-01-03T00:00:00+00:00"),
        "export:old": export_stage("old.gguf", "2026-01-01T00:00:00+00:00"),
        "export:gone": export_stage("gone.gguf", "2026-01-03T00:00:00+00:00"),
    }
    manifest = {"stages": stages, "versions": {"secateur": "0.1.0"}, "model": "org/pico", "notes": ["sharing: ask"]}
    for name, data in {
        "manifest": manifest,
        "plan": RUN.plan.to_dict(),
        "evaluation": RUN.evaluation.to_dict(),
        "recovery/recovered": RUN.recoveries["recovered"].to_dict(),
        "recovery/dense_finetuned": replace(RUN.recoveries["recovered"], name="dense_finetuned").to_dict(),
        "statistics/medical": {"tokens_per_s": 12.5},
    }.items():
        file = tmp_path / f"{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(data), encoding="utf-8")
    for name in ("new.gguf", "old.gguf"):
        (tmp_path / name).touch()
    values = {"ffn_channel": [torch.arange(4, dtype=torch.float64) for _ in range(2)]}
    write_scores(tmp_path / "scores" / "contextual.safetensors", Scores("contextual", {}, ("medical",), values))
    counts = TokenCounts(torch.tensor([5, 0, 3]), 8, 20, 1, torch.tensor([1]), "abc")
    write_token_counts(tmp_path / "tokens" / "medical.safetensors", counts, {})
    return tmp_path


def export_stage(name: str, finished: str) -> dict[str, object]:
    """Return what the manifest holds of an export."""
    exported = {**RUN.exports[0].to_dict(), "path": f"/elsewhere/{name}"}
    return {"key": "b", "seconds": 1.0, "finished": finished, "files": [name], "exported": exported}


def test_everything_on_the_page_comes_from_the_folder(folder: Path) -> None:
    """Records are those written; exports are those of this model that are still there, where they are now."""
    run = read_run(folder)
    assert (run.model, run.domains, run.notes) == ("org/pico", ["medical"], ["sharing: ask"])
    assert run.plan == RUN.plan
    assert run.evaluation.models.keys() == RUN.evaluation.models.keys()
    assert run.recoveries["recovered"] == RUN.recoveries["recovered"]
    assert run.calibration_tokens_per_s == {"medical": 12.5}
    assert [exported.path for exported in run.exports] == [folder / "new.gguf"]
    assert len(run.importance["ffn_channel"]) == 8
    assert [point.per_million for point in run.frequencies["medical"].points] == [625_000, 375_000]


def test_speeds_are_read_where_the_recipe_asks_for_them(folder: Path) -> None:
    """Those of an earlier recipe are left alone, and a broken file is named."""
    (folder / "speed.json").write_text(json.dumps(speed_comparison().to_dict()), encoding="utf-8")
    assert read_run(folder).speed is None
    recipe = yaml.safe_load((folder / "recipe.yml").read_text(encoding="utf-8"))
    (folder / "recipe.yml").write_text(yaml.safe_dump({**recipe, "evaluate": {"speed": {}}}), encoding="utf-8")
    assert read_run(folder).speed == speed_comparison()
    (folder / "speed.json").write_text("{}", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"speed.json is broken .* Delete it. Make it again: secateur run"):
        read_run(folder)
    (folder / "speed.json").unlink()
    assert read_run(folder).speed is None


def test_a_page_does_without_scores_and_counts(folder: Path) -> None:
    """They may have been deleted to save space."""
    for name in ("scores/contextual.safetensors", "tokens/medical.safetensors"):
        (folder / name).unlink()
    run = read_run(folder)
    assert (run.importance, run.frequencies) == ({}, {})


@pytest.mark.parametrize(
    "name",
    [
        "plan.json",
        "evaluation.json",
        "manifest.json",
        "recovery/recovered.json",
        "scores/contextual.json",
        "scores/contextual.safetensors",
        "tokens/medical.safetensors",
        "statistics/medical.json",
    ],
)
@pytest.mark.parametrize("content", ['{"schema_version": 3', "{}", "[]"])
def test_a_broken_file_is_named_with_the_way_to_make_it_again(folder: Path, name: str, content: str) -> None:
    """Whatever is in it, the message has the path and the command, and is one line."""
    (folder / name).write_text(content, encoding="utf-8")
    if name == "manifest.json" and content == "{}":
        assert read_run(folder).exports == []
        return
    with pytest.raises(CheckpointError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert str(folder / Path(name).with_suffix("")) in message
    assert f"secateur run {folder / 'recipe.yml'} --output {folder}" in message
    assert "\n" not in message


def test_missing_results_and_other_folders_are_named(folder: Path, tmp_path: Path) -> None:
    """A run that stopped early has no page yet, and any other folder is no run."""
    (folder / "evaluation.json").unlink()
    with pytest.raises(CheckpointError, match=r"evaluation\.json is missing. Make it again: secateur run"):
        read_run(folder)
    with pytest.raises(ConfigError, match="is not a run folder"):
        read_run(tmp_path / "scores")


def test_a_run_never_fails_for_its_page(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says why there is none, and a page of older numbers does not stay."""
    (folder / PAGE).write_text("old", encoding="utf-8")

    def fail(*_: object) -> str:
        raise ZeroDivisionError("of our own")

    monkeypatch.setattr(page_module, "render_page", fail)
    assert try_page(folder) == (None, "ZeroDivisionError: of our own")
    assert not (folder / PAGE).exists()


def test_the_command_answers_a_broken_run_in_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and no stack trace."""
    (folder / "evaluation.json").write_text("{", encoding="utf-8")
    answer = call(capsys, "report", folder)
    assert answer.code == 2
    assert answer.err.startswith(f"error: {folder / 'evaluation.json'} cannot be read")
    assert answer.err.count("\n") == 1


@pytest.mark.skipif(not is_available(), reason="vl-convert-python is not installed")
def test_the_command_writes_page_and_charts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page lies in the run folder and its charts where asked; as JSON, one object names them."""
    answer = call(capsys, "report", folder, "--svg", folder / "charts", "--json").json()
    assert answer["page"] == str(folder / PAGE)
    assert len(answer["charts"]) == len(list((folder / "charts").glob("*.svg"))) > 5
    text = (folder / PAGE).read_text(encoding="utf-8")
    assert text.startswith("<!doctype html>")
    assert len(text.encode()) < 5_000_000
