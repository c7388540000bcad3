"""The calibration pass over a model that is run one decoder layer at a time: every batch before the next layer.

Listeners hear what they would hear in ``one_pass``, layer by layer instead of batch by batch, so whatever they keep
from one call to the next must be of one layer. Their sums over a layer's batches run in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol, TypeVar, runtime_checkable

from torch import nn

from secateur.calibrate.one_pass import Listener, RealTokens
from secateur.calibrate.taps import tapped
from secateur.families.geometry import Geometry
from secateur.progress import Progress
from secateur.records.blocks import TokenBlocks
from secateur.stream.layers import LayerStream, LayerView, stream_through
from secateur.stream.streamed import StreamedModel

Call = TypeVar("Call")


@runtime_checkable
class LayerListener(Protocol):
    """A listener that puts away what it has of a layer once all batches are through it."""

    def end_layer(self) -> None:
        """Note that every batch is through the layer; raise CheckpointError if what was heard is not finite."""


def run_pass_by_layer(
    model: StreamedModel,
    blocks: TokenBlocks,
    geometry: Geometry,
    listeners: Sequence[Listener],
    *,
    batch_size: int,
    progress: Progress,
    label: str,
) -> float:
    """Run ``blocks`` through ``model`` layer by layer and return how many seconds it took.

    A batch ends for its listeners when it has left the last layer.

    Raises:
        CheckpointError: what a listener heard is not finite, or a layer's weights cannot be read.
        ExportError: the disk is full.
        FamilyError: the model cannot be run layer by layer.
    """
    started = time.perf_counter()

    def hear(view: LayerView) -> None:
        last = view.index == geometry.num_layers - 1
        with _listening(view.module, geometry.layer_name(view.index), listeners):
            for item in view.batches():
                tokens = RealTokens(item.batch.valid, item.batch.document)
                for listener in listeners:
                    listener.start_batch(tokens)
                view.advance(item)
                for listener in listeners if last else ():
                    listener.end_batch(item.batch)
        for listener in listeners:
            if isinstance(listener, LayerListener):
                listener.end_layer()

    with model.hidden() as hidden:
        stream_through(LayerStream(model.source, blocks, batch_size), hidden, hear, progress=progress, label=label)
    return time.perf_counter() - started


def _listening(module: nn.Module, layer: str, listeners: Sequence[Listener]) -> ExitStack:
    """Attach the taps of one layer, in the listeners' order; they come off when the stack is left."""
    with ExitStack() as stack:
        for listener in listeners:
            taps = listener.taps()
            stack.enter_context(
                tapped(
                    module,
                    inputs=_inside(taps.inputs, layer),
                    outputs=_inside(taps.outputs, layer),
                    through=_inside(taps.through, layer),
                    instead=_inside(taps.instead, layer),
                    modules=_inside(taps.modules, layer),
                )
            )
        return stack.pop_all()


def _inside(calls: Mapping[str, Call], layer: str) -> dict[str, Call]:
    """Return the taps in a layer, by their names inside it; the layer's own name becomes empty."""
    prefix = layer + "."
    return {name[len(prefix) :]: call for name, call in calls.items() if f"{name}.".startswith(prefix)}
