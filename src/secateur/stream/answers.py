"""What a model writes after prompts: how a prompt becomes tokens, how several run at once, and where an answer ends.

The model writes with its own probabilities alone: a checkpoint's defaults for sampling or penalties are put aside.
What is drawn, if anything, is the caller's affair.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.store.tokenizers import encode

Adjust = Callable[[int, int, Float[Tensor, " vocab"]], Float[Tensor, " vocab"]]
"""Given the place of a prompt, how many tokens were written after it, and the logits of the next one: what to take the
largest of instead."""

_PADDING_ID = 0
"""Stands where attention does not look: any id will do, and this one every vocabulary has."""


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool) -> tuple[str, list[int], int]:
    """Return the prompt as the model reads it, its tokens, and how many of them come before its text.

    What a tokenizer puts after a text, such as an EOS, is left out: an answer is to follow. A chat template writes its
    special tokens itself.
    """
    if chat:
        messages = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return text, encode(tokenizer, text), 0
    bare, full = encode(tokenizer, prompt), encode(tokenizer, prompt, add_special_tokens=True)
    starts = (start for start in range(len(full) - len(bare) + 1) if full[start : start + len(bare)] == bare)
    num_prefix = next(starts, 0)
    return prompt, full[: num_prefix + len(bare)], num_prefix


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the ids that end a text: those of the model's generation settings and the tokenizer's own."""
    configured = model.generation_config.eos_token_id
    ids = list(configured) if isinstance(configured, list | tuple) else [configured]
    return sorted({int(token) for token in (*ids, tokenizer.eos_token_id) if token is not None})


def write_answers(
    model: Any,
    prompts: Sequence[Sequence[int]],
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    adjust: Adjust | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and with the first that ends a text.

    In float64 prompts are not padded but run one by one: the mask's least number is infinite in the float32 in which
    some attention implementations take their softmax, and padding would come out as NaN.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        prompts: token ids of each, one batch; the shorter ones are padded on their left.
        ends: ids that end a text.
        max_new_tokens: most tokens of an answer.
        temperature: tokens are drawn at this temperature from torch's random numbers; 0 takes the likeliest.
        adjust: changes the logits before the largest is taken; with temperature 0.
    """
    weight = next(model.parameters())
    rows = [list(row) for row in prompts]
    parts = [[place] for place in range(len(rows))] if weight.dtype == torch.float64 else [list(range(len(rows)))]
    written: list[list[int]] = []
    model.eval()
    with torch.inference_mode(), _plain_generation(model, max_new_tokens, temperature, ends):
        for places in parts:
            ids, mask = _left_padded([rows[place] for place in places])
            changed = {"logits_processor": _processors(adjust, places, ids.shape[1])} if adjust else {}
            output = model.generate(input_ids=ids.to(weight.device), attention_mask=mask.to(weight.device), **changed)
            written += [_until_end(row, ends) for row in output[:, ids.shape[1] :].tolist()]
    return written


def decode_answer(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> tuple[str, bool]:
    """Return the text of an answer without special tokens, and whether the model ended it itself."""
    ended = bool(ids) and ids[-1] in ends
    text: str = tokenizer.decode(
        ids[:-1] if ended else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text, ended


def _processors(adjust: Adjust, places: Sequence[int], width: int) -> Any:
    """Return ``adjust`` in the form that transformers takes, for a batch of prompts ``width`` tokens wide."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Adjusted(LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            step = input_ids.shape[1] - width
            return torch.stack([adjust(place, step, row) for place, row in zip(places, scores, strict=True)])

    return LogitsProcessorList([Adjusted()])


def _left_padded(rows: Sequence[Sequence[int]]) -> tuple[Int64[Tensor, "batch seq"], Int64[Tensor, "batch seq"]]:
    """Return the rows as one tensor that they end together in, and where its real tokens are."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), _PADDING_ID)
    mask = torch.zeros((len(rows), width), dtype=torch.int64)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :] = torch.tensor(list(row))
        mask[place, width - len(row) :] = 1
    return ids, mask


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:stop]


@contextmanager
def _plain_generation(model: Any, max_new_tokens: int, temperature: float, ends: Sequence[int]) -> Iterator[None]:
    """Let the model generate without its own settings, which would add to those given; they come back at the end."""
    from transformers import GenerationConfig

    before = model.generation_config
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(ends) or None,
        pad_token_id=ends[0] if ends else _PADDING_ID,
        use_cache=True,
        **sampling,
    )
    try:
        yield
    finally:
        model.generation_config = before
