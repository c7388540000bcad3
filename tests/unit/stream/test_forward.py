"""Packed blocks become model inputs; the model sees each document by itself."""

from __future__ import annotations

import torch

from secateur.families.loader import families
from secateur.stream.forward import model_inputs, piece_mask, run_backbone, run_logits
from tests.blocks import lay_blocks, random_documents
from tests.conftest import pico_model


def test_the_mask_lets_a_token_read_its_own_piece_and_the_past() -> None:
    """Checked against a loop over queries and keys, with pieces of one token and runs of padding."""
    positions = torch.tensor([[0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5], [0, 0, 0, 1, 0, 1]])
    mask = piece_mask(positions)
    assert mask.shape == (3, 1, 6, 6)
    for row in range(3):
        piece = [sum(int(p) == 0 for p in positions[row, : i + 1]) for i in range(6)]
        for query in range(6):
            for key in range(6):
                allowed = key <= query and piece[key] == piece[query]
                assert bool(mask[row, 0, query, key]) == allowed


def test_most_families_get_positions_only() -> None:
    """Restarting positions are all that tells pieces apart; no cache is made."""
    family = families()["llama"]
    batch = lay_blocks(random_documents([3, 2]), [[0, 1]], 6)
    inputs = model_inputs(batch, family, pico_model(family))
    assert set(inputs) == {"input_ids", "position_ids", "use_cache"}
    assert inputs["use_cache"] is False
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0]]


def test_families_that_do_not_look_get_a_mask() -> None:
    """The mask is additive, in the model's dtype, and blocks exactly what the piece mask blocks."""
    family = families()["opt"]
    assert family.packing == "mask"
    batch = lay_blocks(random_documents([3, 2]), [[0, 1]], 6)
    for dtype in (torch.float32, torch.bfloat16):
        mask = model_inputs(batch, family, pico_model(family, dtype))["attention_mask"]
        assert mask.dtype == dtype
        assert torch.equal(mask == 0, piece_mask(batch.position_ids))
        assert set(mask.unique().tolist()) == {0.0, torch.finfo(dtype).min}


def test_backbone_and_logits_are_the_models_own() -> None:
    """On one document alone they equal transformers' plain forward pass."""
    family = families()["qwen3"]
    model = pico_model(family)
    texts = random_documents([9])
    batch = lay_blocks(texts, [[0]], 9)
    with torch.inference_mode():
        plain = model(torch.tensor(texts), output_hidden_states=True)
        torch.testing.assert_close(run_logits(model, batch, family), plain.logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(run_backbone(model, batch, family), plain.hidden_states[-1], rtol=1e-12, atol=1e-12)
