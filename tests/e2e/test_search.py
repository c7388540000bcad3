"""Allocations that are measured, and budgets in quality, through the whole run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import ConfigError
from secateur.recipe import CorpusSpec
from secateur.records.evaluation import CONFIDENCE_95, relative_rise
from secateur.store.artifacts import read_json
from tests.allocation import counts
from tests.pico import INTERMEDIATE_SIZE, NUM_GROUPS, NUM_LAYERS, Pico

SEARCH = {"tokens": 512, "levels": [0.25, 0.5], "generations": 3, "offspring": 4}
QUICK = {"max_tokens": 768, "batch_size": 8, "controls": []}


def _prune(**changes: Any) -> dict[str, Any]:
    return {"method": "activation_norm", "shape": "uneven", "search": SEARCH, **changes}


def _stages(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = read_json(folder / "manifest.json")["stages"]
    return stages


@pytest.mark.parametrize("allocation", ["log_increase", "block_influence", "knapsack", "search"])
def test_every_allocation_meets_the_budget(pico: Pico, tmp_path: Path, allocation: str) -> None:
    """A quarter of the channels goes, in each layer its own part of them."""
    prune = _prune(budget={"channels": 0.25}, allocation=allocation, reconstruct="dense")
    plan = secateur.run(pico.recipe(tmp_path, prune=prune), until="plan").plan
    assert plan is not None
    assert sum(counts(plan, "ffn_channel")) == pytest.approx(0.75 * NUM_LAYERS * INTERMEDIATE_SIZE, abs=2)


def test_a_search_over_all_kinds_keeps_the_budget_and_makes_a_working_model(pico: Pico, tmp_path: Path) -> None:
    """Channels, groups, sub-layers and layers compete for one budget over all parameters."""
    prune = _prune(
        budget={"parameters": 0.3}, units=["ffn_channel", "gqa_group", "attention", "ffn"], allocation="search"
    )
    result = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=QUICK))
    assert result.plan is not None
    assert result.plan.total_pruned <= 0.7 * result.plan.total_dense
    assert result.plan.total_pruned >= 0.6 * result.plan.total_dense
    assert result.evaluation is not None


def test_measurements_serve_every_budget_and_a_finished_search_is_not_repeated(pico: Pico, tmp_path: Path) -> None:
    """Another budget measures no cut again, other units only theirs; the same run again does nothing."""
    first = _prune(budget={"channels": 0.25}, allocation="knapsack")
    secateur.run(pico.recipe(tmp_path, prune=first), until="plan")
    assert "search:cuts" in _stages(tmp_path)
    second = secateur.run(pico.recipe(tmp_path, prune={**first, "budget": {"channels": 0.4}}), until="plan")
    assert "search:cuts" in second.reused
    wider = {**first, "units": ["ffn_channel", "gqa_group"], "budget": {"parameters": 0.2}}
    kept = read_json(tmp_path / "search" / "cuts.json")["losses"]
    secateur.run(pico.recipe(tmp_path, prune=wider), until="plan")
    assert read_json(tmp_path / "search" / "cuts.json")["losses"].items() > kept.items()
    third = secateur.run(pico.recipe(tmp_path, prune=first), until="plan")
    assert "search:cuts" in third.reused
    searched = {**first, "allocation": "search"}
    one = secateur.run(pico.recipe(tmp_path, prune=searched), until="plan")
    again = secateur.run(pico.recipe(tmp_path, prune=searched), until="plan")
    assert "plan" in again.reused
    assert again.plan == one.plan


def test_single_cuts_go_on_where_they_were_stopped(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any batch, to the same numbers."""
    from secateur.evaluate.output_change import OutputChange

    prune = _prune(budget={"channels": 0.25}, allocation="knapsack")
    secateur.run(pico.recipe(tmp_path / "whole", prune=prune), until="plan")
    add, batches = OutputChange._add, []

    def stop(self: Any, *args: Any) -> None:
        if len(batches) == 3:
            raise KeyboardInterrupt
        batches.append(1)
        add(self, *args)

    monkeypatch.setattr(OutputChange, "_add", stop)
    with pytest.raises(KeyboardInterrupt):
        secateur.run(pico.recipe(tmp_path / "stopped", prune=prune), until="plan")
    partial = read_json(tmp_path / "stopped" / "search" / "cuts.json")["partial"]
    assert partial["medical"]["num_batches"] == 3
    monkeypatch.setattr(OutputChange, "_add", add)
    secateur.run(pico.recipe(tmp_path / "stopped", prune=prune), until="plan")
    wanted, got = (read_json(tmp_path / name / "search" / "cuts.json")["losses"] for name in ("whole", "stopped"))
    assert got == pytest.approx(wanted, rel=1e-9)


