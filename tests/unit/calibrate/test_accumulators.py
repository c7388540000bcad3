"""Accumulators equal plain loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.calibrate.accumulators import MomentSums, Scratch, cosine_sum, count_tokens, sum_abs


def values(tokens: int, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return random values."""
    return torch.randn(tokens, channels, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def test_moments_equal_a_numpy_loop() -> None:
    """Sums of x, |x| and x^2 per channel, token by token."""
    data = values(13, 4)
    sums = MomentSums()
    sums.update(data[:5], Scratch())
    sums.update(data[5:], Scratch())
    expected = np.zeros((3, 4))
    for token in data.numpy():
        for channel, x in enumerate(token):
            expected[:, channel] += (x, abs(x), x * x)
    result = sums.result()
    assert result.count == 13
    np.testing.assert_allclose(torch.stack([result.sum, result.sum_abs, result.sum_sq]).numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_inputs_are_summed_wide(dtype: torch.dtype) -> None:
    """Many small half-precision values do not drown in their own sum; totals are float64."""
    data = torch.full((4096, 2), 0.1, dtype=dtype)
    sums = MomentSums()
    for part in data.split(512):
        sums.update(part, Scratch())
    result = sums.result()
    exact = float(data[0, 0])
    assert result.sum.dtype == result.sum_abs.dtype == result.sum_sq.dtype == torch.float64
    np.testing.assert_allclose(result.sum.numpy(), 4096 * exact, rtol=1e-5)
    np.testing.assert_allclose(result.sum_sq.numpy(), 4096 * exact**2, rtol=1e-5)


def test_squares_of_half_precision_do_not_overflow() -> None:
    """300 squared is beyond float16, not beyond the sums."""
    sums = MomentSums()
    sums.update(torch.full((2, 1), 300.0, dtype=torch.float16), Scratch())
    assert sums.result().sum_sq.tolist() == [180_000.0]
    assert sums.is_finite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_noticed(bad: float) -> None:
    """One bad value in one channel is enough, and stays noticed."""
    sums = MomentSums()
    assert sums.is_finite()
    sums.update(values(3, 4), Scratch())
    assert sums.is_finite()
    sums.update(torch.tensor([[0.0, bad, 0.0, 0.0]], dtype=torch.float64), Scratch())
    sums.update(values(3, 4), Scratch())
    assert not sums.is_finite()


def test_no_tokens_add_nothing() -> None:
    """A batch of padding only changes no sum."""
    sums = MomentSums()
    sums.update(values(3, 2), Scratch())
    before = sums.result()
    sums.update(values(0, 2), Scratch())
    after = sums.result()
    assert (after.count, after.sum.tolist()) == (before.count, before.sum.tolist())


def test_sum_of_absolute_values() -> None:
    """|x| summed over tokens, float64 out."""
    data = values(7, 3, torch.float32)
    total = sum_abs(data, Scratch())
    assert total.dtype == torch.float64
    np.testing.assert_allclose(total.numpy(), np.abs(data.numpy()).sum(0, dtype=np.float64), rtol=1e-6)


def test_cosines_equal_their_definition() -> None:
    """The sum over tokens of <a, b> / (|a| |b|)."""
    a, b = values(6, 5), values(6, 5, seed=1)
    expected = sum(
        float(np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y)) for x, y in zip(a.numpy(), b.numpy(), strict=True)
    )
    assert float(cosine_sum(a, b)) == pytest.approx(expected, rel=1e-12)
    assert float(cosine_sum(a, a)) == pytest.approx(6.0)
    assert float(cosine_sum(a, -a)) == pytest.approx(-6.0)


def test_tokens_are_counted_by_id() -> None:
    """One count per id of the vocabulary, also those that never occur."""
    assert count_tokens(torch.tensor([1, 3, 1, 1]), 5).tolist() == [0, 3, 0, 1, 0]
    assert count_tokens(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]
