"""Reconstruction depends on the channels and their data, not on their order, their scale or the steps taken."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.reconstruction import choose_reconstruction, output_error, reconstruct

CHANNELS, OUT, TOKENS = 9, 4, 40
seeds = st.integers(0, 2**16)
ridges = st.sampled_from([0.0, 1e-4, 1e-2, 1.0])
orders = st.permutations(range(CHANNELS))
sizes = st.integers(1, CHANNELS)


def random(seed: int, rows: int) -> Tensor:
    """Return rows x channels of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, CHANNELS, dtype=torch.float64, generator=generator)


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a weight, and E[x~ x~T], E[x~ xT] and E[x xT] of correlated tokens."""
    x = random(seed, TOKENS) + random(seed + 1, TOKENS)[:, :1]
    seen = x + 0.3 * random(seed + 2, TOKENS)
    return random(seed + 3, OUT), seen.T @ seen / TOKENS, seen.T @ x / TOKENS, x.T @ x / TOKENS


def close(first: Tensor, second: Tensor) -> None:
    """Assert equality up to the rounding of small solves."""
    torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-10)


@given(seeds, orders, orders, sizes, ridges)
def test_permuting_channels_permutes_the_result(
    seed: int, order: list[int], kept: list[int], size: int, ridge: float
) -> None:
    """Neither the numbering of channels nor the order of the kept ones matters to any column."""
    weight, gram, cross, dense = problem(seed)
    keep, permutation = torch.tensor(kept[:size]), torch.tensor(order)
    moved = permutation.argsort()[keep]
    shuffled = [matrix[permutation][:, permutation] for matrix in (gram, cross, dense)]
    plain = reconstruct(weight, gram, keep, ridge=ridge, cross=cross)
    close(reconstruct(weight[:, permutation], shuffled[0], moved, ridge=ridge, cross=shuffled[1]), plain)
    close(
        reconstruct(weight[:, permutation], shuffled[2], moved, ridge=ridge),
        reconstruct(weight, dense, keep, ridge=ridge),
    )
    close(reconstruct(weight, gram, keep.flip(0), ridge=ridge, cross=cross), plain.flip(1))
    assert output_error(
        weight[:, permutation], plain, shuffled[0], moved, cross=shuffled[1], dense=shuffled[2]
    ) == pytest.approx(output_error(weight, plain, gram, keep, cross=cross, dense=dense), rel=1e-8, abs=1e-12)


@given(seeds, orders, sizes, ridges, st.sampled_from([1e-6, 0.1, 3.0, 1e5]))
def test_the_scale_of_the_data_does_not_matter(
    seed: int, kept: list[int], size: int, ridge: float, scale: float
) -> None:
    """The ridge is relative and so are errors; sums over tokens serve as well as means."""
    weight, gram, cross, dense = problem(seed)
    keep = torch.tensor(kept[:size])
    larger = [matrix * scale**2 for matrix in (gram, cross, dense)]
    once = reconstruct(weight, gram, keep, ridge=ridge, cross=cross)
    close(reconstruct(weight, larger[0], keep, ridge=ridge, cross=larger[1]), once)
    close(reconstruct(weight, larger[2], keep, ridge=ridge), reconstruct(weight, dense, keep, ridge=ridge))
    close(reconstruct(weight * scale, gram, keep, ridge=ridge, cross=cross) / scale, once)
    errors = [
        output_error(weight, once, matrices[0], keep, cross=matrices[1], dense=matrices[2])
        for matrices in ([gram, cross, dense], larger)
    ]
    assert errors[0] == pytest.approx(errors[1], rel=1e-8, abs=1e-12)


@given(seeds, orders, sizes, st.data())
def test_removing_in_two_steps_is_removing_at_once(seed: int, kept: list[int], size: int, draw: st.DataObject) -> None:
    """Without ridge, a fit on part of the channels and then on part of those is the direct fit, columns in order."""
    weight, _, _, gram = problem(seed)
    then = draw.draw(st.lists(st.integers(0, size - 1), min_size=1, unique=True))
    keep, inner = torch.tensor(kept[:size]), torch.tensor(then)
    middle = reconstruct(weight, gram, keep, ridge=0.0)
    twice = reconstruct(middle, gram[keep][:, keep], inner, ridge=0.0)
    close(twice, reconstruct(weight, gram, keep[inner], ridge=0.0))


@given(seeds, orders, sizes)
def test_more_kept_channels_never_mean_more_error(seed: int, kept: list[int], size: int) -> None:
    """Without ridge, on the text of the fit; the error of keeping everything is none."""
    weight, _, _, gram = problem(seed)
    errors = [
        output_error(weight, reconstruct(weight, gram, keep, ridge=0.0), gram, keep)
        for keep in (torch.tensor(kept[:number]) for number in range(size, CHANNELS + 1))
    ]
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-12


@given(seeds, orders, sizes, st.booleans())
def test_a_choice_never_does_harm_on_held_out_text(seed: int, kept: list[int], size: int, related: bool) -> None:
    """Whatever the calibration text was, the error is at most that of the dense columns, and is told truly."""
    weight, gram, cross, _ = problem(seed)
    _, held_out, held_out_cross, held_out_dense = problem(seed + 10 if related else seed)
    if not related:
        held_out_cross = -held_out_cross
    keep = torch.tensor(kept[:size])
    one = choose_reconstruction(weight, gram, held_out, keep)
    two = choose_reconstruction(
        weight,
        gram,
        held_out,
        keep,
        cross=cross,
        held_out_cross=held_out_cross,
        held_out_dense=held_out_dense,
    )
    second = {"cross": held_out_cross, "dense": held_out_dense}
    for chosen, matrices in ((one, {}), (two, second)):
        told = output_error(weight, chosen.kept_weight, held_out, keep, **matrices)
        assert told == pytest.approx(chosen.error_after, rel=1e-9, abs=1e-12)
        assert chosen.error_after <= chosen.error_before
        if chosen.ridge is None:
            assert torch.equal(chosen.kept_weight, weight[:, keep])
            assert chosen.error_after == chosen.error_before
