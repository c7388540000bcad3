"""Cosines of the residual stream equal those of single documents, with the stream put together by hand."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import collect
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.units import ATTENTION, FFN, LAYER
from tests.blocks import hand_made_blocks
from tests.conftest import DENSE, geometry_of, pico_model

ADDED = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3_text": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
    "opt": ("self_attn", "fc2"),
}
"""Whose outputs are added to the stream, where they are not called ``self_attn`` and ``mlp``."""
PARALLEL = {"phi", "gpt_neox"}
CASES = [(name, name in PARALLEL, {}) for name in DENSE] + [("gpt_neox", False, {"use_parallel_residual": False})]


def first(output: Any) -> Tensor:
    """Return the hidden states of one document that a module gave."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden.reshape(-1, hidden.shape[-1])


def streams(model: Any, geometry: Geometry, ids: list[int]) -> list[dict[str, Tensor]]:
    """Return, per layer, what enters it, what each sub-layer adds, and what leaves it."""
    names = ADDED.get(geometry.family.name, ("self_attn", "mlp"))
    seen: list[dict[str, Tensor]] = [{} for _ in range(geometry.num_layers)]
    with ExitStack() as stack, torch.inference_mode():
        for layer, found in enumerate(seen):
            for kind, name in zip((ATTENTION, FFN), names, strict=True):

                def keep(_m: nn.Module, _a: Any, out: Any, found: dict[str, Tensor] = found, kind: str = kind) -> None:
                    found[kind] = first(out)

                module = model.get_submodule(f"{geometry.layer_name(layer)}.{name}")
                stack.callback(module.register_forward_hook(keep).remove)

            def pair(_m: nn.Module, args: Any, kwargs: Any, out: Any, found: dict[str, Tensor] = found) -> None:
                found |= {"before": (args[0] if args else kwargs["hidden_states"])[0], "after": first(out)}

            module = model.get_submodule(geometry.layer_name(layer))
            stack.callback(module.register_forward_hook(pair, with_kwargs=True).remove)
        model(torch.tensor([ids]), use_cache=False)
    return seen


def cosine(first: Tensor, second: Tensor) -> float:
    """Return the sum over tokens of the cosine."""
    return float(nn.functional.cosine_similarity(first, second, dim=-1).sum())


@pytest.mark.parametrize(("name", "parallel", "options"), CASES)
def test_cosines_equal_those_of_the_stream_put_together_by_hand(name: str, parallel: bool, options: Any) -> None:
    """Sequential sub-layers turn the stream one after the other; parallel ones each turn the layer's input."""
    model = pico_model(families()[name], **options)
    geometry = geometry_of(model, families()[name])
    blocks = hand_made_blocks()
    expected = {kind: [0.0, 0.0] for kind in (LAYER, ATTENTION, FFN)}
    for text in blocks.texts:
        for layer, found in enumerate(streams(model, geometry, list(text))):
            before, after = found["before"], found["after"]
            torch.testing.assert_close(before + found[ATTENTION] + found[FFN], after)
            between = before + found[ATTENTION]
            expected[LAYER][layer] += cosine(before, after)
            expected[ATTENTION][layer] += cosine(before, between)
            expected[FFN][layer] += cosine(before, before + found[FFN]) if parallel else cosine(between, after)
    ours = collect(model, blocks, geometry)
    tolerance = 1e-6 if name.startswith("gemma") else 1e-10  # Gemma takes softmax in float32
    assert ours.cosine_sum.tolist() == pytest.approx(expected[LAYER], rel=tolerance)
    assert set(ours.sublayer_cosine_sum) == {ATTENTION, FFN}
    for kind, total in ours.sublayer_cosine_sum.items():
        assert total.tolist() == pytest.approx(expected[kind], rel=tolerance)
