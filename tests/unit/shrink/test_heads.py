"""Removing query heads from groups: the slices that go, and plans that would wire heads to another group."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.errors import FamilyError, PlanError
from secateur.families.loader import families
from secateur.records.units import FFN_CHANNEL, GQA_GROUP, QUERY_HEAD
from secateur.shrink import check_plan, shrink_config, shrink_parameters
from tests.conftest import geometry_of, pico_model
from tests.pruning import plan_keeping

CHANNELS = [list(range(64))] * 2


def dense(**extra: Any) -> tuple[Any, Any]:
    """Return a pico llama, three groups of two query heads, and its geometry."""
    family = families()["llama"]
    model = pico_model(family, **extra)
    return model, geometry_of(model, family)


def test_only_queries_and_their_output_columns_go() -> None:
    """Keys and values stay; the configuration says fewer heads and the same head width."""
    model, geometry = dense(attention_bias=True)
    plan = plan_keeping(geometry, {QUERY_HEAD: [[0, 3, 4], [1, 2, 5]]}, "uniform")
    before, after = model.state_dict(), dict(shrink_parameters(model.state_dict().items(), plan, geometry))
    layer = "model.layers.1.self_attn."
    query, output = before[layer + "q_proj.weight"], before[layer + "o_proj.weight"]
    assert torch.equal(after[layer + "q_proj.weight"], query.view(6, 8, 48)[[1, 2, 5]].flatten(0, 1))
    assert torch.equal(after[layer + "q_proj.bias"], before[layer + "q_proj.bias"].view(6, 8)[[1, 2, 5]].flatten())
    assert torch.equal(after[layer + "o_proj.weight"], output.view(48, 6, 8)[:, [1, 2, 5]].flatten(1))
    cut = {f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "o_proj")}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition(".")[0] for name in changed} == cut
    config = shrink_config(model.config.to_dict(), plan, geometry)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (3, 3, 8)


def test_a_whole_list_of_groups_does_not_undo_the_cut_of_heads() -> None:
    """Plans that also take out layers list groups; in which order kinds are listed does not matter."""
    model, geometry = dense(num_hidden_layers=3)
    kept = {
        QUERY_HEAD: [[0, 2, 4], [], [1, 3, 5]],
        GQA_GROUP: [[0, 1, 2], [], [0, 1, 2]],
        FFN_CHANNEL: [CHANNELS[0], [], CHANNELS[0]],
    }
    config = shrink_config(model.config.to_dict(), plan_keeping(geometry, kept, "uniform"), geometry)
    assert (config["num_hidden_layers"], config["num_attention_heads"], config["num_key_value_heads"]) == (2, 3, 3)


@pytest.mark.parametrize(
    ("kept", "words"),
    [
        (
            {QUERY_HEAD: [[0, 2, 4], [0, 1, 4]]},
            "the plan keeps 2, 0, 1 query_heads in the 3 groups of layer 1. Every group must keep as many as the "
            "others, or query heads would read another group's key/value head.",
        ),
        (
            {QUERY_HEAD: [[0, 2, 4], [1, 3, 5]], GQA_GROUP: [[0, 1], [0, 1, 2]]},
            "the plan removes both gqa_groups and query_heads, which are parts of each other. Remove one kind, and "
            "prune the result again for the other.",
        ),
        (
            {QUERY_HEAD: [[0, 2, 4], []]},
            "the plan keeps no query_head in layer 1, but does not say that its attention goes. Keep no gqa_group "
            "there either, or keep a query head of every group.",
        ),
        (
            {QUERY_HEAD: [[0, 2, 4], [0, 2, 4]], GQA_GROUP: [[0, 1, 2], []], FFN_CHANNEL: CHANNELS},
            "the plan takes the attention out of layer 1, but keeps query_heads there. Keep none.",
        ),
    ],
    ids=["unbalanced", "both kinds", "no heads", "heads without attention"],
)
def test_plans_that_miswire_heads_are_refused(kept: dict[str, Any], words: str) -> None:
    """Shapes would fit, and the model would run, with query heads reading the wrong key/value head."""
    _, geometry = dense()
    with pytest.raises(PlanError) as caught:
        check_plan(plan_keeping(geometry, kept, "uneven"), geometry)
    assert str(caught.value) == words


def test_models_with_one_query_head_per_group_lose_no_heads() -> None:
    """What can be cut instead is said."""
    _, geometry = dense(num_key_value_heads=6)
    with pytest.raises(FamilyError) as caught:
        check_plan(plan_keeping(geometry, {QUERY_HEAD: [[0, 1, 2]] * 2}, "uniform"), geometry)
    assert str(caught.value) == (
        "query_heads of a llama model cannot be cut: every key/value head of this model has one query head, which goes "
        "with it as a gqa_group. Use units: [ffn_channel, gqa_group]."
    )
