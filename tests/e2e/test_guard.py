"""Several domains in one model: the mixture that hurts the worst of them least, found on validation text."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.errors import ConfigError
from secateur.store.artifacts import read_json
from tests.pico import Pico

QUICK = {"max_tokens": 512, "controls": []}


def _texts(pico: Pico, folder: Path) -> dict[str, Any]:
    """Return two domains that share hardly a token: made-up medicine, and numbers in columns."""
    draw, file = random.Random(0), folder / "numbers.txt"
    lines = [" ".join(f"{draw.randint(0, 9)}{draw.choice('+-*/=')}" for _ in range(24)) for _ in range(300)]
    if not file.exists():
        file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    medical = {"path": str(pico.domain), "text": "Question: {question}\nAnswer: {answer}"}
    return {"medical": medical, "numbers": str(file)}


def _recipe(pico: Pico, folder: Path, output: str, **prune: Any) -> dict[str, Any]:
    asked = {"method": "activation_norm", "budget": {"channels": 0.5}, **prune}
    return pico.recipe(folder / output, domain=_texts(pico, folder), prune=asked, evaluate=QUICK)


def _worst(mixture: dict[str, Any]) -> float:
    return max(float(mean) for mean, _ in mixture["rises"].values())


def test_the_worst_domain_is_hurt_no_more_than_by_equal_weights(pico: Pico, tmp_path: Path) -> None:
    """On validation text; the plan says the weights, its model is the one they give, and a second run reuses all."""
    recipe = _recipe(pico, tmp_path, "guarded", combine="guard", guard={"steps": 3}, reconstruct="dense")
    made = secateur.run(recipe)
    assert made.plan is not None
    tried = read_json(tmp_path / "guarded" / "search" / "guard.json")["mixtures"]
    best = min(tried, key=_worst)
    assert tried[0]["weights"] == {"medical": 0.5, "numbers": 0.5}
    assert 2 <= len(tried) <= 4
    assert _worst(best) <= _worst(tried[0])
    assert made.plan.mix == best["weights"]
    assert any("combine: guard" in note for note in made.plan.notes)
    assert "the mixture medical (" in (tmp_path / "guarded" / "report.md").read_text()

    given = secateur.run(_recipe(pico, tmp_path, "given", mix=best["weights"], reconstruct="dense"))
    assert given.plan is not None and given.evaluation is not None and made.evaluation is not None
    assert given.plan.layers == made.plan.layers
    for name, score in given.evaluation.models["pruned"].text.items():
        assert made.evaluation.models["pruned"].text[name].nll_per_token == pytest.approx(score.nll_per_token, rel=1e-9)

    again = secateur.run(recipe)
    assert {"plan", "shrink", "evaluate:pruned"} <= set(again.reused)
    assert again.plan == made.plan


def test_the_search_begins_with_the_weights_that_are_given(pico: Pico, tmp_path: Path) -> None:
    """Of any scale, general text among them if it is to be guarded too."""
    prune = {"mix": {"medical": 2, "general": 6}, "combine": "guard", "guard": {"steps": 1}}
    made = secateur.run(_recipe(pico, tmp_path, "run", **prune), until="plan")
    assert made.plan is not None
    tried = read_json(tmp_path / "run" / "search" / "guard.json")["mixtures"]
    assert tried[0]["weights"] == {"medical": 0.25, "general": 0.75}
    assert set(tried[0]["rises"]) == {"medical", "general"}


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"method": "cus_prun"}, "combine: guard weighs texts as a whole. Use combine: mean"),
        ({"method": "magnitude"}, "method magnitude reads none"),
        ({"budget": {"max_domain_loss": 0.1}}, "a bound on the loss for the size; find the size first"),
        ({"budget": {"threshold": 0.1}}, "a threshold for the size; find the size first"),
        ({"allocation": "knapsack", "shape": "uneven"}, "would measure all layers again"),
        ({"units": ["vocabulary"], "budget": {"parameters": 0.1}}, "only the vocabulary is cut"),
        ({"buckets": ["numbers"]}, "guard needs two texts that decide, and there is numbers alone"),
        ({"mix": {"numbers": 1.0}}, "guard needs two texts that decide, and there is numbers alone"),
        ({"guard": {"steps": 0}}, "prune.guard.steps"),
        (
            {"units": ["layer"], "budget": {"layers": 0.5}, "depth_method": "perplexity_drop"},
            "depth_method: perplexity_drop would be measured again",
        ),
    ],
)
def test_what_a_guard_cannot_do_is_refused(pico: Pico, tmp_path: Path, prune: dict[str, Any], message: str) -> None:
    """Before any text is run."""
    with pytest.raises(ConfigError, match=message):
        secateur.run(_recipe(pico, tmp_path, "run", **{"combine": "guard", **prune}))
    assert not (tmp_path / "run" / "statistics").exists()
