"""Model folders written one parameter at a time: the same as saving the whole model, and nothing half done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.errors import CheckpointError, PlanError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.store.checkpoints import save_model
from secateur.store.shards import write_checkpoint
from tests.conftest import WITH_EXPERTS, pico_model
from tests.moe import moe_model


def parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Give a model's state as a writer takes it."""
    yield from model.state_dict().items()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Return everything that a folder's weight files hold."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def files_in(folder: Path) -> set[str]:
    """Return the names of a folder's files."""
    return {file.name for file in folder.iterdir()}


def require_same_folders(ours: Path, theirs: Path) -> None:
    """Compare files, configurations and every stored tensor."""
    assert files_in(ours) == files_in(theirs)
    for file in ours.glob("*.json"):
        assert json.loads(file.read_text()) == json.loads((theirs / file.name).read_text()), file.name
    found, expected = tensors_in(ours), tensors_in(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_written_as_hubs_have_them(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Names, pieces, configuration and files are those of a whole save."""
    model = moe_model(name, dtype)
    save_model(model, tmp_path / "whole")
    write_checkpoint(tmp_path / "ours", model.config.to_dict(), parameters(model))
    require_same_folders(tmp_path / "ours", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_family_is_written_as_by_a_whole_save(tmp_path: Path, family: Family, tied: bool) -> None:
    """A tied head, which comes as often as the embedding, is stored once."""
    model = pico_model(family, torch.float32, tie_word_embeddings=tied)
    save_model(model, tmp_path / "whole")
    write_checkpoint(tmp_path / "ours", model.config.to_dict(), parameters(model))
    require_same_folders(tmp_path / "ours", tmp_path / "whole")


def test_a_head_that_differs_from_the_embedding_it_should_be_tied_to_is_kept(tmp_path: Path) -> None:
    """Transformers does not tie two stored tensors that differ, so both have to be there."""
    model = pico_model(families()["llama"], torch.float32, tie_word_embeddings=False)
    write_checkpoint(tmp_path / "ours", {**model.config.to_dict(), "tie_word_embeddings": True}, parameters(model))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert torch.equal(loaded.model.embed_tokens.weight, model.model.embed_tokens.weight)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "deepseek_v3"])
def test_several_files_have_an_index_as_transformers_writes_it(tmp_path: Path, model_type: str) -> None:
    """No file is larger than allowed, the index says where everything is, and the folder loads to the same bits."""
    model = moe_model(model_type)
    save_model(model, tmp_path / "whole", max_shard_size="60KB")
    write_checkpoint(tmp_path / "ours", model.config.to_dict(), parameters(model), 60_000)
    index, theirs = (
        json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("ours", "whole")
    )
    assert index["metadata"] == theirs["metadata"]
    assert index["weight_map"].keys() == theirs["weight_map"].keys()
    assert len(set(index["weight_map"].values())) > 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "ours" / file, framework="pt") as reader:
            assert name in reader.keys()
    found, expected = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "whole")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    for file in (tmp_path / "ours").glob("*.safetensors"):
        assert sum(tensor.nbytes for tensor in load_file(file).values()) <= 60_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_what_a_model_keeps_in_float32_is_not_rounded(tmp_path: Path) -> None:
    """Asked for bfloat16, the correction of DeepSeek's router stays as it is; the rest is rounded."""
    model = moe_model("deepseek_v3")
    write_checkpoint(tmp_path / "ours", model.config.to_dict(), parameters(model), dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = tensors_in(tmp_path / "ours")
    assert torch.equal(tensors.pop(name), model.state_dict()[name])
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


def test_odd_widths_leave_no_wider_number_unaligned(tmp_path: Path) -> None:
    """Every tensor begins at a multiple of its number's size, as readers that map files expect; nothing is lost."""
    model = pico_model(families()["gpt2"], torch.bfloat16, n_inner=63)
    state = {name: value.float() if "ln_" in name else value for name, value in model.state_dict().items()}
    write_checkpoint(tmp_path / "ours", model.config.to_dict(), iter(state.items()))
    found, file = tensors_in(tmp_path / "ours"), tmp_path / "ours" / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    entries = json.loads(file.read_bytes()[8 : 8 + length])
    entries.pop("__metadata__")
    assert length % 8 == 0
    assert len({entry["dtype"] for entry in entries.values()}) == 2
    assert any(found[name].numel() % 2 for name in entries)
    for name, entry in entries.items():
        assert entry["data_offsets"][0] % found[name].element_size() == 0
    assert all(torch.equal(found[name], value) for name, value in state.items() if name in found)


def test_a_parameter_of_another_shape_or_name_or_none_is_our_error(tmp_path: Path) -> None:
    """What is wrong is said, an earlier folder stays, and nothing else is left behind."""
    model = pico_model(families()["llama"], torch.float32)
    config, state = model.config.to_dict(), model.state_dict()
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "earlier").touch()
    norm = "model.norm.weight"
    for changed, message in (
        ({**state, norm: torch.zeros(3)}, r"model\.norm\.weight has shape \(3,\), the configuration says \(48,\)"),
        ({**state, "model.extra": torch.zeros(3)}, r"has no parameter model\.extra"),
        ({name: value for name, value in state.items() if name != norm}, r"model\.norm\.weight did not come"),
    ):
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint(tmp_path / "ours", config, iter(changed.items()))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight came twice"):
        write_checkpoint(tmp_path / "ours", config, [*state.items(), (norm, state[norm])])
    with pytest.raises(PlanError, match="refuses the planned sizes"):
        write_checkpoint(tmp_path / "ours", {**config, "num_attention_heads": 5}, iter(state.items()))
    assert files_in(tmp_path) == {"ours"}
    assert files_in(tmp_path / "ours") == {"earlier"}
