"""Pruning and recovery in turns: a part of the cut, a training, the next part, measured anew on what is left.

Every round is a run of its own in ``rounds/<number>``, on the model of the round before; the dense model teaches all of
them. Together they take as many training tokens as one recovery would; each takes its part of the text in an order of
its own, so that some blocks may come in several rounds and others in none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError, PlanError
from secateur.export.huggingface import PLAN_FILE
from secateur.pipeline import processes
from secateur.recipe import UNIT_BUDGETS, Recipe, parse_recipe
from secateur.records.plan import Plan, composed
from secateur.records.recovery import Recovery
from secateur.records.units import AXES_OF
from secateur.store.artifacts import atomic_folder, read_json, write_json


@dataclass(frozen=True, slots=True)
class Round:
    """A finished round.

    Attributes:
        plan: what it cut from the model of the round before.
        folder: of the trained model.
        recovery: its training.
    """

    plan: Plan
    folder: Path
    recovery: Recovery


def require_sizes(recipe: Recipe) -> None:
    """Raise ConfigError where a recipe asks for rounds that cannot be had here or with its budget."""
    recover, budget = recipe.recover, recipe.prune.budget
    if recover is None or recover.rounds == 1:
        return
    if budget is None or budget.is_bound or budget.threshold is not None:
        raise ConfigError(
            f"recover.rounds is {recover.rounds}, and prune.budget names no size that could be shared out among the "
            "rounds. Give a share of parameters or of units, or bytes; or set recover.rounds: 1."
        )
    if processes.are_several():
        raise ConfigError(
            f"recover.rounds is {recover.rounds}, and every round prunes, which one process does alone. Run this "
            "command by itself, or set recover.rounds: 1."
        )
    if not recipe.prune.layer_kinds():
        raise ConfigError(
            f"recover.rounds is {recover.rounds}, and only token ids go, all of them in the first round. Name units of "
            "layers under prune.units too, or set recover.rounds: 1."
        )
    if recover.until != "end":
        raise ConfigError(
            f"recover.until: {recover.until} stops one training, and recover.rounds: {recover.rounds} are several. "
            "Leave one of them out."
        )


def run_rounds(recipe: Recipe, plan: Plan, folder: Path, run_round: Callable[[Recipe], Round]) -> list[Round]:
    """Return the rounds of a recipe, in order; finished ones are found again by the runs themselves.

    Args:
        recipe: of the whole.
        plan: of the whole cut done at once; the rounds together cut as much.
        folder: where the rounds go.
        run_round: runs one.

    Raises:
        PlanError: there is too little to remove for so many rounds.
    """
    assert recipe.recover is not None, "only called where there is a recovery"
    total = recipe.recover.rounds
    _require_units_for_all(recipe, plan, total)
    rounds: list[Round] = []
    for number in range(1, total + 1):
        try:
            rounds.append(run_round(_round_recipe(recipe, plan, rounds, number, folder)))
        except PlanError as error:
            raise PlanError(f"round {number} of {total}: {error} Or lower recover.rounds.") from None
    return rounds


def _require_units_for_all(recipe: Recipe, plan: Plan, rounds: int) -> None:
    """Refuse more rounds than there are units to remove, before the first one is trained."""
    assert recipe.prune.budget is not None, "looked at by require_sizes"
    for kind in recipe.prune.budget.unit_kinds():
        gone = _num_removed(plan, kind)
        if gone < rounds:
            raise PlanError(
                f"recover.rounds is {rounds}, and prune.budget.{UNIT_BUDGETS[kind]} removes only {gone} units of kind "
                f"{kind}, less than one a round. Set recover.rounds to {max(gone, 1)}, or remove more."
            )


def _num_removed(plan: Plan, kind: str) -> int:
    """Return how many units of a kind go; of a uniform plan's widths, how many of every layer."""
    if kind == "layer":
        return len(plan.removed_layers)
    if kind in ("attention", "ffn"):
        return len(plan.removed_sublayers(kind))
    removed = [layer.num_removed for layer in plan.layers[kind] if layer.is_narrowed]
    return max(removed, default=0) if plan.shape == "uniform" else sum(removed)


def _round_recipe(recipe: Recipe, plan: Plan, before: Sequence[Round], number: int, folder: Path) -> Recipe:
    assert recipe.recover is not None
    data = recipe.model_dump(mode="json", exclude_unset=True, exclude={"export"})
    prune, recover, total = dict(data.get("prune", {})), dict(data["recover"]), recipe.recover.rounds
    last = before[-1] if before else None
    if last is not None:
        data["model"] = str(last.folder)
        prune["units"] = recipe.prune.layer_kinds()
        prune.pop("vocabulary", None)
    prune["budget"] = _budget(recipe, plan, last.plan if last else None, number / total)
    recover |= {
        "rounds": 1,
        "epochs": recipe.recover.epochs / total,
        "baselines": [],
        "seed": recipe.recover.seed + number - 1,
    }
    data |= {"prune": prune, "recover": recover, "output": str(folder / str(number))}
    data["evaluate"] = {**data.get("evaluate", {}), "controls": []}
    return parse_recipe(data, source=f"round {number}")


