"""Runs on a mixture of buckets: formed from the statistics of one pass each, in plans, fits and controls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import secateur
from secateur.errors import ConfigError, CorpusError
from tests.command import call
from tests.pico import Pico

BUDGET = {"budget": {"channels": 0.5}}
MIX = {"medical": 0.8, "general": 0.2}
TAKEN = ["calibrate:medical", "calibrate:general"]
GRAMS = [f"gram:{name}:{split}" for name in ("medical", "general") for split in ("calibration", "validation")]


@pytest.fixture(scope="module")
def mixed(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on a mixture, with reconstruction; runs on it go on, one after the other."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    secateur.run(pico.recipe(folder, prune={**BUDGET, "mix": MIX, "reconstruct": "dense"}))
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Return the pruned model's tensors."""
    return load_file(run / "model" / "model.safetensors")


def test_another_mixture_costs_no_pass(mixed: Path, pico: Pico) -> None:
    """Statistics and Gram matrices are kept per bucket; plan, fits and controls follow the weights."""
    before, kept = weights(mixed), (mixed / "plan.json").read_text()
    prune = {**BUDGET, "mix": {"general": 9, "medical": 1}, "reconstruct": "dense"}
    result = secateur.run(pico.recipe(mixed, prune=prune))
    assert result.reused == [*TAKEN, *GRAMS, "evaluate:dense"]
    assert result.plan is not None and result.plan.mix == {"general": 0.9, "medical": 0.1}
    assert json.loads(kept)["layers"] != json.loads((mixed / "plan.json").read_text())["layers"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert not torch.equal(before[name], weights(mixed)[name])
    assert "general (0.9), medical (0.1)" in (mixed / "report.md").read_text()
    again = secateur.run(pico.recipe(mixed, prune={**prune, "mix": {"general": 90.0, "medical": 10.0}}), until="plan")
    assert again.plan is not None and again.plan.layers == result.plan.layers


def test_fits_follow_the_weights_where_the_choice_does_not(pico: Pico, tmp_path: Path) -> None:
    """The same random units, fitted to other mixtures, are other models; also on the pruned stream."""
    for how in ("dense", "pruned"):
        found = []
        for mix in (MIX, {"medical": 0.2, "general": 0.8}):
            prune = {**BUDGET, "method": "random", "mix": mix, "reconstruct": how}
            result = secateur.run(pico.recipe(tmp_path / "run", prune=prune), until="shrink")
            assert "shrink" not in result.reused and result.plan is not None
            found.append((result.plan.layers, weights(tmp_path / "run")))
        assert found[0][0] == found[1][0]
        changed = {name for name, tensor in found[0][1].items() if not tensor.equal(found[1][1][name])}
        after_a_cut = {"model.layers.1.self_attn.o_proj.weight"} if how == "pruned" else set()
        assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)} | after_a_cut


def test_the_vocabulary_counts_the_domains_only(pico: Pico, tmp_path: Path) -> None:
    """Whatever the mixture, unless its own section names buckets."""
    counted = {}
    units = {"units": ["ffn_channel", "vocabulary"], "vocabulary": {"multiple_of": 1}}
    for name, prune in {"mix": {"mix": MIX}, "plain": {}}.items():
        result = secateur.run(pico.recipe(tmp_path / name, prune={**BUDGET, **units, **prune}), until="plan")
        assert result.plan is not None
        counted[name] = result.plan.vocabulary
    assert counted["mix"] == counted["plain"]


def test_the_command_line_sets_a_mixture(
    finished: Path, tmp_path: Path, pico: Pico, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the recipe names buckets."""
    file = pico.write_recipe(tmp_path / "r.yml", tmp_path / "run", prune={**BUDGET, "buckets": ["medical"]})
    answer = call(capsys, "plan", file, "--mix", "medical=3", "--mix", "general=1", "--json")
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "run" / "plan.json").read_text())["mix"] == {"medical": 0.75, "general": 0.25}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prune": {"mix": {"medcal": 1}}}, r"prune\.mix: unknown bucket 'medcal'\. Did you mean 'medical'\?"),
        ({"prune": {"mix": {"medical": 1}, "buckets": ["medical"]}}, "both buckets and mix say which text decides"),
        (
            {"prune": {"mix": MIX}, "calibrate": {"buckets": ["medical"]}},
            r"prune\.mix names general, which calibrate\.buckets leaves out",
        ),
    ],
)
def test_mixtures_that_cannot_be_are_refused_at_once(
    pico: Pico, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """Before anything is read or written."""
    with pytest.raises(ConfigError, match=words):
        secateur.run(pico.recipe(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


# -- too little text for Gram matrices -------------------------------------------------------------------------------


@pytest.mark.parametrize("prune", [{"reconstruct": "dense"}, {"reconstruct": "pruned"}, {"method": "obs"}])
def test_fewer_tokens_than_channels_are_refused_before_calibration(
    pico: Pico, tmp_path: Path, prune: dict[str, str]
) -> None:
    """By the limit, and by the text where it is the shorter; runs without Gram matrices need no such text."""
    limit = {"max_tokens": 80, "block_size": 64, "batch_size": 8}
    with pytest.raises(CorpusError, match=r"has 0\.8 calibration tokens per channel \(80 tokens for 96 channels\)"):
        secateur.run(pico.recipe(tmp_path / "run", calibrate=limit, prune={**BUDGET, **prune}))
    short = tmp_path / "short.txt"
    short.write_text("\n\n".join(f"{n} aspirin, insulin and no benefit" for n in range(10)), encoding="utf-8")
    recipe = pico.recipe(
        tmp_path / "run", calibrate={**limit, "block_size": 16, "max_tokens": None}, prune={**BUDGET, **prune}
    )
    recipe["domain"] = {"medical": {"path": str(short), "splits": {"calibration": 0.3, "validation": 0.3, "test": 0.4}}}
    with pytest.raises(CorpusError, match="tokens per channel"):
        secateur.run(recipe)
    assert not (tmp_path / "run").exists()
    secateur.run(pico.recipe(tmp_path / "run", calibrate=limit, prune=BUDGET), until="plan")


def test_little_text_is_noted_in_the_plan(pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With how much would do; the note is shown, and gone with more text."""
    prune = {**BUDGET, "reconstruct": "dense"}
    for tokens, noted in ((300, True), (600, False)):
        limit = {"max_tokens": tokens, "block_size": 64}
        file = pico.write_recipe(tmp_path / "r.yml", tmp_path / "run", calibrate=limit, prune=prune)
        answer = call(capsys, "plan", file)
        assert answer.code == 0, answer.err
        assert ("Calibrate on 960 tokens or more" in answer.out.replace("\n", " ")) == noted
