"""The calibration pass equals one document at a time through plain forward hooks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from secateur.calibrate.collect import collect
from secateur.errors import CheckpointError
from secateur.families.loader import families
from secateur.records.statistics import BucketStatistics, merge_buckets
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_model

LAYERS = {
    "llama": "model.layers.{}",
    "gpt2": "transformer.h.{}",
    "phi3": "model.layers.{}",
    "opt": "model.decoder.layers.{}",
}
READERS = {
    "llama": {"ffn_channel": "mlp.down_proj", "gqa_group": "self_attn.o_proj"},
    "gpt2": {"ffn_channel": "mlp.c_proj", "gqa_group": "attn.c_proj"},
    "phi3": {"ffn_channel": "mlp.down_proj", "gqa_group": "self_attn.o_proj"},
    "opt": {"ffn_channel": "fc2", "gqa_group": "self_attn.out_proj"},
}
LINEAR = {
    "llama": [("mlp.gate_proj", slice(0, 64)), ("mlp.up_proj", slice(0, 64))],
    "gpt2": [("mlp.c_fc", slice(0, 64))],
    "phi3": [("mlp.gate_up_proj", slice(0, 64)), ("mlp.gate_up_proj", slice(64, 128))],
    "opt": [("fc1", slice(0, 64))],
}
"""Module names by hand, so that the family files are checked against them too."""


@cache
def dense(name: str) -> Any:
    """Return the pico model of a family."""
    return pico_model(families()[name])


def statistics(name: str, blocks: HandMadeBlocks, batch_size: int = 2) -> BucketStatistics:
    """Return the statistics of a pico model."""
    model = dense(name)
    return collect(model, blocks, geometry_of(model, families()[name]), batch_size=batch_size)


def reference(name: str, texts: list[list[int]]) -> dict[Any, Any]:
    """Return the same sums in NumPy, one document at a time, without packing, through hooks of our own."""
    model, sums = dense(name), {}

    def add(key: Any, value: Any) -> None:
        sums[key] = sums.get(key, 0) + value

    handles = []
    for layer in range(2):
        root = LAYERS[name].format(layer)
        for kind, reader in READERS[name].items():

            def on_input(_m: Any, args: Any, key: tuple[int, str] = (layer, kind)) -> None:
                for x in args[0].reshape(-1, args[0].shape[-1]).numpy():
                    add(("moments", key), np.stack([x, np.abs(x), x * x]))

            handles.append(model.get_submodule(f"{root}.{reader}").register_forward_pre_hook(on_input))
        for index, (module, part) in enumerate(LINEAR[name]):

            def on_output(_m: Any, _a: Any, out: Any, key: Any = (layer, index), part: slice = part) -> None:
                for y in out.reshape(-1, out.shape[-1]).numpy():
                    add(("linear", key), np.abs(y[part]))

            handles.append(model.get_submodule(f"{root}.{module}").register_forward_hook(on_output))

        def on_layer(_m: Any, args: Any, kwargs: Any, out: Any, layer: int = layer) -> None:
            before = (args[0] if args else kwargs["hidden_states"])[0].numpy()
            after = (out[0] if isinstance(out, tuple) else out)[0].numpy()
            for a, b in zip(before, after, strict=True):
                add(("cosine", layer), a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

        handles.append(model.get_submodule(root).register_forward_hook(on_layer, with_kwargs=True))
    counts = np.zeros(97, dtype=int)
    with torch.inference_mode():
        for ids in texts:
            model(torch.tensor([ids]), use_cache=False)
            for token in ids:
                counts[token] += 1
    for handle in handles:
        handle.remove()
    return {**sums, "counts": counts}


def assert_same(
    first: BucketStatistics, second: BucketStatistics, rtol: float = 1e-10, *, packing: bool = True
) -> None:
    """Assert that two statistics hold the same sums, up to float rounding; ``packing`` includes sums over blocks."""
    assert (first.num_tokens, first.num_blocks) == (second.num_tokens, second.num_blocks)
    assert first.token_counts.tolist() == second.token_counts.tolist()
    assert first.documents.tolist() == second.documents.tolist()
    assert first.moments.keys() == second.moments.keys()
    for key, moments in first.moments.items():
        other = second.moments[key]
        assert moments.count == other.count
        for field in ("sum", "sum_abs", "sum_sq"):
            torch.testing.assert_close(getattr(moments, field), getattr(other, field), rtol=rtol, atol=rtol)
    if packing:
        for key, sequences in first.sequences.items():
            assert sequences.count == second.sequences[key].count
            torch.testing.assert_close(sequences.mean_abs_sq, second.sequences[key].mean_abs_sq, rtol=rtol, atol=rtol)
    assert first.linear_abs.keys() == second.linear_abs.keys()
    for key, total in first.linear_abs.items():
        torch.testing.assert_close(total, second.linear_abs[key], rtol=rtol, atol=rtol)
    torch.testing.assert_close(first.cosine_sum, second.cosine_sum, rtol=rtol, atol=rtol)
    for kind, total in first.sublayer_cosine_sum.items():
        torch.testing.assert_close(total, second.sublayer_cosine_sum[kind], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", LAYERS)
def test_collect_equals_single_documents_through_plain_hooks(name: str) -> None:
    """Moments, pre-activation sums, cosines and token counts of packed, padded blocks are those of lone documents."""
    blocks = hand_made_blocks()
    ours, theirs = statistics(name, blocks), reference(name, list(blocks.texts))
    assert (ours.num_tokens, ours.num_blocks) == (50, 4)
    assert ours.token_counts.tolist() == theirs["counts"].tolist()
    assert ours.documents.tolist() == list(range(1000, 1007))
    assert ours.corpus_fingerprint == "hand-made"
    assert ours.tokens_per_s > 0
    assert set(ours.moments) == {(layer, kind) for layer in range(2) for kind in READERS[name]}
    for (layer, kind), moments in ours.moments.items():
        assert moments.count == 50
        sums = torch.stack([moments.sum, moments.sum_abs, moments.sum_sq]).numpy()
        np.testing.assert_allclose(sums, theirs["moments", (layer, kind)], rtol=1e-10, atol=1e-10)
    assert set(ours.linear_abs) == {
        (layer, f"ffn_channel.linear{i}") for layer in range(2) for i in range(len(LINEAR[name]))
    }
    for layer in range(2):
        for index in range(len(LINEAR[name])):
            total = ours.linear_abs[layer, f"ffn_channel.linear{index}"].numpy()
            np.testing.assert_allclose(total, theirs["linear", (layer, index)], rtol=1e-10)
        assert float(ours.cosine_sum[layer]) == pytest.approx(theirs["cosine", layer], rel=1e-10)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 99])
def test_the_batch_size_leaves_no_trace(batch_size: int) -> None:
    """Any number of blocks per forward pass gives the same sums."""
    assert_same(statistics("llama", hand_made_blocks(), batch_size), statistics("llama", hand_made_blocks()))


def test_the_order_of_blocks_and_the_packing_leave_no_trace() -> None:
    """Reordered blocks give the same sums, and documents alone in longer blocks the same sums over tokens."""
    blocks = hand_made_blocks()
    expected = statistics("llama", blocks)
    assert_same(statistics("llama", replace(blocks, rows=[[6], [2], [4, 3, 5], [1, 0]])), expected)
    alone = statistics("llama", replace(blocks, rows=[[i] for i in range(7)], block_size=23))
    assert alone.num_blocks == 7
    assert_same(replace(alone, num_blocks=4), expected, packing=False)


@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_is_the_real_tokens_of_a_block(name: str) -> None:
    """Sums over blocks are those of the mean absolute values of each block run alone."""
    blocks = hand_made_blocks()
    ours = statistics(name, blocks)
    alone = [statistics(name, replace(blocks, rows=[row])) for row in blocks.rows]
    for key, sequences in ours.sequences.items():
        means = [part.moments[key].sum_abs / part.num_tokens for part in alone]
        assert sequences.count == 4
        torch.testing.assert_close(sequences.mean_abs_sq, torch.stack(means).square().sum(0))


def test_padding_is_never_counted() -> None:
    """A block with room to spare gives the sums of its documents only."""
    tight = HandMadeBlocks([[5, 6, 7, 8]], [[0]], 4)
    roomy = replace(tight, block_size=32)
    assert_same(statistics("llama", roomy), statistics("llama", tight))
    assert statistics("llama", roomy).token_counts[0] == 0


def test_shards_add_up_to_the_whole() -> None:
    """Two passes over parts, merged, are one pass over everything."""
    blocks = hand_made_blocks()
    first, second = replace(blocks, rows=blocks.rows[:1]), replace(blocks, rows=blocks.rows[1:])
    assert_same(merge_buckets(statistics("llama", first), statistics("llama", second)), statistics("llama", blocks))


def test_half_precision_is_summed_in_float64() -> None:
    """A bfloat16 model gives float64 sums near those of the same weights in float64."""
    family = families()["llama"]
    model = pico_model(family, torch.bfloat16)
    geometry = geometry_of(model, family)
    narrow = collect(model, hand_made_blocks(), geometry)
    wide = collect(model.double(), hand_made_blocks(), geometry)
    for key, moments in narrow.moments.items():
        assert moments.sum_abs.dtype == torch.float64
        ratio = moments.sum_abs.sum() / wide.moments[key].sum_abs.sum()
        assert float(ratio) == pytest.approx(1.0, abs=0.05)


def test_the_model_is_left_as_it_was() -> None:
    """No hook stays, no gradient is kept, and evaluation mode is set."""
    family = families()["llama"]
    model = pico_model(family).train()
    collect(model, hand_made_blocks(), geometry_of(model, family))
    assert not model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_progress_hears_of_every_token() -> None:
    """Work is announced in tokens and advances to the announced total."""
    said: list[Any] = []

    @dataclass
    class Listener:
        def advance(self, amount: int) -> None:
            said.append(amount)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Listener]:
        said.append((label, total, unit))
        yield Listener()

    model = dense("llama")
    geometry = geometry_of(model, families()["llama"])
    collect(model, hand_made_blocks(), geometry, batch_size=3, progress=progress, label="calibrate medical")
    assert said[0] == ("calibrate medical", 50, "tokens")
    assert sum(said[1:]) == 50
    assert len(said) == 3


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj"),
        ("model.layers.1.self_attn.v_proj.weight", "model.layers.1.self_attn.o_proj"),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.0"),
        ("model.layers.1.mlp.down_proj.weight", "model.layers.1"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_first_place(parameter: str, named: str, bad: float) -> None:
    """The message names where it began, also when it began after the last tap, and the hooks are gone."""
    family = families()["llama"]
    model = pico_model(family)
    with torch.no_grad():
        model.get_parameter(parameter)[0, 0] = bad
    with pytest.raises(CheckpointError, match=r"not finite.*dtype: float32") as caught:
        collect(model, hand_made_blocks(), geometry_of(model, family))
    assert f"{named} " in str(caught.value)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
