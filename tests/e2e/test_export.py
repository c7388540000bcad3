"""Exports as the last stage of a run: written, kept, reused, and refused before anything else is done."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import ConfigError, ExportError, VerificationError
from secateur.export import llama_cpp
from secateur.export.llama_cpp import Verification
from tests.command import call
from tests.pico import Pico, medical_records, save_model_folder
from tests.unit.export.test_gguf import folder_of

needs_engine = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
CUT = ["calibrate:medical", "calibrate:general", "plan", "shrink"]
MEASURED = ["evaluate:dense", "evaluate:pruned", "evaluate:random"]


@pytest.fixture
def without_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if xllamacpp were not installed."""
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """Put an engine that agrees in the place of llama.cpp, and return the prompts it was asked."""
    asked: list[Sequence[str]] = []

    def verify(file: Path, folder: Path, prompts: Sequence[str]) -> Verification:
        asked.append(prompts)
        return Verification("1", 8, len(prompts), len(prompts), 0, 0.001, 0.002, 0.0, 0.02)

    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(llama_cpp, "verify_in_llama_cpp", verify)
    return asked


def architecture(file: Path) -> str:
    """Return what a GGUF file says it is."""
    name: str = GGUFReader(file).get_field("general.architecture").contents()
    return name


@pytest.mark.usefixtures("without_engine")
@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_a_run_leaves_the_file_and_reuses_it(pico: Pico, tmp_path: Path, shape: str) -> None:
    """Named after the run; the report and the result say how far it was checked; the second run does nothing."""
    prune = {"budget": {"channels": 0.4}, "shape": shape, "allocation": "uniform" if shape == "uniform" else "global"}
    recipe = pico.recipe(tmp_path / "mine", prune=prune, export=[{"to": "gguf", "quantize": "Q8_0"}])
    first = secateur.run(recipe)
    file = tmp_path / "mine" / "exports" / "mine.Q8_0.gguf"
    assert [made.path for made in first.exports] == [file] and first.reused == []
    assert first.plan is not None and all(len(layer.keep) % 32 == 0 for layer in first.plan.layers["ffn_channel"])
    assert GGUFReader(file).get_field("general.name").contents() == "mine"
    assert first.exports[0].size_bytes == file.stat().st_size
    assert "pip install xllamacpp" in first.exports[0].not_verified
    report = (tmp_path / "mine" / "report.md").read_text()
    assert "## Exports" in report and str(file) in report and "read back and compared" in report
    assert "pip install xllamacpp" in report
    written = file.stat().st_mtime_ns
    second = secateur.run(recipe)
    assert second.reused == [*CUT, *MEASURED, "export:gguf Q8_0"]
    assert second.exports == first.exports and file.stat().st_mtime_ns == written
    assert secateur.run(recipe, until="evaluate").exports == first.exports
    assert [path.name for path in (tmp_path / "mine" / "exports").iterdir()] == ["mine.Q8_0.gguf"]


@pytest.mark.usefixtures("without_engine")
def test_an_export_added_later_costs_only_itself(pico: Pico, copied: Path) -> None:
    """A finished run stays what it is; another budget makes model and file anew."""
    first = secateur.run(pico.recipe(copied, export=["gguf"]))
    assert first.reused == [*CUT, *MEASURED]
    file = copied / "exports" / "run.F16.gguf"
    written = file.stat().st_mtime_ns
    smaller = secateur.run(pico.recipe(copied, export=["gguf"], prune={"budget": {"channels": 0.5}}))
    assert smaller.reused == [*CUT[:2], MEASURED[0]]
    assert file.stat().st_mtime_ns > written
    file.unlink()
    assert "export:gguf F16" not in secateur.run(smaller.folder / "recipe.yml").reused
    assert file.is_file()


