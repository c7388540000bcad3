"""Packed blocks in families with experts: neighbours in a block change nothing, and windows stay windows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.stream.forward import run_backbone
from tests.blocks import lay_blocks, random_documents
from tests.conftest import pico_model
from tests.pruning import relative_difference


def model_of(family: Family, **extra: Any) -> Any:
    """Return a pico model in float64, of which transformers can run the experts."""
    model = pico_model(family, **extra)
    model.set_experts_implementation("eager")
    return model


def alone(model: Any, ids: list[int]) -> Tensor:
    """Return the final hidden states of one document by itself."""
    hidden: Tensor = model.base_model(input_ids=torch.tensor([ids]), use_cache=False)[0][0]
    return hidden


def test_a_packed_document_reads_as_if_it_were_alone(moe_family: Family) -> None:
    """Attention and routing of a document are its own; some routers and attentions compute in float32."""
    model, texts = model_of(moe_family), random_documents([7, 5, 9])
    batch = lay_blocks(texts, [[0, 1], [2]], 16)
    with torch.inference_mode():
        packed = run_backbone(model, batch, moe_family)
        for document, ids in enumerate(texts):
            assert relative_difference(packed[batch.document == document], alone(model, ids)) <= 1e-6


@pytest.mark.parametrize("window", [3, 5])
def test_windows_of_attention_stay_in_packed_blocks(window: int) -> None:
    """Where layers of one model differ in how far they look back, each keeps its own reach."""
    family = families()["gpt_oss"]
    model, texts = model_of(family, sliding_window=window), random_documents([12, 7])
    batch = lay_blocks(texts, [[1, 0]], 20)
    with torch.inference_mode():
        packed = run_backbone(model, batch, family)[batch.document == 0]
        assert relative_difference(packed, alone(model, texts[0])) <= 1e-6
        wide = copy.deepcopy(model)
        wide.config.sliding_window = 128
        assert relative_difference(packed, alone(wide, texts[0])) > 1e-3, "the window did nothing"
