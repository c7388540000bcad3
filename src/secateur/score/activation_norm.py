"""Activation norm: the root mean square of what a unit hands on; the simplest score that looks at the text's energy.

Source: the sqrt(H_jj) factor of Wanda (Sun et al. 2023, arXiv 2306.11695) without its weights. The fine-grained metric
of CFSP (Wang et al. 2024, arXiv 2409.13199) as its released code computes it is this score times 3/hidden_size: each of
its three weight ratios is normalised over the axis it is then averaged on, so the weights cancel.

Where we differ. CFSP scores FFN channels only; a group's score here is the root of the mean square over its channels,
so that groups of any width compare. CFSP's layer budgets are not part of a score.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "activation_norm",
    measures="root mean square activation of the unit over the domain's tokens",
    formula="score_j = sqrt((1/n) sum_t a_tj^2), the mean square being over the unit's channels too",
    needs="statistics",
    cost="none: computed from the calibration sums",
    caveat="ignores how strongly the next layer reads the unit; a few large activations count for more than in "
    "contextual",
    source="Wang et al. 2024, CFSP, arXiv 2409.13199, fine-grained metric as released (its weight terms cancel)",
)
def activation_norm(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return the root mean square activation per unit, in units of the activation itself."""
    mean_square = evidence.moments.sum_sq / evidence.moments.count
    return mean_square.reshape(evidence.num_units, evidence.width).mean(1).sqrt()
