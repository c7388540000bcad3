"""Runs that cut the vocabulary: what they leave, what they reuse, how text is compared, and what they refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import ConfigError, PlanError, TokenizerError
from secateur.records.evaluation import Evaluation, paired_difference
from secateur.records.plan import Plan, parse_ranges
from secateur.store.artifacts import read_json, read_token_counts
from tests.command import call
from tests.pico import Pico

RULE = {"coverage": 0.97}
STAGES = ["plan", "shrink", "evaluate:dense", "evaluate:pruned", "evaluate:random", "evaluate:vocabulary"]


@pytest.fixture(scope="module")
def vocabulary_run(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that cuts nothing but the vocabulary; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "vocabulary"
    secateur.run(pico.recipe(folder, prune={"vocabulary": RULE}))
    return folder


@pytest.fixture(scope="module")
def mixed_run(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that cuts channels and the vocabulary to a budget; nobody changes it."""
    folder = tmp_path_factory.mktemp("runs") / "mixed"
    prune = {"units": ["ffn_channel", "vocabulary"], "budget": {"parameters": 0.2}, "vocabulary": RULE}
    secateur.run(pico.recipe(folder, prune=prune))
    return folder


def plan_of(run: Path) -> Plan:
    """Return the plan of a run."""
    return Plan.from_dict(read_json(run / "plan.json"))


def evaluation_of(run: Path) -> Evaluation:
    """Return the measurements of a run."""
    return Evaluation.from_dict(read_json(run / "evaluation.json"))


def load(folder: Path) -> tuple[Any, Any]:
    """Return model and tokenizer of a folder, with stock transformers."""
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_folder_holds_a_smaller_model_and_its_tokenizer(vocabulary_run: Path, pico: Pico) -> None:
    """Rows are the dense rows in the order of the plan, and both halves agree on how many there are."""
    (small, tokenizer), (dense, _) = load(vocabulary_run / "model"), load(pico.model)
    saved = json.loads((vocabulary_run / "model" / "secateur_plan.json").read_text())
    keep = list(parse_ranges(saved["vocabulary"]["keep"]))
    assert small.config.vocab_size == len(tokenizer) == len(keep) < dense.config.vocab_size
    assert torch.equal(small.get_input_embeddings().weight, dense.get_input_embeddings().weight[keep])
    assert tokenizer.decode(tokenizer("Größe 患者 🙂\x00")["input_ids"]) == "Größe 患者 🙂\x00"


def test_no_calibration_is_run_for_the_vocabulary_alone(vocabulary_run: Path) -> None:
    """Only the tokenizer is needed to count, so there are no statistics of activations and no scores."""
    assert {item.name for item in vocabulary_run.iterdir()} == {
        "evaluation.json", "manifest.json", "model", "plan.json", "recipe.yml", "report.html", "report.md",
        "tokens",
    }  # fmt: skip
    counts = read_token_counts(vocabulary_run / "tokens" / "medical.safetensors")
    assert int(counts.counts.sum()) == counts.num_tokens == plan_of(vocabulary_run).vocabulary.counted_tokens  # type: ignore[union-attr]


def test_all_of_the_calibration_text_is_counted(vocabulary_run: Path, mixed_run: Path) -> None:
    """Counting does not stop at calibrate.max_tokens."""
    manifest = json.loads((mixed_run / "manifest.json").read_text())
    assert manifest["stages"]["calibrate:medical"]["tokens"] <= 2048
    assert manifest["stages"]["count:medical"]["tokens"] > 10_000


def test_dense_and_pruned_are_measured_on_the_same_bytes(mixed_run: Path) -> None:
    """However text is cut into tokens, the documents and their bytes are the same, so differences can be paired."""
    evaluation = evaluation_of(mixed_run)
    dense = evaluation.models["dense"]
    for model in evaluation.models.values():
        for bucket, score in model.text.items():
            assert score.document_bytes == dense.text[bucket].document_bytes
            assert math.isfinite(paired_difference(score, dense.text[bucket]).mean)
    assert evaluation.models["pruned"].text["general"].num_tokens > dense.text["general"].num_tokens


