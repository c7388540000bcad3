"""Models in and out: what is found in a folder, what identifies it, what is built, saved and compared."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from secateur.errors import CheckpointError, ExportError, FamilyError, PlanError, UnavailableError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.store import checkpoints
from secateur.store.checkpoints import (
    build_model,
    choose_device,
    choose_dtype,
    compare_reloaded,
    copy_side_files,
    fingerprint,
    fingerprint_loaded,
    load_model,
    load_tokenizer,
    parameter,
    require_finite,
    resolve_model,
    save_model,
    weight_bytes,
)
from secateur.store.portable import portable_code
from tests.conftest import geometry_of, pico_model
from tests.pico import Pico, pico_tokenizer, random_model, save_model_folder
from tests.pruning import choose_units, plan_keeping, prune


def edit_weights(folder: Path, name: str, add: float) -> None:
    """Change one number of one tensor in a model folder."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] += add
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# -- resolving -------------------------------------------------------------------------------------------------------


def test_a_folder_is_described_without_loading_its_weights(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """Family, sizes, shapes, dtype and bytes are those of the model that would be loaded."""
    loaded = AutoModelForCausalLM.from_pretrained(pico.model)
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    found = resolve_model(str(pico.model))
    assert found.geometry.family.name == "llama"
    assert found.geometry.num_layers == 2
    assert found.shapes == {name: tuple(value.shape) for name, value in loaded.named_parameters()}
    assert found.dtype == torch.float32
    assert found.size_bytes == (pico.model / "model.safetensors").stat().st_size == weight_bytes(pico.model)
    assert found.config["rms_norm_eps"] == loaded.config.rms_norm_eps


def test_the_second_look_is_remembered_and_the_same(pico: Pico, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers had to say about a configuration is asked once; a change of it is asked again."""
    first = resolve_model(str(pico.model))
    calls = []
    anatomy = checkpoints._anatomy
    monkeypatch.setattr(checkpoints, "_anatomy", lambda *arguments: calls.append(arguments) or anatomy(*arguments))
    second = resolve_model(str(pico.model))
    assert calls == []
    assert json.dumps(first.config, sort_keys=True) == json.dumps(second.config, sort_keys=True)
    assert (first.shapes, first.geometry, first.dtype) == (second.shapes, second.geometry, second.dtype)
    other = shutil.copytree(pico.model, cache.parent / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert resolve_model(str(other)).config["rms_norm_eps"] == 0.5
    assert len(calls) == 1


@pytest.mark.parametrize("damage", ["{", "[]", '"x"'])
def test_a_damaged_memory_is_not_trusted(pico: Pico, cache: Path, damage: str) -> None:
    """Whatever is in the cache folder, the answer is right."""
    first = resolve_model(str(pico.model))
    before = fingerprint(first)
    files = [file for file in cache.rglob("*.json") if file.is_file()]
    assert len(files) >= 2
    for file in files:
        file.write_text(damage)
    again = resolve_model(str(pico.model))
    assert again.shapes == first.shapes
    assert fingerprint(again) == before


def test_a_cache_that_cannot_be_written_stops_nothing(pico: Pico, cache: Path) -> None:
    """The cache saves time and is not needed: here its place is taken by a file."""
    cache.write_text("in the way")
    found = resolve_model(str(pico.model))
    assert fingerprint(found) == fingerprint(found)


def test_the_name_is_what_people_call_the_model(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's own name, dots included, however the path was written; a hub id is its own name."""
    folder = shutil.copytree(pico.model, tmp_path / "SmolLM2-1.7B")
    assert resolve_model(str(folder)).name == "SmolLM2-1.7B"
    assert resolve_model(f"{folder}/").name == "SmolLM2-1.7B"
    monkeypatch.chdir(folder)
    assert resolve_model(".").name == "SmolLM2-1.7B"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/SmolLM2-1.7B").name == "SmolLM2-1.7B"
    monkeypatch.setattr(checkpoints, "_from_hub", lambda spec: folder)
    assert resolve_model("HuggingFaceTB/SmolLM2-1.7B").name == "HuggingFaceTB/SmolLM2-1.7B"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("./nowhere", "model folder ./nowhere does not exist"),
        ("/nowhere/at/all", "model folder /nowhere/at/all does not exist"),
        ("a/b/c", "model folder a/b/c does not exist"),
        ("nowhere.gguf", "nowhere.gguf does not exist"),
        ("not a name", "neither an existing folder nor a hub id"),
    ],
)
def test_what_is_not_there_is_said(spec: str, message: str) -> None:
    """A path that does not exist is not looked for on the hub."""
    with pytest.raises(CheckpointError, match=message):
        resolve_model(spec)


