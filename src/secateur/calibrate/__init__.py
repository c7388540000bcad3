"""One streaming pass of text through the dense model, leaving sums per channel, token id and layer."""

from secateur.calibrate.collect import collect, collect_grams, collect_with_grams
from secateur.calibrate.gradients import collect_gradients
from secateur.calibrate.impacts import ImpactListener, collect_impacts
from secateur.calibrate.masks import learn_masks

__all__ = [
    "ImpactListener",
    "collect",
    "collect_gradients",
    "collect_grams",
    "collect_impacts",
    "collect_with_grams",
    "learn_masks",
]
