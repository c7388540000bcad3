"""Running a method over a whole model."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate import collect
from secateur.errors import CheckpointError, ConfigError, FamilyError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.statistics import BucketStatistics
from secateur.score import score_units
from secateur.score.run import unit_weights
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model


@cache
def calibrated(name: str) -> tuple[Any, Geometry, BucketStatistics]:
    """Return a pico model, its geometry and its statistics."""
    family = families()[name]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    return model, geometry, collect(model, hand_made_blocks(), geometry)


def refuse(name: str) -> Tensor:
    """Fail: no weights are needed here."""
    raise AssertionError(f"{name} was read")


def test_every_layer_of_every_kind_gets_its_own_scores() -> None:
    """Scores come per kind and layer, from the statistics of that place, with the record filled in."""
    _, geometry, statistics = calibrated("llama")
    scores = score_units(
        "contextual",
        statistics,
        geometry,
        ["ffn_channel", "gqa_group"],
        load_tensor=refuse,
        options={"at": "activation"},
        buckets=["medical"],
        inputs_fingerprint="abc",
    )
    assert (scores.method, dict(scores.options), tuple(scores.buckets)) == (
        "contextual",
        {"at": "activation"},
        ("medical",),
    )
    assert scores.inputs_fingerprint == "abc"
    for layer in range(2):
        moments = statistics.moments[layer, "ffn_channel"]
        torch.testing.assert_close(scores.values["ffn_channel"][layer], moments.sum_abs / 50)
        moments = statistics.moments[layer, "gqa_group"]
        torch.testing.assert_close(scores.values["gqa_group"][layer], (moments.sum_abs / 50).reshape(3, 16).mean(1))


def test_linear_statistics_reach_the_method() -> None:
    """``at: linear`` is the smaller of the gate's and the up projection's mean absolute output."""
    _, geometry, statistics = calibrated("llama")
    scores = score_units(
        "contextual", statistics, geometry, ["ffn_channel"], load_tensor=refuse, options={"at": "linear"}
    )
    gate, up = (statistics.linear_abs[1, f"ffn_channel.linear{i}"] / 50 for i in range(2))
    torch.testing.assert_close(scores.values["ffn_channel"][1], torch.minimum(gate, up))


def test_weights_come_by_name_from_the_loader() -> None:
    """Only tensors of the asked kind are read, and missing biases are asked for without harm."""
    model, geometry, statistics = calibrated("llama")
    state, asked = model.state_dict(), []

    def load(name: str) -> Tensor | None:
        asked.append(name)
        return state.get(name)

    score_units("magnitude", statistics, geometry, ["gqa_group"], load_tensor=load)
    assert "model.layers.0.self_attn.q_proj.weight" in asked
    assert "model.layers.1.self_attn.q_proj.bias" in asked
    assert not any("mlp" in name for name in asked)


def test_the_seed_reaches_methods_that_draw() -> None:
    """Random scores follow the seed."""
    _, geometry, statistics = calibrated("llama")
    runs = [
        score_units("random", statistics, geometry, ["ffn_channel"], load_tensor=refuse, seed=seed).values
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0]["ffn_channel"][0], runs[1]["ffn_channel"][0])
    assert not torch.equal(runs[0]["ffn_channel"][0], runs[2]["ffn_channel"][0])


def test_unknown_methods_and_options_are_refused_before_scoring() -> None:
    """Both name what is known."""
    _, geometry, statistics = calibrated("llama")
    with pytest.raises(ConfigError, match=r"unknown method 'contextul'. Did you mean 'contextual'"):
        score_units("contextul", statistics, geometry, ["ffn_channel"], load_tensor=refuse)
    with pytest.raises(ConfigError, match="unknown option of method contextual 'ta'"):
        score_units("contextual", statistics, geometry, ["ffn_channel"], load_tensor=refuse, options={"ta": 1})


def test_units_that_cannot_be_cut_are_not_scored() -> None:
    """A family's fixed units are refused with its reason."""
    _, geometry, statistics = calibrated("gpt2")
    with pytest.raises(FamilyError, match="gqa_groups of a gpt2 model cannot be cut: GPT-2 derives"):
        score_units("contextual", statistics, geometry, ["gqa_group"], load_tensor=refuse)


def test_scores_that_are_not_finite_are_refused() -> None:
    """Method, kind and layer are named."""
    model, geometry, statistics = calibrated("llama")
    state = {**model.state_dict()}
    broken = state["model.layers.1.mlp.up_proj.weight"].clone()
    broken[3, 4] = torch.nan
    state["model.layers.1.mlp.up_proj.weight"] = broken
    with pytest.raises(
        CheckpointError, match=r"method magnitude gave scores that are not finite.*ffn_channels of layer 1"
    ):
        score_units("magnitude", statistics, geometry, ["ffn_channel"], load_tensor=state.get)
    moments = statistics.moments[0, "ffn_channel"]
    empty = replace(statistics, moments={**statistics.moments, (0, "ffn_channel"): replace(moments, count=0)})
    with pytest.raises(CheckpointError, match="layer 0"):
        score_units("contextual", empty, geometry, ["ffn_channel"], load_tensor=refuse)


@pytest.mark.parametrize("name", list(families()))
def test_unit_weights_are_all_the_weights_of_the_cut_layers(name: str) -> None:
    """Over all units the slices of an axis hold every element of the layers they cut, once, and no reader bias."""
    model, geometry, _ = calibrated(name)
    state = model.state_dict()
    for axes in geometry.axes.values():
        axis = axes[1]
        slices = unit_weights(axis, state.get, geometry.family.weight_layout)
        assert all(matrix.shape[0] == axis.num_units for matrix in slices)
        cut = {(segment.module, segment.side) for segment in axis.segments}
        expected = [state[f"{module}.weight"].reshape(-1) for module, _ in sorted(cut)]
        expected += [state[f"{m}.bias"] for m, side in sorted(cut) if side == "out" and f"{m}.bias" in state]
        if not expected:
            assert axis.fixed and not slices
            continue
        held = torch.cat([matrix.reshape(-1) for matrix in slices])
        assert torch.equal(held.sort().values, torch.cat(expected).sort().values)


def test_a_unit_holds_its_own_rows_and_columns() -> None:
    """Group 1 of a pico phi3 in numbers: its query, key and value rows of the fused weight, its output columns."""
    model, geometry, _ = calibrated("phi3")
    attention = model.model.layers[0].self_attn
    fused, output = attention.qkv_proj.weight.detach(), attention.o_proj.weight.detach()
    queries, keys, values, columns = unit_weights(geometry.axes["gqa_group"][0], model.state_dict().get, "out_in")
    assert torch.equal(queries[1], fused[16:32].reshape(-1))
    assert torch.equal(keys[1], fused[48 + 8 : 48 + 16].reshape(-1))
    assert torch.equal(values[1], fused[48 + 24 + 8 : 48 + 24 + 16].reshape(-1))
    assert torch.equal(columns[1], output.T[16:32].reshape(-1))