def test_a_hub_id_that_cannot_be_had_is_unavailable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Offline and not cached: another exception than for a broken model, and what to do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UnavailableError, match="nobody/nothing is not a local folder, not in the hub cache"):
        resolve_model("nobody/nothing")


def test_an_unsupported_model_type_lists_the_supported_ones(pico: Pico, tmp_path: Path) -> None:
    """Also when the configuration names no type at all."""
    folder = shutil.copytree(pico.model, tmp_path / "m")
    for config in ({"model_type": "lama"}, {}):
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(FamilyError, match=r"unknown model type .*Known: .*llama.*qwen3"):
            resolve_model(str(folder))
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not hold a configuration but a list"):
        resolve_model(str(folder))


def test_the_dtype_is_the_one_most_numbers_have(tmp_path: Path) -> None:
    """A few float32 norms do not make a bfloat16 model a float32 one; all shards are looked at."""
    folder = save_model_folder(tmp_path / "m", dtype=torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    others = {name: tensor for name, tensor in tensors.items() if "norm" not in name}
    save_file(norms, folder / "model-1.safetensors", metadata={"format": "pt"})
    save_file(others, folder / "model-2.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    found = resolve_model(str(folder))
    assert found.dtype == torch.bfloat16
    assert found.size_bytes == sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def test_a_broken_safetensors_file_is_named(pico: Pico, tmp_path: Path) -> None:
    """A file that is cut off anywhere, or too long, or no such file, is refused before anything is loaded."""
    folder = shutil.copytree(pico.model, tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    for broken in (whole[:-1], whole[: 8 + header], whole[: 4 + header], whole[:5], b"", whole + b"\0", b"\0" * 99):
        file.write_bytes(broken)
        with pytest.raises(CheckpointError, match=r"model\.safetensors is not a readable safetensors file"):
            resolve_model(str(folder))
    file.write_bytes(whole)
    assert resolve_model(str(folder)).size_bytes == len(whole)


def test_weights_of_another_shape_are_named(tmp_path: Path) -> None:
    """Tensor, stored shape and configured shape are in the message."""
    folder = save_model_folder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(65)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"stores model\.norm\.weight with shape \(65,\), .* says \(64,\)"):
        resolve_model(str(folder))


# -- fingerprints ----------------------------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_content(pico: Pico, tmp_path: Path) -> None:
    """A copy has it too; one weight or one configuration value changes it; the tokenizer does not."""
    original = fingerprint(resolve_model(str(pico.model)))
    folder = shutil.copytree(pico.model, tmp_path / "copy")
    assert fingerprint(resolve_model(str(folder))) == original
    (folder / "README.md").write_text("other words")
    assert fingerprint(resolve_model(str(folder))) == original
    edit_weights(folder, "model.norm.weight", 1e-3)
    changed = fingerprint(resolve_model(str(folder)))
    assert changed != original
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert fingerprint(resolve_model(str(folder))) not in (original, changed)


def test_large_files_are_hashed_once(pico: Pico, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second fingerprint of unchanged files reads none of them."""
    found = resolve_model(str(pico.model))
    first = fingerprint(found)
    monkeypatch.setattr(checkpoints, "_file_hash", None)
    assert fingerprint(found) == first


def test_a_file_that_was_written_again_is_hashed_again(pico: Pico, tmp_path: Path) -> None:
    """Same name and same size, other content: the modification time tells."""
    folder = shutil.copytree(pico.model, tmp_path / "copy")
    found = resolve_model(str(folder))
    first = fingerprint(found)
    edit_weights(folder, "model.norm.weight", 1.0)
    os.utime(folder / "model.safetensors", ns=(0, 12345))
    assert fingerprint(found) != first


def test_the_fingerprint_of_a_loaded_model_is_of_its_weights() -> None:
    """Equal weights agree; one weight, another dtype or another name differs."""
    model = random_model()
    first = fingerprint_loaded(model)
    assert fingerprint_loaded(random_model()) == first
    assert fingerprint_loaded(random_model(seed=1)) != first
    assert fingerprint_loaded(random_model(dtype=torch.bfloat16)) != first
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-3
    assert fingerprint_loaded(model) != first


# -- loading ---------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_to_be_run(pico: Pico) -> None:
    """Evaluation mode, the asked dtype, the weights of the file."""
    found = resolve_model(str(pico.model))
    stored = load_file(pico.model / "model.safetensors")
    for dtype, expected in [("auto", torch.float32), ("float64", torch.float64), ("bfloat16", torch.bfloat16)]:
        model = load_model(found, device="cpu", dtype=dtype)
        assert not model.training
        assert {value.dtype for value in model.parameters()} == {expected}
        assert torch.equal(model.model.norm.weight, stored["model.norm.weight"].to(expected))


def test_the_dtype_to_compute_in() -> None:
    """On a CPU float32 unless asked otherwise, on a GPU the stored one."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert choose_dtype("auto", torch.bfloat16, cpu) == torch.float32
    assert choose_dtype("auto", torch.bfloat16, gpu) == torch.bfloat16
    assert choose_dtype("float16", torch.bfloat16, cpu) == choose_dtype("float16", torch.float32, gpu) == torch.float16


def test_the_device_to_compute_on() -> None:
    """``auto`` is the first GPU or else the CPU; what is not there is refused in one short line."""
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    for absent in ("cuda:63", "abacus", "meta", "vulkan"):
        with pytest.raises(
            CheckpointError, match=f"device '{absent}' cannot be used here: .*Try device: auto"
        ) as caught:
            choose_device(absent)
        assert len(str(caught.value)) < 400


def test_missing_weights_are_named(pico: Pico, tmp_path: Path) -> None:
    """A folder that lacks tensors is not filled up with random numbers."""
    folder = shutil.copytree(pico.model, tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks weights: model\.layers\.1\.mlp\.up_proj\.weight\. The folder"):
        load_model(resolve_model(str(folder)), device="cpu")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    """The first such parameter is in the message."""
    model = random_model()
    require_finite(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 3] = value
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.1\.mlp\.up_proj\.weight hold NaN or inf"):
        require_finite(model)


def test_a_parameter_by_name() -> None:
    """An absent bias is None, not an error."""
    model = random_model()
    found = parameter(model, "model.norm.weight")
    assert found is not None and torch.equal(found, model.model.norm.weight)
    assert not found.requires_grad
    assert parameter(model, "model.layers.0.mlp.up_proj.bias") is None
    assert parameter(model, "model.layers.7.mlp.up_proj.weight") is None


def test_the_tokenizer_is_the_folders(pico: Pico, tmp_path: Path) -> None:
    """Fast, and saying why where there is none or a broken one."""
    tokenizer = load_tokenizer(resolve_model(str(pico.model)))
    assert tokenizer.is_fast
    assert tokenizer("The patient")["input_ids"] == pico_tokenizer()("The patient")["input_ids"]
    folder = shutil.copytree(pico.model, tmp_path / "m")
    found = resolve_model(str(folder))
    for content in (None, "{", "{}"):
        (folder / "tokenizer.json").unlink() if content is None else (folder / "tokenizer.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"(?s)the tokenizer of .* could not be loaded: .*tokenizer\.json"):
            load_tokenizer(found)


# -- building --------------------------------------------------------------------------------------------------------


def shrunk(family: Family, shape: str, **extra: Any) -> tuple[Any, Any]:
    """Return a dense pico model of a family and a pruned one built from it."""
    dense = pico_model(family, dtype=torch.float32, **extra)
    geometry = geometry_of(dense, family)
    return dense, prune(dense, plan_keeping(geometry, choose_units(geometry, ["ffn_channel"], shape), shape), geometry)


def is_tied(model: Any) -> bool:
    """Return whether the head is the embedding."""
    return bool(model.get_output_embeddings().weight is model.get_input_embeddings().weight)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_tied_head_stays_tied_and_a_free_one_free(family: Family, shape: str, tied: bool) -> None:
    """In every family the built model ties what the dense one ties, and nothing else shares memory inside it."""
    dense, pruned = shrunk(family, shape, tie_word_embeddings=tied)
    assert is_tied(pruned) == is_tied(dense)
    places = [value.data_ptr() for value in pruned.parameters()]
    assert len(places) == len(set(places))


def test_a_head_that_should_be_the_embedding_and_is_not_is_refused(tmp_path: Path) -> None:
    """It would be lost without a word; the same matrix stored twice is fine."""
    model = pico_model(families()["llama"], dtype=torch.float32, tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(CheckpointError, match=r"lm_head.weight beside a different model.embed_tokens.weight.*Set tie_"):
        resolve_model(str(tmp_path))
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    assert resolve_model(str(tmp_path)).shapes.keys() == dict(model.named_parameters()).keys() - {"lm_head.weight"}


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_a_built_model_is_complete(family: Family, shape: str) -> None:
    """Nothing is left on the meta device; buffers that are not saved are finite and equal to the dense model's."""
    dense, pruned = shrunk(family, shape)
    assert not pruned.training
    assert all(value.device.type == "cpu" and value.requires_grad for value in pruned.parameters())
    originals = dict(dense.named_buffers())
    assert dict(pruned.named_buffers()).keys() == originals.keys()
    for name, buffer in pruned.named_buffers():
        assert torch.isfinite(buffer).all()
        assert torch.equal(buffer, originals[name])
        assert buffer.data_ptr() != originals[name].data_ptr()


def test_the_generation_configuration_is_carried_over_as_a_copy() -> None:
    """Changing one model's does not change the other's."""
    from transformers import GenerationConfig

    dense = random_model()
    dense.generation_config = GenerationConfig(temperature=0.25, do_sample=True)
    built = build_model(dense.config.to_dict(), dense.state_dict().items(), dense)
    assert built.generation_config.temperature == 0.25
    built.generation_config.temperature = 0.5
    assert dense.generation_config.temperature == 0.25


def test_weights_that_do_not_fit_are_refused() -> None:
    """A missing, an extra and a wrongly shaped parameter are each an error of ours."""
    dense = random_model()
    state = dict(dense.state_dict())
    name = "model.norm.weight"
    for wrong in (
        {key: value for key, value in state.items() if key != name},
        {**state, "model.more.weight": state[name]},
        {**state, name: state[name][:-1]},
    ):
        with pytest.raises(CheckpointError, match="the pruned weights do not fit their configuration"):
            build_model(dense.config.to_dict(), wrong.items(), dense)


def test_sizes_that_the_configuration_refuses_are_a_plan_error() -> None:
    """The stock class's own words are in the message, with the way out."""
    dense = random_model()
    config = {**dense.config.to_dict(), "num_attention_heads": 6, "num_key_value_heads": 3}
    with pytest.raises(PlanError, match=r"llama refuses the planned sizes: (.|\n)*multiple(.|\n)*shape: uneven"):
        build_model(config, dense.state_dict().items(), dense)


# -- saving ----------------------------------------------------------------------------------------------------------


def test_rope_theta_is_written_for_older_readers(tmp_path: Path) -> None:
    """Beside ``rope_parameters``, with the same value; transformers itself reads the folder as before."""
    model = random_model(rope_parameters={"rope_type": "default", "rope_theta": 12345.0})
    save_model(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 12345.0
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters["rope_theta"] == 12345.0


def test_models_without_rope_get_none(tmp_path: Path) -> None:
    """GPT-2 has no rotary positions and no such key."""
    save_model(random_model(model_type="gpt2", n_embd=16, n_layer=1, n_head=2, n_positions=32), tmp_path)
    assert "rope_theta" not in json.loads((tmp_path / "config.json").read_text())


def test_an_uneven_model_brings_its_code_however_it_is_saved(tmp_path: Path) -> None:
    """By our function, by transformers' own, as a configuration alone, after loading: never one without the other."""
    dense = pico_model(families()["llama"], dtype=torch.float32)
    _, pruned = shrunk(families()["llama"], "uneven")
    save_model(pruned, tmp_path / "ours")
    pruned.save_pretrained(tmp_path / "theirs")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    pruned.config.save_pretrained(tmp_path / "config")
    for name in ("ours", "theirs", "again", "config"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_pruned_llama.PrunedLlamaForCausalLM"
        assert config["rope_theta"] == dense.config.rope_parameters["rope_theta"]
        assert (tmp_path / name / "modeling_pruned_llama.py").read_text() == portable_code("llama")
    save_model(dense, tmp_path / "even")
    assert not list((tmp_path / "even").glob("*.py"))


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize("tied", [False, True])
def test_weights_in_several_files_are_one_model(shape: str, tied: bool, tmp_path: Path) -> None:
    """Description, fingerprint, loading and reading a layer at a time: as from one file; a lost part is an error."""
    _, model = shrunk(families()["qwen2"], shape, tie_word_embeddings=tied)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    save_model(model, whole)
    save_model(model, parts, max_shard_size="20KB")
    files = sorted(parts.glob("*.safetensors"))
    assert len(files) > 2 and (parts / "model.safetensors.index.json").is_file()
    one, many = resolve_model(str(whole)), resolve_model(str(parts))
    assert (many.shapes, many.dtype, many.geometry) == (one.shapes, one.dtype, one.geometry)
    assert many.size_bytes == weight_bytes(parts) == sum(file.stat().st_size for file in files)
    inputs = {"input_ids": torch.arange(20).reshape(2, 10)}
    assert compare_reloaded(model, parts, inputs, tolerance=0.0) == 0.0
    assert fingerprint_loaded(load_model(many, device="cpu")) == fingerprint_loaded(load_model(one, device="cpu"))
    before = fingerprint(many)
    tensors = load_file(files[-1])
    name = sorted(tensors)[0]
    tensors[name] += 1.0
    save_file(tensors, files[-1], metadata={"format": "pt"})
    assert fingerprint(many) != before
    files[-1].unlink()
    with pytest.raises(CheckpointError, match=r"could not be loaded|lacks weights"):
        load_model(resolve_model(str(parts)), device="cpu")


def test_licence_texts_come_along(tmp_path: Path) -> None:
    """Licence, notice and use policy are copied; weights, code and folders are not."""
    source, target = tmp_path / "a", tmp_path / "b"
    (source / "LICENSES").mkdir(parents=True)
    target.mkdir()
    for name in ("LICENSE", "licence.txt", "NOTICE.md", "USE_POLICY.md", "model.safetensors", "own.py", "README.md"):
        (source / name).write_text(name)
    copy_side_files(source, target)
    assert sorted(file.name for file in target.iterdir()) == ["LICENSE", "NOTICE.md", "USE_POLICY.md", "licence.txt"]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path, dict[str, Any]]:
    """A model, the folder it was saved to, and inputs."""
    model = random_model()
    save_model(model, tmp_path)
    return model, tmp_path, {"input_ids": torch.arange(20).reshape(2, 10)}


def test_a_faithful_copy_is_accepted(saved: tuple[Any, Path, dict[str, Any]]) -> None:
    """The difference of the logits is returned, and is zero."""
    model, folder, inputs = saved
    assert compare_reloaded(model, folder, inputs, tolerance=1e-4) == 0.0


def test_a_changed_weight_is_caught(saved: tuple[Any, Path, dict[str, Any]]) -> None:
    """One number in one tensor is enough."""
    model, folder, inputs = saved
    edit_weights(folder, "model.layers.1.mlp.down_proj.weight", 0.5)
    with pytest.raises(ExportError, match=r"logits differ by [0-9.e-]+ \(allowed 0.0001\); the folder is not kept"):
        compare_reloaded(model, folder, inputs, tolerance=1e-4)


def test_a_missing_or_extra_weight_is_caught(saved: tuple[Any, Path, dict[str, Any]]) -> None:
    """Even where transformers would fill it in, or pass over it, in silence."""
    model, folder, inputs = saved
    tensors = load_file(folder / "model.safetensors")
    extra = {**tensors, "model.layers.1.mlp.up_proj.bias": torch.zeros(96)}
    missing = {name: value for name, value in tensors.items() if name != "model.norm.weight"}
    for changed, name in ((extra, "up_proj.bias"), (missing, "model.norm.weight")):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ExportError, match=f"reloads with missing .* and unexpected .*{name}|missing .*{name}"):
            compare_reloaded(model, folder, inputs, tolerance=1e-4)


def test_a_folder_that_does_not_load_is_caught(saved: tuple[Any, Path, dict[str, Any]]) -> None:
    """A broken file is our error with the library's reason."""
    model, folder, inputs = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ExportError, match="the saved model does not load again"):
        compare_reloaded(model, folder, inputs, tolerance=1e-4)


def test_logits_that_are_not_finite_prove_nothing(saved: tuple[Any, Path, dict[str, Any]]) -> None:
    """NaN differs from NaN, so the message says what is really wrong."""
    model, _, inputs = saved
    nn.init.constant_(model.model.norm.weight, float("nan"))
    with pytest.raises(ExportError, match="logits are not finite"):
        compare_reloaded(model, saved[1], inputs, tolerance=1e-4)
