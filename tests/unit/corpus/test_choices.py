"""Questions: read from any format, refused in clear words, and tokenized so that each choice is scored as it is."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from secateur.corpus.choices import ChoiceItem, PackedChoices, pack_choices, read_choices
from secateur.corpus.pieces import Piece
from secateur.errors import CorpusError
from secateur.recipe import ChoicesSpec
from secateur.records.choice_blocks import ChoiceBlocks
from tests.tiny_tokenizers import KINDS, tiny_tokenizer

from .conftest import build_sentencepiece, build_tokenizer

ROW: dict[str, Any] = {"question": "What helps?", "choices": ["rest", "rain", "aspirin"], "answer": 2}
ITEMS = [
    ChoiceItem("Question: What was given?\nAnswer:", ("the drug", "a trial of the heart", "café 東京"), 1),
    ChoiceItem("Question: Which letter?\nA. one\nB. two\nAnswer:", ("A", "B"), 0),
    ChoiceItem("The patient was given \n", ("ten milligrams", "nothing"), 0),
]


def write(path: Path, *rows: object) -> str:
    """Write rows as JSON lines and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path: Path, *rows: object, **options: Any) -> list[ChoiceItem]:
    """Return the questions in rows of a JSON lines file."""
    return read_choices(ChoicesSpec(path=write(path / "q.jsonl", *rows), **options), "quiz")


def refusal(path: Path, *rows: object, **options: Any) -> str:
    """Return the message with which rows are refused."""
    with pytest.raises(CorpusError) as caught:
        read(path, *rows, **options)
    return str(caught.value)


def all_pieces(blocks: PackedChoices) -> dict[int, Piece]:
    """Return the piece of each row, those of branches with their trunk's tokens before them again."""
    found = {}
    for block in blocks.blocks:
        for place, piece in enumerate(block):
            if piece.first_position:
                trunk = next(other for other in block[place::-1] if other.first_position == 0)
                assert len(trunk.ids) == piece.first_position
                ids = np.concatenate([trunk.ids, piece.ids])
                context = len(trunk.ids) + piece.num_context
                piece = replace(piece, ids=ids, num_prefix=trunk.num_prefix, num_context=context)
            if piece.document < len(blocks.last_ids):
                found[piece.document] = piece
    return found


# -- reading -------------------------------------------------------------------------------------------------------


def test_the_default_prompt_asks_and_the_choices_follow(tmp_path: Path) -> None:
    """Fields have their usual names, and nothing else is needed."""
    (item,) = read(tmp_path, ROW)
    assert item == ChoiceItem("Question: What helps?\nAnswer:", ("rest", "rain", "aspirin"), 2)
    assert item.where.endswith("q.jsonl, line 1")


def test_style_letter_lists_the_choices_and_scores_letters(tmp_path: Path) -> None:
    """As the MMLU benchmark asks."""
    (item,) = read(tmp_path, ROW, style="letter")
    assert item.prompt == "Question: What helps?\nA. rest\nB. rain\nC. aspirin\nAnswer:"
    assert (item.choices, item.answer) == (("A", "B", "C"), 2)


def test_prompts_take_any_field(tmp_path: Path) -> None:
    """The question is a template over the record, and the prompt one over the question, the list and the record."""
    row = {**ROW, "meta": {"text": "Abstract."}}
    options = {"question": "<{question}>", "prompt": "{meta.text} {question} {choices}:"}
    (item,) = read(tmp_path, row, **options)
    assert item.prompt == "Abstract. <What helps?> A. rest\nB. rain\nC. aspirin:"


def test_every_format_gives_the_same_questions(tmp_path: Path) -> None:
    """Lists in a field, lists as JSON in a cell, or a field for each choice; a lacking last choice is left out."""
    import pyarrow
    import pyarrow.parquet

    rows = [ROW, {"question": "And?", "choices": ["a b", "c"], "answer": 0}]
    expected = read(tmp_path, *rows)
    for name in ("a.jsonl.gz", "b.json", "c.csv", "d.csv", "e.parquet"):
        path, options = tmp_path / name, {}
        if name == "a.jsonl.gz":
            path.write_bytes(gzip.compress((tmp_path / "q.jsonl").read_bytes()))
        elif name == "b.json":
            path.write_text(json.dumps(rows))
        elif name == "c.csv":
            path.write_text('question,choices,answer\nWhat helps?,"[""rest"", ""rain"", ""aspirin""]",2\n')
            with path.open("a") as file:
                file.write('And?,"[""a b"", ""c""]",0\n')
        elif name == "d.csv":
            path.write_text("question,x,y,z,answer\nWhat helps?,rest,rain,aspirin,C\nAnd?,a b,c,,a\n")
            options = {"choices": ["x", "y", "z"]}
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**row, "more": 1} for row in rows]), path)
        assert read_choices(ChoicesSpec(path=str(path), **options)) == expected


