"""Runs whose method needs trained masks: they are kept, trained anew for other settings, and refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.errors import ConfigError
from secateur.families.loader import families
from secateur.records.masks import MaskStatistics
from secateur.records.plan import Plan
from secateur.store.artifacts import read_json, read_masks
from secateur.store.checkpoints import load_model, resolve_model
from tests.conftest import geometry_of
from tests.pico import Pico, build_pico, general_paragraphs, pico_tokenizer, random_model
from tests.pruning import logits, masked

LORA = {"rank": 2, "alpha": 8, "learning_rate": 0.05}
OPTIONS = {"target": 0.3, "steps": 6, "learning_rate": 0.5, "objective": "kl"}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico project."""
    return build_pico(tmp_path_factory.mktemp("masks"))


def planned(pico: Pico, output: Path, options: dict[str, Any], **prune: Any) -> Any:
    """Run a recipe up to its plan."""
    prune = {"budget": {"channels": 0.25}, "method": "learned_mask", "options": options, **prune}
    recipe = pico.recipe(output, prune=prune)
    recipe["calibrate"] |= {"max_tokens": 512, "gradient_tokens": 256}
    return secateur.run(recipe, until="plan")


def keeps_the_best(plan: Any, values: Tensor) -> bool:
    """Return whether no channel of the first layer went that is worth more than one that stayed."""
    layer = plan.layers["ffn_channel"][0]
    gone = [unit for unit in range(layer.num_units) if unit not in layer.keep]
    return 0 < len(gone) and float(values[gone].max()) <= float(values[list(layer.keep)].min())


def test_masks_are_trained_once(pico: Pico, tmp_path: Path) -> None:
    """For each text that decides; another budget finds them, other settings or another seed train them anew."""
    first = planned(pico, tmp_path, OPTIONS)
    file = tmp_path / "statistics" / "medical.masks.safetensors"
    masks = read_masks(file)
    assert first.reused == [] and len(masks.steps) == 6 and masks.num_tokens <= 256
    assert read_json(file.with_suffix(".json"))["settings"] == OPTIONS
    assert not (tmp_path / "statistics" / "general.masks.safetensors").exists()
    assert keeps_the_best(first.plan, masks.units[0, "ffn_channel"])
    again = planned(pico, tmp_path, OPTIONS, budget={"channels": 0.5})
    assert "masks:medical" in again.reused and "plan" not in again.reused
    for options, seed in ((OPTIONS, 1), ({**OPTIONS, "target": 0.4}, 0)):
        other = planned(pico, tmp_path, options, seed=seed)
        assert "calibrate:medical" in other.reused and "masks:medical" not in other.reused


