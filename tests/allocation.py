"""Geometries, parameter shapes and scores for allocation, without any model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import families
from secateur.records.plan import Plan
from secateur.records.scores import Scores

HIDDEN, HEAD_DIM, Q_PER_KV = 48, 4, 2
CHANNEL_COST = 3 * HIDDEN
"""Parameters of one channel: a gate row, an up row and a down column."""
HEAD_COST = 2 * HEAD_DIM * HIDDEN
"""Parameters of one query head: its query rows and output columns."""
GROUP_COST = (2 * Q_PER_KV + 2) * HEAD_DIM * HIDDEN
"""Parameters of one group: query rows and output columns of two heads, key and value rows of one."""

Shapes = dict[str, tuple[int, ...]]


def llama(
    channels: Sequence[int], groups: Sequence[int], family: str = "llama", q_per_kv: int = Q_PER_KV
) -> tuple[Geometry, Shapes]:
    """Return a llama with the given numbers of channels and groups per layer: its geometry and parameter shapes."""
    widths = list(zip(channels, groups, strict=True))
    config: dict[str, Any] = {
        "num_hidden_layers": len(widths),
        "hidden_size": HIDDEN,
        "vocab_size": 100,
        "intermediate_size": channels[0],
        "num_attention_heads": groups[0] * q_per_kv,
        "num_key_value_heads": groups[0],
        "head_dim": HEAD_DIM,
    }
    if len(set(widths)) > 1:
        config["per_layer_config"] = {
            str(layer): {"intermediate_size": c, "num_key_value_heads": g, "num_attention_heads": g * q_per_kv}
            for layer, (c, g) in enumerate(widths)
        }
    shapes: Shapes = {"model.embed_tokens.weight": (100, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer, (c, g) in enumerate(widths):
        root = f"model.layers.{layer}"
        queries, keys = g * q_per_kv * HEAD_DIM, g * HEAD_DIM
        shapes |= {f"{root}.mlp.{name}.weight": (c, HIDDEN) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{root}.mlp.down_proj.weight": (HIDDEN, c), f"{root}.self_attn.o_proj.weight": (HIDDEN, queries)}
        shapes |= {f"{root}.self_attn.q_proj.weight": (queries, HIDDEN)}
        shapes |= {f"{root}.self_attn.{name}.weight": (keys, HIDDEN) for name in ("k_proj", "v_proj")}
    return build_geometry(families()[family], config), shapes


def scores_of(values: Mapping[str, Sequence[Sequence[float]]]) -> Scores:
    """Return scores with the given numbers."""
    tensors = {k: [torch.tensor(list(v), dtype=torch.float64) for v in layers] for k, layers in values.items()}
    return Scores("by hand", {"power": 2}, ("medical",), tensors)


def random_scores(geometry: Geometry, kinds: Sequence[str], seed: int = 0) -> Scores:
    """Return random scores for every unit of some kinds."""
    generator = torch.Generator().manual_seed(seed)
    return scores_of(
        {
            kind: [torch.rand(count, generator=generator).tolist() for count in geometry.num_units(kind)]
            for kind in kinds
        }
    )


def total(shapes: Shapes) -> int:
    """Return the number of parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


def counts(plan: Plan, kind: str) -> list[int]:
    """Return how many units of a kind stay in each layer."""
    return [len(layer.keep) for layer in plan.layers[kind]]
