"""Losses on held-out text of a model that is run one decoder layer at a time.

The formulas are those of ``perplexity`` and ``vocabulary``. The logits are made of the last layer's states a few
positions at a time, so that those of a long block over a large vocabulary are never whole.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``vocab`` token ids, ``kept`` of those, ``tokens`` predicted tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.evaluate.perplexity import score_losses, token_nll
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.evaluation import TextScore
from secateur.stream.forward import model_inputs
from secateur.stream.layers import LayerStream, stream_through
from secateur.stream.sources import LayerSource
from secateur.stream.stand_ins import layers_giving, plain_tensors
from secateur.stream.streamed import StreamedModel

MAX_LOGIT_BYTES = 256 * 2**20
"""Logits that are held at once, at four bytes each."""


def evaluate_text_by_layer(
    model: StreamedModel,
    blocks: TokenBlocks,
    *,
    batch_size: int = 4,
    num_excluded: int = 0,
    progress: Progress = silent,
    label: str = "evaluate",
) -> TextScore:
    """Return what ``evaluate_text`` returns.

    Args:
        model: run layer by layer.
        blocks: packed held-out text.
        batch_size: blocks per batch.
        num_excluded: documents that were left out because they had been calibrated on, for the record.
        progress: told about finished layers.
        label: name of the work for ``progress``.

    Raises:
        CheckpointError: the loss of a batch is not finite, or a layer's weights cannot be read.
        CorpusError: no token of the text is predicted.
        ExportError: the disk is full.
        FamilyError: the model cannot be run layer by layer.
    """
    (score,) = _scores(model, blocks, [None], batch_size, num_excluded, progress, label)
    return score


def evaluate_resegmented_by_layer(
    model: StreamedModel,
    blocks: TokenBlocks,
    keep: Int64[Tensor, " kept"],
    *,
    batch_size: int = 4,
    num_excluded: int = 0,
    progress: Progress = silent,
    label: str = "evaluate",
) -> tuple[TextScore, TextScore]:
    """Return what ``evaluate_resegmented`` returns.

    Args:
        model: the dense model, run layer by layer.
        blocks: held-out text in new ids.
        keep: for each new id, the model's own.
        batch_size: blocks per batch.
        num_excluded: documents that were left out because they had been calibrated on, for the record.
        progress: told about finished layers.
        label: name of the work for ``progress``.

    Raises:
        SecateurError: as ``evaluate_text_by_layer``.
    """
    renamed = _Renamed(blocks, keep)
    full, restricted = _scores(model, renamed, [None, keep], batch_size, num_excluded, progress, label)
    return full, restricted


@dataclass
class _Renamed:
    """Blocks whose ids are replaced as they are read."""

    whole: TokenBlocks
    ids: Tensor

    def __post_init__(self) -> None:
        self.fingerprint, self.documents = self.whole.fingerprint, self.whole.documents
        self.num_tokens, self.num_blocks = self.whole.num_tokens, self.whole.num_blocks

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        for batch in self.whole.batches(batch_size):
            yield replace(batch, input_ids=self.ids.to(batch.input_ids.device)[batch.input_ids])


def _scores(
    model: StreamedModel,
    blocks: TokenBlocks,
    outcomes: Sequence[Int64[Tensor, " kept"] | None],
    batch_size: int,
    num_excluded: int,
    progress: Progress,
    label: str,
) -> list[TextScore]:
    """Return a score for each set of ids that the probability is shared out among; None for all ids."""
    started = time.perf_counter()
    with model.hidden() as hidden:
        stream_through(LayerStream(model.source, blocks, batch_size), hidden, progress=progress, label=label)
        states = iter(hidden)
        scores = score_losses(
            lambda batch: batch_nll(model.source, batch, next(states), outcomes),
            blocks,
            batch_size=batch_size,
            num_excluded=num_excluded,
            progress=progress,
            label=label,
        )
    speed = blocks.num_tokens / (time.perf_counter() - started)
    return [replace(score, tokens_per_s=speed) for score in scores]


def batch_nll(
    source: LayerSource,
    batch: BlockBatch,
    hidden: Float[Tensor, "batch seq hidden"],
    outcomes: Sequence[Int64[Tensor, " kept"] | None] = (None,),
    *,
    max_logit_bytes: int = MAX_LOGIT_BYTES,
) -> list[Float[Tensor, " tokens"]]:
    """Return -log p of each predicted token in row order, in nats, for each set of outcomes.

    Args:
        source: gives the final norm and the head.
        batch: the tokens.
        hidden: what left the last layer.
        outcomes: ids that the probability is shared out among; None for all.
        max_logit_bytes: logits of so many bytes are held at once, of two positions at least.
    """
    ids, wanted = batch.input_ids.to(hidden.device), batch.predicted.to(hidden.device)
    keeps = [None if keep is None else keep.to(hidden.device) for keep in outcomes]
    found: list[Tensor] = []
    for start, logits in _logits_of_slices(source, batch, hidden, max_logit_bytes):
        part = slice(start, start + logits.shape[1])
        asked = wanted[:, part].clone()
        asked[:, 0] = False  # it was predicted from the position before, in the slice before
        losses = [token_nll(logits, ids[:, part], asked, keep) for keep in keeps]
        if not found:
            found = [value.new_zeros(ids.shape) for value in losses]
        for total, values in zip(found, losses, strict=True):
            total[:, part][asked] = values
    return [total[wanted] for total in found]


def _logits_of_slices(
    source: LayerSource, batch: BlockBatch, hidden: Tensor, max_logit_bytes: int
) -> Iterator[tuple[int, Float[Tensor, "batch some vocab"]]]:
    """Yield logits of runs of positions and where each begins; each begins with the last position of the one before."""
    model, family = source.model, source.geometry.family
    num_blocks, length = batch.input_ids.shape
    most = max(2, max_logit_bytes // (4 * num_blocks * source.geometry.dimensions["vocab_size"]))
    for start in range(0, max(1, length - 1), most - 1):
        places = torch.arange(start, min(length, start + most), device=hidden.device)
        whole = {} if len(places) == length else {"logits_to_keep": places}
        with plain_tensors(), layers_giving(model, family, hidden):
            logits: Tensor = model(**model_inputs(batch, family, model), **whole).logits
        yield start, logits
