"""Optimal Brain Surgeon on units: what removing a unit costs when all others make up for it as well as they can.

Source: Hassibi, Stork 1992 (Optimal Brain Surgeon); for whole columns of a projection Kurtic, Frantar, Alistarh 2023
(ZipLM, arXiv 2302.04089) and Meng et al. 2024 (OSSCAR, arXiv 2403.12983). For a unit g with columns W_g of the
projection that reads it, and H = E[x xT] + lambda I, the score is tr(W_g ([H^-1]_gg)^-1 W_gT); for one channel that is
||w_j||^2 / [H^-1]_jj. Without a ridge it is exactly the mean squared error of the output after least squares.

Where we differ. No factor 1/2, so that the score is the error itself. Every layer is scored on the dense model's
activations. The weights themselves are not changed here: a score only chooses.

Greedy removal. Two units that can stand in for each other are both cheap until one of them goes. ``greedy: true``
therefore removes units a few at a time, updates H^-1 and W to what is left, and scores again. The score it returns is
the error of the output once a unit and everything removed before it are gone. It never falls along the order of
removal, so whoever keeps the best-scored units keeps what greedy removal would have kept; and it is the error of the
cut itself, in output squared like the one-shot score, so it can be compared between layers.
"""

from __future__ import annotations

from typing import Annotated

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


@register(
    "obs",
    measures="output error left when the unit goes and least squares lets the others take over",
    formula="score_g = tr(W_g ([H^-1]_gg)^-1 W_gT), for one channel ||w_j||^2 / [H^-1]_jj; H = E[a aT] + ridge * "
    "mean(diag E[a aT]) I; greedy: the error of all removals up to and including the unit's",
    needs="Gram matrices and weights",
    cost="one matrix inversion per layer; greedy about three times that",
    caveat="needs several tokens per channel, and means what it says only if least-squares compensation follows",
    source="Hassibi and Stork 1992, Optimal Brain Surgeon; Kurtic et al. 2023, ZipLM, arXiv 2302.04089; Meng et al. "
    "2024, OSSCAR, arXiv 2403.12983",
    gram=True,
)
def obs(
    evidence: Evidence,
    /,
    *,
    ridge: Ridge = RIDGE,
    greedy: bool = False,
    step: Annotated[int, Field(ge=1)] | None = None,
) -> Float64[Tensor, " units"]:
    """Return the output error of removing each unit, in output squared, mean over tokens and summed over outputs.

    Args:
        evidence: Gram matrices and the reading projection.
        ridge: lambda as a share of the mean diagonal element of E[x xT]. It counts changes of weights as errors too,
            a removed weight included: a silent unit scores lambda ||w||^2.
        greedy: remove units a few at a time and score the others again; the score is then the error of all removals up
            to and including the unit's own.
        step: with ``greedy``, units removed between two scorings; default a 48th of the layer, at least 1, at most 32.

    Raises:
        ConfigError: ``step`` without ``greedy``.
        torch.linalg.LinAlgError: H + lambda I cannot be inverted.
    """
    if step is not None and not greedy:
        raise ConfigError(f"option step of method obs is for greedy removal; got step {step} without greedy: true.")
    inverse_gram = inverse(with_ridge(evidence.load_gram(), ridge))
    columns = evidence.load_reader().double().T
    if not greedy:
        return removal_errors(inverse_gram, columns, evidence.width)
    return greedy_removal_errors(inverse_gram, columns, evidence.width, step or default_step(evidence.num_units))
