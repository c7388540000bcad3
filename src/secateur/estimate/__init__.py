"""What a run will take, before it runs: seconds, memory and disk per stage, and what to change where that is too much.

It rests on shapes (no weight is read), on the recipe's numbers of tokens, and on rates that a probe measures in about
ten seconds. Formulas are in ``costs``, how often each is paid is in ``stages``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from secateur.estimate.advice import advise
from secateur.estimate.by_layer import ByLayerStages
from secateur.estimate.machine import look
from secateur.estimate.probe import ASSUMED, Clock, Probe, store_rates, stored_rates
from secateur.estimate.size import ModelSize, narrowed, size_of, size_of_config
from secateur.estimate.stages import Setting, Stages, kept_shares
from secateur.estimate.texts import TextAmounts
from secateur.pipeline.job import refuse_impossible
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, load_recipe
from secateur.records.estimate import Estimate, Machine, Rates
from secateur.recover.precision import mixed_precision
from secateur.store.checkpoints import choose_device, choose_dtype, load_tokenizer, resolve_model

__all__ = ["estimate", "estimate_config"]

_BUSY = 0.8


def estimate(
    recipe: Recipe | str | Path,
    *,
    probe: bool = True,
    rates: Rates | None = None,
    clock: Clock = time.perf_counter,
    progress: Progress = silent,
) -> Estimate:
    """Return what a run of a recipe is predicted to take; nothing of it is run, and nothing is kept in its folder.

    Args:
        recipe: the recipe, or where its file is.
        probe: measure this machine for about ten seconds. Otherwise the rates of its last probe are used, or assumed
            ones where there was none.
        rates: to be used instead of a probe's.
        clock: that the probe reads; ``time.process_time`` leaves out what other programs take.
        progress: told about the probe.

    Raises:
        SecateurError: whatever ``run`` would refuse before it reads weights and whole texts.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    refuse_impossible(recipe)
    checkpoint = resolve_model(recipe.model, trust_remote_code=recipe.trust_remote_code)
    size, device = size_of(checkpoint), choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, checkpoint.dtype, device)
    load = cache(lambda: load_tokenizer(checkpoint, trust_remote_code=recipe.trust_remote_code))
    load()
    amounts = TextAmounts(recipe.buckets(), load, clock=clock)
    for name in recipe.buckets():
        amounts.amount(name, "calibration", None)
        amounts.amount(name, "test", None)
    if rates is None:
        rates = _rates(recipe, size, device, dtype, clock, progress) if probe else _known_rates(device, dtype)
    rates = replace(rates, tokenize=amounts.bytes_per_s or rates.tokenize)
    machine = look(Path(recipe.output), device)
    return _estimate(recipe, size, amounts, rates, machine, device.type, dtype, checkpoint.dtype)


def estimate_config(
    recipe: Recipe,
    config: Mapping[str, Any],
    rates: Rates,
    *,
    stored: str = "bfloat16",
    device: str = "cpu",
    machine: Machine | None = None,
) -> Estimate:
    """Return what a run would take with a model of which there is only a configuration: a plan on paper.

    Texts are taken to be as long as the recipe allows; its paths and its ``model`` need not exist.

    Args:
        recipe: what is asked.
        config: of the model, as in its config.json.
        rates: of the machine that it would run on.
        stored: dtype of the weights on disk.
        device: ``cpu`` or ``cuda``, which need not be here.
        machine: what it is held against.

    Raises:
        FamilyError: the model type is not supported, or sizes are missing.
    """
    kept: torch.dtype = getattr(torch, stored)
    dtype = kept if device != "cpu" else torch.float32
    dtype = getattr(torch, recipe.dtype) if recipe.dtype != "auto" else dtype
    amounts = TextAmounts(recipe.buckets(), lambda: None, guess=True)
    size = size_of_config(config, stored=kept.itemsize)
    return _estimate(recipe, size, amounts, rates, machine, device, dtype, kept)


def _estimate(
    recipe: Recipe,
    size: ModelSize,
    amounts: TextAmounts,
    rates: Rates,
    machine: Machine | None,
    device: str,
    dtype: torch.dtype,
    stored: torch.dtype,
) -> Estimate:
    def of(asked: Recipe) -> Estimate:
        compute = _computed_in(asked, recipe, dtype, stored, device)
        stages = ByLayerStages if asked.memory == "by_layer" else Stages
        setting = Setting(size, amounts, rates, compute.itemsize, _narrow(asked, device).itemsize, device != "cpu")
        return Estimate(
            model=asked.model,
            parameters=size.parameters,
            parameters_pruned=narrowed(size, kept_shares(asked, size)[0]).parameters,
            dtype=str(compute).removeprefix("torch."),
            device=device,
            stages=tuple(stages(asked, setting).predict()),
            rates=rates,
            machine=machine,
        )

    found = of(recipe)
    advice, together = advise(recipe, found, of)
    return replace(found, advice=tuple(advice), together=together, notes=tuple(_notes(found)))


def _computed_in(asked: Recipe, recipe: Recipe, dtype: torch.dtype, stored: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype of a recipe that was changed; ``dtype`` is that of the first one."""
    if asked.dtype == recipe.dtype:
        return dtype
    return choose_dtype(asked.dtype, stored, torch.device(device))


def _narrow(recipe: Recipe, device: str) -> torch.dtype:
    """Return the dtype of a training's products; of a GPU that is not here, what nearly all have."""
    if recipe.recover is None:
        return torch.float32
    here = device == "cpu" or torch.cuda.is_available()
    if not here:
        return torch.float32 if recipe.recover.precision == "float32" else torch.bfloat16
    mixed = mixed_precision(recipe.recover.precision, torch.device(device))
    return {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[mixed]


def _rates(
    recipe: Recipe, size: ModelSize, device: torch.device, dtype: torch.dtype, clock: Clock, progress: Progress
) -> Rates:
    with progress("probe this machine", None, "") as task:
        found = Probe(recipe, size, device, dtype, _narrow(recipe, device.type), clock).run(_known_rates(device, dtype))
        store_rates(_key(device, dtype), found)
        task.advance(1)
    return found


def _known_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    return stored_rates(_key(device, dtype)) or ASSUMED


def _key(device: torch.device, dtype: torch.dtype) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu x {torch.get_num_threads()}"
    return f"{name}, {str(dtype).removeprefix('torch.')}"


def _notes(found: Estimate) -> list[str]:
    notes = []
    if found.rates.source == "assumed":
        notes.append(
            "times rest on assumed rates of one processor thread; leave out --no-probe to measure this machine"
        )
    if found.rates.source == "stored":
        notes.append("times rest on the last probe of this machine, which may have been for a model of another size")
    if found.rates.share < _BUSY:
        notes.append(
            f"the probe got {found.rates.share:.0%} of the processor's time: other programs run, and the run itself "
            "gets faster or slower with them"
        )
    if any(stage.seconds is None for stage in found.stages):
        missing = ", ".join(stage.name for stage in found.stages if stage.seconds is None)
        notes.append(f"the time of {missing} cannot be predicted and is not in the total")
    return notes
