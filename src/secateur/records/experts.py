"""A family of experts: one model per domain, from one calibration; plain numbers, imports without torch.

How the experts do on each other's text is a domain matrix of one size, without general row and control; what belongs to
a single expert stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from secateur.records.evaluation import PairedDifference
from secateur.records.matrix import (
    GENERAL,
    DomainMatrix,
    MatrixRow,
    SizeMatrix,
    difference_from_plain,
    plain_difference,
)

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Expert:
    """The model of one domain, beyond its row of the matrix.

    Attributes:
        name: of the domain.
        size_bytes: of its weights.
        folder: its run, a whole run folder.
        model: the model folder in it.
        as_cut: before its training, its loss on its own text less the dense model's, in nats per token of the dense
            model; None where it was not trained.
        against_random: its loss on its own text less that of a random cut of the same size (trained alike where it was
            trained and that was measured); None where no control was.
        exports: files and folders of its other forms.
    """

    name: str
    size_bytes: int
    folder: str
    model: str
    as_cut: PairedDifference | None = None
    against_random: PairedDifference | None = None
    exports: tuple[str, ...] = ()

    @property
    def is_trained(self) -> bool:
        """Whether it was trained after the cut."""
        return self.as_cut is not None


@dataclass(frozen=True, slots=True)
class ExpertFamily:
    """Experts of one recipe.

    Attributes:
        matrix: how each does on every text; a row per expert, at one size.
        experts: in the order of the rows.
    """

    matrix: DomainMatrix
    experts: tuple[Expert, ...]

    @property
    def size(self) -> SizeMatrix:
        """The only matrix there is."""
        return self.matrix.sizes[0]

    def row(self, expert: Expert) -> MatrixRow:
        """Return an expert's row of the matrix."""
        found = self.size.row(expert.name)
        assert found is not None, "every expert has a row"
        return found

    def own(self, expert: Expert) -> PairedDifference:
        """Return an expert's loss on its own text less the dense model's, in nats per token."""
        return self.row(expert).to_dense[expert.name]

    def elsewhere(self, expert: Expert) -> PairedDifference | None:
        """Return the mean of the same over the other domains' texts, every domain alike; None where there is none."""
        others = [one for name, one in self.row(expert).to_dense.items() if name not in (expert.name, GENERAL)]
        if not others:
            return None
        mean = math.fsum(one.mean for one in others) / len(others)
        return PairedDifference(mean, math.sqrt(math.fsum(one.stderr**2 for one in others)) / len(others))

    def general(self, expert: Expert) -> PairedDifference | None:
        """Return the same on general text; None where the recipe has none."""
        return self.row(expert).to_dense.get(GENERAL)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; intervals are written out for readers."""
        experts = [asdict(one) for one in self.experts]
        for one in experts:
            for key in ("as_cut", "against_random"):
                one[key] = one[key] and plain_difference(one[key])
        return {"schema_version": SCHEMA_VERSION, "experts": experts, "matrix": self.matrix.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ExpertFamily:
        """Return the family that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        return cls(DomainMatrix.from_dict(data["matrix"]), tuple(_expert(one) for one in data["experts"]))


def _expert(data: Mapping[str, Any]) -> Expert:
    known = {key: data[key] and difference_from_plain(data[key]) for key in ("as_cut", "against_random")}
    return Expert(**{**data, **known, "exports": tuple(data["exports"])})
