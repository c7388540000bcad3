"""Answers by log-likelihood equal a loop over single rows, and the shares, errors and ties are as they should be."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from secateur.corpus.choices import ChoiceItem, PackedChoices, pack_choices
from secateur.errors import CheckpointError
from secateur.evaluate import evaluate_choices
from secateur.evaluate.choices import branch_mask, score_answers
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.choices import ChoicesScore
from tests.conftest import pico_model
from tests.tiny_tokenizers import KINDS, tiny_tokenizer
from tests.unit.corpus.conftest import build_tokenizer

WORDS = "the patient was given ten milligrams of a drug every morning café".split()
LLAMA = families()["llama"]
PLAIN: dict[str, Any] = {"num_truncated": 0, "fingerprint": "f", "tokens_per_s": 1.0}


def made_up_items(num_items: int = 9, seed: int = 0) -> list[ChoiceItem]:
    """Return questions with two to four choices of different lengths; every third is asked by letters."""
    draw = random.Random(seed)
    items = []
    for number in range(num_items):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(2 + number % 3)]
        choices = tuple("ABCD"[: len(texts)]) if number % 3 == 2 else tuple(texts)
        end = ["\nAnswer:", " ", " is"][number % 3]
        items.append(ChoiceItem(" ".join(draw.choices(WORDS, k=4)) + end, choices, draw.randrange(len(choices))))
    return items


def whole_text(item: ChoiceItem, choice: str) -> str:
    """Return prompt and choice as one text."""
    prompt = item.prompt.rstrip()
    return prompt + (item.prompt[len(prompt) :] or " ") + choice


def lone_log_likelihood(model: Any, tokenizer: Any, item: ChoiceItem, choice: str) -> float:
    """Return the summed log-likelihood of one choice, from one unpacked row, in float64."""
    prompt = item.prompt.rstrip()
    prefix = [tokenizer.bos_token_id] if tokenizer.encode("a")[0] == tokenizer.bos_token_id else []
    whole = prefix + tokenizer.encode(whole_text(item, choice), add_special_tokens=False)
    start = len(prefix) + len(tokenizer.encode(prompt, add_special_tokens=False))
    with torch.inference_mode():
        logits = model(torch.tensor([whole])).logits[0].double()
    steps = logits.log_softmax(-1)[range(start - 1, len(whole) - 1), whole[start:]]
    return float(steps.sum())


def check_against_loop(score: ChoicesScore, log_likelihoods: list[list[float]], items: Any, rel: float) -> None:
    """Compare every number of a score with the log-likelihoods of single rows, in NumPy."""
    right, right_norm, margins = [], [], []
    for item, values in zip(items, log_likelihoods, strict=True):
        sizes = [len(choice.encode()) for choice in item.choices]
        right.append(int(np.argmax(values)) == item.answer)
        right_norm.append(int(np.argmax(np.array(values) / sizes)) == item.answer)
        margins.append(values[item.answer] - max(v for i, v in enumerate(values) if i != item.answer))
    assert score.item_correct == tuple(right)
    assert score.item_correct_norm == tuple(right_norm)
    assert score.item_margin == pytest.approx(margins, rel=rel, abs=rel)
    n = len(items)
    assert [score.acc, score.acc_norm] == pytest.approx([np.mean(right), np.mean(right_norm)])
    assert score.acc_stderr == pytest.approx(math.sqrt(score.acc * (1 - score.acc) / (n - 1)))
    assert score.acc_norm_stderr == pytest.approx(math.sqrt(score.acc_norm * (1 - score.acc_norm) / (n - 1)))
    assert score.margin == pytest.approx(np.mean(margins), rel=rel, abs=rel)
    assert score.margin_stderr == pytest.approx(np.std(margins, ddof=1) / math.sqrt(n), rel=1e-4)
    assert score.chance == pytest.approx(np.mean([1 / len(item.choices) for item in items]))
    assert score.num_items == n


@pytest.mark.parametrize("bos", [False, True])
def test_answers_equal_a_loop_over_single_rows(family: Family, bos: bool) -> None:
    """In every family: packing, shared rows and prompts, padding and the head on some positions only change nothing.

    Models compute in float64, but for Gemma's norms.
    """
    tokenizer, items = build_tokenizer(bos=bos), made_up_items()
    model = pico_model(family, vocab_size=len(tokenizer))
    blocks = pack_choices(items, tokenizer, block_size=48, max_length=64)
    assert blocks.num_blocks < len(blocks.last_ids) < sum(len(item.choices) for item in items)
    assert num_trunks(blocks) > 3
    score = evaluate_choices(model, blocks, family, batch_size=2)
    expected = [[lone_log_likelihood(model, tokenizer, item, choice) for choice in item.choices] for item in items]
    check_against_loop(score, expected, items, rel=1e-5 if "gemma" in family.name else 1e-9)
    assert 0 < sum(score.item_correct) < len(items)
    assert (score.num_truncated, score.fingerprint) == (0, blocks.fingerprint)
    assert score.tokens_per_s > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tokenizer_is_scored_alike(kind: str) -> None:
    """The loop over single rows gives the same answers whatever the tokenizer does with spaces."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(kind), bos_token="<s>")
    items = made_up_items(6, seed=1)
    model = pico_model(LLAMA, vocab_size=len(tokenizer))
    score = evaluate_choices(model, pack_choices(items, tokenizer, block_size=32), LLAMA)
    expected = [[lone_log_likelihood(model, tokenizer, item, choice) for choice in item.choices] for item in items]
    check_against_loop(score, expected, items, rel=1e-9)


