"""Least-squares reconstruction, against explicit data."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.shrink.reconstruct import RIDGES
from tests.reconstruction import choose_reconstruction, output_error, reconstruct

CHANNELS, OUT, TOKENS = 12, 5, 90
KEEP = torch.tensor([7, 0, 3, 11, 4, 8])
REMOVED = torch.tensor([1, 2, 5, 6, 9, 10])
WIDE: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def data(seed: int = 0, tokens: int = TOKENS) -> Tensor:
    """Return tokens x channels of correlated activations; all seeds share their covariance."""
    mixing = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(99))
    values = torch.randn(tokens, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return values @ mixing + 0.3


def pruned_stream(x: Tensor, seed: int = 50) -> Tensor:
    """Return the same tokens as a pruned model would see them."""
    noise = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 0.9 * x + 0.2 * x.roll(1, dims=1) + 0.5 * noise


def weights(seed: int = 7) -> Tensor:
    """Return a dense weight."""
    return torch.randn(OUT, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mean_product(rows: Tensor, columns: Tensor) -> Tensor:
    """Return E[a bT], one token at a time."""
    total = torch.zeros(rows.shape[1], columns.shape[1], dtype=torch.float64)
    for a, b in zip(rows, columns, strict=True):
        total += torch.outer(a, b)
    return total / len(rows)


def gram_of(x: Tensor) -> Tensor:
    """Return E[x xT]."""
    return mean_product(x, x)


def regression(x: Tensor, seen: Tensor, weight: Tensor, penalty: float) -> Tensor:
    """Return the V of least mean ||W x - V seen_K||^2 + penalty ||V - W_K||^2, from the data by a general solver."""
    scale = math.sqrt(penalty * len(x))
    inputs = torch.cat([seen[:, KEEP], scale * torch.eye(len(KEEP), dtype=torch.float64)])
    targets = torch.cat([x @ weight.T, scale * weight[:, KEEP].T])
    return torch.linalg.lstsq(inputs, targets, driver="gelsd").solution.T


def mean_squares(values: Tensor) -> float:
    """Return the mean over tokens of the squared length."""
    return sum(float(row @ row) for row in values) / len(values)


@pytest.mark.parametrize("ridge", [0.0, 1e-4, 0.3])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_closed_form_is_the_regression_on_the_data(ridge: float, streams: int) -> None:
    """A general least-squares solver on the tokens themselves finds the same weight."""
    x, weight = data(), weights()
    seen = pruned_stream(x) if streams == 2 else x
    gram = gram_of(seen)
    cross = mean_product(seen, x) if streams == 2 else None
    penalty = ridge * float(gram.diagonal()[KEEP].mean())
    result = reconstruct(weight, gram, KEEP, ridge=ridge, cross=cross)
    torch.testing.assert_close(result, regression(x, seen, weight, penalty), **WIDE)


@pytest.mark.parametrize("ridge", [0.0, 0.05])
@pytest.mark.parametrize("streams", [1, 2])
def test_the_gradient_vanishes(ridge: float, streams: int) -> None:
    """Autograd of the penalised error on the data is zero at the result, and is not at the dense columns."""
    x, weight = data(), weights()
    seen = pruned_stream(x) if streams == 2 else x
    gram = gram_of(seen)
    cross = mean_product(seen, x) if streams == 2 else None
    penalty = ridge * gram.diagonal()[KEEP].mean()

    def gradient(point: Tensor) -> Tensor:
        point = point.clone().requires_grad_()
        fit = (x @ weight.T - seen[:, KEEP] @ point.T).square().sum(1).mean()
        (slope,) = torch.autograd.grad(fit + penalty * (point - weight[:, KEEP]).square().sum(), point)
        return slope

    assert gradient(reconstruct(weight, gram, KEEP, ridge=ridge, cross=cross)).abs().max() < 1e-11
    assert gradient(weight[:, KEEP]).abs().max() > 0.1


def test_both_published_forms_are_the_same() -> None:
    """(W C[K,:]T + r W_K)(H_KK + r I)^-1, and W_K + W_D H_DK (H_KK + r I)^-1 where the streams are equal."""
    x, weight = data(), weights()
    seen = pruned_stream(x)
    for gram, cross in [(gram_of(seen), mean_product(seen, x)), (gram_of(x), gram_of(x))]:
        kept_gram = gram[KEEP][:, KEEP]
        penalty = 0.01 * kept_gram.diagonal().mean() * torch.eye(len(KEEP), dtype=torch.float64)
        direct = (weight @ cross[KEEP].T + weight[:, KEEP] @ penalty) @ torch.linalg.inv(kept_gram + penalty)
        torch.testing.assert_close(reconstruct(weight, gram, KEEP, ridge=0.01, cross=cross), direct, **WIDE)
    one_stream = weight[:, KEEP] + weight[:, REMOVED] @ gram[REMOVED][:, KEEP] @ torch.linalg.inv(kept_gram + penalty)
    torch.testing.assert_close(reconstruct(weight, gram, KEEP, ridge=0.01), one_stream, **WIDE)


def test_equal_streams_are_one_stream() -> None:
    """Where the pruned stream is the dense one, both forms, errors and choices agree."""
    gram, held_out, weight = gram_of(data()), gram_of(data(1)), weights()
    once = reconstruct(weight, gram, KEEP, ridge=0.01)
    torch.testing.assert_close(reconstruct(weight, gram, KEEP, ridge=0.01, cross=gram), once, **WIDE)
    one, two = output_error(weight, once, gram, KEEP), output_error(weight, once, gram, KEEP, cross=gram, dense=gram)
    assert one == pytest.approx(two, rel=1e-10)
    first = choose_reconstruction(weight, gram, held_out, KEEP)
    second = choose_reconstruction(
        weight, gram, held_out, KEEP, cross=gram, held_out_cross=held_out, held_out_dense=held_out
    )
    assert first.ridge == second.ridge is not None
    assert (first.error_before, first.error_after) == pytest.approx((second.error_before, second.error_after), rel=1e-9)
    torch.testing.assert_close(first.kept_weight, second.kept_weight, **WIDE)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_error_is_the_mean_of_squared_differences(streams: int) -> None:
    """Token by token, relative to the squared output; for dense columns, for fitted ones and for any others."""
    x, weight = data(), weights()
    seen = pruned_stream(x) if streams == 2 else x
    matrices = {"cross": mean_product(seen, x), "dense": gram_of(x)} if streams == 2 else {}
    gram = gram_of(seen)
    fitted = reconstruct(weight, gram, KEEP, ridge=0.1, cross=matrices.get("cross"))
    for kept_weight in (weight[:, KEEP], fitted, weights(8)[:, KEEP]):
        explicit = mean_squares(x @ weight.T - seen[:, KEEP] @ kept_weight.T) / mean_squares(x @ weight.T)
        assert output_error(weight, kept_weight, gram, KEEP, **matrices) == pytest.approx(explicit, rel=1e-11)


def test_the_error_is_that_of_the_difference_on_all_channels() -> None:
    """tr(E H ET) / tr(W H WT), removed columns counting in full."""
    gram, weight, other = gram_of(data()), weights(), weights(8)
    difference = weight.clone()
    difference[:, KEEP] -= other[:, KEEP]
    expected = torch.trace(difference @ gram @ difference.T) / torch.trace(weight @ gram @ weight.T)
    assert output_error(weight, other[:, KEEP], gram, KEEP) == pytest.approx(float(expected), rel=1e-12)


def test_without_ridge_the_error_left_is_the_schur_complement() -> None:
    """tr(W_D (H_DD - H_DK H_KK^-1 H_KD) W_DT)."""
    gram, weight = gram_of(data()), weights()
    across = gram[REMOVED][:, KEEP]
    schur = gram[REMOVED][:, REMOVED] - across @ torch.linalg.inv(gram[KEEP][:, KEEP]) @ across.T
    lost = weight[:, REMOVED]
    left = torch.trace(lost @ schur @ lost.T) / torch.trace(weight @ gram @ weight.T)
    fitted = reconstruct(weight, gram, KEEP, ridge=0.0)
    assert output_error(weight, fitted, gram, KEEP) == pytest.approx(float(left), rel=1e-10)


@pytest.mark.parametrize("streams", [1, 2])
def test_more_ridge_means_more_error_on_the_fitting_text_but_never_more_than_no_change(streams: int) -> None:
    """From the least error at 0 it rises to that of the dense columns."""
    x, weight = data(), weights()
    seen = pruned_stream(x) if streams == 2 else x
    matrices = {"cross": mean_product(seen, x), "dense": gram_of(x)} if streams == 2 else {}
    gram = gram_of(seen)
    errors = [
        output_error(
            weight, reconstruct(weight, gram, KEEP, ridge=r, cross=matrices.get("cross")), gram, KEEP, **matrices
        )
        for r in (0.0, 1e-3, 1e-1, 1.0, 10.0)
    ]
    assert errors == sorted(errors)
    assert errors[-1] < output_error(weight, weight[:, KEEP], gram, KEEP, **matrices)


@pytest.mark.parametrize("seed", range(3, 8))
def test_channels_that_others_determine_are_made_up_for_completely(seed: int) -> None:
    """Where removed channels are linear combinations of kept ones, nothing is lost, on any text."""
    combinations = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    train, other = data(), data(1)
    for x in (train, other):
        x[:, REMOVED] = x[:, KEEP] @ combinations
    weight = weights()
    fitted = reconstruct(weight, gram_of(train), KEEP, ridge=0.0)
    torch.testing.assert_close(fitted, weight[:, KEEP] + weight[:, REMOVED] @ combinations.T, **WIDE)
    assert 0 <= output_error(weight, fitted, gram_of(other), KEEP) < 1e-13, "rounding is not a negative error"
    assert output_error(weight, weight[:, KEEP], gram_of(other), KEEP) > 0.1


def test_a_large_ridge_leaves_the_dense_columns() -> None:
    """It pulls towards W_K, not towards zero."""
    x, weight = data(), weights()
    seen = pruned_stream(x)
    for cross in (None, mean_product(seen, x)):
        far = reconstruct(weight, gram_of(seen), KEEP, ridge=1e12, cross=cross)
        torch.testing.assert_close(far, weight[:, KEEP], rtol=0, atol=1e-10)


def test_an_antisymmetric_part_does_not_matter() -> None:
    """Float32 sums of products are not quite symmetric; their symmetric part is what counts."""
    gram, weight = gram_of(data()), weights()
    noise = torch.randn(gram.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    skewed = gram + noise - noise.T
    fitted = reconstruct(weight, gram, KEEP, ridge=0.01)
    torch.testing.assert_close(reconstruct(weight, skewed, KEEP, ridge=0.01), fitted, **WIDE)
    errors = [output_error(weight, fitted, h, KEEP) for h in (gram, skewed)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gram_dtype", [torch.float64, torch.float32])
def test_dtype_and_layout(dtype: torch.dtype, gram_dtype: torch.dtype) -> None:
    """Results have the weight's dtype, and are the float64 result of the rounded inputs, rounded once."""
    weight, gram = weights().to(dtype), gram_of(data()).to(gram_dtype)
    exact = reconstruct(weight.double(), gram.double(), KEEP, ridge=0.01)
    chosen = choose_reconstruction(weight, gram, gram, KEEP, ridges=[0.01])
    for result in (reconstruct(weight, gram, KEEP, ridge=0.01), chosen.kept_weight):
        assert result.dtype == dtype
        assert result.device == weight.device
        assert result.is_contiguous()
        assert torch.equal(result, exact.to(dtype))
    assert chosen.error_after == output_error(weight, chosen.kept_weight, gram, KEEP)


