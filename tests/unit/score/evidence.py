"""Evidence with numbers small enough to check by hand."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from secateur.records.gradients import UnitGradients
from secateur.records.statistics import Moments, SequenceSums
from secateur.score import Evidence


def no_weights() -> list[Tensor]:
    """Fail: this method has no business with weights."""
    raise AssertionError("weights were read")


def no_matrix() -> Tensor:
    """Fail: this method has no business with the reading projection, or with Gram matrices."""
    raise AssertionError("a weight or a Gram matrix was read")


def no_gradients() -> UnitGradients:
    """Fail: this method has no business with gradients."""
    raise AssertionError("gradients were read")


def evidence(tokens: Tensor, width: int = 1, **changes: Any) -> Evidence:
    """Return the evidence of activations ``tokens`` (tokens x channels) of one sequence, with some fields changed."""
    tokens = tokens.double()
    fields: dict[str, Any] = {
        "kind": "ffn_channel" if width == 1 else "gqa_group",
        "layer": 0,
        "num_units": tokens.shape[1] // width,
        "width": width,
        "moments": Moments(len(tokens), tokens.sum(0), tokens.abs().sum(0), tokens.pow(2).sum(0)),
        "sequences": SequenceSums(1, tokens.abs().mean(0).square()),
        "linear_abs": [],
        "load_weights": no_weights,
        "load_reader": no_matrix,
        "load_gram": no_matrix,
        "load_gradients": no_gradients,
        "seed": 0,
    }
    return Evidence(**{**fields, **changes})


def second_order(tokens: Tensor, reader: Tensor, width: int = 1) -> Evidence:
    """Return the evidence of activations (tokens x channels) that a projection ``reader`` (out x channels) reads."""
    tokens = tokens.double()
    gram = tokens.T @ tokens / len(tokens)
    return evidence(tokens, width, load_reader=lambda: reader, load_gram=lambda: gram)
