"""The main job from recipe to report: what it makes, what it reuses, what it never measures on, and how it stops."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.corpus import document_hash, read_documents
from secateur.errors import ConfigError
from secateur.files import held
from secateur.pipeline import RunResult, calibration, cutting, evaluation, planning
from secateur.recipe import CorpusSpec
from secateur.records.plan import Plan, format_ranges
from secateur.report.page import is_available
from secateur.store.artifacts import read_scores
from secateur.store.run_folder import RunFolder
from tests.command import call, environment, fresh_python, replace_in
from tests.pico import (
    INTERMEDIATE_SIZE,
    NUM_GROUPS,
    NUM_LAYERS,
    Pico,
    general_paragraphs,
    medical_records,
    save_model_folder,
    write_records,
)

STAGES = [
    "calibrate:medical",
    "calibrate:general",
    "plan",
    "shrink",
    "evaluate:dense",
    "evaluate:pruned",
    "evaluate:random",
]
FFN, GROUP = "ffn_channel", "gqa_group"


def files_in(folder: Path) -> list[str]:
    """Return the relative paths of all files, hidden ones included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def hidden_in(folder: Path) -> list[str]:
    """Return files and folders whose names begin with a dot: what is written before it gets its name."""
    return [str(path) for path in folder.rglob(".*")]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors in a model folder."""
    return load_file(folder / "model.safetensors")


def same_weights(first: Path, second: Path) -> bool:
    """Return whether two model folders hold bit for bit the same tensors."""
    a, b = weights_of(first), weights_of(second)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def read_plan(run: Path) -> Plan:
    """Return the plan of a run folder."""
    return Plan.from_dict(json.loads((run / "plan.json").read_text(encoding="utf-8")))


def kept_counts(plan: Plan, kind: str) -> list[int]:
    """Return how many units of a kind stay, per layer."""
    return [len(layer.keep) for layer in plan.layers[kind]]


# -- what a run makes ------------------------------------------------------------------------------------------------


def test_a_run_leaves_every_result_in_its_folder_and_nothing_else(finished: Path) -> None:
    """The run folder holds each stage's result under its documented name; no temporary file stays behind."""
    assert files_in(finished) == [
        "evaluation.json",
        "manifest.json",
        "model/LICENSE",
        "model/README.md",
        "model/config.json",
        "model/generation_config.json",
        "model/model.safetensors",
        "model/secateur_plan.json",
        "model/tokenizer.json",
        "model/tokenizer_config.json",
        "plan.json",
        "recipe.yml",
        *(["report.html"] if is_available() else []),
        "report.md",
        "scores/contextual.json",
        "scores/contextual.safetensors",
        "statistics/general.json",
        "statistics/general.safetensors",
        "statistics/medical.json",
        "statistics/medical.safetensors",
    ]


def test_the_model_is_physically_smaller(finished: Path, pico: Pico) -> None:
    """Rows and columns are gone from the file, the configuration says so, and all counts agree with the file."""
    before, after = weights_of(pico.model), weights_of(finished / "model")
    kept = int(INTERMEDIATE_SIZE * 0.75)
    assert AutoConfig.from_pretrained(finished / "model").intermediate_size == kept
    assert after["model.layers.1.mlp.down_proj.weight"].shape == (64, kept)
    assert after["model.layers.0.mlp.gate_proj.weight"].shape == (kept, 64)
    assert after.keys() == before.keys()
    on_disk = sum(tensor.numel() for tensor in after.values())
    models = json.loads((finished / "evaluation.json").read_text())["models"]
    assert on_disk == read_plan(finished).total_pruned == sum(models["pruned"]["parameters"].values())
    assert sum(tensor.numel() for tensor in before.values()) == sum(models["dense"]["parameters"].values())


def test_the_kept_weights_are_the_planned_rows_of_the_dense_ones(finished: Path, pico: Pico) -> None:
    """Nothing is changed but what the plan removes."""
    before, after, plan = weights_of(pico.model), weights_of(finished / "model"), read_plan(finished)
    for index, layer in enumerate(plan.layers[FFN]):
        place = f"model.layers.{index}.mlp"
        for name in ("gate_proj", "up_proj"):
            assert torch.equal(after[f"{place}.{name}.weight"], before[f"{place}.{name}.weight"][list(layer.keep)])
        assert torch.equal(after[f"{place}.down_proj.weight"], before[f"{place}.down_proj.weight"][:, list(layer.keep)])
    untouched = [name for name in before if ".mlp." not in name]
    assert untouched
    assert all(torch.equal(after[name], before[name]) for name in untouched)


def test_the_recipe_of_a_run_makes_the_same_run_again(finished: Path, tmp_path: Path) -> None:
    """``recipe.yml`` holds everything that was asked, defaults included."""
    again = secateur.run(finished / "recipe.yml", output=str(tmp_path / "again"))
    assert again.plan == read_plan(finished)
    assert same_weights(tmp_path / "again" / "model", finished / "model")


