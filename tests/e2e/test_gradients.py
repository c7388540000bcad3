"""Runs with methods that need gradients: one backward pass per bucket, kept and reused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import secateur
from secateur.errors import ConfigError
from secateur.pipeline import calibration
from secateur.store.artifacts import read_gradients
from tests.pico import Pico, medical_records, pico_tokenizer, random_model, save_model_folder

FISHER = {"method": "fisher", "budget": {"channels": 0.5}}
CALIBRATE = {"max_tokens": 2048, "block_size": 64, "batch_size": 8, "gradient_tokens": 512}
KEPT = ["calibrate:medical", "calibrate:general", "gradients:medical"]


@pytest.fixture(scope="module")
def judged(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by gradients; runs on it go on, one after the other."""
    folder = tmp_path_factory.mktemp("runs") / "judged"
    secateur.run(pico.recipe(folder, prune=FISHER, calibrate=CALIBRATE), until="plan")
    return folder


def test_a_bucket_is_run_backwards_once(judged: Path, pico: Pico) -> None:
    """Only text that decides, no more of it than asked; another method on the same gradients runs nothing again."""
    gradients = read_gradients(judged / "statistics" / "medical.gradients.safetensors")
    assert 448 < gradients.num_tokens <= 512
    assert set(gradients.units) == {(0, "ffn_channel"), (1, "ffn_channel")}
    assert not (judged / "statistics" / "general.gradients.safetensors").exists()
    assert json.loads((judged / "manifest.json").read_text())["stages"]["gradients:medical"]["tokens"] <= 512
    prune = {**FISHER, "method": "taylor", "options": {"order": "second"}}
    result = secateur.run(pico.recipe(judged, prune=prune, calibrate=CALIBRATE), until="plan")
    assert result.reused == KEPT
    prune = {"method": "reversed", "options": {"of": "fisher"}, "budget": {"channels": 0.5}}
    assert secateur.run(pico.recipe(judged, prune=prune, calibrate=CALIBRATE), until="plan").reused == KEPT


def test_more_gradient_tokens_cost_a_new_backward_pass_only(judged: Path, pico: Pico) -> None:
    """The forward statistics stay; without the method the key changes nothing at all."""
    more = {**CALIBRATE, "gradient_tokens": 1024}
    result = secateur.run(pico.recipe(judged, prune=FISHER, calibrate=more), until="plan")
    assert result.reused == KEPT[:2]
    assert read_gradients(judged / "statistics" / "medical.gradients.safetensors").num_tokens > 512
    assert secateur.run(pico.recipe(judged, prune=FISHER, calibrate=more), until="plan").reused == [*KEPT, "plan"]
    plain = {"budget": {"channels": 0.5}}
    secateur.run(pico.recipe(judged, prune=plain, calibrate=more), until="plan")
    reused = secateur.run(pico.recipe(judged, prune=plain, calibrate=CALIBRATE), until="plan").reused
    assert reused == [*KEPT[:2], "plan"]


def test_a_run_that_was_stopped_goes_on(judged: Path, pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """A half gradient pass leaves nothing that counts as done."""
    recipe = pico.recipe(judged, prune=FISHER, calibrate={**CALIBRATE, "gradient_tokens": 256})

    def stop(*_arguments: Any, **_options: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(calibration, "collect_gradients", stop)
        secateur.run(recipe, until="plan")
    assert secateur.run(recipe, until="plan").reused == KEPT[:2]


def test_mixtures_weigh_gradients_too(judged: Path, pico: Pico) -> None:
    """Both buckets are run backwards once; the weights decide what stays."""
    plans = []
    for mix in ({"medical": 0.99, "general": 0.01}, {"medical": 0.01, "general": 0.99}):
        result = secateur.run(pico.recipe(judged, prune={**FISHER, "mix": mix}, calibrate=CALIBRATE), until="plan")
        assert result.plan is not None
        plans.append(result.plan.layers)
    assert set(result.reused) == {*KEPT, "gradients:general"}
    assert plans[0] != plans[1]


def test_half_precision_is_refused_before_anything_is_read(pico: Pico, tmp_path: Path) -> None:
    """By the recipe's dtype or the checkpoint's."""
    message = "method taylor needs gradients; the model is float16"
    prune = {"method": "taylor", "budget": {"channels": 0.5}}
    with pytest.raises(ConfigError, match=message):
        secateur.run(pico.recipe(tmp_path / "run", prune=prune, dtype="float16"))
    assert not (tmp_path / "run" / "statistics").exists()
    folder = save_model_folder(tmp_path / "half", dtype=torch.float16)
    result = secateur.run(pico.recipe(tmp_path / "run", model=str(folder), prune=prune), until="plan")
    assert result.plan is not None  # computed in float32 on a CPU


def test_loaded_models_take_gradients_when_asked() -> None:
    """And methods say so where they were not taken."""
    tokenizer = pico_tokenizer()
    model = random_model(len(tokenizer))
    texts = [str(record) for record in medical_records(80)]
    sizes: dict[str, Any] = {"max_tokens": 512, "block_size": 64}
    budget = {"channels": 0.5}
    without = secateur.calibrate(model, tokenizer, texts, **sizes)
    with pytest.raises(ConfigError, match=r"method fisher needs gradients.*\(gradients=True\)"):
        secateur.plan(model, without, budget=budget, method="fisher")
    statistics = secateur.calibrate(model, tokenizer, texts, gradients=True, gradient_tokens=128, **sizes)
    assert statistics.gradients["domain"].num_tokens <= 128
    plan = secateur.plan(model, statistics, budget=budget, method="fisher")
    assert secateur.shrink(model, plan).config.intermediate_size == 48
    with pytest.raises(ConfigError, match=r"calibrate\(..., gradients=True\) needs gradients; .* is float16"):
        secateur.calibrate(model.half(), tokenizer, texts, gradients=True, **sizes)
