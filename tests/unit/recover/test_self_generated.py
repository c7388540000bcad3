"""The dense model's answers: what it would write alone, kept line by line, the same after a run that was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from secateur.errors import ConfigError, CorpusError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.recipe import ResponsesSpec
from secateur.records.responses import Responses
from secateur.recover.self_generated import generate_responses
from tests.conftest import pico_model
from tests.pico import medical_records, pico_tokenizer

PROMPTS = ["Yes", *(f"{record['question']} Answer:" for record in medical_records(6, seed=5))]
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Puts no special token before a text."""
    return pico_tokenizer()


def model_for(tokenizer: Any, family: Family | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model that knows every token, and none as the end of a text."""
    model = pico_model(family or families()["llama"], dtype, vocab_size=len(tokenizer))
    model.generation_config.eos_token_id = None
    return model


class Answers:
    """Calls ``generate_responses`` with one model, counting the forward calls of generation."""

    def __init__(self, model: Any, tokenizer: Any, file: Path) -> None:
        self.model, self.tokenizer, self.file = model, tokenizer, file
        self.asked: list[int] = []
        generate = model.generate

        def counted(**inputs: Any) -> Any:
            self.asked.append(len(inputs["input_ids"]))
            return generate(**inputs)

        model.generate = counted

    def __call__(self, prompts: list[str] = PROMPTS, seed: int = 0, key: str = "model", **changes: Any) -> Responses:
        """Return the answers; ``changes`` are of the spec."""
        limit, enough = changes.pop("max_prompt_tokens", None), changes.pop("enough", None)
        spec = ResponsesSpec(**{"prompt": "{question}", "max_new_tokens": 6, "batch_size": 3, **changes})
        self.asked.clear()
        return generate_responses(
            self.model,
            self.tokenizer,
            prompts,
            spec,
            seed=seed,
            file=self.file,
            key=key,
            max_prompt_tokens=limit,
            enough=enough,
        )


@pytest.fixture
def answers(tokenizer: Any, tmp_path: Path) -> Answers:
    """A llama's answers, in a file that does not exist yet."""
    return Answers(model_for(tokenizer), tokenizer, tmp_path / "answers" / "responses.jsonl")


def greedy(model: Any, ids: list[int], count: int) -> list[int]:
    """Return the likeliest tokens one by one, without a cache, padding or company."""
    found = list(ids)
    with torch.no_grad():
        for _ in range(count):
            found.append(int(model(input_ids=torch.tensor([found]), use_cache=False).logits[0, -1].argmax()))
    return found[len(ids) :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_greedy_answers_are_those_of_each_prompt_alone(
    tokenizer: Any, family: Family, tmp_path: Path, dtype: torch.dtype
) -> None:
    """In every family and at every batch size: left padding and the cache change no token."""
    model = model_for(tokenizer, family, dtype)
    tokenizer_eos, tokenizer.eos_token = tokenizer.eos_token, None
    try:
        found = [
            Answers(model, tokenizer, tmp_path / f"{size}.jsonl")(PROMPTS[:4], batch_size=size).responses
            for size in (1, 3, 4)
        ]
    finally:
        tokenizer.eos_token = tokenizer_eos
    assert found[0] == found[1] == found[2]
    for prompt, response in zip(PROMPTS, found[0], strict=False):
        ids = tokenizer(prompt)["input_ids"]
        assert response.prompt_ids == tuple(ids)
        assert list(response.response_ids) == greedy(model, ids, 6)
        assert not response.ended


def test_an_answer_stops_at_the_end_of_text_and_keeps_it(answers: Answers) -> None:
    """Whatever follows is gone; the first of several ids that end a text counts, and it is learned too."""
    whole = answers(key="no end")
    ends = [whole.responses[0].response_ids[3], whole.responses[4].response_ids[4]]
    answers.model.generation_config.eos_token_id = ends
    cut = answers(key="ends")
    assert cut.num_unended == sum(not set(ends) & set(r.response_ids) for r in whole.responses) < len(PROMPTS)
    by_index = {response.index: response for response in cut.responses}
    for response in whole.responses:
        places = [place for place, token in enumerate(response.response_ids) if token in ends]
        stop = places[0] + 1 if places else 6
        if response.index in by_index:
            found = by_index[response.index]
            assert found.response_ids == response.response_ids[:stop]
            assert found.ended == bool(places)
            text = answers.tokenizer.decode(
                found.response_ids[: stop - 1 if places else stop], skip_special_tokens=True
            )
            assert found.text == text


def test_empty_answers_are_dropped_and_counted(answers: Answers) -> None:
    """An answer that is only the end of a text says nothing; nothing but those is an error."""
    whole = answers(key="no end")
    first = whole.responses[0].response_ids[0]
    answers.model.generation_config.eos_token_id = first
    empty = [r.index for r in whole.responses if r.response_ids[0] == first]
    found = answers(key="ends")
    assert found.num_empty == len(empty)
    assert [r.index for r in found.responses] == [i for i in range(len(PROMPTS)) if i not in empty]
    with pytest.raises(CorpusError, match=r"answers nothing to any of 1 prompts.*chat: true"):
        answers(PROMPTS[:1], key="ends")


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_killed_run_goes_on_where_it_stopped(answers: Answers, temperature: float) -> None:
    """Cut anywhere, the file and the answers come out the same, and only what is missing is asked again."""
    whole = answers(temperature=temperature)
    assert answers.asked == [3, 3, 1]
    content = answers.file.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    assert len(ends) == 1 + len(PROMPTS)
    for cut in (0, 10, ends[0], ends[0] + 5, ends[2], ends[3], ends[4] - 1, ends[6] + 20, len(content)):
        answers.file.write_bytes(content[:cut])
        assert answers(temperature=temperature) == whole
        assert answers.file.read_bytes() == content
        complete = sum(end <= cut for end in ends[1:])
        assert answers.asked == [size for first, size in ((0, 3), (3, 3), (6, 1)) if complete < first + size]


def test_a_broken_line_and_what_follows_it_are_made_again(answers: Answers) -> None:
    whole = answers()
    content = answers.file.read_bytes()
    lines = content.splitlines(keepends=True)
    for broken in (b'{"index": 1}\n', b"[1, 2]\n", b"\xff\n"):
        answers.file.write_bytes(b"".join([*lines[:4], broken, *lines[5:]]))
        assert answers() == whole
        assert answers.file.read_bytes() == content
        assert answers.asked == [3, 1]


def test_answers_to_something_else_are_not_used(answers: Answers) -> None:
    """Another model, seed, wording or spec starts the file again."""
    answers()
    answers()
    assert not answers.asked
    changed: list[dict[str, Any]] = [{"key": "other"}, {"seed": 1}, {"prompts": PROMPTS[::-1]}, {"max_new_tokens": 5}]
    for change in changed:
        answers(**change)
        assert answers.asked == [3, 3, 1], change


def test_drawn_answers_depend_on_the_seed_alone(answers: Answers) -> None:
    """The process's own random numbers are neither used nor moved."""
    state = torch.random.get_rng_state()
    first = answers(temperature=1.0)
    torch.rand(5)
    torch.random.set_rng_state(state)
    answers.file.unlink()
    torch.rand(3)
    moved = torch.random.get_rng_state()
    assert answers(temperature=1.0) == first
    assert torch.equal(torch.random.get_rng_state(), moved)
    assert answers(temperature=1.0, seed=1) != first
    assert answers(temperature=0.0) != first


def test_the_checkpoints_own_generation_settings_are_put_aside_and_come_back(answers: Answers) -> None:
    """Penalties and top-k would make the answers another model's."""
    plain = answers()
    settings = answers.model.generation_config
    settings.repetition_penalty, settings.do_sample, settings.top_k, settings.min_new_tokens = 9.0, True, 3, 4
    answers.file.unlink()
    assert answers() == plain
    assert answers.model.generation_config is settings and settings.repetition_penalty == 9.0


def test_a_low_temperature_draws_the_likeliest_token(answers: Answers) -> None:
    drawn = answers(temperature=1e-6)
    assert [r.response_ids for r in drawn.responses] == [r.response_ids for r in answers().responses]


def test_long_prompts_are_not_asked(answers: Answers) -> None:
    lengths = [len(answers.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    limit = sorted(lengths)[3]
    found = answers(max_prompt_tokens=limit)
    assert found.num_too_long == sum(length > limit for length in lengths) > 0
    assert [r.index for r in found.responses] == [i for i, length in enumerate(lengths) if length <= limit]
    with pytest.raises(CorpusError, match=r"none of the 7 prompts .* at most 0 tokens fit, and the shortest has"):
        answers(max_prompt_tokens=0)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_no_more_is_asked_than_is_enough_and_more_later_goes_on(answers: Answers, temperature: float) -> None:
    """Batches are answered until their prompts and answers have the tokens; asking all after that repeats nothing."""
    whole = answers(temperature=temperature)
    sizes = [len(r.prompt_ids) + len(r.response_ids) for r in whole.responses]
    answers.file.unlink()
    for enough, batches in ((1, 1), (sum(sizes[:3]), 1), (sum(sizes[:3]) + 1, 2), (10**6, 3)):
        found = answers(temperature=temperature, enough=enough)
        assert found.responses == whole.responses[: 3 * batches]
        assert found.counts()["prompts"] == len(found.responses)
    assert len(answers.asked) == 1  # the last batch alone
    few = answers(temperature=temperature, enough=1)
    assert few.responses == whole.responses[:3] and not answers.asked


def test_prompts_that_are_too_long_count_as_far_as_was_asked(answers: Answers) -> None:
    """What comes after the last prompt that was needed is not counted."""
    lengths = [len(answers.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    limit = sorted(lengths)[3]
    asked = [place for place, length in enumerate(lengths) if length <= limit]
    found = answers(max_prompt_tokens=limit, enough=1, batch_size=2)
    assert [r.index for r in found.responses] == asked[:2]
    assert found.num_too_long == asked[1] - 1


def test_a_bos_is_put_before_the_prompt_and_no_eos_after_it(tmp_path: Path) -> None:
    """As the tokenizer puts it before a text; an end of text there would end the answer before it began."""
    tokenizer = pico_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (response,) = Answers(model_for(tokenizer), tokenizer, tmp_path / "a.jsonl")(PROMPTS[1:2]).responses
    assert response.prompt_ids == (1, *tokenizer(PROMPTS[1], add_special_tokens=False)["input_ids"])
    assert (response.num_prefix, response.prompt) == (1, PROMPTS[1])


def test_a_chat_template_wraps_the_prompt(tmp_path: Path) -> None:
    """The model reads exactly what the template writes, special tokens as such."""
    tokenizer = pico_tokenizer()
    answers = Answers(model_for(tokenizer), tokenizer, tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match="chat is true, but the tokenizer has no chat template"):
        answers(chat=True)
    tokenizer.chat_template = CHAT
    response = answers(["Why?"], chat=True).responses[0]
    assert response.prompt == "<s>user: Why?\nassistant:"
    assert response.prompt_ids == tuple(tokenizer(response.prompt, add_special_tokens=False)["input_ids"])
    assert response.prompt_ids[0] == 1 and response.num_prefix == 0
