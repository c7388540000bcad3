"""Nemotron-NAS folders: the formulas of their readers, the same answers by two readers, and refusals by name."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from secateur.errors import ExportError
from secateur.export import export_huggingface, nemotron_nas
from secateur.export.nemotron_nas import (
    NemotronNasPlan,
    expected_shapes,
    export_nemotron_nas,
    ffn_mult_of_width,
    plan_nemotron_nas,
    width_of_ffn_mult,
)
from secateur.families.loader import families
from tests.conftest import geometry_of
from tests.pico import save_model_folder
from tests.pruning import logits, plan_keeping, prune

SIZES = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
IDS = torch.arange(3, 43).reshape(2, 20)
ALL = list(range(512))
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def folder_of(parent: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a random model that Nemotron-NAS can express."""
    return save_model_folder(parent / "model", model_type=family, **{**SIZES, **changes})


def cut(source: Path, channels: list[list[int]], groups: list[list[int]], **more: list[list[int]]) -> Path:
    """Save what is left of a folder's model beside it, with the given channels and GQA groups."""
    dense = AutoModelForCausalLM.from_pretrained(source)
    geometry = geometry_of(dense, families()[dense.config.model_type])
    plan = plan_keeping(geometry, {"ffn_channel": channels, "gqa_group": groups, **more}, "uneven")
    target = source.parent / "uneven"
    tokenizer = AutoTokenizer.from_pretrained(source)
    export_huggingface(prune(dense, plan, geometry), tokenizer, plan, target, source=source, provenance={})
    return target


def fitting_folder(parent: Path, family: str = "llama", **changes: Any) -> Path:
    """Save a model without the attention of layer 1, the FFN of layer 2, all of layer 3, and half the FFN of 4."""
    channels = [ALL, ALL[:256], [], [], ALL[100:356]]
    both = [0, 1]
    return cut(folder_of(parent, family, **changes), channels, [both, [], both, [], both])


def awkward_folder(parent: Path) -> Path:
    """Save a model that lost key/value heads with their queries in layers 1 and 3, and has odd widths."""
    channels = [ALL[:300], ALL[:7], ALL, [], ALL[100:356]]
    return cut(folder_of(parent), channels, [[0, 1], [1], [0, 1], [0], [0, 1]])


def reference_logits(folder: Path, ids: Tensor) -> Tensor:
    """Return the logits of a Nemotron-NAS folder, computed from its files alone with plain tensor arithmetic."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    hidden, heads, eps = config["hidden_size"], config["num_attention_heads"], config["rms_norm_eps"]
    size, length = hidden // heads, ids.shape[1]
    angles = torch.arange(length).double()[:, None] * _frequencies(config, size)
    cos, sin = (torch.cat([part, part], dim=-1) for part in (angles.cos(), angles.sin()))

    def norm(values: Tensor, name: str) -> Tensor:
        return values / (values.square().mean(-1, keepdim=True) + eps).sqrt() * weights[f"{name}.weight"]

    def rotated(values: Tensor) -> Tensor:
        first, second = values.chunk(2, dim=-1)
        return values * cos + torch.cat([-second, first], dim=-1) * sin

    def split(values: Tensor) -> Tensor:
        return values.unflatten(-1, (-1, size)).transpose(1, 2)

    stream = weights["model.embed_tokens.weight"][ids]
    for number, block in enumerate(config["block_configs"]):
        layer = f"model.layers.{number}"
        if not block["attention"]["no_op"]:
            inputs = norm(stream, f"{layer}.input_layernorm")
            parts = [inputs @ weights[f"{layer}.self_attn.{part}_proj.weight"].T for part in "qkv"]
            query, key, value = rotated(split(parts[0])), rotated(split(parts[1])), split(parts[2])
            key, value = (part.repeat_interleave(block["attention"]["n_heads_in_group"], 1) for part in (key, value))
            scores = query @ key.transpose(-1, -2) / size**0.5
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), float("-inf"))
            mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
            stream = stream + mixed @ weights[f"{layer}.self_attn.o_proj.weight"].T
        if not block["ffn"]["no_op"]:
            width = width_of_ffn_mult(block["ffn"]["ffn_mult"], hidden)
            inputs = norm(stream, f"{layer}.post_attention_layernorm")
            gate, up = (inputs @ weights[f"{layer}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            assert gate.shape[-1] == width
            stream = stream + (functional.silu(gate) * up) @ weights[f"{layer}.mlp.down_proj.weight"].T
    head = weights["model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"]
    return norm(stream, "model.norm") @ head.T


def _frequencies(config: dict[str, Any], size: int) -> Tensor:
    """Return the rotary frequencies by the keys that older readers know: ``rope_theta`` and ``rope_scaling``."""
    frequencies = config["rope_theta"] ** -(torch.arange(0, size, 2).double() / size)
    scaling = config["rope_scaling"]
    if scaling is None:
        return frequencies
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * torch.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (smooth + (1 - smooth) / scaling["factor"])


@pytest.mark.parametrize("hidden_size", [64, 576, 768, 960, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 16384])
def test_every_multiple_of_256_has_a_factor(hidden_size: int) -> None:
    """Hidden sizes of real models: the readers' arithmetic gives exactly the width back, written as JSON or not."""
    for width in range(256, 8 * 16384 + 1, 256):
        ffn_mult = json.loads(json.dumps(ffn_mult_of_width(width, hidden_size)))
        size = int(2 * ffn_mult * hidden_size / 3)
        assert size + (-size) % 256 == width == width_of_ffn_mult(ffn_mult, hidden_size)
        assert round(ffn_mult, 6) == ffn_mult


