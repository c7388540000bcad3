"""Perplexity and bits per byte on packed held-out text, with standard errors over documents.

Every token that has a predecessor in its own document piece is predicted once. Losses are computed in float32 from the
model's own logits and added up in float64 per document, so neither batch size nor neighbours change a document's loss.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``vocab`` token ids, ``tokens`` predicted tokens.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from secateur.errors import CheckpointError, CorpusError
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.evaluation import TextScore, ratio_estimate
from secateur.stream.forward import run_logits

_ROWS_AT_ONCE = 32


def predicted(batch: BlockBatch) -> Bool[Tensor, "batch seq"]:
    """Return which tokens are predicted: real ones that are not the first of their piece."""
    return batch.valid & (batch.position_ids > 0)


def token_nll(
    logits: Float[Tensor, "batch seq vocab"], input_ids: Int64[Tensor, "batch seq"], wanted: Bool[Tensor, "batch seq"]
) -> Float[Tensor, " tokens"]:
    """Return -log p of each wanted token given the logits one position before it, in row order, in nats.

    In float32, or float64 for float64 logits.
    """
    losses = []
    for row, ids, mask in zip(logits, input_ids, wanted, strict=True):
        positions = mask.nonzero()[:, 0]
        chosen = row[positions - 1, ids[positions]]
        totals = log_totals(row[:-1])
        losses.append(totals[positions - 1] - chosen.to(totals.dtype))
    return torch.cat(losses)


def log_totals(scores: Float[Tensor, "seq vocab"]) -> Float[Tensor, " seq"]:
    """Return log sum exp of each row, in float32 or wider.

    A few rows at a time in one small buffer that stays in the processor's cache: over a large vocabulary that is three
    to five times as fast on a CPU as one call over all rows, which writes and reads them from memory.
    """
    wide = torch.float64 if scores.dtype == torch.float64 else torch.float32
    buffer = torch.empty(min(_ROWS_AT_ONCE, len(scores)), scores.shape[1], dtype=wide, device=scores.device)
    totals = []
    for start in range(0, len(scores), _ROWS_AT_ONCE):
        rows = scores[start : start + _ROWS_AT_ONCE]
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

    Raises:
        CheckpointError: the loss of a batch is not finite.
        CorpusError: no token of the text is predicted.
    """
    num_documents = len(blocks.documents)
    nll = torch.zeros(num_documents, dtype=torch.float64)
    tokens = torch.zeros(num_documents, dtype=torch.int64)
    sizes = [0] * num_documents
    model.eval()
    started = time.perf_counter()
    with torch.inference_mode(), progress(label, blocks.num_tokens, "tokens") as task:
        for batch in blocks.batches(batch_size):
            wanted = predicted(batch)
            logits = run_logits(model, batch, family)
            device = logits.device
            losses = token_nll(logits, batch.input_ids.to(device), wanted.to(device)).double().cpu()
            if not bool(torch.isfinite(losses).all()):
                raise CheckpointError("the model's loss is not finite on held-out text. Check its weights and dtype.")
            owners = batch.document[wanted]
            nll.index_add_(0, owners, losses)
            tokens.index_add_(0, owners, torch.ones_like(owners))
            for document, num_bytes in batch.piece_bytes:
                sizes[document] += num_bytes
            task.advance(batch.num_tokens)
    seconds = time.perf_counter() - started
    measured = [i for i, count in enumerate(tokens.tolist()) if count]
    if not measured:
        raise CorpusError("no token of the test text can be predicted: every document is a single token.")
    totals = [float(nll[i]) for i in measured]
    counts = [int(tokens[i]) for i in measured]
    lengths = [sizes[i] for i in measured]
    mean, stderr = ratio_estimate(totals, counts)
    bits, bits_stderr = ratio_estimate([total / math.log(2) for total in totals], lengths)
    return TextScore(
        nll_per_token=mean,
        nll_stderr=stderr,
        bits_per_byte=bits,
        bits_per_byte_stderr=bits_stderr,
        num_tokens=sum(counts),
        num_bytes=sum(lengths),
        num_documents=len(measured),
        num_excluded=num_excluded,
        corpus_fingerprint=blocks.fingerprint,
        tokens_per_s=blocks.num_tokens / seconds,
        document_nll=tuple(totals),
        document_tokens=tuple(counts),
    )
