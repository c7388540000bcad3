"""Decoder layers one at a time over stored hidden states: every batch goes through a layer before the next layer.

What a layer is called with besides hidden states is made anew for each batch and layer, because masks can be larger
than the states; that costs embeddings and masks only.

A dense and a pruned stream side by side, so that a layer is pruned on what pruned layers give it:

    with HiddenStates() as dense, HiddenStates() as pruned:
        stream.start(dense)
        stream.start(pruned)
        for layer in range(stream.num_layers):
            names = reader_names(stream.geometry, layer).values()
            with stream.layer(layer) as module:
                twin = copy.deepcopy(module)
                for index, (batch, call) in enumerate(stream.calls(layer)):
                    dense[index], wanted = reader_inputs(module, dense[index], call, names)
                    _, got = reader_inputs(twin, pruned[index], call, names)
                    ...                                         # sums over ``wanted`` and ``got``
                ...                                             # change ``twin``
                for index, (batch, call) in enumerate(stream.calls(layer)):
                    pruned[index] = run_layer(twin, pruned[index], call)

Dims: ``batch`` blocks, ``seq`` tokens per block, ``hidden`` residual width, ``vocab`` token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import FamilyError
from secateur.families.geometry import Geometry
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.units import FUSED_KINDS
from secateur.stream.forward import run_backbone, run_logits
from secateur.stream.hidden import HiddenStates
from secateur.stream.sources import LayerSource
from secateur.stream.stand_ins import LayerCall, layers_giving, plain_tensors, record_layer_inputs


def run_layer(
    module: nn.Module, hidden: Float[Tensor, "batch seq hidden"], call: LayerCall
) -> Float[Tensor, "batch seq hidden"]:
    """Return the hidden states that leave a decoder layer; whether gradients are taken is up to the caller.

    Args:
        module: the layer, or a changed copy of it.
        hidden: states that enter it.
        call: its other arguments.
    """
    output = module(hidden, *call.args, **call.kwargs)
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def reader_inputs(
    module: nn.Module, hidden: Float[Tensor, "batch seq hidden"], call: LayerCall, names: Iterable[str]
) -> tuple[Float[Tensor, "batch seq hidden"], dict[str, Tensor]]:
    """Run a decoder layer without gradients; return what leaves it, and what entered the named modules inside it.

    Args:
        module: the layer, or a changed copy of it.
        hidden: states that enter it.
        call: its other arguments.
        names: of modules inside the layer, as from ``reader_names``.

    Returns:
        The output, and by name the first argument of each named module, of shape (batch, seq, channels).
    """
    inputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name in names:
            handle = module.get_submodule(name).register_forward_pre_hook(partial(_keep_input, inputs, name))
            stack.callback(handle.remove)
        with plain_tensors():
            output = run_layer(module, hidden, call)
    return output, inputs


def reader_input(
    module: nn.Module, hidden: Float[Tensor, "batch seq hidden"], call: LayerCall, name: str
) -> Float[Tensor, "batch seq channels"]:
    """Return what enters one named module inside a decoder layer; nothing after it is run, and no gradients taken.

    Args:
        module: the layer, or a changed copy of it.
        hidden: states that enter it.
        call: its other arguments.
        name: of the module inside the layer.
    """
    handle = module.get_submodule(name).register_forward_pre_hook(_stop)
    try:
        with plain_tensors():
            run_layer(module, hidden, call)
    except _Reached as reached:
        return reached.inputs
    finally:
        handle.remove()
    raise FamilyError(f"{name} was not called when its layer ran; the family file names another module.")


class _Reached(Exception):
    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


def _stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
    raise _Reached(args[0])


def _keep_input(inputs: dict[str, Tensor], name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
    inputs[name] = args[0]


def reader_names(geometry: Geometry, layer: int) -> dict[str, str]:
    """Return per unit kind that the layer has the name, inside the layer, of the projection that reads the units.

    Routed experts and their channels have none: each expert reads its own tokens, in one module for all.
    """
    prefix = geometry.layer_name(layer) + "."
    here = {kind: axes[layer] for kind, axes in geometry.axes.items() if kind not in FUSED_KINDS}
    return {kind: axis.reader.removeprefix(prefix) for kind, axis in here.items() if axis.num_units}


class LayerStream:
    """The batches of a text, and a model's layers to put them through; holds neither hidden states nor results.

    Nothing here takes gradients.

    Args:
        source: the model.
        blocks: packed text; iterated anew for every layer.
        batch_size: blocks per batch.
    """

    def __init__(self, source: LayerSource, blocks: TokenBlocks, batch_size: int) -> None:
        self.source = source
        self.geometry = source.geometry
        self.num_layers = source.geometry.num_layers
        self._blocks = blocks
        self._batch_size = batch_size

    def start(self, hidden: HiddenStates) -> None:
        """Put the states that enter layer 0 into an empty ``hidden``, batch by batch.

        Raises:
            ExportError: the disk is full.
            FamilyError: the model cannot be run layer by layer.
        """
        assert len(hidden) == 0, "these hidden states are in use"
        for batch in self.batches():
            hidden.append(record_layer_inputs(self.source.model, batch, self.geometry.family).hidden)

    def batches(self) -> Iterator[BlockBatch]:
        """Yield the batches, always the same ones in the same order."""
        return self._blocks.batches(self._batch_size)

    def calls(self, layer: int) -> Iterator[tuple[BlockBatch, LayerCall]]:
        """Yield each batch and what the layer is called with for it, besides hidden states."""
        for batch in self.batches():
            yield batch, record_layer_inputs(self.source.model, batch, self.geometry.family).calls[layer]

    def layer(self, layer: int) -> AbstractContextManager[nn.Module]:
        """Give a decoder layer with its weights on the device, for as long as the context lasts."""
        return self.source.layer(layer)

    def final_hidden(self, hidden: HiddenStates) -> Iterator[tuple[BlockBatch, Float[Tensor, "batch seq hidden"]]]:
        """Yield each batch and, from the states that left the last layer, what ``run_backbone`` would return."""
        return self._finish(run_backbone, hidden)

    def logits(self, hidden: HiddenStates) -> Iterator[tuple[BlockBatch, Float[Tensor, "batch seq vocab"]]]:
        """Yield each batch and, from the states that left the last layer, its logits."""
        return self._finish(run_logits, hidden)

    def _finish(self, run: Callable[..., Tensor], hidden: HiddenStates) -> Iterator[tuple[BlockBatch, Tensor]]:
        model, family = self.source.model, self.geometry.family
        for batch, states in zip(self.batches(), hidden, strict=True):
            with plain_tensors(), layers_giving(model, family, states):
                result = run(model, batch, family)
            yield batch, result


@dataclass(frozen=True, slots=True, eq=False)
class LayerBatch:
    """One batch before one layer.

    Attributes:
        index: of the batch.
        batch: its tokens.
        hidden: states that enter the layer.
        call: the layer's other arguments.
    """

    index: int
    batch: BlockBatch
    hidden: Float[Tensor, "batch seq hidden"]
    call: LayerCall


class LayerView:
    """A layer at work, as ``stream_through`` shows it: its weights are there, and every batch stands before it.

    Attributes:
        index: layer index.
        module: the layer itself; it may be hooked and changed.
    """

    def __init__(self, index: int, module: nn.Module, stream: LayerStream, hidden: HiddenStates) -> None:
        self.index = index
        self.module = module
        self._stream = stream
        self._hidden = hidden
        self.num_advanced = 0
        """Batches that are through the layer."""

    def batches(self) -> Iterator[LayerBatch]:
        """Yield every batch as it stands before this layer; ``advance`` it or leave it there."""
        assert self.num_advanced == 0, "the batches are through this layer"
        for index, (batch, call) in enumerate(self._stream.calls(self.index)):
            yield LayerBatch(index, batch, self._hidden[index], call)

    def advance(self, item: LayerBatch) -> None:
        """Put a batch through the layer as it is now: what leaves it replaces what entered it."""
        with plain_tensors():
            self._hidden[item.index] = run_layer(self.module, item.hidden, item.call)
        self.num_advanced += 1

    def advance_all(self) -> None:
        """Put every batch through the layer as it is now."""
        for item in self.batches():
            self.advance(item)


def stream_through(
    stream: LayerStream,
    hidden: HiddenStates,
    on_layer: Callable[[LayerView], None] | None = None,
    *,
    progress: Progress = silent,
    label: str = "layers",
) -> None:
    """Put every batch through every layer, layer by layer.

    Args:
        stream: model and text.
        hidden: empty; afterwards it holds the states that left the last layer.
        on_layer: called with each layer before batches go through it. It may read ``batches`` as often as it likes,
            change the layer, and in the end ``advance`` all batches or none; those left are put through after it
            returns. So the next layer sees what the changed layer gives. Gradients and inference mode are as the
            caller has them.
        progress: told about finished layers.
        label: name of the work for ``progress``.

    Raises:
        CheckpointError: a layer's weights cannot be read.
        ExportError: the disk is full.
        FamilyError: the model cannot be run layer by layer.
    """
    with progress(label, stream.num_layers, "layers") as task:
        stream.start(hidden)
        for index in range(stream.num_layers):
            with stream.layer(index) as module:
                view = LayerView(index, module, stream, hidden)
                if on_layer is not None:
                    on_layer(view)
                if view.num_advanced == 0:
                    view.advance_all()
                assert view.num_advanced == len(hidden), "some batches are before the layer, others behind it"
            task.advance(1)
