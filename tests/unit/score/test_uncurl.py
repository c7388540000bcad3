"""Clusters of experts by their router logits, and the plans that merge them."""

from __future__ import annotations

from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import secateur
from secateur.allocate import Request, make_plan
from secateur.calibrate import collect
from secateur.errors import ConfigError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.gradients import UnitGradients
from secateur.records.plan import Plan
from secateur.records.routing import EXTREMES, SUMS, RoutingSums, mix_routing
from secateur.records.statistics import BucketStatistics, Moments, SequenceSums, Statistics
from secateur.score import METHODS, score_units, with_merged_experts
from secateur.score.method import Evidence
from secateur.score.uncurl import affinity, clusters, k_means, spectral_clusters
from secateur.store.checkpoints import save_model
from tests.blocks import hand_made_blocks
from tests.conftest import WITH_EXPERTS, geometry_of
from tests.moe import moe_model
from tests.pruning import logits, prune


def routing(values: Tensor, routed: list[float] | None = None) -> RoutingSums:
    """Return sums over tokens whose logits are the rows of ``values``."""
    ones = torch.ones(values.shape[1]).double()
    used = ones if routed is None else torch.tensor(routed).double()
    sums = {**dict.fromkeys((*SUMS, *EXTREMES), ones), "routed": used}
    return RoutingSums(len(values), **sums, logits=values.sum(0), logit_products=values.T @ values)


def planted(groups: list[list[int]], seed: int = 0, tokens: int = 200) -> Tensor:
    """Return logits in which the experts of a group follow each other, each with an offset of its own."""
    generator = torch.Generator().manual_seed(seed)
    num = sum(map(len, groups))
    logits_ = 0.2 * torch.randn(tokens, num, generator=generator).double() + torch.arange(num)
    for group in groups:
        logits_[:, group] += torch.randn(tokens, 1, generator=generator).double()
    return logits_


def taken(name: str) -> tuple[Any, Geometry, BucketStatistics]:
    """Return a tiny model with its statistics."""
    model = moe_model(name)
    model.set_experts_implementation("eager")
    geometry = geometry_of(model, families()[name])
    return model, geometry, collect(model, hand_made_blocks(), geometry)


