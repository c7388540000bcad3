"""Questions from real text: the right choice is the text's own, its length says nothing, and all is repeatable."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from secateur.corpus.choice_baselines import overlap_share
from secateur.corpus.choice_sources import read_terms, read_texts
from secateur.corpus.choices import read_choices
from secateur.corpus.make_choices import (
    LENGTH_RATIOS,
    MadeQuestion,
    MakeOptions,
    SourceText,
    TermRecord,
    continuation_questions,
    definition_questions,
)
from secateur.corpus.near_duplicates import words_of
from secateur.corpus.split import assign_split, document_hash
from secateur.errors import ConfigError, CorpusError
from secateur.recipe import ChoicesSpec, CorpusSpec, SplitRatios

SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def made_up(draw: random.Random, count: int) -> str:
    """Return a sentence of made-up words."""
    words = ["".join(draw.choices(SYLLABLES, k=draw.randint(2, 3))) for _ in range(count)]
    return " ".join(words).capitalize() + "."


def terms(count: int = 60, seed: int = 0) -> list[TermRecord]:
    """Return made-up terms with definitions of 6 to 14 words."""
    draw = random.Random(seed)
    return [
        TermRecord(
            f"term{number}", f"What is term{number}?", made_up(draw, draw.randint(6, 14)), f"f.jsonl, line {number}"
        )
        for number in range(count)
    ]


def documents(count: int = 30, sentences: int = 9, seed: int = 0) -> list[SourceText]:
    """Return made-up documents of two paragraphs."""
    draw = random.Random(seed)
    texts = [
        " ".join(made_up(draw, draw.randint(6, 12)) for _ in range(sentences)) + "\n\n" + made_up(draw, 8)
        for _ in range(count)
    ]
    return [SourceText(text, f"f.txt, line {number}", f"s{number % 2}") for number, text in enumerate(texts)]


def test_a_definition_stands_among_definitions_of_other_terms() -> None:
    """Of similar length, all different; the right one belongs to the term; answers are spread evenly."""
    records = terms()
    known = {record.question: record for record in records}
    made = definition_questions(records, MakeOptions(num=40, num_choices=4))
    assert len(made.questions) == 40
    for one in made.questions:
        right = known[one.question]
        assert (one.choices[one.answer], one.source) == (right.definition, right.source)
        assert len(set(one.choices)) == 4
        assert set(one.choices) <= {record.definition for record in records}
        assert all(
            len(right.definition) / LENGTH_RATIOS[-1] <= len(choice) <= len(right.definition) * LENGTH_RATIOS[-1]
            for choice in one.choices
        )
    assert Counter(one.answer for one in made.questions) == dict.fromkeys(range(4), 10)
    assert len({one.question for one in made.questions}) == 40


def test_the_length_of_a_choice_says_nothing() -> None:
    """The right choice is the longest and the shortest as often as chance has it."""
    baselines = definition_questions(terms(400), MakeOptions(num=300)).baselines()
    assert baselines["guessing"] == baselines["same answer always"] == 0.25
    assert baselines["longest choice"] == pytest.approx(0.25, abs=0.05)
    assert baselines["shortest choice"] == pytest.approx(0.25, abs=0.05)


@pytest.mark.parametrize("distractors", ["random", "near"])
def test_the_same_text_makes_the_same_questions(distractors: str) -> None:
    """In whatever order it is read; another seed makes others, and more questions include fewer."""
    options = MakeOptions(num=20, distractors=distractors, seed=1)  # type: ignore[arg-type]
    records, texts = terms(), documents()
    assert definition_questions(records, options) == definition_questions(records[::-1], options)
    assert continuation_questions(texts, options) == continuation_questions(texts[::-1], options)
    other = definition_questions(records, replace(options, seed=2))
    assert {one.question for one in other.questions} != {
        one.question for one in definition_questions(records, options).questions
    }


def test_definitions_that_give_the_answer_away_are_left_out() -> None:
    """Their own term in them, blank ones, a second definition, near duplicates, and what is too short or too long."""
    draw = random.Random(3)
    base, long = made_up(draw, 12), made_up(draw, 120)
    extra = [
        TermRecord("golden arm", "?1", "Of the Golden  Arm it is said that it shines.", "a"),
        TermRecord("term0", "?2", made_up(draw, 9), "a"),
        TermRecord("blank", "?3", "  ", "a"),
        TermRecord("short", "?4", "a b c", "a"),
        TermRecord("long", "?5", long, "a"),
        TermRecord("one", "?6", base, "a"),
        TermRecord("two", "?7", base.replace(".", " !"), "a"),
    ]
    made = definition_questions([*terms(), *extra], MakeOptions(num=100))
    assert made.left_out == {
        "the definition holds its own term": 1,
        "the term was there already": 1,
        "the term or its definition is blank": 1,
        "the choice has fewer than 4 words or more than 600 characters": 2,
        "the choice is nearly the same as another one": 1,
    }
    assert made.num_candidates == 61
    assert not {one.question for one in made.questions} & {"?1", "?2", "?3", "?4", "?5"}


def test_a_passage_goes_on_with_its_own_next_sentence() -> None:
    """The right choice follows the passage in its document, and wrong ones stand in other documents."""
    texts = documents()
    made = continuation_questions(texts, MakeOptions(num=40))
    by_source = {text.source: text for text in texts}
    for one in made.questions:
        own = by_source[one.source]
        assert f"{one.question} {one.choices[one.answer]}" in own.text
        assert one.subject == own.subject
        wrong = [choice for place, choice in enumerate(one.choices) if place != one.answer]
        assert not any(choice in own.text for choice in wrong)
    sources = Counter(one.source for one in made.questions)
    assert len(sources) == 30
    assert max(sources.values()) == 2
    again = continuation_questions([*texts, *texts], MakeOptions(num=40))
    assert again.questions == made.questions
    assert again.left_out["the document was there already"] == 30


def test_sentences_are_parted_in_scripts_without_spaces() -> None:
    """Chinese full stops end sentences, and characters are its words."""
    draw = random.Random(0)
    letters = [chr(point) for point in range(0x4E00, 0x4E00 + 500)]
    texts = [
        SourceText("".join("".join(draw.choices(letters, k=draw.randint(10, 14))) + "。" for _ in range(6)), f"{n}")
        for n in range(20)
    ]
    made = continuation_questions(texts, MakeOptions(num=10))
    assert len(made.questions) == 10
    assert all(choice.endswith("。") and choice.count("。") == 1 for one in made.questions for choice in one.choices)


def test_near_choices_have_more_in_common_with_the_right_one() -> None:
    """So words in common find the answer less often."""
    draw = random.Random(0)
    topics = [[made_up(draw, 1) for _ in range(9)] for _ in range(8)]
    records = []
    for number in range(160):
        words = draw.sample(topics[number % 8], 5)
        records.append(
            TermRecord(f"t{number}", f"What of {words[0]} {number}?", " ".join(words + made_up(draw, 4).split()), "")
        )

    def words_find(distractors: str) -> float:
        made = definition_questions(records, MakeOptions(num=100, distractors=distractors))  # type: ignore[arg-type]
        return made.baselines()["most words in common"]

    assert words_find("near") < words_find("random") - 0.1


def test_what_cannot_be_made_is_refused() -> None:
    """With what was left out, and what to do."""
    with pytest.raises(CorpusError, match=r"no question could be made: 2 definitions are not enough for 4 choices"):
        definition_questions(terms(2), MakeOptions())
    with pytest.raises(CorpusError, match=r"has no passage with a sentence after it: 1\). Give more text, or fewer"):
        continuation_questions([SourceText("One sentence only.", "a")], MakeOptions())
    impossible: list[dict[str, Any]] = [{"num": 0}, {"num_choices": 1}, {"num_choices": 27}]
    for options in impossible:
        with pytest.raises(ConfigError, match=r"cannot be made\. Ask for at least 1 question, with 2 to 26 choices"):
            MakeOptions(**options)


def test_words_in_common_are_counted_once_and_ties_are_shared() -> None:
    """A share of 1 only for a clear winner; nothing in common is a guess."""
    assert overlap_share("The heart beats.", ("a HEART, heart", "the heart", "lungs"), 1) == 1.0
    assert overlap_share("The heart beats.", ("a HEART, heart", "the heart", "lungs"), 0) == 0.0
    assert overlap_share("Which?", ("one", "two", "three", "four"), 2) == 0.25
    assert overlap_share("Heart and lungs", ("heart", "lungs", "liver"), 1) == 0.5
    assert words_of("Ünï-CODE 東京") == ["ünï", "code", "東", "京"]


# -- reading ---------------------------------------------------------------------------------------------------------


def write(path: Path) -> tuple[CorpusSpec, list[dict[str, str]]]:
    """Return a corpus of terms in a file, and its rows."""
    rows = [{"name": r.term, "means": r.definition, "area": f"a{i % 3}"} for i, r in enumerate(terms(200))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return CorpusSpec(path=str(path), text="{name}: {means}"), rows


def test_questions_come_from_one_split_only(tmp_path: Path) -> None:
    """The split is that of the recipe's documents, so nothing that is calibrated on is asked about."""
    spec, rows = write(tmp_path / "t.jsonl")
    found = read_terms(spec, "name", "means", subject="area")
    expected = [
        row for row in rows if assign_split(document_hash(f"{row['name']}: {row['means']}"), SplitRatios()) == "test"
    ]
    assert 5 < len(expected) < 60
    assert [(one.term, one.definition, one.subject) for one in found] == [
        (row["name"], row["means"], row["area"]) for row in expected
    ]
    assert found[0].question == f'Which of these is the definition of "{found[0].term}"?'
    assert found[0].source.startswith("t.jsonl, line ")
    assert len(read_texts(spec)) == len(expected)
    parts = [read_texts(spec, part) for part in ("calibration", "validation", "test")]
    assert sum(map(len, parts)) == len(read_texts(spec, "all")) == 200
    asked = read_terms(CorpusSpec(path=str(tmp_path / "t.jsonl")), "{name}!", "means", "all", question="{area}: {term}")
    assert (asked[0].question, len(asked)) == ("a0: term0!", 200)


