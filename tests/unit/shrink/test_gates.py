"""Scales of experts against plain least squares on explicit vectors."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.shrink.gates import LEAST_SCALE, GateSums, choose_scales, fit_scales


def outputs(seed: int, tokens: int = 40, kept: int = 3) -> Tensor:
    """Return what each expert gives each token, of shape (tokens, hidden, kept)."""
    return torch.randn(tokens, 5, kept, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sums(given: Tensor, wanted: Tensor) -> GateSums:
    """Return the sums of explicit outputs and what is wanted of them together."""
    rows, target = given.flatten(0, 1), wanted.flatten()
    return GateSums(rows.T @ rows, rows.T @ target, float(target.square().sum()))


def test_one_scale_is_the_projection_on_the_sum() -> None:
    """<y, z> / <z, z>, and the error is what is left of y."""
    given = outputs(0)
    wanted = given.sum(2) * 0.3 + 0.2 * outputs(1)[..., 0]
    found = sums(given, wanted)
    scales = fit_scales(found, math.inf)
    both = given.sum(2)
    scale = float((wanted * both).sum() / both.square().sum())
    torch.testing.assert_close(scales, torch.full((3,), scale, dtype=torch.float64))
    left = (wanted - scale * both).square().sum() / wanted.square().sum()
    assert found.error(scales) == pytest.approx(float(left), abs=1e-12)


@pytest.mark.parametrize("ridge", [1e-9, 0.1])
def test_one_scale_each_is_ridge_regression_towards_the_common_one(ridge: float) -> None:
    """As least squares on the rows, with one row more for each expert that pulls towards the layer's scale."""
    given = outputs(0)
    wanted = (given * torch.tensor([0.4, 0.9, 1.3])).sum(2) + 0.1 * outputs(1)[..., 0]
    found = sums(given, wanted)
    rows, common = given.flatten(0, 1), fit_scales(found, math.inf)
    pull = math.sqrt(ridge * float(rows.square().sum(0).mean()))
    more = torch.cat([rows, pull * torch.eye(3).double()]), torch.cat([wanted.flatten(), pull * common])
    torch.testing.assert_close(fit_scales(found, ridge), torch.linalg.lstsq(*more).solution)


def test_an_expert_that_was_never_asked_has_the_scale_of_its_layer() -> None:
    """Its equations are empty, and the ridge decides."""
    given = outputs(0)
    given[..., 1] = 0.0
    scales = fit_scales(sums(given, 0.5 * given.sum(2)), 0.01)
    torch.testing.assert_close(scales, torch.full((3,), 0.5, dtype=torch.float64))


def test_held_out_text_chooses_and_both_texts_are_fitted() -> None:
    """The errors are those of the first fit on the held-out text."""
    scale = torch.tensor([0.4, 0.9, 1.3]).double()
    fitted, held_out = (sums(outputs(seed), (outputs(seed) * scale).sum(2)) for seed in (0, 1))
    fit = choose_scales(fitted, held_out)
    assert fit.ridge == 0.01
    torch.testing.assert_close(fit.scales, fit_scales(fitted + held_out, 0.01))
    assert fit.error_before == pytest.approx(held_out.error(torch.ones(3).double()))
    assert fit.error_after == pytest.approx(held_out.error(fit_scales(fitted, 0.01)))
    assert fit.error_after < fit.error_before


def test_where_nothing_helps_all_stays() -> None:
    """Text whose best scales are others than those of the held-out text is no reason to change anything."""
    given = outputs(0)
    fit = choose_scales(sums(given, 0.2 * given.sum(2)), sums(given, given.sum(2)))
    assert fit.ridge is None and fit.scales.tolist() == [1.0] * 3
    assert fit.error_before == fit.error_after == pytest.approx(0.0, abs=1e-12)


def test_no_scale_takes_an_expert_out_or_turns_it_round() -> None:
    """An expert that should answer the other way keeps a small scale."""
    given = outputs(0)
    wanted = given[..., 0] + given[..., 1] - given[..., 2]
    assert float(fit_scales(sums(given, wanted), 1e-6)[2]) == LEAST_SCALE


def test_sums_that_are_not_finite_are_refused() -> None:
    """A model that overflows says so here, on either text."""
    found = sums(outputs(0), outputs(1)[..., 0])
    broken = replace(found, wanted=found.wanted * math.nan)
    for texts in ((broken, found), (found, broken), (found, replace(found, power=math.inf))):
        with pytest.raises(PlanError, match="what 3 experts that stay give on the text is not finite"):
            choose_scales(*texts)
