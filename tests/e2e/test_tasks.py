"""Tasks of the lm-evaluation-harness in a whole run, on layers that differ and a smaller vocabulary."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import secateur
from secateur.errors import ConfigError, UnavailableError
from tests.pico import Pico

ROOT = Path(__file__).parents[2]
NEEDS_HARNESS = importlib.util.find_spec("lm_eval") is None
TASKS = {"names": ["medical_terms"], "include_path": str(ROOT / "examples" / "tasks")}


@pytest.mark.skipif(NEEDS_HARNESS, reason="lm_eval is not installed (pip install 'secateur[tasks]')")
def test_uneven_layers_and_a_smaller_vocabulary_do_tasks(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both models are asked the same documents, so that their difference is paired; a second run asks nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    recipe = pico.recipe(
        tmp_path / "run",
        prune={"budget": {"channels": 0.25}, "units": ["ffn_channel", "vocabulary"], "shape": "uneven"},
        evaluate={"max_tokens": 768, "batch_size": 8, "controls": [], "tasks": TASKS},
    )
    done = secateur.run(recipe)
    assert done.tasks is not None and done.plan is not None
    assert done.plan.vocabulary is not None
    score = done.tasks.models["pruned"]["medical_terms"]
    assert score.num_samples == 16
    assert all(done.tasks.difference("medical_terms", metric) is not None for metric in score.metrics)
    assert "| medical_terms | acc |" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    again = secateur.run(recipe)
    assert "evaluate:tasks" in again.reused
    assert again.tasks == done.tasks


@pytest.mark.skipif(not NEEDS_HARNESS, reason="lm_eval is installed")
def test_a_missing_harness_is_said_at_the_beginning(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"pip install 'secateur\[tasks\]'"):
        secateur.run(pico.recipe(tmp_path / "run", evaluate={"tasks": TASKS}))
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(NEEDS_HARNESS, reason="lm_eval is not installed (pip install 'secateur[tasks]')")
def test_a_folder_of_tasks_that_is_none_is_refused_at_the_beginning(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="include_path: nowhere is not a folder"):
        secateur.run(pico.recipe(tmp_path / "run", evaluate={"tasks": {**TASKS, "include_path": "nowhere"}}))
    assert not (tmp_path / "run").exists()
