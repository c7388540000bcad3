"""Talking to a model on the terminal, to hear what is left of it: transformers for a folder, llama.cpp for a GGUF file.

transformers' own chat needs a server and its packages; this needs nothing more than what made the model. A model
without a chat template continues each text by itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from secateur.errors import ConfigError, ExportError
from secateur.export.llama_server import describe_gguf, running_server, stream_events

Message = dict[str, str]
_LLAMA_CONTEXT = 8192


class TooLongError(ConfigError):
    """A conversation that the model's context does not hold."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How to answer.

    Attributes:
        max_new_tokens: of one answer.
        temperature: 0 for the likeliest token each time; None for what the model's files say.
        system: prompt of that role; "" for none.
    """

    max_new_tokens: int = 512
    temperature: float | None = None
    system: str = ""


@runtime_checkable
class Talker(Protocol):
    """A model that answers; ``remembers`` says whether it reads earlier messages, or only the last one."""

    remembers: bool

    def answer(self, messages: Sequence[Message], write: Callable[[str], object]) -> str:
        """Hand the answer to ``write`` as it comes and return it whole.

        Raises:
            TooLongError: the messages do not fit.
        """


@contextmanager
def open_talker(model: Path, settings: Settings, *, device: str = "auto") -> Iterator[Talker]:
    """Load a model folder or a GGUF file to talk to.

    Raises:
        CheckpointError: the folder cannot be loaded.
        UnavailableError: llama.cpp is not installed.
        ConfigError: a system prompt for a model without a chat template.
    """
    if model.is_dir():
        yield _FolderTalker(model, settings, device)
        return
    context, with_template = describe_gguf(model)
    _check_system(settings, with_template)
    with running_server(model, context=min(context, _LLAMA_CONTEXT)) as address:
        yield _LlamaTalker(address, settings, with_template)


def converse(talker: Talker, settings: Settings, read: Callable[[], str], write: Callable[[str], object]) -> None:
    """Answer what ``read`` gives until it raises EOFError; the oldest messages go when the context is full."""
    history: list[Message] = []
    while True:
        try:
            said = read().strip()
        except EOFError:
            return
        if said:
            history.append({"role": "user", "content": said})
            history = _answered(talker, settings, history, write)


def reply(talker: Talker, settings: Settings, said: str, write: Callable[[str], object]) -> str:
    """Answer one message."""
    return talker.answer([*_system(settings), {"role": "user", "content": said}], write)


def _answered(
    talker: Talker, settings: Settings, history: list[Message], write: Callable[[str], object]
) -> list[Message]:
    """Return what to remember after one more answer."""
    while True:
        try:
            answer = talker.answer([*_system(settings), *history], write)
            write("\n")
            return [*history, {"role": "assistant", "content": answer}] if talker.remembers else []
        except TooLongError as error:
            if len(history) == 1:
                write(f"({error})\n")
                return []
            history = history[2:]


def _system(settings: Settings) -> list[Message]:
    return [{"role": "system", "content": settings.system}] if settings.system else []


def _check_system(settings: Settings, with_template: bool) -> None:
    if settings.system and not with_template:
        raise ConfigError("this model has no chat template, so it knows no system prompt. Leave --system out.")


class _FolderTalker:
    def __init__(self, folder: Path, settings: Settings, device: str) -> None:
        from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

        checkpoint = resolve_model(str(folder))
        self._tokenizer = load_tokenizer(checkpoint)
        self.remembers = self._tokenizer.chat_template is not None
        _check_system(settings, self.remembers)
        self._model = load_model(checkpoint, device=device)
        self._settings = settings
        self._context = int(getattr(self._model.config, "max_position_embeddings", 0) or 0)

    def answer(self, messages: Sequence[Message], write: Callable[[str], object]) -> str:
        import torch

        ids = self._encoded(messages)
        room = self._context - len(ids) if self._context else self._settings.max_new_tokens
        if room < 1:
            raise TooLongError(f"the text is {len(ids)} tokens long and the model reads {self._context}. Say less.")
        inputs = torch.tensor([ids], device=self._model.device)
        pieces: list[str] = []

        def take(piece: str) -> None:
            pieces.append(piece)
            write(piece)

        self._model.generate(
            input_ids=inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=self._generation(min(room, self._settings.max_new_tokens)),
            streamer=_streamer(self._tokenizer, take),
        )
        return "".join(pieces)

    def _encoded(self, messages: Sequence[Message]) -> list[int]:
        from jinja2.exceptions import TemplateError

        if not self.remembers:
            return list(self._tokenizer(messages[-1]["content"])["input_ids"])
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ConfigError(f"the model's chat template refuses: {error}. Leave --system out.") from None
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _generation(self, max_new_tokens: int) -> Any:
        config = copy.deepcopy(self._model.generation_config)
        config.max_length, config.max_new_tokens = None, max_new_tokens
        if config.pad_token_id is None:
            ends = config.eos_token_id
            config.pad_token_id = ends[0] if isinstance(ends, list) else ends
        if self._settings.temperature == 0:
            config.do_sample, config.temperature, config.top_p, config.top_k = False, None, None, None
        elif self._settings.temperature is not None:
            config.do_sample, config.temperature = True, self._settings.temperature
        return config


def _streamer(tokenizer: Any, write: Callable[[str], object]) -> Any:
    """Return a transformers streamer that hands on every piece of the answer."""
    from transformers import TextStreamer

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if text:
                write(text)

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


class _LlamaTalker:
    def __init__(self, address: str, settings: Settings, with_template: bool) -> None:
        self._address, self._settings = address, settings
        self.remembers = with_template

    def answer(self, messages: Sequence[Message], write: Callable[[str], object]) -> str:
        body: dict[str, Any] = {"max_tokens": self._settings.max_new_tokens}
        if self._settings.temperature is not None:
            body["temperature"] = self._settings.temperature
        path = "/v1/chat/completions" if self.remembers else "/v1/completions"
        body |= {"messages": list(messages)} if self.remembers else {"prompt": messages[-1]["content"]}
        pieces = []
        try:
            for event in stream_events(self._address, path, body):
                piece = _piece(event)
                pieces.append(piece)
                write(piece)
        except ExportError as error:
            if "context" in str(error) and not pieces:
                raise TooLongError(f"{error} Say less.") from None
            raise
        return "".join(pieces)


def _piece(event: dict[str, Any]) -> str:
    choice = (event.get("choices") or [{}])[0]
    delta = choice.get("delta", {})
    return choice.get("text") or delta.get("reasoning_content") or delta.get("content") or ""
