"""What layer-by-layer running promises in every family: the whole forward's numbers, and a model left as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate.taps import tapped
from secateur.families.schema import Family
from secateur.files import CACHE_VARIABLE
from secateur.records.units import SITE_KINDS
from secateur.store.checkpoints import load_model, resolve_model
from secateur.stream.forward import run_backbone, run_logits
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import LayerStream, LayerView, reader_inputs, reader_names, run_layer, stream_through
from secateur.stream.sources import LayerSource, LazyLayers, LoadedLayers
from secateur.stream.stand_ins import record_layer_inputs
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_config, pico_model
from tests.pruning import choose_units, plan_keeping, prune

BATCH_SIZE = 3
"""Of four blocks: the second batch is smaller than the first."""


@pytest.fixture
def blocks() -> HandMadeBlocks:
    """Seven documents in four blocks, some with padding."""
    return hand_made_blocks()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def windows(family: Family) -> dict[str, Any]:
    """Return configuration keys for narrow attention windows, in one layer of two where the family can say so."""
    config = pico_config(family)
    if not hasattr(config, "sliding_window"):
        return {}
    keys: dict[str, Any] = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    if getattr(config, "layer_types", None) is not None:
        keys["layer_types"] = ["sliding_attention", "full_attention"]
    return keys


def pruned_model(model: Any, family: Family) -> Any:
    """Return a model whose layers differ in width from the given one's and from each other."""
    geometry = geometry_of(model, family)
    kinds = [axis.name for axis in family.axes if not axis.fixed and axis.name in SITE_KINDS]
    return prune(model, plan_keeping(geometry, choose_units(geometry, kinds, "uneven"), "uneven"), geometry)


MODELS: dict[str, Callable[[Family], Any]] = {
    "dense": pico_model,
    "tied": lambda family: pico_model(family, tie_word_embeddings=True, **windows(family)),
    "uneven": lambda family: pruned_model(pico_model(family, **windows(family)), family),
}
models = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def whole(model: Any, blocks: HandMadeBlocks, family: Family) -> list[tuple[Tensor, Tensor]]:
    """Return each batch's final hidden states and logits by the model's own forward."""
    with torch.inference_mode():
        return [
            (run_backbone(model, batch, family), run_logits(model, batch, family))
            for batch in blocks.batches(BATCH_SIZE)
        ]


