"""Answers to prompts: what is drawn, what two models share of it, and where tokens end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.errors import ConfigError, CorpusError
from secateur.evaluate.generations import (
    BATCH_SIZE,
    _sampling,
    answer_prompts,
    fitting_prompts,
    gumbel_numbers,
    make_answer,
    pair_answers,
    require_chat_template,
)
from secateur.families.loader import families
from secateur.recipe import GenerationsSpec
from tests.conftest import pico_model
from tests.pico import medical_records, pico_tokenizer

PROMPTS = [f"{record['question']} Answer:" for record in medical_records(BATCH_SIZE + 1, seed=5)]
SPEC = GenerationsSpec(max_new_tokens=6)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Puts no special token before a text."""
    return pico_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> Any:
    """A llama that knows every token, and none as the end of a text."""
    found = pico_model(families()["llama"], torch.float32, vocab_size=len(tokenizer))
    found.generation_config.eos_token_id = None
    return found


def test_tokens_are_drawn_from_the_softmax() -> None:
    """The largest of logits / temperature plus noise comes as often as softmax says, to five standard errors."""
    logits, spec = torch.tensor([1.0, 0.0, -0.5, 2.0]), GenerationsSpec(temperature=0.7)
    adjust = _sampling(["a prompt"], spec, len(logits), None)
    draws = torch.stack([adjust(0, step, logits) for step in range(4000)]).argmax(dim=1)
    found = torch.bincount(draws, minlength=4) / len(draws)
    expected = (logits.double() / 0.7).softmax(dim=0)
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / len(draws)).sqrt()).all()


def test_a_smaller_vocabulary_keeps_its_noise() -> None:
    """Wherever the whole vocabulary's draw was kept, the smaller one draws the same token; no other id is drawn."""
    keep = torch.tensor([1, 2, 5, 7, 8])
    whole, smaller = _sampling(["p"], SPEC, 10, None), _sampling(["p"], SPEC, 10, keep)
    same = 0
    for step in range(200):
        logits = torch.randn(10, generator=torch.Generator().manual_seed(step))
        drawn = int(whole(0, step, logits).argmax())
        mine = int(smaller(0, step, torch.cat([logits[keep], torch.tensor([99.0])])).argmax())
        assert mine < len(keep)
        if drawn in keep:
            assert int(keep[mine]) == drawn
            same += 1
    assert same > 50


def test_noise_is_of_the_prompt_the_step_and_the_seed() -> None:
    """Equal names give equal numbers, and another prompt, step or seed gives others."""
    first = gumbel_numbers("p", 0, 1000, 0)
    assert torch.equal(first, gumbel_numbers("p", 0, 1000, 0))
    assert first.isfinite().all()
    others = [gumbel_numbers("q", 0, 1000, 0), gumbel_numbers("p", 1, 1000, 0), gumbel_numbers("p", 0, 1000, 1)]
    assert all(abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 0.15 for other in others)


def test_equal_models_give_equal_answers(model: Any, tokenizer: Any) -> None:
    """Asked twice, also beside other prompts, a model says the same, greedy and sampled; and sampled is not greedy."""
    asked = [answer_prompts(model, tokenizer, PROMPTS, SPEC, num_tokens=len(tokenizer)) for _ in range(2)]
    pairs = pair_answers("medical", tokenizer, PROMPTS, SPEC, *asked)
    assert [pair.decoding for pair in pairs[:2]] == ["greedy", "sampled"]
    assert [pair.prompt for pair in pairs[::2]] == PROMPTS
    assert all(pair.is_equal and 0 < pair.dense.num_tokens <= 6 for pair in pairs)
    assert any(pairs[2 * n].dense.text != pairs[2 * n + 1].dense.text for n in range(len(PROMPTS)))
    alone = answer_prompts(model, tokenizer, PROMPTS[-1:], SPEC, num_tokens=len(tokenizer))
    assert alone == {name: answers[-1:] for name, answers in asked[0].items()}


def test_greedy_answers_are_the_likeliest_tokens(model: Any, tokenizer: Any) -> None:
    """Without cache, padding or company the likeliest tokens write the same text."""
    answers = answer_prompts(model, tokenizer, PROMPTS[:3], SPEC, num_tokens=len(tokenizer))["greedy"]
    for prompt, found in zip(PROMPTS, answers, strict=False):
        ids = tokenizer(prompt)["input_ids"]
        for _ in range(SPEC.max_new_tokens):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        assert found.text == tokenizer.decode(ids[-SPEC.max_new_tokens :], skip_special_tokens=True)


def test_tokens_end_where_their_text_does(tokenizer: Any) -> None:
    """Ends rise to the length of the text, part of a character ends with the whole, and the last end is not counted."""
    ids = tokenizer("received Łódź")["input_ids"]
    found = make_answer(tokenizer, [*ids, 0], [0])
    assert (found.text, found.ended, found.num_tokens) == ("received Łódź", True, len(ids))
    assert list(found.token_ends) == sorted(found.token_ends)
    assert found.token_ends[-1] == len(found.text)
    parted = [found.parts(place)[1] for place in range(len(found.text))]
    assert not any("\ufffd" in token for token in parted)
    cut = make_answer(tokenizer, ids[:-1], [0])
    assert not cut.ended
    assert cut.token_ends[-1] == len(cut.text)


def test_prompts_without_room_are_left_out(tokenizer: Any) -> None:
    """A prompt must fit under every tokenizer; where none does, the message says how long the shortest is."""
    short, long = "The patient", " ".join(PROMPTS)
    assert fitting_prompts([tokenizer], [long, short], SPEC, 20) == [short]
    assert fitting_prompts([tokenizer], [long, short], SPEC, None) == [long, short]
    with pytest.raises(CorpusError, match=r"none of the 1 prompts.*at most 20 tokens.*max_new_tokens"):
        fitting_prompts([tokenizer], [long], SPEC, 20)


def test_a_chat_needs_a_template(tokenizer: Any) -> None:
    require_chat_template(tokenizer, SPEC)
    with pytest.raises(ConfigError, match=r"evaluate.generations.chat is true, but .* no chat template"):
        require_chat_template(tokenizer, GenerationsSpec(chat=True))