def test_parameters_leave_no_graph_behind() -> None:
    """The weight of a live model may require gradients; what comes back does not."""
    weight, gram = torch.nn.Parameter(weights()), gram_of(data())
    chosen = choose_reconstruction(weight, gram, gram, KEEP)
    same = choose_reconstruction(weight, gram, gram, torch.arange(CHANNELS))
    results = [chosen.kept_weight, same.kept_weight, reconstruct(weight, gram, KEEP, ridge=0.1)]
    assert not any(result.requires_grad for result in results)
    assert output_error(weight, weight[:, KEEP], gram, KEEP) == pytest.approx(chosen.error_before, rel=1e-12)


def test_inputs_are_not_changed() -> None:
    """The ridge is added to a copy."""
    weight, gram, cross = weights(), gram_of(data()), gram_of(data(2))
    copies = [weight.clone(), gram.clone(), cross.clone()]
    choose_reconstruction(weight, gram, gram, KEEP, cross=cross, held_out_cross=cross, held_out_dense=gram)
    assert all(torch.equal(a, b) for a, b in zip(copies, (weight, gram, cross), strict=True))


def test_where_nothing_is_removed_nothing_is_computed() -> None:
    """The weight comes back, in the order asked for; a useless Gram matrix does not matter."""
    weight, useless = weights(), torch.full((CHANNELS, CHANNELS), math.nan, dtype=torch.float64)
    for keep in (torch.arange(CHANNELS), torch.arange(CHANNELS).flip(0)):
        assert torch.equal(reconstruct(weight, useless, keep, ridge=0.0), weight[:, keep])
        chosen = choose_reconstruction(weight, useless, useless, keep)
        assert torch.equal(chosen.kept_weight, weight[:, keep])
        assert (chosen.ridge, chosen.error_before, chosen.error_after) == (None, 0.0, 0.0)