def plan_of(
    model: Any, geometry: Geometry, found: BucketStatistics, budget: float = 0.5, shape: str = "uniform"
) -> Plan:
    """Return the plan that merges a share of the experts."""
    load = model.state_dict().get
    scores = score_units("uncurl", found, geometry, ["expert"], load_tensor=load)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    allocation = "global" if shape == "uneven" else "auto"
    request = Request(budget={"experts": budget}, shape=shape, allocation=allocation)
    plan = make_plan(scores, geometry, shapes, request)
    return with_merged_experts(plan, scores, found, geometry, load_tensor=load, seed=0)


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3", "granitemoe"])
def test_logits_are_summed_over_real_tokens(name: str) -> None:
    """As the router's own linear map gives them, document by document, without padding; shards add up."""
    model, geometry, found = taken(name)
    blocks = hand_made_blocks()
    heard: dict[str, list[Tensor]] = {}
    for experts in (experts for experts in geometry.experts if experts is not None):
        rows = heard.setdefault(experts.router, [])
        model.get_submodule(experts.router).register_forward_hook(
            lambda _module, _args, output, rows=rows: rows.append(output[0].double())
        )
    with torch.inference_mode():
        for ids in blocks.texts:
            model(torch.tensor([list(ids)]), use_cache=False)
    for (layer, _), sums in found.routing.items():
        experts = geometry.experts[layer]
        assert experts is not None and sums.logits is not None and sums.logit_products is not None
        rows = torch.cat(heard[experts.router])
        assert len(rows) == sums.count
        torch.testing.assert_close(sums.logits, rows.sum(0), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(sums.logit_products, rows.T @ rows, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(affinity(sums), torch.corrcoef(rows.T).clamp_min(0.0), rtol=1e-4, atol=1e-5)
        both = (sums + sums).logit_products
        assert both is not None and torch.equal(both, 2 * sums.logit_products)
        assert (sums + replace(sums, logits=None, logit_products=None)).logits is None


def test_a_mixture_weighs_means_of_logits() -> None:
    """However many tokens a text has."""
    first, second = planted([[0, 1], [2, 3]]), planted([[0, 2], [1, 3]], seed=1, tokens=50)
    mixed = mix_routing([routing(first), routing(second)], [0.25, 0.75])
    assert mixed.count == 250 and mixed.logits is not None and mixed.logit_products is not None
    torch.testing.assert_close(mixed.logits / 250, 0.25 * first.mean(0) + 0.75 * second.mean(0))
    expected = 0.25 * first.T @ first / 200 + 0.75 * second.T @ second / 50
    torch.testing.assert_close(mixed.logit_products / 250, expected)


def test_how_much_text_there_is_moves_no_layer_of_a_mixture() -> None:
    """Layers compare by their totals per token, each text with its share."""
    few, many = routing(planted([[0, 1], [2, 3]], tokens=50)), routing(planted([[0, 1], [2, 3]], seed=1, tokens=50))
    often = reduce(add, [many] * 9)
    for name in SUMS:
        short, long = (getattr(mix_routing([few, text], [0.5, 0.5]), name) for text in (many, often))
        torch.testing.assert_close(long / 500, short / 100)


def test_experts_that_follow_each_other_are_found() -> None:
    """Whatever their offsets; the most used one stands first, with its share of the tokens."""
    groups = [[0, 3, 7], [1, 4], [2, 5, 6]]
    made_up = score_evidence(routing(planted(groups), [1, 5, 0, 3, 5, 0, 0, 4]))
    found = sorted(sorted(member for member, _ in merged) for merged in clusters(made_up, 3, 1))
    assert found == groups
    by_first = {merged[0][0]: merged for merged in clusters(made_up, 3, 1)}
    assert by_first[7] == ((7, 0.5), (3, 0.375), (0, 0.125))
    assert by_first[1] == ((1, 0.5), (4, 0.5))  # among equals the first
    assert by_first[2] == ((2, 1.0), (5, 0.0), (6, 0.0))  # nobody is used


def score_evidence(found: RoutingSums) -> Evidence:
    """Return evidence that holds nothing but these sums."""
    nothing = torch.zeros(0).double()
    return Evidence(
        kind="expert",
        layer=0,
        num_units=len(found.routed),
        width=0,
        moments=Moments(0, nothing, nothing, nothing),
        sequences=SequenceSums(0, nothing),
        linear_abs=[],
        load_weights=list,
        load_reader=lambda: nothing[None],
        load_gram=lambda: nothing[None],
        load_gradients=lambda: UnitGradients(0, nothing, nothing, nothing, nothing, nothing),
        seed=0,
        load_routing=lambda: found,
    )


def test_clusters_stay_inside_the_routers_groups() -> None:
    """Experts of two groups that follow each other are not merged, and each group keeps as many."""
    made_up = score_evidence(routing(planted([[0, 1, 4, 5], [2, 3, 6, 7]])))
    found = [sorted(member for member, _ in merged) for merged in clusters(made_up, 4, 2)]
    assert sorted(found) == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_an_expert_whose_logit_never_moves_is_like_no_other() -> None:
    """It correlates with nothing, and nothing is divided by zero."""
    values = planted([[0, 1], [2, 3]])
    values[:, 1] = 3.0
    alike = affinity(routing(values))
    assert alike[1].tolist() == [0.0, 1.0, 0.0, 0.0] and bool(torch.isfinite(alike).all())
    assert len(set(spectral_clusters(alike, 3).tolist())) == 3


@pytest.mark.parametrize("count", [1, 4, 6, 7])
def test_no_cluster_is_empty(count: int) -> None:
    """Also where points fall together."""
    points = torch.tensor([[1.0, 0.0]] * 4 + [[0.0, 1.0]] * 3).double()
    assert set(k_means(points, count).tolist()) == set(range(count))
    alike = torch.ones(7, 7).double()
    assert set(spectral_clusters(alike, count).tolist()) == set(range(count))


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_merged_model_is_saved_and_loaded_as_a_stock_one(name: str, tmp_path: Path) -> None:
    """Half of the experts stay; every one that goes is in the group of one that stays."""
    model, geometry, found = taken(name)
    plan = plan_of(model, geometry, found)
    for axis, layer in zip(geometry.axes["expert"], plan.layers["expert"], strict=True):
        assert sorted(member for group in layer.merged for member, _ in group) == list(range(axis.num_units))
        assert len(layer.keep) == axis.num_units // 2
        assert layer.keep == tuple(group[0][0] for group in layer.merged)
        each = axis.num_units // axis.num_groups if axis.num_units else 1
        assert all(len({member // each for member, _ in group}) == 1 for group in layer.merged)
    pruned = prune(model, plan, geometry)
    save_model(pruned, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert type(loaded).__module__.startswith("transformers.")
    ids = torch.arange(11)[None]
    torch.testing.assert_close(logits(loaded, ids), logits(pruned, ids))
    dropped = replace(plan, layers={"expert": tuple(replace(layer, merged=()) for layer in plan.layers["expert"])})
    assert not torch.allclose(logits(prune(model, dropped, geometry), ids), logits(pruned, ids), atol=1e-4)


def test_layers_may_keep_different_numbers() -> None:
    """In shape uneven the budget gives more to layers whose experts are used more evenly."""
    model, geometry, found = taken("mixtral")
    plan = plan_of(model, geometry, found, shape="uneven")
    for layer in plan.layers["expert"]:
        assert len(layer.merged) == (len(layer.keep) if layer.is_narrowed else 0)
    assert plan.shape == "uneven"


def test_the_same_text_gives_the_same_plan() -> None:
    """Everything that is drawn is seeded."""
    model, geometry, found = taken("olmoe")
    assert plan_of(model, geometry, found) == plan_of(model, geometry, found)


def test_statistics_of_before_are_refused() -> None:
    """They can still be read, but do not say what the router computes."""
    model, geometry, found = taken("olmoe")
    old = {site: replace(sums, logits=None, logit_products=None) for site, sums in found.routing.items()}
    with pytest.raises(ConfigError, match="taken before that was noted"):
        plan_of(model, geometry, replace(found, routing=old))


def test_a_union_of_texts_is_refused() -> None:
    """Clusters are of all texts together."""
    model, geometry, found = taken("olmoe")
    with pytest.raises(ConfigError, match="uncurl merges experts by what they do on all texts together"):
        score_units(
            "uncurl",
            found,
            geometry,
            ["expert"],
            load_tensor=model.state_dict().get,
            buckets=("a", "b"),
            combine="union",
        )
    assert METHODS["uncurl"].kinds == ("expert",)


def test_a_loaded_model_is_planned_and_cut_alike() -> None:
    """From Python, with statistics alone; scales of experts need text, and are refused there."""
    model, geometry, found = taken("olmoe")
    statistics = Statistics("", "olmoe", {"text": found})
    plan = secateur.plan(model, statistics, method="uncurl", budget={"experts": 0.5})
    assert plan.layers == plan_of(model, geometry, found).layers
    ids = torch.arange(11)[None]
    smaller = secateur.shrink(model, plan)
    torch.testing.assert_close(logits(smaller, ids), logits(prune(model, plan, geometry), ids))
    with pytest.raises(ConfigError, match="the scales of experts that stay are fitted by running text"):
        secateur.shrink(model, plan, reconstruct=statistics)
