"""Tasks of the lm-evaluation-harness: what is read of its results, and what is refused; with it, a real local task."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from secateur.errors import ConfigError, UnavailableError
from secateur.evaluate import tasks
from secateur.evaluate.tasks import load_tasks, read_results, run_tasks
from secateur.families.loader import families
from secateur.recipe import TasksSpec
from tests.conftest import pico_model
from tests.pico import pico_tokenizer

ROOT = Path(__file__).parents[3]
EXAMPLE = TasksSpec(names=["medical_terms"], include_path="examples/tasks")

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed (pip install 'secateur[tasks]')"
)


def sample(doc: int, **numbers: Any) -> dict[str, Any]:
    """Return what the harness logs of a document."""
    hashes = {"doc_hash": f"d{doc}", "prompt_hash": f"p{doc}", "target_hash": f"t{doc}"}
    return {"doc_id": doc, "filter": "none", **hashes, **numbers}


def raw(**changes: Any) -> dict[str, Any]:
    """Return results of a task ``terms`` of two documents, as the harness gives them."""
    numbers: dict[str, Any] = {
        "alias": "terms",
        "acc,none": 0.5,
        "acc_stderr,none": 0.5,
        "word_perplexity,none": np.float64(12.5),
        "word_perplexity_stderr,none": "N/A",
        "broken,none": float("nan"),
    }
    plain: dict[str, Any] = {
        "results": {"terms": numbers},
        "samples": {"terms": [sample(1, acc=0.0, word_perplexity=(-3.0, 2)), sample(0, acc=1.0, word_perplexity=2.0)]},
        "versions": {"terms": 1.5},
        "n-shot": {"terms": 2},
        "n-samples": {"terms": {"original": 9, "effective": 2}},
        "higher_is_better": {"terms": {"acc": True, "word_perplexity": False}},
    }
    return {**plain, **changes}


def test_results_are_read_with_their_errors_and_documents() -> None:
    """Documents are in their order; a number that is not their mean has none; what is no number is left out."""
    score = read_results(raw())["terms"]
    assert (score.version, score.num_fewshot, score.num_samples, score.is_group) == ("1.5", 2, 2, False)
    acc, perplexity = score.metrics
    assert (acc.name, acc.filter, acc.value, acc.stderr, acc.higher_is_better) == ("acc", "none", 0.5, 0.5, True)
    assert acc.samples == (1.0, 0.0)
    assert (perplexity.stderr, perplexity.higher_is_better, perplexity.samples) == (None, False, ())


def test_filters_are_kept_apart() -> None:
    """Each filter's numbers go with its own documents."""
    rows = [sample(0, exact=1.0), {**sample(0, exact=0.0), "filter": "strict"}]
    numbers = {"exact,none": 1.0, "exact,strict": 0.0}
    score = read_results(raw(results={"terms": numbers}, samples={"terms": rows}))["terms"]
    assert [(one.label, one.samples) for one in score.metrics] == [("exact", (1.0,)), ("exact (strict)", (0.0,))]


def test_groups_sum_up_and_empty_ones_are_left_out() -> None:
    """A group has its own numbers and all documents of its tasks; one without numbers is not there."""
    both = {**raw()["results"], "exams": {"alias": "exams", "acc,none": 0.5}, "loose": {"alias": "loose", " ": ""}}
    found = read_results(raw(results=both, group_subtasks={"exams": ["terms"], "loose": ["terms"]}))
    assert list(found) == ["terms", "exams"]
    assert (found["exams"].is_group, found["exams"].num_samples, found["exams"].fingerprint) == (True, 2, "")


def test_the_fingerprint_is_of_what_was_asked() -> None:
    """It does not depend on the answers, but on the documents, prompts and targets."""
    plain = read_results(raw())["terms"].fingerprint
    same = [sample(0, acc=0.0), sample(1, acc=1.0)]
    other = [sample(0, acc=1.0), {**sample(1, acc=0.0), "prompt_hash": "with an example"}]
    assert read_results(raw(samples={"terms": same}))["terms"].fingerprint == plain
    assert read_results(raw(samples={"terms": other}))["terms"].fingerprint != plain


def test_without_the_harness_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnavailableError, match=r"lm_eval is not installed.*pip install 'secateur\[tasks\]'"):
        load_tasks(EXAMPLE)


