"""Answers side by side in a whole run: prompts of test text alone, made once, and refused at the beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.corpus import document_hash, read_documents
from secateur.corpus.split import assign_split
from secateur.errors import ConfigError, CorpusError
from secateur.recipe import CorpusSpec, SplitRatios
from tests.pico import Pico

STAGE, FILE = "evaluate:generations", "generations.json"


def recipe(pico: Pico, folder: Path, asked: dict[str, Any] | None) -> dict[str, Any]:
    """Return the recipe of the finished run, with answers asked for."""
    plain = pico.recipe(folder)
    return {**plain, "evaluate": {**plain["evaluate"], "generations": asked}}


def test_prompts_are_beginnings_of_test_documents(pico: Pico, copied: Path) -> None:
    """Nothing else is done again; the answers are kept and shown; asked no more, they are gone."""
    asked = {"num": 3, "max_new_tokens": 5, "prompt_tokens": 16}
    done = secateur.run(recipe(pico, copied, asked))
    assert done.generations is not None
    assert {"calibrate:medical", "shrink", "evaluate:dense", "evaluate:pruned"} <= set(done.reused)
    spec = CorpusSpec(path=str(pico.domain), text="Question: {question}\nAnswer: {answer}")
    documents = list(read_documents(spec))
    prompts = [pairs[0].prompt for pairs in done.generations.by_prompt()]
    assert len(prompts) == 3
    for prompt in prompts:
        beginning_so = [text for text in documents if text.startswith(prompt)]
        assert "test" in {assign_split(document_hash(text), SplitRatios()) for text in beginning_so}
    assert "What does it say?" in (copied / "report.md").read_text(encoding="utf-8")
    again = secateur.run(recipe(pico, copied, asked))
    assert STAGE in again.reused
    assert again.generations == done.generations
    other = secateur.run(recipe(pico, copied, {**asked, "seed": 1}))
    assert STAGE not in other.reused
    secateur.run(pico.recipe(copied))
    assert not (copied / FILE).exists()


def test_prompts_are_made_from_the_records_of_test_documents(pico: Pico, copied: Path) -> None:
    asked = {"num": 2, "max_new_tokens": 4, "prompt": "Question: {question}\nAnswer:"}
    done = secateur.run(recipe(pico, copied, asked))
    assert done.generations is not None
    made = {}
    for line in pico.domain.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        made[f"Question: {row['question']}\nAnswer:"] = f"Question: {row['question']}\nAnswer: {row['answer']}"
    for pair in done.generations.pairs:
        assert assign_split(document_hash(made[pair.prompt]), SplitRatios()) == "test"


def test_impossible_prompts_are_refused_before_anything_is_done(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"no field 'questoin'.*evaluate.generations.prompt:"):
        secateur.run(recipe(pico, tmp_path / "a", {"prompt": "{questoin}"}))
    with pytest.raises(ConfigError, match=r"evaluate.generations.chat is true"):
        secateur.run(recipe(pico, tmp_path / "a", {"chat": True}))
    assert not (tmp_path / "a").exists()
