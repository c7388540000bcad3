"""The size is narrowed down to the largest cut that keeps every bound, whatever the losses look like."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from secateur.errors import PlanError
from secateur.pipeline.bounds import RESOLUTION, smallest_within
from secateur.progress import silent
from secateur.records.evaluation import CONFIDENCE_95, PairedDifference
from secateur.records.plan import LayerPlan, Plan

Rise = Callable[[float], float]


def _plan(share: float) -> Plan:
    layers = {"ffn_channel": (LayerPlan(100_000, tuple(range(1, 2 + round(9_000 * share)))),)}
    return Plan("llama", "", "uniform", "obs", {}, {"parameters": share}, layers, {"ffn": 1000}, {"ffn": 900})


def _find(
    folder: Path, rises: Mapping[str, Rise], bounds: Mapping[str, float], *, error: float = 0.0, least: float = 0.0
) -> Plan:
    return smallest_within(
        bounds,
        least=least,
        plan=_plan,
        measure=lambda plan: {
            name: PairedDifference(rise(plan.budget["parameters"]), error) for name, rise in rises.items()
        },
        file=folder / "sizes.json",
        key="key",
        progress=silent,
    )


@pytest.mark.parametrize(
    "rise",
    [lambda share: share**2, lambda share: 2 * share, lambda share: 10 * share**4, lambda share: 0.02 + share**2],
)
@pytest.mark.parametrize("bound", [0.03, 0.3])
def test_the_largest_share_within_the_bound_is_found(tmp_path: Path, rise: Rise, bound: float) -> None:
    """To the promised resolution, or as near as ten trials come."""
    share = float(_find(tmp_path, {"medical": rise}, {"medical": bound}).budget["parameters"])
    assert rise(share) <= bound
    assert rise(share + 4 * RESOLUTION) > bound or share > 0.94


def test_the_standard_error_counts_against_the_cut(tmp_path: Path) -> None:
    """A rise is within its bound only if 1.645 standard errors more are."""
    plan = _find(tmp_path, {"medical": lambda share: share}, {"medical": 0.3}, error=0.1)
    assert plan.budget["parameters"] <= 0.3 - CONFIDENCE_95 * 0.1 + 1e-9
    assert plan.budget["parameters"] == pytest.approx(0.3 - CONFIDENCE_95 * 0.1, abs=4 * RESOLUTION)


def test_the_worst_bucket_decides(tmp_path: Path) -> None:
    """Each has its own bound."""
    rises: dict[str, Rise] = {"law": lambda share: share, "general": lambda share: 5 * share}
    plan = _find(tmp_path, rises, {"law": 0.2, "general": 0.5})
    assert plan.budget["parameters"] == pytest.approx(0.1, abs=4 * RESOLUTION)
    assert any("general +" in note and "law +" in note for note in plan.notes)


def test_what_goes_in_any_case_is_the_least_that_is_tried(tmp_path: Path) -> None:
    """As where the vocabulary has gone already."""
    plan = _find(tmp_path, {"medical": lambda share: share}, {"medical": 0.3}, least=0.2)
    trials = json.loads((tmp_path / "sizes.json").read_text())["trials"]
    assert min(trial["share"] for trial in trials) > 0.2
    assert plan.budget["parameters"] == pytest.approx(0.3, abs=4 * RESOLUTION)


def test_a_bound_that_no_size_keeps_is_refused_with_what_was_measured(tmp_path: Path) -> None:
    """Honestly: the smallest cut that was tried, and its rise."""
    with pytest.raises(PlanError, match=r"cannot be met \(medical 1.00%\): .* rose by medical \+50.00%"):
        _find(tmp_path, {"medical": lambda share: 0.5}, {"medical": 0.01})


def test_trials_are_not_repeated(tmp_path: Path) -> None:
    """A run that was stopped goes on with those on disk."""
    first = _find(tmp_path, {"medical": lambda share: share}, {"medical": 0.3})

    def never(share: float) -> float:
        raise AssertionError("measured again")

    assert _find(tmp_path, {"medical": never}, {"medical": 0.3}) == first


def test_a_model_is_measured_once_however_many_sizes_come_to_it(tmp_path: Path) -> None:
    """Widths that are rounded to steps make one model of many sizes; those cost nothing and are not counted."""
    measured: list[float] = []

    def rises(made: Plan) -> dict[str, PairedDifference]:
        removed = round(made.budget["parameters"] / 0.05) * 0.05
        measured.append(removed)
        return {"medical": PairedDifference(removed, 0.0)}

    def plan(share: float) -> Plan:
        kept = 100 - 5 * round(share / 0.05)
        layers = {"ffn_channel": (LayerPlan(100, tuple(range(kept))),)}
        return Plan("llama", "", "uniform", "obs", {}, {"parameters": share}, layers, {"ffn": 1000}, {"ffn": 900})

    found = smallest_within(
        {"medical": 0.32}, least=0.0, plan=plan, measure=rises, file=tmp_path / "s.json", key="", progress=silent
    )
    assert len(found.layers["ffn_channel"][0].keep) == 70
    assert len(set(measured)) == len(measured)
    assert any(f"{len(measured)} models tried" in note for note in found.notes)


def test_sizes_that_cannot_be_planned_count_as_too_small_a_model(tmp_path: Path) -> None:
    """Floors may forbid what the loss would allow."""

    def plan(share: float) -> Plan:
        if share > 0.25:
            raise PlanError("floors")
        return _plan(share)

    found = smallest_within(
        {"medical": 0.9},
        least=0.0,
        plan=plan,
        measure=lambda made: {"medical": PairedDifference(0.1, 0.0)},
        file=tmp_path / "sizes.json",
        key="key",
        progress=silent,
    )
    assert found.budget["parameters"] == pytest.approx(0.25, abs=4 * RESOLUTION)
