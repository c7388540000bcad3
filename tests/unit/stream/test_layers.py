"""Streams and their driver: order of work, what a caller may do with a layer, and in which mode its code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from secateur.errors import FamilyError
from secateur.families.loader import families
from secateur.progress import Task
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import (
    LayerStream,
    LayerView,
    reader_input,
    reader_inputs,
    reader_names,
    run_layer,
    stream_through,
)
from secateur.stream.sources import LoadedLayers
from secateur.stream.stand_ins import LayerCall
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model


@pytest.fixture
def stream() -> LayerStream:
    """A pico model and four blocks in two batches."""
    family = families()["llama"]
    model = pico_model(family)
    return LayerStream(LoadedLayers(model, geometry_of(model, family)), hand_made_blocks(), batch_size=3)


@pytest.fixture
def hidden() -> Iterator[HiddenStates]:
    """An empty store in memory."""
    with HiddenStates() as states:
        yield states


class Tupled(nn.Module):
    """A layer as some models have it: several outputs, and arguments that must arrive."""

    def forward(self, hidden_states: torch.Tensor, shift: float, *, scale: float) -> tuple[torch.Tensor, None]:
        """Return the scaled and shifted states, and nothing else."""
        return hidden_states * scale + shift, None


def test_a_layers_first_output_counts() -> None:
    """A layer may return a tuple; all arguments are handed over."""
    states = torch.ones(1, 2, 3)
    assert torch.equal(run_layer(Tupled(), states, LayerCall((1.0,), {"scale": 3.0})), 4 * states)


def test_gradients_are_the_callers_choice_in_a_single_layer(stream: LayerStream, hidden: HiddenStates) -> None:
    """Through ``run_layer`` a layer can be trained, on states that were recorded in inference mode."""
    with torch.inference_mode():
        stream.start(hidden)
        _, call = next(iter(stream.calls(0)))
    with stream.layer(0) as module:
        output = run_layer(module, hidden[0], call)
        output.square().mean().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_modules_inputs_are_kept_as_they_were_read(stream: LayerStream, hidden: HiddenStates) -> None:
    """Wanted modules only; no hook stays behind, also when the layer fails."""
    stream.start(hidden)
    _, call = next(iter(stream.calls(0)))
    with stream.layer(0) as module:
        output, inputs = reader_inputs(module, hidden[0], call, ["mlp.down_proj"])
        assert list(inputs) == ["mlp.down_proj"]
        residual, _ = module.self_attn(module.input_layernorm(hidden[0]), **call.kwargs)
        after = hidden[0] + residual
        assert torch.equal(after + module.mlp.down_proj(inputs["mlp.down_proj"]), output)
        with pytest.raises(TypeError):
            reader_inputs(module, hidden[0], LayerCall((), {"no_such": 1, "position_embeddings": 1}), ["mlp.down_proj"])
        assert not any(part._forward_pre_hooks for part in module.modules())


def test_one_modules_input_is_had_without_running_what_comes_after_it(
    stream: LayerStream, hidden: HiddenStates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what the whole layer gives it; a module that the layer never calls is named."""
    stream.start(hidden)
    _, call = next(iter(stream.calls(0)))
    with stream.layer(0) as module:
        _, inputs = reader_inputs(module, hidden[0], call, ["self_attn.o_proj"])
        with monkeypatch.context() as patch:
            patch.setattr(module.mlp, "forward", pytest.fail)
            found = reader_input(module, hidden[0], call, "self_attn.o_proj")
        assert torch.equal(found, inputs["self_attn.o_proj"])
        assert not any(part._forward_pre_hooks for part in module.modules())
        module.add_module("unused", torch.nn.Linear(1, 1))
        with pytest.raises(FamilyError, match="unused was not called"):
            reader_input(module, hidden[0], call, "unused")


def test_readers_are_named_from_inside_the_layer() -> None:
    """The names are the same in every layer, and find modules in it."""
    family = families()["gpt2"]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    assert reader_names(geometry, 0) == reader_names(geometry, 1)
    assert reader_names(geometry, 1) == {
        "ffn_channel": "mlp.c_proj",
        "gqa_group": "attn.c_proj",
        "query_head": "attn.c_proj",
    }


