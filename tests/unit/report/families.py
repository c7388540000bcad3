"""Made-up families of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.records.evaluation import PairedDifference
from secateur.records.experts import Expert, ExpertFamily
from secateur.records.matrix import CONTROL, GENERAL, DomainMatrix, measured_texts, size_matrix

from .matrices import DOMAINS, full_matrix, scores


def full_family(domains: Sequence[str] = DOMAINS, **changes: Any) -> ExpertFamily:
    """Return a family with something in every place."""
    rows, dense = scores(domains)
    models = {name: row for name, row in rows.items() if name not in (GENERAL, CONTROL)}
    size = size_matrix({"channels": 0.25}, models, dense, domains)
    matrix: DomainMatrix = full_matrix(
        domains, (0.1,), sizes=(size,), texts=measured_texts(dense, domains), notes=(), **changes
    )
    experts = tuple(
        Expert(
            name,
            6_000_000,
            f"runs/experts/trials/{name}",
            f"runs/experts/trials/{name}/recovered",
            as_cut=PairedDifference(0.3, 0.02),
            against_random=PairedDifference(-1.0 if place else 0.1, 0.1),
            exports=(f"runs/experts/trials/{name}/exports/{name}.gguf",),
        )
        for place, name in enumerate(domains)
    )
    return ExpertFamily(matrix, experts)
