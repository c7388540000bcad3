"""Plan runs of models that are far too large for this machine, from shapes alone, with rates that were measured on it.

    python benchmarks/on_paper.py

The rates are of one thread of a processor that multiplies bfloat16 (Intel Xeon with AMX), in processor seconds, by the
probe of ``secateur estimate`` on one layer of each model's shapes: blocks of 512 tokens, one at a time. The layer of
the 671B model had 16 of its 256 routed experts, so that it fits; a token is sent to 8 of them either way, and with all
256 each expert sees fewer tokens at once, which is slower. The machine was busy: of the 70B layer the calibration's
rate came out above the plain forward's (4.3e11 to 2.8e11 FLOP/s), which cannot be, and the lower one is taken for both.
Another machine's rates go in their place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.estimate import costs, estimate_config
from secateur.estimate.probe import ASSUMED
from secateur.estimate.size import ModelSize, size_of_config
from secateur.recipe import Recipe, parse_recipe
from secateur.records.estimate import Rates
from secateur.report.estimate import format_seconds, stages_table

MODELS: dict[str, dict[str, Any]] = {
    "70B, dense": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
    "671B, 8 of 256 experts per token": {"model_type": "deepseek_v3"},
}
RATES: dict[str, Rates] = {
    "70B, dense": replace(
        ASSUMED, forward=2.8e11, calibrate=2.8e11, head=4.8e11, read=3.0e8, write=3.8e8, load=8.1e8, source="probe"
    ),
    "671B, 8 of 256 experts per token": replace(
        ASSUMED, forward=1.8e11, calibrate=1.5e11, head=3.2e11, read=3.0e8, write=3.8e8, load=6.9e8, source="probe"
    ),
}
"""As measured; see above."""


def recipe() -> Recipe:
    """Return what is planned: two texts, a share of all parameters, no training, in bfloat16."""
    return parse_recipe(
        {
            "model": "on/paper",
            "domain": {"medical": "medical.jsonl"},
            "general": "general.jsonl",
            "calibrate": {"max_tokens": 262_144, "block_size": 512, "batch_size": 1},
            "prune": {"method": "activation_norm", "budget": {"parameters": 0.3}},
            "evaluate": {"max_tokens": 65_536, "batch_size": 1},
            "dtype": "bfloat16",
        }
    )


def by_layers(size: ModelSize, tokens: int) -> dict[str, float]:
    """Return what has to be held where layers are gone through one at a time, in GB."""
    sites = size.sites(["ffn_channel", "gqa_group", "shared_channel"])
    layers = {site.layer for site in sites}
    of_one = max(costs.gram_bytes([site for site in sites if site.layer == layer]) for layer in layers)
    widest = max(layer.parameters for layer in size.layers)
    return {
        "all weights, on disk": costs.weights_bytes(size.parameters, size.stored) / 1e9,
        "the largest layer": costs.weights_bytes(widest, size.stored) / 1e9,
        "residual stream of one text": costs.hidden_bytes(size, tokens, 2, 1) / 1e9,
        "Gram matrices of one layer": of_one / 1e9,
        "Gram matrices of all layers, on disk": costs.gram_bytes(sites) / 1e9,
    }


def main() -> None:
    """Print the plans."""
    asked = recipe()
    for name, config in MODELS.items():
        size, rates = size_of_config(config), RATES[name]
        found = estimate_config(asked, config, rates)
        active = sum(layer.active for layer in size.layers) / 1e9
        per_token = costs.layers_flops(size, 1, asked.calibrate.block_size) / 1e9
        print(f"### {name}\n\n{size.parameters / 1e9:.1f} B parameters, {active:.1f} B of the layers' active; ", end="")
        print(f"{per_token:.0f} GFLOP per token forwards, {costs.head_flops(size, 1) / 1e9:.1f} of the head\n")
        print(stages_table(found).markdown(), "\n")
        print(f"in all {format_seconds(found.seconds)}; by layers, GB:")
        for what, size_gb in by_layers(size, 262_144).items():
            print(f"- {what}: {size_gb:,.2f}")
        print()


if __name__ == "__main__":
    main()