def test_layers_are_shown_in_order_with_all_batches(stream: LayerStream, hidden: HiddenStates) -> None:
    """Each layer is seen once, before any batch went through it; its batches may be read again and again."""
    shown: list[Any] = []

    def on_layer(view: LayerView) -> None:
        first = [(item.index, item.batch.num_tokens, item.hidden) for item in view.batches()]
        second = [item.hidden for item in view.batches()]
        assert all(torch.equal(a, b) for (_, _, a), b in zip(first, second, strict=True))
        assert view.module is stream.source.model.model.layers[view.index]
        shown.append((view.index, [(index, tokens) for index, tokens, _ in first]))

    stream_through(stream, hidden, on_layer)
    assert shown == [(layer, [(0, 43), (1, 7)]) for layer in (0, 1)]


def test_a_caller_may_put_the_batches_through_itself(stream: LayerStream, hidden: HiddenStates) -> None:
    """Batch by batch or all at once, the result is the driver's own, and nothing runs twice."""
    ran: list[int] = []

    def on_layer(view: LayerView) -> None:
        handle = view.module.register_forward_hook(lambda *_: ran.append(view.index))
        if view.index:
            view.advance_all()
        else:
            for item in view.batches():
                view.advance(item)
        handle.remove()

    stream_through(stream, hidden, on_layer)
    assert ran == [0, 0, 1, 1]
    with HiddenStates() as plain:
        stream_through(stream, plain)
        assert all(torch.equal(a, b) for a, b in zip(hidden, plain, strict=True))


def test_half_the_batches_through_a_layer_is_a_mistake(stream: LayerStream, hidden: HiddenStates) -> None:
    """Batches before and behind a layer would be mixed up; so would a second time through."""
    with pytest.raises(AssertionError, match="some batches are before the layer"):
        stream_through(stream, hidden, lambda view: view.advance(next(view.batches())))

    def twice(view: LayerView) -> None:
        view.advance_all()
        view.advance_all()

    with HiddenStates() as fresh, pytest.raises(AssertionError, match="the batches are through this layer"):
        stream_through(stream, fresh, twice)


def test_hidden_states_in_use_are_not_taken_for_empty_ones(stream: LayerStream, hidden: HiddenStates) -> None:
    """A second pass over the same store would double its batches."""
    stream_through(stream, hidden)
    with pytest.raises(AssertionError, match="in use"):
        stream_through(stream, hidden)


@pytest.mark.parametrize("inference", [False, True])
def test_the_callers_mode_is_not_disturbed(stream: LayerStream, hidden: HiddenStates, inference: bool) -> None:
    """Code between batches runs as the caller set it; stored states can be trained on either way."""
    modes = []

    def note() -> None:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    def on_layer(view: LayerView) -> None:
        note()
        for item in view.batches():
            note()
            view.advance(item)
            note()

    with torch.inference_mode(inference):
        note()
        stream_through(stream, hidden, on_layer)
        for _, result in [*stream.final_hidden(hidden), *stream.logits(hidden)]:
            note()
            assert not result.is_inference()
    assert set(modes) == {(not inference, inference)}
    assert not any(states.is_inference() or states.requires_grad for states in hidden)


def test_progress_counts_layers(stream: LayerStream, hidden: HiddenStates) -> None:
    """One step per layer, told after the layer is done."""
    told: list[Any] = []

    class Note:
        def advance(self, amount: int) -> None:
            told.append(amount)

    @contextmanager
    def progress(label: str, total: int | None, unit: str) -> Iterator[Task]:
        told.append((label, total, unit))
        yield Note()

    stream_through(stream, hidden, lambda view: told.append(f"layer {view.index}"), progress=progress, label="prune")
    assert told == [("prune", 2, "layers"), "layer 0", 1, "layer 1", 1]


def test_every_batch_needs_its_states(stream: LayerStream, hidden: HiddenStates) -> None:
    """Fewer stored batches than the text has are noticed, not passed over."""
    stream.start(hidden)
    with HiddenStates() as short:
        short.append(hidden[0])
        with pytest.raises(ValueError, match="shorter"):
            list(stream.logits(short))
