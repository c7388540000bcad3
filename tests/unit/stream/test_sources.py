"""Layers from memory and from disk: what is read when, what is released, and what is said about broken checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.families.loader import families
from secateur.files import CACHE_VARIABLE
from secateur.store.checkpoints import load_model, resolve_model
from secateur.stream.forward import run_logits
from secateur.stream.sources import LayerSource, LazyLayers, LoadedLayers
from tests.blocks import lay_blocks, random_documents
from tests.conftest import geometry_of, pico_model


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def save(folder: Path, name: str = "llama", shard_size: str = "5GB", **extra: Any) -> Path:
    """Save a random pico model in float32 and return its folder."""
    pico_model(families()[name], torch.float32, **extra).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def lazy(folder: Path, dtype: str = "auto") -> LazyLayers:
    """Open a folder layer by layer on the CPU."""
    return LazyLayers(resolve_model(str(folder)), device="cpu", dtype=dtype)


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return copies of a module's weights."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def test_a_loaded_models_layers_are_its_own() -> None:
    """Nothing is copied, nothing released; the model is put into evaluation mode."""
    family = families()["llama"]
    model = pico_model(family).train()
    source: LayerSource = LoadedLayers(model, geometry_of(model, family))
    with source.layer(1) as layer:
        assert layer is model.model.layers[1]
        assert not layer.training
    assert next(layer.parameters()).device.type == "cpu"


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_layers_are_read_in_the_dtype_asked_for(tmp_path: Path, dtype: str) -> None:
    """Weights are those of the loaded model, bit for bit, and trainable as those are."""
    source = lazy(save(tmp_path / "model"), dtype)
    loaded = load_model(resolve_model(str(tmp_path / "model")), device="cpu", dtype=dtype)
    assert source.model.dtype == loaded.dtype == getattr(torch, dtype)
    assert not source.model.training
    for index in range(2):
        with source.layer(index) as layer:
            assert not layer.training
            expected = loaded.model.layers[index].state_dict()
            assert list(layer.state_dict()) == list(expected)
            for name, parameter in layer.named_parameters():
                assert parameter.dtype == expected[name].dtype
                assert torch.equal(parameter, expected[name])
                assert parameter.requires_grad


def test_a_layer_loses_its_weights_but_saved_ones_stay(tmp_path: Path) -> None:
    """The module handed out is empty afterwards, also after an error; tensors taken from it are as they were."""
    source = lazy(save(tmp_path / "model"))
    with pytest.raises(KeyboardInterrupt), source.layer(0) as layer:
        kept, expected = layer.state_dict(), state(layer)
        raise KeyboardInterrupt
    assert all(parameter.device.type == "meta" for parameter in layer.parameters())
    assert all(torch.equal(kept[name], value) for name, value in expected.items())


def test_every_time_a_layer_comes_fresh_from_the_checkpoint(tmp_path: Path) -> None:
    """Changing, replacing or hooking parts of one module does not show in the next."""
    source = lazy(save(tmp_path / "model"))
    with source.layer(0) as layer:
        expected = state(layer)
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj = torch.nn.Linear(3, 48)
        layer.register_forward_hook(lambda *_: None)
    with source.layer(0) as again:
        assert again is not layer
        assert not again._forward_hooks
        assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_weights_do_not_hang_on_to_the_file(tmp_path: Path) -> None:
    """Overwriting the file while a layer is in use changes nothing in it: its memory is its own."""
    folder = save(tmp_path / "model")
    source = lazy(folder)
    with source.layer(0) as layer:
        expected = state(layer)
        file = folder / "model.safetensors"
        with file.open("r+b") as output:
            output.seek(file.stat().st_size // 4)
            output.write(b"\0" * (file.stat().st_size // 2))
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())


def test_layers_read_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    """Neither the layers nor what is around them are inference tensors."""
    with torch.inference_mode():
        source = lazy(save(tmp_path / "model"))
        with source.layer(0) as layer:
            kept = list(layer.parameters())
    assert not any(tensor.is_inference() for tensor in [*kept, *source.model.parameters(), *source.model.buffers()])


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_files_of_a_bare_base_model_will_do(tmp_path: Path, family: str) -> None:
    """GPT-2's files on the hub leave out the base model's name; weights are found all the same."""
    folder = save(tmp_path / "model", family, tie_word_embeddings=True)

    def strip(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.partition(".")[2]] = tensors.pop(name)

    edit(folder / "model.safetensors", strip)
    source = lazy(folder)
    loaded = load_model(resolve_model(str(folder)), device="cpu")
    with source.layer(1) as layer:
        expected = loaded.get_submodule(source.geometry.layer_name(1)).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
    assert torch.equal(source.model.lm_head.weight, loaded.lm_head.weight)


def test_a_whole_file_goes_before_a_sharded_one(tmp_path: Path) -> None:
    """Where a folder has both, the weights are those that transformers reads."""
    save(tmp_path / "model", shard_size="60KB", seed=1)
    whole = save(tmp_path / "whole", seed=2)
    (whole / "model.safetensors").rename(tmp_path / "model" / "model.safetensors")
    source = lazy(tmp_path / "model")
    loaded = load_model(resolve_model(str(tmp_path / "model")), device="cpu")
    with source.layer(0) as layer:
        assert torch.equal(layer.mlp.up_proj.weight, loaded.model.layers[0].mlp.up_proj.weight)
        assert torch.equal(
            layer.mlp.up_proj.weight,
            pico_model(families()["llama"], torch.float32, 2).model.layers[0].mlp.up_proj.weight,
        )


# -- heads and embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_head_and_embedding_are_as_tied_as_when_loaded(tmp_path: Path, tied: bool) -> None:
    """A tied head, which is not stored, is the embedding itself; an untied one has its own weights."""
    source = lazy(save(tmp_path / "model", tie_word_embeddings=tied))
    assert (source.model.lm_head.weight is source.model.model.embed_tokens.weight) is tied
    assert source.model.lm_head.weight.device.type == "cpu"


def test_a_tied_head_that_is_stored_too_is_read(tmp_path: Path) -> None:
    """As in transformers; one that differs from the embedding is refused by whoever looks at the checkpoint."""
    folder = save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight beside a different model.embed_tokens.weight"):
        lazy(folder)
    edit(folder / "model.safetensors", _copy_head)
    source = lazy(folder)
    loaded = load_model(resolve_model(str(folder)), device="cpu")
    assert torch.equal(source.model.lm_head.weight, loaded.lm_head.weight)
    assert torch.equal(source.model.model.embed_tokens.weight, loaded.model.embed_tokens.weight)


def _copy_head(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


# -- damage ----------------------------------------------------------------------------------------------------------


def test_missing_weights_are_named_at_once(tmp_path: Path) -> None:
    """A layer's and the head's weights are looked for before anything runs."""
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"):
        folder = save(tmp_path / name)
        edit(folder / "model.safetensors", lambda tensors, name=name: tensors.pop(name))  # type: ignore[misc]
        with pytest.raises(CheckpointError, match=rf"lacks weights: {name}\. The folder is incomplete"):
            lazy(folder)


def test_a_missing_shard_is_named_at_once(tmp_path: Path) -> None:
    """A download that stopped half-way is noticed before the first layer, not at the last."""
    folder = save(tmp_path / "model", shard_size="60KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    checkpoint = resolve_model(str(folder))
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"could not be loaded: .*{shard.name}.*Fetch it again"):
        LazyLayers(checkpoint, device="cpu")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": [1]}'])
def test_a_broken_index_is_our_error(tmp_path: Path, text: str) -> None:
    """Whatever the index file holds instead, the message says to fetch the model again."""
    folder = save(tmp_path / "model", shard_size="60KB")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"could not be loaded: .*Fetch it again"):
        lazy(folder)


def test_shards_without_an_index_are_refused(tmp_path: Path) -> None:
    """Nobody can say which of them belong together."""
    folder = save(tmp_path / "model", shard_size="60KB")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"could not be loaded: .*model\.safetensors"):
        lazy(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float, dtype: str) -> None:
    """Outside the layers at once, inside when the layer is asked for, with the full name."""
    folder = save(tmp_path / "model")
    edit(folder / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[3:4].fill_(value))
    source = lazy(folder, dtype)
    with source.layer(0):
        pass
    with (
        pytest.raises(CheckpointError, match=r"weights of model\.layers\.1\.mlp\.up_proj\.weight hold NaN or infinity"),
        source.layer(1),
    ):
        pass
    edit(folder / "model.safetensors", lambda t: t["model.norm.weight"].fill_(value))
    with pytest.raises(CheckpointError, match=r"weights of model\.norm\.weight hold NaN or infinity"):
        lazy(folder, dtype)


def test_weights_of_another_shape_are_our_error(tmp_path: Path) -> None:
    """Files that changed after the model was looked at do not surface as a torch error."""
    folder = save(tmp_path / "model")
    source = lazy(folder)
    edit(folder / "model.safetensors", lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)}))
    with (
        pytest.raises(CheckpointError, match=r"stores model\.layers\.0\.mlp\.up_proj\.weight with shape \(2, 2\)"),
        source.layer(0),
    ):
        pass


def test_what_surrounds_the_layers_is_complete(tmp_path: Path) -> None:
    """Given the layers of the loaded model, the weightless one gives the same logits: buffers are right too."""
    folder = save(tmp_path / "model", "gemma2")
    source, family = lazy(folder), families()["gemma2"]
    loaded = load_model(resolve_model(str(folder)), device="cpu")
    source.model.model.layers = loaded.model.layers
    batch = lay_blocks(random_documents([9, 4]), [[0, 1]], 16)
    with torch.inference_mode():
        assert torch.equal(run_logits(source.model, batch, family), run_logits(loaded, batch, family))
