"""The calibration pass: blocks through the dense model, sums out; memory does not grow with the corpus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.calibrate.accumulators import MomentSums, Scratch, count_tokens, sum_abs
from secateur.calibrate.by_layer import run_pass_by_layer
from secateur.calibrate.grams import GramListener
from secateur.calibrate.one_pass import Listener, RealTokens, Taps, not_finite, run_pass
from secateur.calibrate.residual import ResidualSums
from secateur.calibrate.routing import RoutingListener
from secateur.calibrate.taps import OnTensor
from secateur.families.geometry import Geometry, LinearOutput
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.gram import GramsInMemory
from secateur.records.statistics import BucketStatistics, SiteKey
from secateur.records.units import FUSED_KINDS, SITE_KINDS
from secateur.stream.streamed import StreamedModel


def linear_tap(kind: str, index: int) -> str:
    """Return the tap name of a unit kind's ``index``-th pre-activation output."""
    return f"{kind}.linear{index}"


class _Sums:
    """All statistics one pass adds up; its methods are called by the taps while a batch runs."""

    def __init__(self, model: Any, geometry: Geometry) -> None:
        self.geometry = geometry
        self.vocab_size = geometry.dimensions["vocab_size"]
        self.tokens: RealTokens
        self.scratch = Scratch()
        self.moments: defaultdict[SiteKey, MomentSums] = defaultdict(MomentSums)
        self.linear: dict[SiteKey, Tensor] = {}
        self.residual = ResidualSums(geometry, self.scratch)
        self.routing = RoutingListener(model, geometry, self.residual)
        self.token_counts = torch.zeros(self.vocab_size, dtype=torch.int64)
        self.num_tokens = 0
        self.num_blocks = 0

    @property
    def others(self) -> list[Listener]:
        """Those that listen on its behalf."""
        return [self.residual, self.routing]

    def taps(self) -> Taps:
        """Return what to call at which modules."""
        geometry = self.geometry
        inputs: dict[str, OnTensor] = {}
        grouped: defaultdict[str, list[tuple[SiteKey, LinearOutput, int]]] = defaultdict(list)
        for kind in (kind for kind in SITE_KINDS if kind in geometry.axes and kind not in FUSED_KINDS):
            for axis in (axis for axis in geometry.axes[kind] if axis.num_units):
                inputs[axis.reader] = partial(self.add_input, (axis.layer, kind))
                for index, output in enumerate(axis.linear):
                    grouped[output.module].append(((axis.layer, linear_tap(kind, index)), output, axis.num_units))
        outputs = {module: partial(self.add_output, taps) for module, taps in grouped.items()}
        return Taps(inputs, outputs)

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""
        self.tokens = tokens

    def add_input(self, key: SiteKey, values: Tensor) -> None:
        for rows in self.tokens.by_block(values):
            self.moments[key].update(rows, self.scratch)

    def add_output(self, taps: list[tuple[SiteKey, LinearOutput, int]], values: Tensor) -> None:
        total = torch.stack([sum_abs(rows, self.scratch) for rows in self.tokens.by_block(values)]).sum(0)
        for key, output, units in taps:
            part = total[output.offset : output.offset + units]
            self.linear[key] = self.linear[key] + part if key in self.linear else part

    def end_batch(self, batch: BlockBatch) -> None:
        """Count the batch, or raise CheckpointError if its activations were not finite."""
        self.require_finite()
        self.token_counts += count_tokens(batch.input_ids[batch.valid], self.vocab_size)
        self.num_tokens += batch.num_tokens
        self.num_blocks += batch.input_ids.shape[0]

    def require_finite(self) -> None:
        """Raise CheckpointError naming the first place whose activations are not finite."""
        for layer in range(self.geometry.num_layers):
            for (at, kind), sums in self.moments.items():  # in the order in which they ran
                if at == layer and not sums.is_finite():
                    raise not_finite(f"input of {self.geometry.axes[kind][layer].reader}")
            if not self.routing.is_finite(layer):
                raise not_finite(f"output of {self.routing.module(layer)}")
            if not self.residual.is_finite(layer):
                raise not_finite(f"output of {self.geometry.layer_name(layer)}")

    def result(self, blocks: TokenBlocks, seconds: float) -> BucketStatistics:
        """Return the sums of the pass over ``blocks``, on the CPU."""
        moments = {key: value.result() for key, value in self.moments.items()} | self.routing.moments()
        sequences = {key: value.sequences() for key, value in self.moments.items()} | self.routing.sequences()
        return BucketStatistics(
            num_tokens=self.num_tokens,
            num_blocks=self.num_blocks,
            token_counts=self.token_counts,
            moments=dict(sorted(moments.items())),
            sequences=dict(sorted(sequences.items())),
            linear_abs={key: value.cpu() for key, value in sorted(self.linear.items())},
            cosine_sum=self.residual.of_layers(),
            sublayer_cosine_sum=self.residual.of_sublayers(),
            documents=torch.unique(blocks.documents),
            corpus_fingerprint=blocks.fingerprint,
            tokens_per_s=self.num_tokens / seconds,
            routing=self.routing.routing(),
        )


