"""What documents say of single rows and columns equals zeroing each of them and looking at the sub-layer's output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate.neurons import Matrix, collect_neuron_impacts, matrices
from secateur.errors import CheckpointError, FamilyError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.calibrate.test_impacts import outputs

LAYER = 1
FAMILIES = ("llama", "qwen2", "qwen3", "phi", "phi3", "gemma2")
"""Plain, with biases, with norms of queries and keys, without a gate, with fused matrices, with caps and windows."""


def small(name: str) -> tuple[Any, Geometry]:
    """Return a pico model and its geometry."""
    family = families()[name]
    model = pico_model(family)
    return model, geometry_of(model, family)


def zeroed(model: Any, geometry: Geometry, matrix: Matrix, neuron: int) -> dict[str, Tensor]:
    """Zero a neuron in the model's weights; return what was there, by parameter."""
    parameters, segment = dict(model.named_parameters()), matrix.segment
    weight = parameters[f"{segment.module}.weight"]
    before = {f"{segment.module}.weight": weight.detach().clone()}
    place = segment.offset + neuron
    rows = (segment.side == "out") == (geometry.family.weight_layout == "out_in")
    with torch.no_grad():
        (weight if rows else weight.T)[place] = 0.0
        bias = parameters.get(f"{segment.module}.bias")
        if bias is not None and segment.side == "out":
            before[f"{segment.module}.bias"] = bias.detach().clone()
            bias[place] = 0.0
    return before


def restore(model: Any, before: dict[str, Tensor]) -> None:
    """Put back what ``zeroed`` returned."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, values in before.items():
            parameters[name].copy_(values)


def change(
    model: Any, geometry: Geometry, matrix: Matrix, neuron: int, blocks: HandMadeBlocks, place: str, dense: Tensor
) -> Tensor:
    """Return the impact on each document by zeroing the neuron in the weights and running the model."""
    (batch,) = blocks.batches(blocks.num_blocks)
    owner = batch.document.flatten()
    before = zeroed(model, geometry, matrix, neuron)
    moved = (outputs(model, geometry, place, blocks) - dense).square().sum(1)
    restore(model, before)
    return torch.stack([moved[owner == document].sum() for document in range(int(owner.max()) + 1)]).sqrt()


def reader_of(geometry: Geometry, matrix: Matrix) -> str:
    """Return the projection whose output is the sub-layer's, before any norm after it."""
    kind = "ffn_channel" if matrix.site[1] == "ffn" else "gqa_group"
    return geometry.axes[kind][matrix.site[0]].reader


@pytest.mark.parametrize("name", FAMILIES)
def test_impacts_equal_zeroing_each_row_and_column(name: str) -> None:
    """To ten digits, queries and keys too, for every matrix of a layer, biases, norms, caps and fused weights as is."""
    model, geometry = small(name)
    blocks = hand_made_blocks()
    found = collect_neuron_impacts(model, blocks, geometry)
    assert found.num_documents == 7
    for matrix in (matrix for matrix in matrices(geometry) if matrix.site[0] == LAYER):
        reader = reader_of(geometry, matrix)
        how = {"blocks": blocks, "place": reader, "dense": outputs(model, geometry, reader, blocks)}
        some = range(0, matrix.neurons, 5 if name == "llama" else 11)
        columns = {n: change(model, geometry, matrix, n, **how) for n in some}
        said = found.units[matrix.site]
        assert len(said.impact_max) == matrix.neurons
        for neuron, impacts in columns.items():
            torch.testing.assert_close(said.impact_max[neuron], impacts.max(), rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(said.impact_sq[neuron], impacts.square().sum(), rtol=1e-10, atol=1e-12)


def test_an_ffn_neuron_moves_the_layers_output_as_far() -> None:
    """Nothing comes after an FFN in a layer, so the layer's output moves as its own does."""
    model, geometry = small("llama")
    blocks, place = hand_made_blocks(), geometry.layer_name(LAYER)
    matrix = next(matrix for matrix in matrices(geometry) if matrix.site == (LAYER, "ffn"))
    said = collect_neuron_impacts(model, blocks, geometry).units[matrix.site]
    dense = outputs(model, geometry, place, blocks)
    for neuron in range(0, matrix.neurons, 7):
        moved = change(model, geometry, matrix, neuron, blocks, place, dense)
        torch.testing.assert_close(said.impact_max[neuron], moved.max(), rtol=1e-10, atol=0)


def test_documents_are_the_same_however_they_are_laid() -> None:
    """Other blocks, more padding, documents in another order."""
    model, geometry = small("llama")
    expected = collect_neuron_impacts(model, hand_made_blocks(), geometry)
    blocks = hand_made_blocks()
    blocks.rows = [[6, 1], [3, 4, 5], [2], [0]]
    found = collect_neuron_impacts(model, blocks, geometry)
    for site, said in expected.units.items():
        torch.testing.assert_close(found.units[site].impact_max, said.impact_max, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.units[site].rank_sum, said.rank_sum, rtol=1e-10, atol=0)


def test_the_model_is_left_as_it_was() -> None:
    """Its modules are its own again, nothing listens to them, and it says what it said."""
    model, geometry = small("llama")
    blocks, place = hand_made_blocks(), geometry.layer_name(LAYER)
    modules, said = dict(model.named_modules()), outputs(model, geometry, place, blocks)
    collect_neuron_impacts(model, blocks, geometry)
    assert dict(model.named_modules()) == modules
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert torch.equal(outputs(model, geometry, place, blocks), said)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "opt"])
def test_attention_without_rows_of_its_own_is_refused(name: str) -> None:
    """Before anything is run; the family is named."""
    model, geometry = small(name)
    with pytest.raises(FamilyError, match=f"cannot be told apart in {name} models"):
        collect_neuron_impacts(model, hand_made_blocks(), geometry)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v2"])