@pytest.fixture
def in_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example's data are found, and what the harness makes of them is kept elsewhere."""
    import datasets

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks._loaded.cache_clear()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A small byte-level tokenizer."""
    return pico_tokenizer()


def accuracy(model: Any, tokenizer: Any, *, by_bytes: bool) -> list[float]:
    """Return for each document of the example whether the right choice is the likeliest; one choice at a time."""
    right = []
    for line in (ROOT / "examples/tasks/medical_terms.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(f"{row['definition']} This is called")["input_ids"]
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(f"{row['definition']} This is called {choice}")["input_ids"]
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
            total = sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids)))
            scores.append(total / (len(choice) if by_bytes else 1))
        right.append(float(scores.index(max(scores)) == row["answer"]))
    return right


@needs_harness
@pytest.mark.usefixtures("in_root")
def test_a_local_task_runs_without_a_network(tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """Every document's number is that of a plain loop; nothing is printed, no random number or tokenizer changes."""
    model = pico_model(families()["llama"], torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)
    tokenizer.pad_token = None
    state = random.getstate(), torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    advanced: list[int] = []
    score = run_tasks(model, tokenizer, EXAMPLE, load_tasks(EXAMPLE), progress=counted(advanced))["medical_terms"]
    assert (random.getstate(), np.random.get_state()[1].tolist()) == (state[0], state[2])  # type: ignore[union-attr]
    assert torch.equal(torch.get_rng_state(), state[1])
    assert tokenizer.pad_token is None
    assert capfd.readouterr() == ("", "")
    assert (score.num_samples, score.num_fewshot, score.version, sum(advanced)) == (16, 0, "1.0", 64)
    for metric, by_bytes in zip(score.metrics, (False, True), strict=True):
        assert list(metric.samples) == accuracy(model, tokenizer, by_bytes=by_bytes)
        assert metric.value == sum(metric.samples) / 16
        assert metric.stderr == pytest.approx(math.sqrt(metric.value * (1 - metric.value) / 15))


@needs_harness
@pytest.mark.usefixtures("in_root")
def test_shots_and_a_limit_are_passed_on(tokenizer: Any) -> None:
    """Other prompts have another fingerprint, and only so many documents are asked."""
    model = pico_model(families()["llama"], torch.float32, vocab_size=len(tokenizer), max_position_embeddings=256)
    plain = EXAMPLE.model_copy(update={"limit": 4.0})
    shots = plain.model_copy(update={"num_fewshot": 1})
    manager = load_tasks(plain)
    found = [run_tasks(model, tokenizer, spec, manager)["medical_terms"] for spec in (plain, shots)]
    assert [(one.num_samples, one.num_fewshot) for one in found] == [(4, 0), (4, 1)]
    assert found[0].fingerprint != found[1].fingerprint


@needs_harness
@pytest.mark.slow
@pytest.mark.usefixtures("in_root")
def test_an_unknown_task_is_refused_with_near_names() -> None:
    """The harness's own tasks are looked through as well, which takes a while."""
    with pytest.raises(ConfigError, match=r"unknown task 'medical_term'\. Near names: medical_terms"):
        load_tasks(EXAMPLE.model_copy(update={"names": ["medical_term"]}))


@needs_harness
@pytest.mark.usefixtures("in_root")
def test_a_task_without_its_data_is_refused(tmp_path: Path) -> None:
    """What the harness says is in the message, and that paths count from where the command runs."""
    text = (ROOT / "examples/tasks/medical_terms.yaml").read_text().replace("medical_terms.jsonl", "absent.jsonl")
    (tmp_path / "terms.yaml").write_text(text)
    with pytest.raises(UnavailableError, match=r"task medical_terms cannot be loaded: FileNotFoundError.*count from"):
        load_tasks(TasksSpec(names=["medical_terms"], include_path=str(tmp_path)))


@needs_harness
def test_a_folder_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"include_path: nowhere is not a folder"):
        load_tasks(TasksSpec(names=["x"], include_path="nowhere"))


def counted(advanced: list[int]) -> Any:
    """Return a progress that notes what is done."""

    class Told:
        def __enter__(self) -> Told:
            return self

        def __exit__(self, *error: object) -> None:
            return None

        def advance(self, amount: int) -> None:
            advanced.append(amount)

        def say(self, text: str) -> None:
            raise AssertionError(text)

    return lambda label, total, unit: Told()