def test_the_loss_is_split_into_its_causes(vocabulary_run: Path) -> None:
    """Without other units, the dense model with its softmax restricted is the pruned model; restricting never hurts."""
    evaluation = evaluation_of(vocabulary_run)
    for bucket, effect in evaluation.vocabulary.items():
        pruned = evaluation.models["pruned"].text[bucket]
        assert effect.restricted.document_nll == pytest.approx(pruned.document_nll, rel=1e-5)
        assert effect.restricted.nll_per_token < effect.resegmented.nll_per_token
        assert 0 <= effect.tokens_lost <= effect.tokens_before <= effect.tokens_after
        assert (effect.tokens_lost > 0) == (effect.documents_touched > 0)
    report = (vocabulary_run / "report.md").read_text()
    for words in ("Where the loss came from", "Segmentation of the test text", "token ids", "bits/byte"):
        assert words in report


def test_a_budget_of_parameters_is_met_together(mixed_run: Path, pico: Pico) -> None:
    """What the vocabulary gives up counts, and channels make up the rest."""
    plan = plan_of(mixed_run)
    (small, _), (dense, _) = load(mixed_run / "model"), load(pico.model)
    assert small.num_parameters() == plan.total_pruned
    assert 1 - small.num_parameters() / dense.num_parameters() == pytest.approx(0.2, abs=0.01)
    assert plan.vocabulary is not None and plan.vocabulary.num_removed > 0
    assert any(layer.num_removed for layer in plan.layers["ffn_channel"])


def test_a_budget_can_be_met_by_the_vocabulary_alone(pico: Pico, tmp_path: Path) -> None:
    """As many ids go as the budget needs."""
    prune = {"units": ["vocabulary"], "budget": {"parameters": 0.05}}
    plan = secateur.run(pico.recipe(tmp_path / "run", prune=prune), until="plan").plan
    assert plan is not None and plan.vocabulary is not None
    assert 1 - plan.total_pruned / plan.total_dense == pytest.approx(0.05, abs=0.001)
    assert plan.vocabulary.rule == {"size": len(plan.vocabulary.keep)}


def test_the_same_recipe_again_does_nothing(vocabulary_run: Path, mixed_run: Path) -> None:
    """Counts, plan, model and measurements are all reused."""
    first = secateur.run(vocabulary_run / "recipe.yml")
    assert first.reused == ["count:medical", *STAGES]
    second = secateur.run(mixed_run / "recipe.yml")
    assert second.reused == ["count:medical", "calibrate:medical", "calibrate:general", *STAGES]


def test_another_rule_costs_no_second_count(mixed_run: Path, tmp_path: Path) -> None:
    """Counts and calibration are those of before; so is the dense model's row."""
    import shutil

    run = Path(shutil.copytree(mixed_run, tmp_path / "run"))
    recipe = secateur.load_recipe(run / "recipe.yml", {"prune.vocabulary": {"min_count": 2}, "output": str(run)})
    reused = secateur.run(recipe).reused
    assert reused == ["count:medical", "calibrate:medical", "calibrate:general", "evaluate:dense"]


def test_an_edited_vocabulary_is_what_gets_cut(vocabulary_run: Path, tmp_path: Path) -> None:
    """A person may drop one more id; one that others need is refused by name."""
    import shutil

    run = Path(shutil.copytree(vocabulary_run, tmp_path / "run"))
    data = read_json(run / "plan.json")
    keep = list(parse_ranges(data["vocabulary"]["keep"]))
    data["vocabulary"]["keep"] = " ".join(map(str, keep[:-1]))
    (run / "plan.json").write_text(json.dumps(data))
    recipe = secateur.load_recipe(run / "recipe.yml", {"output": str(run)})
    result = secateur.run(recipe, until="shrink")
    assert result.plan is not None and result.plan.vocabulary is not None
    assert len(result.plan.vocabulary.keep) == len(AutoTokenizer.from_pretrained(run / "model")) == len(keep) - 1
    data["vocabulary"]["keep"] = " ".join(map(str, keep[5:]))
    (run / "plan.json").write_text(json.dumps(data))
    with pytest.raises(TokenizerError, match="3 added tokens would go"):
        secateur.run(recipe, until="shrink")


def test_controls_keep_as_many_ids(mixed_run: Path, vocabulary_run: Path) -> None:
    """Random ids of the same number do far worse, and the sizes agree."""
    for run in (mixed_run, vocabulary_run):
        models = evaluation_of(run).models
        assert models["random"].parameters == models["pruned"].parameters
        assert models["random"].text["medical"].bits_per_byte > models["pruned"].text["medical"].bits_per_byte


