"""GGUF files: the same model, read by another's reader and by our own; whole or not there at all."""

from __future__ import annotations

import errno
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import ExportError, UnavailableError
from secateur.export import export_huggingface, gguf
from secateur.export.gguf import export_gguf
from secateur.export.gguf_architectures import architectures
from secateur.export.gguf_types import PLAIN
from secateur.families.loader import families
from secateur.store.checkpoints import save_model
from tests.conftest import geometry_of
from tests.pico import pico_tokenizer, random_model, save_model_folder
from tests.pruning import logits, plan_keeping, prune

SIZES = {
    "vocab_size": 416,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
GPT2_SIZES = {"vocab_size": 416, "n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 1024}
needs_library = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
IDS = torch.arange(3, 43).reshape(2, 20)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def folder_of(parent: Path, family: str, **changes: Any) -> Path:
    """Save a random model of a family that llama.cpp can express; Gemma's window is shorter than the text."""
    options: dict[str, Any] = dict(GPT2_SIZES if family == "gpt2" else SIZES)
    if family.startswith("gemma"):
        options |= {"query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6}
    if family == "mistral":
        options |= {"sliding_window": None}
    return save_model_folder(parent / "model", model_type=family, **{**options, **changes})


def uneven_folder(parent: Path, family: str, **changes: Any) -> Path:
    """Save a model that lost the attention of layer 2, the FFN of layer 1, all of layer 3 and parts of the others."""
    source = folder_of(parent, family, **changes)
    dense = AutoModelForCausalLM.from_pretrained(source)
    geometry = geometry_of(dense, families()[family])
    channels = [list(range(64)), [], list(range(32, 96)), []]
    groups: list[list[int]] = [[1], [0, 1], [], []]
    plan = plan_keeping(geometry, {"ffn_channel": channels, "gqa_group": groups}, "uneven")
    target = parent / "uneven"
    tokenizer = AutoTokenizer.from_pretrained(source)
    export_huggingface(prune(dense, plan, geometry), tokenizer, plan, target, source=source, provenance={})
    return target


def read(file: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return a file's keys and its tensors in float32."""
    reader = GGUFReader(file)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    return keys, {tensor.name: quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}


def test_weights_in_several_files_make_the_same_file(tmp_path: Path) -> None:
    """A folder whose weights are spread over files with an index is written as one with a single file."""
    folder = uneven_folder(tmp_path, "llama")
    parts = shutil.copytree(folder, tmp_path / "parts" / "uneven", ignore=shutil.ignore_patterns("*.safetensors"))
    save_model(AutoModelForCausalLM.from_pretrained(folder), parts, max_shard_size="50KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    files = [export_gguf(place, tmp_path / f"{number}.gguf").file for number, place in enumerate((folder, parts))]
    assert files[0].read_bytes() == files[1].read_bytes()


def halves(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Return rows as transformers keeps them, from rows with rotary pairs side by side."""
    heads = [rows[start : start + head_dim] for start in range(0, len(rows), head_dim)]
    return np.concatenate([np.concatenate([head[0::2], head[1::2]]) for head in heads])


@pytest.mark.parametrize("name", [name for name in architectures() if name not in ("phi", "gpt_neox")])
def test_transformers_reads_the_same_model_back(name: str, tmp_path: Path) -> None:
    """Every family, by a reader that is not ours: the logits of the file are those of the folder."""
    changes = {"head_dim": 128} if name == "qwen3" else {}  # its reader takes no other
    folder = folder_of(tmp_path, name, **changes)
    report = export_gguf(folder, tmp_path / "out" / "model.gguf", quantize="F32")
    assert report.largest_error == 0.0
    assert report.size_bytes == report.file.stat().st_size
    dense = AutoModelForCausalLM.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    loaded.config.use_cache = False
    for key, value in dense.named_parameters():
        assert torch.allclose(loaded.get_parameter(key), value, atol=1e-6), key
    if not name.startswith("gemma"):  # its reader knows neither the window nor the scale
        assert torch.allclose(logits(loaded, IDS), logits(dense, IDS), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}),
        ("qwen2", {}),
        ("mistral", {}),
    ],
)
def test_layers_that_differ_become_deci(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Sizes stand per layer, a missing FFN is zeros, a missing attention is absent, a missing layer is left out."""
    folder = uneven_folder(tmp_path, name, **changes)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    keys, tensors = read(report.file)
    assert report.architecture == keys["general.architecture"] == "deci"
    assert keys["deci.block_count"] == 3
    assert keys["deci.attention.head_count"] == [2, 4, 0]
    assert keys["deci.attention.head_count_kv"] == [1, 2, 0]
    assert keys["deci.feed_forward_length"] == [64, 32, 64]
    assert keys["deci.attention.key_length"] == keys["deci.rope.dimension_count"] == 16
    assert any("'deci'" in note for note in report.notes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    for layer in (0, 1):
        for part in ("q", "k"):
            for kind in ("weight", "bias"):
                ours = f"model.layers.{layer}.self_attn.{part}_proj.{kind}"
                assert (ours in state) == (f"blk.{layer}.attn_{part}.{kind}" in tensors)
                if ours in state:
                    assert np.array_equal(halves(tensors[f"blk.{layer}.attn_{part}.{kind}"], 16), state[ours])
        assert np.array_equal(
            tensors[f"blk.{layer}.attn_v.weight"], state[f"model.layers.{layer}.self_attn.v_proj.weight"]
        )
    assert np.array_equal(tensors["blk.2.ffn_down.weight"], state["model.layers.2.mlp.down_proj.weight"])
    assert {key for key in tensors if key.startswith("blk.2.attn")} == set()
    assert all((tensors[f"blk.1.ffn_{part}.weight"] == 0).all() for part in ("gate", "up", "down"))
    assert (tensors["blk.1.ffn_norm.weight"] == 1).all()
    assert ("output.weight" in tensors) is not model.config.tie_word_embeddings


def test_qwen3_layers_that_differ_become_openelm(tmp_path: Path) -> None:
    """Queries, keys and values in one matrix, unordered; missing sub-layers are zeros; a head of its own is refused."""
    folder = uneven_folder(tmp_path, "qwen3", tie_word_embeddings=True)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    keys, tensors = read(report.file)
    assert report.architecture == "openelm"
    assert keys["openelm.attention.head_count"] == [2, 4, 1]
    assert keys["openelm.attention.head_count_kv"] == [1, 2, 1]
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    expected = torch.cat([state[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"])
    assert np.array_equal(tensors["blk.0.attn_qkv.weight"], expected.numpy())
    assert tensors["blk.2.attn_qkv.weight"].shape == (3 * 16, 64)
    assert (tensors["blk.2.attn_qkv.weight"] == 0).all() and (tensors["blk.2.attn_output.weight"] == 0).all()
    shutil.rmtree(tmp_path / "model")
    untied = uneven_folder(tmp_path, "qwen3", tie_word_embeddings=False)
    with pytest.raises(ExportError, match="not tied to its embedding"):
        export_gguf(untied, tmp_path / "untied.gguf")


def test_gpt_neox_keeps_query_key_and_value_of_each_head_together_and_llama_cpp_does_not(tmp_path: Path) -> None:
    """Weights and biases alike; an approximated activation is said, another residual is a key of the file."""
    folder = folder_of(tmp_path, "gpt_neox", use_parallel_residual=False)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.gpt_neox.layers[1].attention.query_key_value.bias.copy_(torch.randn(192))
    model.save_pretrained(folder)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    keys, tensors = read(report.file)
    assert keys["gptneox.use_parallel_residual"] is False and keys["gptneox.rope.dimension_count"] == 4
    assert any("approximates hidden_act 'gelu'" in note for note in report.notes)
    layer = model.gpt_neox.layers[1].attention.query_key_value
    for kind in ("weight", "bias"):
        theirs, ours = tensors[f"blk.1.attn_qkv.{kind}"], layer.get_parameter(kind).detach().numpy()
        for part in range(3):
            for head in range(4):
                expected = ours[head * 48 + part * 16 : head * 48 + (part + 1) * 16]
                assert np.array_equal(theirs[part * 64 + head * 16 : part * 64 + (head + 1) * 16], expected)


def test_the_head_of_phi_has_a_bias(tmp_path: Path) -> None:
    """Others' is refused; and so is a phi whose head is tied, because llama.cpp reads a head of its own."""
    folder = folder_of(tmp_path, "phi")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.randn(416))
    model.save_pretrained(folder)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    keys, tensors = read(report.file)
    assert keys["general.architecture"] == "phi2" and report.notes == ()
    assert np.array_equal(tensors["output.bias"], model.lm_head.bias.detach().numpy())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    with pytest.raises(ExportError, match="tie_word_embeddings of this model is True"):
        export_gguf(folder, tmp_path / "model.gguf", quantize="F32")


@needs_library
def test_k_quants_hold_what_llama_cpp_rounds(tmp_path: Path) -> None:
    """True k-quants in wide rows, in the mixture's types, within a bound; small blocks stand in for narrow rows."""
    sizes = {"hidden_size": 256, "intermediate_size": 288, "num_attention_heads": 8, "head_dim": 32}
    folder = folder_of(tmp_path, "llama", **sizes)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="q4_k_m")
    keys, tensors = read(report.file)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(report.file).tensors}
    assert (report.quantization, keys["general.file_type"]) == ("Q4_K_M", 15)
    assert [kinds[f"blk.{layer}.attn_v.weight"] for layer in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert [kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(4)] == ["Q5_0", "Q5_0", "Q8_0", "Q8_0"]
    assert kinds["token_embd.weight"] == "Q6_K"
    assert any("4 of 29 matrices have rows that are no multiple of 256" in note for note in report.notes)
    up = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight.detach().numpy()
    assert np.linalg.norm(tensors["blk.0.ffn_up.weight"] - up) < 0.09 * np.linalg.norm(up)
    assert 0.02 < report.largest_error < 0.16


def test_k_quants_without_the_library_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even before the folder is looked at."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match=r"pip install .*xllamacpp"):
        export_gguf(tmp_path / "nothing", tmp_path / "model.gguf", quantize="Q4_K_M")


@pytest.mark.parametrize("quantize", PLAIN)
def test_what_is_quantised_and_how_far_it_is_off(quantize: str, tmp_path: Path) -> None:
    """Matrices as asked, vectors exact; in small types embedding and head keep eight bits."""
    folder = folder_of(tmp_path, "llama", tie_word_embeddings=False)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize=quantize.lower())
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(report.file).tensors}
    small = quantize.startswith(("Q4", "Q5"))
    for name, kind in kinds.items():
        if "norm" in name:
            assert kind == GGMLQuantizationType.F32
        elif small and name in ("token_embd.weight", "output.weight"):
            assert kind == GGMLQuantizationType.Q8_0
        else:
            assert kind.name == quantize
    _, tensors = read(report.file)
    up = AutoModelForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight.detach().numpy()
    error = np.abs(tensors["blk.0.ffn_up.weight"] - up).max() / np.abs(up).max()
    assert error <= {"F32": 0, "F16": 5e-4, "BF16": 4e-3, "Q8_0": 5e-3}.get(quantize, 0.13)
    assert (report.largest_error == 0.0) == (quantize == "F32")
    assert report.quantization == quantize


def test_the_file_says_what_an_engine_needs(tmp_path: Path) -> None:
    """Name, sizes, positions, special tokens and chat template; the keys of llama.cpp."""
    tokenizer = pico_tokenizer()
    folder = folder_of(tmp_path, "llama", vocab_size=len(tokenizer) + 2)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    keys, _ = read(export_gguf(folder, tmp_path / "model.gguf").file)
    expected = {
        "general.architecture": "llama",
        "general.name": "model",
        "general.file_type": 1,
        "llama.block_count": 4,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 402,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    assert {key: keys.get(key) for key in expected} == expected
    assert keys["tokenizer.ggml.tokens"][400:] == ["[PAD400]", "[PAD401]"]
    assert keys["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)


def test_scaled_rotary_positions_are_those_of_transformers(tmp_path: Path) -> None:
    """Llama 3.1's scaling becomes one divisor per frequency; linear scaling becomes a factor."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folder = folder_of(tmp_path, "llama", rope_parameters=rope)
    _, tensors = read(export_gguf(folder, tmp_path / "model.gguf").file)
    model = AutoModelForCausalLM.from_pretrained(folder)
    plain = 500000.0 ** -(torch.arange(0, 16, 2) / 16)
    assert np.allclose(tensors["rope_freqs.weight"], (plain / model.model.rotary_emb.inv_freq).numpy(), rtol=1e-5)
    shutil.rmtree(folder)
    folder = folder_of(tmp_path, "llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    keys, _ = read(export_gguf(folder, tmp_path / "model.gguf").file)
    assert (keys["llama.rope.scaling.type"], keys["llama.rope.scaling.factor"]) == ("linear", 4.0)


def test_a_window_that_the_engine_does_not_slide_limits_the_context(tmp_path: Path) -> None:
    """Within the window both see the same."""
    report = export_gguf(folder_of(tmp_path, "mistral", sliding_window=32), tmp_path / "model.gguf")
    assert read(report.file)[0]["llama.context_length"] == 32
    assert "window of 32 tokens" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("opt", {"ffn_dim": 32, "hidden_size": 32, "num_attention_heads": 2}, "known: llama, mistral, qwen2"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act of this model is 'gelu'.*computes with 'silu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "by 'dynamic'"),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar of this model is 64 and its head_dim 16"),
        ("gemma2", {"layer_types": ["full_attention"] * 6}, "layer 0 of this model has full_attention"),
    ],
)
def test_what_the_engine_would_compute_otherwise_is_refused(
    name: str, changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """Before anything is written."""
    options = {"vocab_size": 416, **changes}
    folder = save_model_folder(tmp_path / "model", model_type=name, **options) if name == "opt" else None
    with pytest.raises(ExportError, match=words):
        export_gguf(folder or folder_of(tmp_path, name, **changes), tmp_path / "out" / "model.gguf")
    assert not (tmp_path / "out").exists()


def test_uneven_layers_of_a_family_without_sizes_per_layer_are_refused(tmp_path: Path) -> None:
    """The message says what to do."""
    source = folder_of(tmp_path, "gpt2")
    dense = AutoModelForCausalLM.from_pretrained(source)
    geometry = geometry_of(dense, families()["gpt2"])
    plan = plan_keeping(geometry, {"ffn_channel": [list(range(200 + layer)) for layer in range(4)]}, "uneven")
    tokenizer = AutoTokenizer.from_pretrained(source)
    export_huggingface(prune(dense, plan, geometry), tokenizer, plan, tmp_path / "u", source=source, provenance={})
    with pytest.raises(
        ExportError, match=r"loads no gpt2 model with layers that differ in size. Prune with shape: uniform"
    ):
        export_gguf(tmp_path / "u", tmp_path / "model.gguf")


def test_rows_that_are_no_whole_blocks_are_refused_by_name(tmp_path: Path) -> None:
    """With the widths that would do; types without blocks take any width."""
    folder = folder_of(tmp_path, "llama", intermediate_size=70)
    with pytest.raises(
        ExportError, match=r"blk.0.ffn_down.weight, .* and 1 more have rows of 70 .*64 or 96.*Write F16"
    ):
        export_gguf(folder, tmp_path / "model.gguf", quantize="Q8_0")
    assert not (tmp_path / "model.gguf").exists()
    assert export_gguf(folder, tmp_path / "model.gguf", quantize="BF16").num_tensors == 38


@pytest.mark.parametrize(
    ("name", "words"), [("IQ4_XS", "unknown quantisation 'IQ4_XS'; known: F32, F16"), ("Q9", "Q4_K_M")]
)
def test_unknown_quantisations_are_refused_at_once(name: str, words: str, tmp_path: Path) -> None:
    """Even before the folder is looked at."""
    with pytest.raises(ExportError, match=words):
        export_gguf(tmp_path / "nothing", tmp_path / "model.gguf", quantize=name)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    """float16 ends at 65504, and numbers must be numbers."""
    for value, words in (
        (1e5, "has the value 1e.05, and float16 ends"),
        (float("nan"), "has values that are not finite"),
    ):
        model = random_model(416, **{key: SIZES[key] for key in SIZES if key != "vocab_size"})
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 4] = value
        model.save_pretrained(tmp_path / "model")
        pico_tokenizer().save_pretrained(tmp_path / "model")
        with pytest.raises(ExportError, match=f"model.layers.1.mlp.up_proj.weight {words}"):
            export_gguf(tmp_path / "model", tmp_path / "model.gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk, in the middle or foreseen, leaves the earlier file and nothing else."""
    folder, target = folder_of(tmp_path, "llama"), tmp_path / "out" / "model.gguf"
    target.parent.mkdir()
    target.write_bytes(b"earlier")
    write = GGUFWriter.write_tensor_data
    written: list[int] = []

    def fail_later(self: Any, tensor: Any) -> None:
        written.append(tensor.nbytes)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(self, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(GGUFWriter, "write_tensor_data", fail_later)
        with pytest.raises(ExportError, match="the disk is full"):
            export_gguf(folder, target)
    with monkeypatch.context() as patch:
        patch.setattr(gguf.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
        with pytest.raises(ExportError, match="GB free and the file needs"):
            export_gguf(folder, target)
    assert target.read_bytes() == b"earlier"
    assert [file.name for file in target.parent.iterdir()] == ["model.gguf"]


def test_a_file_that_reads_back_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors and keys are compared with the model before the file gets its name."""
    folder, target = folder_of(tmp_path, "llama"), tmp_path / "model.gguf"
    with monkeypatch.context() as patch:
        patch.setattr(quants, "quantize", lambda values, _: values + np.float32(0.01))
        with pytest.raises(
            ExportError, match=r"token_embd.weight reads back with an error of 0.01; the file is not kept"
        ):
            export_gguf(folder, target, quantize="F32")
    with monkeypatch.context() as patch:
        patch.setattr(GGUFWriter, "add_uint32", lambda self, key, value: self.add_int32(key, value + 1))
        with pytest.raises(ExportError, match=r"reads back as .* instead of .*; the file is not kept"):
            export_gguf(folder, target)
    assert not target.exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    """No weights, or no configuration; and parameters that the architecture has no place for."""
    with pytest.raises(ExportError, match="has no safetensors files"):
        export_gguf(tmp_path, tmp_path / "model.gguf")
    folder = folder_of(tmp_path, "llama", mlp_bias=True)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"mistral"'))
    with pytest.raises(ExportError, match=r"has no place for model.layers.0.mlp.down_proj.bias"):
        export_gguf(folder, tmp_path / "model.gguf")
    config.unlink()
    with pytest.raises(ExportError, match="is not a model folder that transformers loads"):
        export_gguf(folder, tmp_path / "model.gguf")


def test_only_phi_3_tokenizers_get_its_name(tmp_path: Path) -> None:
    """llama.cpp looks for certain tokens at a name with "phi-3" in it, and fails without them."""
    folder = folder_of(tmp_path, "llama").rename(tmp_path / "my-phi-3-mini")
    assert read(export_gguf(folder, tmp_path / "model.gguf").file)[0]["general.name"] == "my-phi 3-mini"
