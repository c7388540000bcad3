"""The dense model's own answers to the domain's prompts, to train or to calibrate on; no packing, no training.

What the dense model writes itself is text that it finds likely, so that learning it moves the pruned model back to
where it came from instead of elsewhere, and calibrating on it asks what the model needs when it answers itself.
Source: Z. Yang et al., "Self-distillation bridges distribution gap in language model fine-tuning", 2024, arXiv
2402.13669. Where we differ: there the model rewrites given answers; here it answers the prompts alone.

Answers go to a file of JSON lines, one per prompt, as soon as their batch is done, so that a killed run goes on where
it stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from secateur.errors import ConfigError, CorpusError
from secateur.progress import Progress, silent
from secateur.recipe import ResponsesSpec
from secateur.records.responses import Response, Responses
from secateur.store.artifacts import digest
from secateur.stream.answers import decode_answer, encode_prompt, end_ids, write_answers

FORMAT_VERSION = 1
"""Of the file; another one makes an older file start again."""

WHERE = "recover.responses"
"""The recipe's key for what is trained on, for messages."""


def generate_responses(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    spec: ResponsesSpec,
    *,
    seed: int,
    file: Path,
    key: str,
    max_prompt_tokens: int | None = None,
    enough: int | None = None,
    where: str = WHERE,
    progress: Progress = silent,
) -> Responses:
    """Return what ``model`` answers to the prompts, from ``file`` as far as that has them.

    Temperature 0 takes the likeliest token each time. Otherwise tokens are drawn from the model's own probabilities at
    that temperature: the checkpoint's defaults for top-k, top-p or penalties are put aside. Draws depend on the seed
    and on which prompts are in a batch, not on where an earlier run stopped.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        prompts: in an order that is the same in every run.
        spec: lengths, temperature, batch size, and whether the prompts go through the chat template.
        seed: of the draws.
        file: the JSON lines; written while the answers come. One that was made otherwise is replaced.
        key: what identifies the model and the prompts' source; prompts, spec and seed are looked at here.
        max_prompt_tokens: longer prompts are passed over, such as those that leave no room in a block, or none for the
            answer in a model with learned positions; None asks all.
        enough: no further batch is asked once the prompts that were answered and their answers have so many tokens;
            None asks all. Asking for more later goes on from there.
        where: the recipe's key for the spec, for messages.
        progress: told about finished prompts, or about tokens where so many are enough.

    Raises:
        ConfigError: a chat template is asked for and the tokenizer has none.
        CorpusError: no prompt is short enough, or the model answers nothing to any.
    """
    require_chat_template(tokenizer, spec, where)
    asked = [_Asked(index, *encode_prompt(tokenizer, prompt, chat=spec.chat)) for index, prompt in enumerate(prompts)]
    fitting = [a for a in asked if a.ids and (max_prompt_tokens is None or len(a.ids) <= max_prompt_tokens)]
    if not fitting:
        shortest = min((len(a.ids) for a in asked), default=0)
        raise CorpusError(
            f"none of the {len(prompts)} prompts can be asked: at most {max_prompt_tokens} tokens fit, and the "
            f"shortest has {shortest}. Raise calibrate.block_size, or shorten {where}.prompt."
        )
    header = {
        "version": FORMAT_VERSION,
        "key": digest(key, [a.ids for a in asked], spec.model_dump(), seed, max_prompt_tokens),
    }
    found = {response.index: response for response in _resume(file, header)}
    ends = end_ids(model, tokenizer)
    taken: list[Response] = []
    num_tokens = 0
    total, unit = (len(fitting), "prompts") if enough is None else (enough, "tokens")
    with progress("answer prompts", total, unit) as task, file.open("a", encoding="utf-8") as lines:
        for first in range(0, len(fitting), spec.batch_size):
            if enough is not None and num_tokens >= enough:
                break
            batch = fitting[first : first + spec.batch_size]
            missing = [a for a in batch if a.index not in found]
            if missing:
                with _drawing((seed + first) % 2**63, next(model.parameters()).device):
                    written = write_answers(
                        model,
                        [a.ids for a in batch],
                        ends,
                        max_new_tokens=spec.max_new_tokens,
                        temperature=spec.temperature,
                    )
                for a, ids in zip(batch, written, strict=True):
                    if a.index not in found:
                        found[a.index] = response = _response(a, ids, ends, tokenizer)
                        _write_line(lines, response.to_dict())
            answers = [found[a.index] for a in batch]
            more_tokens = sum(_num_tokens(answer) for answer in answers)
            taken, num_tokens = taken + answers, num_tokens + more_tokens
            task.advance(len(answers) if enough is None else more_tokens)
    return _answered(taken, len(asked) if len(taken) == len(fitting) else taken[-1].index + 1, where)


