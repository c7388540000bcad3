"""Comparing with llama.cpp: agreement is measured, disagreement refused; the slow tests run the engine itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, quants
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from secateur.errors import ExportError, UnavailableError, VerificationError
from secateur.export import gguf_tokenizer, llama_cpp
from secateur.export.gguf import export_gguf
from secateur.export.gguf_architectures import architectures
from secateur.export.gguf_types import QUANTIZATIONS
from secateur.export.llama_cpp import verify_in_llama_cpp
from secateur.store.tokenizers import save_tokenizer, smaller_tokenizer
from tests.pico import random_model
from tests.tiny_tokenizers import SPACE, tokenizer_data, training_texts
from tests.unit.export.test_gguf import folder_of, uneven_folder
from tests.unit.export.test_gguf_tokenizer import split_by
from tests.unit.store.test_tokenizers import ids_to_keep


def newer_sentencepiece() -> dict[str, Any]:
    """Return a SentencePiece tokenizer that puts a space in front only where there is none."""
    step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    return tokenizer_data("sentencepiece_bpe") | {"normalizer": None, "pre_tokenizer": step}


PROMPTS = ["Question: The patient received aspirin at noon?", "The nurse measured 12 doses in Łódź. " * 40, "a"]
needs_engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")

Answer = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small llama and its GGUF file."""
    made = folder_of(tmp_path, "llama")
    export_gguf(made, tmp_path / "model.gguf", quantize="F32")
    return made


@pytest.fixture
def engine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Answer], None]], None]:
    """Return what puts in the engine's place the model itself, with its answer changed."""

    def install(change: Callable[[Answer], None]) -> None:
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)

        def ask(_: Path, texts: Sequence[str], inputs: Sequence[Sequence[int]], plain: int, threads: int) -> Answer:
            assert tokenizer.decode([plain]) == "a" and threads == 1
            likeliest = []
            for ids in inputs:
                with torch.inference_mode():
                    values = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1], dim=-1)
                top = values.topk(20)
                likeliest.append([list(pair) for pair in zip(top.indices.tolist(), top.values.tolist(), strict=True)])
            answer = {
                "version": "1",
                "tokens": [tokenizer(text)["input_ids"] for text in texts],
                "next": likeliest,
                "text": [continued(model, tokenizer, ids) for ids in inputs],
            }
            change(answer)
            return answer

        monkeypatch.setattr(llama_cpp, "_ask", ask)
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())

    return install


