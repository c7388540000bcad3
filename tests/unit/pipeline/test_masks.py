"""Runs whose method needs trained masks: they are kept, trained anew for other settings, and refused early."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import secateur
from secateur.errors import ConfigError
from secateur.store.artifacts import read_json, read_masks
from tests.pico import Pico, build_pico, general_paragraphs, pico_tokenizer, random_model

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
