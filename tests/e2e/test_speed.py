"""Size and speed as a part of a run: measured once, on the page and in the report, and taken again when asked again."""

from __future__ import annotations

from pathlib import Path

import pytest

import secateur
from secateur.errors import ConfigError
from secateur.evaluate import speed as module
from secateur.pipeline.speed import read_speed
from tests.pico import Pico

SPEED = {"prompt_lengths": [16], "new_tokens": 3, "batch_sizes": [1, 2], "rounds": 2}


def test_a_run_measures_speed_where_it_is_asked_to(pico: Pico, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is done again for it; the second time it is not measured either."""
    monkeypatch.setattr(module, "peak_in_process", lambda subject, setting: (1_000_000, ""))
    recipe = pico.recipe(copied, evaluate={"max_tokens": 768, "batch_size": 8, "controls": ["random"], "speed": SPEED})
    done = secateur.run(recipe)
    assert done.speed is not None
    assert {"plan", "shrink", "evaluate:dense", "evaluate:pruned"} <= set(done.reused)
    assert list(done.speed.models) == ["dense", "pruned"]
    dense, pruned = done.speed.models.values()
    assert pruned.total_parameters == sum(done.plan.parameters_pruned.values()) if done.plan else False
    assert dense.text_bytes_per_token == pruned.text_bytes_per_token
    assert read_speed(copied / "speed.json") == done.speed
    assert "## Size and speed" in (copied / "report.md").read_text(encoding="utf-8")
    again = secateur.run(recipe)
    assert "evaluate:speed" in again.reused
    assert again.speed == done.speed


def test_prompts_that_are_too_long_are_refused_before_calibration(pico: Pico, tmp_path: Path) -> None:
    """The folder of the run stays empty."""
    with pytest.raises(ConfigError, match="model pico-llama knows 256 positions"):
        secateur.run(pico.recipe(tmp_path / "run", evaluate={"speed": {}}))
    assert not (tmp_path / "run").exists()