@pytest.mark.parametrize(
    ("answers", "expected"),
    [([2, 0], [2, 0]), (["C", "a"], [2, 0]), (["30", "yes"], [2, 0]), (["2", "1"], [2, 1]), ([2.0, 1.0], [2, 1])],
)
def test_answers_are_indices_letters_or_texts(tmp_path: Path, answers: list[Any], expected: list[int]) -> None:
    """Whatever names a choice, in the same way in the whole set."""
    choices = [["10", "20", 30], ["yes", "no"]]
    rows = [{**ROW, "choices": c, "answer": a} for c, a in zip(choices, answers, strict=True)]
    assert [item.answer for item in read(tmp_path, *rows)] == expected


def test_numbers_among_the_choices_do_not_confuse_numbers_as_indices(tmp_path: Path) -> None:
    """A number is an index; a string is settled by the rows that leave only one reading."""
    rows = [{**ROW, "choices": ["1", "0"], "answer": 1}, {**ROW, "choices": ["1", "0"], "answer": 0}]
    assert [item.answer for item in read(tmp_path, *rows)] == [1, 0]
    rows = [{**ROW, "choices": ["1", "0"], "answer": "1"}, {**ROW, "choices": ["1", "7"], "answer": "7"}]
    assert [item.answer for item in read(tmp_path, *rows)] == [0, 1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"answer": 3},
            "answer 3 in field 'answer' is none of the 3 choices: no index from 0 to 2, no letter from A to C",
        ),
        ({"answer": -1}, "answer -1 in field 'answer' is none"),
        ({"answer": "D"}, "answer 'D' in field 'answer' is none"),
        ({"answer": None}, "answer None in field 'answer' is none"),
        ({"answer": 0.5}, "answer 0.5 in field 'answer' is none"),
        ({"choices": ["rest", "sleep", " rest"]}, "choices 0 and 2 in field 'choices' are the same, 'rest'. Correct"),
        ({"choices": ["rest"]}, "has 1 choices in field 'choices'. A question needs at least two"),
        ({"choices": []}, "has 0 choices"),
        ({"choices": ["a", " "]}, "choice 1 in field 'choices' is blank"),
        ({"choices": ["a", ["b"]]}, "choice 1 in field 'choices' is a list, not text"),
        ({"choices": "a, b"}, "field 'choices' is not a list of choices but 'a, b'"),
        ({"question": " "}, "the question is blank. Remove the row, or correct evaluate.choices.quiz.question:."),
        ({"choices": ["a", "\ud800"]}, "half a surrogate pair"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """File, line, what was received and what to do."""
    message = refusal(tmp_path, ROW, {**ROW, **changes})
    assert f"{tmp_path / 'q.jsonl'}, line 2" in message
    assert words in message


def test_a_missing_field_is_named_with_the_nearest(tmp_path: Path) -> None:
    """For each of the three fields, and with the key to correct."""
    for field in ("question", "choices", "answer"):
        row = {name + ("s" if name == field else ""): value for name, value in ROW.items()}
        message = refusal(tmp_path, row)
        assert f"line 1 has no field {field!r}. Did you mean '{field}s'?" in message
        assert f"Correct evaluate.choices.quiz.{field}:." in message


def test_answers_written_in_two_ways_are_refused(tmp_path: Path) -> None:
    """Neither a mixture nor what can be read in two ways is guessed at."""
    message = refusal(tmp_path, ROW, {**ROW, "answer": "B"})
    assert "line 2: the answer can only be a letter, and those before it only an index (from 0)" in message
    message = refusal(tmp_path, {**ROW, "choices": ["1", "0"], "answer": "1"})
    assert "line 1 and after: every answer can be an index (from 0) or the text of a choice" in message


def test_what_is_no_set_of_questions_is_refused(tmp_path: Path) -> None:
    """Plain text, rows that are not objects, too many letters, and nothing at all."""
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"unknown suffix '.txt'"):
        read_choices(ChoicesSpec(path=str(tmp_path / "a.txt")))
    assert "line 1 holds one list" in refusal(tmp_path, [1])
    assert "has 27 choices; style letter has 26" in refusal(
        tmp_path, {**ROW, "choices": list(range(27))}, style="letter"
    )
    assert "set of questions 'quiz' is empty" in refusal(tmp_path)
    assert "evaluate.choices.quiz.prompt: '{' is not a template" in refusal(tmp_path, ROW, prompt="{")


