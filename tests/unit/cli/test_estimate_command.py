"""``secateur estimate``."""

from __future__ import annotations

from pathlib import Path

import pytest

from secateur.files import CACHE_VARIABLE
from secateur.records.estimate import Estimate
from tests.command import call
from tests.pico import build_pico


def test_it_says_what_a_run_takes_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As tables, and as JSON that the record reads back; settings of the command line count."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    pico = build_pico(tmp_path)
    file = pico.write_recipe(tmp_path / "recipe.yml", tmp_path / "run")
    shown = call(capsys, "estimate", file, "--no-probe", "-q")
    assert shown.code == 0, shown.err
    for word in ("calibrate:medical", "evaluate:random", "in all", "memory: fits", "disk: fits", "assumed rates"):
        assert word in shown.out
    data = call(capsys, "estimate", file, "--no-probe", "--json", "--set", "evaluate.controls=[]").json()
    names = [stage.name for stage in Estimate.from_dict(data).stages]
    assert "evaluate:random" not in names and "evaluate:pruned" in names
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"model": "nowhere/at/all"}, {"general": "nowhere.txt"}])
def test_what_a_run_would_refuse_is_refused(
    changes: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same message."""
    file = build_pico(tmp_path).write_recipe(tmp_path / "recipe.yml", tmp_path / "run", **changes)
    refused, ran = call(capsys, "estimate", file, "--no-probe", "-q"), call(capsys, "run", file, "-q")
    assert refused.code == ran.code == 2
    assert refused.err == ran.err
    assert call(capsys, "estimate", tmp_path / "no.yml").code == 2
