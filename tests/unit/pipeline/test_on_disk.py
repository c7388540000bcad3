"""Checkpoints cut from disk to disk: the folder is the one that the whole model in memory gives."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.errors import CheckpointError, PlanError
from secateur.export import export_huggingface
from secateur.families.geometry import Geometry
from secateur.files import CACHE_VARIABLE
from secateur.pipeline.on_disk import shrink_checkpoint
from secateur.records.plan import Plan
from secateur.records.units import EXPERT, EXPERT_CHANNEL, FFN_CHANNEL, GQA_GROUP
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.store.checkpoints import (
    Checkpoint,
    build_model,
    generation_data,
    load_model,
    load_tokenizer,
    resolve_model,
)
from secateur.store.tokenizers import smaller_tokenizer
from secateur.store.weights import kept_dtype
from tests.moe import moe_model
from tests.pico import pico_tokenizer, save_model_folder
from tests.pruning import choose_units, plan_keeping


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))


def moe_checkpoint(folder: Path, name: str, dtype: torch.dtype, **extra: Any) -> Checkpoint:
    """Save a tiny mixture of experts with a tokenizer and return its checkpoint."""
    tokenizer = pico_tokenizer()
    moe_model(name, dtype, vocab_size=len(tokenizer), **extra).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return resolve_model(str(folder))


def by_way_of_memory(checkpoint: Checkpoint, plan: Plan, folder: Path, **fitted: Any) -> None:
    """Cut the whole model in memory and export it."""
    geometry, dense = checkpoint.geometry, load_model(checkpoint, device="cpu")
    pruned = [
        (name, tensor.to(kept_dtype(dense, name, checkpoint.dtype)))
        for name, tensor in shrink_parameters(dense.state_dict().items(), plan, geometry, **fitted)
    ]
    generation = shrink_generation_config(generation_data(dense), plan)
    model = build_model(shrink_config(checkpoint.config, plan, geometry), pruned, dense, generation)
    tokenizer = load_tokenizer(checkpoint)
    if plan.vocabulary is not None:
        tokenizer = smaller_tokenizer(tokenizer, plan.vocabulary.keep)
    export_huggingface(model, tokenizer, plan, folder, source=checkpoint.folder, provenance={"model": "pico"})


def require_same_folders(ours: Path, theirs: Path) -> None:
    """Compare every file: weights tensor by tensor, the rest byte by byte."""
    assert sorted(file.name for file in ours.iterdir()) == sorted(file.name for file in theirs.iterdir())
    for file in theirs.iterdir():
        if file.suffix != ".safetensors":
            assert (ours / file.name).read_bytes() == file.read_bytes(), file.name
            continue
        found, expected = load_file(ours / file.name), load_file(file)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name


def uniform(geometry: Geometry) -> Plan:
    """Half the channels and groups."""
    return plan_keeping(geometry, choose_units(geometry, [FFN_CHANNEL, GQA_GROUP], "uniform"), "uniform")


def uneven(geometry: Geometry) -> Plan:
    """Different widths in the layers."""
    return plan_keeping(geometry, choose_units(geometry, [FFN_CHANNEL], "uneven"), "uneven")


def fewer_layers(geometry: Geometry) -> Plan:
    """The first layer goes."""
    kinds = [FFN_CHANNEL, GQA_GROUP]
    keep = {kind: [[], list(range(geometry.num_units(kind)[1]))] for kind in kinds}
    return plan_keeping(geometry, keep, "uniform")


def fewer_tokens(geometry: Geometry) -> Plan:
    """Channels and token ids go."""
    units = choose_units(geometry, [FFN_CHANNEL], "uniform")
    return plan_keeping(geometry, units, "uniform", tokens=range(geometry.dimensions["vocab_size"] - 7))


@pytest.mark.parametrize("make", [uniform, uneven, fewer_layers, fewer_tokens])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_folder_is_what_the_whole_model_in_memory_gives(
    tmp_path: Path, make: Callable[[Geometry], Plan], dtype: torch.dtype, tied: bool
) -> None:
    """Every file is the same, also where weights are cut in float32 and stored in bfloat16."""
    source = save_model_folder(tmp_path / "dense", dtype=dtype, tie_word_embeddings=tied)
    checkpoint = resolve_model(str(source))
    plan = make(checkpoint.geometry)
    by_way_of_memory(checkpoint, plan, tmp_path / "theirs")
    shrink_checkpoint(checkpoint, plan, tmp_path / "ours", provenance={"model": "pico"}, device="cpu")
    require_same_folders(tmp_path / "ours", tmp_path / "theirs")


def fewer_experts(geometry: Geometry) -> Plan:
    """Every second expert goes."""
    keep = [list(range(0, count, 2)) if count else [] for count in geometry.num_units(EXPERT)]
    return plan_keeping(geometry, {EXPERT: keep}, "uniform")


def narrower_experts(geometry: Geometry) -> Plan:
    """A third of the channels of every expert goes, in the last layer only."""
    units = geometry.num_units(EXPERT_CHANNEL)
    keep = [list(range(count)) for count in units]
    keep[-1] = [unit for unit in range(units[-1]) if unit % 3]
    return plan_keeping(geometry, {EXPERT_CHANNEL: keep}, "uneven")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss", "granitemoe"])
@pytest.mark.parametrize("make", [fewer_experts, narrower_experts])
def test_mixtures_of_experts_too(tmp_path: Path, name: str, make: Callable[[Geometry], Plan]) -> None:
    """Experts come from their own tensors, are cut in one piece, and go back to where hubs have them."""
    checkpoint = moe_checkpoint(tmp_path / "dense", name, torch.bfloat16)
    plan = make(checkpoint.geometry)
    by_way_of_memory(checkpoint, plan, tmp_path / "theirs")
    shrink_checkpoint(checkpoint, plan, tmp_path / "ours", provenance={"model": "pico"}, device="cpu")
    require_same_folders(tmp_path / "ours", tmp_path / "theirs")


def test_weights_are_reconstructed_on_the_way(tmp_path: Path) -> None:
    """What gives new weights is asked with the dense ones, as with the whole model in memory."""
    checkpoint = resolve_model(str(save_model_folder(tmp_path / "dense")))
    plan = uniform(checkpoint.geometry)

    def reconstruct(axis: Any, keep: Any, weight: Tensor) -> Tensor:
        return weight[:, list(keep)] + weight.mean() + axis.layer

    by_way_of_memory(checkpoint, plan, tmp_path / "theirs", reconstruct=reconstruct)
    shrink_checkpoint(checkpoint, plan, tmp_path / "ours", reconstruct, provenance={"model": "pico"}, device="cpu")
    require_same_folders(tmp_path / "ours", tmp_path / "theirs")


def test_several_files_come_out_where_one_would_be_too_large(tmp_path: Path) -> None:
    """They hold what the one file would."""
    checkpoint = resolve_model(str(save_model_folder(tmp_path / "dense")))
    plan = uniform(checkpoint.geometry)
    shrink_checkpoint(checkpoint, plan, tmp_path / "one", device="cpu")
    shrink_checkpoint(checkpoint, plan, tmp_path / "many", device="cpu", max_shard_bytes=40_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    together = {name: tensor for file in files for name, tensor in load_file(file).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert together.keys() == one.keys()
    assert all(torch.equal(tensor, one[name]) for name, tensor in together.items())


def test_nothing_is_left_behind_by_what_fails(tmp_path: Path) -> None:
    """A plan for another model is refused before anything is read; broken weights when they are reached."""
    source = save_model_folder(tmp_path / "dense")
    checkpoint = resolve_model(str(source))
    plan = uniform(checkpoint.geometry)
    other = resolve_model(str(save_model_folder(tmp_path / "other", intermediate_size=64)))
    with pytest.raises(PlanError, match="the model has"):
        shrink_checkpoint(other, plan, tmp_path / "ours", device="cpu")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight hold NaN"):
        shrink_checkpoint(checkpoint, plan, tmp_path / "ours", device="cpu")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["dense", "other"]


def test_the_plan_lies_beside_the_model(tmp_path: Path) -> None:
    """With where the model comes from, as a run writes it."""
    checkpoint = resolve_model(str(save_model_folder(tmp_path / "dense")))
    shrink_checkpoint(
        checkpoint, uniform(checkpoint.geometry), tmp_path / "ours", provenance={"model": "x"}, device="cpu"
    )
    data = json.loads((tmp_path / "ours" / "secateur_plan.json").read_text())
    assert data["provenance"] == {"model": "x"}
    assert (tmp_path / "ours" / "LICENSE").is_file()


WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_key_value_heads": 4, "head_dim": 64}
WIDE_EXPERTS = {"hidden_size": 256, "intermediate_size": 512, "num_key_value_heads": 2, "head_dim": 48}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_memory_grows_with_one_layer_not_with_the_model(tmp_path: Path, kind: str) -> None:
    """A model of twelve layers is cut with the memory of a few; what it takes to import the code is not counted."""
    if kind == "dense":
        save_model_folder(tmp_path / "small")
        save_model_folder(tmp_path / "large", num_hidden_layers=12, **WIDE)
    else:
        moe_checkpoint(tmp_path / "small", "mixtral", torch.float32)
        moe_checkpoint(tmp_path / "large", "mixtral", torch.float32, num_hidden_layers=12, **WIDE_EXPERTS)
    size = sum(file.stat().st_size for file in (tmp_path / "large").glob("*.safetensors"))
    assert size > 150_000_000
    command = [sys.executable, "-m", "tests.on_disk_child", *(str(tmp_path / n) for n in ("small", "large", "out"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout)
    if growth is None:
        pytest.skip("this system does not tell how much memory a process held")
    assert growth < 5 * size / 12
