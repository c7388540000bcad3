"""Optimal Brain Surgeon in the metric of the loss: what removing a unit costs the loss when all others make up for it.

Source: van der Ouderaa et al. 2023, "The LLM Surgeon", arXiv 2312.17244: the Hessian of the loss with respect to one
projection's weights is approximated by a Kronecker product G (x) H (K-FAC, Martens and Grosse 2015), H = E[x xT] of its
inputs and G = E[g gT] of the loss's gradients at its outputs. For a unit g with columns W_g the score is
tr(W_gT G W_g [H^-1]_gg^-1); for one channel that is w_jT G w_j / [H^-1]_jj.

It is ``obs`` with the output error measured where the loss feels it. G does not change what least squares does with the
columns that stay (it cancels), only which ones go.

Where we differ. No factor 1/2, so the scores of layers compare up to one constant. G is damped towards the identity:
with few tokens its small directions are noise. The gradient is that of each block's mean loss over the text's own
tokens, not over tokens drawn from the model. ``greedy`` is as for ``obs``.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.errors import ConfigError
from secateur.score.linear_algebra import (
    RIDGE,
    Ridge,
    default_step,
    greedy_removal_errors,
    inverse,
    removal_errors,
    with_ridge,
)
from secateur.score.method import Evidence, register

OUTPUT_RIDGE: float = 0.1
"""Damping of G: enough that a few thousand tokens do not make directions look free that are not."""


@register(
    "kfac",
    measures="what the loss on the domain gains when the unit goes and least squares lets the others take over",
    formula="score_g = tr(W_gT G W_g ([H^-1]_gg)^-1), for one channel w_jT G w_j / [H^-1]_jj; H = E[a aT] + ridge * "
    "mean(diag E[a aT]) I, G = E[g gT] + output_ridge * mean(diag E[g gT]) I, g = dL/dy; greedy as for obs",
    needs="Gram matrices and weights and gradients",
    cost="a forward and backward pass over calibrate.gradient_tokens tokens, and about three matrix inversions per "
    "layer; one without greedy",
    caveat="needs several tokens per channel, and means what it says only if least-squares compensation follows",
    source="van der Ouderaa et al. 2023, The LLM Surgeon, arXiv 2312.17244; Martens and Grosse 2015, K-FAC, arXiv "
    "1503.05671",
    gram=True,
    gradient=True,
    output_gradient=True,
)
def kfac(
    evidence: Evidence,
    /,
    *,
    ridge: Ridge = RIDGE,
    output_ridge: Ridge = OUTPUT_RIDGE,
    greedy: bool = True,
    step: Annotated[int, Field(ge=1)] | None = None,
) -> Float64[Tensor, " units"]:
    """Return the output error of removing each unit in the metric of the loss, up to a constant of the text.

    Args:
        evidence: Gram matrices, gradients and the reading projection.
        ridge: damping of H as a share of its mean diagonal element.
        output_ridge: damping of G as a share of its mean diagonal element.
        greedy: remove units a few at a time and score the others again; the score is then the error of all removals up
            to and including the unit's own.
        step: with ``greedy``, units removed between two scorings; default a 48th of the layer, at least 1, at most 32.

    Raises:
        ConfigError: ``step`` without ``greedy``, or the gradients at the outputs were not taken.
        torch.linalg.LinAlgError: H or G cannot be inverted.
    """
    if step is not None and not greedy:
        raise ConfigError(f"option step of method kfac is for greedy removal; got step {step} without greedy: true.")
    inverse_gram = inverse(with_ridge(evidence.load_gram(), ridge))
    gradients = evidence.load_gradients().output
    if gradients is None:
        raise ConfigError(
            "method kfac needs the gradients at the outputs of the projections, and these statistics hold none. Take "
            "them again."
        )
    columns = evidence.load_reader().double().T
    metric = torch.linalg.cholesky(with_ridge(gradients.to(columns), output_ridge))
    if not greedy:
        return removal_errors(inverse_gram, columns @ metric, evidence.width)
    step = step or default_step(evidence.num_units)
    return greedy_removal_errors(inverse_gram, columns @ metric, evidence.width, step)
