"""Runs that take experts out of mixture-of-experts models, from recipe to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import ConfigError, PlanError
from secateur.families.loader import families
from tests.conftest import pico_model
from tests.pico import Pico, pico_tokenizer


def moe_folder(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """Save a pico model with experts and four layers, with its tokenizer."""
    tokenizer, family = pico_tokenizer(), families()[name]
    layers = str(family.dimensions["num_layers"].config)
    model = pico_model(family, dtype, vocab_size=len(tokenizer), **{layers: 4})
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):  # transformers keeps it in float32 whatever the model has
            model.get_submodule(key.rpartition(".")[0]).e_score_correction_bias = torch.linspace(0.1, 0.3, len(buffer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "prune"),
    [
        ("qwen3_moe", {"budget": {"experts": 0.5}}),
        ("gpt_oss", {"units": ["expert", "gqa_group", "vocabulary", "layer"], "budget": {"parameters": 0.4}}),
        ("granitemoe", {"units": ["expert"], "budget": {"parameters": 0.2}, "shape": "uneven"}),
    ],
)
def test_experts_go_and_the_folder_loads(pico: Pico, tmp_path: Path, name: str, prune: dict[str, Any]) -> None:
    """As large as the plan says, beside a control of the same size; in uniform shape a stock model."""
    recipe = pico.recipe(tmp_path / "run", model=str(moe_folder(tmp_path / "moe", name)))
    result = secateur.run({**recipe, "prune": {"method": "random", **prune}})
    plan, evaluation = result.plan, result.evaluation
    assert plan is not None and evaluation is not None
    sizes = {row.total_parameters for label, row in evaluation.models.items() if label != "dense"}
    assert sizes == {plan.total_pruned}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32).eval()
    assert model.num_parameters() == plan.total_pruned
    assert type(model).__module__.startswith("transformers.") == (plan.shape == "uniform")
    assert "| experts |" in (tmp_path / "run/report.md").read_text()
    if name == "qwen3_moe":
        config = json.loads((tmp_path / "run/model/config.json").read_text())
        assert config["num_experts"] == config["num_local_experts"] == 4
        with safe_open(tmp_path / "run/model/model.safetensors", "pt") as file:
            assert "model.layers.1.mlp.experts.3.down_proj.weight" in set(file.keys())


def test_what_no_router_can_do_is_refused_before_any_text_is_run(pico: Pico, tmp_path: Path) -> None:
    """Nine tenths of eight experts leave fewer than a token is sent to."""
    recipe = pico.recipe(tmp_path / "run", model=str(moe_folder(tmp_path / "moe", "mixtral")))
    with pytest.raises(PlanError, match="leaves 1 per layer, but each token is sent to 2 experts"):
        secateur.run({**recipe, "prune": {"method": "random", "budget": {"experts": 0.9}}})
    with pytest.raises(
        PlanError, match="knapsack measures cuts of dense layers, and this mixtral model has layers with"
    ):
        prune = {"units": ["layer"], "budget": {"parameters": 0.3}, "allocation": "knapsack", "shape": "uneven"}
        secateur.run({**recipe, "prune": prune})
    assert not (tmp_path / "run/statistics").exists()


def test_the_ranking_says_what_stays(pico: Pico, tmp_path: Path) -> None:
    """Every layer's experts from the most to the least important; those of a plan without routing groups come first."""
    recipe = pico.recipe(tmp_path / "run", model=str(moe_folder(tmp_path / "moe", "mixtral")))
    result = secateur.run({**recipe, "prune": {"method": "easy_ep", "budget": {"experts": 0.5}}}, until="plan")
    assert result.plan is not None
    lines = [json.loads(line) for line in (tmp_path / "run/experts.jsonl").read_text().splitlines()]
    assert [line["layer"] for line in lines] == list(range(4))
    for line, layer in zip(lines, result.plan.layers["expert"], strict=True):
        assert line["scores"] == sorted(line["scores"], reverse=True)
        assert sorted(line["experts"][: len(layer.keep)]) == line["keep"] == list(layer.keep)
    by_hand = json.loads((tmp_path / "run/plan.json").read_text())
    by_hand["layers"]["expert"][1]["keep"] = "0-3"
    (tmp_path / "run/plan.json").write_text(json.dumps(by_hand))
    again = {**recipe, "prune": {"method": "easy_ep", "budget": {"experts": 0.5}}}
    assert "plan" in secateur.run(again, until="plan").reused
    assert json.loads((tmp_path / "run/experts.jsonl").read_text().splitlines()[1])["keep"] == [0, 1, 2, 3]
    secateur.run({**recipe, "prune": {"budget": {"groups": 0.5}, "method": "random"}}, until="plan")
    assert not (tmp_path / "run/experts.jsonl").exists()