def test_the_words_agree_with_the_numbers(finished: Path) -> None:
    """Report and model card state the measured perplexity, the sizes, the licence and the documents excluded."""
    report = (finished / "report.md").read_text(encoding="utf-8")
    card = (finished / "model" / "README.md").read_text(encoding="utf-8")
    models = json.loads((finished / "evaluation.json").read_text())["models"]
    shown = f"{models['pruned']['text']['medical']['perplexity']:,.0f}"[:2]
    plan = read_plan(finished)
    for text in (report, card):
        assert shown in text
        assert "perplexity on held-out medical text is" in text
        assert "random" in text
    assert f"{plan.total_dense:,} parameters became {plan.total_pruned:,}" in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0"
    told = {r.dataset_name: r.metric_value for r in ModelCard(card).data.eval_results if r.metric_type == "perplexity"}
    measured = {bucket: score["perplexity"] for bucket, score in models["pruned"]["text"].items()}
    assert told == pytest.approx(measured, rel=1e-4)
    assert str(finished.parent) not in card and "72.7 kB of local files" in card
    assert "medical.jsonl" in report


# -- loading it elsewhere --------------------------------------------------------------------------------------------


def test_stock_transformers_loads_a_uniform_model(finished: Path) -> None:
    """A uniform model needs nothing of secateur: it loads and generates where secateur cannot even be imported."""
    code = f"""
import sys
sys.modules["secateur"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = {str(finished / "model")!r}
model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
assert not any(report.values()), report
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer("Question: The patient", return_tensors="pt")
generated = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(type(model).__module__, generated.shape[1] - inputs["input_ids"].shape[1])
"""
    answer = fresh_python("-c", code)
    assert answer.code == 0, answer.err
    assert answer.out.split() == ["transformers.models.llama.modeling_llama", "4"]


