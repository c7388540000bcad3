"""Runs that take query heads out of their groups, from recipe to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import PlanError
from tests.pico import NUM_GROUPS, Pico


@pytest.mark.parametrize(
    "prune",
    [
        {"method": "obs", "budget": {"heads": 0.5}, "reconstruct": "pruned"},
        {"method": "fisher", "budget": {"heads": 0.5}},
    ],
    ids=["gram", "gradient"],
)
def test_one_of_two_query_heads_per_group_goes(pico: Pico, tmp_path: Path, prune: dict[str, Any]) -> None:
    """A stock model with one query head per key/value head comes out, beside balanced controls of its size."""
    controls = {"max_tokens": 512, "batch_size": 8, "controls": ["random", "reversed"]}
    result = secateur.run(pico.recipe(tmp_path / "run", prune=prune, evaluate=controls))
    plan, evaluation = result.plan, result.evaluation
    assert plan is not None and evaluation is not None
    for layer in plan.layers["query_head"]:
        assert [head // 2 for head in layer.keep] == list(range(NUM_GROUPS))
    config = json.loads((tmp_path / "run/model/config.json").read_text())
    assert (config["model_type"], config["num_attention_heads"]) == ("llama", NUM_GROUPS)
    assert (config["num_key_value_heads"], config["head_dim"]) == (NUM_GROUPS, 8)
    sizes = {row.total_parameters for name, row in evaluation.models.items() if name != "dense"}
    assert sizes == {plan.total_pruned}
    assert "query heads" in (tmp_path / "run/report.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32).eval()
    prompt = AutoTokenizer.from_pretrained(tmp_path / "run/model")("The patient", return_tensors="pt")
    with torch.inference_mode():
        cached, plain = (
            model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=c) for c in (True, False)
        )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("allocation", ["knapsack", "search"])
def test_heads_and_channels_are_measured_together(pico: Pico, tmp_path: Path, allocation: str) -> None:
    """Measured allocations keep groups balanced as well."""
    prune = {
        "units": ["ffn_channel", "query_head"],
        "budget": {"parameters": 0.2},
        "shape": "uneven",
        "allocation": allocation,
        "search": {"tokens": 256, "generations": 2, "offspring": 4},
    }
    plan = secateur.run(pico.recipe(tmp_path / "run", prune=prune)).plan
    assert plan is not None and set(plan.layers) == {"ffn_channel", "query_head"}
    for layer in plan.layers["query_head"]:
        kept = [sum(head // 2 == group for head in layer.keep) for group in range(NUM_GROUPS)]
        assert len(set(kept)) == 1


def test_uniform_search_offers_counts_that_groups_can_share(pico: Pico, tmp_path: Path) -> None:
    """Every candidate of a search in uniform shape keeps as many heads of each group."""
    prune = {
        "units": ["ffn_channel", "query_head"],
        "budget": {"parameters": 0.2},
        "allocation": "search",
        "search": {"tokens": 256},
    }
    plan = secateur.run(pico.recipe(tmp_path / "run", prune=prune)).plan
    assert plan is not None and plan.shape == "uniform"
    assert {len(layer.keep) for layer in plan.layers["query_head"]} <= {NUM_GROUPS, 2 * NUM_GROUPS}


def test_a_share_too_small_for_every_group_is_refused_before_any_text(pico: Pico, tmp_path: Path) -> None:
    """The counts that work are said."""
    with pytest.raises(PlanError, match="kept counts are multiples of 4"):
        secateur.run(pico.recipe(tmp_path / "run", prune={"budget": {"heads": 0.1}}))
    assert not list((tmp_path / "run").glob("statistics/*"))
