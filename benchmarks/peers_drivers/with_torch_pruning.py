"""Prunes with Torch-Pruning, on a CPU: as its example for language models does, or FFN channels alone.

The example takes the same share from the residual stream, the FFN channels and the query heads. Attention is eager and
there is no cache, because the library's graph follows no other forward pass.
"""

from __future__ import annotations

from typing import Any

import torch_pruning
from common import arguments, load, save, token_blocks
from torch import Tensor


def all_widths(model: Any, ratio: float) -> dict[str, Any]:
    """Return the pruner's options for everything at once; key and value heads keep their number where heads share."""
    config = model.config
    attentions = [layer.self_attn for layer in model.model.layers]
    heads = {attention.q_proj: config.num_attention_heads for attention in attentions}
    for attention in attentions:
        heads |= dict.fromkeys((attention.k_proj, attention.v_proj), config.num_key_value_heads)
    return {
        "pruning_ratio": ratio,
        "head_pruning_ratio": ratio,
        "num_heads": heads,
        "prune_num_heads": True,
        "prune_head_dims": False,
        "round_to": 4,
    }


def ffn_alone(model: Any, ratio: float) -> dict[str, Any]:
    """Return the pruner's options for FFN channels alone."""
    gates = {layer.mlp.gate_proj: ratio for layer in model.model.layers}
    return {"pruning_ratio": 0.0, "pruning_ratio_dict": gates}


def add_gradients(model: Any, blocks: Tensor) -> None:
    """Leave the gradient of the loss on all blocks in the parameters."""
    for block in blocks:
        model(input_ids=block[None], labels=block[None]).loss.backward()


def follow(model: Any) -> None:
    """Write the sizes that are left into the configuration and the attention modules."""
    config, first = model.config, model.model.layers[0]
    shares_heads = config.num_attention_heads != config.num_key_value_heads
    config.hidden_size = model.lm_head.in_features
    config.intermediate_size = first.mlp.gate_proj.out_features
    config.num_attention_heads = first.self_attn.q_proj.out_features // first.self_attn.head_dim
    if not shares_heads:
        config.num_key_value_heads = config.num_attention_heads
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads


def main() -> None:
    """Prune as asked and save."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--ratio", type=float, required=True, help="share of the units to remove")
    parser.add_argument("--ffn", action="store_true", help="remove FFN channels alone")
    parser.add_argument("--taylor", action="store_true", help="choose by gradients on the calibration text")
    options = parser.parse_args()
    model, tokenizer = load(options.model, attn_implementation="eager")
    model.config.use_cache = False
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=2, group_reduction="mean")
    if options.taylor:
        importance = torch_pruning.importance.GroupTaylorImportance()
        add_gradients(model, token_blocks(tokenizer, options.texts, options.tokens))
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example_inputs=tokenizer("Hello world.", return_tensors="pt")["input_ids"],
        importance=importance,
        global_pruning=False,
        output_transform=lambda output: output.logits,
        ignored_layers=[model.lm_head],
        **(ffn_alone if options.ffn else all_widths)(model, options.ratio),
    )
    for group in pruner.step(interactive=True):
        group.prune()
    follow(model)
    save(model, tokenizer, options.output)


if __name__ == "__main__":
    main()
