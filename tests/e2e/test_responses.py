"""Calibration on the dense model's own answers: made once, kept, and nothing that was asked about is measured on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.corpus.prompts import load_prompts
from secateur.errors import ConfigError, CorpusError
from secateur.pipeline import RunResult
from secateur.recipe import CorpusSpec
from secateur.store.artifacts import read_statistics
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model
from tests.pico import Pico, medical_records, write_records

ASKED: dict[str, Any] = {"prompt": "Question: {question}\nAnswer:", "max_new_tokens": 12, "batch_size": 16}
STAGE = "answer:calibrate:medical"


def recipe_of(pico: Pico, output: Path, asked: Mapping[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Return a recipe whose domain is answered; a ``corpus`` replaces keys of the domain."""
    corpus = {"text": "Question: {question}\nAnswer: {answer}", **changes.pop("corpus", {"path": str(pico.domain)})}
    medical = {**corpus, "responses": {**ASKED, **(asked or {})}}
    return pico.recipe(output, domain={"medical": medical}, **{"calibrate": size(1024), **changes})


def size(max_tokens: int, block_size: int = 64) -> dict[str, int]:
    """Return how much is calibrated on."""
    return {"max_tokens": max_tokens, "block_size": block_size, "batch_size": 8}


def lines_of(result: RunResult) -> list[str]:
    """Return the lines of the answers' file, its header first."""
    return (result.folder / "responses" / "medical.jsonl").read_text().splitlines()