def collect(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "calibrate",
    also: Sequence[Listener] = (),
) -> BucketStatistics:
    """Return the sums of one pass of ``blocks`` through ``model``.

    The result does not depend on the batch size or on the order of the blocks (up to float rounding), and results of
    disjoint shards add up with ``merge_buckets``.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode. Or one that is run
            layer by layer, for the same result.
        blocks: packed calibration text.
        geometry: of this model.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        also: who else listens to the pass.

    Raises:
        CheckpointError: activations are not finite; the layer is named.
    """
    sums = _Sums(_modules(model), geometry)
    listeners: list[Listener] = [sums, *sums.others, *also]
    seconds = _run(model, blocks, geometry, listeners, batch_size=batch_size, progress=progress, label=label)
    return sums.result(blocks, seconds)


def collect_with_grams(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    kinds: Collection[str],
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "calibrate",
    also: Sequence[Listener] = (),
) -> tuple[BucketStatistics, GramsInMemory]:
    """Return what ``collect`` returns, and the Gram matrices of the same pass.

    Args:
        model: as for ``collect``.
        blocks: packed calibration text.
        geometry: of this model.
        kinds: unit kinds whose reading projections' inputs are summed. All their matrices are held at once, in float32
            on the devices of the activations: channels x channels x 2.25 bytes each while they are summed, and
            channels x channels x 4 bytes in main memory afterwards. Run layer by layer, only a layer's are held, and
            the rest lie in the model's folder until the result is let go.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        also: who else listens to the pass.

    Raises:
        CheckpointError: activations are not finite; the layer is named.
        FamilyError: the family has no such unit kind.
    """
    sums, grams = _Sums(_modules(model), geometry), _gram_listener(model, geometry, kinds)
    listeners: list[Listener] = [sums, *sums.others, grams, *also]
    seconds = _run(model, blocks, geometry, listeners, batch_size=batch_size, progress=progress, label=label)
    return sums.result(blocks, seconds), grams.take()


def collect_grams(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    kinds: Collection[str],
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "calibrate",
) -> GramsInMemory:
    """Return only the Gram matrices of one pass: what ``collect_with_grams`` returns second, for less time.

    Raises:
        CheckpointError: activations are not finite; the layer is named.
        FamilyError: the family has no such unit kind.
    """
    grams = _gram_listener(model, geometry, kinds)
    _run(model, blocks, geometry, [grams], batch_size=batch_size, progress=progress, label=label)
    return grams.take()


def _run(model: Any, *args: Any, **options: Any) -> float:
    run = run_pass_by_layer if isinstance(model, StreamedModel) else run_pass
    return run(model, *args, **options)


def _modules(model: Any) -> Any:
    """Return the model whose modules can be looked up; those of a streamed model's layers have no weights."""
    return model.source.model if isinstance(model, StreamedModel) else model


def _gram_listener(model: Any, geometry: Geometry, kinds: Collection[str]) -> GramListener:
    return GramListener(geometry, kinds, model.tensors() if isinstance(model, StreamedModel) else None)
