"""Gram matrices of the calibration pass equal X^T X of what lone documents send into the reading projections."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from secateur.calibrate import collect, collect_grams, collect_with_grams
from secateur.errors import CheckpointError, FamilyError
from secateur.families.loader import families
from secateur.records.gram import GramsInMemory, merge_grams
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.calibrate.test_collect import LAYERS, READERS, assert_same

KINDS = ("ffn_channel", "gqa_group")


@cache
def dense(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return the pico model of a family."""
    return pico_model(families()[name], dtype)


def grams(
    name: str, blocks: HandMadeBlocks, kinds: Sequence[str] = KINDS, batch_size: int = 2, dtype: Any = torch.float64
) -> GramsInMemory:
    """Return the Gram matrices of a pico model."""
    model = dense(name, dtype)
    return collect_grams(model, blocks, geometry_of(model, families()[name]), kinds, batch_size=batch_size)


def reference(name: str, texts: Sequence[Sequence[int]]) -> dict[Any, Any]:
    """Return X^T X in NumPy, from rows that hooks of our own saw, one document at a time and without packing."""
    model, rows = dense(name), defaultdict(list)
    handles = []
    for layer in range(2):
        for kind, reader in READERS[name].items():

            def on_input(_m: Any, args: Any, key: tuple[int, str] = (layer, kind)) -> None:
                rows[key].append(args[0].reshape(-1, args[0].shape[-1]).numpy())

            module = model.get_submodule(f"{LAYERS[name].format(layer)}.{reader}")
            handles.append(module.register_forward_pre_hook(on_input))
    with torch.inference_mode():
        for ids in texts:
            model(torch.tensor([list(ids)]), use_cache=False)
    for handle in handles:
        handle.remove()
    stacked = {key: np.concatenate(parts) for key, parts in rows.items()}
    return {key: x.T @ x for key, x in stacked.items()}


def assert_same_grams(first: GramsInMemory, second: GramsInMemory, tolerance: float = 1e-10) -> None:
    """Assert that two sets of Gram matrices are equal, up to float rounding."""
    assert first.count == second.count
    assert first.sums.keys() == second.sums.keys()
    for site, matrix in first.sums.items():
        torch.testing.assert_close(matrix, second.sums[site], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", LAYERS)
def test_grams_equal_single_documents_through_plain_hooks(name: str) -> None:
    """Packed and padded blocks give X^T X of the lone documents, at both projections and in either weight layout."""
    blocks = hand_made_blocks()
    ours, theirs = grams(name, blocks), reference(name, blocks.texts)
    assert ours.count == 50
    assert list(ours.sums) == [(layer, kind) for layer in range(2) for kind in KINDS]
    for site, matrix in ours.sums.items():
        assert matrix.dtype == torch.float64
        assert torch.equal(matrix, matrix.T)
        np.testing.assert_allclose(matrix.numpy(), theirs[site], rtol=1e-10, atol=1e-10)
        assert ours.load(site) is matrix


@pytest.mark.parametrize("kinds", [["ffn_channel"], ["gqa_group"], KINDS, []])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_pass_gives_the_statistics_and_the_grams(name: str, kinds: Sequence[str]) -> None:
    """The statistics are those of a pass without Gram matrices, and these are those of a pass of their own."""
    model, blocks = dense(name), hand_made_blocks()
    geometry = geometry_of(model, families()[name])
    statistics, ours = collect_with_grams(model, blocks, geometry, kinds, batch_size=3)
    assert_same(statistics, collect(model, blocks, geometry, batch_size=3))
    assert_same_grams(ours, grams(name, blocks, kinds))
    assert {kind for _, kind in ours.sums} == set(kinds)
    for site, matrix in ours.sums.items():
        torch.testing.assert_close(matrix.diagonal(), statistics.moments[site].sum_sq)


@pytest.mark.parametrize("batch_size", [1, 3, 4, 99])
def test_the_batch_size_leaves_no_trace(batch_size: int) -> None:
    """Any number of blocks per forward pass gives the same matrices."""
    assert_same_grams(grams("llama", hand_made_blocks(), batch_size=batch_size), grams("llama", hand_made_blocks()))


def test_the_order_of_blocks_and_the_packing_leave_no_trace() -> None:
    """Reordered blocks, and documents alone in longer blocks, give the same matrices."""
    blocks = hand_made_blocks()
    expected = grams("llama", blocks)
    assert_same_grams(grams("llama", replace(blocks, rows=[[6], [2], [4, 3, 5], [1, 0]])), expected)
    assert_same_grams(grams("llama", replace(blocks, rows=[[i] for i in range(7)], block_size=23)), expected)


def test_padding_never_enters() -> None:
    """A block with room to spare gives the matrices of its documents only."""
    tight = HandMadeBlocks([[5, 6, 7, 8]], [[0]], 4)
    assert_same_grams(grams("llama", replace(tight, block_size=32)), grams("llama", tight))


def test_shards_add_up_to_the_whole() -> None:
    """Two passes over parts, merged, are one pass over everything."""
    blocks = hand_made_blocks()
    first, second = replace(blocks, rows=blocks.rows[:1]), replace(blocks, rows=blocks.rows[1:])
    merged, whole = merge_grams(grams("llama", first), grams("llama", second)), grams("llama", blocks)
    assert merged.count == whole.count
    for site, matrix in whole.sums.items():
        torch.testing.assert_close(merged.load(site), matrix, rtol=1e-10, atol=1e-10)


def test_half_precision_is_summed_in_float32() -> None:
    """A bfloat16 model gives float32 matrices near those of the same weights in float64."""
    model = pico_model(families()["llama"], torch.bfloat16)
    geometry = geometry_of(model, families()["llama"])
    narrow = collect_grams(model, hand_made_blocks(), geometry, KINDS)
    wide = collect_grams(model.double(), hand_made_blocks(), geometry, KINDS)
    for site, matrix in narrow.sums.items():
        assert matrix.dtype == torch.float32
        assert float(matrix.trace() / wide.sums[site].trace()) == pytest.approx(1.0, abs=0.05)


def test_an_unknown_kind_is_refused_before_anything_runs() -> None:
    """The message says which kinds there are."""
    with pytest.raises(FamilyError, match=r"llama model has no units called head\. It has: .*ffn_channel"):
        grams("llama", hand_made_blocks(), ["ffn_channel", "head"])


def test_the_model_is_left_as_it_was() -> None:
    """No hook stays, also after an error, and evaluation mode is set."""
    family = families()["llama"]
    model = pico_model(family).train()
    collect_grams(model, hand_made_blocks(), geometry_of(model, family), KINDS)
    assert not model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_progress_hears_of_every_token() -> None:
    """A pass for Gram matrices alone announces its work in tokens and advances to the announced total."""
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
    collect_grams(model, hand_made_blocks(), geometry, KINDS, batch_size=3, progress=progress, label="validate")
    assert said[0] == ("validate", 50, "tokens")
    assert said[1:] == [43, 7]


@pytest.mark.parametrize(
    ("parameter", "named"),
    [
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.down_proj"),
        ("model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj"),
    ],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_activations_that_are_not_finite_name_the_first_place(parameter: str, named: str, bad: float) -> None:
    """Without the other statistics it is noticed too, and the hooks are gone."""
    family = families()["llama"]
    model = pico_model(family)
    with torch.no_grad():
        model.get_parameter(parameter)[0, 0] = bad
    with pytest.raises(CheckpointError, match=r"not finite.*dtype: float32") as caught:
        collect_grams(model, hand_made_blocks(), geometry_of(model, family), KINDS)
    assert f"{named} " in str(caught.value)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