@pytest.fixture(scope="module")
def uneven(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with layers of different widths and heads."""
    folder = tmp_path_factory.mktemp("uneven") / "run"
    recipe = pico.recipe(folder, prune={"shape": "uneven", "budget": {"channels": 0.3, "groups": 0.25}})
    secateur.run(recipe, until="plan")
    edit_plan(folder, FFN, [list(range(50)), list(range(20, 90))])
    edit_plan(folder, GROUP, [[0, 2], [0, 1, 3]])
    secateur.run(recipe, until="shrink")
    return folder / "model"


@pytest.mark.parametrize("order", ["import secateur, transformers", "import transformers.models.auto, secateur"])
def test_an_uneven_model_loads_after_importing_secateur(uneven: Path, order: str) -> None:
    """``import secateur`` is enough, before or after transformers; the logits are those that were saved."""
    ids = [[5, 6, 7, 8]]
    expected = AutoModelForCausalLM.from_pretrained(uneven)(torch.tensor(ids)).logits.sum().item()
    code = f"""
{order}
import torch
from transformers import AutoModelForCausalLM
model, report = AutoModelForCausalLM.from_pretrained({str(uneven)!r}, output_loading_info=True)
assert not any(report.values()), report
generated = model.generate(torch.tensor({ids}), max_new_tokens=4, min_new_tokens=4, do_sample=False)
again = model(generated[:, :-1], use_cache=False).logits[0, 3:].argmax(-1)
assert again.tolist() == generated[0, 4:].tolist(), "the cache changes what is generated"
print(model.config.model_type, model(torch.tensor({ids})).logits.sum().item())
"""
    answer = fresh_python("-c", code)
    assert answer.code == 0, answer.err
    model_type, total = answer.out.split()
    assert model_type == "pruned_llama"
    assert float(total) == pytest.approx(expected, rel=1e-4, abs=1e-3)


# -- budgets, shapes and methods -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder that holds statistics and nothing later."""
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    secateur.run(pico.recipe(folder), until="calibrate")
    assert files_in(folder / "statistics")
    return folder


def shrunk(pico: Pico, calibrated: Path, folder: Path, prune: dict[str, Any]) -> RunResult:
    """Return a run up to its model, on a copy of the calibrated folder."""
    shutil.copytree(calibrated, folder)
    result = secateur.run(pico.recipe(folder, prune=prune), until="shrink")
    assert result.reused == ["calibrate:medical", "calibrate:general"]
    assert result.plan is not None
    on_disk = sum(tensor.numel() for tensor in weights_of(folder / "model").values())
    assert on_disk == result.plan.total_pruned < result.plan.total_dense
    return result


def total_removed(plan: Plan, kind: str) -> int:
    """Return how many units of a kind go, over all layers."""
    return sum(layer.num_removed for layer in plan.layers[kind])


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize(
    ("budget", "removed"),
    [
        ({"channels": 0.25}, {FFN: 0.25}),
        ({"groups": 0.5}, {GROUP: 0.5}),
        ({"channels": 0.5, "groups": 0.5}, {FFN: 0.5, GROUP: 0.5}),
    ],
)
def test_the_asked_share_of_units_goes(
    pico: Pico, calibrated: Path, tmp_path: Path, shape: str, budget: dict[str, float], removed: dict[str, float]
) -> None:
    """A budget in units removes exactly that share; a uniform plan the same number from every layer."""
    plan = shrunk(pico, calibrated, tmp_path / "run", {"shape": shape, "budget": budget}).plan
    assert plan is not None and set(plan.layers) == set(removed)
    sizes = {FFN: INTERMEDIATE_SIZE, GROUP: NUM_GROUPS}
    for kind, share in removed.items():
        assert total_removed(plan, kind) == round(share * sizes[kind] * NUM_LAYERS)
        if shape == "uniform":
            assert len(set(kept_counts(plan, kind))) == 1


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize("units", [[FFN], [FFN, GROUP]])
def test_a_budget_of_parameters_is_met(
    pico: Pico, calibrated: Path, tmp_path: Path, shape: str, units: list[str]
) -> None:
    """The share of all parameters that goes is the asked one, to within the cost of one channel per layer."""
    prune = {"shape": shape, "units": units, "budget": {"parameters": 0.2}}
    plan = shrunk(pico, calibrated, tmp_path / "run", prune).plan
    assert plan is not None and sorted(plan.layers) == sorted(units)
    channel = 3 * 64 * NUM_LAYERS
    assert abs(plan.total_dense - plan.total_pruned - 0.2 * plan.total_dense) <= channel


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_a_budget_of_bytes_is_met_on_disk(pico: Pico, calibrated: Path, tmp_path: Path, shape: str) -> None:
    """The weights take the asked number of bytes, to within the cost of one channel per layer."""
    result = shrunk(pico, calibrated, tmp_path / "run", {"shape": shape, "budget": {"bytes": "300 kB"}})
    assert result.plan is not None
    channel = 4 * 3 * 64 * NUM_LAYERS
    assert abs(4 * result.plan.total_pruned - 300_000) <= channel


def test_a_threshold_removes_what_scores_at_most_that_much(pico: Pico, calibrated: Path, tmp_path: Path) -> None:
    """The paper's rule: each layer loses exactly the channels at or below the threshold, whatever their number."""
    folder = tmp_path / "first"
    prune = {"shape": "uneven", "options": {"at": "linear"}, "budget": {"channels": 0.2}}
    shrunk(pico, calibrated, folder, prune)
    scores = read_scores(folder / "scores" / "contextual.safetensors").values[FFN]
    threshold = float(torch.cat(list(scores)).quantile(0.2))
    plan = shrunk(pico, calibrated, tmp_path / "second", {**prune, "budget": {"threshold": threshold}}).plan
    assert plan is not None
    for layer, values in zip(plan.layers[FFN], scores, strict=True):
        assert list(layer.keep) == (values > threshold).nonzero()[:, 0].tolist()


def test_methods_choose_different_units(pico: Pico, calibrated: Path, tmp_path: Path) -> None:
    """Contextual at both places, magnitude and random are really different choices of the same size."""
    chosen = {}
    for name, prune in {
        "activation": {"method": "contextual"},
        "linear": {"method": "contextual", "options": {"at": "linear"}},
        "magnitude": {"method": "magnitude"},
        "random": {"method": "random"},
        "other seed": {"method": "random", "seed": 1},
        "reversed": {"method": "reversed", "options": {"of": "magnitude"}},
    }.items():
        plan = shrunk(pico, calibrated, tmp_path / name, {**prune, "budget": {"channels": 0.5}}).plan
        assert plan is not None and kept_counts(plan, FFN) == [INTERMEDIATE_SIZE // 2] * NUM_LAYERS
        chosen[name] = [layer.keep for layer in plan.layers[FFN]]
    assert len({json.dumps(keep) for keep in chosen.values()}) == len(chosen)
    for best, worst in zip(chosen["magnitude"], chosen["reversed"], strict=True):
        assert sorted([*best, *worst]) == list(range(INTERMEDIATE_SIZE))


def test_a_pruned_model_can_be_pruned_again(uneven: Path, pico: Pico, tmp_path: Path) -> None:
    """The output is an ordinary input, also when its layers differ in width."""
    prune = {"shape": "uneven", "budget": {"channels": 0.2}}
    result = secateur.run(pico.recipe(tmp_path / "again", model=str(uneven), prune=prune))
    assert result.plan is not None and result.evaluation is not None
    assert result.plan.total_dense == sum(tensor.numel() for tensor in weights_of(uneven).values())
    assert result.evaluation.models["pruned"].total_parameters == result.plan.total_pruned
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again" / "model").num_parameters() < result.plan.total_dense


def test_several_domains_are_judged_together_or_apart(pico: Pico, tmp_path: Path) -> None:
    """Each domain has its own statistics; ``prune.buckets`` says which of them decide, and each is evaluated."""
    towns = tmp_path / "towns.txt"
    towns.write_text("\n\n".join(general_paragraphs(200, seed=5)), encoding="utf-8")
    domain = {**pico.recipe(tmp_path)["domain"], "towns": str(towns)}
    kept = {}
    for name, buckets in {"both": None, "medical": ["medical"], "towns": ["towns"]}.items():
        prune = {"budget": {"channels": 0.5}, **({"buckets": buckets} if buckets else {})}
        evaluate = {"max_tokens": 256, "controls": []}
        result = secateur.run(pico.recipe(tmp_path / "run", domain=domain, prune=prune, evaluate=evaluate))
        assert result.plan is not None and result.evaluation is not None
        assert set(result.evaluation.models["pruned"].text) == {"medical", "towns", "general"}
        assert list(result.plan.calibrated_on) == (buckets or ["medical", "towns"])
        kept[name] = [layer.keep for layer in result.plan.layers[FFN]]
    assert kept["medical"] != kept["towns"] != kept["both"] != kept["medical"]


# -- dtype -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stored_dtype_is_kept(pico: Pico, tmp_path: Path, dtype: torch.dtype) -> None:
    """A half-precision checkpoint stays in its precision on disk, although the work on a CPU is done in float32."""
    dense = save_model_folder(tmp_path / "half", dtype=dtype)
    secateur.run(pico.recipe(tmp_path / "run", model=str(dense)), until="shrink")
    before, after = weights_of(dense), weights_of(tmp_path / "run" / "model")
    assert {tensor.dtype for tensor in after.values()} == {dtype}
    assert torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")


# -- reuse -----------------------------------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> Any:
    """Stand in for something that must not be called."""
    raise AssertionError("this must not be called again")


def test_the_same_recipe_again_does_nothing(
    pico: Pico, copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second run reuses every stage, loads no weights, reads no text, and answers the same."""
    for name in (
        "inputs.load_model",
        "texts.load_split",
        "calibration.collect",
        "evaluation.evaluate_text",
        "cutting.export_huggingface",
        "inputs.load_tokenizer",
    ):
        monkeypatch.setattr(f"secateur.pipeline.{name}", refuse)
    before = {name: (copied / name).read_bytes() for name in ("evaluation.json", "plan.json", "model/README.md")}
    answer = call(capsys, "run", pico.write_recipe(tmp_path / "r.yml", copied), "--json")
    assert answer.code == 0, answer.err
    assert answer.json()["reused"] == STAGES
    assert {name: (copied / name).read_bytes() for name in before} == before


def test_a_new_budget_costs_no_second_calibration(pico: Pico, copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics and the dense model's evaluation do not depend on the budget; everything after does."""
    monkeypatch.setattr(calibration, "collect", refuse)
    result = secateur.run(pico.recipe(copied, prune={"budget": {"channels": 0.5}}))
    assert result.reused == ["calibrate:medical", "calibrate:general", "evaluate:dense"]
    assert kept_counts(read_plan(copied), FFN) == [INTERMEDIATE_SIZE // 2] * NUM_LAYERS
    assert AutoConfig.from_pretrained(copied / "model").intermediate_size == INTERMEDIATE_SIZE // 2
    assert "channels: 0.5" in (copied / "recipe.yml").read_text()


def test_batch_sizes_invalidate_nothing(pico: Pico, copied: Path) -> None:
    """How many blocks run at once is no part of a result."""
    calibrate = {**pico.recipe(copied)["calibrate"], "batch_size": 3}
    evaluate = {**pico.recipe(copied)["evaluate"], "batch_size": 5}
    assert secateur.run(pico.recipe(copied, calibrate=calibrate, evaluate=evaluate)).reused == STAGES


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"calibrate": {"max_tokens": 1024, "block_size": 64}}, []),
        ({"evaluate": {"max_tokens": 512, "controls": ["random"]}}, STAGES[:4]),
        ({"evaluate": {"max_tokens": 768, "controls": ["random", "reversed"]}}, STAGES),
        ({"evaluate": {"max_tokens": 768, "controls": []}}, STAGES[:-1]),
        ({"dtype": "float64"}, ["plan", "shrink"]),
        ({"prune": {"method": "contextual", "budget": {"channels": 0.25}, "seed": 7}}, [*STAGES[:2], *STAGES[3:5]]),
    ],
    ids=["calibration text", "test text", "another control", "no control", "dtype", "seed"],
)
def test_a_change_redoes_what_depends_on_it(pico: Pico, copied: Path, changes: dict[str, Any], kept: list[str]) -> None:
    """A stage is done again exactly when something it depends on has changed."""
    reused = secateur.run(pico.recipe(copied, **changes)).reused
    if "dtype" in changes:
        assert "calibrate:medical" not in reused and "evaluate:dense" not in reused
    else:
        assert reused == kept


