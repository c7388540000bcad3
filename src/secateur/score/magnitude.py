"""Magnitude importance: the size of a unit's own weights; looks at no text.

Source: the classic baseline (Han et al. 2015, arXiv 1506.02626) summed over a unit's coupled slices, as LLM-Pruner's
L2 criterion (2305.11627) does. On small modern models it can be ruinous; it is here to be compared against.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.score.method import Evidence, register


@register(
    "magnitude",
    measures="Euclidean norm of all weights that serve the unit",
    formula="score_j = sqrt(sum over coupled slices of ||w_j||^2)",
    needs="weights",
    cost="reads the checkpoint once",
    caveat="blind to the data: can be far worse than random on gated models",
    source="Han et al. 2015, arXiv 1506.02626; grouped as in LLM-Pruner, arXiv 2305.11627",
)
def magnitude(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return the Euclidean norm of each unit's coupled weights and biases."""
    squares = [slice_.double().pow(2).sum(1) for slice_ in evidence.load_weights()]
    return torch.stack(squares).sum(0).sqrt()