def test_experts_are_refused(name: str) -> None:
    """They are not the one FFN of a layer; nothing is silently left out."""
    if name not in families():
        pytest.skip("no such family")
    model, geometry = small(name)
    with pytest.raises(FamilyError, match="is built otherwise"):
        collect_neuron_impacts(model, hand_made_blocks(), geometry)


def test_activations_that_are_not_finite_are_named() -> None:
    """By matrix and layer."""
    model, geometry = small("llama")
    with torch.no_grad():
        model.get_submodule(geometry.axes["ffn_channel"][0].reader).weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"neurons of layer 0"):
        collect_neuron_impacts(model, hand_made_blocks(), geometry)


def first_order(model: Any, geometry: Geometry, blocks: HandMadeBlocks, layer: int) -> Tensor:
    """Return, to first order in the softmax, how far each query channel moves the attention probabilities.

    One number per channel of every head, over all documents; channels after the rotation, as in the authors' detector:
    ||dA_i||^2 = 1/d sum_t q_ti^2 [(A^2 k^2)_ti - 2 m_ti (A^2 k)_ti + m_ti^2 (A^2 1)_t], m = A k, squares elementwise.
    """
    from transformers.models.llama import modeling_llama

    heard: list[tuple[Tensor, Tensor]] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def listen(query: Tensor, key: Tensor, *others: Any, **more: Any) -> tuple[Tensor, Tensor]:
        heard.append(rotate(query, key, *others, **more))
        return heard[-1]

    totals: Tensor | None = None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "apply_rotary_pos_emb", listen)
        for text in blocks.texts:
            heard.clear()
            with torch.inference_mode():
                model(input_ids=torch.tensor([text]))
            query, key = heard[layer][0][0], heard[layer][1][0]
            key = key.repeat_interleave(len(query) // len(key), 0)
            dim, length = query.shape[-1], query.shape[1]
            blocked = torch.ones(length, length, dtype=torch.bool).triu(1)
            attention = (query @ key.mT / dim**0.5).masked_fill(blocked, float("-inf")).softmax(-1)
            squared, mean = attention.square(), attention @ key
            spread = squared @ key.square() - 2 * mean * (squared @ key) + mean.square() * squared.sum(-1, keepdim=True)
            moved = (query.square() * spread).sum(1) / dim
            totals = moved if totals is None else totals + moved
    assert totals is not None
    return totals.sqrt().flatten()


def ranks(values: Tensor) -> Tensor:
    """Return the places of values in ascending order."""
    return values.argsort().argsort().double()


def test_the_closed_form_to_first_order_only_ranks_queries_roughly() -> None:
    """It moves along with the exact impact and is no stand-in for it, which is why attention is run again."""
    model, geometry = small("llama")
    blocks = hand_made_blocks()
    exact = collect_neuron_impacts(model, blocks, geometry).units[LAYER, "query"].impact_sq.sqrt()
    rough = first_order(model, geometry, blocks, LAYER)
    assert rough.shape == exact.shape
    agreement = float(torch.corrcoef(torch.stack([ranks(rough), ranks(exact)]))[0, 1])
    assert 0.1 < agreement < 0.95, agreement