def test_changed_text_is_calibrated_again(pico: Pico, copied: Path, tmp_path: Path) -> None:
    """Text that was edited is other text: its statistics are taken again, those of the other bucket are not."""
    general = tmp_path / "general.txt"
    general.write_text(pico.general.read_text(encoding="utf-8") + "\n\nOne more paragraph.\n", encoding="utf-8")
    reused = secateur.run(pico.recipe(copied, general=str(general))).reused
    assert "calibrate:general" not in reused
    assert {"calibrate:medical", "plan", "shrink"} <= set(reused)


def test_changed_weights_are_another_model(pico: Pico, copied: Path, tmp_path: Path) -> None:
    """Nothing is reused when a single weight differs, although every name and shape is the same."""
    other = save_model_folder(tmp_path / "other")
    tensors = weights_of(other)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] += 1.0
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert secateur.run(pico.recipe(copied, model=str(other))).reused == []


def test_a_copied_model_folder_is_the_same_model(pico: Pico, copied: Path, tmp_path: Path) -> None:
    """What counts is what is in the files, not where they lie."""
    moved = shutil.copytree(pico.model, tmp_path / "moved")
    assert secateur.run(pico.recipe(copied, model=str(moved))).reused == STAGES


@pytest.mark.parametrize(
    ("deleted", "redone"),
    [
        ("statistics/medical.safetensors", {"calibrate:medical"}),
        ("statistics/medical.json", {"calibrate:medical"}),
        ("statistics", {"calibrate:medical", "calibrate:general"}),
        ("scores", set()),
        ("plan.json", {"plan"}),
        ("model", {"shrink"}),
        ("model/model.safetensors", {"shrink"}),
        ("model/config.json", {"shrink"}),
        ("model/tokenizer.json", {"shrink"}),
        ("model/secateur_plan.json", {"shrink"}),
        ("model/README.md", set()),
        ("evaluation.json", {"evaluate:dense", "evaluate:pruned", "evaluate:random"}),
        ("report.md", set()),
        ("recipe.yml", set()),
    ],
)
def test_whatever_is_deleted_is_made_again(
    pico: Pico, finished: Path, copied: Path, deleted: str, redone: set[str]
) -> None:
    """Every file comes back, from the stage before it and with the same content; no other stage runs."""
    gone = copied / deleted
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    result = secateur.run(pico.recipe(copied))
    assert set(STAGES) - set(result.reused) == redone
    assert files_in(copied) == files_in(finished)
    assert read_plan(copied) == read_plan(finished)
    assert same_weights(copied / "model", finished / "model")
    before, after = (json.loads((run / "evaluation.json").read_text())["models"] for run in (finished, copied))
    assert {n: m["text"]["medical"]["nll_per_token"] for n, m in after.items()} == pytest.approx(
        {n: m["text"]["medical"]["nll_per_token"] for n, m in before.items()}, rel=1e-6
    )