def continued(model: Any, tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of the 16 likeliest tokens, found one by one without a cache."""
    found = list(ids)
    for _ in range(16):
        found.append(int(model(torch.tensor([found])).logits[0, -1].argmax()))
    return str(tokenizer.decode(found[len(ids) :], skip_special_tokens=True))


def shift(answer: Answer, by: float) -> None:
    """Change every log-probability."""
    for likeliest in answer["next"]:
        for entry in likeliest:
            entry[1] += by


def test_agreement_is_measured(folder: Path, engine: Any) -> None:
    """The mean and largest difference, and how often both find the same token likeliest."""
    engine(lambda answer: shift(answer, 0.01))
    found = verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)
    assert (found.num_prompts, found.same_first, found.same_text, found.tolerance) == (3, 3, 3, 0.02)
    engine(lambda answer: answer["text"].reverse())
    assert verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1).same_text < 3
    assert found.num_texts > 3
    assert found.mean_difference == pytest.approx(0.01, abs=1e-4) == found.largest_difference


@pytest.mark.parametrize("by", [0.03, float("nan")])
def test_other_probabilities_are_refused(by: float, folder: Path, engine: Any) -> None:
    """With the difference and what is allowed; what is no number does not pass."""
    engine(lambda answer: shift(answer, by))
    with pytest.raises(ExportError, match=r"differ by (0.03|nan) nats on average .* 0.02 is allowed for F32"):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)


@pytest.mark.parametrize("quantize", ["F16", "Q8_0", "Q4_0"])
def test_what_rounding_the_weights_explains_is_allowed(quantize: str, folder: Path, engine: Any) -> None:
    """Three times that and a little, and no more; it is measured on the model itself."""
    export_gguf(folder, folder.parent / "model.gguf", quantize=quantize)
    engine(lambda answer: shift(answer, 0.0))
    found = verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)
    assert 0 < found.rounding < 1
    assert found.tolerance == pytest.approx(0.02 + 3 * found.rounding)
    engine(lambda answer: shift(answer, 0.99 * found.tolerance))
    verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)
    engine(lambda answer: shift(answer, 1.01 * found.tolerance))
    with pytest.raises(VerificationError, match=f"is allowed for {quantize}: 0.02 and 3 times"):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)


def test_rounding_follows_the_type_of_each_tensor(tmp_path: Path) -> None:
    """Also where the file's rows are longer than the model's, and where a matrix is stored the other way round."""
    folder = folder_of(tmp_path, "gpt2")
    model = AutoModelForCausalLM.from_pretrained(folder)
    export_gguf(folder, tmp_path / "model.gguf", quantize="Q4_0")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    llama_cpp._round_weights(model, tmp_path / "model.gguf", folder)
    read = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    for ours, theirs in (("wte", "token_embd"), ("h.1.mlp.c_fc", "blk.1.ffn_up"), ("wpe", "position_embd")):
        stored = read[f"{theirs}.weight"]
        values = torch.tensor(quants.dequantize(stored.data, stored.tensor_type))
        found = model.get_parameter(f"transformer.{ours}.weight")
        assert torch.equal(found, values.T if "mlp" in ours else values)
        assert torch.equal(found, before[f"transformer.{ours}.weight"]) == (ours == "wpe")
    narrow = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32)
    whole = np.concatenate([narrow, np.zeros((3, 24), np.float32)], axis=1)
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.IQ4_XS):
        used = kind if kind.name == "Q8_0" else GGMLQuantizationType.Q4_0
        assert np.array_equal(
            llama_cpp._rounded(narrow, kind), quants.dequantize(quants.quantize(whole, used), used)[:, :40]
        )


def test_other_tokens_are_refused(folder: Path, engine: Any) -> None:
    """The text and the first token that differs are named."""
    engine(lambda answer: answer["tokens"][1].__setitem__(2, 7))
    with pytest.raises(ExportError, match=r"cuts 'The nurse measured.* other tokens, from number 2 on: \[7, "):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)
    engine(lambda answer: answer["tokens"][2].append(7))
    with pytest.raises(ExportError, match=r"cuts 'a' into other tokens, from number 1 on: \[7\] instead of \[\]"):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS, threads=1)


def test_without_the_engine_the_command_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any model is loaded; so is a comparison by nothing."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UnavailableError, match="pip install xllamacpp"):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, PROMPTS)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(ExportError, match="no prompts were given"):
        verify_in_llama_cpp(folder.parent / "model.gguf", folder, [])


def test_half_a_file_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without asking the engine."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    file = folder.parent / "model.gguf"
    for size in (0, 200, 2000, file.stat().st_size - 100):
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(ExportError, match=r"model.gguf cannot be read as a GGUF model"):
            verify_in_llama_cpp(file, folder, PROMPTS)
        export_gguf(folder, file, quantize="F32")


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("name", list(architectures()))
def test_the_engine_predicts_what_every_family_predicts(name: str, tmp_path: Path) -> None:
    """In the family's own architecture."""
    folder = folder_of(tmp_path, name)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    assert verify_in_llama_cpp(report.file, folder, PROMPTS, threads=1).same_first == 3


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_engine_predicts_what_uneven_models_predict(name: str, tmp_path: Path) -> None:
    """With missing sub-layers, in an architecture that takes sizes per layer."""
    folder = uneven_folder(tmp_path, name, tie_word_embeddings=name == "qwen3")
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    assert report.architecture in ("deci", "openelm")
    assert verify_in_llama_cpp(report.file, folder, PROMPTS, threads=1).same_first == 3


@pytest.mark.slow
@needs_engine
def test_the_engine_takes_a_head_of_zeros_in_the_first_layer(tmp_path: Path) -> None:
    """A first layer without attention cannot be planned, but a model folder may have one."""
    folder = uneven_folder(tmp_path, "llama")
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["0"]["skip"] = ["attention"]
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    gone = ("layers.0.self_attn.", "layers.0.input_layernorm.")
    left = {name: value for name, value in weights.items() if not any(part in name for part in gone)}
    save_file(left, folder / "model.safetensors", metadata={"format": "pt"})
    report = export_gguf(folder, tmp_path / "model.gguf", quantize="F32")
    assert verify_in_llama_cpp(report.file, folder, PROMPTS, threads=1).same_first == 3


@pytest.mark.slow
@needs_engine
def test_the_engine_reads_every_quantisation(tmp_path: Path) -> None:
    """Within the tolerance stated for each, also where layers differ."""
    for folder in (folder_of(tmp_path, "llama"), uneven_folder(tmp_path / "u", "llama")):
        for quantize in QUANTIZATIONS:
            report = export_gguf(folder, tmp_path / "model.gguf", quantize=quantize)
            verify_in_llama_cpp(report.file, folder, PROMPTS, threads=1)


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize(("name", "quantize"), [("llama", "Q4_K_M"), ("gpt_neox", "Q5_K_S"), ("gpt2", "Q2_K")])
def test_the_engine_computes_with_k_quants(name: str, quantize: str, tmp_path: Path) -> None:
    """In rows that hold whole blocks of them; what rounding does is measured tensor by tensor."""
    sizes = {"n_embd": 256} if name == "gpt2" else {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    folder = folder_of(tmp_path, name, **sizes)
    report = export_gguf(folder, tmp_path / "model.gguf", quantize=quantize)
    assert not any("no multiple of 256" in note for note in report.notes)
    found = verify_in_llama_cpp(report.file, folder, PROMPTS, threads=1)
    assert 0 < found.rounding and found.mean_difference < 0.02 + 2 * found.rounding


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize(
    "data",
    [
        tokenizer_data("byte_level"),
        tokenizer_data("byte_level_partial"),
        tokenizer_data("sentencepiece_bpe"),
        newer_sentencepiece(),
        split_by(gguf_tokenizer._LLAMA3, True),
        split_by(gguf_tokenizer._LLAMA3),
        split_by(gguf_tokenizer._QWEN2),
        split_by(gguf_tokenizer._TEKKEN, True),
    ],
    ids=["gpt-2", "partial", "sentencepiece", "newer", "llama-bpe", "smaug-bpe", "qwen2", "tekken"],
)
def test_the_engine_cuts_text_as_the_tokenizer_does(data: dict[str, Any], small: bool, tmp_path: Path) -> None:
    """Also after tokens went."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(data)), **names)
    if small:
        tokenizer = smaller_tokenizer(tokenizer, ids_to_keep(tokenizer, training_texts()[:40]))
    random_model(len(tokenizer) + 3).save_pretrained(tmp_path / "model")
    save_tokenizer(tokenizer, tmp_path / "model")
    report = export_gguf(tmp_path / "model", tmp_path / "model.gguf", quantize="F32")
    texts = [*training_texts()[:30], "Hello  World\n\n\n  x   y 12345 I'LL don't \r\n", "b </s> c"]
    assert verify_in_llama_cpp(report.file, tmp_path / "model", texts, threads=1).num_texts >= 32


@pytest.mark.slow
@needs_engine
def test_a_file_that_the_engine_does_not_load_is_refused(folder: Path) -> None:
    """With the engine's own words; a crash of the engine would end only its own process."""
    file = folder.parent / "model.gguf"
    file.write_bytes(file.read_bytes().replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(ExportError, match=r"llama.cpp does not run the file \(exit status \d+\): "):
        verify_in_llama_cpp(file, folder, PROMPTS, threads=1)
