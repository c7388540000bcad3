"""Talking to a model: the same words as from generating by hand, a memory that fits the context, and plain refusals."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.errors import CheckpointError, ConfigError, ExportError, UnavailableError
from secateur.export.chat import Message, Settings, TooLongError, converse, open_talker, reply
from secateur.export.gguf import export_gguf
from tests.pico import save_model_folder

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ '<s>' + message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant: ' }}{% endif %}"
)
GREEDY = Settings(max_new_tokens=8, temperature=0.0)
needs_llama_cpp = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def save(folder: Path, template: str = "") -> Path:
    """Save a model that llama.cpp can express, with a chat template or without."""
    save_model_folder(folder, head_dim=16, num_attention_heads=4, num_key_value_heads=2)
    if template:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a chat template; nobody changes it."""
    return save(tmp_path_factory.mktemp("chat") / "base")


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with one."""
    return save(tmp_path_factory.mktemp("chat") / "instruct", TEMPLATE)


def by_hand(folder: Path, text: str) -> str:
    """Return what greedy decoding adds to a text, token by token, without generate or a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    start = len(ids)
    while len(ids) < start + GREEDY.max_new_tokens and ids[-1] != tokenizer.eos_token_id:
        with torch.inference_mode():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    answer: str = tokenizer.decode(ids[start:], skip_special_tokens=True)
    return answer


def said(*texts: str) -> Callable[[], str]:
    """Return what gives these texts, one a call, and then ends."""
    left = list(texts)

    def read() -> str:
        if not left:
            raise EOFError
        return left.pop(0)

    return read


def test_a_base_model_continues_the_text(base: Path) -> None:
    """Greedily, with the very words that decoding by hand gives; in pieces that add up."""
    pieces: list[str] = []
    with open_talker(base, GREEDY, device="cpu") as talker:
        assert not talker.remembers
        assert reply(talker, GREEDY, "The patient", pieces.append) == "".join(pieces) == by_hand(base, "The patient")


def test_a_chat_model_reads_its_template(instruct: Path) -> None:
    """And earlier messages with it."""
    with open_talker(instruct, GREEDY, device="cpu") as talker:
        assert talker.remembers
        first = reply(talker, GREEDY, "Hello", lambda _: None)
        assert first == by_hand(instruct, "<s>user: Hello</s><s>assistant: ")
        out: list[str] = []
        converse(talker, GREEDY, said("Hello", "  ", "Again"), out.append)
    second = by_hand(instruct, f"<s>user: Hello</s><s>assistant: {first}</s><s>user: Again</s><s>assistant: ")
    assert "".join(out) == f"{first}\n{second}\n", "blank lines are passed over"


@needs_llama_cpp
@pytest.mark.parametrize("kind", ["base", "instruct"])
def test_llama_cpp_says_the_same(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The GGUF file of the same model answers in the same words, with its template and without one."""
    folder = request.getfixturevalue(kind)
    file = export_gguf(folder, tmp_path / "model.gguf", quantize="F32").file
    with open_talker(folder, GREEDY, device="cpu") as talker:
        expected = reply(talker, GREEDY, "The patient", lambda _: None)
    pieces: list[str] = []
    with open_talker(file, GREEDY) as talker:
        assert talker.remembers is (kind == "instruct")
        assert reply(talker, GREEDY, "The patient", pieces.append) == "".join(pieces) == expected
        with pytest.raises(TooLongError, match="Say less"):
            reply(talker, GREEDY, "The patient " * 300, lambda _: None)


@needs_llama_cpp
def test_a_broken_file_is_said_to_be_broken(base: Path, tmp_path: Path) -> None:
    """In one line, whether our reader or llama.cpp finds it."""
    file = export_gguf(base, tmp_path / "model.gguf", quantize="F16").file
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError) as caught, open_talker(file, GREEDY):
        pass
    assert "model.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_without_llama_cpp_it_says_how_to_get_it(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the program nor the package."""
    file = export_gguf(base, tmp_path / "model.gguf", quantize="F16").file
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "xllamacpp" else found(name, *a))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"no llama-server on PATH, and no xllamacpp\. Run: pip install"):
        with open_talker(file, GREEDY):
            pass


def test_a_system_prompt_needs_a_template_that_knows_it(base: Path, instruct: Path) -> None:
    """Otherwise it would be left out without a word."""
    settings = Settings(max_new_tokens=2, temperature=0.0, system="Be kind.")
    with pytest.raises(ConfigError, match=r"no chat template.*Leave --system out"), open_talker(base, settings):
        pass
    with open_talker(instruct, settings, device="cpu") as talker:
        with pytest.raises(ConfigError, match="chat template refuses: no system role"):
            reply(talker, settings, "Hello", lambda _: None)


def test_an_answer_ends_where_the_context_does(base: Path) -> None:
    """A long text gets a short answer; one that fills the context is refused with both numbers."""
    settings = Settings(max_new_tokens=1000, temperature=0.0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    with open_talker(base, settings, device="cpu") as talker:
        text = "The patient " * 40
        answer = reply(talker, settings, text, lambda _: None)
        room = 256 - len(tokenizer(text)["input_ids"])
        assert len(tokenizer(answer)["input_ids"]) <= room + 8, "a broken character may take more tokens to write"
        with pytest.raises(TooLongError, match=r"the text is \d+ tokens long and the model reads 256"):
            reply(talker, settings, "The patient " * 300, lambda _: None)


class Short:
    """A model whose context holds three messages, the system prompt included."""

    remembers = True

    def __init__(self) -> None:
        self.seen: list[list[str]] = []

    def answer(self, messages: Sequence[Message], write: Callable[[str], object]) -> str:
        """Answer with a number."""
        if len(messages) > 3 or "long" in messages[-1]["content"]:
            raise TooLongError("too long.")
        self.seen.append([message["content"] for message in messages])
        write(f"<{len(self.seen)}>")
        return f"<{len(self.seen)}>"


def test_the_oldest_messages_are_forgotten_first() -> None:
    """In pairs, so that roles still alternate; the system prompt stays; what never fits is said to and forgotten."""
    talker, out = Short(), list[str]()
    converse(talker, Settings(system="S"), said("a", "long", "b", "c"), out.append)
    assert talker.seen == [["S", "a"], ["S", "b"], ["S", "c"]]
    assert "".join(out) == "<1>\n(too long.)\n<2>\n<3>\n"
    talker = Short()
    converse(talker, Settings(), said("a", "b", "c"), out.append)
    assert talker.seen == [["a"], ["a", "<1>", "b"], ["b", "<2>", "c"]]


def test_temperature_decides_how_is_drawn(base: Path) -> None:
    """Zero overrules a model's own sampling; a high one does not give the same words twice; none asks the model."""
    file = base / "generation_config.json"
    before = file.read_text()
    data: dict[str, Any] = json.loads(before)
    file.write_text(json.dumps({**data, "do_sample": True, "temperature": 50.0, "top_p": 0.99, "top_k": 400}))
    try:
        answers = {}
        for name, temperature in (("zero", 0.0), ("high", 60.0), ("own", None)):
            settings = Settings(max_new_tokens=8, temperature=temperature)
            with open_talker(base, settings, device="cpu") as talker:
                answers[name] = {reply(talker, settings, "The patient", lambda _: None) for _ in range(3)}
        assert answers["zero"] == {by_hand(base, "The patient")}
        assert len(answers["high"]) > 1 and len(answers["own"]) > 1
    finally:
        file.write_text(before)


def test_a_folder_that_does_not_load_is_refused(tmp_path: Path) -> None:
    """As everywhere else."""
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"), open_talker(tmp_path, GREEDY):
        pass