# -- a plan that a person edited -------------------------------------------------------------------------------------


def edit_plan(run: Path, kind: str, keep: list[list[int]], **changes: Any) -> None:
    """Write other kept units, per layer, into a run's plan.json."""
    file = run / "plan.json"
    data = json.loads(file.read_text(encoding="utf-8"))
    for layer, units in zip(data["layers"][kind], keep, strict=True):
        layer["keep"] = format_ranges(units)
    file.write_text(json.dumps({**data, **changes}), encoding="utf-8")


def test_an_edited_plan_is_what_gets_cut(pico: Pico, copied: Path) -> None:
    """The units named in plan.json stay and no others; all sizes that are reported are those of the edited plan."""
    keep = [list(range(10)), list(range(5, 15))]
    edit_plan(copied, FFN, keep)
    result = secateur.run(pico.recipe(copied))
    assert result.reused == ["calibrate:medical", "calibrate:general", "plan", "evaluate:dense"]
    after = weights_of(copied / "model")
    before = weights_of(pico.model)
    for index, units in enumerate(keep):
        name = f"model.layers.{index}.mlp.up_proj.weight"
        assert torch.equal(after[name], before[name][units])
    assert result.plan is not None and result.evaluation is not None
    total = sum(tensor.numel() for tensor in after.values())
    assert result.evaluation.models["pruned"].total_parameters == total
    assert result.evaluation.models["random"].total_parameters == total
    assert result.plan.total_pruned == total
    assert f"became {total:,}" in (copied / "model" / "README.md").read_text(encoding="utf-8")


def test_an_edited_plan_may_become_uneven(pico: Pico, copied: Path) -> None:
    """Different widths need ``shape: uneven`` in the plan, and then load as such."""
    edit_plan(copied, FFN, [[0, 1, 2], [4, 5, 6, 7]], shape="uneven")
    secateur.run(pico.recipe(copied), until="shrink")
    config = AutoConfig.from_pretrained(copied / "model")
    assert [config.per_layer_config[index].intermediate_size for index in range(NUM_LAYERS)] == [3, 4]


# -- being stopped ---------------------------------------------------------------------------------------------------

STOPS = {
    "while calibrating": ("secateur.stream.forward.model_inputs", []),
    "after calibrating": ("secateur.pipeline.planning.write_scores", ["calibrate:medical", "calibrate:general"]),
    "before the plan is recorded": (
        "secateur.pipeline.planning.write_json",
        ["calibrate:medical", "calibrate:general"],
    ),
    "while saving": ("secateur.export.huggingface.compare_reloaded", STAGES[:3]),
    "while evaluating": ("secateur.pipeline.evaluation.evaluate_text", STAGES[:4]),
}


def stop(*_: Any, **__: Any) -> Any:
    """Stand in for a moment at which the person presses Ctrl-C."""
    raise KeyboardInterrupt


@pytest.mark.parametrize(("place", "done"), STOPS.values(), ids=STOPS)
def test_a_stopped_run_leaves_whole_files_and_resumes(
    pico: Pico,
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    done: list[str],
) -> None:
    """Ctrl-C exits with 130 and says how to go on; the same command then redoes only what was not finished."""
    run = tmp_path / "run"
    recipe = pico.write_recipe(tmp_path / "r.yml", run)
    with monkeypatch.context() as patch:
        replace_in(patch, place, stop)
        answer = call(capsys, "run", recipe, "--quiet")
    assert answer.code == 130
    assert "stopped; the same command continues" in answer.err
    assert "Traceback" not in answer.err
    assert hidden_in(run) == []
    assert (run / "model").exists() == (place == "secateur.pipeline.evaluation.evaluate_text")
    again = call(capsys, "run", recipe, "--quiet", "--json")
    assert again.code == 0, again.err
    assert again.json()["reused"] == done
    assert files_in(run) == files_in(finished)
    assert same_weights(run / "model", finished / "model")


