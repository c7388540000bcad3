"""Pruning and recovery in turns: a part of the cut, a training, the next part, measured anew on what is left.

Every round is a run of its own in ``rounds/<number>``, on the model of the round before; the dense model teaches all of
them. What is trained on is what one recovery would have trained on, shared out among the rounds.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.errors import ConfigError
from secateur.recipe import UNIT_BUDGETS, Recipe, parse_recipe
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.store.artifacts import atomic_folder


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
    """Raise ConfigError where a recipe asks for rounds and not for a size that can be shared out among them."""
    recover, budget = recipe.recover, recipe.prune.budget
    if recover is None or recover.rounds == 1:
        return
    if budget is None or budget.is_bound or budget.threshold is not None:
        raise ConfigError(
            f"recover.rounds is {recover.rounds}, and prune.budget names no size that could be shared out among the "
            "rounds. Give a share of parameters or of units, or bytes; or set recover.rounds: 1."
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
    """
    assert recipe.recover is not None, "only called where there is a recovery"
    rounds: list[Round] = []
    for number in range(1, recipe.recover.rounds + 1):
        rounds.append(run_round(_round_recipe(recipe, plan, rounds, number, folder)))
    return rounds


def _round_recipe(recipe: Recipe, plan: Plan, before: Sequence[Round], number: int, folder: Path) -> Recipe:
    assert recipe.recover is not None
    data = recipe.model_dump(mode="json", exclude_unset=True)
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
        start, end = plan.total_dense - given_up, plan.total_pruned
        wanted = start * (end / start) ** progress
        now = plan.total_dense if last is None else last.total_pruned
        return {"parameters": 1 - wanted / now}
    shares = {}
    for kind in asked:
        start, end = _units(plan, kind)
        now = start if last is None else _units(last, kind)[1]
        shares[UNIT_BUDGETS[kind]] = 1 - start * (end / start) ** progress / now
    return shares


def _vocabulary_cost(plan: Plan) -> int:
    parts = ("embedding", "head")
    return sum(plan.parameters_dense.get(part, 0) - plan.parameters_pruned.get(part, 0) for part in parts)


def _units(plan: Plan, kind: str) -> tuple[int, int]:
    """Return how many units of a kind there were, and how many stay."""
    if kind == "layer":
        layers = len(next(iter(plan.layers.values())))
        return layers, layers - len(plan.removed_layers)
    if kind in ("attention", "ffn"):
        layers = len(next(iter(plan.layers.values())))
        return layers, layers - len(plan.removed_layers) - len(plan.removed_sublayers(kind))
    layers_ = plan.layers[kind]
    return sum(layer.num_units for layer in layers_), sum(len(layer.keep) for layer in layers_)


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
    return replace(
        last,
        name=name,
        points=tuple(points),
        best_step=steps - last.steps + last.best_step,
        steps=steps,
        tokens=tokens,
        epochs=epochs,
        seconds=seconds,
    )


def take_result(rounds: Sequence[Round], folder: Path) -> None:
    """Copy the last round's model to a folder."""
    with atomic_folder(folder) as work:
        shutil.copytree(rounds[-1].folder, work, dirs_exist_ok=True)


def drop_weights(rounds: Sequence[Round]) -> None:
    """Delete the weights of rounds, once the result is kept."""
    for found in rounds:
        shutil.rmtree(found.folder, ignore_errors=True)
        shutil.rmtree(found.folder.parent / "model", ignore_errors=True)
