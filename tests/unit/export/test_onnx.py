"""ONNX graphs: the cache as plain tensors, refusals, and every family run in onnxruntime."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import ExportError, UnavailableError
from secateur.export import export_huggingface, onnx
from secateur.export.onnx import MODEL_FILE, PACKAGES, TOLERANCE, export_onnx, plan_onnx
from secateur.families.loader import families
from secateur.families.schema import Family
from tests.conftest import geometry_of, pico_config
from tests.pico import pico_tokenizer, save_model_folder
from tests.pruning import plan_keeping, prune

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in PACKAGES),
    reason=f"pip install {' '.join(PACKAGES)}",
)
LAYERS = {"gemma2": 4, "gemma3_text": 6}
"""Where two types of attention alternate."""


def model_of(family: Family, **changes: Any) -> Any:
    """Return a tiny random model; windows are shorter than the texts."""
    sizes = {
        family.dimensions["num_layers"].config: LAYERS.get(family.name, 3),
        family.dimensions["vocab_size"].config: len(pico_tokenizer()),
    }
    window = {"sliding_window": 8} if family.name in ("gemma2", "gemma3_text", "mistral", "phi3") else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(pico_config(family, **sizes, **window, **changes)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


def uneven(model: Any, family: Family) -> tuple[Any, Any]:
    """Return the model without the FFN of layer 1, the attention of layer 2 and parts of others, and its plan."""
    geometry = geometry_of(model, family)
    kept = {
        "ffn_channel": [list(range(axis.num_units // (axis.layer % 3 + 1))) for axis in geometry.axes["ffn_channel"]]
    }
    kept["ffn_channel"][1] = []
    if geometry.why_fixed("gqa_group"):
        kept["ffn_channel"][1] = [0, 3, 5]
    else:
        kept["gqa_group"] = [list(range(max(1, axis.num_units - axis.layer))) for axis in geometry.axes["gqa_group"]]
        kept["gqa_group"][2] = []
    plan = plan_keeping(geometry, kept, "uneven")
    return prune(model, plan, geometry), plan


def graph_logits(run: Any, graph: Any, ids: Tensor, steps: int) -> Tensor:
    """Return the logits of a text given in pieces of ``steps`` tokens, each with the cache of those before."""
    past, pieces = graph.empty_past(len(ids)), []
    for start in range(0, ids.shape[1], steps):
        new = ids[:, start : start + steps]
        mask = torch.ones(len(ids), start + new.shape[1], dtype=torch.int64)
        logits, *past = run(new, mask, torch.arange(start, start + new.shape[1]).expand_as(new), past)
        pieces.append(logits)
    return torch.cat(pieces, dim=1)


@pytest.mark.parametrize("even", [True, False])
def test_the_cache_as_plain_tensors_changes_nothing(family: Family, even: bool) -> None:
    """Whole or in pieces, also past a sliding window, and with layers that have no attention to keep."""
    model = model_of(family)
    if not even:
        model = uneven(model, family)[0]
    graph = onnx._Graph(model)
    ids = torch.arange(3, 41).reshape(2, 19)
    with torch.inference_mode():
        expected = model(input_ids=ids, use_cache=False).logits
        for steps in (19, 7, 1):
            assert torch.allclose(graph_logits(graph, graph, ids, steps), expected, atol=1e-4)


def test_the_names_are_those_that_others_use() -> None:
    """Layer by layer, keys before values; layers without attention are left out."""
    family = families()["llama"]
    graph = onnx._Graph(uneven(model_of(family), family)[0])
    assert graph.past_names == [f"past_key_values.{layer}.{part}" for layer in (0, 1) for part in ("key", "value")]
    assert [tuple(tensor.shape) for tensor in graph.empty_past(2, 5)] == [(2, 3, 5, 8)] * 2 + [(2, 2, 5, 8)] * 2


CONFIG: dict[str, Any] = {"model_type": "pruned_llama", "rope_parameters": {"rope_type": "default"}}
SHAPES = {"model.embed_tokens.weight": (97, 48)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "type 'bert' cannot be written as ONNX"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "by 'dynamic', which depends on the length of the text"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "by 'longrope'"),
    ],
)
def test_graphs_of_another_model_are_refused(changes: dict[str, Any], words: str) -> None:
    """Unknown families, and positions that depend on the text's length: a graph keeps those of its example."""
    plan_onnx(CONFIG, SHAPES)
    with pytest.raises(ExportError, match=words):
        plan_onnx({**CONFIG, **changes}, SHAPES)
    with pytest.raises(ExportError, match="no parameters to export"):
        plan_onnx(CONFIG, {})
    with pytest.raises(ExportError, match="'mixtral' send each token to experts of its own, and an ONNX graph"):
        plan_onnx({**CONFIG, "model_type": "mixtral"}, SHAPES)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the folder is looked at."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match="Run: pip install onnx onnxscript onnxruntime"):
        export_onnx(tmp_path / "nothing", tmp_path / "onnx")


