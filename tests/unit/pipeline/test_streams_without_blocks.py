"""Reconstruction on the pruned stream where whole sub-layers and layers go too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.pipeline import streams
from secateur.stream.sources import LoadedLayers
from tests.blocks import HandMadeBlocks, random_documents
from tests.conftest import DENSE, geometry_of, pico_model
from tests.pruning import plan_keeping, prune

FFN, GROUPS = "ffn_channel", "gqa_group"
ALL = {FFN: range(64), GROUPS: range(3)}


def reader_input(model: Any, module: str, token_ids: Tensor) -> Tensor:
    """Return what enters a module, one row per token."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=token_ids, use_cache=False)
    handle.remove()
    return seen[0].clone().flatten(0, -2).double()


def layer_end(model: Any, layer: int, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return what enters a layer's down projection and what leaves the layer, one row per token."""
    left: list[Tensor] = []
    module = model.get_submodule(f"model.layers.{layer}")
    handle = module.register_forward_hook(lambda _m, _a, output: left.append(output))
    inside = reader_input(model, f"model.layers.{layer}.mlp.down_proj", token_ids)
    handle.remove()
    return inside, left[0].clone().flatten(0, -2).double()


def last_hidden(model: Any, token_ids: Tensor) -> Tensor:
    """Return the final hidden states."""
    with torch.inference_mode():
        states: Tensor = model.base_model(input_ids=token_ids, use_cache=False)[0]
    return states


def test_the_fit_sees_what_the_model_without_blocks_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums at the last layer are those of a model that really lost a layer and an attention sub-layer before it."""
    family = families()["llama"]
    model = pico_model(family, num_hidden_layers=4)
    geometry: Geometry = geometry_of(model, family)
    kept: dict[str, list[Sequence[int]]] = {
        FFN: [range(64), [], range(64), range(40)],
        GROUPS: [range(3), [], [], range(3)],
    }
    texts = HandMadeBlocks(random_documents([16] * 8), [[row] for row in range(8)], 16)
    sums: list[Any] = []
    fit = streams._fit

    def remember(axis: Any, weight: Tensor, fitted: Any, held_out: Any) -> Any:
        sums.append(fitted[0])
        return fit(axis, weight, fitted, held_out)

    monkeypatch.setattr(streams, "_fit", remember)
    plan = plan_keeping(geometry, kept, "uneven")
    result = streams.fit_on_pruned_stream(LoadedLayers(model, geometry), plan, [texts], [texts], batch_size=4)
    reader = geometry.axes[FFN][3].reader
    assert list(result.weights) == [reader], "what goes whole is not fitted"

    whole = {kind: [*per_layer[:3], ALL[kind]] for kind, per_layer in kept.items()}
    pruned = prune(model, plan_keeping(geometry, whole, "uneven"), geometry, refitted=result.refitted)
    assert reader not in result.refitted
    token_ids = torch.tensor(list(texts.texts))
    got, after = layer_end(pruned, 2, token_ids)
    wanted, dense_after = layer_end(model, 3, token_ids)
    weight = model.get_parameter(f"{reader}.weight").detach()
    target = got @ weight.T + streams.RESIDUAL_SHARE * (dense_after - after)
    stay = got[:, :40]
    torch.testing.assert_close(sums[-1].gram.double(), stay.T @ stay, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sums[-1].target.double(), target.T @ stay, rtol=1e-4, atol=1e-4)
    assert sums[-1].power == pytest.approx(float(target.square().sum()), rel=1e-4)
    assert not torch.allclose(got, wanted, rtol=0.1)


@pytest.mark.parametrize("name", DENSE)
def test_the_dense_model_is_a_fixed_point_and_layers_after_a_cut_come_nearer(name: str) -> None:
    """Nothing is refitted before the first cut; after it, fitting brings the outputs nearer to the dense ones."""
    family = families()[name]
    model = pico_model(family, num_hidden_layers=3)
    geometry: Geometry = geometry_of(model, family)
    half = range(geometry.axes[FFN][1].num_units // 2)
    everything = range(geometry.axes[FFN][1].num_units)
    plan = plan_keeping(geometry, {FFN: [everything, half, everything]}, "uneven")
    texts = HandMadeBlocks(random_documents([24] * 24), [[row] for row in range(24)], 24)
    source = LoadedLayers(model, geometry)
    result = streams.fit_on_pruned_stream(source, plan, [texts], [texts], batch_size=4)
    assert list(result.weights) == [geometry.axes[FFN][1].reader]
    assert set(result.refitted) == {geometry.axes[kind][2].reader for kind in (GROUPS, FFN)}
    token_ids = torch.tensor(list(texts.texts))
    fitted = prune(model, plan, geometry, reconstruct=result, refitted=result.refitted)
    plain, dense = prune(model, plan, geometry), last_hidden(model, token_ids)
    before, after = ((last_hidden(other, token_ids) - dense).square().sum() for other in (plain, fitted))
    assert after < before


def test_attention_of_a_model_with_experts_is_fitted_and_cuts_inside_experts_are_refused() -> None:
    """Experts pass on what the pruned attention gives them; nothing fits what only some tokens go through."""
    family = families()["qwen2_moe"]  # its first layer is dense
    model = pico_model(family)
    model.set_experts_implementation("eager")
    geometry = geometry_of(model, family)
    texts = HandMadeBlocks(random_documents([24] * 24), [[row] for row in range(24)], 24)
    source = LoadedLayers(model, geometry)
    plan = plan_keeping(geometry, {GROUPS: [[0, 2], [0, 1]]}, "uneven")
    result = streams.fit_on_pruned_stream(source, plan, [texts], [texts], batch_size=4)
    assert set(result.weights) == {geometry.axes[GROUPS][layer].reader for layer in range(2)}
    assert set(result.refitted) == {geometry.axes[FFN][0].reader}
    inside = plan_keeping(geometry, {"shared_channel": [[], range(4)]}, "uneven")
    with pytest.raises(PlanError, match=r"the plan cuts shared_channels, .*Leave reconstruct out"):
        streams.fit_on_pruned_stream(source, inside, [texts], [texts], batch_size=4)
