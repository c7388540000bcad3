"""How large a model is, exactly."""

from __future__ import annotations

import torch

from secateur.evaluate.footprint import memory_bytes, model_parameters, model_shapes
from secateur.families.loader import families
from secateur.families.schema import Family
from tests.conftest import geometry_of, pico_model


def test_parts_add_up_to_the_model(family: Family) -> None:
    """In every family the parts hold all parameters, and transformers counts the same total."""
    model = pico_model(family)
    parts = model_parameters(model, geometry_of(model, family))
    assert sum(parts.values()) == model.num_parameters()
    assert parts["attention"] > 0 and parts["ffn"] > 0 and parts["embedding"] > 0
    norms = [name for name, _ in model.named_parameters() if "norm" in name or "ln_" in name]
    between = sum(model.get_parameter(name).numel() for name in norms if ".self_attn." not in name)
    assert parts["other"] == between


def test_a_tied_head_is_counted_once(family: Family) -> None:
    """Tying removes exactly the head, in parameters and in bytes."""
    free, tied = (pico_model(family, torch.bfloat16, tie_word_embeddings=tied) for tied in (False, True))
    if free.get_output_embeddings().weight is free.get_input_embeddings().weight:
        return
    head = free.get_output_embeddings().weight.numel()
    assert model_parameters(free, geometry_of(free, family))["head"] >= head
    assert memory_bytes(free) - memory_bytes(tied) == 2 * head
    assert len(model_shapes(free)) - len(model_shapes(tied)) == 1


def test_bytes_follow_the_dtype() -> None:
    """Four bytes per float32 parameter, two per bfloat16 one."""
    for dtype, size in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        model = pico_model(families()["llama"], dtype)
        assert memory_bytes(model) == size * model.num_parameters()
