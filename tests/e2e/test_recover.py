"""Recovery as part of a run: trained rows beside their baselines, what is kept, what is reused, what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import secateur
from secateur.errors import ConfigError
from secateur.pipeline import RunResult
from secateur.recipe import load_recipe, parse_recipe
from tests.command import call
from tests.pico import Pico, build_pico, save_model_folder

TRAINING = {
    "max_tokens": 4096,
    "evaluations": 3,
    "evaluation_tokens": 512,
    "learning_rate": 1e-3,
    "precision": "float32",
    "batch_size": 4,
}
BOTH = {"units": ["ffn_channel", "vocabulary"], "budget": {"parameters": 0.2}, "vocabulary": {"min_count": 1}}
ROWS = ["dense", "dense_finetuned", "pruned", "recovered", "random", "random_recovered"]


def train(pico: Pico, folder: Path, prune: Mapping[str, Any] | None = None, **recover: Any) -> RunResult:
    """Run a recipe with a recover section."""
    changes = {"prune": prune} if prune else {}
    return secateur.run(pico.recipe(folder, recover={**TRAINING, **recover}, **changes))


def loss(result: RunResult, row: str, bucket: str = "medical") -> float:
    """Return a row's loss on test text, in nats per byte, which is comparable across tokenizers."""
    assert result.evaluation is not None
    return result.evaluation.models[row].text[bucket].bits_per_byte