def test_the_engine_is_asked_about_the_domains_test_text(pico: Pico, copied: Path, engine: list[Sequence[str]]) -> None:
    """Pieces of documents that were not learned from, first their beginnings; once, and later only what is new."""
    recipe = pico.recipe(copied, export=["gguf"])
    made = secateur.run(recipe).exports
    [prompts] = engine
    assert f"{len(prompts)} of {len(prompts)} prompts" in made[0].verified and made[0].not_verified == ""
    documents = [f"Question: {r['question']}\nAnswer: {r['answer']}" for r in medical_records(400)]
    first_words = {" ".join(document.split()[:24]) for document in documents}
    assert 8 < len(prompts) == len(set(prompts)) <= 1000 and set(prompts[:8]) <= first_words
    assert all(len(prompt.split()) <= 24 for prompt in prompts)
    assert secateur.run(recipe).reused[-1] == "export:gguf F16" and len(engine) == 1


def test_what_could_not_be_verified_is_verified_once_that_can_be(
    pico: Pico, copied: Path, engine: list[Sequence[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installing the engine is enough; afterwards the result is reused without it."""
    recipe = pico.recipe(copied, export=["gguf"])
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "verify_in_llama_cpp", llama_cpp_without_engine)
        assert secateur.run(recipe).exports[0].verified == ""
        assert secateur.run(recipe).reused[-1] == "export:gguf F16"
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    assert secateur.run(recipe).exports[0].verified
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    last = secateur.run(recipe)
    assert last.reused[-1] == "export:gguf F16" and last.exports[0].verified and len(engine) == 1


def llama_cpp_without_engine(*_: object) -> None:
    """Answer as where xllamacpp is missing."""
    raise secateur.UnavailableError("llama.cpp is not installed. Run: pip install xllamacpp")


def test_a_failed_verification_ends_with_1_and_keeps_all_else(
    pico: Pico, copied: Path, capsys: pytest.CaptureFixture[str], engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is kept under a name that says so, other exports are made, and the next run tries again."""
    recipe = pico.write_recipe(copied.parent / "r.yml", copied, export=["gguf", {"to": "gguf", "quantize": "BF16"}])

    def refuse_half_precision(file: Path, *rest: Any) -> Verification:
        if GGUFReader(file).get_field("general.file_type").contents() == 1:
            raise VerificationError("llama.cpp answers otherwise.")
        return Verification("1", 8, 8, 8, 8, 0.0, 0.0, 0.0, 0.02)

    with monkeypatch.context() as patch:
        patch.setattr(llama_cpp, "verify_in_llama_cpp", refuse_half_precision)
        answer = call(capsys, "run", recipe, "--json", "--quiet")
    assert answer.code == 1 and answer.json()["error"]["type"] == "VerificationError"
    names = sorted(path.name for path in (copied / "exports").iterdir())
    assert names == ["run.BF16.gguf", "run.F16.failed-verification.gguf"]
    assert "run.BF16.gguf" in (copied / "report.md").read_text()
    again = call(capsys, "run", recipe, "--quiet")
    assert again.code == 0 and "run.F16.gguf" in again.out
    assert sorted(path.name for path in (copied / "exports").iterdir()) == ["run.BF16.gguf", "run.F16.gguf"]


@pytest.mark.usefixtures("without_engine")
def test_after_a_recovery_the_recovered_model_is_exported(pico: Pico, tmp_path: Path) -> None:
    """The weights in the file are those of ``recovered/``; rounds leave the file to the whole run."""
    recover = {"max_tokens": 512, "baselines": [], "evaluations": 1, "evaluation_tokens": 256, "rounds": 2}
    export = [{"to": "gguf", "quantize": "F32"}]
    prune = {"budget": {"parameters": 0.15}}
    result = secateur.run(pico.recipe(tmp_path / "run", prune=prune, recover=recover, export=export))
    [made] = result.exports
    found = {tensor.name: tensor.data for tensor in GGUFReader(made.path).tensors}
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "recovered")
    assert (found["blk.1.ffn_down.weight"] == trained.model.layers[1].mlp.down_proj.weight.detach().numpy()).all()
    assert result.model_folder == tmp_path / "run" / "recovered"
    assert not list((tmp_path / "run" / "rounds").rglob("*.gguf"))


# -- refused before anything is done ---------------------------------------------------------------------------------


def test_a_family_that_holds_only_uniform_shapes_is_refused_before_calibration(pico: Pico, tmp_path: Path) -> None:
    """Nothing was run through the model and no file was written."""
    folder = folder_of(tmp_path, "gemma2", vocab_size=512)
    prune = {"budget": {"channels": 0.3}, "shape": "uneven"}
    recipe = pico.recipe(tmp_path / "run", model=str(folder), prune=prune, export=["gguf"])
    with pytest.raises(ExportError, match=r"export gguf F16: llama.cpp loads no gemma2 model with layers that differ"):
        secateur.run(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("export", "prune", "words"),
    [
        (["ggfu"], {}, "unknown export target 'ggfu'. Did you mean 'gguf'"),
        ([{"to": "gguf", "quantize": "Q4_X"}], {}, "unknown type of export target gguf 'Q4_X'"),
        ([{"to": "gguf", "quantize": "Q8_0"}], {"multiple_of": 8}, "needs FFN widths that are multiples of 32"),
        (["gguf", "gguf"], {}, "more than once"),
    ],
)
def test_names_and_widths_are_refused_before_calibration(
    pico: Pico, tmp_path: Path, export: list[Any], prune: dict[str, Any], words: str
) -> None:
    """As for methods: resolved before weights are read, text is run or files are written."""
    with pytest.raises(ConfigError, match=words):
        secateur.run(pico.recipe(tmp_path / "run", export=export, prune=prune))
    assert not (tmp_path / "run").exists()


def test_a_plan_that_does_not_fit_is_refused_before_the_cut(pico: Pico, tmp_path: Path) -> None:
    """A layer that stays whole has a width that no cut changed; plan and statistics are there, no model is."""
    folder = save_model_folder(tmp_path / "model", intermediate_size=100, num_hidden_layers=4)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(100)  # so that its channels outrank all others
    model.save_pretrained(folder)
    prune = {"budget": {"channels": 0.1}, "shape": "uneven", "normalize": "none", "method": "activation_norm"}
    recipe = pico.recipe(tmp_path / "run", model=str(folder), prune=prune, export=[{"to": "gguf", "quantize": "Q8_0"}])
    with pytest.raises(ExportError, match=r"export gguf Q8_0: .*ffn_down.weight.* have rows of 100 .*96 or 128"):
        secateur.run(recipe)
    assert (tmp_path / "run" / "plan.json").is_file()
    assert not (tmp_path / "run" / "model").exists()
    with pytest.raises(ExportError, match="have rows of 100"):
        secateur.run(recipe, until="plan")
    export = [{"to": "gguf", "quantize": "Q8_0", "round_to_fit": True}]
    [made] = secateur.run({**recipe, "export": export}).exports
    assert "from 100 to 128 FFN channels" in made.padding[0]


# -- the engine itself -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_engine
@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_the_engine_runs_what_a_run_exports(pico: Pico, tmp_path: Path, shape: str) -> None:
    """Even and uneven, with a smaller vocabulary and sub-layers gone."""
    prune: dict[str, Any] = {"budget": {"channels": 0.4}, "units": ["ffn_channel", "vocabulary"]}
    if shape == "uneven":
        prune = {"budget": {"parameters": 0.3}, "units": ["ffn_channel", "gqa_group", "ffn", "vocabulary"]}
    folder = save_model_folder(tmp_path / "model", num_hidden_layers=4)
    recipe = pico.recipe(tmp_path / "run", model=str(folder), prune={**prune, "shape": shape}, export=["gguf"])
    [made] = secateur.run(recipe).exports
    assert architecture(made.path) == ("llama" if shape == "uniform" else "deci")
    assert "8 of 8 prompts" in made.verified
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["stages"]["export:gguf F16"]["exported"]