def test_a_sample_is_fixed_and_grows(tmp_path: Path) -> None:
    """The same questions whatever their order, style or prompt; more include fewer; another seed takes others."""
    rows = [{**ROW, "question": f"Q{number}"} for number in range(40)]

    def asked(rows: list[Any], **options: Any) -> list[str]:
        return [item.prompt.split()[1] for item in read(tmp_path, *rows, **options)]

    ten = asked(rows, max_items=10)
    assert len(ten) == 10 < len(asked(rows))
    assert ten == sorted(ten, key=lambda name: int(name[1:]))
    assert set(asked(rows[::-1], max_items=10)) == set(ten) < set(asked(rows, max_items=11))
    assert asked(rows, max_items=10, style="letter") == ten
    assert asked(rows, max_items=10, seed=1) != ten
    assert refusal(tmp_path, *rows, {**ROW, "answer": 9}, max_items=1)


def test_subjects_are_read_along(tmp_path: Path) -> None:
    """From any field, also an inner one; blank ones are said to be none; a missing field or a list is refused."""
    rows = [{**ROW, "meta": {"area": area}} for area in ("law ", None, 7)]
    assert [item.subject for item in read(tmp_path, *rows, subject="meta.area")] == ["law", "(none)", "7"]
    assert [item.subject for item in read(tmp_path, ROW)] == [""]
    assert "has no field 'area'" in refusal(tmp_path, ROW, subject="area")
    assert "line 1: field 'area' is a list, not the name" in refusal(tmp_path, {**ROW, "area": ["x"]}, subject="area")
    blocks = pack_choices(read(tmp_path, *rows, subject="meta.area"), build_tokenizer(bos=True), block_size=64)
    assert blocks.subjects == ("law", "(none)", "7")
    assert pack_choices(read(tmp_path, ROW), build_tokenizer(bos=True), block_size=64).subjects == ()


def test_a_context_may_be_blank_but_not_missing(tmp_path: Path) -> None:
    """As in every template over fields: null is blank, and a record without the field is refused."""
    prompt = "{context}\nQuestion: {question}\nAnswer:"
    rows = [{**ROW, "context": context} for context in ("Aspirin was given.", None, "")]
    prompts = [item.prompt for item in read(tmp_path, *rows, prompt=prompt)]
    assert prompts[0] == "Aspirin was given.\nQuestion: What helps?\nAnswer:"
    assert prompts[1] == prompts[2] == "\nQuestion: What helps?\nAnswer:"
    message = refusal(tmp_path, rows[0], ROW, prompt=prompt)
    assert "line 2 has no field 'context'" in message
    assert "Correct evaluate.choices.quiz.prompt:." in message


def test_words_in_common_are_those_of_question_and_context(tmp_path: Path) -> None:
    """Neither the prompt's own words nor the list of choices count, in either style."""
    row = {**ROW, "question": "Which word?", "choices": ["answer", "question", "aspirin"], "context": "Aspirin, then."}
    prompt = "{context} Question: {question} {choices} Answer:"
    for style in ("text", "letter"):
        assert read(tmp_path, row, style=style)[0].overlap == pytest.approx(1 / 3)
        assert read(tmp_path, row, prompt=prompt, style=style)[0].overlap == 1.0
    blocks = pack_choices(ITEMS, build_tokenizer(bos=True), block_size=64)
    assert list(blocks.overlaps) == pytest.approx([1 / 3, 0.5, 0.5])


def test_bad_rows_of_a_csv_file_are_named(tmp_path: Path) -> None:
    """By file and row, as those of other formats."""
    path = tmp_path / "q.csv"
    path.write_text("question,a,b,answer\nWhat?,rest,rain,A\nAnd?,rest,rest,B\n")
    spec = ChoicesSpec(path=str(path), choices=["a", "b"])
    with pytest.raises(
        CorpusError, match=r"q\.csv, row 2 \(line 3\): choices 0 and 1 in fields a, b are the same, 'rest'"
    ):
        read_choices(spec)


