"""GAPrune on units: what the domain needs and general text does not, where both pull the unit's weights the same way.

Source: Tang and Yang 2025, "GAPrune: Gradient-Alignment Pruning for Domain-Aware Embeddings", arXiv 2509.10844, the
domain-alignment importance of a weight w: [(F_dom - beta F_gen) |w| + gamma sqrt|w|] (1 + alpha s), F the empirical
Fisher information on each text and s the cosine of the mean gradients on the two.

Where we differ. Units go whole; |w| is the norm of all of a unit's weights, F that of its mask, and s the cosine of the
mean gradients of all of its weights, from random projections (64 of them: known to about an eighth); of a single weight
a cosine is only a sign. The loss is the language model's own. Every term is divided by its mean over the layer before
they are mixed: with values as they are, F is so much smaller than sqrt|w| that the published score ranks weights almost
by magnitude. In a negative bracket a better alignment lowers the score, as published.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.errors import ConfigError
from secateur.score.method import BUCKET, Evidence, register
from secateur.score.relative import over_mean_size

Coefficient = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


@register(
    "gaprune",
    measures="how much more the domain's loss depends on the unit than general text's, times its size, more where the "
    "two texts' gradients agree",
    formula="score_j = [(F_dom - beta F_gen) |w_j| + gamma sqrt|w_j|] (1 + alpha s_j), F = E[(dL/dm_j)^2] over its "
    "mean in the layer, |w_j| the norm of the unit's weights over its mean, s_j the cosine of the mean gradients of "
    "its weights on the two texts",
    needs="weights and gradients",
    cost="a forward and backward pass over calibrate.gradient_tokens tokens of each of the two texts",
    caveat="a unit that both texts need can score below one that neither does; partly the magnitude of weights, which "
    "is a poor guide",
    source="Tang and Yang 2025, GAPrune, arXiv 2509.10844, Eq. of the domain-alignment importance",
    gradient=True,
    gradient_sketch=True,
    contrast=True,
)
def gaprune(
    evidence: Evidence,
    /,
    *,
    general: Annotated[str, BUCKET] = "general",
    alpha: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2,
    beta: Coefficient = 1.0,
    gamma: Coefficient = 0.5,
) -> Float64[Tensor, " units"]:
    """Return the domain-alignment importance of each unit, on a scale of the layer's own.

    Args:
        evidence: gradients on the domain and on general text, and all weights of the units.
        general: name of the bucket of general text.
        alpha: weight of the alignment of the two gradients.
        beta: weight of general text's need; 0 with ``alpha`` and ``gamma`` 0 ranks by Fisher information times size.
        gamma: weight of the size alone.

    Raises:
        ConfigError: there are no gradients of general text, or projections of gradients were not taken.
    """
    here, elsewhere = evidence.load_gradients(), evidence.of_bucket(general).load_gradients()
    if here.sketch is None or elsewhere.sketch is None:
        raise ConfigError(
            "method gaprune compares the gradients of two texts, and these statistics hold no projections of them. "
            "Take them again."
        )
    squares = [weights.double().square().sum(1) for weights in evidence.load_weights()]
    size = over_mean_size(torch.stack(squares).sum(0).sqrt())
    needed, elsewhere_needed = (over_mean_size(found.mask_sq / found.count) for found in (here, elsewhere))
    aligned = torch.nn.functional.cosine_similarity(here.sketch.double(), elsewhere.sketch.double(), dim=1)
    return ((needed - beta * elsewhere_needed) * size + gamma * size.sqrt()) * (1 + alpha * aligned)