def test_several_texts_each_have_masks(pico: Pico, tmp_path: Path) -> None:
    """A mixture weighs their probabilities."""
    short = {**OPTIONS, "steps": 2}
    mixed = planned(pico, tmp_path, short, mix={"medical": 3, "general": 1})
    assert mixed.plan.calibrated_on == ("medical", "general")
    one, two = (read_masks(tmp_path / "statistics" / f"{name}.masks.safetensors") for name in ("medical", "general"))
    values = 0.75 * one.units[0, "ffn_channel"] + 0.25 * two.units[0, "ffn_channel"]
    assert keeps_the_best(mixed.plan, values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 1.0}, "option target of method learned_mask should be less than 1; got 1.0"),
        ({"steps": 0}, "option steps of method learned_mask should be greater than 0; got 0"),
        ({"objective": "js"}, "option objective of method learned_mask 'js'"),
    ],
)
def test_settings_that_cannot_be_are_refused(pico: Pico, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    """Before any text is run."""
    with pytest.raises(ConfigError, match=message):
        planned(pico, tmp_path, options)
    assert not (tmp_path / "statistics").exists()


def test_half_precision_is_refused_at_once(pico: Pico, tmp_path: Path) -> None:
    """Gates learn by gradients, which float16 cannot hold."""
    recipe = pico.recipe(tmp_path, prune={"budget": {"channels": 0.25}, "method": "learned_mask"}) | {
        "dtype": "float16"
    }
    with pytest.raises(ConfigError, match="method learned_mask needs gradients; the model is float16"):
        secateur.run(recipe, until="plan")
    assert not (tmp_path / "statistics").exists()


def test_statistics_without_masks_name_the_way_to_them() -> None:
    """Of a model that is already loaded, masks are not trained."""
    tokenizer = pico_tokenizer()
    model = random_model(len(tokenizer))
    statistics = secateur.calibrate(model, tokenizer, general_paragraphs(150), max_tokens=512, block_size=64)
    with pytest.raises(ConfigError, match="needs trained masks, and these statistics hold none; use a recipe"):
        secateur.plan(model, statistics, budget={"channels": 0.25}, method="learned_mask")


def adapted(pico: Pico, output: Path, lora: Any, until: Any = "evaluate", **changes: Any) -> Any:
    """Run a recipe whose masks are trained with adapters, in float32."""
    prune = {"budget": {"channels": 0.25}, "method": "learned_mask", "options": {**OPTIONS, "lora": lora}}
    prune |= changes.pop("prune", {})
    recipe = pico.recipe(output, prune=prune, **changes) | {"dtype": "float32"}
    recipe["calibrate"] |= {"max_tokens": 512, "gradient_tokens": 256}
    return secateur.run(recipe, until=until)


def merged_model(pico: Pico, masks: MaskStatistics) -> Any:
    """Return the dense model with what was learned beside the masks added to its weights."""
    model = load_model(resolve_model(str(pico.model)), dtype="float32", device="cpu")
    assert masks.adapters is not None
    weights = {name: masks.adapters.merged(name, value, "out_in") for name, value in model.state_dict().items()}
    model.load_state_dict(weights)
    return model


def test_what_is_cut_is_what_the_adapters_made(pico: Pico, tmp_path: Path) -> None:
    """Masked with merged weights and cut models agree; the dense row is the untouched model; all is found again."""
    made = adapted(pico, tmp_path / "with", LORA)
    masks = read_masks(tmp_path / "with" / "statistics" / "medical.masks.safetensors")
    plan = Plan.from_dict(read_json(tmp_path / "with" / "plan.json"))
    cut = load_model(resolve_model(str(tmp_path / "with" / "model")), dtype="float32", device="cpu")
    model, tokens = merged_model(pico, masks), torch.arange(40).reshape(2, 20)
    kept = {"ffn_channel": [layer.keep for layer in plan.layers["ffn_channel"]]}
    with masked(model, geometry_of(model, families()["llama"]), kept):
        torch.testing.assert_close(logits(cut, tokens), logits(model, tokens), rtol=1e-4, atol=1e-4)
    assert any("merged before the cut" in note for note in plan.notes)
    plain = adapted(pico, tmp_path / "without", False)
    ours, theirs = made.evaluation.models, plain.evaluation.models
    losses = [[found[name].text["medical"].document_nll for name in ("dense", "pruned")] for found in (ours, theirs)]
    assert losses[0][0] == losses[1][0] and losses[0][1] != losses[1][1]
    again = adapted(pico, tmp_path / "with", LORA)
    wanted = {"masks:medical", "plan", "shrink", "evaluate:dense", "evaluate:pruned", "evaluate:random"}
    assert wanted <= set(again.reused)
    other = adapted(pico, tmp_path / "with", {**LORA, "rank": 3})
    assert {"calibrate:medical", "evaluate:dense"} <= set(other.reused)
    assert not {"masks:medical", "plan", "shrink", "evaluate:pruned", "evaluate:random"} & set(other.reused)


def test_a_run_that_was_stopped_cuts_the_same_weights(pico: Pico, tmp_path: Path) -> None:
    """After the masks, after the plan or not at all; a change of the weights alone cuts anew under the same plan."""
    whole = adapted(pico, tmp_path / "whole", LORA, "shrink")
    for until in ("calibrate", "plan"):
        adapted(pico, tmp_path / "parts", LORA, until)
    resumed = adapted(pico, tmp_path / "parts", LORA, "shrink")
    assert {"masks:medical", "plan"} <= set(resumed.reused)
    first, second = (read_json(made.folder / "manifest.json")["stages"]["shrink"] for made in (whole, resumed))
    assert first["model_fingerprint"] == second["model_fingerprint"]
    (tmp_path / "parts" / "statistics" / "medical.masks.safetensors").unlink()
    again = adapted(pico, tmp_path / "parts", LORA, "shrink")
    assert "masks:medical" not in again.reused
    third = read_json(again.folder / "manifest.json")["stages"]["shrink"]
    assert third["model_fingerprint"] == first["model_fingerprint"]


@pytest.mark.parametrize(
    ("prune", "lora", "message"),
    [
        ({"reconstruct": "dense"}, True, r"prune\.reconstruct: dense fits weights to the dense model's"),
        ({"bias_compensation": True}, True, r"prune\.bias_compensation adds means"),
        ({"allocation": "search"}, True, r"prune\.allocation: search measures cuts of the dense model"),
        ({"buckets": ["medical", "general"]}, True, "trains the weights on one text, and medical, general decide"),
        ({}, {"targets": ["qproj"]}, r"prune.options.lora target 'qproj'. Did you mean 'q_proj'\?"),
        ({}, {"rnk": 3}, r"option lora of method learned_mask .*Extra inputs are not permitted"),
        ({}, {"rank": 0}, r"option lora of method learned_mask .*greater than or equal to 1"),
    ],
)
def test_adapters_beside_what_rests_on_the_dense_weights_are_refused(
    pico: Pico, tmp_path: Path, prune: dict[str, Any], lora: Any, message: str
) -> None:
    """Before any text is run."""
    with pytest.raises(ConfigError, match=message):
        adapted(pico, tmp_path, lora, prune=prune)
    assert not (tmp_path / "statistics").exists()


def test_adapters_are_refused_layer_by_layer(pico: Pico, tmp_path: Path) -> None:
    """As masks are."""
    with pytest.raises(ConfigError, match="memory: by_layer holds one decoder layer at a time, and prune"):
        adapted(pico, tmp_path, True, memory="by_layer")
