"""Merged experts against permutations tried one by one and experts run alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.plan import LayerPlan, Plan
from secateur.shrink import check_plan
from secateur.shrink.merging import align, merge_experts, reorder
from tests.conftest import WITH_EXPERTS, geometry_of
from tests.moe import moe_model
from tests.pruning import plan_keeping, prune

KEEP = (0, 1, 2, 6, 7, 8)


def dense(name: str) -> tuple[Any, Geometry]:
    """Return a tiny model in float32 and its geometry."""
    model = moe_model(name)
    return model, geometry_of(model, families()[name])


def merging(geometry: Geometry, groups: Sequence[Sequence[tuple[int, float]]]) -> Plan:
    """Return the plan that keeps ``KEEP`` everywhere, made of the given experts."""
    kept = {"expert": [KEEP if axis.num_units else () for axis in geometry.axes["expert"]]}
    plan = plan_keeping(geometry, kept, "uniform")
    merged = tuple(tuple(group) for group in groups)
    layers = tuple(replace(layer, merged=merged) if layer.keep else layer for layer in plan.layers["expert"])
    return replace(plan, layers={"expert": layers})


def pairs(first: float, second: float) -> list[list[tuple[int, float]]]:
    """Return groups of two for ``KEEP``: each with the one three further on."""
    return [[(expert, first), (expert + 3, second)] for expert in KEEP]


def alone(module: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return what one expert makes of every token."""
    index = torch.full((len(hidden), 1), expert)
    output: Tensor = module(hidden, index, torch.ones(len(hidden), 1))
    return output


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_a_permuted_copy_merges_into_the_expert_itself(name: str) -> None:
    """Channels are found again whatever the layout, interleaved, transposed or with biases; routers stay."""
    model, geometry = dense(name)
    experts = next(experts for experts in reversed(geometry.experts) if experts is not None)
    module = model.get_submodule(experts.module)
    slices = geometry.axes["expert_channel"][experts.layer].tensors
    tensors = {f"{experts.module}.{leaf}": tensor for leaf, tensor in module.state_dict().items()}
    orders = {}
    with torch.no_grad():
        for expert in KEEP:
            orders[expert] = torch.randperm(experts.width, generator=torch.Generator().manual_seed(expert))
            for full, tensor in tensors.items():
                copied = reorder(tensor[expert], [part for part in slices if part.name == full], orders[expert])
                tensor[expert + 3] = copied
        hidden = torch.randn(7, geometry.dimensions["hidden_size"], generator=torch.Generator().manual_seed(0))
        before = [alone(module, hidden, expert) for expert in range(12)]
        for expert in KEEP:
            torch.testing.assert_close(before[expert + 3], before[expert], rtol=1e-4, atol=1e-5)
            assert align(tensors, slices, expert, expert + 3, experts.width)[orders[expert]].tolist() == list(
                range(experts.width)
            )
        plan = merging(geometry, pairs(0.7, 0.3))
        pruned = prune(model, plan, geometry)
        plain = prune(
            model, plan_keeping(geometry, {"expert": [e.keep for e in plan.layers["expert"]]}, "uniform"), geometry
        )
        after = pruned.get_submodule(experts.module)
        for place, expert in enumerate(KEEP):
            difference = (alone(after, hidden, place) - before[expert]).abs().max() / before[expert].abs().max()
            assert float(difference) <= 1e-6
    router = pruned.get_submodule(experts.router).state_dict()
    assert all(
        torch.equal(router[leaf], kept) for leaf, kept in plain.get_submodule(experts.router).state_dict().items()
    )


def test_weights_say_how_much_of_each_expert_is_in_it() -> None:
    """Aligned members are averaged with their weights; the dense model keeps its own tensors."""
    model, geometry = dense("gpt_oss")
    plan = merging(geometry, pairs(3.0, 1.0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = dict(merge_experts(model.state_dict().items(), plan, geometry))
    module, slices = "model.layers.0.mlp.experts", geometry.axes["expert_channel"][0].tensors
    assert list(found) == list(before)
    order = align(before, slices, 0, 3, 24)
    for leaf in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
        name = f"{module}.{leaf}"
        other = reorder(before[name][3], [part for part in slices if part.name == name], order)
        torch.testing.assert_close(found[name][0], (3 * before[name][0] + other) / 4)
        assert torch.equal(found[name][3], before[name][3]) and torch.equal(model.state_dict()[name], before[name])


def test_a_group_of_one_and_members_without_weight_change_nothing() -> None:
    """What has no share in an expert is dropped."""
    model, geometry = dense("mixtral")
    plan = merging(geometry, [[(expert, 1.0), *([(expert + 3, 0.0)] if expert < 3 else [])] for expert in KEEP])
    for name, tensor in merge_experts(model.state_dict().items(), plan, geometry):
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([[(0, 1.0)]], "1 groups are not one for each of the 6 experts that stay"),
        ([[(expert, 1.0), (3, 1.0)] for expert in KEEP], "some expert is in two groups"),
        ([[(expert, 1.0), (expert + 40, 1.0)] for expert in KEEP], "there is none of that number"),
        ([[(expert + 3, 1.0)] for expert in KEEP], "expert 0 stays and is not in the group of its place"),
        ([[(e, 1.0), ((e + 9) % 12, 1.0)] for e in KEEP], "the group of expert 0 reaches into another of the router"),
        (pairs(0.0, 0.0), "the weights in the group of expert 0 are not numbers from 0"),
        (pairs(1.0, -0.5), "the weights in the group of expert 0 are not numbers from 0"),
        (pairs(1.0, float("nan")), "the weights in the group of expert 0 are not numbers from 0"),
    ],
)
def test_groups_that_fit_no_experts_are_refused(groups: Any, words: str) -> None:
    """A person may have edited them."""
    _, geometry = dense("deepseek_v3")
    with pytest.raises(PlanError, match=rf"merges experts of layer 1, but .*{words}.*Plan again"):
        check_plan(merging(geometry, groups), geometry)


def test_groups_survive_the_plan_file() -> None:
    """Layers without them do not mention them."""
    _, geometry = dense("mixtral")
    plan = merging(geometry, pairs(0.75, 0.25))
    assert Plan.from_dict(plan.to_dict()) == plan
    plain = replace(plan, layers={"expert": (LayerPlan(12, KEEP), plan.layers["expert"][1])})
    first, second = plain.to_dict()["layers"]["expert"]
    assert "merged" not in first and "merged" in second
    assert Plan.from_dict(plain.to_dict()) == plain
