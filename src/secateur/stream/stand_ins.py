"""What comes before and after a model's decoder layers, got by running the model with stand-ins for the layers.

The model's own forward makes embeddings, masks and rotary tables, and applies the final norm and head, so nothing here
knows a family. The model gets its layers back whatever happens.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``hidden`` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import FamilyError
from secateur.families.schema import Family
from secateur.records.blocks import BlockBatch
from secateur.stream.forward import run_backbone


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What a decoder layer is called with besides the hidden states: masks, positions, rotary tables.

    It depends on the batch and on the layer (sliding or full attention), never on weights inside the layers, so a dense
    and a pruned layer can share it.

    Attributes:
        args: positional arguments after the hidden states.
        kwargs: named arguments.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class LayerInputs:
    """What one batch gives the decoder layers.

    Attributes:
        hidden: hidden states that enter layer 0.
        calls: per layer, the other arguments. Layers share tensors as the model shares them.
    """

    hidden: Float[Tensor, "batch seq hidden"]
    calls: tuple[LayerCall, ...]


OnCall = Callable[[int, Tensor, LayerCall], Tensor]
"""(layer, hidden states that enter it, other arguments) -> hidden states that leave it."""


class _StandIn(nn.Module):
    """Takes a layer's place in the module list; has the layer's attributes, but neither its weights nor its hooks."""

    def __init__(self, index: int, layer: nn.Module, on_call: OnCall) -> None:
        super().__init__()
        self.index = index
        self.on_call = on_call
        self.__dict__["layer"] = layer  # past nn.Module's own bookkeeping, which would list its weights

    def __getattr__(self, name: str) -> Any:
        """Some models' loops ask a layer which attention it has."""
        return getattr(self.__dict__["layer"], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.on_call(self.index, hidden_states, LayerCall(args, kwargs))


@contextmanager
def plain_tensors() -> Iterator[None]:
    """Compute without gradients, but never in inference mode, whose tensors no later training step may use.

    A generator must not yield inside this context: the mode would reach the code that consumes it.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def layers_replaced(model: Any, family: Family, on_call: OnCall) -> Iterator[None]:
    """Call ``on_call`` in place of every decoder layer, for as long as the context lasts."""
    layers = model.get_submodule(family.layers)
    originals = list(layers)
    try:
        for index, layer in enumerate(originals):
            layers[index] = _StandIn(index, layer, on_call)
        yield
    finally:
        for index, layer in enumerate(originals):
            layers[index] = layer


def record_layer_inputs(model: Any, batch: BlockBatch, family: Family) -> LayerInputs:
    """Return what a batch gives the decoder layers; costs embeddings and masks only, and needs no layer's weights.

    Args:
        model: a transformers causal language model in evaluation mode; its layers may be on the meta device.
        batch: packed blocks.
        family: of the model.

    Raises:
        FamilyError: the model does more than pass each layer's output on to the next layer.
    """
    seen: list[tuple[Tensor, LayerCall]] = []
    with plain_tensors(), layers_replaced(model, family, partial(_record, seen, family)):
        run_backbone(model, batch, family)
    if len(seen) != len(model.get_submodule(family.layers)):
        raise _not_a_chain(family)
    return LayerInputs(hidden=seen[0][0], calls=tuple(call for _, call in seen))


@contextmanager
def layers_giving(model: Any, family: Family, hidden: Float[Tensor, "batch seq hidden"]) -> Iterator[None]:
    """Make the stack of decoder layers return ``hidden`` whatever enters it; final norm and head are the model's own.

    Within the context ``run_backbone`` and ``run_logits`` of the batch give what belongs to these hidden states.
    """
    with layers_replaced(model, family, partial(_give, hidden)):
        yield


def _record(
    seen: list[tuple[Tensor, LayerCall]], family: Family, layer: int, entering: Tensor, call: LayerCall
) -> Tensor:
    """Note a layer's arguments; what enters it must be the very tensor that the layer before it returned."""
    if layer != len(seen) or (seen and entering is not seen[0][0]):
        raise _not_a_chain(family)
    seen.append((entering, call))
    return entering


def _not_a_chain(family: Family) -> FamilyError:
    return FamilyError(
        f"this {family.name} model does more than pass hidden states from each decoder layer to the next, so it cannot "
        "be run layer by layer. Use a model without such connections."
    )


def _give(hidden: Tensor, layer: int, entering: Tensor, call: LayerCall) -> Tensor:
    del layer, entering, call
    return hidden
