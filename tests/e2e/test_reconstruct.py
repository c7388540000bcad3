"""Runs that reconstruct: better on held-out text, only where channels went, from matrices that are taken once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import CorpusError
from tests.pico import Pico, medical_records, write_records

PRUNE = {"budget": {"channels": 0.5}, "reconstruct": "dense"}


@pytest.fixture(scope="module")
def reconstructed(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with reconstruction; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "reconstructed"
    secateur.run(pico.recipe(folder, prune=PRUNE))
    return folder


def stages(run: Path) -> dict[str, Any]:
    """Return what the manifest says of the stages."""
    recorded: dict[str, Any] = json.loads((run / "manifest.json").read_text())["stages"]
    return recorded


def test_the_projections_fit_better_on_text_they_were_not_fitted_to(reconstructed: Path) -> None:
    """Both layers' projections are fitted, and the mean held-out error falls."""
    found = stages(reconstructed)["shrink"]["reconstruction"]
    assert found["projections"] == 2
    assert found["error_after"] < found["error_before"]


def test_only_the_reading_projections_change(reconstructed: Path, pico: Pico, tmp_path: Path) -> None:
    """Everything else is as in the same cut without reconstruction, and so are the shapes."""
    plain = tmp_path / "plain"
    shutil.copytree(reconstructed, plain)
    secateur.run(pico.recipe(plain, prune={**PRUNE, "reconstruct": "none"}), until="shrink")
    before, after = (load_file(run / "model" / "model.safetensors") for run in (plain, reconstructed))
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    assert {name: tensor.shape for name, tensor in before.items()} == {n: t.shape for n, t in after.items()}


def test_matrices_are_taken_once_and_reused(reconstructed: Path, pico: Pico, tmp_path: Path) -> None:
    """The calibration text's in the one pass over it, the validation text's in their own; another budget needs none."""
    taken = ["gram:medical:calibration", "gram:medical:validation"]
    assert set(taken) <= set(stages(reconstructed))
    run = Path(shutil.copytree(reconstructed, tmp_path / "run"))
    result = secateur.run(pico.recipe(run, prune={**PRUNE, "budget": {"channels": 0.25}}))
    assert result.reused == ["calibrate:medical", "calibrate:general", *taken, "evaluate:dense"]
    (run / "statistics" / "medical.calibration.gram.safetensors").unlink()
    result = secateur.run(pico.recipe(run, prune=PRUNE), until="shrink")
    assert result.reused == ["calibrate:medical", "calibrate:general", taken[1]]


def test_calibrations_of_before_gain_matrices(pico: Pico, copied: Path) -> None:
    """A run without reconstruction is continued with it: statistics stay, matrices are added."""
    result = secateur.run(pico.recipe(copied, prune=PRUNE), until="shrink")
    assert result.reused == ["calibrate:medical", "calibrate:general"]
    assert (copied / "statistics" / "medical.validation.gram.safetensors").is_file()


def test_the_same_recipe_gives_the_same_weights(reconstructed: Path, pico: Pico, tmp_path: Path) -> None:
    """Fitting is deterministic."""
    secateur.run(pico.recipe(tmp_path / "run", prune=PRUNE), until="shrink")
    files = [run / "model" / "model.safetensors" for run in (reconstructed, tmp_path / "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_text_without_a_validation_part_is_refused_at_once(pico: Pico, tmp_path: Path) -> None:
    """Explicit files need a validation file to judge the fit; the missing key is named before anything is written."""
    files = {name: str(write_records(tmp_path / f"{name}.jsonl", medical_records(60, seed=i)))
             for i, name in enumerate(("calibration", "test"))}  # fmt: skip
    recipe = pico.recipe(tmp_path / "run", prune=PRUNE)
    recipe["domain"] = {"medical": {**files, "text": "{question} {answer}"}}
    with pytest.raises(CorpusError, match=r"none for validation. Add validation:"):
        secateur.run(recipe)
    assert not (tmp_path / "run").exists()


def test_fitting_on_the_pruned_stream_repairs_what_layers_before_lost(pico: Pico, tmp_path: Path) -> None:
    """Hidden states come nearer to the dense model's than with fits that do not know of each other."""
    prune = {"budget": {"channels": 0.5, "groups": 0.5}}
    distances = {}
    for how in ("none", "dense", "pruned"):
        result = secateur.run(pico.recipe(tmp_path / how, prune={**prune, "reconstruct": how}))
        assert result.evaluation is not None
        distances[how] = _distance(pico.model, tmp_path / how / "model")
        found = stages(tmp_path / how)["shrink"].get("reconstruction")
        assert (found is None) == (how == "none")
        if found is not None:
            assert found["projections"] == 4
    assert distances["pruned"] < distances["dense"] < distances["none"]


def _distance(dense: Path, pruned: Path) -> float:
    """Return the mean squared difference of the last hidden states on text that neither saw."""
    tokenizer = AutoTokenizer.from_pretrained(dense)
    models = [AutoModelForCausalLM.from_pretrained(folder).model.eval() for folder in (dense, pruned)]
    text = [f"{record['question']} {record['answer']}" for record in medical_records(40, seed=9)]
    total, count = 0.0, 0
    for line in text:
        ids = torch.tensor([tokenizer(line)["input_ids"]])
        with torch.inference_mode():
            first, second = (model(ids).last_hidden_state for model in models)
        total, count = total + float((first - second).square().sum()), count + first.numel()
    return total / count


def test_the_pruned_stream_ends_where_the_pruned_model_does(pico: Pico, tmp_path: Path) -> None:
    """Deleting the model folder and cutting again gives the same bytes, and the dense model is left alone."""
    recipe = pico.recipe(tmp_path / "run", prune={"budget": {"channels": 0.5}, "reconstruct": "pruned"})
    secateur.run(recipe, until="shrink")
    file = tmp_path / "run" / "model" / "model.safetensors"
    before = file.read_bytes()
    shutil.rmtree(tmp_path / "run" / "model")
    result = secateur.run(recipe, until="shrink")
    assert result.reused == ["calibrate:medical", "calibrate:general", "plan"]
    assert file.read_bytes() == before
