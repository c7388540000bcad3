"""Cuts a checkpoint by its plan from disk to disk, for models that do not fit in memory.

Weights are read, cut and written one parameter at a time, so the most that is ever held is about one layer. What comes
out is the folder that the job's own way, with the whole model in memory, writes. It is not compared with a model in
memory, because there is none: it is opened again and run layer by layer, and its logits must be finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.export.huggingface import PLAN_FILE
from secateur.progress import Progress, Task, silent
from secateur.records.blocks import BlockBatch
from secateur.records.plan import Plan
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.shrink.apply import Reconstruct, check_plan
from secateur.shrink.slicing import scale_experts
from secateur.store.artifacts import atomic_folder, disk_errors, write_json
from secateur.store.checkpoints import (
    Checkpoint,
    choose_device,
    choose_dtype,
    copy_side_files,
    load_tokenizer,
    resolve_model,
)
from secateur.store.shards import MAX_SHARD_BYTES, fill_checkpoint
from secateur.store.tokenizers import PROBES, compare_reloaded_tokenizer, encode, save_tokenizer, smaller_tokenizer
from secateur.store.weights import iter_parameters, stored_generation
from secateur.stream.forward import run_logits
from secateur.stream.layers import run_layer
from secateur.stream.sources import LazyLayers
from secateur.stream.stand_ins import layers_giving, plain_tensors, record_layer_inputs

_SAMPLE_TOKENS = 64


def shrink_checkpoint(
    checkpoint: Checkpoint,
    plan: Plan,
    folder: Path,
    reconstruct: Reconstruct | None = None,
    *,
    refitted: Mapping[str, Tensor] | None = None,
    scales: Mapping[int, Sequence[float]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    device: str = "auto",
    dtype: str = "auto",
    stored: torch.dtype | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = silent,
) -> None:
    """Write the pruned model's folder: weights, configuration, tokenizer, plan and licence texts.

    The folder appears under its name only after it was opened again and ran.

    Args:
        checkpoint: the dense model on disk.
        plan: made for it.
        folder: where to; replaced if it exists.
        reconstruct: gives the weight of a projection that reads removed channels, out of the dense one; None keeps the
            columns of the kept channels as they are.
        refitted: weights of projections that lose nothing but change all the same, by module, as out x channels.
        scales: by layer, what the output of each of its experts is multiplied by.
        provenance: fingerprints and versions, saved with the plan.
        device: where to cut and run, as for ``load_model``.
        dtype: what to cut in, as for ``load_model``.
        stored: what is written; None is the checkpoint's own.
        trust_remote_code: lets the checkpoint's own Python code run.
        max_shard_bytes: weights beyond it go into several files.
        progress: told about the parameters that are cut, and about layers that are run.

    Raises:
        PlanError: the plan is for another model, or the configuration refuses its sizes.
        FamilyError: the family cannot be cut so.
        CheckpointError: weights are missing, broken or not finite.
        TokenizerError: the plan takes token ids that the tokenizer cannot do without.
        ExportError: the disk is full, or what was written does not run.
    """
    geometry = checkpoint.geometry
    check_plan(plan, geometry)
    place = choose_device(device)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    if plan.vocabulary is not None:
        tokenizer = smaller_tokenizer(tokenizer, plan.vocabulary.keep)
    config = shrink_config(checkpoint.config, plan, geometry)
    generation = shrink_generation_config(stored_generation(checkpoint), plan)
    computed = choose_dtype(dtype, checkpoint.dtype, place)
    dense = iter_parameters(checkpoint, dtype=computed, device=place, trust_remote_code=trust_remote_code)
    with disk_errors(folder), atomic_folder(folder) as work:
        with progress("shrink", None, "parameters") as task:
            scaled = scale_experts(dense, geometry, scales or {})
            pruned = shrink_parameters(scaled, plan, geometry, reconstruct, refitted)
            counted = _counted(pruned, task)
            fill_checkpoint(
                work, config, counted, max_shard_bytes, dtype=stored or checkpoint.dtype, generation=generation
            )
        save_tokenizer(tokenizer, work)
        copy_side_files(checkpoint.folder, work)
        write_json(work / PLAN_FILE, {**plan.to_dict(), "provenance": dict(provenance or {})})
        compare_reloaded_tokenizer(tokenizer, work, ())
        _require_runs(work, tokenizer, device, progress)


def _counted(parameters: Iterator[tuple[str, Tensor]], task: Task) -> Iterator[tuple[str, Tensor]]:
    for pair in parameters:
        yield pair
        task.advance(1)


def _require_runs(folder: Path, tokenizer: Any, device: str, progress: Progress) -> None:
    """Open a saved model again and run it on a little text, one layer at a time.

    Raises:
        ExportError: its logits are not finite.
    """
    source = LazyLayers(resolve_model(str(folder)), device=device)
    family, batch = source.geometry.family, _sample(tokenizer)
    inputs = record_layer_inputs(source.model, batch, family)
    hidden = inputs.hidden
    with progress("reopen and run", len(inputs.calls), "layers") as task:
        for layer, call in enumerate(inputs.calls):
            with source.layer(layer) as module, plain_tensors():
                hidden = run_layer(module, hidden, call)
            task.advance(1)
    with plain_tensors(), layers_giving(source.model, family, hidden):
        logits = run_logits(source.model, batch, family)
    if not bool(torch.isfinite(logits).all()):
        raise ExportError("the pruned model's logits are not finite (NaN or infinite). Check the checkpoint's weights.")


def _sample(tokenizer: Any) -> BlockBatch:
    """Return a little text of every kind as one block."""
    ids = torch.tensor([encode(tokenizer, "\n".join(PROBES), add_special_tokens=True)[:_SAMPLE_TOKENS]])
    positions = torch.arange(ids.shape[1])[None]
    real = torch.ones_like(ids, dtype=torch.bool)
    return BlockBatch(ids, positions, real, torch.zeros_like(ids), real, ())
