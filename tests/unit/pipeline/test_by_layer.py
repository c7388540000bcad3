"""Whole jobs on models of which one layer is in memory: the same plan, weights and losses as in memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.errors import ConfigError, ExportError
from secateur.files import CACHE_VARIABLE
from secateur.pipeline.by_layer import remove_leftovers, require_disk
from secateur.pipeline.result import RunResult
from tests.moe import moe_model
from tests.pico import Pico, build_pico, pico_tokenizer, save_model_folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Pico:
    """A pico project."""
    return build_pico(tmp_path_factory.mktemp("pico"))


def model_of(pico: Pico, family: str, dtype: torch.dtype) -> Path:
    """Return the folder of a tiny model that reads the project's text."""
    folder, tokenizer = pico.model.parent / f"{family}-{dtype}", pico_tokenizer()
    if not folder.exists():
        if family == "mixtral":
            moe_model(family, dtype, vocab_size=len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        else:
            sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 8}
            more = {"num_key_value_heads": 4, "head_dim": 8, "max_position_embeddings": 256}
            save_model_folder(folder, dtype=dtype, model_type=family, **sizes, **more)
    return folder


def scores_of(result: RunResult) -> Any:
    """Return all that was measured, but for speeds and for the bytes of files, whose headers differ."""
    assert result.evaluation is not None
    rows = result.evaluation.models
    texts = [score for row in rows.values() for score in row.text.values()]
    texts += [
        score for effect in result.evaluation.vocabulary.values() for score in (effect.resegmented, effect.restricted)
    ]
    return {name: row.parameters for name, row in rows.items()}, [replace(text, tokens_per_s=1.0) for text in texts]


def require_same_weights(ours: Path, theirs: Path) -> None:
    """Compare weights tensor by tensor and configurations key by key."""
    found, expected = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert json.loads((ours / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())


@pytest.mark.parametrize(
    ("family", "dtype", "prune"),
    [
        ("llama", torch.float32, {"method": "contextual", "reconstruct": "pruned"}),
        ("llama", torch.bfloat16, {"method": "wanda", "units": ["gqa_group", "layer"], "budget": {"parameters": 0.3}}),
        ("qwen3", torch.bfloat16, {"method": "activation_norm", "reconstruct": "pruned"}),
        ("qwen3", torch.float32, {"method": "fluctuation", "reconstruct": "dense", "bias_compensation": False}),
        ("llama", torch.float32, {"units": ["ffn_channel", "vocabulary"], "budget": {"parameters": 0.2}}),
        ("mixtral", torch.float32, {"method": "reap", "budget": {"experts": 0.5}}),
    ],
)
def test_a_job_by_layer_makes_what_a_job_in_memory_makes(
    project: Pico, tmp_path: Path, family: str, dtype: torch.dtype, prune: dict[str, Any]
) -> None:
    """Plan, weights and every document's loss are equal, also of the control; nothing is left between the files."""
    asked = {"method": "contextual", "budget": {"channels": 0.25}, **prune}
    model = str(model_of(project, family, dtype))
    runs = {
        memory: secateur.run(project.recipe(tmp_path / memory, model=model, memory=memory, prune=asked))
        for memory in ("whole", "by_layer")
    }
    assert runs["by_layer"].plan == runs["whole"].plan
    assert scores_of(runs["by_layer"]) == scores_of(runs["whole"])
    require_same_weights(tmp_path / "by_layer/model", tmp_path / "whole/model")
    assert sorted(file.name for file in (tmp_path / "by_layer").iterdir()) == sorted(
        file.name for file in (tmp_path / "whole").iterdir()
    )


def test_results_in_memory_serve_a_run_by_layer(project: Pico, tmp_path: Path) -> None:
    """And nothing is loaded for them: how much is held at once does not change what comes out."""
    secateur.run(project.recipe(tmp_path / "run"))
    again = secateur.run(project.recipe(tmp_path / "run", memory="by_layer"))
    assert {"calibrate:medical", "plan", "shrink", "evaluate:dense", "evaluate:pruned", "evaluate:random"} <= set(
        again.reused
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prune": {"method": "taylor"}}, "prune.method: taylor takes gradients"),
        ({"prune": {"allocation": "knapsack", "shape": "uneven"}}, "prune.allocation: knapsack runs many"),
        ({"prune": {"budget": {"max_domain_loss": 0.1}}}, "prune.budget.max_domain_loss runs many"),
        (
            {"prune": {"units": ["layer"], "budget": {"parameters": 0.3}, "depth_method": "perplexity_drop"}},
            "perplexity_drop runs many",
        ),
        ({"recover": {}}, "recover trains the whole model"),
        ({"evaluate": {"speed": True}}, "evaluate.speed times the whole model"),
        ({"evaluate": {"generations": True}}, "evaluate.generations lets the model write"),
        ({"export": ["gguf"]}, "export reads the whole pruned model"),
    ],
)
def test_what_needs_the_whole_model_is_refused_first(
    project: Pico, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """Before anything is written, with what to do."""
    prune = {"method": "contextual", "budget": {"channels": 0.25}, **changes.pop("prune", {})}
    with pytest.raises(ConfigError, match=f"{message}.*memory: whole"):
        secateur.run(project.recipe(tmp_path / "run", memory="by_layer", prune=prune, **changes))
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_a_disk_that_is_too_small_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fits keep four states of all texts at once, other passes one of the longest."""
    usage = namedtuple("usage", ["total", "used", "free"])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 0, 4 * 10**9))
    require_disk(tmp_path / "new" / "run", [1_000_000, 400], 0, 4000)
    with pytest.raises(ExportError, match=r"take 4.80 GB in .*run, and 4.00 GB are free there. Free some"):
        require_disk(tmp_path / "new" / "run", [1_000_000], 300_000, 4000)


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    """And nothing else."""
    for name in ("hidden-states-x", "spilled-y", "control-z", ".model-a1", "model", "statistics", ".git"):
        (tmp_path / name).mkdir()
    for name in (".plan.json.12ab.part", "statistics/.medical.safetensors.12ab.part", "statistics/medical.safetensors"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(file.name for file in tmp_path.rglob("*")) == [".git", "medical.safetensors", "model", "statistics"]


@pytest.mark.slow
def test_memory_grows_with_a_layer_and_not_with_the_model(tmp_path: Path) -> None:
    """Calibrating, cutting and measuring twelve layers holds a few of them at most."""
    build_pico(tmp_path)
    wide = {"hidden_size": 768, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 96}
    large = save_model_folder(tmp_path / "large", num_hidden_layers=12, num_key_value_heads=8, **wide)
    size = sum(file.stat().st_size for file in large.glob("*.safetensors"))
    assert size > 450_000_000
    command = [sys.executable, "-m", "tests.by_layer_child", str(tmp_path), str(large)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    growth = json.loads(done.stdout.splitlines()[-1])
    if growth is None:
        pytest.skip("this system does not tell how much memory a process held")
    assert growth < 5 * size / 12
