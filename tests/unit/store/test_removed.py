"""Stand-ins for removed sub-layers: they hold nothing and add nothing."""

from __future__ import annotations

from typing import Any

import torch

from secateur.families.schema import Family
from secateur.store.removed import NoAttention, NoSubLayer, remove_sublayers
from tests.conftest import geometry_of, pico_model


def test_stand_ins_give_zeros_whatever_else_they_get() -> None:
    """In the shape and dtype of the hidden states, also when these are named."""
    hidden = torch.randn(2, 3, 4, dtype=torch.float64)
    zeros = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert torch.equal(NoSubLayer()(hidden), zeros)
    output, weights = NoAttention()(hidden_states=hidden, attention_mask=None, past_key_values=object())
    assert torch.equal(output, zeros)
    assert weights is None


def test_a_layer_without_both_passes_its_input_on(family: Family) -> None:
    """And what is left of its parameters serves both sub-layers."""
    model: Any = pico_model(family)
    geometry = geometry_of(model, family)
    layer = model.get_submodule(geometry.layer_name(1))
    seen: list[torch.Tensor] = []

    def keep(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
        seen.extend([args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output])

    layer.register_forward_hook(keep, with_kwargs=True)
    remove_sublayers(layer, family, ["attention", "ffn"])
    with torch.inference_mode():
        model(input_ids=torch.arange(10)[None])
    assert torch.equal(*seen)
    assert sum(1 for _ in layer.parameters()) == (2 if family.name == "phi" else 0)
