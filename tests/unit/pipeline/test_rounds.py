"""Rounds of pruning and recovery: how the cut is shared out, what is refused, and the rounds' trainings as one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ConfigError, PlanError
from secateur.pipeline.rounds import Round, joined, require_sizes, run_rounds
from secateur.recipe import Recipe, parse_recipe
from secateur.records.plan import LayerPlan, Plan
from secateur.records.recovery import CurvePoint, Recovery

PARTS = {"embedding": 1000, "attention": 0, "ffn": 3000, "head": 0, "other": 0}


def recipe(prune: dict[str, Any], rounds: int = 2) -> Recipe:
    """Return a recipe that recovers in rounds."""
    return parse_recipe({"model": "m", "domain": {"d": "d.txt"}, "prune": prune, "recover": {"rounds": rounds}})


def plan(widths: list[int], kept: list[int], shape: str = "uniform") -> Plan:
    """Return a plan of a model whose layers have one attention group each; a layer that keeps nothing goes."""
    groups = tuple(LayerPlan(1, (0,) if keep else ()) for keep in kept)
    channels = tuple(LayerPlan(width, tuple(range(keep))) for width, keep in zip(widths, kept, strict=True))
    return Plan(
        family="llama",
        model_fingerprint="f",
        shape=shape,
        method="contextual",
        options={},
        budget={},
        layers={"gqa_group": groups, "ffn_channel": channels},
        parameters_dense=PARTS,
        parameters_pruned={**PARTS, "ffn": 1000},
        calibrated_on=("d",),
        calibration_tokens=1,
    )


def recovery(**changes: Any) -> Recovery:
    """Return a training of 10 steps and 100 tokens at 50 tokens a second."""
    points = (CurvePoint(0, 0.0, 0, None, {"d": 3.0}, {}), CurvePoint(10, 0.5, 100, 2.0, {"d": 2.0}, {}))
    plain = Recovery("recovered", "finetune", points, 10, 10, 100, 0.5, "end", None, 4.0, 50.0, "t", 7)
    return replace(plain, **changes)


def budgets(asked: Recipe, whole: Plan, cuts: list[Plan]) -> list[dict[str, float]]:
    """Return what each round is told to remove, where the rounds cut as given."""
    found: list[dict[str, float]] = []

    def run_round(told: Recipe) -> Round:
        assert told.prune.budget is not None
        found.append(told.prune.budget.model_dump(exclude_none=True))
        return Round(cuts[len(found) - 1], Path("."), recovery())

    run_rounds(asked, whole, Path("rounds"), run_round)
    return found


def test_rounds_take_equal_shares_of_what_is_left() -> None:
    """Each round removes half of the channels, so that two rounds leave a quarter; rounding is made up for."""
    asked = recipe({"budget": {"channels": 0.75}})
    found = budgets(asked, plan([64, 64], [16, 16]), [plan([64, 64], [32, 32]), plan([32, 32], [16, 16])])
    assert found == [{"channels": pytest.approx(0.5)}, {"channels": pytest.approx(0.5)}]
    found = budgets(asked, plan([64, 64], [16, 16]), [plan([64, 64], [20, 20]), plan([20, 20], [16, 16])])
    assert found[1] == {"channels": pytest.approx(0.2)}


def test_channels_of_removed_layers_are_not_removed_twice() -> None:
    """Where layers go too, the share of channels is of those that stay: 64 to 36 is a quarter a round."""
    asked = recipe({"budget": {"layers": 0.5, "channels": 0.4}})
    first, second = plan([64] * 4, [48, 48, 48, 0]), plan([48] * 3, [36, 36, 0])
    found = budgets(asked, plan([64] * 4, [36, 36, 0, 0]), [first, second])
    assert [round_["channels"] for round_ in found] == [pytest.approx(0.25), pytest.approx(0.25)]
    assert found[1]["layers"] == pytest.approx(1 / 3)


def test_sublayers_that_went_before_are_not_counted_again() -> None:
    """An FFN that an earlier round took out is neither there any more nor taken out by this one."""
    asked = recipe({"budget": {"ffn": 0.5}, "shape": "uneven", "units": ["ffn"]}, rounds=2)

    def cut(there: list[int], left: list[int]) -> Plan:
        ffn = tuple(LayerPlan(width, tuple(range(keep))) for width, keep in zip(there, left, strict=True))
        groups = tuple(LayerPlan(1, (0,)) for _ in there)
        return replace(plan([8], [8]), shape="uneven", layers={"gqa_group": groups, "ffn_channel": ffn})

    whole = cut([8] * 4, [8, 8, 0, 0])
    found = budgets(asked, whole, [cut([8] * 4, [8, 8, 8, 0]), cut([8, 8, 8, 0], [8, 8, 0, 0])])
    assert found[1] == {"ffn": pytest.approx(1 / 3)}


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ({"budget": {"threshold": 0.5}}, "names no size"),
        ({"units": ["vocabulary"], "budget": {"parameters": 0.1}}, "only token ids go"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(prune: dict[str, Any], words: str) -> None:
    """A budget without a size, and token ids alone, which all go in the first round."""
    with pytest.raises(ConfigError, match=words):
        require_sizes(recipe(prune))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only training is shared out, and rounds prune in between."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="one process does alone"):
        require_sizes(recipe({"budget": {"channels": 0.5}}))


def test_more_rounds_than_units_are_refused_before_the_first() -> None:
    """Two channels of each layer cannot go in three rounds; the message says how many rounds can be had."""
    with pytest.raises(PlanError, match=r"removes only 2 units of kind ffn_channel.*Set recover\.rounds to 2"):
        budgets(recipe({"budget": {"channels": 0.04}}, rounds=3), plan([50, 50], [48, 48]), [])


def test_an_error_says_in_which_round_it_was() -> None:
    """A round that has nothing left, because the one before removed its part too, names itself."""
    asked = recipe({"budget": {"channels": 0.75}})
    with pytest.raises(PlanError, match=r"round 2 of 2: nothing is left to remove of channels.*lower recover\.rounds"):
        budgets(asked, plan([64, 64], [16, 16]), [plan([64, 64], [16, 16])])


def test_joined_rounds_count_on() -> None:
    """Steps, tokens and epochs go on where the round before stopped; the speed is of all tokens over all time."""
    rounds = [Round(plan([4], [3]), Path("."), recovery(tokens_per_s=speed)) for speed in (50.0, 100.0)]
    whole = joined(rounds, "recovered")
    assert [(point.step, point.tokens, point.epoch) for point in whole.points] == [
        (0, 0, 0.0),
        (10, 100, 0.5),
        (10, 100, 0.5),
        (20, 200, 1.0),
    ]
    assert (whole.steps, whole.best_step, whole.tokens, whole.seconds) == (20, 20, 200, 8.0)
    assert whole.tokens_per_s == pytest.approx(200 / 3)