@pytest.mark.parametrize("stage", ["plan", "evaluate:pruned"])
def test_a_result_that_was_not_recorded_is_never_taken_for_an_older_one(
    pico: Pico, finished: Path, copied: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Stopped between writing a new result and recording it, a run with the old recipe does not take it for its own."""
    finish = RunFolder.finish

    def stop_at(self: RunFolder, name: str, *arguments: Any, **facts: Any) -> None:
        if name == stage:
            raise KeyboardInterrupt
        finish(self, name, *arguments, **facts)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", stop_at)
        with pytest.raises(KeyboardInterrupt):
            secateur.run(pico.recipe(copied, prune={"budget": {"channels": 0.75}}))
    secateur.run(pico.recipe(copied))
    assert read_plan(copied) == read_plan(finished)
    before, after = (json.loads((run / "evaluation.json").read_text())["models"] for run in (finished, copied))
    for name, model in before.items():
        assert after[name]["parameters"] == model["parameters"]
        assert after[name]["text"]["medical"]["document_nll"] == pytest.approx(
            model["text"]["medical"]["document_nll"], rel=1e-6
        )


DAWDLE = """
import sys, time
from secateur.pipeline import evaluation
from secateur.cli.main import main

def evaluate_late(*arguments, **options):
    time.sleep(120)

evaluation.evaluate_text = evaluate_late
main(sys.argv[1:])
"""
"""The command line, but the first measurement never comes: there is always time to interrupt it."""


def test_a_process_that_gets_sigint_leaves_whole_files_and_resumes(
    pico: Pico, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A real process, interrupted while it works, exits with 130 and is continued by the same command."""
    run = tmp_path / "run"
    slow = {"max_tokens": None, "block_size": 64, "batch_size": 1}
    recipe = pico.write_recipe(tmp_path / "r.yml", run, calibrate=slow)
    process = subprocess.Popen(
        [sys.executable, "-c", DAWDLE, "run", str(recipe)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # Whoever runs the tests in the background ignores SIGINT, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        wait_until_done("shrink", run, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130, err
    assert "stopped; the same command continues" in err
    assert "Traceback" not in err
    assert hidden_in(run) == []
    again = call(capsys, "run", recipe, "--quiet", "--json")
    assert again.code == 0, again.err
    assert "calibrate:medical" in again.json()["reused"]
    assert files_in(run) == files_in(finished)


def wait_until_done(stage: str, run: Path, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Return when a run's manifest records a stage; fail when the process ends before or the time is over."""
    manifest = run / "manifest.json"
    deadline = time.monotonic() + seconds
    while not manifest.exists() or stage not in json.loads(manifest.read_text())["stages"]:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"{stage} was not done in {seconds} s"
        time.sleep(0.002)


# -- what is measured on ---------------------------------------------------------------------------------------------


class Watched:
    """Remembers which documents were calibrated on and which were measured on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calibrated: set[int] = set()
        self.measured: set[int] = set()
        self.excluded: list[int] = []
        collect, evaluate_text = calibration.collect, evaluation.evaluate_text

        def watched_collect(model: Any, blocks: Any, *arguments: Any, **options: Any) -> Any:
            self.calibrated |= set(blocks.documents.tolist())
            return collect(model, blocks, *arguments, **options)

        def watched_evaluate(model: Any, blocks: Any, *arguments: Any, **options: Any) -> Any:
            self.measured |= set(blocks.documents.tolist())
            self.excluded.append(blocks.num_excluded)
            return evaluate_text(model, blocks, *arguments, **options)

        patch.setattr(calibration, "collect", watched_collect)
        patch.setattr("secateur.pipeline.evaluation.evaluate_text", watched_evaluate)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """Watches the runs of one test."""
    yield Watched(monkeypatch)


def test_text_that_is_split_by_hash_is_never_measured_on_where_it_was_calibrated_on(
    pico: Pico, tmp_path: Path, watched: Watched
) -> None:
    """Calibration and test documents are disjoint, also when all text is used."""
    recipe = pico.recipe(
        tmp_path / "run",
        calibrate={"max_tokens": None, "block_size": 64, "batch_size": 32},
        evaluate={"max_tokens": None, "batch_size": 32, "controls": []},
    )
    secateur.run(recipe)
    assert len(watched.calibrated) > 400 and len(watched.measured) > 40
    assert not watched.calibrated & watched.measured
    assert set(watched.excluded) == {0}


def test_documents_put_into_both_explicit_splits_are_excluded_and_counted(
    pico: Pico, tmp_path: Path, watched: Watched
) -> None:
    """What its owner put into calibration and test alike is not measured on, and neither are re-spaced copies."""
    shared = medical_records(20, seed=3)
    respaced = [{key: f"  {value.replace(' ', '  ')} " for key, value in record.items()} for record in shared]
    calibration = write_records(tmp_path / "calibration.jsonl", medical_records(60, seed=2) + shared)
    test = write_records(tmp_path / "test.jsonl", medical_records(40, seed=4) + respaced)
    text = "Question: {question}\nAnswer: {answer}"
    domain = {"medical": {"calibration": str(calibration), "test": str(test), "text": text}}
    everything = {"max_tokens": None, "batch_size": 32}
    result = secateur.run(
        pico.recipe(
            tmp_path / "run",
            domain=domain,
            calibrate={**everything, "block_size": 64},
            evaluate={**everything, "controls": []},
        )
    )
    spec = CorpusSpec(calibration=str(calibration), test=str(test), text=text)
    tests = {document_hash(document) for document in read_documents(spec, "test")}
    both = tests & {document_hash(document) for document in read_documents(spec, "calibration")}
    assert len(both) == 20
    assert tests - both <= watched.measured
    assert not watched.calibrated & watched.measured
    assert result.evaluation is not None
    for model in result.evaluation.models.values():
        assert model.text["medical"].num_excluded == 20
        assert model.text["medical"].num_documents == 40


def test_text_calibrated_on_in_one_bucket_is_not_measured_on_in_another(
    pico: Pico, tmp_path: Path, watched: Watched
) -> None:
    """The same text in the domain and in the general bucket: what either was calibrated on, neither is measured on."""
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(general_paragraphs(300, seed=9)), encoding="utf-8")
    splits = {"calibration": 0.5, "validation": 0.1, "test": 0.4}
    recipe = pico.recipe(
        tmp_path / "run",
        domain={"towns": str(text)},
        general={"path": str(text), "splits": splits},
        evaluate={"max_tokens": None, "batch_size": 32, "controls": []},
        calibrate={"max_tokens": None, "block_size": 64, "batch_size": 32},
    )
    secateur.run(recipe)
    assert watched.measured and not watched.calibrated & watched.measured
    assert max(watched.excluded) > 0


# -- controls --------------------------------------------------------------------------------------------------------


def test_controls_differ_from_the_plan_only_in_the_choice(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random and reversed have exactly the plan's widths and size; reversed keeps the lowest scores."""
    made = []
    same_size_plan = planning.same_size_plan

    def remember(*arguments: Any) -> Plan:
        made.append(same_size_plan(*arguments))
        return made[-1]

    monkeypatch.setattr(planning, "same_size_plan", remember)
    prune = {"shape": "uneven", "budget": {"channels": 0.4, "groups": 0.25}}
    evaluate = {"max_tokens": 512, "controls": ["random", "reversed"]}
    result = secateur.run(pico.recipe(tmp_path / "run", prune=prune, evaluate=evaluate))
    assert result.plan is not None and result.evaluation is not None
    random, backwards = made
    assert (random.method, backwards.method) == ("random", "reversed")
    for control in made:
        for kind in (FFN, GROUP):
            assert kept_counts(control, kind) == kept_counts(result.plan, kind)
        assert control.layers != result.plan.layers
    scores = read_scores(tmp_path / "run" / "scores" / "contextual.safetensors").values[FFN]
    for layer, values in zip(backwards.layers[FFN], scores, strict=True):
        assert set(layer.keep) == set(values.argsort(stable=True)[: len(layer.keep)].tolist())
    models = result.evaluation.models
    assert list(models) == ["dense", "pruned", "random", "reversed"]
    assert models["random"].parameters == models["reversed"].parameters == models["pruned"].parameters


def test_controls_are_cut_with_the_same_care(pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that are constant are folded into the next bias for the controls as for the plan."""
    sizes = {"hidden_size": 48, "word_embed_proj_dim": 48, "ffn_dim": 64, "num_hidden_layers": 2}
    folder = save_model_folder(tmp_path / "opt", model_type="opt", num_attention_heads=6, **sizes)
    tensors = weights_of(folder)
    for layer in range(2):
        tensors[f"model.decoder.layers.{layer}.fc1.weight"][::2] = 0.0
        tensors[f"model.decoder.layers.{layer}.fc1.bias"][::2] = 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    cut: dict[str, Plan] = {}
    shrink_parameters = cutting.shrink_parameters

    def remember(parameters: Any, plan: Plan, *rest: Any) -> Any:
        cut[plan.method] = plan
        return shrink_parameters(parameters, plan, *rest)

    monkeypatch.setattr(cutting, "shrink_parameters", remember)
    evaluate = {"max_tokens": 256, "controls": ["random", "reversed"]}
    prune = {"method": "magnitude", "budget": {"channels": 0.5}}
    secateur.run(pico.recipe(tmp_path / "run", model=str(folder), prune=prune, evaluate=evaluate))
    assert set(cut) == {"magnitude", "random", "reversed"}
    for plan in cut.values():
        for layer in plan.layers[FFN]:
            constant = [unit for unit in range(0, 64, 2) if unit not in layer.keep]
            assert [channel for channel, _ in layer.constants] == constant
            assert all(value == pytest.approx(0.5) for _, value in layer.constants)
    assert any(layer.constants for layer in cut["random"].layers[FFN])


def test_two_commands_do_not_write_into_one_folder(pico: Pico, tmp_path: Path) -> None:
    """The second is refused before it touches anything, and works once the first has ended."""
    recipe = pico.recipe(tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(ConfigError, match=r"another command is working in .*run\. Wait"):
        secateur.run(recipe, until="plan")
    assert not (tmp_path / "run").exists()
    assert secateur.run(recipe, until="plan").plan is not None


def test_another_seed_is_another_random_control(pico: Pico, copied: Path) -> None:
    """The seed changes the random control and nothing about the pruned model."""
    first = json.loads((copied / "evaluation.json").read_text())["models"]
    prune = {"method": "contextual", "budget": {"channels": 0.25}, "seed": 5}
    result = secateur.run(pico.recipe(copied, prune=prune))
    assert result.evaluation is not None
    second = result.evaluation.to_dict()["models"]
    nll = {name: (m["text"]["medical"]["nll_per_token"]) for name, m in first.items()}
    assert second["pruned"]["text"]["medical"]["nll_per_token"] == pytest.approx(nll["pruned"], rel=1e-6)
    assert second["random"]["text"]["medical"]["nll_per_token"] != pytest.approx(nll["random"], rel=1e-6)


# -- determinism -----------------------------------------------------------------------------------------------------


def test_two_runs_agree_to_the_last_bit(pico: Pico, finished: Path, tmp_path: Path) -> None:
    """The same recipe in another folder gives the same plan, weights and losses."""
    secateur.run(pico.recipe(tmp_path / "run"))
    for name in ("plan.json", "model/secateur_plan.json", "model/config.json", "scores/contextual.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (finished / name).read_bytes(), name
    assert same_weights(tmp_path / "run" / "model", finished / "model")
    first, second = (
        json.loads((run / "evaluation.json").read_text())["models"] for run in (finished, tmp_path / "run")
    )
    for name in first:
        assert first[name]["text"]["medical"]["document_nll"] == second[name]["text"]["medical"]["document_nll"]


def test_the_batch_size_changes_neither_plan_nor_losses(pico: Pico, finished: Path, tmp_path: Path) -> None:
    """One block at a time or seven: the same units go, and every loss agrees to float32 rounding."""
    calibrate = {**pico.recipe(tmp_path)["calibrate"], "batch_size": 1}
    evaluate = {**pico.recipe(tmp_path)["evaluate"], "batch_size": 7}
    secateur.run(pico.recipe(tmp_path / "run", calibrate=calibrate, evaluate=evaluate))
    first, second = read_plan(finished), read_plan(tmp_path / "run")
    assert [layer.keep for layer in first.layers[FFN]] == [layer.keep for layer in second.layers[FFN]]
    a, b = (load_file(run / "scores" / "contextual.safetensors")[f"{FFN}/1"] for run in (finished, tmp_path / "run"))
    assert torch.allclose(a, b, rtol=1e-5, atol=0)
    losses = [json.loads((run / "evaluation.json").read_text())["models"] for run in (finished, tmp_path / "run")]
    for name in losses[0]:
        one, other = (models[name]["text"]["general"] for models in losses)
        assert other["document_nll"] == pytest.approx(one["document_nll"], rel=1e-5)
        assert other["num_tokens"] == one["num_tokens"]


# -- the command line ------------------------------------------------------------------------------------------------


def test_the_stages_one_by_one_are_the_whole_job(
    pico: Pico, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """calibrate, plan, shrink and evaluate, each its own command, end where ``run`` ends; each names the next."""
    run = tmp_path / "run"
    recipe = pico.write_recipe(tmp_path / "r.yml", run)
    for command, makes, follows in [
        ("calibrate", "statistics/medical.safetensors", "next: secateur plan"),
        ("plan", "plan.json", "next: secateur shrink"),
        ("shrink", "model/model.safetensors", "next: secateur evaluate"),
        ("evaluate", "report.md", "use it: AutoModelForCausalLM.from_pretrained"),
    ]:
        assert not (run / makes).exists()
        answer = call(capsys, command, recipe)
        assert answer.code == 0, answer.err
        assert (run / makes).is_file()
        assert follows in answer.out
    assert files_in(run) == files_in(finished)
    assert same_weights(run / "model", finished / "model")


def test_json_says_everything_in_one_object(
    pico: Pico, copied: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``--json`` prints one JSON object on stdout and keeps progress on stderr."""
    answer = call(capsys, "run", pico.write_recipe(tmp_path / "r.yml", copied), "--json", "--budget", "channels=0.5")
    data = answer.json()
    assert data["parameters"]["pruned"] < data["parameters"]["dense"]
    assert Path(data["model"]) == copied / "model" and Path(data["plan"]) == copied / "plan.json"
    assert set(data["evaluation"]["models"]) == {"dense", "pruned", "random"}
    assert "fewer parameters" in data["summary"]
    assert data["statistics"]["medical"]["tokens"] == 2048
    assert "evaluate pruned on medical" in answer.err


def test_the_command_line_wins_over_the_recipe(pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--output, --method, --budget and --set replace what the recipe says."""
    recipe = pico.write_recipe(tmp_path / "r.yml", tmp_path / "unused")
    other = tmp_path / "other"
    answer = call(
        capsys, "plan", recipe, "-o", other, "--method", "magnitude", "--budget", "groups=0.5", "--set", "prune.seed=3"
    )
    assert answer.code == 0, answer.err
    assert not (tmp_path / "unused").exists()
    plan = read_plan(other)
    assert (plan.method, plan.budget, list(plan.layers)) == ("magnitude", {"groups": 0.5}, [GROUP])
    assert yaml.safe_load((other / "recipe.yml").read_text())["prune"]["seed"] == 3


def test_the_example_recipe_runs(pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``examples/pico.yml`` does the whole job once its placeholders are filled in."""
    example = Path(__file__).parents[2] / "examples" / "pico.yml"
    run = tmp_path / "run"
    answer = call(
        capsys, "run", example, "--output", run, "--set", f"model={pico.model}",
        "--set", f"domain.medical.path={pico.domain}", "--set", f"general={pico.general}",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert (run / "report.md").is_file()
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    assert torch.isfinite(model(**tokenizer("Question:", return_tensors="pt")).logits).all()