def streamed(
    source: LayerSource,
    blocks: HandMadeBlocks,
    on_layer: Callable[[LayerView], None] | None = None,
    folder: Path | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return the same, layer by layer."""
    stream = LayerStream(source, blocks, BATCH_SIZE)
    with HiddenStates(folder) as hidden:
        stream_through(stream, hidden, on_layer)
        pairs = zip(stream.final_hidden(hidden), stream.logits(hidden), strict=True)
        return [(final, logits) for (_, final), (_, logits) in pairs]


def same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> bool:
    """Return whether all hidden states and logits are equal bit for bit."""
    assert len(first) == len(second) == 2
    return all(torch.equal(a, b) for pair in zip(first, second, strict=True) for a, b in zip(*pair, strict=True))


def anatomy(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return what would show a forgotten stand-in, hook, attribute or mode in any module."""
    return [
        (
            name,
            id(module),
            module.training,
            sorted(vars(module)),
            [id(parameter) for parameter in module.parameters(recurse=False)],
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    ]


@pytest.fixture
def untouched() -> Iterator[Callable[[Any], Any]]:
    """Gives a function that takes note of a model, which must be the same when the test ends."""
    noted: list[tuple[Any, list[tuple[Any, ...]], dict[str, Tensor]]] = []

    def note(model: Any) -> Any:
        noted.append((model, anatomy(model), {name: value.clone() for name, value in model.state_dict().items()}))
        return model

    yield note
    assert noted
    for model, before, state in noted:
        assert anatomy(model) == before
        assert list(model.state_dict()) == list(state)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@models
def test_layer_by_layer_is_the_whole_forward(
    family: Family,
    make: Callable[[Family], Any],
    blocks: HandMadeBlocks,
    untouched: Callable[[Any], Any],
    tmp_path: Path,
) -> None:
    """Final hidden states and logits are equal bit for bit, in memory and by way of the disk."""
    model = untouched(make(family))
    source = LoadedLayers(model, geometry_of(model, family))
    expected = whole(model, blocks, family)
    assert same(streamed(source, blocks), expected)
    assert same(streamed(source, blocks, folder=tmp_path / "states"), expected)
    assert list((tmp_path / "states").iterdir()) == []


@models
def test_a_checkpoint_read_layer_by_layer_is_the_loaded_model(
    family: Family, make: Callable[[Family], Any], blocks: HandMadeBlocks, tmp_path: Path
) -> None:
    """From a sharded checkpoint the same bits come, and only the layer at work has weights."""
    make(family).save_pretrained(tmp_path / "model", max_shard_size="60KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    checkpoint = resolve_model(str(tmp_path / "model"))
    source = LazyLayers(checkpoint, device="cpu", dtype="float64")
    handed: list[nn.Module] = []

    def on_layer(view: LayerView) -> None:
        handed.append(view.module)
        everywhere = [*handed, *source.model.get_submodule(family.layers)]
        at_work = [m for m in everywhere if any(p.device.type != "meta" for p in m.parameters())]
        assert at_work == [view.module]
        assert all(p.device.type != "meta" for p in view.module.parameters())

    loaded = load_model(checkpoint, device="cpu", dtype="float64")
    assert same(streamed(source, blocks, on_layer), whole(loaded, blocks, family))
    assert len(handed) == 2
    layers = [*handed, *source.model.get_submodule(family.layers)]
    assert all(p.device.type == "meta" for m in layers for p in m.parameters())
    buffers = dict(loaded.named_buffers())
    for name, buffer in source.model.named_buffers():
        assert buffer.dtype == buffers[name].dtype
        assert torch.equal(buffer, buffers[name])


def test_windows_matter(family: Family, blocks: HandMadeBlocks) -> None:
    """The narrow windows of the other tests are seen by the layers, in the one layer of two that has them."""
    if not windows(family):
        pytest.skip("this family has no sliding windows")
    narrow, wide = (pico_model(family, **keys) for keys in (windows(family), {}))
    wide.load_state_dict(narrow.state_dict())
    assert not same(whole(narrow, blocks, family), whole(wide, blocks, family))
    masks = [
        call.kwargs["attention_mask"]
        for call in record_layer_inputs(narrow, next(blocks.batches(BATCH_SIZE)), family).calls
    ]
    assert (masks[0] is masks[1]) == ("layer_types" not in windows(family))
    allowed = masks[0] if masks[0].dtype == torch.bool else masks[0] == 0
    assert int(allowed.sum(-1).max()) == 4


def test_the_next_layer_sees_what_a_changed_layer_gives(family: Family, blocks: HandMadeBlocks) -> None:
    """A layer changed on its turn changes everything after it, as if the model had been so from the start."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for axis in geometry.axes["ffn_channel"]:
            changed.get_submodule(axis.reader).weight.mul_(0.5)

    def on_layer(view: LayerView) -> None:
        with torch.no_grad():
            view.module.get_submodule(reader_names(geometry, view.index)["ffn_channel"]).weight.mul_(0.5)

    expected = whole(changed, blocks, family)
    assert not same(whole(model, blocks, family), expected)
    assert same(streamed(LoadedLayers(model, geometry), blocks, on_layer), expected)


def test_a_dense_and_a_pruned_stream_run_side_by_side(
    family: Family, blocks: HandMadeBlocks, untouched: Callable[[Any], Any]
) -> None:
    """One stream's calls serve layers of both widths: each ends as its own model does."""
    model = untouched(pico_model(family, **windows(family)))
    pruned = untouched(pruned_model(model, family))
    stream = LayerStream(LoadedLayers(model, geometry_of(model, family)), blocks, BATCH_SIZE)
    with HiddenStates() as wanted, HiddenStates() as got:
        stream.start(wanted)
        for states in wanted:
            got.append(states)
        for layer in range(stream.num_layers):
            twin = copy.deepcopy(pruned.get_submodule(stream.geometry.layer_name(layer)))
            with stream.layer(layer) as module:
                for index, (_, call) in enumerate(stream.calls(layer)):
                    wanted[index] = run_layer(module, wanted[index], call)
                    got[index] = run_layer(twin, got[index], call)
        for states, own in ((wanted, model), (got, pruned)):
            results = [final for _, final in stream.final_hidden(states)]
            expected = [final for final, _ in whole(own, blocks, family)]
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_reader_inputs_are_those_of_the_whole_forward(
    family: Family, blocks: HandMadeBlocks, untouched: Callable[[Any], Any]
) -> None:
    """What a layer's projections read is the same in both ways of running, and free of gradients."""
    model = untouched(pico_model(family))
    geometry = geometry_of(model, family)
    expected: dict[str, list[Tensor]] = {axis.reader: [] for axes in geometry.axes.values() for axis in axes}
    with tapped(model, inputs={name: seen.append for name, seen in expected.items()}, outputs={}, through={}):
        whole_backbones = [run_backbone(model, batch, family) for batch in blocks.batches(BATCH_SIZE)]
    assert len(whole_backbones) == 2
    stream = LayerStream(LoadedLayers(model, geometry), blocks, BATCH_SIZE)
    with HiddenStates() as hidden:
        stream.start(hidden)
        for layer in range(stream.num_layers):
            with stream.layer(layer) as module:
                names = reader_names(geometry, layer)
                for index, (_, call) in enumerate(stream.calls(layer)):
                    output, inputs = reader_inputs(module, hidden[index], call, names.values())
                    assert set(inputs) == set(names.values())
                    for kind, name in names.items():
                        assert torch.equal(inputs[name], expected[geometry.axes[kind][layer].reader][index])
                        assert not inputs[name].requires_grad
                    hidden[index] = output
        results = [final for _, final in stream.final_hidden(hidden)]
    assert all(torch.equal(a, b) for a, b in zip(results, whole_backbones, strict=True))


def test_an_error_in_between_leaves_the_model_as_it_was(
    family: Family, blocks: HandMadeBlocks, untouched: Callable[[Any], Any], tmp_path: Path
) -> None:
    """No stand-in and no hook stays, whether the caller, a layer, the embedding or the head stops; nor does a file."""
    model = untouched(pico_model(family))
    geometry = geometry_of(model, family)
    source = LoadedLayers(model, geometry)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt("stop")

    with pytest.raises(KeyboardInterrupt, match="stop"):
        streamed(source, blocks, fail, tmp_path)
    modules = [model.get_submodule(geometry.axes["ffn_channel"][1].reader), *model.get_submodule(family.layers)]
    for module in [*modules, model.get_input_embeddings(), model.get_output_embeddings()]:
        handle = module.register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt, match="stop"):
                streamed(source, blocks, folder=tmp_path)
        finally:
            handle.remove()
    assert list(tmp_path.iterdir()) == []