def test_where_nothing_is_removed_but_a_target_is_wanted_the_weight_is_fitted_to_it() -> None:
    """What earlier layers lost is made up for as far as a linear map can."""
    x, weight, everything = data(), weights(), torch.arange(CHANNELS)
    seen = pruned_stream(x)
    gram, cross = gram_of(seen), mean_product(seen, x)
    chosen = choose_reconstruction(
        weight, gram, gram, everything, ridges=[0.0], cross=cross, held_out_cross=cross, held_out_dense=gram_of(x)
    )
    best = torch.linalg.lstsq(seen, x @ weight.T, driver="gelsd").solution.T
    torch.testing.assert_close(chosen.kept_weight, best, **WIDE)
    expected = mean_squares((x - seen) @ weight.T) / mean_squares(x @ weight.T)
    assert chosen.error_before == pytest.approx(expected, rel=1e-10)
    assert chosen.error_after < chosen.error_before


@pytest.mark.parametrize("streams", [1, 2])
def test_the_best_ridge_on_held_out_text_is_chosen(streams: int) -> None:
    """It is the one that a loop over the public functions finds, on few tokens neither the least nor the most."""
    weight = weights()
    x, other = data(0, tokens=9), data(1, tokens=400)
    seen, other_seen = (pruned_stream(x), pruned_stream(other, 51)) if streams == 2 else (x, other)
    cross = mean_product(seen, x) if streams == 2 else None
    held_cross, held_dense = (mean_product(other_seen, other), gram_of(other)) if streams == 2 else (None, None)
    gram, held_out = gram_of(seen), gram_of(other_seen)
    ridges = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e3)
    fits = [reconstruct(weight, gram, KEEP, ridge=ridge, cross=cross) for ridge in ridges]
    errors = [output_error(weight, fit, held_out, KEEP, cross=held_cross, dense=held_dense) for fit in fits]
    best = errors.index(min(errors))
    chosen = choose_reconstruction(
        weight, gram, held_out, KEEP, ridges=ridges, cross=cross, held_out_cross=held_cross, held_out_dense=held_dense
    )
    assert 0 < best < len(ridges) - 1
    assert chosen.ridge == ridges[best]
    assert chosen.error_after == pytest.approx(errors[best], rel=1e-12)
    before = output_error(weight, weight[:, KEEP], held_out, KEEP, cross=held_cross, dense=held_dense)
    assert chosen.error_before == pytest.approx(before, rel=1e-12)
    assert chosen.error_after < chosen.error_before
    torch.testing.assert_close(chosen.kept_weight, fits[best], **WIDE)


