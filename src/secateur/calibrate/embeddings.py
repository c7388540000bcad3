"""One vector per document: the mean of the model's final hidden states over it. No clustering, no files.

Dims: ``documents``, ``hidden`` residual width.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.calibrate.one_pass import not_finite
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.records.blocks import TokenBlocks
from secateur.stream.forward import run_backbone


def embed_documents(
    model: Any,
    blocks: TokenBlocks,
    family: Family,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "embed documents",
) -> Float[Tensor, "documents hidden"]:
    """Return the mean over each document's predicted tokens of the last hidden state, after the final norm; float32.

    The first token of a piece is left out with other context: attention rests on it when it has nowhere else to go, and
    its state says little of the text (Xiao et al., 2023, arXiv 2309.17453). Sums are in float64, so that neither the
    batch size nor the pieces that a document was cut into add rounding of their own.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: packed text.
        family: of this model.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.

    Returns:
        On the CPU; rows in the order of ``blocks.documents``, zero for a document of which nothing is predicted.

    Raises:
        CheckpointError: hidden states are not finite.
    """
    model.eval()
    sums: Tensor | None = None
    counts = torch.zeros(len(blocks.documents), dtype=torch.int64)
    with torch.inference_mode(), progress(label, blocks.num_tokens, "tokens") as task:
        for batch in blocks.batches(batch_size):
            hidden = run_backbone(model, batch, family)
            rows = hidden[batch.predicted.to(hidden.device)].cpu().double()
            if not bool(torch.isfinite(rows).all()):
                raise not_finite("output of the last layer's norm")
            if sums is None:
                sums = torch.zeros(len(counts), rows.shape[1], dtype=torch.float64)
            document = batch.document[batch.predicted]
            sums.index_add_(0, document, rows)
            counts += torch.bincount(document, minlength=len(counts))
            task.advance(batch.num_tokens)
    assert sums is not None, "there is at least one block"
    return (sums / counts.clamp_min(1)[:, None]).float()
