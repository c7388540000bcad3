"""The least squares behind several scores."""

from __future__ import annotations

import pytest
import torch

from secateur.score.linear_algebra import greedy_removal_errors, inverse, removal_errors, ridge_size, with_ridge

GENERATOR = torch.Generator().manual_seed(7)
TOKENS = torch.randn(40, 12, dtype=torch.float64, generator=GENERATOR)
GRAM = TOKENS.T @ TOKENS / 40
COLUMNS = torch.randn(12, 5, dtype=torch.float64, generator=GENERATOR)


def test_a_ridge_is_a_share_of_the_mean_diagonal() -> None:
    """It is added to the diagonal of a copy."""
    before = GRAM.clone()
    assert float(ridge_size(GRAM, 0.1)) == pytest.approx(0.1 * float(GRAM.trace()) / 12)
    torch.testing.assert_close(with_ridge(GRAM, 0.1) - GRAM, ridge_size(GRAM, 0.1) * torch.eye(12).double())
    assert torch.equal(with_ridge(GRAM, 0.0), GRAM)
    assert torch.equal(GRAM, before)


def test_the_inverse_is_one_and_symmetric() -> None:
    """To the last digits; what has none is refused."""
    torch.testing.assert_close(inverse(GRAM) @ GRAM, torch.eye(12).double())
    torch.testing.assert_close(inverse(GRAM), inverse(GRAM).T, rtol=1e-14, atol=0)
    with pytest.raises(torch.linalg.LinAlgError):
        inverse(torch.zeros(3, 3).double())


def test_units_of_one_channel_take_the_same_road_as_blocks() -> None:
    """The short cut for single channels is the block formula."""
    wide = removal_errors(inverse(torch.block_diag(GRAM, GRAM)), torch.cat([COLUMNS, COLUMNS]), 12)
    torch.testing.assert_close(wide, (COLUMNS.T @ GRAM @ COLUMNS).trace().expand(2))
    single = removal_errors(inverse(GRAM), COLUMNS, 1)
    torch.testing.assert_close(single[3], COLUMNS[3].square().sum() / inverse(GRAM)[3, 3])


@pytest.mark.parametrize(("width", "step"), [(1, 4), (3, 1)])
def test_greedy_errors_are_those_of_the_schur_complement(width: int, step: int) -> None:
    """The error after each removal is tr(W_D (H_DD - H_DK H_KK^-1 H_KD) W_DT) of all that is gone by then."""
    errors = greedy_removal_errors(inverse(GRAM), COLUMNS, width, step)
    gone: list[int] = []
    for unit in errors.argsort().tolist():
        gone += range(unit * width, (unit + 1) * width)
        kept = [channel for channel in range(12) if channel not in gone]
        across = GRAM[gone][:, kept]
        left = GRAM[gone][:, gone] - across @ torch.linalg.solve(GRAM[kept][:, kept], across.T)
        assert float(errors[unit]) == pytest.approx(float((COLUMNS[gone].T @ left @ COLUMNS[gone]).trace()), rel=1e-9)


def test_arguments_are_left_alone() -> None:
    """Greedy removal works on copies."""
    inverse_gram, columns = inverse(GRAM), COLUMNS.clone()
    kept = inverse_gram.clone()
    greedy_removal_errors(inverse_gram, columns, 1, 4)
    assert torch.equal(inverse_gram, kept) and torch.equal(columns, COLUMNS)
