"""What a smaller vocabulary alone costs: the dense model on text as the smaller tokenizer cuts it.

Two losses come from one forward pass. With all token ids as outcomes, the loss above that on the text's own
segmentation is the price of the other segmentation. With only the kept ids it is the loss of the model that has nothing
removed but rows of its embedding and head.

Dims: ``kept`` ids that stay; a new id is a place among them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from secateur.evaluate.perplexity import score_losses, token_nll
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.evaluation import TextScore
from secateur.records.ranks import ALONE, Ranks
from secateur.stream.forward import run_logits


def evaluate_resegmented(
    model: Any,
    blocks: TokenBlocks,
    family: Family,
    keep: Int64[Tensor, " kept"],
    *,
    batch_size: int = 4,
    num_excluded: int = 0,
    progress: Progress = silent,
    label: str = "evaluate",
    ranks: Ranks = ALONE,
) -> tuple[TextScore, TextScore]:
    """Return how well the dense model predicts resegmented text: among all token ids, and among the kept ones only.

    Args:
        model: the dense model, on its device; it is put into evaluation mode.
        blocks: held-out text in new ids.
        family: of the model.
        keep: for each new id, the model's own.
        batch_size: blocks per forward pass.
        num_excluded: documents that were left out because they had been calibrated on, for the record.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        ranks: the processes that share the work; all of them return the same.

    Raises:
        CheckpointError: the loss of a batch is not finite.
        CorpusError: no token of the text is predicted.
    """
    model.eval()

    def losses(batch: BlockBatch) -> list[Tensor]:
        dense = replace(batch, input_ids=keep.to(batch.input_ids.device)[batch.input_ids])
        logits = run_logits(model, dense, family)
        ids, wanted = dense.input_ids.to(logits.device), dense.predicted.to(logits.device)
        return [token_nll(logits, ids, wanted), token_nll(logits, ids, wanted, keep.to(logits.device))]

    full, restricted = score_losses(
        losses, blocks, batch_size=batch_size, num_excluded=num_excluded, progress=progress, label=label, ranks=ranks
    )
    return full, restricted
