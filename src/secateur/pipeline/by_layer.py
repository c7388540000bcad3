"""Runs with ``memory: by_layer``: what they refuse, and the disk that they ask for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from secateur.errors import ConfigError, ExportError
from secateur.pipeline.search import MEASURED
from secateur.recipe import LOSS_BOUNDS, PruneSpec, Recipe
from secateur.score import METHODS
from secateur.stream import hidden, spill

CONTROL_PREFIX = "control-"
"""What the names of the folders begin with in which controls lie while they are measured."""
_RUNS_CANDIDATES = "runs many pruned candidates of the whole model"
_STREAMS_OF_A_FIT = 4
"""Hidden states that a fit on the pruned stream keeps of every text: before, inside and after a layer, and pruned."""


def require_by_layer(recipe: Recipe) -> None:
    """Refuse what needs the whole model in memory.

    Raises:
        ConfigError: the recipe asks for such a thing; the first is named.
    """
    for name, reason in _needs_of_the_whole(recipe):
        raise ConfigError(
            f"memory: by_layer holds one decoder layer at a time, and {name} {reason}. Leave it out, or use "
            "memory: whole."
        )


def _needs_of_the_whole(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield what is asked for that needs the whole model, and why."""
    yield from _needs_of_a_method(recipe.prune)
    yield from _needs_of_a_plan(recipe.prune)
    for name, spec in recipe.buckets().items():
        if spec.responses is not None:
            yield f"{name}.responses", "lets the model write answers"
    evaluate = recipe.evaluate
    asked = {
        ("recover", "trains the whole model"): recipe.recover,
        ("evaluate.choices", "runs the whole model"): evaluate.choices,
        ("evaluate.speed", "times the whole model"): evaluate.speed,
        ("evaluate.generations", "lets the model write answers"): evaluate.generations,
        ("evaluate.tasks", "runs the whole model"): evaluate.tasks,
        ("export", "reads the whole pruned model (its Hugging Face folder is written all the same)"): recipe.export,
    }
    yield from (found for found, given in asked.items() if given)


def _needs_of_a_method(prune: PruneSpec) -> Iterator[tuple[str, str]]:
    method, depth = METHODS[prune.method], METHODS[prune.depth_method]
    if prune.width_kinds():
        if method.reads_gradients(prune.options) or method.mask_settings(prune.options) is not None:
            yield f"prune.method: {prune.method}", "takes gradients through the whole model"
        if method.reads_impacts(prune.options):
            yield f"prune.method: {prune.method}", "asks the whole model about single documents"
    if prune.block_kinds() and depth.measure:
        yield f"prune.depth_method: {prune.depth_method}", _RUNS_CANDIDATES


def _needs_of_a_plan(prune: PruneSpec) -> Iterator[tuple[str, str]]:
    if prune.allocation in MEASURED:
        yield f"prune.allocation: {prune.allocation}", _RUNS_CANDIDATES
    if prune.combine == "guard":
        yield "prune.combine: guard", _RUNS_CANDIDATES
    for bound in LOSS_BOUNDS:
        if getattr(prune.budget, bound, None) is not None:
            yield f"prune.budget.{bound}", _RUNS_CANDIDATES


def require_disk(folder: Path, alone: Sequence[int], together: int, bytes_per_token: int) -> None:
    """Refuse a run whose hidden states do not fit on the disk.

    Args:
        folder: of the run; where it is not there yet, the nearest folder above it tells.
        alone: tokens, padding included, of each text that goes through a model by itself.
        together: tokens of all texts that weights are fitted to on the pruned stream.
        bytes_per_token: of one token's hidden state.

    Raises:
        ExportError: too little is free.
    """
    needed = bytes_per_token * max(_STREAMS_OF_A_FIT * together, *alone, 0)
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ExportError(
            f"hidden states between two layers take {needed / 1e9:,.2f} GB in {folder}, and {free / 1e9:,.2f} GB are "
            "free there. Free some, put output on another disk, or lower calibrate.max_tokens and evaluate.max_tokens."
        )


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed left in its folder: hidden states, sums, controls, half a file or model."""
    for prefix in (hidden.PREFIX, spill.PREFIX, CONTROL_PREFIX, ".model-", ".recovered-"):
        for left in folder.glob(f"{prefix}*"):
            shutil.rmtree(left, ignore_errors=True)
    for unfinished in [*folder.glob(".*.part"), *folder.glob("*/.*.part")]:
        unfinished.unlink(missing_ok=True)
