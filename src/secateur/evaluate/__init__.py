"""Measuring models on held-out text and on questions, and how large they are."""

from secateur.evaluate.choices import evaluate_choices
from secateur.evaluate.footprint import model_parameters
from secateur.evaluate.perplexity import evaluate_text
from secateur.evaluate.vocabulary import evaluate_resegmented

__all__ = ["evaluate_choices", "evaluate_resegmented", "evaluate_text", "model_parameters"]
