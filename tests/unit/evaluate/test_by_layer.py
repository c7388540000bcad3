"""Losses of a model that is run layer by layer are those of the whole model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.evaluate import evaluate_resegmented, evaluate_text
from secateur.evaluate.by_layer import batch_nll, evaluate_resegmented_by_layer, evaluate_text_by_layer
from secateur.evaluate.perplexity import token_nll
from secateur.families.loader import families
from secateur.stream.forward import run_logits
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import LayerStream, stream_through
from secateur.stream.sources import LoadedLayers
from secateur.stream.streamed import StreamedModel
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gemma2", "mixtral"])
def test_a_text_scores_the_same(name: str) -> None:
    """Every document, bit for bit, where logits need not be made in slices; gemma2 caps them."""
    family, text = families()[name], hand_made_blocks()
    model = pico_model(family, torch.float32)
    streamed = StreamedModel(LoadedLayers(model, geometry_of(model, family)))
    expected = evaluate_text(model, text, family, batch_size=2, num_excluded=3)
    found = evaluate_text_by_layer(streamed, text, batch_size=2, num_excluded=3)
    assert replace(found, tokens_per_s=1.0) == replace(expected, tokens_per_s=1.0)


def test_resegmented_text_scores_the_same() -> None:
    """Among all ids and among the kept ones."""
    family, text = families()["llama"], hand_made_blocks(45)
    model = pico_model(family, torch.float32)
    streamed = StreamedModel(LoadedLayers(model, geometry_of(model, family)))
    keep = torch.arange(0, 90, 2)
    expected = evaluate_resegmented(model, text, family, keep, batch_size=1)
    found = evaluate_resegmented_by_layer(streamed, text, keep, batch_size=1)
    for ours, theirs in zip(found, expected, strict=True):
        assert replace(ours, tokens_per_s=1.0) == replace(theirs, tokens_per_s=1.0)


@pytest.mark.parametrize("positions", [2, 3, 5, 15, 16, 17])
def test_slices_of_logits_lose_no_token_and_no_order(positions: int) -> None:
    """However few positions are held at once, and also where the last slice is short."""
    family, text = families()["llama"], hand_made_blocks(96)
    model = pico_model(family, torch.float64)
    source = LoadedLayers(model, geometry_of(model, family))
    keep = torch.arange(96)
    with HiddenStates() as hidden:
        stream_through(LayerStream(source, text, 2), hidden)
        for batch, states in zip(text.batches(2), hidden, strict=True):
            room = 4 * len(batch.input_ids) * 97 * positions
            found = batch_nll(source, batch, states, [None, keep], max_logit_bytes=room)
            logits = run_logits(model, batch, family).detach()
            for values, chosen in zip(found, (None, keep), strict=True):
                torch.testing.assert_close(values, token_nll(logits, batch.input_ids, batch.predicted, chosen))
