"""The demo model's own tokenizer, made smaller: slow, and its model is fetched on first use."""

from __future__ import annotations

import random

import pytest

from secateur.corpus import read_documents
from secateur.demo import demo_recipe, prepare
from secateur.store.checkpoints import load_tokenizer, resolve_model
from secateur.store.tokenizers import (
    check_smaller_tokenizer,
    encode,
    smaller_tokenizer,
    template_texts,
    token_ids,
    tokenizer_data,
)
from secateur.vocabulary import read_tokenizer


def random_text(draw: random.Random) -> str:
    """Return a string of up to 40 characters of any plane but the surrogates."""
    points = (draw.choice([draw.randrange(0x80), draw.randrange(0x3000), draw.randrange(0xE000, 0x110000)])
              for _ in range(draw.randrange(1, 40)))  # fmt: skip
    return "".join(map(chr, points))


@pytest.mark.slow
@pytest.mark.network
def test_the_demo_models_tokenizer_reads_and_writes_as_before() -> None:
    """3,000 random strings come back as before; medical text has the same tokens, a chat the same template."""
    recipe = demo_recipe(prepare(), "runs/unused")
    tokenizer = load_tokenizer(resolve_model(recipe.model))
    graph = read_tokenizer(tokenizer_data(tokenizer))
    texts = list(read_documents(recipe.domain["medical"]))[:500]
    used = token_ids(tokenizer, texts) | token_ids(tokenizer, template_texts(tokenizer))
    keep = sorted(graph.closed(used | graph.alphabet | graph.added))
    smaller = smaller_tokenizer(tokenizer, keep)
    assert len(smaller) == len(keep) < len(tokenizer) / 4
    draw = random.Random(0)
    probes = [random_text(draw) for _ in range(3000)]
    assert check_smaller_tokenizer(tokenizer, smaller, keep, [*texts, *probes]) >= len(texts)
    chat = [{"role": "user", "content": texts[0]}]
    rendered = [t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in (tokenizer, smaller)]
    assert rendered[0] == rendered[1]
    assert [keep[i] for i in encode(smaller, rendered[1])] == encode(tokenizer, rendered[0])