@cache
def packed(block_size: int = 48, *, shares_prompts: bool = True, scores_whole: bool = False) -> PackedChoices:
    """Return made-up questions, packed."""
    return pack_choices(
        made_up_items(),
        build_tokenizer(bos=True),
        block_size=block_size,
        shares_prompts=shares_prompts,
        scores_whole=scores_whole,
    )


def num_trunks(blocks: PackedChoices) -> int:
    """Return how many prompts are shared."""
    return len(blocks.documents) - len(blocks.last_ids)


def test_neither_batch_nor_block_size_changes_anything() -> None:
    """One block at a time or all at once, wide blocks or narrow ones, prompts shared or not: the same to rounding."""
    model = pico_model(LLAMA, vocab_size=len(build_tokenizer(bos=True)))
    first, *others = (
        evaluate_choices(model, packed(width, shares_prompts=shares), LLAMA, batch_size=size)
        for width, size, shares in [
            (48, 1, True),
            (48, 2, False),
            (48, 100, True),
            (16, 3, True),
            (4096, 1, True),
            (64, 5, False),
        ]
    )
    for other in others:
        assert other.item_margin == pytest.approx(first.item_margin, rel=1e-12)
        assert other.item_correct == first.item_correct
        assert other.item_correct_norm == first.item_correct_norm


class Planted(nn.Module):
    """A model that continues known texts as it was told, and finds everything else equally likely."""

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int) -> None:
        super().__init__()
        self.unit = nn.Parameter(torch.ones(1))
        self.next = {tuple(ids[:place]): ids[place] for ids in texts for place in range(1, len(ids))}
        self.vocab_size = vocab_size

    def forward(self, input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor, **_: object) -> Any:
        """Return logits of 9 for the known next token and of 0 for all others."""
        logits = torch.zeros(*input_ids.shape, self.vocab_size)
        for row, column in itertools.product(range(input_ids.shape[0]), range(input_ids.shape[1])):
            start = column - int(position_ids[row, column])
            known = self.next.get(tuple(input_ids[row, start : column + 1].tolist()))
            if known is not None:
                logits[row, column, known] = 9.0
        return SimpleNamespace(logits=logits[:, logits_to_keep])


