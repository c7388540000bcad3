"""The Gram matrices' part of a run: taken where a method or the reconstruction needs them, and the reconstruction.

They are large, so they lie in files of their own, and are read one site at a time. Those of validation text judge which
ridge holds on text that was not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.families.geometry import UnitAxis
from secateur.records.gram import Grams, MixedGrams
from secateur.shrink.reconstruct import choose_reconstruction, reconstruct


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """How one projection was reconstructed.

    Attributes:
        module: name of the projection.
        ridge: relative ridge; None where the dense columns stayed because nothing was better on held-out text.
        error_before: held-out relative squared output error without reconstruction; ``error_after`` with it.
    """

    module: str
    ridge: float | None
    error_before: float
    error_after: float


@dataclass
class Reconstructor:
    """Gives the weight of a projection that lost input channels, fitted on one text and judged on another.

    The ridge that judges best is then used once more on both texts together, because more text fits better; the errors
    in ``reports`` are those of the first fit, on text that it did not see.

    Attributes:
        fitted: Gram matrices of the calibration text.
        held_out: Gram matrices of the validation text.
        reports: one entry per projection, in the order in which they were asked for.
    """

    fitted: Grams
    held_out: Grams
    reports: list[ModuleReport] = field(default_factory=list)

    def __call__(self, axis: UnitAxis, keep: Sequence[int], weight: Tensor) -> Tensor:
        """Return the weight of the kept channels, out x kept.

        Raises:
            PlanError: too little text for so many channels.
        """
        site = axis.layer, axis.kind
        fitted, held_out = (grams.load(site).to(weight.device) / grams.count for grams in (self.fitted, self.held_out))
        kept = torch.tensor(list(keep))
        chosen = choose_reconstruction(weight, fitted, held_out, kept)
        self.reports.append(ModuleReport(axis.reader, chosen.ridge, chosen.error_before, chosen.error_after))
        if chosen.ridge is None:
            return chosen.kept_weight
        both = together([self.fitted, self.held_out])
        return reconstruct(weight, both.load(site).to(weight.device), kept, ridge=chosen.ridge)


def together(grams: Iterable[Grams]) -> Grams:
    """Return the Gram matrices of several texts as those of one: every token counts the same."""
    parts = list(grams)
    if len(parts) == 1:
        return parts[0]
    total = sum(part.count for part in parts)
    return MixedGrams(parts, [part.count / total for part in parts])


def summary(reports: Sequence[ModuleReport]) -> Mapping[str, float]:
    """Return means over projections of the held-out error before and after, and how many stayed as they were."""
    mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
    return {
        "error_before": mean([report.error_before for report in reports]),
        "error_after": mean([report.error_after for report in reports]),
        "unchanged": sum(report.ridge is None for report in reports),
        "projections": len(reports),
    }