# -- tokenizing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "sentencepiece without BOS", "byte-level without BOS"])
def test_rows_are_prompt_and_choice_as_one_text(kind: str) -> None:
    """Under every tokenizer a row is what it makes of the whole text, and what follows the prompt is predicted."""
    tokenizer: Any
    if kind in KINDS:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(kind), bos_token="<s>")
    else:
        tokenizer = build_sentencepiece(bos=False) if "piece" in kind else build_tokenizer(bos=False)
    prefix = [] if "without" in kind else [tokenizer.bos_token_id]
    blocks = pack_choices(ITEMS, tokenizer, block_size=8)
    assert isinstance(blocks, ChoiceBlocks)
    pieces = all_pieces(blocks)
    assert sorted(pieces) == list(range(len(blocks.last_ids))) == list(range(len(blocks.choice_starts)))
    for item, places in zip(ITEMS, blocks.places, strict=True):
        for choice, (row, ending) in zip(item.choices, places, strict=True):
            prompt = item.prompt.rstrip()
            space = item.prompt[len(prompt) :] or " "
            whole = prefix + tokenizer.encode(prompt + space + choice, add_special_tokens=False)
            before = prefix + tokenizer.encode(prompt, add_special_tokens=False)
            ids = [*pieces[row].ids[:-1].tolist(), int(blocks.last_ids[row, ending])]
            assert ids == whole
            assert whole[: len(before)] == before
            assert (pieces[row].num_prefix, pieces[row].num_context) == (len(prefix), len(before))
            assert blocks.choice_starts[row] == len(before)


