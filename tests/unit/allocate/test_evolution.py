"""The search keeps the budget, finds a planted optimum, and goes on where it was stopped."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest

from secateur.allocate.evolution import Counts, Schedule, SearchState, Space, evolve, offspring

SENSITIVE = [5.0, 1.0, 1.0, 0.1]
SPACE = Space(
    allowed={"ffn_channel": [list(range(4, 33, 2))] * 4, "gqa_group": [[1, 2, 3, 4]] * 4},
    costs={"ffn_channel": [10] * 4, "gqa_group": [35] * 4},
    wanted=500.0,
    slack=20.0,
)
START: Counts = {"ffn_channel": [20, 20, 20, 20], "gqa_group": [4, 4, 4, 4]}
SCHEDULE = Schedule(generations=60, offspring=12, survivors=(4,))


def _fitness(candidates: Sequence[Counts], stage: int) -> list[float]:
    """Layers differ in what a removed channel costs; groups cost more than channels."""
    del stage
    return [
        sum(
            weight * (((32 - channels) / 32) ** 2 + 2 * (4 - groups) / 4)
            for weight, channels, groups in zip(
                SENSITIVE, candidate["ffn_channel"], candidate["gqa_group"], strict=True
            )
        )
        for candidate in candidates
    ]


def _search(state: SearchState, *, stop_after: int = 1000) -> SearchState:
    return evolve(
        state,
        SPACE,
        _fitness,
        SCHEDULE,
        seed=1,
        is_over=lambda: state.generation >= stop_after,
        save=lambda current: None,
    )


def test_every_offspring_meets_the_budget_with_allowed_counts() -> None:
    """Whatever kinds an exchange crosses."""
    numbers = random.Random(0)
    candidate = START
    assert SPACE.fits(START) is False  # 480 of 500 parameters
    candidate = {"ffn_channel": [20, 20, 20, 18], "gqa_group": [4, 4, 4, 4]}
    crossed = False
    for _ in range(300):
        candidate = offspring(candidate, SPACE, numbers, 0.25)
        assert SPACE.fits(candidate)
        assert all(n in SPACE.allowed[kind][i] for kind, per in candidate.items() for i, n in enumerate(per))
        crossed = crossed or min(candidate["gqa_group"]) < 4
    assert crossed


def test_the_search_ends_near_the_planted_optimum_and_never_gets_worse() -> None:
    """The layer that costs least loses most, the one that costs most nothing."""
    start: Counts = {"ffn_channel": [20, 20, 20, 18], "gqa_group": [4, 4, 4, 4]}
    state = _search(SearchState(copy.deepcopy(start)))
    assert state.generation == SCHEDULE.generations
    assert state.history == sorted(state.history, reverse=True)
    assert state.loss is not None
    assert state.loss < 0.5 * _fitness([start], 0)[0]
    assert state.best["ffn_channel"][3] == 4
    assert state.best["ffn_channel"][0] >= 28


def test_a_stopped_search_ends_as_one_that_was_not() -> None:
    """State is all there is: randomness depends on the seed and the generation only."""
    start: Counts = {"ffn_channel": [20, 20, 20, 18], "gqa_group": [4, 4, 4, 4]}
    whole = _search(SearchState(copy.deepcopy(start)))
    stopped = _search(SearchState(copy.deepcopy(start)), stop_after=7)
    assert stopped.generation == 7
    assert _search(SearchState(**stopped.to_dict())).to_dict() == whole.to_dict()


def test_what_was_measured_on_all_the_text_is_not_measured_again() -> None:
    """The parent keeps its loss; only a better candidate takes its place."""
    asked: list[Counts] = []

    def fitness(candidates: Sequence[Counts], stage: int) -> list[float]:
        if stage == len(SCHEDULE.survivors):
            asked.extend(candidates)
        return _fitness(candidates, stage)

    start: Counts = {"ffn_channel": [20, 20, 20, 18], "gqa_group": [4, 4, 4, 4]}
    evolve(SearchState(start), SPACE, fitness, SCHEDULE, seed=1, is_over=lambda: False, save=lambda state: None)
    assert asked.count(start) == 1
    assert len(asked) == 1 + sum(SCHEDULE.survivors) * SCHEDULE.generations


@pytest.mark.parametrize(("generation", "share"), [(0, 0.125), (15, 0.0625), (59, 0.015625)])
def test_exchanges_become_finer(generation: int, share: float) -> None:
    """Each of four phases halves the largest exchange."""
    assert SCHEDULE.exchange(generation) == share
