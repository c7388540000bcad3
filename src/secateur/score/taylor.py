"""Taylor: how much the loss on the domain would change without the unit's weights, by its expansion in each of them.

Source: Ma, Fang, Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models", arXiv 2305.11627,
element-wise importance, summed over every coupled weight of a unit: first order |w g|, second order w F w with F the
mean over sequences of g^2 (diagonal empirical Fisher), mixed |w g - w F w / 2|.

Where we differ. Each of them is taken sequence by sequence, with that sequence's gradient g_n, and averaged. That is
LLM-Pruner's second order exactly. In first and mixed order its code takes the absolute value of the whole text's
gradient, which needs the gradient of every weight in memory; here the absolute value is taken before the mean, which
needs one projection's at a time, and by which gradients of opposite signs do not cancel. With one sequence both are the
same. A sequence is a calibration block with the mean loss over its predicted tokens. Biases of a unit count among its
weights, and no second pass is made for the first-order term.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "taylor",
    measures="estimated change of the domain's loss when the unit's weights become zero, each for itself",
    formula="score_j = (1/N) sum_n sum over coupled weights w of |w g_n| (order: first), (w g_n)^2 (second) or "
    "|w g_n - (w g_n)^2 / 2| (mixed), g_n the gradient of calibration block n's mean loss",
    needs="gradients",
    cost="a forward and backward pass over calibrate.gradient_tokens tokens",
    caveat="adds up weights as if each went alone: large for a unit whose weights' effects cancel",
    source="Ma et al. 2023, LLM-Pruner, arXiv 2305.11627, param_first, param_second and param_mix",
    gradient=True,
)
def taylor(evidence: Evidence, /, *, order: Literal["first", "second", "mixed"] = "first") -> Float64[Tensor, " units"]:
    """Return the estimated loss change per unit, in nats (order second: in nats squared).

    Args:
        evidence: gradient sums.
        order: ``first``: |w g| per weight. ``second``: (w g)^2, that is w F w with the diagonal empirical Fisher F.
            ``mixed``: |w g - (w g)^2 / 2|, close to ``first`` where no single weight matters much.
    """
    gradients = evidence.load_gradients()
    sums = {"first": gradients.weight_abs, "second": gradients.weight_sq, "mixed": gradients.weight_mixed}
    return sums[order] / gradients.count
