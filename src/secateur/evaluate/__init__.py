"""Measuring models on held-out text, and how large they are."""

from secateur.evaluate.footprint import model_parameters
from secateur.evaluate.perplexity import evaluate_text

__all__ = ["evaluate_text", "model_parameters"]
