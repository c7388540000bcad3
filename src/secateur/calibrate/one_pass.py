"""Blocks through the dense model once, for whoever listens at its modules; knows no statistic."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from secateur.calibrate.taps import Instead, OnModule, OnPair, OnTensor, tapped
from secateur.errors import CheckpointError, FamilyError
from secateur.families.geometry import Geometry
from secateur.progress import Progress
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.units import FUSED_KINDS
from secateur.stream.forward import run_backbone


class RealTokens:
    """Where the real tokens of the running batch are; padding comes last in a packed block.

    Args:
        valid: False on padding.
        document: which document each token is of; needed by those who ask for documents.
    """

    def __init__(self, valid: Bool[Tensor, "batch seq"], document: Int64[Tensor, "batch seq"] | None = None) -> None:
        self._valid = valid
        self.counts = counts = [int(row.sum()) for row in valid]
        """How many each block has."""
        self._blocks = [slice(n) if bool(row[:n].all()) else row for row, n in zip(valid, counts, strict=True)]
        edges = torch.nn.functional.pad(valid.flatten(), (1, 1)).int().diff()
        self._runs = [
            slice(*ends) for ends in zip(*((edges == e).nonzero()[:, 0].tolist() for e in (1, -1)), strict=True)
        ]
        self._documents = [] if document is None else _document_runs(document.where(valid, -1))

    def real(self, device: torch.device) -> Bool[Tensor, "batch seq"]:
        """Return which tokens are real, on a device."""
        return self._valid.to(device)

    def by_block(self, values: Float[Tensor, "... channels"]) -> Iterator[Float[Tensor, "tokens channels"]]:
        """Yield the real tokens of each block: pieces small enough to stay near the processor."""
        blocks = values.reshape(len(self._blocks), -1, values.shape[-1])
        for block, rows in zip(blocks, self._blocks, strict=True):
            yield block[rows] if isinstance(rows, slice) else block[rows.to(block.device)]

    def by_run(self, values: Float[Tensor, "... channels"]) -> Iterator[Float[Tensor, "tokens channels"]]:
        """Yield each unbroken run of real tokens, across blocks: as many at a time as can be had without a copy."""
        rows = values.reshape(-1, values.shape[-1])
        for run in self._runs:
            yield rows[run]

    def by_document(
        self, values: Float[Tensor, "... channels"]
    ) -> Iterator[tuple[int, Float[Tensor, "tokens channels"]]]:
        """Yield each piece of a document with the document's index; pieces of one that meet come together."""
        rows = values.reshape(-1, values.shape[-1])
        for document, run in self._documents:
            yield document, rows[run]


def _document_runs(document: Int64[Tensor, "batch seq"]) -> list[tuple[int, slice]]:
    """Return each document's unbroken runs of tokens, as places in the flattened batch; -1 marks padding."""
    flat = document.flatten()
    starts = [0, *((flat[1:] != flat[:-1]).nonzero()[:, 0] + 1).tolist(), len(flat)]
    return [(int(flat[start]), slice(start, stop)) for start, stop in pairwise(starts) if int(flat[start]) >= 0]


@dataclass(frozen=True, slots=True)
class Taps:
    """What to call at which modules: the arguments of ``tapped``."""

    inputs: Mapping[str, OnTensor] = field(default_factory=dict)
    outputs: Mapping[str, OnTensor] = field(default_factory=dict)
    through: Mapping[str, OnPair] = field(default_factory=dict)
    instead: Mapping[str, Instead] = field(default_factory=dict)
    modules: Mapping[str, OnModule] = field(default_factory=dict)


@runtime_checkable
class Listener(Protocol):
    """Something that adds up what it hears at the taps."""

    def taps(self) -> Taps:
        """Return what to call at which modules."""

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""

    def end_batch(self, batch: BlockBatch) -> None:
        """Note that a batch has run; raise CheckpointError if what was heard is not finite."""


def run_pass(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    listeners: Sequence[Listener],
    *,
    batch_size: int,
    progress: Progress,
    label: str,
) -> float:
    """Run ``blocks`` through ``model`` (set to evaluation mode) and return how many seconds it took.

    Raises:
        CheckpointError: what a listener heard is not finite.
    """
    model.eval()
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        task = stack.enter_context(progress(label, blocks.num_tokens, "tokens"))
        for listener in listeners:
            taps = listener.taps()
            stack.enter_context(
                tapped(
                    model,
                    inputs=taps.inputs,
                    outputs=taps.outputs,
                    through=taps.through,
                    instead=taps.instead,
                    modules=taps.modules,
                )
            )
        for batch in blocks.batches(batch_size):
            tokens = RealTokens(batch.valid, batch.document)
            for listener in listeners:
                listener.start_batch(tokens)
            run_backbone(model, batch, geometry.family)
            for listener in listeners:
                listener.end_batch(batch)
            task.advance(batch.num_tokens)
    return time.perf_counter() - started


def require_linear(kinds: Collection[str], what: str) -> None:
    """Raise FamilyError for a unit kind that no linear layer reads; ``what`` needs one."""
    for kind in FUSED_KINDS:
        if kind in kinds:
            raise FamilyError(
                f"{what} are taken at the linear layer that reads the units, and {kind}s have none: all experts of a "
                "layer share their tensors. Leave them out, or use a method that reads statistics or weights alone."
            )


def not_finite(place: str) -> CheckpointError:
    """Return the error for activations that are not finite at a place."""
    return CheckpointError(
        f"activations at the {place} are not finite (NaN or infinite). Check the checkpoint, or run with "
        "dtype: float32 if the model overflows in half precision."
    )
