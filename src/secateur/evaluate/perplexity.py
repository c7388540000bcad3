"""Perplexity and bits per byte on packed held-out text, with standard errors over documents.

Every token that is not context of its document piece is predicted once. Losses are computed in float32 from the
model's own logits and added up in float64 per document, so neither batch size nor neighbours change a document's loss.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``vocab`` token ids, ``kept`` of those, ``tokens`` predicted tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import islice
from operator import add
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from secateur.errors import CheckpointError, CorpusError
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.evaluation import TextScore, ratio_estimate
from secateur.records.ranks import ALONE, Ranks
from secateur.stream.forward import run_logits

_ROWS_AT_ONCE = 32


def token_nll(
    logits: Float[Tensor, "batch seq vocab"],
    input_ids: Int64[Tensor, "batch seq"],
    wanted: Bool[Tensor, "batch seq"],
    keep: Int64[Tensor, " kept"] | None = None,
) -> Float[Tensor, " tokens"]:
    """Return -log p of each wanted token given the logits one position before it, in row order, in nats.

    In float32, or float64 for float64 logits.

    Args:
        logits: of all token ids.
        input_ids: the tokens.
        wanted: which of them; never the first of a row.
        keep: shares the probability out among these ids only, as if there were no others; None for all ids. The wanted
            tokens must be among them.
    """
    losses = []
    for row, ids, mask in zip(logits, input_ids, wanted, strict=True):
        positions = mask.nonzero()[:, 0]
        chosen = row[positions - 1, ids[positions]]
        totals = log_totals(row[:-1], keep)
        losses.append(totals[positions - 1] - chosen.to(totals.dtype))
    return torch.cat(losses)


def log_totals(scores: Float[Tensor, "seq vocab"], keep: Int64[Tensor, " kept"] | None = None) -> Float[Tensor, " seq"]:
    """Return log sum exp of each row, in float32 or wider.

    A few rows at a time in one small buffer that stays in the processor's cache: over a large vocabulary that is three
    to five times as fast on a CPU as one call over all rows, which writes and reads them from memory.

    Args:
        scores: one row per position.
        keep: columns that are summed; None for all.
    """
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    num_columns = scores.shape[1] if keep is None else len(keep)
    buffer = torch.empty(min(_ROWS_AT_ONCE, len(scores)), num_columns, dtype=wide, device=scores.device)
    totals = []
    for start in range(0, len(scores), _ROWS_AT_ONCE):
        rows = scores[start : start + _ROWS_AT_ONCE]
        if keep is not None:
            rows = rows.index_select(1, keep)
        highest = rows.amax(-1, keepdim=True)
        exponentials = torch.sub(rows, highest, out=buffer[: len(rows)]).exp_()
        totals.append(exponentials.sum(-1).log_() + highest[:, 0].to(wide))
    return torch.cat(totals)


def evaluate_text(
    model: Any,
    blocks: TokenBlocks,
    family: Family,
    *,
    batch_size: int = 4,
    num_excluded: int = 0,
    progress: Progress = silent,
    label: str = "evaluate",
    ranks: Ranks = ALONE,
) -> TextScore:
    """Return how well ``model`` predicts ``blocks``.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: packed held-out text.
        family: of the model.
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
        logits = run_logits(model, batch, family)
        return [token_nll(logits, batch.input_ids.to(logits.device), batch.predicted.to(logits.device))]

    (score,) = score_losses(
        losses, blocks, batch_size=batch_size, num_excluded=num_excluded, progress=progress, label=label, ranks=ranks
    )
    return score


def score_losses(
    losses: Callable[[BlockBatch], Sequence[Float[Tensor, " tokens"]]],
    blocks: TokenBlocks,
    *,
    batch_size: int,
    num_excluded: int,
    progress: Progress,
    label: str,
    ranks: Ranks = ALONE,
) -> list[TextScore]:
    """Return a score of ``blocks`` for each kind of loss; a document counts if any of its bytes are predicted.

    Of several processes, process r runs the batches r, r + n, r + 2n ... of n processes.

    Args:
        losses: given a batch, the nats of its predicted tokens in row order, one tensor for each kind of loss.
        blocks: packed held-out text.
        batch_size: blocks per forward pass.
        num_excluded: documents that were left out, for the record.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        ranks: the processes that share the work; all of them return the same. Batches are smaller where there would
            be fewer than processes.

    Raises:
        CheckpointError: a loss is not finite.
        CorpusError: no token of the text is predicted.
    """
    num_documents = len(blocks.documents)
    sums: list[Tensor] = []
    tokens = torch.zeros(num_documents, dtype=torch.int64)
    sizes = [0] * num_documents
    world_size = ranks.world_size
    size = max(1, min(batch_size, blocks.num_blocks // world_size))
    started = time.perf_counter()
    with torch.inference_mode(), progress(label, blocks.num_tokens // world_size, "tokens") as task:
        for batch in islice(blocks.batches(size), ranks.rank, None, world_size):
            owners = batch.document[batch.predicted]
            tokens.index_add_(0, owners, torch.ones_like(owners))
            found = torch.stack([values.double().cpu() for values in losses(batch)])
            if not bool(torch.isfinite(found).all()):
                raise CheckpointError("the model's loss is not finite on held-out text. Check its weights and dtype.")
            sums = sums or [torch.zeros(num_documents, dtype=torch.float64) for _ in found]
            for total, values in zip(sums, found, strict=True):
                total.index_add_(0, owners, values)
            for document, num_bytes in batch.piece_bytes:
                sizes[document] += num_bytes
            task.advance(batch.num_tokens)
    sums, tokens, sizes = _together(ranks.exchange((sums, tokens, sizes)))
    seconds = time.perf_counter() - started
    measured = [i for i, count in enumerate(tokens.tolist()) if count and sizes[i]]
    if not measured:
        raise CorpusError("no token of the test text can be predicted: every document is a single token.")
    return [
        _text_score(
            [float(total[i]) for i in measured],
            [int(tokens[i]) for i in measured],
            [sizes[i] for i in measured],
            num_excluded=num_excluded,
            fingerprint=blocks.fingerprint,
            tokens_per_s=blocks.num_tokens / seconds,
        )
        for total in sums
    ]


_Shares = tuple[list[Tensor], Tensor, list[int]]


def _together(shares: Sequence[_Shares]) -> _Shares:
    """Return what all processes summed, per document; one that had no batch knows no kind of loss."""
    sums = [list(kinds) for kinds, _, _ in shares if kinds]
    return (
        [reduce(add, found) for found in zip(*sums, strict=True)],
        reduce(add, [tokens for _, tokens, _ in shares]),
        [sum(found) for found in zip(*(sizes for _, _, sizes in shares), strict=True)],
    )


def _text_score(
    totals: list[float],
    counts: list[int],
    lengths: list[int],
    *,
    num_excluded: int,
    fingerprint: str,
    tokens_per_s: float,
) -> TextScore:
    """Return the score of documents with these summed nats, predicted tokens and bytes."""
    mean, stderr = ratio_estimate(totals, counts)
    bits, bits_stderr = ratio_estimate([total / math.log(2) for total in totals], lengths)
    return TextScore(
        nll_per_token=mean,
        nll_stderr=stderr,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        num_tokens=sum(counts),
        num_bytes=sum(lengths),
        num_documents=len(totals),
        num_excluded=num_excluded,
        corpus_fingerprint=fingerprint,
        tokens_per_s=tokens_per_s,
        document_nll=tuple(totals),
        document_tokens=tuple(counts),
        document_bytes=tuple(lengths),
    )
