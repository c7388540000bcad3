"""Scoring: statistics and weights in, one importance per unit out; one small file per method, no budgets."""

from secateur.score import (  # noqa: F401 - importing a method's file registers it
    activation_norm,
    block_influence,
    contextual,
    fisher,
    fluctuation,
    kfac,
    leverage,
    magnitude,
    minitron,
    obs,
    output_divergence,
    perplexity_drop,
    random_control,
    reversed_control,
    taylor,
    tyr,
    wanda,
)
from secateur.score.method import METHODS, Evidence, Method
from secateur.score.run import rehearse, score_units

__all__ = ["METHODS", "Evidence", "Method", "rehearse", "score_units"]