@pytest.mark.parametrize("ffn_mult", [0.5, 1.0, 1.3125, 1.95, 2.625, 5.25])
def test_the_width_is_rounded_up(ffn_mult: float) -> None:
    """As vLLM does it, for factors of NVIDIA's 49-billion model among others."""
    size = int(2 * ffn_mult * 8192 / 3)
    assert 0 <= width_of_ffn_mult(ffn_mult, 8192) - size < 256
    assert width_of_ffn_mult(5.25, 8192) == 28672


def test_a_width_that_no_factor_gives_is_refused() -> None:
    """Its neighbours are named."""
    with pytest.raises(ExportError, match="width of 300; nearest that can be had: 256 or 512"):
        ffn_mult_of_width(300, 64)
    with pytest.raises(ExportError, match="width of 0; nearest that can be had: 256"):
        ffn_mult_of_width(0, 64)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
        ("mistral", {"sliding_window": None}),
    ],
)
def test_the_folder_computes_what_the_model_does(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """By arithmetic that reads only the folder, with layers that lost sub-layers; nothing is added or left out."""
    source = fitting_folder(tmp_path, family, **changes)
    report = export_nemotron_nas(source, tmp_path / "out" / "nas")
    config = json.loads((report.path / "config.json").read_text())
    blocks = config["block_configs"]
    assert [block["attention"]["no_op"] for block in blocks] == [False, True, False, False]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, None, 2, 2]
    assert [block["ffn"]["no_op"] for block in blocks] == [False, False, True, False]
    assert report.num_layers == config["num_hidden_layers"] == 4 and report.added_parameters == 0
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    assert torch.allclose(reference_logits(report.path, IDS), logits(model, IDS), atol=1e-4)
    stored = load_file(report.path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        parameter.numel() for parameter in model.parameters()
    )


