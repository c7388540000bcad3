"""Ridge leverage: how far a unit's activation is from being a combination of the other units'.

Source: Lin et al. 2024, "MoDeGPT: Modular Decomposition for Large Language Model Compression" (ICLR 2025), arXiv
2408.09632, Algorithm 1 (compression of FFN layers by the Nystroem method): keep the channels with the largest
[H (H + lambda I)^-1]_jj, which is 1 - lambda [(H + lambda I)^-1]_jj.

Where we differ. lambda is a share of the mean diagonal of H, so that it means the same in every layer; H is a mean
over tokens. The paper scores FFN channels only and decomposes attention inside the heads; here a group's score is the
mean over its channels.
"""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor

from secateur.score.linear_algebra import RIDGE, Ridge, inverse, ridge_size, with_ridge
from secateur.score.method import Evidence, register


@register(
    "leverage",
    measures="how far the unit's activation is its own, rather than a combination of the other units' activations",
    formula="score_j = 1 - lambda [(H + lambda I)^-1]_jj, lambda = ridge * mean(diag H), H = E[a aT]; mean over the "
    "unit's channels",
    needs="Gram matrices",
    cost="one matrix inversion per layer",
    caveat="ignores how strongly the next layer reads the unit; meant to be followed by least-squares compensation",
    source="Lin et al. 2024, MoDeGPT, arXiv 2408.09632, Algorithm 1",
    gram=True,
)
def leverage(evidence: Evidence, /, *, ridge: Ridge = RIDGE) -> Float64[Tensor, " units"]:
    """Return the ridge leverage per unit, between 0 (silent or redundant) and 1.

    Args:
        evidence: Gram matrices.
        ridge: lambda as a share of the mean diagonal element of H. At 0 every unit scores 1.

    Raises:
        torch.linalg.LinAlgError: H + lambda I cannot be inverted.
    """
    gram = evidence.load_gram()
    channels = 1.0 - ridge_size(gram, ridge) * inverse(with_ridge(gram, ridge)).diagonal()
    return channels.reshape(evidence.num_units, evidence.width).mean(1)
