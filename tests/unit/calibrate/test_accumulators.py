"""Accumulators equal plain loops over tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.calibrate.accumulators import GramSum, MomentSums, Scratch, cosine_sums, count_tokens, sum_abs


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


def test_sequences_are_averaged_before_they_are_squared_and_added() -> None:
    """One update is one sequence, whatever its length; one without tokens is none."""
    sums = MomentSums()
    parts = values(13, 4).split([5, 0, 8])
    for part in parts:
        sums.update(part, Scratch())
    expected = sum(part.abs().mean(0) ** 2 for part in parts if len(part))
    assert sums.sequences().count == 2
    torch.testing.assert_close(sums.sequences().mean_abs_sq, expected)


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
    pairs = {"other": (0, 1), "same": (0, 0), "opposite": (0, 2)}
    found = {name: float(total) for name, total in cosine_sums((a, b, -a), pairs, Scratch()).items()}
    assert found == pytest.approx({"other": expected, "same": 6.0, "opposite": -6.0}, rel=1e-12)
    assert float(cosine_sums((a, torch.zeros_like(a)), {"none": (0, 1)}, Scratch())["none"]) == 0.0


def test_tokens_are_counted_by_id() -> None:
    """One count per id of the vocabulary, also those that never occur."""
    assert count_tokens(torch.tensor([1, 3, 1, 1]), 5).tolist() == [0, 3, 0, 1, 0]
    assert count_tokens(torch.empty(0, dtype=torch.int64), 3).tolist() == [0, 0, 0]


# -- Gram matrices ---------------------------------------------------------------------------------------------------


def gram(*parts: Tensor) -> Tensor:
    """Return the Gram matrix of values that come in parts."""
    sums = GramSum()
    for part in parts:
        sums.update(part)
    return sums.result()


@pytest.mark.parametrize("channels", [1, 31, 32, 33, 64, 100, 256, 257, 300, 600])
def test_gram_matrices_equal_the_full_product(channels: int) -> None:
    """Whatever the width leaves for the last panel, every product is there, on both sides of the diagonal."""
    data = values(9, channels)
    result = gram(data[:4], data[4:])
    np.testing.assert_allclose(result.numpy(), data.numpy().T @ data.numpy(), rtol=1e-12, atol=1e-12)
    assert torch.equal(result, result.T)


def test_gram_matrices_take_little_more_than_half() -> None:
    """The running sums of a wide layer hold 9/16 of the full matrix."""
    sums = GramSum()
    sums.update(values(2, 1024))
    assert sum(panel.numel() for panel in sums._panels) == 1024 * 1024 * 9 // 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_matrices_of_narrow_inputs_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Products of half precision neither overflow nor drown in their sum."""
    data = torch.full((4096, 3), 300.1, dtype=dtype)
    result = gram(*data.split(512))
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), 4096 * float(data[0, 0]) ** 2, rtol=1e-5)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_gram_matrices_are_not_rounded_for_speed(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that lets float32 be multiplied as something shorter still gets exact sums, and its setting back."""
    data = values(64, 1024, torch.float32)
    during = []
    addmm_ = Tensor.addmm_

    def watched(self: Tensor, *arguments: Tensor) -> Tensor:
        during.append(torch.get_float32_matmul_precision())
        return addmm_(self, *arguments)

    monkeypatch.setattr(Tensor, "addmm_", watched)
    torch.set_float32_matmul_precision(precision)
    try:
        result = gram(data)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(during) == {"highest"}
    exact = data.double().T @ data.double()
    np.testing.assert_allclose(result.numpy(), exact.numpy(), rtol=1e-4, atol=1e-4)


def test_gram_matrices_are_handed_out_as_they_are_now() -> None:
    """A result is not changed by what is added later, and may be changed without harm, also after inference mode."""
    data = values(6, 40)
    sums = GramSum()
    with torch.inference_mode():
        sums.update(data[:3])
    early = sums.result()
    early.diagonal().add_(1.0)
    with torch.inference_mode():
        sums.update(data[3:])
    np.testing.assert_allclose(early.numpy(), (data[:3].T @ data[:3] + torch.eye(40)).numpy(), atol=1e-12)
    np.testing.assert_allclose(sums.result().numpy(), (data.T @ data).numpy(), atol=1e-12)


def test_no_tokens_add_nothing_to_gram_matrices() -> None:
    """A batch of padding only changes no sum, first or later."""
    data = values(3, 5)
    assert torch.equal(gram(values(0, 5), data, values(0, 5)), gram(data))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("channel", [0, 40, 69])
def test_gram_matrices_that_are_not_finite_are_noticed(bad: float, channel: int) -> None:
    """One bad value in any panel is enough, and stays noticed."""
    sums = GramSum()
    assert sums.is_finite()
    data = values(3, 70)
    sums.update(data)
    assert sums.is_finite()
    data[1, channel] = bad
    sums.update(data)
    sums.update(values(3, 70))
    assert not sums.is_finite()


def test_gram_matrices_are_mirrored_from_above_the_diagonal() -> None:
    """Where a library rounds x y and y x differently, the result is symmetric all the same."""
    sums = GramSum()
    sums.update(values(5, 40))
    before = sums.result()
    sums._panels[0][7, 3] += 1.0
    assert torch.equal(sums.result(), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_matrices_on_a_gpu_are_exact_and_come_back(dtype: torch.dtype) -> None:
    """TF32 is not used even where the process allows it, and the result is in main memory."""
    data = values(512, 300, dtype)
    torch.set_float32_matmul_precision("high")
    try:
        result = gram(*data.cuda().split(200))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert (result.device.type, result.dtype) == ("cpu", torch.float32)
    exact = data.double().T @ data.double()
    np.testing.assert_allclose(result.numpy(), exact.numpy(), rtol=1e-4, atol=1e-3)
