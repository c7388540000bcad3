"""A model that exists on paper only, with sizes that are easy to multiply, and recipes about it."""

from __future__ import annotations

from typing import Any

from secateur.estimate import estimate_config
from secateur.recipe import Recipe, parse_recipe
from secateur.records.estimate import Estimate, Machine, Rates

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 100,
    "intermediate_size": 300,
    "num_hidden_layers": 4,
    "num_attention_heads": 10,
    "num_key_value_heads": 5,
    "head_dim": 10,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
ATTENTION = 100 * 100 * 2 + 100 * 50 * 2
FFN = 3 * 100 * 300
LAYER = ATTENTION + FFN
TOTAL = 4 * (LAYER + 200) + 1000 * 100 + 100
RATES = Rates(
    forward=1e9,
    calibrate=1e9,
    head=1e9,
    gram=1e9,
    gradients=1e9,
    training=1e9,
    training_head=1e9,
    optimizer=1e9,
    solve=1e9,
    decode=1e9,
    read=1e9,
    write=1e9,
    load=1e9,
    tokenize=1e9,
    start_s=0.0,
    baseline_bytes=0,
)
"""A thousand million of everything per second, and a program without weight."""


def recipe(**changes: Any) -> Recipe:
    """Return a recipe of two texts of 1,024 tokens in blocks of 256, four at a time; ``changes`` replace keys."""
    data: dict[str, Any] = {
        "model": "on/paper",
        "domain": {"medical": "medical.jsonl"},
        "general": "general.txt",
        "calibrate": {"max_tokens": 1024, "block_size": 256, "batch_size": 4},
        "prune": {"method": "activation_norm", "budget": {"channels": 0.5}},
        "evaluate": {"max_tokens": 512, "controls": []},
    }
    return parse_recipe({**data, **changes})


def on_paper(asked: Recipe, machine: Machine | None = None, device: str = "cpu", **rates: Any) -> Estimate:
    """Return the estimate of a recipe about the model on paper."""
    from dataclasses import replace

    return estimate_config(asked, CONFIG, replace(RATES, **rates), machine=machine, device=device)


def stage(found: Estimate, name: str) -> Any:
    """Return a stage by its name."""
    return next(stage for stage in found.stages if stage.name == name)
