"""The calibration pass: blocks through the dense model, sums out; memory does not grow with the corpus."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.accumulators import MomentSums, Scratch, cosine_sum, count_tokens, sum_abs
from secateur.calibrate.taps import OnTensor, tapped
from secateur.errors import CheckpointError
from secateur.families.geometry import Geometry, LinearOutput
from secateur.progress import Progress, silent
from secateur.records.blocks import TokenBlocks
from secateur.records.statistics import BucketStatistics, SiteKey
from secateur.stream.forward import run_backbone


def linear_tap(kind: str, index: int) -> str:
    """Return the tap name of a unit kind's ``index``-th pre-activation output."""
    return f"{kind}.linear{index}"


class _Sums:
    """Everything one pass adds up; its methods are called by the taps while a batch runs."""

    def __init__(self, geometry: Geometry, vocab_size: int) -> None:
        self.geometry = geometry
        self.vocab_size = vocab_size
        self.rows: list[slice | Tensor] = []
        """For each block of the batch that is running: where its real tokens are."""
        self.scratch = Scratch()
        self.moments: defaultdict[SiteKey, MomentSums] = defaultdict(MomentSums)
        self.linear: dict[SiteKey, Tensor] = {}
        self.cosine: list[Tensor] = [torch.zeros((), dtype=torch.float64)] * geometry.num_layers
        self.token_counts = torch.zeros(vocab_size, dtype=torch.int64)
        self.num_tokens = 0
        self.num_blocks = 0

    def start_batch(self, valid: Tensor) -> None:
        """Note which tokens of the next batch are real; padding comes last in a packed block, so a slice will do."""
        counts = [int(row.sum()) for row in valid]
        self.rows = [slice(n) if bool(row[:n].all()) else row for row, n in zip(valid, counts, strict=True)]

    def real_rows(self, values: Tensor) -> Iterator[Tensor]:
        """Yield the real tokens of each block."""
        blocks = values.reshape(len(self.rows), -1, values.shape[-1])
        for block, rows in zip(blocks, self.rows, strict=True):
            yield block[rows] if isinstance(rows, slice) else block[rows.to(block.device)]

    def add_input(self, key: SiteKey, values: Tensor) -> None:
        for rows in self.real_rows(values):
            self.moments[key].update(rows, self.scratch)

    def add_output(self, taps: list[tuple[SiteKey, LinearOutput, int]], values: Tensor) -> None:
        total = torch.stack([sum_abs(rows, self.scratch) for rows in self.real_rows(values)]).sum(0)
        for key, output, units in taps:
            part = total[output.offset : output.offset + units]
            self.linear[key] = self.linear[key] + part if key in self.linear else part

    def add_layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        for first, second in zip(self.real_rows(before), self.real_rows(after), strict=True):
            self.cosine[layer] = self.cosine[layer] + cosine_sum(first, second).cpu()

    def require_finite(self) -> None:
        """Raise CheckpointError naming the first place whose activations are not finite."""
        for layer in range(self.geometry.num_layers):
            for (at, kind), sums in self.moments.items():  # in the order in which they ran
                if at == layer and not sums.is_finite():
                    raise _not_finite(f"input of {self.geometry.axes[kind][layer].reader}")
            if not bool(torch.isfinite(self.cosine[layer])):
                raise _not_finite(f"output of {self.geometry.layer_name(layer)}")


def _not_finite(place: str) -> CheckpointError:
    return CheckpointError(
        f"activations at the {place} are not finite (NaN or infinite). Check the checkpoint, or run with "
        "dtype: float32 if the model overflows in half precision."
    )


def _taps(sums: _Sums) -> dict[str, dict[str, Any]]:
    geometry = sums.geometry
    inputs: dict[str, OnTensor] = {}
    grouped: defaultdict[str, list[tuple[SiteKey, LinearOutput, int]]] = defaultdict(list)
    for kind, layers in geometry.axes.items():
        for axis in layers:
            inputs[axis.reader] = partial(sums.add_input, (axis.layer, kind))
            for index, output in enumerate(axis.linear):
                grouped[output.module].append(((axis.layer, linear_tap(kind, index)), output, axis.num_units))
    outputs = {module: partial(sums.add_output, taps) for module, taps in grouped.items()}
    through = {geometry.layer_name(layer): partial(sums.add_layer, layer) for layer in range(geometry.num_layers)}
    return {"inputs": inputs, "outputs": outputs, "through": through}


def collect(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "calibrate",
) -> BucketStatistics:
    """Return the sums of one pass of ``blocks`` through ``model``.

    The result does not depend on the batch size or on the order of the blocks (up to float rounding), and results of
    disjoint shards add up with ``merge_buckets``.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: packed calibration text.
        geometry: of this model.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.

    Raises:
        CheckpointError: activations are not finite; the layer is named.
    """
    sums = _Sums(geometry, geometry.dimensions["vocab_size"])
    model.eval()
    started = time.perf_counter()
    with torch.inference_mode(), progress(label, blocks.num_tokens, "tokens") as task, tapped(model, **_taps(sums)):
        for batch in blocks.batches(batch_size):
            sums.start_batch(batch.valid)
            run_backbone(model, batch, geometry.family)
            sums.require_finite()
            sums.token_counts += count_tokens(batch.input_ids[batch.valid], sums.vocab_size)
            sums.num_tokens += batch.num_tokens
            sums.num_blocks += batch.input_ids.shape[0]
            task.advance(batch.num_tokens)
    seconds = time.perf_counter() - started
    return BucketStatistics(
        num_tokens=sums.num_tokens,
        num_blocks=sums.num_blocks,
        token_counts=sums.token_counts,
        moments={key: value.result() for key, value in sorted(sums.moments.items())},
        linear_abs={key: value.cpu() for key, value in sorted(sums.linear.items())},
        cosine_sum=torch.stack(sums.cosine),
        documents=torch.unique(blocks.documents),
        corpus_fingerprint=blocks.fingerprint,
        tokens_per_s=sums.num_tokens / seconds,
    )
