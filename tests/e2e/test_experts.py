"""A family of experts on a tiny model, from the recipe to models, exports and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import secateur
from tests.command import call
from tests.pico import Pico, general_paragraphs, write_yaml


def test_a_real_family_is_made_one_by_one_and_reported(
    pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One expert now, the other later over the same calibration; each with its own training text, model and export."""
    towns = tmp_path / "towns.txt"
    towns.write_text("\n\n".join(general_paragraphs(200, seed=5)), encoding="utf-8")
    data = pico.recipe(
        tmp_path / "out",
        calibrate={"max_tokens": 512, "block_size": 64},
        evaluate={"max_tokens": 256, "controls": []},
        recover={"max_tokens": 512, "baselines": [], "evaluations": 1, "evaluation_tokens": 128},
        export=["uniform"],
    )
    file = write_yaml(tmp_path / "r.yml", {**data, "domain": {**data["domain"], "towns": str(towns)}})
    first = call(capsys, "experts", file, "--only", "towns", "-q")
    assert first.code == 0, first.err
    assert "1 expert with 25 % of channels removed, then trained" in first.out
    assert "note: No expert was asked for of medical." in first.out
    both = call(capsys, "experts", file, "--only", "medical", "--json", "-q").json()
    assert both["reused"] == ["towns"]
    for one in both["experts"]:
        assert Path(one["model"]).name == "recovered"
        assert (Path(one["folder"]) / "report.html").is_file()
        assert all(Path(path).exists() for path in one["exports"])
        assert len(one["exports"]) == 1
        trained = secateur.load_recipe(Path(one["folder"]) / "recipe.yml").trained_domains()
        assert trained == [one["name"]]
    medical, other = (Path(one["folder"]) / "recovery" / "documents.json" for one in both["experts"])
    assert not set(_documents(medical)) & set(_documents(other))
    assert len(list((tmp_path / "out" / "shared" / "calibrate-towns").iterdir())) == 1
    assert secateur.experts(file).reused == ["medical", "towns"]
    assert call(capsys, "report", tmp_path / "out").code == 0


def _documents(file: Path) -> list[int]:
    """Return which documents a run has trained on."""
    return [document for chosen in json.loads(file.read_text())["chosen"].values() for document in chosen]
