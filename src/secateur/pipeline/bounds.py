"""Budgets in quality instead of size: the smallest model whose held-out loss rises by no more than what was asked.

Sizes are tried one after another, each as a real pruned model on validation text, and the size is narrowed down between
the largest that keeps every bound and the smallest that does not. A bound is kept when the rise of the loss keeps it
with 95 % confidence. Test text plays no part: it confirms the choice once, afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from secateur.errors import CheckpointError, PlanError
from secateur.progress import Progress
from secateur.records.evaluation import CONFIDENCE_95, PairedDifference
from secateur.records.plan import Plan
from secateur.store.artifacts import digest, read_json, write_json

RESOLUTION = 0.005
"""The search ends when the size is known to this share of all parameters."""

_MOST_TRIALS = 10
_FIRST, _LAST = 0.1, 0.95
_EXPONENT = 2.0
"""Losses rise about as the square of what goes; the first guesses use it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One size that was tried.

    Attributes:
        share: of all parameters, removed.
        rises: per bucket, the rise of the loss relative to the dense model's: mean and standard error; empty where no
            plan of this size can be made.
        units: hash of what stays, by which two sizes that come to the same model are known.
    """

    share: float
    rises: Mapping[str, tuple[float, float]]
    units: str = ""

    def worst(self, bounds: Mapping[str, float]) -> float:
        """Return the largest rise that 95 % confidence allows, as a part of its bound; 1 or less keeps all bounds."""
        if not self.rises:
            return float("inf")
        return max((mean + CONFIDENCE_95 * error) / bounds[name] for name, (mean, error) in self.rises.items())


def smallest_within(
    bounds: Mapping[str, float],
    *,
    least: float,
    plan: Callable[[float], Plan],
    measure: Callable[[Plan], Mapping[str, PairedDifference]],
    file: Path,
    key: str,
    progress: Progress,
) -> Plan:
    """Return the plan of the smallest model that keeps all bounds.

    Args:
        bounds: per bucket, the largest relative rise of the loss.
        least: share of the parameters that goes in any case.
        plan: makes the plan that removes a share of all parameters.
        measure: returns the relative rise of the loss per bucket, on validation text.
        file: where trials are kept, so that a run that was stopped goes on.
        key: hash of everything that trials depend on.
        progress: told about trials.

    Raises:
        PlanError: no size keeps the bounds; the smallest that was tried is named, with its rises.
    """
    trials = _read(file, key)
    with progress("narrow down the size", _MOST_TRIALS, "sizes") as task:
        task.advance(_num_models(trials))
        while (share := next_share(trials, bounds, least)) is not None:
            before = _num_models(trials)
            trials.append(_try(share, plan, measure, trials))
            write_json(file, {"key": key, "trials": [asdict(trial) for trial in trials]})
            task.advance(_num_models(trials) - before)
    kept = [trial for trial in trials if trial.worst(bounds) <= 1]
    if not kept:
        raise PlanError(_cannot(trials, bounds))
    best = max(kept, key=lambda trial: trial.share)
    told = ", ".join(f"{name} {mean:+.2%} ± {error:.2%}" for name, (mean, error) in sorted(best.rises.items()))
    found = plan(best.share)
    gone = 1 - found.total_pruned / found.total_dense
    note = (
        f"{gone:.2%} of all parameters go: the most of {_num_models(trials)} models tried that keeps the loss on "
        f"validation text within its bound with 95 % confidence ({told})"
    )
    return replace(found, notes=(*found.notes, note))


def _try(
    share: float,
    plan: Callable[[float], Plan],
    measure: Callable[[Plan], Mapping[str, PairedDifference]],
    trials: Sequence[Trial],
) -> Trial:
    """Return what a size comes to; widths are rounded, so it may be a model that was measured already."""
    try:
        made = plan(share)
    except PlanError:
        return Trial(share, {})
    kept = {kind: [layer.keep for layer in layers] for kind, layers in made.layers.items()}
    units = digest(kept, made.vocabulary.keep if made.vocabulary else None)
    same = next((trial for trial in trials if trial.units == units), None)
    rises = same.rises if same else {name: (rise.mean, rise.stderr) for name, rise in measure(made).items()}
    return Trial(share, rises, units)


def _num_models(trials: Sequence[Trial]) -> int:
    """Return how many models were tried; sizes without a plan count each."""
    return len({trial.units or trial.share for trial in trials})


def next_share(trials: Sequence[Trial], bounds: Mapping[str, float], least: float) -> float | None:
    """Return the share to try next; None where it is known well enough.

    Args:
        trials: so far.
        bounds: per bucket.
        least: share that goes in any case; nothing below it is tried.
    """
    low = max((trial.share for trial in trials if trial.worst(bounds) <= 1), default=least)
    high = min((trial.share for trial in trials if trial.worst(bounds) > 1 and trial.share > low), default=_LAST)
    if _num_models(trials) >= _MOST_TRIALS or high - low <= RESOLUTION:
        return None
    if not trials:
        return min(least + _FIRST, (least + _LAST) / 2)
    guess = _guess([(trial.share - least, trial.worst(bounds)) for trial in trials if trial.rises])
    guess = (low + high) / 2 if guess is None else least + guess
    edge = 0.15 * (high - low)
    return min(max(guess, low + edge), high - edge)


def _guess(measured: Sequence[tuple[float, float]]) -> float | None:
    """Return where a power law through the measured points nearest to 1 reaches 1; None where nothing rose.

    Args:
        measured: (share, rise as a part of its bound).
    """
    below = max((point for point in measured if 0 < point[1] <= 1), default=None)
    above = min((point for point in measured if point[1] > 1), default=None)
    if below and above and below[0] < above[0]:
        power = math.log(above[1] / below[1]) / math.log(above[0] / below[0])
        return float(below[0] * (1 / below[1]) ** (1 / power))
    near = below or above
    return None if near is None else float(near[0] * (1 / near[1]) ** (1 / _EXPONENT))


def _cannot(trials: Sequence[Trial], bounds: Mapping[str, float]) -> str:
    asked = ", ".join(f"{name} {bound:.2%}" for name, bound in bounds.items())
    measured = [trial for trial in trials if trial.rises]
    if not measured:
        return (
            f"no size that keeps the loss within its bound ({asked}) can be planned from these units. Add unit kinds "
            "to prune.units, or use a budget in size to see what is possible."
        )
    smallest = min(measured, key=lambda trial: trial.share)
    told = ", ".join(f"{name} {mean:+.2%} ± {error:.2%}" for name, (mean, error) in sorted(smallest.rises.items()))
    return (
        f"the bound on the loss cannot be met ({asked}): the smallest cut that was tried removes {smallest.share:.2%} "
        f"of the parameters, and the loss on validation text rose by {told}. Raise the bound, use more validation text "
        "if the standard error is what breaks it, a stronger method (reconstruct: dense), or train after pruning."
    )


def _read(file: Path, key: str) -> list[Trial]:
    if not file.is_file() or (data := read_json(file)).get("key") != key:
        return []
    try:
        return [
            Trial(
                trial["share"],
                {name: (rise[0], rise[1]) for name, rise in trial["rises"].items()},
                str(trial.get("units", "")),
            )
            for trial in data["trials"]
        ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not what secateur wrote: {error!r}. Delete it; it will be made again."
        ) from None