@pytest.fixture(scope="module")
def finetuned(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that fine-tunes; nobody changes its folder."""
    return train(pico, tmp_path_factory.mktemp("recover") / "finetuned", method="finetune", replay=0.2)


def test_every_baseline_stands_beside_the_recovered_model(finetuned: RunResult) -> None:
    """Rows come in the order of the table; trained ones are better than untrained ones on a model that knew nothing."""
    assert finetuned.evaluation is not None
    assert list(finetuned.evaluation.models) == ROWS
    assert loss(finetuned, "recovered") < loss(finetuned, "pruned")
    assert loss(finetuned, "dense_finetuned") < loss(finetuned, "dense")
    assert loss(finetuned, "random_recovered") < loss(finetuned, "random")
    models = finetuned.evaluation.models
    assert models["recovered"].total_parameters == models["pruned"].total_parameters
    assert models["random_recovered"].total_parameters == models["random"].total_parameters


def test_the_recovered_folder_is_the_result_and_loads_with_plain_transformers(finetuned: RunResult) -> None:
    """What was cut stays cut: every tensor has the pruned model's shape, and other values."""
    assert finetuned.model_folder is not None and finetuned.model_folder.name == "recovered"
    recovered = AutoModelForCausalLM.from_pretrained(finetuned.model_folder).state_dict()
    pruned = AutoModelForCausalLM.from_pretrained(finetuned.folder / "model").state_dict()
    assert {name: tensor.shape for name, tensor in recovered.items()} == {n: t.shape for n, t in pruned.items()}
    assert any(not torch.equal(recovered[name], pruned[name]) for name in pruned)


def test_curves_are_kept_and_weights_of_baselines_are_not(finetuned: RunResult) -> None:
    """Each training has its curve on every text; only the recovered model's weights stay."""
    folder = finetuned.folder / "recovery"
    for name in ("recovered", "dense_finetuned", "random_recovered"):
        data = json.loads((folder / f"{name}.json").read_text())
        assert set(data["points"][0]["losses"]) == {"medical", "general"}
        assert data["points"][0]["step"] == 0 and len(data["points"]) == 4
        assert not (folder / name).exists()
    assert not (folder / "checkpoints" / "recovered").exists()


def test_the_report_tells_of_the_training(finetuned: RunResult) -> None:
    """The verdict compares with the dense model trained alike; the card says that there was training."""
    assert "the dense model fine-tuned on the same text" in finetuned.summary
    assert "without recovery" in finetuned.summary
    report = (finetuned.folder / "report.md").read_text()
    assert "## Recovery" in report and "fine-tuned on" in report
    assert "`recovered` was fine-tuned" in (finetuned.folder / "recovered" / "README.md").read_text()
    before = (finetuned.folder / "model" / "README.md").read_text()
    assert "No recovery training was done" in before and "This is the model before its training" in before


def test_the_same_recipe_again_trains_nothing(pico: Pico, finetuned: RunResult) -> None:
    """All rows and trainings are reused, also those whose weights are gone."""
    before = (finetuned.folder / "evaluation.json").read_bytes()
    again = train(pico, finetuned.folder, method="finetune", replay=0.2)
    wanted = {f"recover:{name}" for name in ("recovered", "dense_finetuned", "random_recovered")}
    assert wanted <= set(again.reused) and {f"evaluate:{name}" for name in ROWS} <= set(again.reused)
    assert len(again.reused) == len(set(again.reused))
    assert (finetuned.folder / "evaluation.json").read_bytes() == before


def test_no_test_document_is_trained_on(finetuned: RunResult) -> None:
    """The documents trained on or chosen by are kept by hash; none of them has the hash of a test document."""
    used = set(json.loads((finetuned.folder / "recovery" / "documents.json").read_text())["documents"])
    assert used
    assert finetuned.evaluation is not None
    assert all(score.num_excluded == 0 for score in finetuned.evaluation.models["dense"].text.values())


def test_distillation_reaches_through_a_smaller_vocabulary(pico: Pico, tmp_path: Path) -> None:
    """Taught by its fine-tuned parent, a model with fewer token ids learns the domain; cached logits do as well."""
    taught = {"teacher": "dense_finetuned", "cached_logits": 64}
    result = train(pico, tmp_path / "run", BOTH, distill=taught)
    assert loss(result, "recovered") < 0.97 * loss(result, "pruned")
    assert result.recoveries["recovered"].objective == "distill"
    assert (result.folder / "recovery" / "dense_finetuned" / "config.json").exists()
    another = train(pico, result.folder, {**BOTH, "budget": {"parameters": 0.15}}, distill=taught)
    assert {"recover:dense_finetuned", "evaluate:dense_finetuned"} <= set(another.reused)


def test_a_checkpoint_in_16_bits_is_recovered_in_16_bits(tmp_path: Path) -> None:
    """Trained in float32, saved in bfloat16 as it came, with rotary tables as precise as they were."""
    folder = tmp_path / "pico"
    folder.mkdir()
    pico = build_pico(folder)
    save_model_folder(pico.model, dtype=torch.bfloat16)
    result = train(pico, tmp_path / "run", method="finetune", baselines=[])
    weights = load_file(result.folder / "recovered" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert loss(result, "recovered") < loss(result, "pruned")


def test_another_seed_draws_and_trains_another_control(pico: Pico, tmp_path: Path) -> None:
    """The trained control is never an earlier one's; the dense model's training does not depend on the seed."""
    options = {"method": "finetune", "max_tokens": 1024, "evaluations": 1}
    first = train(pico, tmp_path / "run", {"budget": {"channels": 0.25}}, **options)
    second = train(pico, tmp_path / "run", {"budget": {"channels": 0.25}, "seed": 5}, **options)
    assert loss(first, "random_recovered") != loss(second, "random_recovered")
    assert "recover:dense_finetuned" in second.reused and "recover:random_recovered" not in second.reused


def test_a_recipe_with_a_training_can_be_read_back(pico: Pico, tmp_path: Path) -> None:
    """The recipe in the run folder is the recipe that was run."""
    recipe = parse_recipe(pico.recipe(tmp_path / "run", recover={"method": "finetune"}))
    file = tmp_path / "recipe.yml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe


def test_removed_layers_are_made_up_for(pico: Pico, tmp_path: Path) -> None:
    """The hidden-state term works where layers are gone; held-out loss does not rise."""
    prune = {"units": ["layer", "ffn_channel"], "budget": {"layers": 0.5, "channels": 0.25}}
    result = train(pico, tmp_path / "run", prune, distill={"hidden_weight": 1.0}, baselines=[])
    curve = result.recoveries["recovered"]
    assert curve.best.losses["medical"] < curve.points[0].losses["medical"]


def test_adapters_are_merged_into_uneven_layers(pico: Pico, tmp_path: Path) -> None:
    """LoRA leaves no trace: the folder has the pruned model's tensors, and only adapters were counted as trained."""
    prune = {"budget": {"channels": 0.25}, "shape": "uneven"}
    result = train(pico, tmp_path / "run", prune, method="finetune", lora=True, baselines=[])
    recovered = load_file(result.folder / "recovered" / "model.safetensors")
    pruned = load_file(result.folder / "model" / "model.safetensors")
    assert {n: t.shape for n, t in recovered.items()} == {n: t.shape for n, t in pruned.items()}
    assert result.recoveries["recovered"].trained_parameters < sum(t.numel() for t in pruned.values())


def test_rounds_cut_as_much_as_one_cut(pico: Pico, tmp_path: Path) -> None:
    """Two rounds end at the size of the plan within a channel per layer, and keep the weights of the last alone."""
    result = train(pico, tmp_path / "run", BOTH, rounds=2, baselines=[])
    assert result.evaluation is not None
    models = result.evaluation.models
    apart = abs(models["recovered"].total_parameters - models["pruned"].total_parameters)
    assert apart <= 2 * 3 * 64  # a channel has three columns of the hidden size, in each of two layers
    assert result.recoveries["recovered"].tokens <= 4096 * 1.2
    assert not list((result.folder / "rounds").rglob("*.safetensors.index.json"))
    assert not list((result.folder / "rounds").rglob("model.safetensors"))
    plan = json.loads((result.folder / "recovered" / "secateur_plan.json").read_text())
    assert plan["provenance"]["model"] == pico.model.name and plan["vocabulary"] is not None
    assert sum(plan["parameters_pruned"].values()) == models["recovered"].total_parameters
    starts = [point for point in result.recoveries["recovered"].points if point.train_loss is None]
    before = [point for point in result.recoveries["recovered"].points if point.step == starts[1].step]
    assert abs(before[0].losses["general"] - starts[1].losses["general"]) < 0.5  # one unit throughout


def test_answers_of_the_parent_are_trained_on(pico: Pico, tmp_path: Path) -> None:
    """Prompts are answered by the dense model and kept; only answers are learned."""
    prompts = {"prompt": "Question: {question}\nAnswer:", "max_new_tokens": 8}
    result = train(pico, tmp_path / "run", method="finetune", responses=prompts, baselines=[], max_tokens=512)
    lines = (result.folder / "recovery" / "responses" / "medical.jsonl").read_text().splitlines()
    assert len(lines) > 10
    assert result.recoveries["recovered"].steps > 0


def test_chosen_documents_are_remembered(pico: Pico, tmp_path: Path) -> None:
    """A selection by meaning is made once; the same recipe trains on the same text without looking again."""
    select = {"method": "prototypes", "clusters": 4, "near_duplicates": 0.9}
    first = train(pico, tmp_path / "run", select=select, baselines=[])
    (first.folder / "recovery" / "recovered.json").unlink()
    second = train(pico, tmp_path / "run", select=select, baselines=[])
    fingerprints = [result.recoveries["recovered"].text_fingerprint for result in (first, second)]
    assert fingerprints[0] == fingerprints[1]
    assert "evaluate:recovered" in second.reused


def test_a_training_stops_where_the_dense_model_is_reached(pico: Pico, tmp_path: Path) -> None:
    """With ``until: dense`` training ends at the first evaluation that is as good as the dense model."""
    result = train(pico, tmp_path / "run", method="finetune", until="dense", baselines=[], evaluations=8)
    curve = result.recoveries["recovered"]
    assert curve.stopped == "recovered"
    assert curve.target is not None and curve.points[-1].losses["medical"] <= curve.target
    assert all(point.losses["medical"] > curve.target for point in curve.points[:-1])


_KILLED = """
import sys
from secateur.cli.main import main
main(["recover", sys.argv[1], "--quiet"])
"""


def test_a_killed_training_goes_on_and_ends_the_same(pico: Pico, tmp_path: Path) -> None:
    """SIGKILL in the middle of a training; the same command ends with the weights of a run that was not stopped."""
    recover = {**TRAINING, "method": "finetune", "baselines": [], "evaluations": 8, "batch_size": 1}
    whole = pico.write_recipe(tmp_path / "whole.yml", tmp_path / "whole", recover=recover)
    cut = pico.write_recipe(tmp_path / "cut.yml", tmp_path / "cut", recover=recover)
    run_in_process(whole)
    process = subprocess.Popen([sys.executable, "-c", _KILLED, str(cut)], env=one_thread())
    wait_for(tmp_path / "cut" / "recovery" / "checkpoints" / "recovered", process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "recovered").exists()
    run_in_process(cut)
    first, second = (load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)


def run_in_process(recipe: Path) -> None:
    """Run ``secateur recover`` to its end."""
    subprocess.run([sys.executable, "-c", _KILLED, str(recipe)], env=one_thread(), check=True)


def one_thread() -> dict[str, str]:
    """Return an environment in which a process keeps to one core."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def wait_for(folder: Path, process: subprocess.Popen[bytes]) -> None:
    """Return once a training has written a second checkpoint."""
    for _ in range(3000):
        assert process.poll() is None, "the training ended before it could be killed"
        if folder.is_dir() and len([place for place in folder.iterdir() if place.is_dir()]) >= 2:
            return
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


@pytest.mark.slow
def test_several_processes_train_what_one_does(pico: Pico, tmp_path: Path) -> None:
    """One process prepares and writes, both train; half the batch in each of two is the batch of one."""
    recover = {**TRAINING, "method": "finetune", "baselines": ["dense"]}
    alone = pico.write_recipe(tmp_path / "a.yml", tmp_path / "alone", recover=recover)
    shared = pico.write_recipe(tmp_path / "s.yml", tmp_path / "shared", recover={**recover, "batch_size": 2})
    run_in_process(alone)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "secateur"]
    subprocess.run([*launch, "recover", str(shared), "--quiet"], env=one_thread(), check=True)
    first, second = (load_file(tmp_path / name / "recovered" / "model.safetensors") for name in ("alone", "shared"))
    assert all(torch.allclose(first[name], second[name], atol=1e-5) for name in first)
    result = secateur.run(pico.recipe(tmp_path / "shared", recover={**recover, "batch_size": 2}))
    assert {"recover:recovered", "recover:dense_finetuned"} <= set(result.reused)
    assert result.evaluation is not None and list(result.evaluation.models)[:2] == ["dense", "dense_finetuned"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no general text to replay": ({"replay": 0.2}, {"general": None}, "recover.replay trains on general text too"),
    "float16 on a CPU": ({"precision": "float16"}, {}, "recover.precision is float16"),
    "rounds of a threshold": (
        {"rounds": 2},
        {"prune": {"budget": {"threshold": 0.5}}},
        "names no size that could be shared out among the rounds",
    ),
    "rounds that stop early": ({"rounds": 2, "until": "dense"}, {}, "stops one training"),
    "an absent teacher": (
        {"distill": {"teacher": "dense_finetuned"}, "baselines": []},
        {},
        "add dense to baselines",
    ),
    "answers and documents": (
        {"responses": {"prompt": "{question}"}, "select": {"method": "density"}},
        {},
        "select chooses among documents",
    ),
    "rounds that choose": ({"rounds": 2, "select": {"method": "density"}}, {}, "select is made once"),
    "nothing to learn": ({"distill": {"logits_weight": 0}}, {}, "nothing would be learned"),
    "a distill section for fine-tuning": (
        {"method": "finetune", "distill": {"temperature": 2}},
        {},
        "method is finetune",
    ),
}


@pytest.mark.parametrize(("recover", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_trained_is_refused_before_anything_runs(
    pico: Pico, tmp_path: Path, recover: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    """The message says what does not fit; the run folder is not made."""
    data = pico.recipe(tmp_path / "run", recover={**TRAINING, **recover}, **changes)
    with pytest.raises(ConfigError, match=words):
        secateur.run({key: value for key, value in data.items() if value is not None})
    assert not (tmp_path / "run").exists()


def test_recovering_without_a_section_says_what_to_add(
    pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``secateur recover`` on a recipe without a recover section exits with 2 and says what is missing."""
    answer = call(capsys, "recover", pico.write_recipe(tmp_path / "r.yml", tmp_path / "run"))
    assert answer.code == 2
    assert "no recover section" in answer.err
