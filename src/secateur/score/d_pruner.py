"""D-Pruner on units: what the domain's loss would gain, with more weight on what general text needs as well.

Source: Zhang et al. 2024, "Pruning as a Domain-specific LLM Extractor", arXiv 2405.06275. There a weight's general
importance G is the error of removing it on open-domain text (Optimal Brain Surgeon); training on the domain then
minimises L + lambda alpha^2 sum_m G_m g_m^2, g_m being the gradient; and a weight's dual importance is
|g w + w H w / 2| with the gradient of that regularised loss and the empirical Fisher information for H.

Here a weight is the mask m_j = 1 of a unit j. With u_n = dL_n/dm_j on block n of the domain, F_j = E[u_n^2], and the
Hessian replaced by F as in the paper, the gradient of the regularised loss is u_n (1 + 2 lambda alpha^2 G_j F_j). So
general importance raises the gradient of units that the domain needs too, and cannot raise one that it does not.

Where we differ. Units go whole and physically; the paper zeroes weights. G is the unit's output energy on general text,
||W_j||^2 E[a^2] summed over its channels, which is Optimal Brain Surgeon with the diagonal of the Hessian; the released
code uses all of it. The magnitudes of the two terms are added block by block, so that they cannot cancel. No weight is
trained, and no step size is known: G and F are divided by their means over the layer, and u by its root mean square.
That also makes the score indifferent to the scale of the loss; in the released code gradients still carry the loss
scale of half precision (65,536 at first), which decides how much each of the terms weighs.
"""

from __future__ import annotations

from typing import Annotated

from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.score.method import BUCKET, Evidence, register
from secateur.score.relative import over_mean_size

GENERALITY = 0.1
"""The paper's lambda."""


@register(
    "d_pruner",
    measures="estimated change of the domain's loss when the unit is switched off, raised where general text needs the "
    "unit as well",
    formula="score_j = E|v_j| + E v_j^2 / 2, v_j = (1 + 2 lambda G_j F_j) u_j / rms(u); u_j = dL_n/dm_j on the "
    "domain's block n, F_j = E u_j^2, G_j = sum over channels of ||w||^2 E[a^2] on general text, F and G over their "
    "means in the layer",
    needs="statistics and weights and gradients",
    cost="a forward and backward pass over calibrate.gradient_tokens tokens of the domain, and calibration on general "
    "text",
    caveat="noisy on few blocks; layers are scored each on a scale of its own, which normalize: none would compare",
    source="Zhang et al. 2024, D-Pruner, arXiv 2405.06275",
    gradient=True,
)
def d_pruner(
    evidence: Evidence,
    /,
    *,
    general: Annotated[str, BUCKET] = "general",
    generality: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = GENERALITY,
) -> Float64[Tensor, " units"]:
    """Return the dual importance of each unit, on a scale of the layer's own.

    Args:
        evidence: gradient sums on the domain; sums and the reading projection for general text.
        general: name of the bucket of general text.
        generality: weight of general importance (lambda); 0 looks at the domain alone.

    Raises:
        ConfigError: there are no statistics of general text.
    """
    gradients = evidence.load_gradients()
    elsewhere = evidence.of_bucket(general)
    fisher = gradients.mask_sq / gradients.count
    energy = elsewhere.moments.sum_sq / elsewhere.moments.count * elsewhere.load_reader().double().square().sum(0)
    importance = energy.reshape(evidence.num_units, evidence.width).sum(1)
    scale = fisher.mean()
    if not float(scale) > 0.0:
        return fisher
    raised = 1 + 2 * generality * fisher / scale * over_mean_size(importance)
    first = gradients.mask_abs / gradients.count / scale.sqrt()
    return raised * first + raised.square() * fisher / scale / 2