def test_what_was_made_can_be_asked(tmp_path: Path) -> None:
    """Rows are read back as questions, with answers and subjects."""
    made = definition_questions(
        read_terms(write(tmp_path / "t.jsonl")[0], "name", "means", "all", subject="area"), MakeOptions(num=30)
    )
    file = tmp_path / "q.jsonl"
    file.write_text("".join(json.dumps(one.to_dict()) + "\n" for one in made.questions))
    items = read_choices(ChoicesSpec(path=str(file), subject="subject"))
    assert [(item.choices, item.answer, item.subject) for item in items] == [
        (one.choices, one.answer, one.subject) for one in made.questions
    ]
    assert MadeQuestion("q", ("a", "b"), 0, "s").to_dict() == {
        "question": "q",
        "choices": ["a", "b"],
        "answer": 0,
        "source": "s",
    }


def test_what_gives_no_terms_is_refused(tmp_path: Path) -> None:
    """A wrong field, plain text, and a split without documents, each with what to do."""
    spec, _ = write(tmp_path / "t.jsonl")
    with pytest.raises(CorpusError, match=r"has no field 'nam'. Did you mean 'name'\?.*Correct --term"):
        read_terms(spec, "nam", "means")
    (tmp_path / "a.txt").write_text("One. Two.\n")
    with pytest.raises(CorpusError, match="line 1 has no fields, and --term asks for name"):
        read_terms(CorpusSpec(path=str(tmp_path / "a.txt")), "name", "means", "all")
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(CorpusError, match=r"no record in its test split\. Give more text, or --split all"):
        read_texts(CorpusSpec(path=str(tmp_path / "b.jsonl")))