def test_one_eigendecomposition_would_give_the_same() -> None:
    """The Cholesky solutions agree with those in the eigenbasis of H_KK to 1e-8 at every ridge."""
    gram, weight = gram_of(data()), weights()
    values, vectors = torch.linalg.eigh(gram[KEEP][:, KEEP])
    rotated = weight[:, REMOVED] @ gram[REMOVED][:, KEEP] @ vectors
    for ridge in RIDGES:
        change = rotated / (values + ridge * gram.diagonal()[KEEP].mean()) @ vectors.T
        result = reconstruct(weight, gram, KEEP, ridge=ridge) - weight[:, KEEP]
        torch.testing.assert_close(result, change, rtol=1e-8, atol=0)


def test_a_fit_that_does_not_carry_over_is_not_used() -> None:
    """Correlations that turn round on held-out text make every ridge harmful, so the dense columns stay."""
    weight, x = weights(), data()
    turned = x.clone()
    turned[:, REMOVED] *= -1
    gram, held_out = gram_of(x), gram_of(turned)
    chosen = choose_reconstruction(weight, gram, held_out, KEEP)
    assert chosen.ridge is None
    assert torch.equal(chosen.kept_weight, weight[:, KEEP])
    assert chosen.error_after == chosen.error_before
    assert chosen.error_before == pytest.approx(output_error(weight, weight[:, KEEP], held_out, KEEP), rel=1e-12)
    for ridge in RIDGES:
        fitted = reconstruct(weight, gram, KEEP, ridge=ridge)
        assert output_error(weight, fitted, held_out, KEEP) > chosen.error_before
        assert output_error(weight, fitted, gram, KEEP) < output_error(weight, weight[:, KEEP], gram, KEEP)


