"""Weights of a checkpoint by the model's names: the same as loading the whole model gives, one entry at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.errors import CheckpointError
from secateur.families.loader import families
from secateur.files import CACHE_VARIABLE
from secateur.store.checkpoints import resolve_model
from secateur.store.weights import StoredWeights, iter_parameters, weightless_model
from tests.conftest import WITH_EXPERTS, pico_model
from tests.moe import moe_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))


def load(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the state of the model that transformers loads, tied entries once."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Change the tensors of a file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("shard_size", ["5GB", "40KB"], ids=["whole", "sharded"])
def test_what_is_stored_in_parts_is_read_as_transformers_puts_it_together(
    tmp_path: Path, name: str, shard_size: str
) -> None:
    """Every entry of the state, fused experts and stored buffers too, is that of the loaded model, in its order."""
    moe_model(name).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) is (shard_size == "40KB")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = load(tmp_path, dtype)
        found = dict(iter_parameters(resolve_model(str(tmp_path)), dtype=dtype))
        assert list(found) == list(expected)
        for name, value in found.items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])


def test_only_the_parts_of_what_is_asked_for_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The experts of one layer are no reason to open what another layer's are in."""
    moe_model("qwen3_moe").save_pretrained(tmp_path)
    model = weightless_model(resolve_model(str(tmp_path)), torch.float32)
    weights = StoredWeights(resolve_model(str(tmp_path)), model, torch.float32, CPU)
    read: list[str] = []
    copy_one = StoredWeights._copy

    def note(self: StoredWeights, reader: Any, stored: str, name: str) -> Tensor:
        read.append(stored)
        return copy_one(self, reader, stored, name)

    monkeypatch.setattr(StoredWeights, "_copy", note)
    found = weights.read(["model.layers.1.mlp.experts.down_proj", "model.layers.1.no_such_entry"])
    assert list(found) == ["model.layers.1.mlp.experts.down_proj"]
    assert read == [f"model.layers.1.mlp.experts.{expert}.down_proj.weight" for expert in range(12)]


def test_experts_that_are_stored_fused_need_no_rule(tmp_path: Path) -> None:
    """Files that hold the model's own names, as a save without conversion writes them, are read as they are."""
    moe_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    expected = load(tmp_path, torch.float32)
    found = dict(iter_parameters(resolve_model(str(tmp_path))))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.parametrize("name", ["1.mlp.experts.11.up_proj.weight", "1.mlp.experts.11.down_proj.weight"])
def test_an_expert_that_lacks_a_part_is_our_error(tmp_path: Path, name: str) -> None:
    """Neither torch's error nor a model with fewer experts comes out."""
    moe_model("qwen3_moe").save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", lambda tensors: tensors.pop(f"model.layers.{name}"))
    with pytest.raises(CheckpointError, match=r"could not be loaded: .*Fetch it again|with shape \(11, 48, "):
        dict(iter_parameters(resolve_model(str(tmp_path))))


def test_absent_experts_and_buffers_are_named_before_anything_is_read(tmp_path: Path) -> None:
    """What the model needs and the files lack is known from the names."""
    moe_model("deepseek_v3").save_pretrained(tmp_path)

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            if name.endswith(("down_proj.weight", "e_score_correction_bias")) and ".1.mlp." in name:
                tensors.pop(name)

    edit(tmp_path / "model.safetensors", drop)
    with pytest.raises(CheckpointError, match=r"lacks weights: model\.layers\.1\.mlp\.experts\.down_proj, .*bias"):
        iter_parameters(resolve_model(str(tmp_path)))


def test_experts_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """By the name that the model has for them."""
    moe_model("mixtral").save_pretrained(tmp_path)
    stored = next(
        n for n in load_file(tmp_path / "model.safetensors") if ".1." in n and n.endswith("experts.3.w1.weight")
    )
    edit(tmp_path / "model.safetensors", lambda tensors: tensors[stored][0].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"weights of model\.layers\.1\..*experts\.gate_up_proj hold NaN"):
        dict(iter_parameters(resolve_model(str(tmp_path))))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_tied_tensors_come_once_in_the_order_of_the_model(tmp_path: Path, family: str, tied: bool) -> None:
    """What comes is the loaded model's state without the names that are tied to others."""
    pico_model(families()[family], torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path)
    expected = load(tmp_path, torch.float32)
    found = dict(iter_parameters(resolve_model(str(tmp_path))))
    assert list(found) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_tie_of_which_only_the_other_end_is_stored_is_read_from_there(tmp_path: Path) -> None:
    """As transformers does, where a file names the head but not the embedding."""
    pico_model(families()["llama"], torch.float32, tie_word_embeddings=True).save_pretrained(tmp_path)

    def swap(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit(tmp_path / "model.safetensors", swap)
    found = dict(iter_parameters(resolve_model(str(tmp_path))))
    assert "lm_head.weight" not in found
    assert torch.equal(found["model.embed_tokens.weight"], load(tmp_path, torch.float32)["model.embed_tokens.weight"])


def test_a_transformers_without_the_rules_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its version and the one that will do are said."""
    from transformers import core_model_loading

    moe_model("qwen3_moe").save_pretrained(tmp_path)
    monkeypatch.delattr(core_model_loading, "rename_source_key")
    with pytest.raises(CheckpointError, match=r"transformers 5\S+ does not say .*Install transformers>=5\.15,<6"):
        iter_parameters(resolve_model(str(tmp_path)))