def planted(chosen: Callable[[ChoiceItem], int]) -> Planted:
    """Return a model that knows one choice of each made-up question."""
    blocks, tokenizer = packed(shares_prompts=False), build_tokenizer(bos=True)
    pieces = {piece.document: piece for block in blocks.blocks for piece in block}
    texts = []
    for item, places in zip(made_up_items(), blocks.places, strict=True):
        row, ending = places[chosen(item)]
        texts.append([*pieces[row].ids[:-1].tolist(), int(blocks.last_ids[row, ending])])
    return Planted(texts, len(tokenizer))


def test_a_model_that_knows_the_answers_is_right() -> None:
    """And one that knows the wrong ones is never."""
    blocks = packed(shares_prompts=False)
    score = evaluate_choices(planted(lambda item: item.answer), blocks, LLAMA)
    assert (score.acc, score.acc_stderr, score.acc_norm) == (1.0, 0.0, 1.0)
    assert min(score.item_margin) > 1
    score = evaluate_choices(planted(lambda item: (item.answer + 1) % len(item.choices)), blocks, LLAMA)
    assert score.acc == 0.0
    assert max(score.item_margin) < -1


def test_ties_go_to_the_first_choice() -> None:
    """A model that finds all letters equally likely answers A, so its share is that of the questions with answer A."""
    tokenizer = build_tokenizer(bos=True)
    items = [ChoiceItem(f"Question {number}?", ("A", "B", "C"), number % 3) for number in range(7)]
    score = evaluate_choices(Planted([], len(tokenizer)), pack_choices(items, tokenizer, block_size=64), LLAMA)
    assert score.item_correct == score.item_correct_norm == (True, False, False, True, False, False, True)
    assert score.item_margin == (0.0,) * 7
    assert score.chance == pytest.approx(1 / 3)


def test_equal_choices_are_exactly_equal() -> None:
    """The same text twice ties: rounding does not choose between them."""
    items = [ChoiceItem("The patient was given", ("the drug", "ten", "the drug"), answer) for answer in (0, 2)]
    tokenizer = build_tokenizer(bos=False)
    model = pico_model(LLAMA, torch.float32, vocab_size=len(tokenizer))
    score = evaluate_choices(model, pack_choices(items, tokenizer, block_size=64), LLAMA)
    assert score.item_margin[0] == score.item_margin[1] <= 0
    assert not score.item_correct[1]


def test_lengths_count_in_bytes_and_only_for_acc_norm() -> None:
    """A long choice may win per byte what it loses in all; a character of three bytes counts three."""

    def score(values: list[float], sizes: list[int], answer: int) -> ChoicesScore:
        return score_answers([values, values], [answer, answer], [sizes, sizes], overlaps=[0.0, 0.5], **PLAIN)

    long_wins = score([-4.0, -6.0], [3, 6], 1)
    assert (long_wins.acc, long_wins.acc_norm, long_wins.margin) == (0.0, 1.0, -2.0)
    tie = score([-3.0, -6.0], [3, 6], 0)
    assert (tie.acc, tie.acc_norm) == (1.0, 1.0)
    items = [ChoiceItem("Where?", ("東京", "ab"), 0)]
    assert pack_choices(items, build_tokenizer(bos=False), block_size=64).choice_bytes == ((6, 2),)


def test_one_question_has_no_error() -> None:
    """A single answer says nothing about its spread."""
    score = score_answers([[-1.0, -2.0]], [0], [[1, 1]], overlaps=[1.0], **PLAIN)
    assert (score.acc, score.acc_stderr, score.margin, score.margin_stderr) == (1.0, math.inf, 1.0, math.inf)


def test_a_broken_model_is_refused() -> None:
    """NaN is no answer."""
    model = pico_model(LLAMA, vocab_size=len(build_tokenizer(bos=True)))
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        evaluate_choices(model, packed(), LLAMA)


