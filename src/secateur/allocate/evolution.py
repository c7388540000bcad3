"""Evolutionary search for how many units each layer keeps: small exchanges between layers, judged by measuring plans.

Source: the search of Tyr-the-Pruner (arXiv 2503.09657), after EvoPress (arXiv 2410.14649): offspring of the best
candidate so far, each by one to four exchanges that keep the budget; many are measured on little text, the few that do
best on more; the exchanges become finer from phase to phase. Where we differ: the budget counts true parameters and
exchanges may cross kinds of unit; the parent is measured again beside its offspring, on the same text.

Pure: what measures candidates is passed in, randomness comes from the seed, and the state is plain data, so that a
search that was stopped goes on where it was and ends as it would have.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

Counts = dict[str, list[int]]
"""Units that stay: by kind, one number per layer."""
Fitness = Callable[[Sequence[Counts], int], list[float]]
"""(candidates, stage) -> what each loses, lower is better; a later stage uses more text."""

_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Space:
    """What a search may choose.

    Attributes:
        allowed: by kind and layer, the counts that a layer may keep, ascending.
        costs: by kind and layer, parameters of one unit.
        wanted: parameters to remove at least.
        slack: parameters that may go beyond ``wanted``.
    """

    allowed: Mapping[str, Sequence[Sequence[int]]]
    costs: Mapping[str, Sequence[int]]
    wanted: float
    slack: float

    def removed(self, counts: Mapping[str, Sequence[int]]) -> int:
        """Return the parameters that a candidate removes, counted by units."""
        return sum(
            cost * (allowed[-1] - kept)
            for kind, per_layer in counts.items()
            for cost, allowed, kept in zip(self.costs[kind], self.allowed[kind], per_layer, strict=True)
        )

    def fits(self, counts: Mapping[str, Sequence[int]]) -> bool:
        """Return whether a candidate meets the budget."""
        return self.wanted <= self.removed(counts) <= self.wanted + self.slack


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a search proceeds.

    Attributes:
        generations: in all.
        offspring: candidates per generation.
        survivors: per stage but the last, how many go on to the next; one stage more than this has entries.
        phases: in each, the largest exchange is half of that of the one before.
        largest: largest exchange of the first phase, as a share of a layer's units.
    """

    generations: int = 40
    offspring: int = 16
    survivors: tuple[int, ...] = (4,)
    phases: int = 4
    largest: float = 0.125

    def exchange(self, generation: int) -> float:
        """Return the largest exchange in a generation, as a share of a layer's units."""
        return float(self.largest / 2 ** (generation * self.phases // self.generations))


@dataclass(slots=True)
class SearchState:
    """Where a search is.

    Attributes:
        best: the best candidate so far.
        loss: what it lost when it was last measured, at the last stage.
        generation: generations done.
        history: ``loss`` after each generation.
    """

    best: Counts
    loss: float | None = None
    generation: int = 0
    history: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def evolve(
    state: SearchState,
    space: Space,
    fitness: Fitness,
    schedule: Schedule,
    *,
    seed: int,
    is_over: Callable[[], bool],
    save: Callable[[SearchState], None],
) -> SearchState:
    """Return the state after the last generation, or after the one during which the time ran out.

    Args:
        state: where to begin; it is changed.
        space: what may be chosen.
        fitness: measures candidates.
        schedule: how many, how long.
        seed: of the random exchanges.
        is_over: asked before each generation.
        save: called after each generation.
    """
    while state.generation < schedule.generations and not is_over():
        numbers = random.Random(f"{seed}:{state.generation}")
        share = schedule.exchange(state.generation)
        pool: list[Counts] = []
        for _ in range(schedule.offspring):
            child = offspring(state.best, space, numbers, share)
            if child not in (state.best, *pool):
                pool.append(child)
        for stage, survivors in enumerate(schedule.survivors):
            if len(pool) > survivors:
                losses = fitness(pool, stage)
                pool = [pool[index] for index in _order(losses)[:survivors]]
        contenders = pool if state.loss is not None else [state.best, *pool]
        losses = fitness(contenders, len(schedule.survivors)) if contenders else []
        for contender, loss in zip(contenders, losses, strict=True):
            if state.loss is None or loss < state.loss:
                state.best, state.loss = contender, loss
        assert state.loss is not None, "the first generation measures the beginning"
        state.generation += 1
        state.history.append(state.loss)
        save(state)
    return state


def _order(losses: Sequence[float]) -> list[int]:
    return sorted(range(len(losses)), key=lambda index: (losses[index], index))


def offspring(parent: Counts, space: Space, numbers: random.Random, share: float) -> Counts:
    """Return a candidate that differs from its parent by one to four exchanges and meets the budget; or the parent.

    Args:
        parent: meets the budget.
        space: what may be chosen.
        numbers: where chance comes from.
        share: largest change of one layer, as a share of its units.
    """
    child = {kind: list(per_layer) for kind, per_layer in parent.items()}
    for _ in range(numbers.choice((1, 1, 2, 3, 4))):
        child = _exchange(child, space, numbers, share)
    return child


def _exchange(parent: Counts, space: Space, numbers: random.Random, share: float) -> Counts:
    """Let one layer keep fewer units and another one more; the parent where no exchange fits after many attempts."""
    sites = [(kind, layer) for kind, layers in space.allowed.items() for layer, counts in enumerate(layers) if counts]
    for _ in range(_ATTEMPTS):
        (from_kind, from_layer), (to_kind, to_layer) = numbers.choice(sites), numbers.choice(sites)
        if (from_kind, from_layer) == (to_kind, to_layer):
            continue
        child = {kind: list(per_layer) for kind, per_layer in parent.items()}
        lower = _fewer(space.allowed[from_kind][from_layer], parent[from_kind][from_layer], share)
        if not lower:
            continue
        child[from_kind][from_layer] = numbers.choice(lower)
        over = space.removed(child) - space.wanted
        cost, kept = space.costs[to_kind][to_layer], parent[to_kind][to_layer]
        higher = [n for n in space.allowed[to_kind][to_layer] if n > kept and (n - kept) * cost <= over]
        if not higher:
            continue
        child[to_kind][to_layer] = higher[-1]
        if space.fits(child):
            return child
    return parent


def _fewer(allowed: Sequence[int], kept: int, share: float) -> list[int]:
    """Return the counts below ``kept`` by at most a share of the layer's units, the nearest one at least."""
    below = [n for n in allowed if n < kept]
    return [n for n in below if kept - n <= share * allowed[-1]] or below[-1:]