def test_what_a_model_keeps_in_float32_stays_exact(pico: Pico, tmp_path: Path) -> None:
    """The router's correction of a 16-bit DeepSeek-V3 is cut, not rounded."""
    dense = moe_folder(tmp_path / "moe", "deepseek_v3", torch.bfloat16)
    recipe = pico.recipe(tmp_path / "run", model=str(dense))
    result = secateur.run({**recipe, "prune": {"method": "random", "budget": {"experts": 0.5}}}, until="shrink")
    assert result.plan is not None
    layer = next(index for index, entry in enumerate(result.plan.layers["expert"]) if entry.num_removed)
    name, keep = f"model.layers.{layer}.mlp.gate.e_score_correction_bias", result.plan.layers["expert"][layer].keep
    with (
        safe_open(dense / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "run/model/model.safetensors", "pt") as after,
    ):
        assert torch.equal(after.get_tensor(name), before.get_tensor(name)[list(keep)])
        assert after.get_tensor(name).dtype == torch.float32


def facts_of(folder: Path) -> dict[str, Any]:
    """Return what a run noted of its cut."""
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["stages"]["shrink"]
    return found


@pytest.mark.parametrize("reconstruct", ["dense", "pruned"])
def test_experts_that_stay_are_scaled_the_same_by_layer(pico: Pico, tmp_path: Path, reconstruct: str) -> None:
    """OLMoE's weights do not add up to 1: scales bring its experts back, and one layer at a time does the same."""
    recipe = pico.recipe(tmp_path / "whole", model=str(moe_folder(tmp_path / "moe", "olmoe")))
    prune = {"method": "easy_ep", "budget": {"experts": 0.5}, "reconstruct": reconstruct}
    secateur.run({**recipe, "prune": prune}, until="shrink")
    found = facts_of(tmp_path / "whole")["reconstruction"]
    assert found["error_after"] < found["error_before"] and found["projections"] >= 4
    by_layer = {**recipe, "prune": prune, "memory": "by_layer", "output": str(tmp_path / "layers")}
    secateur.run(by_layer, until="shrink")
    plain = {**recipe, "prune": {**prune, "reconstruct": "none"}, "output": str(tmp_path / "plain")}
    secateur.run(plain, until="shrink")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model", dtype=torch.float32).state_dict()
        for name in ("whole", "layers", "plain")
    ]
    for key, tensor in models[0].items():
        torch.testing.assert_close(models[1][key], tensor, rtol=1e-3, atol=1e-4)
        fitted = key.endswith("down_proj") or (reconstruct == "pruned" and key.endswith("o_proj.weight"))
        assert fitted or torch.equal(models[2][key], tensor)
    assert not torch.allclose(
        models[2]["model.layers.0.mlp.experts.down_proj"], models[0]["model.layers.0.mlp.experts.down_proj"], rtol=0.05
    )


def test_experts_and_groups_are_fitted_side_by_side(pico: Pico, tmp_path: Path) -> None:
    """Gram matrices for projections, scales for experts, in one cut."""
    recipe = pico.recipe(tmp_path / "run", model=str(moe_folder(tmp_path / "moe", "qwen2_moe")))
    prune = {"units": ["expert", "gqa_group"], "budget": {"parameters": 0.4}, "reconstruct": "dense"}
    result = secateur.run({**recipe, "prune": {"method": "random", **prune}})
    assert result.evaluation is not None and result.plan is not None
    assert facts_of(tmp_path / "run")["reconstruction"]["projections"] == 7  # four layers, the first one dense


def test_experts_are_merged_by_recipe(pico: Pico, tmp_path: Path) -> None:
    """Planned from the statistics that are there, cut alike with one layer in memory, beside controls that drop."""
    recipe = pico.recipe(tmp_path / "run", model=str(moe_folder(tmp_path / "moe", "gpt_oss")))
    prune = {"method": "uncurl", "budget": {"experts": 0.5}}
    result = secateur.run({**recipe, "prune": prune})
    assert result.plan is not None and result.evaluation is not None
    assert set(result.evaluation.models) == {"dense", "pruned", "random"}
    assert all(len(layer.merged) == 4 for layer in result.plan.layers["expert"])
    again = secateur.run({**recipe, "prune": prune}, until="plan")
    assert again.plan == result.plan and "plan" in again.reused
    secateur.run({**recipe, "prune": prune, "memory": "by_layer", "output": str(tmp_path / "layers")}, until="shrink")
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "model", dtype=torch.float32).state_dict()
        for name in ("run", "layers")
    ]
    for key, tensor in models[0].items():
        torch.testing.assert_close(models[1][key], tensor, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="scales experts that stay as they are, and method uncurl merges"):
        secateur.run({**recipe, "prune": {**prune, "reconstruct": "dense"}})
