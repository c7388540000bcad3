"""Sums over tokens do not depend on how the tokens were batched."""

from __future__ import annotations

from dataclasses import astuple
from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.calibrate.accumulators import GramSum, MomentSums, Scratch, cosine_sums, count_tokens, sum_abs
from secateur.records.statistics import Moments

NUM_TOKENS = 40
cuts = st.lists(st.integers(0, NUM_TOKENS), max_size=6).map(lambda inner: [0, *sorted(inner), NUM_TOKENS])
"""Where to cut 40 tokens into batches; empty batches too."""
seeds = st.integers(0, 2**16)
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
scales = st.sampled_from([1e-6, 1.0, 1e4])


def tokens(seed: int, dtype: torch.dtype, scale: float, channels: int = 5) -> Tensor:
    """Return random activations."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(NUM_TOKENS, channels, generator=generator, dtype=torch.float64) * scale).to(dtype)


def summed(values: Tensor, bounds: list[int]) -> Moments:
    """Return the moments of values added batch by batch."""
    sums = MomentSums()
    for start, stop in pairwise(bounds):
        sums.update(values[start:stop], Scratch())
    return sums.result()


def tolerance(dtype: torch.dtype, scale: float, power: int = 1) -> dict[str, float]:
    """Return the rounding that a sum of 40 numbers in the accumulating dtype may show."""
    unit = 1e-13 if dtype == torch.float64 else 1e-5
    return {"rtol": unit, "atol": unit * scale**power * 10}


def cosine(first: Tensor, second: Tensor) -> Tensor:
    """Return the sum over tokens of the cosine of two streams."""
    return cosine_sums((first, second), {"pair": (0, 1)}, Scratch())["pair"]


@given(seeds, cuts, dtypes, scales)
def test_moments_do_not_depend_on_batches(seed: int, bounds: list[int], dtype: torch.dtype, scale: float) -> None:
    """Any batching gives the moments of one batch, which are those of a float64 sum."""
    values = tokens(seed, dtype, scale)
    batched = summed(values, bounds)
    wide = values.double()
    assert batched.count == NUM_TOKENS
    torch.testing.assert_close(batched.sum, wide.sum(0), **tolerance(dtype, scale))
    torch.testing.assert_close(batched.sum_abs, wide.abs().sum(0), **tolerance(dtype, scale))
    torch.testing.assert_close(batched.sum_sq, (wide**2).sum(0), **tolerance(dtype, scale, 2))


@given(seeds, cuts)
def test_moments_of_parts_add_up(seed: int, bounds: list[int]) -> None:
    """Adding the moments of the parts, in any grouping, is the same as one pass."""
    values = tokens(seed, torch.float64, 1.0)
    parts = [summed(values, [start, stop]) for start, stop in pairwise(bounds)]
    left = parts[0]
    for part in parts[1:]:
        left = left + part
    right = parts[-1]
    for part in reversed(parts[:-1]):
        right = part + right
    for a, b in zip(astuple(left), astuple(right), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@given(seeds, cuts, dtypes)
def test_absolute_sums_cosines_and_counts_do_not_depend_on_batches(
    seed: int, bounds: list[int], dtype: torch.dtype
) -> None:
    """The other sums are additive too."""
    first, second = tokens(seed, dtype, 1.0), tokens(seed + 1, dtype, 1.0)
    ids = tokens(seed, torch.float64, 30.0, 1)[:, 0].abs().long()
    runs = list(pairwise(bounds))
    whole = tolerance(dtype, 1.0)
    torch.testing.assert_close(sum(sum_abs(first[a:b], Scratch()) for a, b in runs), sum_abs(first, Scratch()), **whole)
    torch.testing.assert_close(sum(cosine(first[a:b], second[a:b]) for a, b in runs), cosine(first, second), **whole)
    assert torch.equal(sum(count_tokens(ids[a:b], 200) for a, b in runs), count_tokens(ids, 200))


def gram(values: Tensor, bounds: list[int]) -> Tensor:
    """Return the Gram matrix of values added batch by batch."""
    sums = GramSum()
    for start, stop in pairwise(bounds):
        sums.update(values[start:stop])
    return sums.result()


@given(seeds, cuts, dtypes, scales, st.sampled_from([1, 5, 32, 70]))
def test_gram_matrices_do_not_depend_on_batches(
    seed: int, bounds: list[int], dtype: torch.dtype, scale: float, channels: int
) -> None:
    """Any batching gives the matrix of one batch, which is that of a float64 product, and is symmetric."""
    values = tokens(seed, dtype, scale, channels)
    batched = gram(values, bounds)
    wide = values.double()
    torch.testing.assert_close(batched.double(), wide.T @ wide, **tolerance(dtype, scale, 2))
    assert torch.equal(batched, batched.T)


@given(seeds, st.permutations(range(NUM_TOKENS)))
def test_gram_matrices_do_not_depend_on_the_order_of_tokens(seed: int, order: list[int]) -> None:
    """A sum has no order, up to rounding."""
    values = tokens(seed, torch.float64, 1.0, 40)
    whole = [0, NUM_TOKENS]
    torch.testing.assert_close(gram(values[order], whole), gram(values, whole), **tolerance(torch.float64, 1.0, 2))
