"""Scoring: statistics and weights in, one importance per unit out; one small file per method, no budgets."""

from secateur.score import (
    activation_norm,
    contextual,
    fluctuation,
    leverage,
    magnitude,
    obs,
    random_control,
    reversed_control,
    tyr,
    wanda,
)
from secateur.score.method import METHODS, Evidence, Method
from secateur.score.run import rehearse, score_units

__all__ = ["METHODS", "Evidence", "Method", "rehearse", "score_units"]

_ = (
    activation_norm,
    contextual,
    fluctuation,
    leverage,
    magnitude,
    obs,
    random_control,
    reversed_control,
    tyr,
    wanda,
)
