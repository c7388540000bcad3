"""How unequal shares of layers are set from a rule rather than measured: shares removed per layer, their mean as asked.

Dims: ``layers``; plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from secateur.errors import PlanError

LOG_START = 0.5
"""Share that the first layer loses under ``log_increase``, as a part of the mean; SlimGPT leaves it to the user."""

INFLUENCE_TEMPERATURE = 0.1
"""Temperature of the softmax under ``block_influence``; MoDeGPT searched between 0.05 and 1 and mostly used 0.1."""


def log_increase(ratio: float, num_layers: int, *, cap: float) -> list[float]:
    """Return shares that grow with the logarithm of the layer's number, because early layers are the delicate ones.

    Source: SlimGPT (Ling et al. 2024, arXiv 2412.18110).

    Args:
        ratio: mean share.
        num_layers: layers.
        cap: largest share of any layer.

    Raises:
        PlanError: the mean is above the cap.
    """
    if num_layers == 1:
        return scaled([1.0], ratio, cap=cap)
    growth = [math.log(layer + 1) / math.log(num_layers) for layer in range(num_layers)]
    mean = sum(growth) / num_layers
    return scaled([LOG_START + (1 - LOG_START) * value / mean for value in growth], ratio, cap=cap)


def by_influence(ratio: float, influence: Sequence[float], *, cap: float) -> list[float]:
    """Return shares in proportion to softmax(-influence / temperature): layers that change little lose much.

    Source: MoDeGPT (Lin et al. 2024, arXiv 2408.09632), with the block influence of ShortGPT (Men et al. 2024, arXiv
    2403.03853).

    Args:
        ratio: mean share.
        influence: per layer, 1 - mean cosine of its input and output.
        cap: largest share of any layer.

    Raises:
        PlanError: the mean is above the cap.
    """
    least = min(influence)
    return scaled([math.exp((least - value) / INFLUENCE_TEMPERATURE) for value in influence], ratio, cap=cap)


def scaled(weights: Sequence[float], ratio: float, *, cap: float) -> list[float]:
    """Return shares in proportion to positive weights with mean ``ratio``; those above the cap are cut to it.

    Raises:
        PlanError: the mean is above the cap.
    """
    if ratio > cap:
        raise PlanError(
            f"a share of {ratio:.4g} is to go, but prune.min_keep_ratio lets {cap:.4g} of a layer go at most. Lower "
            "the budget or prune.min_keep_ratio."
        )
    shares, free = [0.0] * len(weights), set(range(len(weights)))
    left = ratio * len(weights)
    while free:
        factor = left / sum(weights[index] for index in free)
        full = {index for index in free if factor * weights[index] >= cap}
        for index in full or free:
            shares[index] = cap if full else factor * weights[index]
        left -= cap * len(full)
        free -= full or free
    return shares
