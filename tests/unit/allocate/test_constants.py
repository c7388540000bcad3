"""Removed channels that never changed are found, where a bias can take them over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.allocate.constants import CONSTANT_TOLERANCE, constant_channels, require_biases, with_constants
from secateur.errors import PlanError
from secateur.families.geometry import build_geometry
from secateur.families.loader import families
from secateur.records.plan import LayerPlan, Plan
from secateur.records.statistics import Moments


def moments(tokens: Tensor) -> Moments:
    """Return the sums of the given activations (tokens x channels)."""
    return Moments(len(tokens), tokens.sum(0), tokens.abs().sum(0), tokens.pow(2).sum(0))


def activations() -> Tensor:
    """Return 50 tokens of six channels: 0.7, zero, -2, noise, nearly 5, and zero on average."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    signs = torch.ones(50, dtype=torch.float64)
    signs[::2] = -1
    columns = [0.7, 0.0, -2.0, noise[:, 3], 5.0 + 1e-4 * noise[:, 4], signs]
    return torch.stack([torch.as_tensor(c, dtype=torch.float64).expand(50) for c in columns], 1)


def test_constants_are_found_with_their_value() -> None:
    """Constant and not zero: channels 0, 2 and 4; only among those that were asked about."""
    found = dict(constant_channels(moments(activations()), [0, 1, 2, 3, 4, 5]))
    assert set(found) == {0, 2, 4}
    assert found[0] == pytest.approx(0.7)
    assert found[2] == pytest.approx(-2.0)
    assert found[4] == pytest.approx(5.0, abs=1e-3)
    assert [channel for channel, _ in constant_channels(moments(activations()), [2, 3])] == [2]
    assert constant_channels(moments(activations()), []) == []


@pytest.mark.parametrize(("spread", "constant"), [(0.5, True), (2.0, False)])
def test_the_tolerance_is_relative_to_the_mean(spread: float, constant: bool) -> None:
    """A standard deviation of half the tolerance is constant, of twice the tolerance is not, at any scale."""
    signs = torch.tensor([1.0, -1.0] * 20, dtype=torch.float64)[:, None]
    for mean in (1e-6, 1.0, -1e6):
        tokens = mean * (1 + spread * CONSTANT_TOLERANCE * signs)
        assert bool(constant_channels(moments(tokens), [0])) is constant


CONFIG = {"num_hidden_layers": 1, "hidden_size": 12, "vocab_size": 9, "ffn_dim": 6, "num_attention_heads": 3}


def plan(keep: tuple[int, ...], kind: str = "ffn_channel", num_units: int = 6) -> Plan:
    """Return a plan for one layer."""
    layers = {kind: (LayerPlan(num_units, keep),)}
    return Plan("opt", "", "uneven", "by hand", {}, {}, layers, {}, {})


def test_a_plan_learns_the_constants_of_its_removed_channels() -> None:
    """Kept channels are left alone, whether they are constant or not."""
    geometry = build_geometry(families()["opt"], CONFIG)
    sums = {(0, "ffn_channel"): moments(activations())}
    shapes = {"model.decoder.layers.0.fc2.bias": (12,)}
    filled = with_constants(plan((0, 3)), geometry, sums, shapes).layers["ffn_channel"][0]
    assert [channel for channel, _ in filled.constants] == [2, 4]
    assert filled.keep == (0, 3)


def test_without_a_bias_nothing_is_filled_in() -> None:
    """A projection without a bias cannot take a constant over."""
    geometry = build_geometry(families()["opt"], CONFIG)
    sums = {(0, "ffn_channel"): moments(activations())}
    assert with_constants(plan((0, 3)), geometry, sums, {}).layers["ffn_channel"][0].constants == ()


def test_channels_of_a_group_are_numbered_by_the_reader() -> None:
    """A removed group of two channels brings both of its channels."""
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 6,
        "vocab_size": 9,
        "intermediate_size": 4,
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
    }
    geometry = build_geometry(families()["phi"], sizes)
    sums = {(0, "gqa_group"): moments(activations())}
    shapes = {"model.layers.0.self_attn.dense.bias": (6,)}
    filled = with_constants(plan((1,), "gqa_group", 3), geometry, sums, shapes).layers["gqa_group"][0]
    assert [channel for channel, _ in filled.constants] == [0, 4]


def test_means_of_all_removed_channels_keep_the_mean_of_the_output() -> None:
    """FLAP's compensation: the projection's mean output on the calibration text is what it was, exactly."""
    geometry = build_geometry(families()["opt"], CONFIG)
    tokens, matrix = activations() + 0.1, torch.randn(12, 6, dtype=torch.float64)
    shapes = {"model.decoder.layers.0.fc2.bias": (12,)}
    sums = {(0, "ffn_channel"): moments(tokens)}
    layer = with_constants(plan((0, 3)), geometry, sums, shapes, means=True).layers["ffn_channel"][0]
    gone = dict(layer.constants)
    assert set(gone) == {1, 2, 4, 5}
    shift = sum(matrix[:, channel] * value for channel, value in gone.items())
    kept = tokens[:, [0, 3]] @ matrix[:, [0, 3]].T + shift
    torch.testing.assert_close(kept.mean(0), (tokens @ matrix.T).mean(0))


def test_compensation_without_biases_is_refused() -> None:
    """The projection is named, and what to use instead."""
    geometry = build_geometry(families()["opt"], CONFIG)
    require_biases(geometry, ["ffn_channel"], {"model.decoder.layers.0.fc2.bias": (12,)})
    with pytest.raises(
        PlanError, match=r"model\.decoder\.layers\.0\.fc2 of this opt model has none.*reconstruct: dense"
    ):
        require_biases(geometry, ["ffn_channel"], {})
