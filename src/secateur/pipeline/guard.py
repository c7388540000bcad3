"""The worst text decides: the weights of several texts are moved until the one that a cut hurts most is hurt least.

What texts say of the units is mixed by weights. Here a cut is planned under some weights, its model is measured on
validation text of every text, and the next cut is planned with more weight on the texts whose loss rose most. What is
planned rests on the statistics that are there: only the measuring costs anything. Test text plays no part.

With r_d the relative rise of text d, m their mean and s the largest |r_d - m|, the weights of the best mixture so far
are multiplied by exp(rate * (r_d - m) / s) and made to add up to 1. A mixture is better if its largest rise is smaller.
One that is not halves the rate, and the search goes on from the best; so the result is never worse than the start on
the text that it was chosen on.

Source: the worst task decides, and always on the model that is pruned already: Ye et al. 2023, "Performance-aware
Approximation of Global Channel Pruning for Multitask CNNs" (PAGCP), arXiv 2303.11923. There layers are cut one after
another, each until the worst task's loss has risen by an allowance that shrinks from layer to layer; how much goes in
all is what comes out. Here the size is given, all layers are cut at once, and what is moved, in steps that shrink, is
how much each text counts. That exponential update of weights is the one of group-robust training (Sagawa et al. 2020,
arXiv 1911.08731).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from secateur.errors import CheckpointError, ConfigError
from secateur.progress import Progress
from secateur.records.evaluation import PairedDifference
from secateur.records.plan import Plan
from secateur.store.artifacts import digest, read_json, write_json

FIRST_RATE = 1.0
"""The first step multiplies the weight of the worst text by up to e before all are scaled back."""

MOST_HALVINGS = 3
"""The search ends when the rate was halved so often."""

_PARTS = 2**12
"""Weights are whole numbers of such parts, so that they add up to 1 exactly and are read back as they were."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """One mixture that was tried.

    Attributes:
        weights: of the texts, adding up to 1.
        rises: per text, the rise of its loss relative to the dense model's: mean and standard error.
        model: identifies the model that was planned under these weights.
    """

    weights: Mapping[str, float]
    rises: Mapping[str, tuple[float, float]]
    model: str

    @property
    def worst(self) -> float:
        """The largest rise."""
        return max(mean for mean, _ in self.rises.values())

    def told(self) -> str:
        """Return the text with the largest rise, and that rise."""
        name, (mean, error) = max(self.rises.items(), key=lambda item: item[1][0])
        return f"{name} {mean:+.2%} ± {error:.2%}"


@dataclass(frozen=True, slots=True)
class Guarded:
    """The mixture whose worst text is hurt least.

    Attributes:
        weights: of the texts, adding up to 1.
        note: what a plan says of how they were found.
    """

    weights: Mapping[str, float]
    note: str


def in_parts(weights: Mapping[str, float]) -> dict[str, float]:
    """Return positive weights as shares that add up to 1 exactly; none is less than a part in 4,096."""
    total = sum(weights.values())
    parts = {name: max(1, round(_PARTS * weight / total)) for name, weight in weights.items()}
    largest = max(parts, key=lambda name: parts[name])
    parts[largest] += _PARTS - sum(parts.values())
    return {name: part / _PARTS for name, part in parts.items()}


def require_guardable(method: str, needs: str) -> None:
    """Raise ConfigError for a method that reads no text, so that weights of texts change nothing.

    Args:
        method: its name.
        needs: what it reads, as it is registered.
    """
    if needs in ("nothing", "weights"):
        raise ConfigError(
            f"combine: guard weighs texts, and method {method} reads none ({needs}). Use a method that does, or leave "
            "combine out."
        )


def least_worst(
    start: Mapping[str, float],
    *,
    steps: int,
    plan: Callable[[Mapping[str, float]], Plan],
    measure: Callable[[Plan], Mapping[str, PairedDifference]],
    refitted: bool,
    file: Path,
    key: str,
    progress: Progress,
) -> Guarded:
    """Return the mixture, of those tried, whose worst text loses least.

    Args:
        start: weights to start from, as ``in_parts`` gives them.
        steps: mixtures to try beside the start, at most.
        plan: makes the plan under some weights.
        measure: returns the relative rise of the loss per text, on validation text; called right after ``plan`` with
            what that returned.
        refitted: whether the weights that stay depend on the mixture too, so that the same units under two mixtures are
            two models.
        file: where mixtures are kept, so that a run that was stopped goes on.
        key: hash of everything that they depend on.
        progress: told about mixtures.
    """
    tried = _read(file, key)
    with progress("weigh the texts", steps + 1, "mixtures") as task:
        task.advance(len(tried))
        while (weights := next_weights(tried, start, steps)) is not None:
            tried.append(_try(weights, plan, measure, refitted, tried))
            write_json(file, {"key": key, "mixtures": [asdict(mixture) for mixture in tried]})
            task.advance(1)
    return Guarded(_best(tried).weights, _note(tried))


def next_weights(tried: Sequence[Mixture], start: Mapping[str, float], steps: int) -> dict[str, float] | None:
    """Return the weights to try next; None where nothing is left to try.

    Args:
        tried: so far, in order.
        start: weights of the first mixture.
        steps: mixtures to try beside it, at most.
    """
    if not tried:
        return dict(start)
    best, halvings = tried[0], 0
    for mixture in tried[1:]:
        if mixture.worst < best.worst:
            best = mixture
        else:
            halvings += 1
    if len(tried) > steps:
        return None
    for halved in range(halvings, MOST_HALVINGS + 1):
        weights = _moved(best, FIRST_RATE / 2**halved)
        if all(mixture.weights != weights for mixture in tried):
            return weights
    return None


def _moved(mixture: Mixture, rate: float) -> dict[str, float]:
    """Return the weights of a mixture, moved towards the texts that its model is worst on."""
    mean = sum(rise for rise, _ in mixture.rises.values()) / len(mixture.rises)
    apart = {name: rise - mean for name, (rise, _) in mixture.rises.items()}
    scale = max(map(abs, apart.values())) or 1.0
    return in_parts({name: share * math.exp(rate * apart[name] / scale) for name, share in mixture.weights.items()})


def _best(tried: Sequence[Mixture]) -> Mixture:
    return min(tried, key=lambda mixture: mixture.worst)


def _try(
    weights: Mapping[str, float],
    plan: Callable[[Mapping[str, float]], Plan],
    measure: Callable[[Plan], Mapping[str, PairedDifference]],
    refitted: bool,
    tried: Sequence[Mixture],
) -> Mixture:
    """Return what a mixture comes to; it may be a model that was measured already."""
    made = plan(weights)
    kept = {kind: [layer.keep for layer in layers] for kind, layers in made.layers.items()}
    model = digest(kept, made.vocabulary.keep if made.vocabulary else None, weights if refitted else None)
    same = next((mixture for mixture in tried if mixture.model == model), None)
    rises = same.rises if same else {name: (rise.mean, rise.stderr) for name, rise in measure(made).items()}
    return Mixture(dict(weights), rises, model)


def _note(tried: Sequence[Mixture]) -> str:
    best, start = _best(tried), tried[0]
    weights = ", ".join(f"{name} {share:.3g}" for name, share in best.weights.items())
    models = len({mixture.model for mixture in tried})
    said = (
        f"the texts count as {weights}: of {len(tried)} mixtures tried ({models} model{'s' * (models > 1)}), the one "
        f"whose worst text loses least (combine: guard), measured on validation text: {best.told()}"
    )
    if best is start:
        return f"{said}; it is the mixture that the search began with"
    began = ", ".join(f"{name} {share:.3g}" for name, share in start.weights.items())
    return f"{said}; it began with {began}, where that was {start.told()}"


def _read(file: Path, key: str) -> list[Mixture]:
    if not file.is_file() or (data := read_json(file)).get("key") != key:
        return []
    try:
        return [
            Mixture(
                {str(name): float(share) for name, share in mixture["weights"].items()},
                {str(name): (float(rise[0]), float(rise[1])) for name, rise in mixture["rises"].items()},
                str(mixture["model"]),
            )
            for mixture in data["mixtures"]
        ]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not what secateur wrote: {error!r}. Delete it; it will be made again."
        ) from None