@pytest.fixture(scope="module")
def answered(pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A whole run; nobody changes it."""
    return secateur.run(recipe_of(pico, tmp_path_factory.mktemp("answered") / "run"))


def test_the_calibration_text_is_prompts_with_the_answers(pico: Pico, answered: RunResult) -> None:
    """As many tokens were run as whole prompts and answers have, up to the limit; the plan says whose text it is."""
    responses = [json.loads(line) for line in lines_of(answered)[1:]]
    lengths = [len(r["prompt_ids"]) + len(r["response_ids"]) for r in responses if r["text"].strip()]
    taken = answered.statistics["medical"]
    number = len(taken.documents)
    assert taken.num_tokens == sum(lengths[:number]) <= 1024 < sum(lengths[: number + 1])
    spec = CorpusSpec(path=str(pico.domain), text="Question: {question}\nAnswer: {answer}")
    prompts = load_prompts(spec, ASKED["prompt"], "calibration")
    assert all(r["prompt"] == prompts.texts[r["index"]] for r in responses)
    assert answered.plan is not None
    said = f"medical: calibrated on the dense model's own answers to {number} prompts"
    assert any(note.startswith(said) for note in answered.plan.notes)
    assert said in (answered.folder / "report.md").read_text()


def test_what_is_measured_is_the_text_of_the_records(pico: Pico, answered: RunResult, finished: Path) -> None:
    """The dense model's row is that of a run calibrated on references, document by document."""
    own, references = (
        json.loads((folder / "evaluation.json").read_text())["models"] for folder in (answered.folder, finished)
    )
    measured = ("corpus_fingerprint", "nll_per_token", "document_nll")
    assert [own["dense"]["text"]["medical"][k] for k in measured] == [
        references["dense"]["text"]["medical"][k] for k in measured
    ]
    assert own["pruned"]["text"]["medical"]["nll_per_token"] != references["pruned"]["text"]["medical"]["nll_per_token"]


def test_the_same_recipe_again_asks_nothing(pico: Pico, answered: RunResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is reused, and another plan takes the statistics that are there."""
    before = lines_of(answered)

    def write_answers(*_: Any, **__: Any) -> None:
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(sys.modules["secateur.recover.self_generated"], "write_answers", write_answers)
    again = secateur.run(recipe_of(pico, answered.folder))
    assert {"calibrate:medical", "plan", "shrink", "evaluate:dense", "evaluate:pruned"} <= set(again.reused)
    other = secateur.run(recipe_of(pico, answered.folder, prune={"method": "magnitude", "budget": {"channels": 0.1}}))
    assert "calibrate:medical" in other.reused and other.plan is not None
    assert any("own answers to" in note for note in other.plan.notes)
    fisher = {"method": "fisher", "budget": {"channels": 0.1}}  # reads the text again, for gradients
    third = secateur.run(recipe_of(pico, answered.folder, prune=fisher), until="plan")
    assert STAGE in third.reused and lines_of(answered) == before


def test_another_prompt_is_answered_anew_and_more_text_goes_on(pico: Pico, tmp_path: Path) -> None:
    """More tokens keep the answers that are there; another prompt, length or seed keeps none."""
    first = secateur.run(recipe_of(pico, tmp_path / "run", calibrate=size(512)), until="calibrate")
    few = lines_of(first)
    more = secateur.run(recipe_of(pico, tmp_path / "run", calibrate=size(1024)), until="calibrate")
    many = lines_of(more)
    assert len(many) > len(few) and many[: len(few)] == few
    assert more.statistics["medical"].num_tokens > first.statistics["medical"].num_tokens
    other = secateur.run(recipe_of(pico, tmp_path / "run", {"prompt": "Q: {question} A:"}), until="calibrate")
    assert "calibrate:medical" not in other.reused and "calibrate:general" in other.reused
    assert lines_of(other)[0] != many[0]
    fingerprint = other.statistics["medical"].corpus_fingerprint
    assert fingerprint != more.statistics["medical"].corpus_fingerprint


def test_draws_are_the_same_under_a_seed(pico: Pico, tmp_path: Path) -> None:
    """Drawn answers differ from the likeliest ones and between seeds, and come again under the same seed."""
    drawn = {"temperature": 1.0}
    found = [
        secateur.run(recipe_of(pico, tmp_path / name, {**drawn, "seed": seed}), until="calibrate")
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    ]
    a, b, c = (result.statistics["medical"].corpus_fingerprint for result in found)
    assert a == b != c


def test_no_document_that_is_asked_about_is_measured_on(pico: Pico, tmp_path: Path) -> None:
    """Where the owner splits, test records whose question may be asked are left out of the test text."""
    records = medical_records(120, seed=7)
    asked, tested = write_records(tmp_path / "a.jsonl", records[:80]), write_records(tmp_path / "t.jsonl", records[60:])
    corpus = {"calibration": str(asked), "test": str(tested)}
    result = secateur.run(recipe_of(pico, tmp_path / "run", corpus=corpus, calibrate=size(256)), until="evaluate")
    assert result.evaluation is not None
    score = result.evaluation.models["dense"].text["medical"]
    assert score.num_excluded == 20
    kept = set(json.loads((result.folder / "responses" / "medical.documents.json").read_text())["documents"])
    assert len(kept) == 80 > len(result.statistics["medical"].documents)


def test_training_reads_the_records_and_a_reconstruction_the_answers(pico: Pico, tmp_path: Path) -> None:
    """Gram matrices and the pruned stream are fitted to answers; what is trained on stays the records' own text."""
    prune = {"method": "activation_norm", "budget": {"channels": 0.25}, "reconstruct": "dense"}
    recover = {"method": "finetune", "max_tokens": 512, "evaluations": 1, "baselines": [], "evaluation_tokens": 256}
    calibrate = size(4096)
    result = secateur.run(recipe_of(pico, tmp_path / "run", prune=prune, recover=recover, calibrate=calibrate))
    grams, _ = read_statistics(result.folder / "statistics" / "medical.safetensors")
    assert grams.num_tokens == result.statistics["medical"].num_tokens
    references = secateur.run(pico.recipe(tmp_path / "ref", prune=prune, recover=recover, calibrate=calibrate))
    own, given = result.recoveries["recovered"], references.recoveries["recovered"]
    assert own.text_fingerprint == given.text_fingerprint
    pruned = {**prune, "reconstruct": "pruned"}
    another = secateur.run(recipe_of(pico, result.folder, prune=pruned, calibrate=calibrate), until="shrink")
    assert STAGE in another.reused


def test_in_python_a_corpus_spec_is_answered_too(pico: Pico, answered: RunResult) -> None:
    """The statistics are those of the run; mostly empty answers are warned of, and none at all are refused."""
    checkpoint = resolve_model(str(pico.model))
    model, tokenizer = load_model(checkpoint, device="cpu", dtype="auto"), load_tokenizer(checkpoint)
    spec = CorpusSpec(path=str(pico.domain), text="Question: {question}\nAnswer: {answer}", responses=ASKED)
    statistics = secateur.calibrate(model, tokenizer, {"medical": spec}, max_tokens=1024, block_size=64)
    assert statistics.buckets["medical"].corpus_fingerprint == answered.statistics["medical"].corpus_fingerprint
    begun = Counter(json.loads(line)["response_ids"][0] for line in lines_of(answered)[1:])
    usual = [token for token, _ in begun.most_common()]
    model.generation_config.eos_token_id = usual[: -len(usual) // 4]
    with pytest.warns(
        UserWarning, match=r"domain: the dense model answered nothing to \d+ of \d+ prompts; responses.pr"
    ):
        secateur.calibrate(model, tokenizer, spec, max_tokens=64, block_size=64)
    model.generation_config.eos_token_id = list(range(len(tokenizer)))
    with pytest.raises(CorpusError, match=r"answers nothing to any of \d+ prompts. Check responses.prompt"):
        secateur.calibrate(model, tokenizer, spec, max_tokens=64, block_size=64)


@pytest.mark.parametrize(
    ("asked", "changes", "error", "message"),
    [
        (
            {"prompt": "{questoin}"},
            {},
            CorpusError,
            r"no field 'questoin'. Did you mean 'question'.*domain.medical.responses.prompt",
        ),
        (
            {"chat": True},
            {},
            ConfigError,
            r"domain.medical.responses.chat is true, but the tokenizer has no chat template",
        ),
        ({"max_new_tokens": 0}, {}, ConfigError, r"domain.medical.responses.max_new_tokens: .*greater than or equal"),
        (
            {"max_new_tokens": 64},
            {},
            ConfigError,
            r"max_new_tokens is 64, and a prompt with its answer may have 64 tokens",
        ),
        (
            {"max_new_tokens": 256},
            {"calibrate": size(1024, 512)},
            ConfigError,
            r"may have 256 tokens: calibrate.block_size is 512, and the model's context 256",
        ),
        ({}, {"calibrate": size(32)}, CorpusError, r"max_tokens 32 is less than one block of 64"),
        ({"promt": "x"}, {}, ConfigError, r"key at domain.medical.responses.promt.*'prompt'.*seed"),
        ({}, {"recover": {"rounds": 2}}, ConfigError, r"later rounds start from pruned models; set recover.rounds: 1"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_written(
    pico: Pico,
    tmp_path: Path,
    asked: Mapping[str, Any],
    changes: Mapping[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """The message names the key, what was received and what to do."""
    with pytest.raises(error, match=message):
        secateur.run(recipe_of(pico, tmp_path / "run", asked, **changes))
    assert not (tmp_path / "run").exists()


def test_records_without_answers_have_nothing_to_be_measured_on(pico: Pico, tmp_path: Path) -> None:
    """The message says that own answers are never measured on, and how to go on; a text of questions is accepted."""
    only = [{"question": record["question"]} for record in medical_records(400)]
    corpus = {"path": str(write_records(tmp_path / "questions.jsonl", only))}
    with pytest.raises(CorpusError, match=r"no field 'answer'.*never measured on the model's own.*reference answers"):
        secateur.run(recipe_of(pico, tmp_path / "run", corpus=corpus))
    asked = recipe_of(pico, tmp_path / "run", corpus={**corpus, "text": "{question}"})
    assert secateur.run(asked, until="calibrate").statistics["medical"].num_tokens > 512