def test_zeros_fill_up_what_cannot_be_said(tmp_path: Path) -> None:
    """Odd widths and fewer heads: the same logits, the zeros counted and told of."""
    source = awkward_folder(tmp_path)
    report = export_nemotron_nas(source, tmp_path / "nas", round_to_fit=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    assert torch.allclose(reference_logits(report.path, IDS), logits(model, IDS), atol=1e-4)
    blocks = json.loads((report.path / "config.json").read_text())["block_configs"]
    assert [block["attention"]["n_heads_in_group"] for block in blocks] == [2, 4, 2, 4, 2]
    stored = load_file(report.path / "model.safetensors")
    added = sum(tensor.numel() for tensor in stored.values()) - sum(p.numel() for p in model.parameters())
    assert report.added_parameters == added > 0
    assert any(f"{added:,} zeros were added in 3 layers" in note for note in report.notes)
    assert any("SGLang refuses" in note and "1 and 2 key/value heads" in note for note in report.notes)


@pytest.mark.parametrize(
    ("heads", "groups", "queries"),
    [
        (6, [[0], [0, 1], [0, 1, 2], [2], [1, 2]], None),
        (12, [[0, 1, 2]] * 5, [[0, 1, 4, 5, 8, 9], [1, 6, 11], [0, 1, 2, 4, 5, 6, 8, 9, 10], [*range(12)], [3, 4, 8]]),
        (9, [[0, 1]] * 5, None),
    ],
)
def test_any_heads_can_be_filled_up(
    heads: int, groups: list[list[int]], queries: list[list[int]] | None, tmp_path: Path
) -> None:
    """Three groups of any size, of which some queries are left: where no division fits, a group is shared out."""
    source = folder_of(
        tmp_path, hidden_size=16 * heads, num_attention_heads=heads, num_key_value_heads=3, num_hidden_layers=5
    )
    pruned = cut(source, [ALL] * 5, groups, **({} if queries is None else {"query_head": queries}))
    report = export_nemotron_nas(pruned, tmp_path / "nas", round_to_fit=True)
    model = AutoModelForCausalLM.from_pretrained(pruned, dtype=torch.float64)
    assert torch.allclose(reference_logits(report.path, IDS), logits(model, IDS), atol=1e-4)


def test_what_cannot_be_said_is_refused_by_layer(tmp_path: Path) -> None:
    """All of it in one message, before anything is written."""
    source = awkward_folder(tmp_path)
    with pytest.raises(ExportError) as caught:
        export_nemotron_nas(source, tmp_path / "nas")
    message = str(caught.value)
    assert "layer 0 has 300 (nearest: 256 or 512), layer 1 has 7 (nearest: 256)" in message
    assert "keep 4 query heads, and layer 1 has 2, layer 3 has 2" in message
    assert "Prune channels in multiples of 256, and whole layers or sub-layers instead of gqa_groups" in message
    assert not (tmp_path / "nas").exists()


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("qwen3", {}, "type 'qwen3' are computed otherwise .* llama, mistral"),
        ("phi", {}, "type 'phi'"),
        (
            "llama",
            {"attention_bias": True},
            r"has biases \(.*k_proj.bias, .* and 16 more\), and TensorRT-LLM and SGLang",
        ),
        ("llama", {"mlp_bias": True}, "has biases"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act of this model is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "are 'linear'"),
    ],
)
def test_models_that_compute_otherwise_are_refused(
    family: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Other families, biases, activation functions and rotary scalings."""
    folder = folder_of(tmp_path, family, **changes)
    with pytest.raises(ExportError, match=words):
        export_nemotron_nas(folder, tmp_path / "nas")


def plan(config: dict[str, Any], **changed: tuple[int, ...] | None) -> NemotronNasPlan:
    """Return the plan of a llama of two layers some of whose shapes are others; None takes a parameter away."""
    shapes = {**SHAPES, **{name.replace("__", "."): shape for name, shape in changed.items()}}
    return plan_nemotron_nas(config, {name: shape for name, shape in shapes.items() if shape is not None})


CONFIG = {
    **SIZES,
    "num_hidden_layers": 2,
    "model_type": "llama",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
SHAPES = expected_shapes(
    {
        **CONFIG,
        "block_configs": [
            {
                "attention": {"no_op": False, "n_heads_in_group": 2},
                "ffn": {"no_op": False, "ffn_mult": ffn_mult_of_width(512, 64)},
            }
        ]
        * 2,
    }
)


def test_nothing_is_left_behind_and_nothing_made_up() -> None:
    """A parameter without a place, and a place without a parameter, are errors; a tied head and old buffers are not."""
    assert len(plan(CONFIG, **{"lm_head.weight": (416, 64)}).tensors) == len(SHAPES)
    plan(CONFIG, **{"model.layers.0.self_attn.rotary_emb.inv_freq": (8,)})
    with pytest.raises(ExportError, match=r"has no place for model.layers.1.self_attn.q_norm.weight; leaving"):
        plan(CONFIG, **{"model.layers.1.self_attn.q_norm.weight": (16,)})
    for name in ("self_attn.k_proj", "input_layernorm", "post_attention_layernorm", "mlp.up_proj"):
        with pytest.raises(ExportError, match=rf"has no parameter model.layers.1.{name}.weight"):
            plan(CONFIG, **{f"model.layers.1.{name}.weight": None})
    with pytest.raises(ExportError, match=r"has no parameter lm_head.weight"):
        plan({**CONFIG, "tie_word_embeddings": False})
    with pytest.raises(ExportError, match="every layer of this model was removed"):
        plan(CONFIG, **{name: None for name in SHAPES if "layers" in name})


def test_a_first_layer_without_attention_gets_one_of_zeros() -> None:
    """The second norm of vLLM and SGLang would have no stream to add to; later layers need none."""
    gone = {name: None for name in SHAPES if "layers.0.self_attn" in name or "layers.0.input" in name}
    with pytest.raises(ExportError, match="the first layer must have attention, and layer 0 has none"):
        plan(CONFIG, **gone)
    filled = plan_nemotron_nas(CONFIG, {name: SHAPES[name] for name in SHAPES if name not in gone}, round_to_fit=True)
    made = {tensor.name: (tensor.shape, tensor.parameter, tensor.fill) for tensor in filled.tensors}
    assert made["model.layers.0.self_attn.q_proj.weight"] == ((64, 64), None, 0.0)
    assert made["model.layers.0.self_attn.k_proj.weight"] == ((16, 64), None, 0.0)
    assert made["model.layers.0.input_layernorm.weight"] == ((64,), None, 1.0)
    assert filled.config["block_configs"][0]["attention"]["n_heads_in_group"] == 4
    assert any("zeros were added in 1 layers" in note for note in filled.notes)


def test_layers_that_lost_both_sublayers_are_left_out() -> None:
    """Later layers move up, and are made from the parameters of their old place."""
    left = plan(CONFIG, **{name: None for name in SHAPES if "layers.0" in name})
    assert left.config["num_hidden_layers"] == 1
    assert {"model.layers.0.mlp.up_proj.weight": "model.layers.1.mlp.up_proj.weight"}.items() <= {
        tensor.name: tensor.parameter for tensor in left.tensors
    }.items()
    assert any("1 layers that had lost both" in note for note in left.notes)


def test_heads_that_do_not_make_up_the_stream_are_refused() -> None:
    """Engines derive the size of a head from hidden_size, so no head may be too many."""
    with pytest.raises(ExportError, match="no multiple of its head_dim 24"):
        plan({**CONFIG, "head_dim": 24})
    with pytest.raises(ExportError, match="layer 0 of this model has 8 query heads of 16, more than hidden_size 64"):
        plan(CONFIG, **{"model.layers.0.self_attn.q_proj.weight": (128, 64)})


def test_a_window_becomes_the_context_length() -> None:
    """Nemotron-NAS slides none."""
    sliding = plan({**CONFIG, "model_type": "mistral", "sliding_window": 32})
    assert sliding.config["max_position_embeddings"] == 32
    assert any("window of 32 tokens (the model's is 256)" in note for note in sliding.notes)
    assert plan({**CONFIG, "model_type": "mistral", "sliding_window": 4096}).config["max_position_embeddings"] == 256


def test_transformers_reads_the_configuration(tmp_path: Path) -> None:
    """Engines take it from transformers, with the code in the folder, and read blocks as attributes; it saves again."""
    source = fitting_folder(tmp_path, rope_parameters=LLAMA3)
    report = export_nemotron_nas(source, tmp_path / "nas")
    config = AutoConfig.from_pretrained(report.path, trust_remote_code=True)
    assert config.model_type == "nemotron-nas" and config.architectures == ["DeciLMForCausalLM"]
    assert [block.attention.no_op for block in config.block_configs] == [False, True, False, False]
    first = config.block_configs[0]
    assert config.num_attention_heads // first.attention.n_heads_in_group == 2
    assert width_of_ffn_mult(first.ffn.ffn_mult, config.hidden_size) == 512
    assert not hasattr(first.ffn, "intermediate_size") and not first.ffn.replace_with_linear
    assert config.rope_parameters == LLAMA3
    config.save_pretrained(tmp_path / "again")
    again = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert again.to_dict()["block_configs"] == config.to_dict()["block_configs"]
    assert again.block_configs[1].attention.no_op is True


def test_the_tokenizer_and_what_lies_beside_it_come_along(tmp_path: Path) -> None:
    """Licence and generation settings too."""
    report = export_nemotron_nas(folder_of(tmp_path), tmp_path / "nas")
    names = {file.name for file in report.path.iterdir()}
    assert {"tokenizer.json", "LICENSE", "generation_config.json", "configuration_decilm.py"} <= names


def test_large_models_are_written_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index that names the file of every tensor."""
    monkeypatch.setattr(nemotron_nas, "_SHARD_BYTES", 300_000)
    report = export_nemotron_nas(folder_of(tmp_path), tmp_path / "nas")
    index = json.loads((report.path / "model.safetensors.index.json").read_text())
    files = sorted(report.path.glob("*.safetensors"))
    assert len(files) > 2
    assert {name: file.name for file in files for name in load_file(file)} == index["weight_map"]
    assert index["metadata"]["total_size"] <= report.size_bytes


def test_a_folder_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values are compared with the model, and shapes with what the folder's own configuration says."""
    source, target = folder_of(tmp_path), tmp_path / "nas"
    save = nemotron_nas.save_file

    def spoilt(tensors: dict[str, Tensor], *args: Any, **options: Any) -> None:
        save({name: tensor + (name == "model.norm.weight") for name, tensor in tensors.items()}, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(nemotron_nas, "save_file", spoilt)
        with pytest.raises(ExportError, match=r"model.norm.weight reads back differently"):
            export_nemotron_nas(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(nemotron_nas, "ffn_mult_of_width", lambda width, hidden: ffn_mult_of_width(width + 256, hidden))
        with pytest.raises(ExportError, match=r"reads back with other tensors than its config.json says"):
            export_nemotron_nas(source, target)
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("inf")
    model.save_pretrained(source)
    with pytest.raises(ExportError, match=r"model.layers.1.mlp.up_proj.weight has values that are not finite"):
        export_nemotron_nas(source, target)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("filled", [False, True])
def test_mlx_lm_runs_the_folder(filled: bool, tmp_path: Path) -> None:
    """An engine with its own code for this class gives the same logits, at once and token by token."""
    pytest.importorskip("mlx.core", reason="mlx is not installed (pip install 'mlx[cpu]' mlx-lm)")
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    cache_module = importlib.import_module("mlx_lm.models.cache")
    mx: Any = sys.modules["mlx.core"]
    source = awkward_folder(tmp_path) if filled else fitting_folder(tmp_path)
    report = export_nemotron_nas(source, tmp_path / "nas", round_to_fit=filled)
    engine, _ = utils.load_model(report.path, lazy=False)
    expected = logits(AutoModelForCausalLM.from_pretrained(source), IDS)
    found = torch.tensor(engine(mx.array(IDS.tolist())).tolist())
    assert torch.allclose(found, expected, atol=1e-3)
    cache = cache_module.make_prompt_cache(engine)
    steps = [engine(mx.array(IDS[:, place : place + 1].tolist()), cache=cache).tolist() for place in range(20)]
    assert torch.allclose(torch.cat([torch.tensor(step) for step in steps], dim=1), expected, atol=1e-3)
