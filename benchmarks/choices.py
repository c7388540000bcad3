"""How fast are multiple-choice questions scored, beside a plain forward pass over the same texts?

    python benchmarks/choices.py MODEL QUESTIONS [--prompt TEMPLATE] [--style letter] [--items 60] [--perplexity]

The plain pass reads every prompt with every choice as a row of its own, longest first, padded, and computes all logits;
nothing is scored. Tokens are those of these rows, padding not counted, for both. Passes take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from secateur.corpus.choices import ChoiceItem, pack_choices, read_choices
from secateur.evaluate import evaluate_choices
from secateur.recipe import ChoicesSpec
from secateur.store.checkpoints import load_model, load_tokenizer, resolve_model

ROWS, BLOCK_SIZE, BLOCKS = 16, 512, 4


def plain_pass(model: Any, tokenizer: Any, items: list[ChoiceItem]) -> tuple[Callable[[], object], int]:
    """Return a padded pass over every prompt with every choice, and its tokens."""
    texts = [f"{item.prompt} {choice}" for item in items for choice in item.choices]
    rows = sorted((tokenizer(text)["input_ids"] for text in texts), key=len, reverse=True)

    def run() -> None:
        with torch.inference_mode():
            for first in range(0, len(rows), ROWS):
                batch = rows[first : first + ROWS]
                width = len(batch[0])
                ids = torch.tensor([row + [0] * (width - len(row)) for row in batch], device=model.device)
                mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch], device=model.device)
                logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
                float(logits[0, 0, 0])

    return run, sum(map(len, rows))


def main() -> None:
    """Print tokens/s of each pass, and the median of their ratios to the plain one within a round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("questions")
    parser.add_argument("--prompt")
    parser.add_argument("--style", default="text")
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--perplexity", action="store_true")
    parser.add_argument("--dtype", default="float32")
    given = parser.parse_args()
    checkpoint = resolve_model(given.model)
    tokenizer = load_tokenizer(checkpoint)
    model = load_model(checkpoint, dtype=given.dtype)
    family = checkpoint.geometry.family
    items = read_choices(
        ChoicesSpec(path=given.questions, prompt=given.prompt, style=given.style, max_items=given.items)
    )
    plain, num_tokens = plain_pass(model, tokenizer, items)
    passes: dict[str, Callable[[], object]] = {"plain": plain}
    ways: dict[str, dict[str, Any]] = {
        "shared prompts": {},
        "prompts not shared": {"shares_prompts": False},
        **({"with perplexity": {"scores_whole": True}} if given.perplexity else {}),
    }
    for name, options in ways.items():
        blocks = pack_choices(items, tokenizer, block_size=BLOCK_SIZE, **options)
        print(f"{name}: {blocks.num_tokens:,} tokens in {blocks.num_blocks} blocks of {blocks.block_size}")
        passes[name] = partial(evaluate_choices, model, blocks, family, batch_size=BLOCKS)
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(given.rounds + 1):
        for name, run in passes.items():
            started = time.perf_counter()
            run()
            if turn:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
    for name, found in seconds.items():
        ratios = [one / other for one, other in zip(seconds["plain"], found, strict=True)]
        speed = num_tokens / statistics.median(found)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        print(f"{name}: {speed:,.0f} tokens/s; {statistics.median(ratios):.2f} x plain ({spread})")


if __name__ == "__main__":
    main()