def _budget(recipe: Recipe, plan: Plan, last: Plan | None, progress: float) -> dict[str, float]:
    """Return what a round removes of the model it gets, so that every round removes the same share of what is left.

    Token ids go in the first round, all of them, because a tokenizer is rebuilt once.
    """
    assert recipe.prune.budget is not None
    asked = recipe.prune.budget.unit_kinds()
    if not asked:
        given_up = _vocabulary_cost(plan)
        size, smallest = plan.total_dense - given_up, plan.total_pruned
        wanted = size * (smallest / size) ** progress
        current = plan.total_dense if last is None else last.total_pruned
        return {"parameters": _share(float(current), wanted, "parameters")}
    shares = {}
    for kind in asked:
        start, end = _units(plan, kind)
        now = start if last is None else _units(last, kind)[1]
        shares[UNIT_BUDGETS[kind]] = _share(now, start * (end / start) ** progress, UNIT_BUDGETS[kind])
    return shares


def _share(now: float, wanted: float, key: str) -> float:
    """Return the share that goes, refusing none."""
    if wanted >= now:
        raise PlanError(
            f"nothing is left to remove of {key}, because rounds before it removed more than their part by rounding. "
            "Lower prune.multiple_of, or remove more in all."
        )
    return 1 - wanted / now


def _vocabulary_cost(plan: Plan) -> int:
    parts = ("embedding", "head")
    return sum(plan.parameters_dense.get(part, 0) - plan.parameters_pruned.get(part, 0) for part in parts)


def _units(plan: Plan, kind: str) -> tuple[float, float]:
    """Return how many units of a kind there were, and how many stay.

    Shares are of what whole layers leave, so all but layers are counted per layer that stays: units inside a sub-layer
    where that stays too.
    """
    gone = set(plan.removed_layers)
    if kind == "layer":
        layers = len(next(iter(plan.layers.values())))
        return float(layers), float(layers - len(gone))
    if kind in AXES_OF:
        parts = zip(*(plan.layers[axis] for axis in AXES_OF[kind] if axis in plan.layers), strict=True)
        blocks = [entry for index, entry in enumerate(parts) if index not in gone]
        there = [any(layer.num_units for layer in entry) for entry in blocks]
        left = [any(layer.keep for layer in entry) for entry in blocks]
        return sum(there) / len(blocks), sum(left) / len(blocks)
    entries = [layer for index, layer in enumerate(plan.layers[kind]) if index not in gone and layer.keep]
    return (
        sum(layer.num_units for layer in entries) / len(entries),
        sum(len(layer.keep) for layer in entries) / len(entries),
    )


def joined(rounds: Sequence[Round], name: str) -> Recovery:
    """Return the trainings of all rounds as one, steps and tokens counted through."""
    last = rounds[-1].recovery
    steps, tokens, epochs, points = 0, 0, 0.0, []
    for found in rounds:
        recovery = found.recovery
        for point in recovery.points:
            points.append(
                replace(point, step=steps + point.step, tokens=tokens + point.tokens, epoch=epochs + point.epoch)
            )
        steps, tokens, epochs = steps + recovery.steps, tokens + recovery.tokens, epochs + recovery.epochs
    seconds = sum(found.recovery.seconds for found in rounds)
    training = [found.recovery.tokens / found.recovery.tokens_per_s for found in rounds if found.recovery.tokens_per_s]
    return replace(
        last,
        name=name,
        points=tuple(points),
        best_step=steps - last.steps + last.best_step,
        steps=steps,
        tokens=tokens,
        epochs=epochs,
        seconds=seconds,
        tokens_per_s=tokens / sum(training) if training else 0.0,
    )


def take_result(rounds: Sequence[Round], folder: Path, provenance: Mapping[str, Any]) -> None:
    """Copy the last round's model to a folder, with the cuts of all rounds as one plan of the dense model.

    Args:
        rounds: in order.
        folder: where the model goes; replaced if it exists.
        provenance: saved with the plan.
    """
    plan = reduce(composed, (found.plan for found in rounds))
    with atomic_folder(folder) as work:
        shutil.copytree(rounds[-1].folder, work, dirs_exist_ok=True)
        write_json(work / PLAN_FILE, {**plan.to_dict(), "provenance": dict(provenance)})


def read_result_plan(folder: Path) -> Plan:
    """Return the plan that ``take_result`` left."""
    data = read_json(folder / PLAN_FILE)
    return Plan.from_dict({key: value for key, value in data.items() if key != "provenance"})


def drop_weights(rounds: Sequence[Round]) -> None:
    """Delete the weights of rounds, once the result is kept."""
    for found in rounds:
        shutil.rmtree(found.folder, ignore_errors=True)
        shutil.rmtree(found.folder.parent / "model", ignore_errors=True)
