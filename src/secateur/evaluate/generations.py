"""A model's answers to prompts, greedy and sampled, so that two models' answers can be set side by side.

Sampled answers of two models are drawn with the same random numbers, so that they differ only where the models do:
each step takes the largest of logits / temperature plus a Gumbel number of the prompt, the step and the token, which
draws from softmax(logits / temperature) exactly. The numbers are tied to the dense model's token ids; in a smaller
vocabulary a token keeps the number of its dense id. Where another tokenizer cuts the text otherwise, steps no longer
stand at the same place of the text, and the answers share their numbers only until then.
Source of the coupling: C. Maddison, D. Tarlow and T. Minka, "A* sampling", 2014, arXiv 1411.0030, section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from secateur.errors import ConfigError, CorpusError
from secateur.progress import Progress, silent
from secateur.recipe import GenerationsSpec
from secateur.records.generations import DECODINGS, Answer, AnswerPair, Decoding, common_length
from secateur.stream.answers import Adjust, decode_answer, encode_prompt, end_ids, write_answers

BATCH_SIZE = 8
"""Prompts that are answered at once."""

Answers = dict[Decoding, list[Answer]]


def answer_prompts(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    spec: GenerationsSpec,
    *,
    num_tokens: int,
    keep: Int64[Tensor, " kept"] | None = None,
    progress: Progress = silent,
    label: str = "answer prompts",
) -> Answers:
    """Return what a model answers to the prompts, for each way of choosing tokens.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        prompts: to be answered.
        spec: lengths, temperature, seed, and whether the prompts go through the chat template.
        num_tokens: token ids of the dense model, to which the random numbers are tied.
        keep: dense id of each of the model's ids; None where they are the dense ones.
        progress: told about finished answers.
        label: of the task, for progress.
    """
    encoded = [encode_prompt(tokenizer, prompt, chat=spec.chat)[1] for prompt in prompts]
    ends = end_ids(model, tokenizer)
    found: Answers = {decoding: [] for decoding in DECODINGS}
    with progress(label, len(DECODINGS) * len(prompts), "answers") as task:
        for decoding, answers in found.items():
            for first in range(0, len(prompts), BATCH_SIZE):
                batch = slice(first, first + BATCH_SIZE)
                sampled = _sampling(prompts[batch], spec, num_tokens, keep) if decoding == "sampled" else None
                written = write_answers(model, encoded[batch], ends, max_new_tokens=spec.max_new_tokens, adjust=sampled)
                answers += [make_answer(tokenizer, ids, ends) for ids in written]
                task.advance(len(written))
    return found


def pair_answers(
    domain: str, tokenizer: Any, prompts: Sequence[str], spec: GenerationsSpec, dense: Answers, result: Answers
) -> list[AnswerPair]:
    """Return two models' answers to the same prompts, side by side; ``tokenizer`` is the dense model's."""
    texts = [encode_prompt(tokenizer, prompt, chat=spec.chat)[0] for prompt in prompts]
    return [
        AnswerPair(domain, text, decoding, dense[decoding][place], result[decoding][place])
        for place, text in enumerate(texts)
        for decoding in DECODINGS
    ]


def fitting_prompts(
    tokenizers: Sequence[Any], prompts: Sequence[str], spec: GenerationsSpec, most: int | None
) -> list[str]:
    """Return the prompts that leave room for an answer under every tokenizer.

    Args:
        tokenizers: of the models that are asked.
        prompts: to be looked at.
        spec: how they are asked.
        most: tokens that a prompt may have; None for any number.

    Raises:
        CorpusError: there is none.
    """
    lengths = [max(len(encode_prompt(one, prompt, chat=spec.chat)[1]) for one in tokenizers) for prompt in prompts]
    found = [prompt for prompt, n in zip(prompts, lengths, strict=True) if n and (most is None or n <= most)]
    if not found:
        raise CorpusError(
            f"none of the {len(prompts)} prompts can be answered: at most {most} tokens leave room for an answer, and "
            f"the shortest has {min(lengths, default=0)}. Lower evaluate.generations.max_new_tokens, or shorten "
            "evaluate.generations.prompt."
        )
    return found


def require_chat_template(tokenizer: Any, spec: GenerationsSpec) -> None:
    """Raise ConfigError if the prompts are to go through a chat template and the tokenizer has none."""
    if spec.chat and not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "evaluate.generations.chat is true, but the tokenizer has no chat template: the model is not a chat model. "
            "Set chat: false and write the prompt out, for example 'Question: {question}\\nAnswer:'."
        )


def make_answer(tokenizer: Any, ids: Sequence[int], ends: Sequence[int]) -> Answer:
    """Return an answer with the place where each token's text ends; a character ends with the last token of it."""
    text, ended = decode_answer(tokenizer, ids, ends)
    own = ids[:-1] if ended else ids
    token_ends: list[int] = []
    for number in range(1, len(own) + 1):
        start = decode_answer(tokenizer, own[:number], ())[0].rstrip("\ufffd")
        place = len(text) if number == len(own) else common_length(start, text)
        token_ends.append(max(place, token_ends[-1] if token_ends else 0))
    return Answer(text, tuple(token_ends), ended)


def gumbel_numbers(prompt: str, step: int, num_tokens: int, seed: int) -> Float64[Tensor, " tokens"]:
    """Return a standard Gumbel number per token id, the same wherever it is drawn for a prompt, step and seed."""
    named = hashlib.blake2b(f"{seed}\n{step}\n{prompt}".encode(errors="surrogatepass"), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(named, "big") >> 1)
    uniform = torch.rand(num_tokens, dtype=torch.float64, generator=generator)
    return -torch.log(-torch.log(uniform.clamp_min(torch.finfo(torch.float64).tiny)))


def _sampling(
    prompts: Sequence[str], spec: GenerationsSpec, num_tokens: int, keep: Int64[Tensor, " kept"] | None
) -> Adjust:
    """Return what makes the largest number a draw; ids that no token has are never drawn."""

    def adjust(place: int, step: int, logits: Float[Tensor, " vocab"]) -> Float[Tensor, " vocab"]:
        noise = gumbel_numbers(prompts[place], step, num_tokens, spec.seed)
        noise = noise if keep is None else noise[keep]
        drawn = torch.full(logits.shape, -torch.inf, dtype=torch.float64, device=logits.device)
        count = min(len(noise), len(logits))
        drawn[:count] = logits[:count].double() / spec.temperature + noise[:count].to(logits.device)
        return drawn

    return adjust
