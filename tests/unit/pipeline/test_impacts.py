"""Methods that look at several texts, in runs: texts by name, kept results, and what the plan says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import ConfigError
from secateur.store.artifacts import read_impacts
from tests.pico import Pico, build_pico, general_paragraphs, pico_tokenizer, random_model

DIMENSIONS = {"domain": ["medical"], "language": ["towns"], "task": ["again"]}


@pytest.fixture(scope="module")
def pico(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico project with another text."""
    folder = tmp_path_factory.mktemp("domains")
    (folder / "towns.txt").write_text("\n\n".join(general_paragraphs(300, seed=3)), encoding="utf-8")
    return build_pico(folder)


def planned(pico: Pico, output: Path, **prune: Any) -> Any:
    """Run a recipe with three domains up to its plan."""
    towns = str(pico.general.parent / "towns.txt")
    recipe = pico.recipe(output, prune={"budget": {"channels": 0.25}, **prune})
    recipe["domain"] |= {"towns": {"path": towns}, "again": {"path": towns}}
    recipe["calibrate"] |= {"max_tokens": 512, "gradient_tokens": 128}
    return secateur.run(recipe, until="plan")


def test_a_plan_for_three_dimensions(pico: Pico, tmp_path: Path) -> None:
    """Impacts come with the calibration, are kept, and the plan says what the dimensions lack."""
    options = {"dimensions": DIMENSIONS}
    first = planned(pico, tmp_path, method="cus_prun", options=options)
    assert first.reused == []
    same, reach = first.plan.notes
    assert same.startswith("dimensions language and task hold the same text (towns and again)")
    assert "the cut takes 25.0% of them, and reaches up to the lowest" in reach
    impacts = read_impacts(tmp_path / "statistics" / "towns.impacts.safetensors")
    assert impacts.num_documents == len(first.statistics["towns"].documents)
    wider = planned(pico, tmp_path, method="cus_prun", options=options, budget={"channels": 0.5})
    assert {"impacts:medical", "impacts:towns", "calibrate:general"} <= set(wider.reused)
    assert "plan" not in wider.reused and not (tmp_path / "statistics" / "general.impacts.safetensors").exists()
    for file in (tmp_path / "statistics").glob("*.impacts.*"):
        file.unlink()
    later = planned(pico, tmp_path, method="cus_prun", options=options)
    assert "calibrate:towns" in later.reused and "impacts:towns" not in later.reused
    assert later.plan.layers == first.plan.layers


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        ({"method": "gaprune"}, "general.gradients.safetensors"),
        ({"method": "d_pruner"}, "medical.gradients.safetensors"),
        ({"method": "contrast", "options": {"of": "fisher"}}, "general.gradients.safetensors"),
    ],
)
def test_the_domain_against_general_text(pico: Pico, tmp_path: Path, prune: dict[str, Any], kept: str) -> None:
    """General text is calibrated on, and differentiated where both texts are."""
    result = planned(pico, tmp_path, **prune)
    assert result.plan.method == prune["method"] and result.plan.calibrated_on == ("medical", "towns", "again")
    assert (tmp_path / "statistics" / kept).exists()
    assert not (prune["method"] == "d_pruner" and (tmp_path / "statistics" / "general.gradients.safetensors").exists())


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"options": {"dimensions": {**DIMENSIONS, "task": ["agan"]}}}, "unknown bucket 'agan'. Did you mean 'again'"),
        ({"options": {"dimensions": {"language": ["towns"]}}}, "leaves out medical, again"),
        ({"options": {"dimensions": {**DIMENSIONS, "task": []}}}, "no text for task"),
        ({"mix": {"medical": 1, "towns": 2}}, "looks at documents one by one, and prune.mix"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(pico: Pico, tmp_path: Path, prune: dict[str, Any], message: str) -> None:
    """Before any text is run."""
    with pytest.raises(ConfigError, match=message):
        planned(pico, tmp_path, method="cus_prun", **prune)
    assert not (tmp_path / "statistics").exists()


def test_the_same_with_a_model_that_is_loaded() -> None:
    """Statistics hold what documents need, per bucket; without it the method asks for it."""
    tokenizer, texts = pico_tokenizer(), {name: general_paragraphs(150, seed=i) for i, name in enumerate("ab")}
    model = random_model(len(tokenizer))
    small: dict[str, Any] = {"max_tokens": 512, "block_size": 64, "batch_size": 8}
    statistics = secateur.calibrate(model, tokenizer, texts, impacts=True, **small)
    how: dict[str, Any] = {"budget": {"channels": 0.25}, "method": "cus_prun"}
    plan = secateur.plan(model, statistics, options={"dimensions": {"one": ["a"], "two": ["b"]}}, **how)
    assert "reaches up to" in plan.notes[0]
    against = {"budget": {"channels": 0.25}, "method": "contrast", "buckets": ["a"], "options": {"against": "b"}}
    assert secateur.plan(model, statistics, **against).method == "contrast"
    with pytest.raises(ConfigError, match="method contrast: unknown bucket 'general'"):
        secateur.plan(model, statistics, budget={"channels": 0.25}, method="contrast")
    with pytest.raises(ConfigError, match="impacts=True"):
        secateur.plan(model, secateur.calibrate(model, tokenizer, texts, **small), **how)
