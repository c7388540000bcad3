"""One streaming pass of text through the dense model, leaving sums per channel, token id and layer."""

from secateur.calibrate.collect import collect

__all__ = ["collect"]