def test_what_pytorch_cannot_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its reason is passed on."""

    def refuse(*args: Any, **options: Any) -> None:
        raise torch.onnx.errors.OnnxExporterError("it failed") from ValueError("aten::odd is not known\nmore")

    monkeypatch.setattr(onnx, "require_onnx", lambda: None)
    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ExportError, match="cannot export this llama model as ONNX: aten::odd is not known Use the"):
        export_onnx(save_model_folder(tmp_path / "model"), tmp_path / "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]


@installed
@pytest.mark.slow
@pytest.mark.parametrize("even", [True, False])
def test_onnxruntime_answers_as_transformers_does(family: Family, even: bool, tmp_path: Path) -> None:
    """Every family: the report's check passes, and a greedy text by the names in the file is ``generate``'s."""
    model, folder = model_of(family), tmp_path / "model"
    if even:
        model.save_pretrained(folder)
        pico_tokenizer().save_pretrained(folder)
    else:
        pruned, plan = uneven(model, family)
        export_huggingface(pruned, pico_tokenizer(), plan, folder, source=tmp_path, provenance={})
    report = export_onnx(folder, tmp_path / "out" / "onnx")
    assert 0 <= report.largest_difference <= TOLERANCE
    assert report.files[:2] == (MODEL_FILE, f"{MODEL_FILE}.data")
    assert {"tokenizer.json", "config.json", "generation_config.json"} <= set(report.files)
    assert report.opset >= 18 and set(report.versions) == {"torch", "transformers", *PACKAGES}
    session = importlib.import_module("onnxruntime").InferenceSession(str(report.path / MODEL_FILE))
    past = {
        entry.name: torch.zeros(1, entry.shape[1], 0, entry.shape[3]).numpy()
        for entry in session.get_inputs()
        if entry.name.startswith("past_key_values.")
    }
    outputs = [entry.name for entry in session.get_outputs()]
    assert {name.replace("past_key_values", "present") for name in past} | {"logits"} == set(outputs)
    ids = new = torch.arange(5, 17)[None]
    for _ in range(8):
        length = ids.shape[1]
        given = {
            "input_ids": new.numpy(),
            "attention_mask": torch.ones(1, length, dtype=torch.int64).numpy(),
            "position_ids": torch.arange(length - new.shape[1], length)[None].numpy(),
            **past,
        }
        known = {entry.name for entry in session.get_inputs()}
        found = dict(zip(outputs, session.run(None, {k: v for k, v in given.items() if k in known}), strict=True))
        new = torch.from_numpy(found.pop("logits"))[:, -1:].argmax(-1)
        past = {name.replace("present", "past_key_values"): array for name, array in found.items()}
        ids = torch.cat([ids, new], dim=1)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).generate(
        ids[:, :12], attention_mask=torch.ones(1, 12), max_new_tokens=8, do_sample=False, eos_token_id=None
    )
    assert torch.equal(ids, expected)


@installed
@pytest.mark.slow
def test_a_graph_that_answers_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when logits differ a little, nor when onnxruntime cannot load it."""
    folder, expected = save_model_folder(tmp_path / "model", dtype=torch.bfloat16), onnx._expected
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_expected", lambda *args: expected(*args) * 1.01)
        with pytest.raises(ExportError, match=r"logits for a padded batch of length 1 differ .* by 0.0"):
            export_onnx(folder, tmp_path / "onnx")
    with monkeypatch.context() as patch:
        patch.setattr(onnx, "_write", lambda graph, file: file.write_bytes(b"nothing"))
        with pytest.raises(ExportError, match="onnxruntime does not load the graph"):
            export_onnx(folder, tmp_path / "onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    report = export_onnx(folder, tmp_path / "onnx")
    assert json.loads((report.path / "config.json").read_text())["model_type"] == "llama"
    assert AutoTokenizer.from_pretrained(report.path)("A patient") == AutoTokenizer.from_pretrained(folder)("A patient")
