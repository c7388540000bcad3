"""Forward passes over packed blocks, with and without logits; no statistics and no losses.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``hidden`` residual width, ``vocab`` token ids.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from secateur.families.schema import Family
from secateur.records.blocks import BlockBatch


def model_inputs(batch: BlockBatch, family: Family, model: nn.Module) -> dict[str, Any]:
    """Return the keyword arguments that make ``model`` read a packed batch piece by piece."""
    return packed_inputs(batch.input_ids, batch.position_ids, family, model)


def packed_inputs(
    input_ids: Int64[Tensor, "batch seq"], position_ids: Int64[Tensor, "batch seq"], family: Family, model: Any
) -> dict[str, Any]:
    """Return the keyword arguments that make a model read packed token ids piece by piece.

    Positions restart at every piece. Most families tell pieces apart by those restarts; families whose forward does
    not look get an explicit mask, or one per type of attention where layers differ in that.

    Args:
        input_ids: the tokens.
        position_ids: position within the piece, from 0.
        family: of the model.
        model: that reads them.
    """
    weight = next(model.parameters())
    inputs: dict[str, Any] = {
        "input_ids": input_ids.to(weight.device),
        "position_ids": position_ids.to(weight.device),
        "use_cache": False,
    }
    if family.packing == "mask":
        seen = piece_mask(inputs["position_ids"])
        inputs["attention_mask"] = (
            blocked_where(~seen, weight) if family.blocks.layer_types is None else _by_type(seen, weight, model.config)
        )
    return inputs


def _by_type(seen: Bool[Tensor, "batch 1 seq seq"], weight: Tensor, config: Any) -> dict[str, Tensor]:
    """Return the masks of whole attention and of attention to a window of the latest tokens."""
    near = torch.ones(seen.shape[-2:], dtype=torch.bool, device=seen.device).triu(1 - config.sliding_window)
    return {
        "full_attention": blocked_where(~seen, weight),
        "sliding_attention": blocked_where(~(seen & near), weight),
    }


def blocked_where(blocked: Bool[Tensor, "batch 1 seq seq"], weight: Tensor) -> Float[Tensor, "batch 1 seq seq"]:
    """Return a mask that is added to attention scores: 0, and the lowest number where ``blocked``."""
    mask = torch.zeros(blocked.shape, dtype=weight.dtype, device=weight.device)
    return mask.masked_fill_(blocked.to(weight.device), torch.finfo(weight.dtype).min)


def piece_mask(position_ids: Int64[Tensor, "batch seq"]) -> Bool[Tensor, "batch 1 seq seq"]:
    """Return which key each query may read: earlier tokens of its own piece, and itself."""
    piece = (position_ids == 0).cumsum(-1)
    same = piece[:, :, None] == piece[:, None, :]
    return (same & torch.ones(same.shape[-2:], dtype=torch.bool, device=same.device).tril())[:, None]


def run_backbone(model: Any, batch: BlockBatch, family: Family) -> Float[Tensor, "batch seq hidden"]:
    """Run the decoder stack without computing logits and return the final hidden states."""
    hidden: Tensor = model.base_model(**model_inputs(batch, family, model))[0]
    return hidden


def run_logits(model: Any, batch: BlockBatch, family: Family) -> Float[Tensor, "batch seq vocab"]:
    """Run the whole model and return its logits."""
    logits: Tensor = model(**model_inputs(batch, family, model)).logits
    return logits