def test_uniform_shapes_are_searched_over_layers_groups_and_channels(pico: Pico, tmp_path: Path) -> None:
    """What comes out is a stock model."""
    prune = _prune(
        budget={"parameters": 0.25}, shape="uniform", allocation="search", units=["ffn_channel", "gqa_group", "layer"]
    )
    result = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=QUICK))
    assert result.plan is not None
    assert result.plan.shape == "uniform"
    assert result.model_folder is not None
    config = json.loads((result.model_folder / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] in (NUM_GROUPS, NUM_GROUPS // 2, 1)
    assert result.plan.total_pruned == pytest.approx(0.75 * result.plan.total_dense, rel=0.05)


def test_a_time_limit_too_short_for_one_generation_is_refused(pico: Pico, tmp_path: Path) -> None:
    """With both times; what was measured is kept."""
    prune = _prune(budget={"channels": 0.25}, allocation="search")
    prune["search"] = {**SEARCH, "time_limit": 1e-6}
    with pytest.raises(ConfigError, match=r"time_limit leaves 0 s for the search, but one generation of 4 candidates"):
        secateur.run(pico.recipe(tmp_path, prune=prune), until="plan")
    assert "search:cuts" in _stages(tmp_path)


def test_more_time_goes_on_with_the_same_search(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation that was measured is not measured again, however long the search may now take."""
    from secateur.pipeline.search import Search

    prune = _prune(budget={"channels": 0.25}, allocation="search")
    first = secateur.run(pico.recipe(tmp_path, prune={**prune, "search": {**SEARCH, "time_limit": 600}}), until="plan")
    monkeypatch.setattr(Search, "_fitness", lambda *_: pytest.fail("measured again"))
    longer = secateur.run(pico.recipe(tmp_path, prune={**prune, "search": {**SEARCH, "time_limit": 900}}), until="plan")
    assert first.plan is not None
    assert longer.plan is not None
    assert longer.plan.layers == first.plan.layers


def test_a_bound_on_the_loss_gives_the_smallest_model_tried_that_keeps_it(pico: Pico, tmp_path: Path) -> None:
    """Kept on validation text with 95 % confidence; the verdict says what the test text says."""
    budget = {"max_domain_loss": 0.01, "max_general_loss": 0.05}
    prune = _prune(budget=budget, shape="uniform", reconstruct="dense")
    result = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=QUICK))
    assert result.plan is not None
    assert result.plan.budget == budget
    trials = read_json(tmp_path / "search" / "sizes.json")["trials"]
    kept = [
        trial["share"]
        for trial in trials
        if trial["rises"]
        and all(
            mean + CONFIDENCE_95 * error <= bound
            for (mean, error), bound in zip(trial["rises"].values(), budget.values(), strict=True)
        )
    ]
    removed = 1 - result.plan.total_pruned / result.plan.total_dense
    assert removed == pytest.approx(max(kept), abs=0.01)
    assert any("within its bound with 95 % confidence" in note for note in result.plan.notes)
    assert result.evaluation is not None
    models = result.evaluation.models
    rise = relative_rise(models["pruned"].text["medical"], models["dense"].text["medical"])
    assert f"on medical test text the loss rose by {rise.mean:.2%}" in result.summary
    assert result.summary in (tmp_path / "report.md").read_text()
    again = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=QUICK))
    assert {"plan", "shrink"} <= set(again.reused)


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"budget": {"channels": 0.2}, "allocation": "knapsack", "shape": "uniform"}, "needs shape: uneven"),
        ({"budget": {"threshold": 0.1}, "allocation": "search"}, "meets a size"),
        ({"budget": {"channels": 0.2, "groups": 0.25}, "allocation": "search"}, "give one budget"),
        ({"budget": {"max_domain_loss": 0.1}, "allocation": "search"}, "use knapsack"),
        ({"budget": {"max_domain_loss": 0.1, "parameters": 0.1}}, "give exactly one of"),
        ({"budget": {"channels": 0.2}, "search": {"time_limit": "soon"}}, "cannot read 'soon' as a time"),
    ],
)
def test_what_contradicts_itself_is_refused(pico: Pico, tmp_path: Path, prune: dict[str, Any], message: str) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        secateur.run(pico.recipe(tmp_path / "run", prune=_prune(**prune)))
    assert not (tmp_path / "run").exists()


def test_a_bound_on_general_text_needs_general_text(pico: Pico, tmp_path: Path) -> None:
    """The message names the key that is missing."""
    recipe = pico.recipe(tmp_path, prune=_prune(budget={"max_general_loss": 0.1}))
    del recipe["general"]
    with pytest.raises(ConfigError, match="add general, which is missing"):
        secateur.run(recipe)


def test_sub_layers_go_one_after_another_by_what_their_removal_changes(pico: Pico, tmp_path: Path) -> None:
    """The plan takes the measured order; a second run measures nothing, another budget only what is new."""
    prune = {
        "units": ["attention", "ffn"],
        "depth_method": "output_divergence",
        "shape": "uneven",
        "budget": {"parameters": 0.2},
        "search": {"tokens": 512},
    }
    evaluate = {**QUICK, "controls": ["random", "reversed"]}
    result = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=evaluate))
    plan, evaluation = result.plan, result.evaluation
    assert plan is not None and evaluation is not None
    rounds = read_json(tmp_path / "search" / "depth.json")["rounds"]
    names = {f"{kind} {layer}" for kind in ("attention", "ffn") for layer in plan.removed_sublayers(kind)}
    assert names and rounds[0]["gone"] == []
    assert min(rounds[0]["measured"], key=rounds[0]["measured"].get) in names
    assert len(rounds) == len(names)
    assert _stages(tmp_path)["search:depth"]["rounds"] == len(rounds)
    assert read_json(tmp_path / "scores" / "output_divergence.json")["cumulative"]
    assert "chosen by `output_divergence`" in (tmp_path / "report.md").read_text()
    assert {row.total_parameters for name, row in evaluation.models.items() if name == "random"} == {plan.total_pruned}

    again = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate=evaluate))
    assert {"plan", "shrink", "evaluate:reversed"} <= set(again.reused)
    more = {**prune, "budget": {"parameters": 0.35}}
    secateur.run(pico.recipe(tmp_path, prune=more), until="plan")
    both = read_json(tmp_path / "search" / "depth.json")["rounds"]
    assert both[: len(rounds)] == rounds and len(both) > len(rounds)
    back = secateur.run(pico.recipe(tmp_path, prune=prune), until="plan")
    assert "search:depth" in back.reused and back.plan == plan


def test_whole_layers_go_one_after_another_by_the_loss(pico: Pico, tmp_path: Path) -> None:
    """What was measured is the loss of the model that comes out, on the same text."""
    prune = {
        "units": ["layer"],
        "depth_method": "perplexity_drop",
        "budget": {"layers": 0.5},
        "search": {"tokens": 512},
    }
    recipe = pico.recipe(tmp_path, prune=prune, evaluate=QUICK)
    result = secateur.run(recipe)
    assert result.plan is not None and result.model_folder is not None
    (measured,) = [entry["measured"] for entry in read_json(tmp_path / "search" / "depth.json")["rounds"]]
    best = min(measured, key=measured.get)
    assert result.plan.removed_layers == (int(best.split()[1]),)
    assert result.plan.depth_method == "perplexity_drop"
    model = AutoModelForCausalLM.from_pretrained(result.model_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder)
    text = CorpusSpec(**recipe["domain"]["medical"])
    score = secateur.evaluate(model, tokenizer, text, split="calibration", max_tokens=512, block_size=64)
    assert measured[best] == pytest.approx(score.nll_per_token, rel=1e-5)


def test_measured_removals_serve_a_bound_on_the_loss(pico: Pico, tmp_path: Path) -> None:
    """Every size that is tried has its own number of rounds, and none is measured twice."""
    prune = {
        "units": ["ffn", "ffn_channel"],
        "depth_method": "output_divergence",
        "shape": "uneven",
        "budget": {"max_domain_loss": 0.5},
        "search": {"tokens": 512},
    }
    result = secateur.run(pico.recipe(tmp_path, prune=prune, evaluate={**QUICK, "controls": ["reversed"]}))
    assert result.plan is not None and result.evaluation is not None
    gone = [tuple(entry["gone"]) for entry in read_json(tmp_path / "search" / "depth.json")["rounds"]]
    assert len(gone) == len(set(gone)) >= 1


@pytest.mark.parametrize(
    "prune",
    [
        {"budget": {"channels": 0.2}, "allocation": "knapsack"},
        {"budget": {"layers": 0.5}, "units": ["layer"], "depth_method": "perplexity_drop", "shape": "uniform"},
    ],
)
def test_less_than_a_block_of_text_to_measure_on_is_refused(pico: Pico, tmp_path: Path, prune: dict[str, Any]) -> None:
    """Before the calibration."""
    with pytest.raises(ConfigError, match=r"prune\.search\.tokens is 32, less than one block of 64 tokens"):
        secateur.run(pico.recipe(tmp_path, prune=_prune(**prune, search={"tokens": 32})))
    assert not (tmp_path / "statistics").exists()


def test_an_allocation_that_measures_blocks_itself_needs_no_order(pico: Pico, tmp_path: Path) -> None:
    """It is refused before anything is run; in uniform shape the order of the layers is of use."""
    prune = _prune(
        units=["ffn_channel", "layer"],
        budget={"parameters": 0.2},
        depth_method="perplexity_drop",
        allocation="knapsack",
    )
    with pytest.raises(ConfigError, match=r"allocation: knapsack measures whole blocks itself.*Leave depth_method out"):
        secateur.run(pico.recipe(tmp_path / "refused", prune=prune))
    uniform = {**prune, "allocation": "search", "shape": "uniform"}
    assert secateur.run(pico.recipe(tmp_path / "uniform", prune=uniform), until="plan").plan is not None
    assert "search:depth" in _stages(tmp_path / "uniform")
