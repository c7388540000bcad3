"""Tyr: the least-squares error of removing a unit, plus the share of the output's energy that the unit explains.

Source: Li et al. 2025, "Tyr-the-Pruner: Structural Pruning LLMs via Global Sparsity Distribution Optimization"
(NeurIPS 2025), arXiv 2503.09657, the local criterion as in its released code: 1/2 tr(W_g ([H^-1]_gg)^-1 W_gT) plus
the sum over the unit's channels of w_j . (H WT)_j, with H = E[x xT] + lambda I.

Where we differ. One scoring; the released code removes in rounds (16 for FFN layers) and updates the weights between
them. Every layer is scored on the dense model's activations, where the paper's supernet hands on those of pruned
layers. A unit of attention is a whole GQA group, not a query head. The search for layer budgets is not part of a score.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.linear_algebra import RIDGE, Ridge, inverse, removal_errors, with_ridge
from secateur.score.method import Evidence, register


@register(
    "tyr",
    measures="half the least-squares error of removing the unit, plus the output energy that the unit explains",
    formula="score_g = 1/2 tr(W_g ([H^-1]_gg)^-1 W_gT) + sum over channels j of w_j . (H WT)_j; H = E[a aT] + ridge * "
    "mean(diag E[a aT]) I",
    needs="Gram matrices and weights",
    cost="one matrix inversion and one product per layer",
    caveat="a unit that works against the others gets a negative energy and goes first; made for rounds of removal on "
    "a pruned stream, of which this is the first",
    source="Li et al. 2025, Tyr-the-Pruner, arXiv 2503.09657",
    gram=True,
)
def tyr(evidence: Evidence, /, *, ridge: Ridge = RIDGE) -> Float64[Tensor, " units"]:
    """Return half the removal error plus the explained energy per unit, in output squared; it may be negative.

    Args:
        evidence: Gram matrices and the reading projection.
        ridge: lambda as a share of the mean diagonal element of E[x xT].

    Raises:
        torch.linalg.LinAlgError: H + lambda I cannot be inverted.
    """
    gram = with_ridge(evidence.load_gram(), ridge)
    columns = evidence.load_reader().double().T
    energy = (columns * (gram @ columns)).sum(1).reshape(evidence.num_units, evidence.width).sum(1)
    return removal_errors(inverse(gram), columns, evidence.width) / 2 + energy