def test_only_choices_are_predicted(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """In the batches that a model gets, each row is a document and its choice is what counts."""
    blocks = pack_choices(ITEMS, plain_tokenizer, block_size=64, shares_prompts=False)
    assert blocks.num_blocks < len(blocks.documents)
    (batch,) = blocks.batches(blocks.num_blocks)
    for row, piece in all_pieces(blocks).items():
        mine = batch.document == row
        assert batch.input_ids[mine].tolist() == piece.ids.tolist()
        predicted = batch.predicted[mine].tolist()
        assert predicted == [False] * piece.num_context + [True] * (len(piece.ids) - piece.num_context)
    assert blocks.num_tokens == int(batch.valid.sum())
    assert batch.input_ids.shape[1] == blocks.block_size


def test_a_prompt_is_shared_where_that_is_less_to_read(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Not for a single row, nor beyond a layer's window or the block, nor where prompts are scored themselves."""
    alone = pack_choices(ITEMS, plain_tokenizer, block_size=64, shares_prompts=False)
    shared = pack_choices(ITEMS, plain_tokenizer, block_size=64)
    assert shared.num_tokens < alone.num_tokens == sum(len(piece.ids) for piece in all_pieces(alone).values())
    num_rows = len(alone.documents)
    assert (len(shared.documents), len(shared.last_ids)) == (num_rows + 2, num_rows)
    assert shared.documents[:num_rows].tolist() == alone.documents.tolist()
    for row, piece in all_pieces(alone).items():
        again = all_pieces(shared)[row]
        assert (again.ids.tolist(), again.num_context) == (piece.ids.tolist(), piece.num_context)
    longest = max(len(piece.ids) for piece in all_pieces(alone).values())
    limits: list[dict[str, Any]] = [{"window": 1}, {"scores_whole": True}, {"max_length": longest}]
    for options in limits:
        blocks = pack_choices(ITEMS[:1], plain_tokenizer, **{"block_size": 64, **options})
        assert len(blocks.documents) == len(blocks.last_ids)
    assert pack_choices(ITEMS, plain_tokenizer, block_size=64, window=longest).num_tokens == shared.num_tokens
    (whole,) = pack_choices(ITEMS[1:2], plain_tokenizer, block_size=64, scores_whole=True).batches(9)
    assert int(whole.predicted.sum()) == whole.num_tokens - 1


def test_choices_of_one_token_share_a_row(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    """Letters cost one row a question, and so do choices that differ in their last token alone."""
    blocks = pack_choices(ITEMS, bos_tokenizer, block_size=64)
    assert blocks.places == (((0, 0), (1, 0), (2, 0)), ((3, 0), (3, 1)), ((4, 0), (5, 0)))
    letters = [bos_tokenizer.encode(f" {letter}", add_special_tokens=False)[-1] for letter in "AB"]
    assert blocks.last_ids[3].tolist() == letters
    assert blocks.last_ids[0, 0] == blocks.last_ids[0, 1]
    assert blocks.choice_bytes == ((8, 20, 12), (1, 1), (14, 7))
    assert blocks.answers == (1, 0, 0)


@pytest.mark.parametrize("bos", [False, True])
def test_long_prompts_lose_their_start(bos: bool) -> None:
    """As many tokens for every choice of the question, never the BOS; the others stay whole, and it is counted."""
    tokenizer = build_tokenizer(bos=bos)
    items = [replace(ITEMS[0], prompt="The patient was given it. " * 3 + ITEMS[0].prompt), *ITEMS[1:]]
    whole = all_pieces(pack_choices(items, tokenizer, block_size=8))
    limit = max(len(whole[row].ids) for row in range(3)) - 3
    assert all(len(whole[row].ids) <= limit for row in range(3, 6))
    blocks = pack_choices(items, tokenizer, block_size=4096, max_length=limit)
    cut = all_pieces(blocks)
    assert (blocks.num_truncated, blocks.block_size) == (1, limit)
    assert pack_choices(items, tokenizer, block_size=8, max_length=limit + 3).num_truncated == 0
    for row in range(6):
        gone = 3 if row < 3 else 0
        assert cut[row].ids.tolist() == [*whole[row].ids[:bos].tolist(), *whole[row].ids[bos + gone :].tolist()]
        assert cut[row].num_context == whole[row].num_context - gone


def test_a_choice_without_room_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """At least one token must come before it."""
    pieces = all_pieces(pack_choices(ITEMS[:1], plain_tokenizer, block_size=8))
    longest = max(len(piece.ids) - piece.num_context for piece in pieces.values())
    assert pack_choices(ITEMS[:1], plain_tokenizer, block_size=8, max_length=longest + 1).num_truncated == 1
    with pytest.raises(CorpusError, match=f"question: the longest choice has {longest} tokens, and only {longest} fit"):
        pack_choices(ITEMS[:1], plain_tokenizer, block_size=8, max_length=longest)


def test_a_token_across_the_border_is_scored_with_every_choice() -> None:
    """Where "b" and the space after it are one token, the row is still a text as the tokenizer cuts it."""
    vocab = {letter: index for index, letter in enumerate(["a", "b", " ", "c", "\n", "b "])}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab, [("b", " ")])))
    blocks = pack_choices([ChoiceItem("aab", ("c", "ca"), 0)], tokenizer, block_size=8)
    pieces = all_pieces(blocks)
    assert [pieces[row].ids.tolist() for row in (0, 1)] == [[0, 0, 5, 3], [0, 0, 5, 3, 0]]
    assert [piece.num_context for piece in pieces.values()] == [2, 2]
    with pytest.raises(CorpusError, match="gives the prompt or a choice no token of its own"):
        pack_choices([ChoiceItem("b", ("c", "a"), 0)], tokenizer, block_size=8)


def test_the_fingerprint_is_of_the_questions() -> None:
    """Another tokenizer asks the same questions; another answer, choice or prompt is another set."""
    first = pack_choices(ITEMS, build_tokenizer(bos=True), block_size=64)
    assert pack_choices(ITEMS, build_sentencepiece(bos=False), block_size=8).fingerprint == first.fingerprint
    (prompt, choices, answer), rest = (ITEMS[0].prompt, ITEMS[0].choices, ITEMS[0].answer), ITEMS[1:]
    for other in (
        ChoiceItem(prompt + " ", choices, answer),
        ChoiceItem(prompt, (*choices[:2], "x"), answer),
        ChoiceItem(prompt, choices, 0),
    ):
        assert pack_choices([other, *rest], build_tokenizer(bos=True), block_size=64).fingerprint != first.fingerprint
    assert torch.equal(first.documents, pack_choices(ITEMS, build_tokenizer(bos=False), block_size=64).documents)


def test_nothing_to_ask_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """An empty list is a mistake of the caller."""
    with pytest.raises(CorpusError, match="set of questions 'choices' is empty"):
        pack_choices([], plain_tokenizer, block_size=8)