def _answered(taken: Sequence[Response], num_prompts: int, where: str) -> Responses:
    """Return the answers that say something, and what became of the other prompts."""
    answered = tuple(response for response in taken if not response.is_empty)
    if not answered:
        raise CorpusError(
            f"the model answers nothing to any of {len(taken)} prompts. Check {where}.prompt: it should end where the "
            "answer begins; for a chat model set chat: true."
        )
    return Responses(
        responses=answered,
        num_empty=len(taken) - len(answered),
        num_too_long=num_prompts - len(taken),
        num_unended=sum(not response.ended for response in answered),
    )


def _num_tokens(response: Response) -> int:
    """Return the tokens of a prompt and its answer; none where that is empty, because nothing is made of it then."""
    return 0 if response.is_empty else len(response.prompt_ids) + len(response.response_ids)


def require_chat_template(tokenizer: Any, spec: ResponsesSpec, where: str = WHERE) -> None:
    """Raise ConfigError if the prompts are to go through a chat template and the tokenizer has none."""
    if spec.chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            f"{where}.chat is true, but the tokenizer has no chat template: the model is not a chat model. "
            "Set chat: false and write the prompt out, for example 'Question: {question}\\nAnswer:'."
        )


class _Asked:
    """A prompt in tokens."""

    def __init__(self, index: int, text: str, ids: list[int], num_prefix: int) -> None:
        self.index = index
        self.text = text
        self.ids = ids
        self.num_prefix = num_prefix


@contextmanager
def _drawing(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from a seed, and leave the process's own random numbers as they were."""
    devices = [device] if device.type not in ("cpu", "mps") else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed)
        yield


def _response(asked: _Asked, ids: Sequence[int], ends: Collection[int], tokenizer: Any) -> Response:
    text, ended = decode_answer(tokenizer, ids, ends)
    return Response(
        index=asked.index,
        prompt=asked.text,
        text=text,
        prompt_ids=tuple(asked.ids),
        response_ids=tuple(ids),
        num_prefix=asked.num_prefix,
        ended=ended,
    )


def _resume(file: Path, header: dict[str, Any]) -> list[Response]:
    """Return the answers that are whole in the file, and cut it after them; start it where it has another header."""
    whole = _whole_lines(file)
    responses: list[Response] = []
    size = 0
    if whole and _parsed(whole[0]) == header:
        size = len(whole[0])
        for line in whole[1:]:
            try:
                responses.append(Response.from_dict(_parsed(line) or {}))
            except (KeyError, TypeError, ValueError):
                break
            size += len(line)
    if size:
        os.truncate(file, size)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(header) + "\n", encoding="utf-8")
    return responses


def _whole_lines(file: Path) -> list[bytes]:
    """Return the lines that were written to their end, ends included."""
    if not file.is_file():
        return []
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        data = json.loads(line)
    except ValueError:
        return None
    return data if isinstance(data, dict) else None


def _write_line(lines: IO[str], data: dict[str, Any]) -> None:
    lines.write(json.dumps(data) + "\n")
    lines.flush()