def test_a_cut_prompt_is_what_the_model_reads() -> None:
    """With a limit, a row is scored as the rest of it alone."""
    tokenizer = build_tokenizer(bos=True)
    item = ChoiceItem("Every morning the patient was given ten of a", ("drug", "café every"), 1)
    blocks = pack_choices([item, item], tokenizer, block_size=64, max_length=12, shares_prompts=False)
    model = pico_model(LLAMA, vocab_size=len(tokenizer))
    score = evaluate_choices(model, blocks, LLAMA)
    assert score.num_truncated == 2
    values = []
    for row in (0, 1):
        piece = next(piece for block in blocks.blocks for piece in block if piece.document == row)
        assert len(piece.ids) <= 12
        with torch.inference_mode():
            steps = model(torch.tensor([piece.ids.tolist()])).logits[0].log_softmax(-1)
        places = range(piece.num_context, len(piece.ids))
        values.append(sum(float(steps[place - 1, int(piece.ids[place])]) for place in places))
    assert score.margin == pytest.approx(values[1] - values[0], rel=1e-9)


def test_a_branch_reads_its_trunk_and_itself() -> None:
    """The mask of a trunk with two branches, a lone row and padding, written out token by token."""
    position_ids = torch.tensor([[0, 1, 2, 2, 3, 2, 3, 4, 0, 1, 0]])
    document = torch.tensor([[9, 9, 9, 0, 0, 1, 1, 1, 2, 2, -1]])
    owners = {0: {9, 0}, 1: {9, 1}, 9: {9}, 2: {2}, -1: {-1}}
    mask = branch_mask(position_ids, document)[0, 0]
    for query, key in itertools.product(range(11), range(11)):
        expected = key <= query and int(document[0, key]) in owners[int(document[0, query])]
        assert bool(mask[query, key]) == expected, (query, key)


@pytest.mark.parametrize("kind", KINDS)
def test_the_papers_scoring_picks_the_text_of_lowest_perplexity(kind: str) -> None:
    """Prompt and choice as one text, per token; equal to a loop over single rows, and the other measures stay."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer(kind), bos_token="<s>")
    items = made_up_items(12, seed=2)
    model = pico_model(LLAMA, vocab_size=len(tokenizer))
    plain = evaluate_choices(model, pack_choices(items, tokenizer, block_size=32), LLAMA)
    blocks = pack_choices(items, tokenizer, block_size=32, scores_whole=True)
    score = evaluate_choices(model, blocks, LLAMA, batch_size=3)
    right = []
    for item in items:
        losses = []
        for choice in item.choices:
            ids = torch.tensor([tokenizer.encode(whole_text(item, choice))])
            with torch.inference_mode():
                losses.append(float(model(ids, labels=ids).loss))
        right.append(int(np.argmin(losses)) == item.answer)
    assert score.item_correct_perplexity == tuple(right)
    assert score.acc_perplexity == pytest.approx(np.mean(right))
    assert score.acc_perplexity_stderr == pytest.approx(np.std(right, ddof=1) / math.sqrt(12))
    assert score.measures == ("acc", "acc_norm", "acc_perplexity")
    assert score.item_margin == pytest.approx(plain.item_margin, rel=1e-9)
    assert (plain.acc_perplexity, plain.item_correct_perplexity, plain.measures) == (None, (), ("acc", "acc_norm"))


def test_what_needs_no_model_is_counted_from_the_questions() -> None:
    """The most frequent position, a guess, and what common words find; subjects go along."""
    values = [[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [-2.0, -1.0]]
    sizes = [[1] * len(each) for each in values]
    score = score_answers(values, [0, 2, 0], sizes, overlaps=[1.0, 0.0, 0.5], subjects=["law", "law", "art"], **PLAIN)
    assert score.majority == score.to_beat == pytest.approx(2 / 3)
    assert score.overlap == pytest.approx(0.5)
    assert score.overlap_stderr == pytest.approx(np.std([1, 0, 0.5], ddof=1) / math.sqrt(3))
    assert score.item_chance == pytest.approx((1 / 3, 1 / 3, 1 / 2))
    assert list(score.subjects()) == ["art", "law"]
    assert score.subjects()["law"].num_items == 2
    assert score.subjects()["law"].acc == 0.5
    assert score.subjects()["art"].acc_stderr == math.inf
