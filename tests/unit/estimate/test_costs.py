"""The formulas against numbers worked out by hand, and against what PyTorch itself holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.calibrate import collect_grams
from secateur.estimate import costs
from secateur.estimate.probe import _Blocks
from secateur.estimate.size import measure, size_of_config
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.stream.forward import run_backbone
from tests.conftest import geometry_of, pico_model
from tests.unit.estimate.papers import CONFIG, LAYER

SIZE = size_of_config(CONFIG)


def test_tokens_are_counted_in_whole_blocks() -> None:
    """Padding is computed too."""
    assert [costs.in_blocks(tokens, 256) for tokens in (1, 256, 257)] == [256, 256, 512]


def test_operations_are_those_of_the_matrices() -> None:
    """Two per weight and token, attention over the block, the head over the vocabulary."""
    assert costs.layers_flops(SIZE, 10, 256) == 10 * 4 * (2 * LAYER + 4 * 256 * 100)
    assert costs.head_flops(SIZE, 10) == 10 * 2 * 100 * 1000
    assert costs.gradient_flops(SIZE, 10, 256) == 3 * costs.layers_flops(SIZE, 10, 256)
    sites = SIZE.sites(["ffn_channel"])
    assert costs.gram_flops(sites, 10) == 10 * 4 * 2 * 300**2 * 9 / 16
    kept = 150
    one = 6 * (kept**3 / 3 + 2 * 100 * kept**2) + 5 * 2 * 100 * kept**2 + 8 * 100 * kept * 300
    assert costs.fit_flops(sites, 0.5) == pytest.approx(4 * one)


def test_bytes_are_those_of_the_tensors() -> None:
    """Worked out by hand for every term."""
    sites = SIZE.sites(["ffn_channel", "gqa_group"])
    assert [site.width for site in sites] == [300, 100] * 4
    assert costs.gram_bytes(sites) == 4 * (300**2 + 100**2) * 4
    assert costs.gram_sum_bytes(sites) == 4 * (300**2 + 100**2) * 4 * 9 // 16
    assert costs.weights_bytes(10, 2) == 20
    assert costs.logits_bytes(SIZE, 64, 4) == 64 * 1000 * 4
    assert costs.activation_bytes(SIZE, 64, 4) == 64 * (300 + 900) * 4
    assert costs.hidden_bytes(SIZE, 64, 2, 4) == 64 * 100 * 2 * 4
    assert costs.optimizer_bytes(10) == 120
    per_token = 10 * 100 + 5 * 300 + 4 * 100 + 4 * 50
    assert costs.saved_bytes(SIZE, 64, 4) == 64 * 4 * 4 * per_token
    assert costs.saved_bytes(SIZE, 64, 4, checkpointing=True) == 64 * 4 * (4 * 100 + per_token)
    ffn, attention = 3 * (100 + 300), 2 * (100 + 100) + 2 * (100 + 50)
    assert costs.lora_parameters(SIZE, 8) == 8 * 4 * (ffn + attention)


def test_the_sums_of_gram_matrices_are_as_large_as_said() -> None:
    """Finished matrices take d^2 float32; a wider one is not to be had for less."""
    family = families()["llama"]
    model = pico_model(family, torch.float32)
    size = _size_of(model, family)
    grams = collect_grams(model, _Tokens(2, 32), geometry_of(model, family), ["ffn_channel"])
    held = sum(matrix.nbytes for matrix in grams.sums.values())
    assert held == costs.gram_bytes(size.sites(["ffn_channel"]))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_what_a_backward_pass_keeps_is_what_autograd_saves(name: str) -> None:
    """Within a third for a gated FFN with norms before: saved tensors that are no parameters, each storage once."""
    family = families()[name]
    model = pico_model(family, torch.float32)
    size, held = _size_of(model, family), {}
    parameters = {value.untyped_storage().data_ptr() for value in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    (batch,) = _Tokens(2, 32).batches(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = run_backbone(model, batch, family)
    assert states.requires_grad
    ratio = costs.saved_bytes(size, 2 * 32, 4) / sum(held.values())
    assert 0.75 < ratio < 1.33, f"{ratio:.2f}"


class _Tokens(_Blocks):
    """Random tokens of a vocabulary of the pico models' size."""

    def batches(self, batch_size: int) -> Any:
        from dataclasses import replace

        return (replace(batch, input_ids=batch.input_ids % 97) for batch in super().batches(batch_size))


def _size_of(model: Any, family: Family) -> Any:
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    return measure(geometry_of(model, family), model.config.to_dict(), shapes, 4)