def test_the_keep_list_keeps_terms_whole(pico: Pico, tmp_path: Path) -> None:
    """Listed terms, terms of a file and characters of a range are written with the tokens they had."""
    terms = tmp_path / "terms.txt"
    terms.write_text("Reykjavík\n\n  Nairobi \n", encoding="utf-8")
    lists = {"keep": ["harbour"], "keep_file": str(terms), "keep_characters": ["U+0141-U+017C"]}
    prune = {"vocabulary": {"coverage": 0.5, **lists}}
    secateur.run(pico.recipe(tmp_path / "run", prune=prune), until="shrink")
    dense, small = (AutoTokenizer.from_pretrained(folder) for folder in (pico.model, tmp_path / "run" / "model"))
    for text in ("harbour", " harbour", "Reykjavík", " Nairobi"):
        assert small.tokenize(text) == dense.tokenize(text)


@pytest.mark.parametrize(
    ("vocabulary", "error", "words"),
    [
        ({"size": 100}, PlanError, "vocabulary.size is 100, but 259 ids must stay"),
        ({"size": 5000}, PlanError, "removes nothing"),
        ({"min_count": 1, "keep_characters": ["U+0000-U+10FFFF"]}, PlanError, "removes nothing"),
        ({"buckets": ["law"]}, ConfigError, "prune.vocabulary.buckets"),
        ({"keep_file": "missing.txt"}, ConfigError, "keep_file missing.txt cannot be read"),
        ({"keep": ["a\ud800"]}, ConfigError, "keep"),
    ],
)
def test_a_rule_that_cannot_work_is_refused_before_anything_is_written(
    pico: Pico, tmp_path: Path, vocabulary: dict[str, Any], error: type[Exception], words: str
) -> None:
    """Sizes below the minimum, rules that remove nothing, unknown buckets and unreadable lists."""
    with pytest.raises(error, match=words):
        secateur.run(pico.recipe(tmp_path / "run", prune={"vocabulary": vocabulary}))
    assert not (tmp_path / "run").exists()


def test_the_command_shows_where_saving_and_loss_come_from(
    vocabulary_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The end of a run has both tables, and says why perplexities cannot be compared."""
    shown = call(capsys, "run", vocabulary_run / "recipe.yml", "--quiet")
    assert shown.code == 0
    for words in ("where the saving came from", "where the loss came from", "segmentation of the test text",
                  "perplexity per token is not comparable"):  # fmt: skip
        assert words in shown.out
    planned = call(capsys, "plan", vocabulary_run / "recipe.yml", "--quiet")
    assert planned.code == 0 and "token ids that stay" in planned.out
    answer = call(capsys, "run", vocabulary_run / "recipe.yml", "--quiet", "--json").json()
    assert set(answer["evaluation"]["vocabulary"]) == {"medical", "general"}


def test_functions_do_the_same_as_a_run(vocabulary_run: Path, pico: Pico) -> None:
    """Counting, planning, cutting model and tokenizer, and measuring the same text, on loaded models."""
    model, tokenizer = load(pico.model)
    lines = [json.loads(line) for line in pico.domain.read_text().splitlines()]
    texts = [f"Question: {line['question']}\nAnswer: {line['answer']}" for line in lines]
    statistics = secateur.calibrate(model, tokenizer, texts, max_tokens=512, block_size=64)
    counts = secateur.count_tokens(tokenizer, texts)
    plan = secateur.plan(model, statistics, vocabulary=RULE, tokenizer=tokenizer, token_counts=counts)
    assert plan.vocabulary == plan_of(vocabulary_run).vocabulary
    small, its_tokenizer = secateur.shrink(model, plan), secateur.shrink_tokenizer(tokenizer, plan)
    assert small.config.vocab_size == len(its_tokenizer)
    options = {"max_tokens": 768, "block_size": 64, "exclude": statistics}
    before = secateur.evaluate(model, tokenizer, texts, **options)
    after = secateur.evaluate(small, its_tokenizer, texts, dense_tokenizer=tokenizer, **options)
    assert after.document_bytes == before.document_bytes
    with pytest.raises(ConfigError, match="no tokenizer was given"):
        secateur.plan(model, statistics, vocabulary=RULE)
    with pytest.raises(TokenizerError, match="chosen for another tokenizer"):
        secateur.shrink_tokenizer(its_tokenizer, plan)
