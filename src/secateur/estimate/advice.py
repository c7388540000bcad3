"""What to change where a run does not fit: each change is tried on the recipe itself, and said with what it saves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from secateur.errors import ConfigError
from secateur.recipe import Recipe, with_overrides
from secateur.records.estimate import Advice, Estimate

WORTH = 0.01
"""A change that saves less than this share is not said."""

Predict = Callable[[Recipe], Estimate]
Change = tuple[str, Any, str]
"""Dotted key, value, what is given up."""


def changes(recipe: Recipe, dtype: str) -> Iterator[Change]:
    """Yield the changes of a recipe that could make it smaller.

    Args:
        recipe: as it is.
        dtype: that it computes in.
    """
    calibrate, prune, recover = recipe.calibrate, recipe.prune, recipe.recover
    nothing = "nothing but some speed"
    for key, batch in (
        ("calibrate.batch_size", calibrate.batch_size),
        ("evaluate.batch_size", recipe.evaluate.batch_size),
    ):
        if batch > 1:
            yield key, 1, nothing
    if calibrate.block_size > 128:
        yield "calibrate.block_size", max(128, calibrate.block_size // 2), "documents are cut into shorter pieces"
    if dtype == "float32":
        yield "dtype", "bfloat16", "sums and losses rest on activations of 8 bits of precision"
    if calibrate.max_tokens is None or calibrate.max_tokens > 16_384:
        smaller = 16_384 if calibrate.max_tokens is None else calibrate.max_tokens // 2
        yield "calibrate.max_tokens", smaller, "statistics of less text"
    if prune.reconstruct == "pruned":
        yield "prune.reconstruct", "dense", "a weaker reconstruction"
    if prune.reconstruct != "none":
        yield "prune.reconstruct", "none", "no reconstruction"
    kinds = prune.width_kinds()
    if "ffn_channel" in kinds and len(kinds) > 1:
        for kind in kinds:
            left = [unit for unit in (prune.units or prune.layer_kinds()) if unit != kind]
            yield "prune.units", left, f"no {kind}s go"
    if recipe.evaluate.controls:
        yield "evaluate.controls", [], "no row that shows what chance does"
    if recover is None:
        return
    if recover.batch_size > 1:
        yield "recover.batch_size", 1, "set recover.accumulation to keep the step's size"
    if not recover.gradient_checkpointing:
        yield "recover.gradient_checkpointing", True, "a third more time in training"
    if recover.lora is None:
        yield "recover.lora", True, "adapters are trained in the place of all weights"
    if recover.precision in ("auto", "float32"):
        yield "recover.precision", "bfloat16", "products of 8 bits of precision"
    if recover.baselines and not recover.needs_finetuned:
        yield "recover.baselines", [], "no rows trained for comparison"
    if recover.method == "distill" and recover.distill.cached_logits is None and not recover.distill.hidden_weight:
        yield "recover.distill.cached_logits", 64, "the teacher's 64 likeliest tokens only"


def advise(recipe: Recipe, estimate: Estimate, predict: Predict) -> tuple[list[Advice], dict[str, Any]]:
    """Return the changes that make a run smaller, and keys with values that together make it fit.

    Args:
        recipe: as it is.
        estimate: of it.
        predict: returns the estimate of another recipe.
    """
    found: list[Advice] = []
    for key, value, given_up in changes(recipe, estimate.dtype):
        try:
            other = predict(with_overrides(recipe, {key: value}))
        except ConfigError:
            continue
        for of, before, after in (
            ("memory", estimate.peak_bytes, other.peak_bytes),
            ("disk", estimate.disk_bytes, other.disk_bytes),
        ):
            if before - after > WORTH * before:
                longer = other.seconds - estimate.seconds
                found.append(Advice(key, value, of, before - after, after, longer, given_up))
    found.sort(key=lambda advice: (advice.of != "memory", -advice.saves_bytes))
    return found, _together(recipe, estimate, predict)


def _together(recipe: Recipe, estimate: Estimate, predict: Predict) -> dict[str, Any]:
    """Return what makes it fit, taken one by one: always the one after which least is left."""
    taken: dict[str, Any] = {}
    current = estimate
    while current.fits_memory is False or current.fits_disk is False:
        of = "memory" if current.fits_memory is False else "disk"
        best: tuple[int, str, Any, Estimate] | None = None
        for key, value, _ in changes(recipe, estimate.dtype):
            if key in taken:
                continue
            try:
                other = predict(with_overrides(recipe, {**taken, key: value}))
            except ConfigError:
                continue
            left, now = (
                (other.peak_bytes, current.peak_bytes) if of == "memory" else (other.disk_bytes, current.disk_bytes)
            )
            if left < now and (best is None or left < best[0]):
                best = left, key, value, other
        if best is None:
            return {}
        _, key, value, current = best
        taken[key] = value
    return taken
