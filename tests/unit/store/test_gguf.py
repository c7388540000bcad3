"""GGUF files as input: dequantised once into the cache, with weights, tokenizer and licence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM

from secateur.errors import CheckpointError
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model
from tests.pico import pico_tokenizer, random_model

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.layers.": "blk.",
}


def gguf_name(name: str) -> str:
    """Return what GGUF calls a llama parameter."""
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return query or key rows in GGUF's order: rotary pairs side by side, where transformers has halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_gguf(file: Path, model: Any, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    """Write a llama model and the pico tokenizer as GGUF; matrices that fit are stored as ``kind``."""
    config, tokenizer = model.config, pico_tokenizer()
    writer = GGUFWriter(file, "llama")
    writer.add_license("apache-2.0")
    writer.add_languages(["en"])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokenizer))
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tokenizer.all_special_tokens else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in model.named_parameters():
        array = value.detach().float().numpy()
        if "q_proj" in name or "k_proj" in name:
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = interleaved(array, heads)
        if array.ndim == 2 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def dense() -> Any:
    """The model that is written; its head is not tied, and sizes are multiples of a quantisation block."""
    return random_model(len(pico_tokenizer()), tie_word_embeddings=False)


@pytest.fixture
def gguf_file(dense: Any, tmp_path: Path) -> Path:
    """The model as a GGUF file."""
    return write_gguf(tmp_path / "pico-llama.F32.gguf", dense)


def test_a_gguf_file_is_the_model_it_was_made_from(gguf_file: Path, dense: Any, cache: Path) -> None:
    """Weights, logits, tokenizer, licence and name are those of the original; the folder lies in the cache."""
    found = resolve_model(str(gguf_file))
    assert found.folder.is_relative_to(cache)
    assert found.name == "pico-llama.F32"
    assert found.dtype == torch.float32
    assert found.geometry.family.name == "llama"
    model = load_model(found, device="cpu")
    for name, value in dense.named_parameters():
        assert torch.equal(model.get_parameter(name), value), name
    ids = torch.arange(30).reshape(2, 15)
    assert torch.allclose(model(ids).logits, dense(ids).logits, atol=1e-5)
    text = "Question: The patient from Łódź?"
    assert load_tokenizer(found)(text)["input_ids"] == pico_tokenizer()(text)["input_ids"]
    card = (found.folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "Dequantised from pico-llama.F32.gguf" in card
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    assert [path for path in cache.rglob(".*")] == []


def test_the_second_time_costs_no_work(gguf_file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same content, even under another path, is not dequantised again; other content is."""
    first = resolve_model(str(gguf_file))
    with monkeypatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", None)
        assert resolve_model(str(gguf_file)).folder == first.folder
        (tmp_path / "moved").mkdir()
        moved = gguf_file.rename(tmp_path / "moved" / gguf_file.name)
        assert resolve_model(str(moved)).folder == first.folder
    other = write_gguf(gguf_file, random_model(len(pico_tokenizer()), tie_word_embeddings=False, seed=1))
    assert resolve_model(str(other)).folder != first.folder


def test_a_quantised_file_is_dequantised(dense: Any, tmp_path: Path) -> None:
    """Q8_0 weights come back in float32, as near to the original as eight bits allow."""
    found = resolve_model(str(write_gguf(tmp_path / "pico.Q8_0.gguf", dense, GGMLQuantizationType.Q8_0)))
    assert found.dtype == torch.float32
    model = load_model(found, device="cpu")
    for name, value in dense.named_parameters():
        error = (model.get_parameter(name) - value).abs().max()
        assert error <= value.abs().max() / 127, name
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(model.get_parameter(name), dense.get_parameter(name))


def test_what_is_no_gguf_model_is_refused(tmp_path: Path, cache: Path) -> None:
    """A broken file is named and leaves nothing in the cache."""
    file = tmp_path / "broken.gguf"
    for content in (b"", b"hello", b"GGUF" + bytes(200)):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken\.gguf could not be read as a GGUF language model"):
            resolve_model(str(file))
    assert [path for path in cache.rglob("*") if path.is_file()] == []
