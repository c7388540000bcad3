"""Runs that take out whole layers and sub-layers, from recipe to report, and once more from their own result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.cli.main import cli
from secateur.errors import ConfigError, PlanError
from secateur.pipeline import RunResult
from tests.pico import NUM_GROUPS, Pico, save_model_folder

UNEVEN = {"units": ["ffn_channel", "attention"], "budget": {"parameters": 0.4}, "shape": "uneven"}


@pytest.fixture(scope="module")
def deep(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """The pico project with a model of five layers."""
    return replace(pico, model=save_model_folder(tmp_path_factory.mktemp("deep") / "deep", num_hidden_layers=5))


def run(pico: Pico, folder: Path, prune: dict[str, Any], **changes: Any) -> RunResult:
    """Run a recipe with both controls."""
    controls = {"max_tokens": 512, "batch_size": 8, "controls": ["random", "reversed"]}
    return secateur.run(pico.recipe(folder, prune=prune, evaluate=controls, **changes))


def text_of(folder: Path, **options: Any) -> str:
    """Return what a saved model says."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The patient", return_tensors="pt")
    with torch.inference_mode():
        written = model.generate(**prompt, max_new_tokens=8, do_sample=False, **options)
    text: str = tokenizer.decode(written[0])
    return text


def test_half_of_the_layers_go(pico: Pico, tmp_path: Path) -> None:
    """A stock model of one layer comes out, measured beside controls of its size, and every page says which went."""
    result = run(pico, tmp_path / "run", {"units": ["layer"], "budget": {"layers": 0.5}})
    plan, evaluation = result.plan, result.evaluation
    assert plan is not None and evaluation is not None
    assert (plan.shape, plan.method, plan.depth_method) == ("uniform", "block_influence", "block_influence")
    (gone,) = plan.removed_layers
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"]) == ("llama", 1)
    sizes = {row.total_parameters for name, row in evaluation.models.items() if name != "dense"}
    assert sizes == {plan.total_pruned}
    sentence = f"Layers removed: {gone} (chosen by `block_influence`)."
    assert sentence in (tmp_path / "run/report.md").read_text()
    card = (tmp_path / "run/model/README.md").read_text()
    assert sentence in card
    assert "Whole layers or sub-layers were removed" in card
    assert (tmp_path / "run/scores/block_influence.safetensors").is_file()
    assert text_of(tmp_path / "run/model") == text_of(tmp_path / "run/model", use_cache=False)


def test_attention_and_channels_share_a_budget(pico: Pico, tmp_path: Path) -> None:
    """The first layer keeps its attention, channels make up the rest, and the terminal tells what went."""
    result = run(pico, tmp_path / "run", UNEVEN)
    plan, evaluation = result.plan, result.evaluation
    assert plan is not None and evaluation is not None
    assert plan.removed_sublayers("attention") == (1,)
    assert [len(layer.keep) for layer in plan.layers["gqa_group"]] == [NUM_GROUPS, 0]
    assert 1 - plan.total_pruned / plan.total_dense == pytest.approx(0.4, abs=0.005)
    assert {row.total_parameters for row in evaluation.models.values()} == {plan.total_dense, plan.total_pruned}
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert config["model_type"] == "pruned_llama"
    assert config["per_layer_config"]["1"]["skip"] == ["attention"]
    assert text_of(tmp_path / "run/model") == text_of(tmp_path / "run/model", use_cache=False)

    shown = CliRunner().invoke(
        cli, ["plan", str(pico.write_recipe(tmp_path / "r.yml", tmp_path / "run", prune=UNEVEN)), "-q"]
    )
    assert shown.exit_code == 0
    assert "attention removed: 1\n" in shown.output


def test_everything_at_once_with_reconstruction_and_again(deep: Pico, tmp_path: Path) -> None:
    """Whole blocks and narrower ones in one plan, fitted on the pruned stream; the result is profiled and cut again."""
    kinds = ["layer", "attention", "ffn", "gqa_group", "ffn_channel"]
    prune = {"units": kinds, "budget": {"parameters": 0.45}, "shape": "uneven", "reconstruct": "pruned"}
    first = run(deep, tmp_path / "first", prune)
    assert first.plan is not None and first.evaluation is not None
    assert len(first.plan.removed_layers) == 1
    assert first.plan.removed_sublayers("attention") or first.plan.removed_sublayers("ffn")
    assert first.plan.total_pruned == first.evaluation.models["pruned"].total_parameters

    once = replace(deep, model=tmp_path / "first/model")
    again = {"units": ["layer", "ffn_channel"], "budget": {"layers": 0.3, "channels": 0.2}, "shape": "uneven"}
    second = run(once, tmp_path / "second", {**again, "method": "obs", "reconstruct": "dense"})
    assert second.plan is not None and second.evaluation is not None
    assert len(second.plan.removed_layers) == 1
    assert second.plan.total_dense == first.plan.total_pruned
    assert second.plan.total_pruned == second.evaluation.models["pruned"].total_parameters
    with pytest.raises(PlanError, match=r"so shape: uniform is not possible\. Use shape: uneven"):
        run(once, tmp_path / "third", {"budget": {"channels": 0.25, "groups": 0.25}})


def test_a_layer_taken_out_by_hand_is_removed(pico: Pico, tmp_path: Path) -> None:
    """A plan may be edited: nothing kept of either kind is a layer less, and the sizes in the plan follow."""
    prune = {"budget": {"channels": 0.25, "groups": 0.5}}
    run(pico, tmp_path / "run", prune)
    file = tmp_path / "run/plan.json"
    plan = json.loads(file.read_text())
    for kind in plan["layers"]:
        plan["layers"][kind][1]["keep"] = ""
    file.write_text(json.dumps(plan))
    result = run(pico, tmp_path / "run", prune)
    assert result.plan is not None and result.evaluation is not None
    assert result.plan.removed_layers == (1,)
    for row in ("pruned", "random"):
        assert result.evaluation.models[row].total_parameters == result.plan.total_pruned


def test_what_cannot_work_is_refused_before_anything_is_run(pico: Pico, tmp_path: Path) -> None:
    """Methods that cannot score blocks, shares that round to nothing, and unknown names."""
    refused = {
        "cannot score units of kind layer. Set prune.depth_method to one of: block_influence": {
            "budget": {"layers": 0.5},
            "depth_method": "contextual",
        },
        "method block_influence scores .* and cannot score units of kind ffn_channel. Set prune.method": {
            "method": "block_influence"
        },
        "unknown method 'block_infuence'. Did you mean 'block_influence'": {
            "budget": {"layers": 0.5},
            "depth_method": "block_infuence",
        },
    }
    for words, prune in refused.items():
        with pytest.raises(ConfigError, match=words):
            run(pico, tmp_path / "run", prune)
    with pytest.raises(PlanError, match=r"removing 0\.2 of 2 decoder layers rounds to none\. 1 to 1 of them can go"):
        run(pico, tmp_path / "run", {"budget": {"layers": 0.2}})
    assert not (tmp_path / "run/statistics").exists()
