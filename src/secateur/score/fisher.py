"""Fisher: how much the loss on the domain depends on the unit, by the gradient of a mask that it is multiplied with.

Source: the diagonal empirical Fisher information of a unit mask m at 1, (1/N) sum_n (dL_n/dm)^2, as in Kwon et al.
2022, "A Fast Post-Training Pruning Framework for Transformers", arXiv 2204.09656, and Liu et al. 2021, "Group Fisher
Pruning", arXiv 2108.00708. Half of it is the second-order estimate of the loss that removing the unit costs. Because
the mask multiplies what the reading projection receives, dL_n/dm_j = sum over tokens t of x_tj dL_n/dx_tj.

Where we differ. n counts calibration blocks, each with the mean loss over its predicted tokens, not labelled samples.
The mask of a group covers all channels of its query heads. Only the diagonal is used: units are judged one by one.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "fisher",
    measures="mean squared gradient of the domain's loss with respect to switching the unit off",
    formula="score_j = (1/N) sum_n (sum_{t in n} a_tj dL_n/da_tj)^2, n calibration blocks, the inner sum also over the "
    "unit's channels",
    needs="gradients",
    cost="a forward and backward pass over calibrate.gradient_tokens tokens",
    caveat="noisy on few blocks; at a unit's small effect it sees only the direction of the loss, and it knows nothing "
    "of units that stand in for each other",
    source="Kwon et al. 2022, arXiv 2204.09656; Liu et al. 2021, Group Fisher Pruning, arXiv 2108.00708",
    gradient=True,
)
def fisher(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return the mean over calibration blocks of the squared mask gradient per unit, in nats squared."""
    gradients = evidence.load_gradients()
    return gradients.mask_sq / gradients.count
