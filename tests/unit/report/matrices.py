"""Made-up domain matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from secateur.records.evaluation import ModelScore
from secateur.records.matrix import CONTROL, GENERAL, DomainMatrix, RowKind, measured_texts, size_matrix

from .compared import model, varied

DOMAINS = ("medical", "legal", "code")


def scores(
    domains: Sequence[str] = DOMAINS, strength: float = 1.0, count: int = 40
) -> tuple[dict[str, tuple[RowKind, ModelScore, str]], ModelScore]:
    """Return the rows of a matrix whose own models are best, and the dense model."""
    texts = [*domains, GENERAL]

    def row(name: str, other: float, own: float) -> ModelScore:
        losses = {
            text: varied(2.0 + strength * (own if text == name else other), 5 + place, count)
            for place, text in enumerate(texts)
        }
        return model("pruned", losses)

    rows: dict[str, tuple[RowKind, ModelScore, str]] = {
        name: ("domain", row(name, 0.2 + 0.02 * place, 0.1), f"trials/{name}") for place, name in enumerate(domains)
    }
    rows[GENERAL] = ("general", row(GENERAL, 0.15, 0.08), "trials/general")
    rows[CONTROL] = ("control", row("", 1.5, 1.5), "trials/medical")
    dense = model("dense", {text: varied(2.0, 5 + place, count) for place, text in enumerate(texts)}, 2_000_000)
    return rows, dense


def full_matrix(
    domains: Sequence[str] = DOMAINS, shares: Sequence[float] = (0.1, 0.3), count: int = 40, **changes: Any
) -> DomainMatrix:
    """Return matrices at several sizes, with something in every place."""
    sizes = []
    for share in shares:
        rows, dense = scores(domains, 10 * share, count)
        sizes.append(size_matrix({"channels": share}, rows, dense, domains))
    plain: dict[str, Any] = {
        "model": "org/pico",
        "model_fingerprint": "abc",
        "method": "contextual",
        "domains": tuple(domains),
        "texts": measured_texts(dense, domains),
        "parameters_dense": dense.total_parameters,
        "sizes": tuple(sizes),
        "seed": 7,
        "notes": ("recover of the recipe is left out of a matrix.",),
        "recipe_yaml": "model: pico\n",
        "versions": {"secateur": "0.1.0"},
    }
    return replace(DomainMatrix(**plain), **changes)
