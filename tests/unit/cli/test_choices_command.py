"""``secateur choices make``: a file of questions, what needs no knowledge to answer them, and how to ask them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import yaml

from secateur.corpus.choices import read_choices
from secateur.recipe import ChoicesSpec
from tests.command import call


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A file of 40 terms with definitions of ten made-up words."""
    draw = random.Random(0)
    rows = [
        {"name": f"term{n}", "means": " ".join(f"w{draw.randrange(10_000):04d}" for _ in range(10))} for n in range(40)
    ]
    file = tmp_path / "terms.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make(capsys: pytest.CaptureFixture[str], corpus: Path, *options: str, code: int = 0) -> str:
    """Call the command with a corpus of terms and return what it printed, or its message."""
    out = str(corpus.with_name("q.jsonl"))
    fields = ("--term", "name", "--definition", "means", "--split", "all")
    shown = call(capsys, "choices", "make", str(corpus), "--out", out, *(options or fields))
    assert shown.code == code, shown.err
    return shown.err if code else shown.out


def test_questions_are_written_and_how_far_words_go_is_said(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    """The lines to put into a recipe are printed, and read the file."""
    out = make(capsys, corpus)
    assert "40 questions of 40 possible ones (500 were asked for)" in out
    assert "most words in common" in out
    spec = yaml.safe_load(out[out.index("evaluate:") :])["evaluate"]["choices"]["made"]
    assert len(read_choices(ChoicesSpec(**spec))) == 40
    assert "exists. Give another name, or --force." in make(capsys, corpus, code=2)


def test_numbers_are_there_for_machines(capsys: pytest.CaptureFixture[str], corpus: Path) -> None:
    """One JSON object; the same seed writes the same file."""
    options = ("--term", "name", "--definition", "means", "--split", "all", "--num", "12", "--json", "--force")
    first = json.loads(make(capsys, corpus, *options))
    written = corpus.with_name("q.jsonl").read_bytes()
    assert json.loads(make(capsys, corpus, *options)) == first
    assert corpus.with_name("q.jsonl").read_bytes() == written
    assert (first["questions"], first["candidates"], first["baselines"]["guessing"]) == (12, 40, 0.25)


def test_passages_need_another_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A passage goes on by itself, without words of ours."""
    draw = random.Random(0)
    sentences = [" ".join(["W", *(f"w{draw.randrange(10_000):04d}" for _ in range(9))]) + "." for _ in range(48)]
    corpus = tmp_path / "plain.txt"
    corpus.write_text("\n\n".join(" ".join(sentences[n : n + 4]) for n in range(0, 48, 4)))
    assert "prompt: '{question}'" in make(capsys, corpus, "--split", "all")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--term", "name"), "--term and --definition go together"),
        (("--question", "What?"), "--question is about a term"),
        (("--term", "x", "--definition", "means", "--split", "all"), "has no field 'x'"),
        (("--term", "name", "--definition", "means"), "2 fields hold strings"),
    ],
)
def test_what_cannot_be_made_is_said(
    capsys: pytest.CaptureFixture[str], corpus: Path, options: tuple[str, ...], words: str
) -> None:
    """And nothing is written."""
    assert words in make(capsys, corpus, *options, code=2)
    assert not corpus.with_name("q.jsonl").exists()
