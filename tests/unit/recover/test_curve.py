"""When a training is evaluated, which step is best, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from secateur.records.recovery import CurvePoint, StopReason
from secateur.recover.curve import best_step, evaluation_steps, stop_reason


def curve(held_out: Sequence[float], training: Sequence[float] | None = None) -> list[CurvePoint]:
    """Return points at steps 0, 10, ...; the training loss falls unless it is given."""
    trained = training if training is not None else [10.0 - i for i in range(1, len(held_out))]
    return [
        CurvePoint(10 * i, float(i), 100 * i, None if i == 0 else trained[i - 1], {"a": loss, "b": 0.0}, {})
        for i, loss in enumerate(held_out)
    ]


def reason(points: list[CurvePoint], **changes: float | None) -> StopReason | None:
    """Return why a long training with a patience of two stops."""
    options = {"num_steps": 1000, "target": None, "patience": 2, **changes}
    return stop_reason(points, ["a"], **options)  # type: ignore[arg-type]


@given(st.integers(1, 5000), st.integers(1, 40))
def test_evaluations_are_spread_evenly_and_include_the_last_step(num_steps: int, evaluations: int) -> None:
    """No two are further apart than the even distance rounded up, and there are no more than asked for."""
    steps = [0, *sorted(evaluation_steps(num_steps, evaluations))]
    assert steps[-1] == num_steps
    assert len(steps) - 1 == min(evaluations, num_steps)
    assert max(after - before for before, after in pairwise(steps)) <= num_steps / evaluations + 1


def test_the_best_step_has_the_least_mean_over_the_domain() -> None:
    """Other buckets do not count, and of equals the earliest is taken; the untrained model may be best."""
    assert best_step(curve([3.0, 1.0, 2.0]), ["a"]) == 10
    assert best_step(curve([3.0, 1.0, 1.0]), ["a", "b"]) == 10
    assert best_step(curve([1.0, 3.0]), ["a"]) == 0
    assert best_step(curve([1.0, 3.0]), ["b"]) == 0


def test_a_training_is_recovered_when_it_reaches_the_target() -> None:
    """Also before its first step; and this comes before any other reason."""
    assert reason(curve([1.0]), target=1.0) == "recovered"
    assert reason(curve([1.0]), target=0.9) is None
    assert reason(curve([2.0, 1.0]), num_steps=10, target=1.5) == "recovered"


def test_overfitting_is_held_out_loss_above_its_best_while_training_loss_falls() -> None:
    """For as many evaluations as there is patience; equal to the best is not above it."""
    assert reason(curve([5.0, 1.0, 1.1, 1.2])) == "overfitting"
    assert reason(curve([5.0, 1.0, 1.1])) is None
    assert reason(curve([5.0, 1.0, 1.1, 1.0])) is None
    assert reason(curve([5.0, 1.0, 1.3, 1.2])) == "overfitting"
    assert reason(curve([5.0, 1.0, 1.1, 1.2]), patience=None) is None
    assert reason(curve([5.0, 1.0, 1.1, 1.2], [4.0, 3.0, 3.5])) is None


def test_a_patience_of_one_compares_with_the_point_before() -> None:
    """Without a training loss before, at the untrained model, nothing is known yet."""
    assert reason(curve([1.0, 2.0]), patience=1) is None
    assert reason(curve([3.0, 1.0, 2.0]), patience=1) == "overfitting"
    assert reason(curve([3.0, 1.0, 2.0], [4.0, 4.5]), patience=1) is None


def test_a_training_ends_with_its_last_step() -> None:
    """Not before."""
    assert reason(curve([3.0, 2.0]), num_steps=10) == "end"
    assert reason(curve([3.0, 2.0]), num_steps=11) is None
