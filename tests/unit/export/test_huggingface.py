"""Exporting: a folder that is complete, proven by loading it, or not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import ExportError
from secateur.export import export_huggingface
from secateur.families.loader import families, family_of
from secateur.families.schema import Family
from secateur.records.plan import Plan
from tests.conftest import geometry_of, pico_config, pico_model
from tests.pico import pico_tokenizer
from tests.pruning import choose_units, plan_keeping, prune

INPUTS = {"input_ids": torch.arange(20).reshape(2, 10)}


def pruned(family: Family, shape: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Plan]:
    """Return a pruned pico model and its plan."""
    dense = pico_model(family, dtype, vocab_size=len(pico_tokenizer()))
    geometry = geometry_of(dense, family)
    plan = plan_keeping(geometry, choose_units(geometry, ["ffn_channel"], shape), shape)
    return prune(dense, plan, geometry), plan


def source_folder(model: Any, parent: Path) -> Path:
    """Return the dense model's folder: its configuration, the pico tokenizer and a licence."""
    source = parent / "source"
    pico_config(family_of(model.config.model_type), vocab_size=len(pico_tokenizer())).save_pretrained(source)
    pico_tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("Do what you like.")
    return source


def export(model: Any, plan: Plan, folder: Path) -> float:
    """Export a model with the tokenizer that transformers loads for the dense one."""
    source = source_folder(model, folder.parent)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return export_huggingface(model, tokenizer, plan, folder, source=source, provenance={"model": "pico"})


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_an_exported_model_is_complete_and_equal(family: Family, shape: str, tmp_path: Path) -> None:
    """In every family and both shapes: model, tokenizer, plan, provenance and licence; the logits are the same."""
    model, plan = pruned(family, shape)
    assert export(model, plan, tmp_path / "model") == 0.0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(reloaded(**INPUTS).logits, model(**INPUTS).logits)
    ours, theirs = (AutoTokenizer.from_pretrained(tmp_path / name)("The patient") for name in ("model", "source"))
    assert ours == theirs
    saved = json.loads((tmp_path / "model" / "secateur_plan.json").read_text())
    assert saved.pop("provenance") == {"model": "pico"}
    assert Plan.from_dict(saved) == plan
    assert (tmp_path / "model" / "LICENSE").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_is_saved_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    """Nothing is widened or narrowed on the way to disk."""
    model, plan = pruned(families()["llama"], "uniform", dtype)
    model.to(dtype)
    export(model, plan, tmp_path / "model")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert {value.dtype for value in reloaded.parameters()} == {dtype}


def test_a_model_that_reloads_differently_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name appears only after the proof; the earlier model stays."""
    model, plan = pruned(families()["llama"], "uniform")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "earlier").write_text("x")
    save = model.save_pretrained

    def save_other_weights(folder: Path, **options: Any) -> None:
        with torch.no_grad():
            model.model.norm.weight += 1.0
        save(folder, **options)
        with torch.no_grad():
            model.model.norm.weight -= 1.0

    monkeypatch.setattr(model, "save_pretrained", save_other_weights)
    with pytest.raises(ExportError, match="the folder is not kept"):
        export(model, plan, tmp_path / "model")
    assert [file.name for file in (tmp_path / "model").iterdir()] == ["earlier"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "source"]


def test_an_export_without_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without safetensors is no model."""
    model, plan = pruned(families()["llama"], "uniform")
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: (folder / "config.json").write_text("{}"))
    with pytest.raises(ExportError, match="no weights were written"):
        export(model, plan, tmp_path / "model")
    assert not (tmp_path / "model").exists()
