"""Stand-ins for decoder layers: what they record, what they return, and which models they refuse."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import FamilyError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.blocks import BlockBatch
from secateur.stream.forward import run_backbone, run_logits
from secateur.stream.stand_ins import LayerCall, layers_giving, layers_replaced, record_layer_inputs
from tests.blocks import lay_blocks, random_documents
from tests.conftest import pico_model


@pytest.fixture(scope="module")
def llama() -> Family:
    """A plain family."""
    return families()["llama"]


@pytest.fixture(scope="module")
def model(llama: Family) -> Any:
    """Its pico model; nobody changes it."""
    return pico_model(llama)


@pytest.fixture
def batch() -> BlockBatch:
    """Two blocks, one with padding."""
    return lay_blocks(random_documents([5, 6, 9]), [[0, 1], [2]], 11)


def test_what_enters_the_layers_is_recorded(llama: Family, model: Any, batch: BlockBatch) -> None:
    """The first hidden states are the embeddings, and the layers share one mask, as the model shares it."""
    inputs = record_layer_inputs(model, batch, llama)
    assert torch.equal(inputs.hidden, model.get_input_embeddings()(batch.input_ids))
    assert len(inputs.calls) == 2
    first, second = inputs.calls
    assert first.kwargs["attention_mask"] is second.kwargs["attention_mask"]
    assert first.kwargs["position_embeddings"] is second.kwargs["position_embeddings"]
    assert torch.equal(first.kwargs["position_ids"], batch.position_ids)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_recorded_tensors_can_be_trained_with(
    llama: Family, model: Any, batch: BlockBatch, mode: Callable[[], Any]
) -> None:
    """Whatever mode the caller is in, they are neither inference tensors nor part of a graph."""
    with mode():
        inputs = record_layer_inputs(model, batch, llama)
    tensors = [inputs.hidden, inputs.calls[0].kwargs["attention_mask"], *inputs.calls[0].kwargs["position_embeddings"]]
    assert not any(tensor.is_inference() or tensor.requires_grad for tensor in tensors)


def test_layers_without_weights_suffice(llama: Family, model: Any, batch: BlockBatch) -> None:
    """Neither recording nor finishing touches a layer's weights."""
    bare = pico_model(llama)
    bare.model.layers.to("meta")
    found, expected = record_layer_inputs(bare, batch, llama), record_layer_inputs(model, batch, llama)
    assert torch.equal(found.hidden, expected.hidden)
    with torch.inference_mode(), layers_giving(bare, llama, expected.hidden):
        assert torch.equal(run_backbone(bare, batch, llama), model.model.norm(expected.hidden))


def test_given_states_reach_norm_and_head(llama: Family, model: Any, batch: BlockBatch) -> None:
    """Within the context the stack returns the given states whatever the tokens are."""
    states = torch.randn(2, 11, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode(), layers_giving(model, llama, states):
        logits = run_logits(model, batch, llama)
    assert torch.equal(logits, model.lm_head(model.model.norm(states)))


def test_a_projection_after_the_norm_is_applied() -> None:
    """OPT may have embeddings narrower than its layers; states enter the layers wide and leave the model narrow."""
    family = families()["opt"]
    model = pico_model(family, word_embed_proj_dim=24)
    batch = lay_blocks(random_documents([5]), [[0]], 6)
    with torch.inference_mode():
        inputs = record_layer_inputs(model, batch, family)
        assert inputs.hidden.shape == (1, 6, 48)
        with layers_giving(model, family, inputs.hidden):
            assert run_backbone(model, batch, family).shape == (1, 6, 24)


def test_a_stand_in_has_the_layers_attributes_but_not_its_weights(llama: Family, model: Any) -> None:
    """A model's loop may ask a layer what it is; counting parameters in the meantime finds none in it."""
    layer = model.model.layers[1]
    with layers_replaced(model, llama, lambda index, hidden, call: hidden):
        stand_in = model.model.layers[1]
        assert stand_in is not layer
        assert stand_in.hidden_size == layer.hidden_size == 48
        assert stand_in.self_attn is layer.self_attn
        assert list(stand_in.named_parameters()) == []
        with pytest.raises(AttributeError):
            _ = stand_in.no_such_thing
    assert model.model.layers[1] is layer


# -- models that cannot be run layer by layer ------------------------------------------------------------------------


class Stack(nn.Module):
    """The little of a causal language model that recording needs; subclasses connect the layers oddly."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 8)
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    @property
    def base_model(self) -> Any:
        """What ``run_backbone`` calls."""
        return lambda input_ids, **_: (self.connect(self.embed(input_ids), list(self.model.layers)),)

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Run the layers one after the other."""
        for layer in layers:
            hidden = layer(hidden)
        return hidden


class Scaled(Stack):
    """Something happens between layers."""

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Scale between layers."""
        return layers[2](layers[1](layers[0](hidden) * 2))


class Shared(Stack):
    """A layer runs twice."""

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Repeat the last layer."""
        return layers[2](super().connect(hidden, layers))


class Turned(Stack):
    """Layers run in another order."""

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Run the layers backwards."""
        return super().connect(hidden, layers[::-1])


class Short(Stack):
    """A layer is left out."""

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Run all layers but the last."""
        return super().connect(hidden, layers[:-1])


class Tupled(Stack):
    """Layers are expected to return tuples."""

    def connect(self, hidden: Tensor, layers: list[nn.Module]) -> Tensor:
        """Take the first of each layer's outputs."""
        for layer in layers:
            hidden = layer(hidden)[0]
        return hidden


def test_a_plain_stack_can_be_recorded(llama: Family, batch: BlockBatch) -> None:
    """What is refused below is refused for its odd connections only."""
    assert len(record_layer_inputs(Stack(), batch, llama).calls) == 3


@pytest.mark.parametrize("kind", [Scaled, Shared, Turned, Tupled, Short])
def test_other_connections_are_refused(llama: Family, batch: BlockBatch, kind: type[Stack]) -> None:
    """Where layers are more than a chain, numbers would be wrong without a word; and the model is left whole."""
    model = kind()
    layers = list(model.model.layers)
    with pytest.raises(FamilyError, match=r"this llama model does more than pass hidden states"):
        record_layer_inputs(model, batch, llama)
    assert list(model.model.layers) == layers


def test_a_call_keeps_every_argument(llama: Family, batch: BlockBatch) -> None:
    """Positional and named arguments come back as they were, hidden states aside."""
    seen: list[LayerCall] = []
    holder = SimpleNamespace(get_submodule=lambda name: layers)
    layers = nn.ModuleList([nn.Identity()])
    with layers_replaced(holder, llama, lambda index, hidden, call: seen.append(call) or hidden):
        layers[0](torch.zeros(1), None, 2, mask="m")
        layers[0](hidden_states=torch.zeros(1), mask="n")
    assert seen == [LayerCall((None, 2), {"mask": "m"}), LayerCall((), {"mask": "n"})]
