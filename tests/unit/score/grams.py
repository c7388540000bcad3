"""Gram matrices of a small model on hand-made blocks, taken as plainly as possible."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families.geometry import Geometry
from secateur.records.gram import GramsInMemory
from secateur.records.statistics import SiteKey
from secateur.records.units import FUSED_KINDS, SITE_KINDS
from secateur.stream.forward import run_backbone
from tests.blocks import HandMadeBlocks


def grams_of(model: Any, blocks: HandMadeBlocks, geometry: Geometry) -> GramsInMemory:
    """Return the sums of x xT over the real tokens at the input of every reading projection."""
    (batch,) = blocks.batches(blocks.num_blocks)
    sums: dict[SiteKey, Tensor] = {}

    def keep(key: SiteKey) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])[batch.valid.reshape(-1)]
            sums[key] = torch.stack([row[:, None] * row for row in rows]).sum(0)

        return hook

    with torch.inference_mode(), ExitStack() as stack:
        for kind in (kind for kind in SITE_KINDS if kind in geometry.axes and kind not in FUSED_KINDS):
            for axis in (axis for axis in geometry.axes[kind] if axis.num_units):
                handle = model.get_submodule(axis.reader).register_forward_pre_hook(keep((axis.layer, kind)))
                stack.callback(handle.remove)
        run_backbone(model, batch, geometry.family)
    return GramsInMemory(batch.num_tokens, sums)