def test_channels_that_were_silent_need_no_change() -> None:
    """Nothing is lost with channels that are zero on the text, so no ridge is better than none."""
    x, weight = data(), weights()
    x[:, REMOVED] = 0
    chosen = choose_reconstruction(weight, gram_of(x), gram_of(x), KEEP)
    assert (chosen.ridge, chosen.error_before, chosen.error_after) == (None, 0.0, 0.0)


def test_an_output_of_zero_has_no_relative_error() -> None:
    """Nothing of nothing is no error; something of nothing is an infinite one."""
    gram, zeros, ones = gram_of(data()), torch.zeros(2, 12, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float64)
    assert output_error(zeros, zeros[:, KEEP], gram, KEEP) == 0.0
    assert output_error(zeros, ones, gram, KEEP) == math.inf


@pytest.mark.parametrize("streams", [1, 2])
def test_a_singular_gram_matrix_is_refused(streams: int) -> None:
    """Three tokens for six kept channels: the message counts both and says what to do; a ridge helps."""
    weight, x = weights(), data(tokens=3)
    gram = gram_of(x)
    cross = gram if streams == 2 else None
    message = (
        r"6 kept channels is singular at ridge 0: channel 11 is, up to rounding, a combination of the 3 kept before it"
        r".*Use more calibration tokens or a larger ridge"
    )
    with pytest.raises(PlanError, match=message):
        reconstruct(weight, gram, KEEP, ridge=0.0, cross=cross)
    with pytest.raises(PlanError, match=r"singular at ridge 1e-20"):
        choose_reconstruction(weight, gram, gram_of(data(1)), KEEP, ridges=[1e-3, 1e-20])
    assert torch.isfinite(reconstruct(weight, gram, KEEP, ridge=1e-4, cross=cross)).all()


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_repeated_and_dead_channels_are_singular_at_any_scale(scale: float) -> None:
    """One channel that repeats another, or is always zero, is enough; rounding does not hide it."""
    repeated, dead = data() * scale, data() * scale
    repeated[:, 8] = 3 * repeated[:, 0]
    dead[:, 4] = 0
    for x, channel, before in ((repeated, 8, 5), (dead, 4, 4)):
        with pytest.raises(PlanError, match=f"channel {channel} is, .* of the {before} kept before it"):
            reconstruct(weights(), gram_of(x), KEEP, ridge=0.0)
    with pytest.raises(PlanError, match="of the 0 kept before it"):
        reconstruct(weights(), torch.zeros(CHANNELS, CHANNELS), KEEP, ridge=1.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(3, 4), (3, 5)], ids=["kept", "removed"])
def test_statistics_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    """Wherever they are, in the fit, the error or the held-out text; the message says which."""
    weight, good = weights(), gram_of(data())
    broken = good.clone()
    broken[place] = bad
    message = "for 6 kept channels, .*not finite.*bfloat16 or float32"
    with pytest.raises(PlanError, match="the Gram matrix " + message):
        reconstruct(weight, broken, KEEP, ridge=0.1)
    with pytest.raises(PlanError, match="the Gram matrix " + message):
        output_error(weight, weight[:, KEEP], broken, KEEP)
    with pytest.raises(PlanError, match="the held-out Gram matrix " + message):
        choose_reconstruction(weight, good, broken, KEEP)
    with pytest.raises(PlanError, match="the Gram matrix " + message):
        choose_reconstruction(weight, broken, good, KEEP)
    with pytest.raises(PlanError, match="the Gram matrix " + message):
        reconstruct(weight, good, KEEP, ridge=0.1, cross=broken)
    weight[1, 7] = bad
    with pytest.raises(PlanError, match="or the weight that reads them"):
        reconstruct(weight, good, KEEP, ridge=0.1)


def test_callers_mistakes_are_assertions() -> None:
    """An empty or repeated keep set, a negative ridge, no ridges, and half of a second stream."""
    weight, gram = weights(), gram_of(data())
    for keep in (torch.tensor([], dtype=torch.int64), torch.tensor([1, 2, 1])):
        with pytest.raises(AssertionError, match="kept"):
            reconstruct(weight, gram, keep, ridge=0.1)
    with pytest.raises(AssertionError, match="negative"):
        reconstruct(weight, gram, KEEP, ridge=-0.1)
    with pytest.raises(AssertionError, match="no ridge"):
        choose_reconstruction(weight, gram, gram, KEEP, ridges=[])
    with pytest.raises(AssertionError, match="on both texts"):
        choose_reconstruction(weight, gram, gram, KEEP, cross=gram)
    with pytest.raises(AssertionError, match="comes with its power"):
        output_error(weight, weight[:, KEEP], gram, KEEP, cross=gram)
