"""Multiple-choice questions answered by log-likelihood: the choice that the model finds most likely after the prompt.

Formula as in the LM evaluation harness (Gao and others, 2021, doi:10.5281/zenodo.5371628), which counts characters for
``acc_norm`` where we count UTF-8 bytes. Nothing is generated. The head is computed only where a choice's token is
predicted, which for short choices after long prompts is a small part of the positions.

``acc_perplexity``, where it is asked for, picks the choice whose text (prompt and choice as one) has the lowest
perplexity per token, as the Mini-GPTs paper scored multiple choice (Valicenti and others, 2023, arXiv:2312.12682).

Dims: ``rows`` rows; ``endings`` most choices that share a row; ``tokens`` predicted tokens; ``batch`` blocks; ``seq``
tokens of a block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from secateur.evaluate.perplexity import log_totals, score_losses
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch
from secateur.records.choice_blocks import ChoiceBlocks
from secateur.records.choices import ChoicesScore, mean_estimate
from secateur.records.ranks import ALONE, Ranks
from secateur.stream.forward import blocked_where, model_inputs


def evaluate_choices(
    model: Any,
    blocks: ChoiceBlocks,
    family: Family,
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "evaluate",
    ranks: Ranks = ALONE,
) -> ChoicesScore:
    """Return how well ``model`` answers the questions in ``blocks``.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: questions under the model's own tokenizer.
        family: of the model.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        ranks: the processes that share the work; all of them return the same.

    Raises:
        CheckpointError: a log-likelihood is not finite.
    """
    model.eval()

    def losses(batch: BlockBatch) -> list[Float[Tensor, " tokens"]]:
        scores = _scores_before_predicted(model, batch, family)
        totals = log_totals(scores)
        targets = _targets(batch, blocks.last_ids).to(scores.device)
        nll = totals - scores.gather(1, targets).T.to(totals.dtype)
        if not blocks.scores_whole:
            return list(nll)
        return [*(nll * _is_choice(batch, blocks.choice_starts).to(nll.device)), *nll]

    found = score_losses(
        losses, blocks, batch_size=batch_size, num_excluded=0, progress=progress, label=label, ranks=ranks
    )
    nll = [score.document_nll for score in found]
    counts, num_endings = found[0].document_tokens, blocks.last_ids.shape[1]
    return score_answers(
        [[-nll[ending][row] for row, ending in places] for places in blocks.places],
        blocks.answers,
        blocks.choice_bytes,
        whole_nll=[[nll[num_endings + ending][row] / counts[row] for row, ending in places] for places in blocks.places]
        if blocks.scores_whole
        else None,
        overlaps=blocks.overlaps,
        subjects=blocks.subjects,
        num_truncated=blocks.num_truncated,
        fingerprint=blocks.fingerprint,
        tokens_per_s=found[0].tokens_per_s,
    )


def score_answers(
    log_likelihoods: Sequence[Sequence[float]],
    answers: Sequence[int],
    choice_bytes: Sequence[Sequence[int]],
    *,
    overlaps: Sequence[float],
    whole_nll: Sequence[Sequence[float]] | None = None,
    subjects: Sequence[str] = (),
    num_truncated: int,
    fingerprint: str,
    tokens_per_s: float,
) -> ChoicesScore:
    """Return the score of questions whose choices have these log-likelihoods.

    Args:
        log_likelihoods: for each question, of each choice, summed over its tokens, in nats.
        answers: for each question, which choice is right.
        choice_bytes: for each question, the UTF-8 bytes of each choice.
        overlaps: for each question, how likely whoever goes by common words is right.
        whole_nll: for each question and choice, the mean negative log-likelihood of a token of prompt and choice; None
            where that was not asked for.
        subjects: for each question, its subject; empty where there are none.
        num_truncated: questions whose prompt was cut.
        fingerprint: identifies the questions.
        tokens_per_s: speed of the measurement.
    """
    per_byte = [
        [value / size for value, size in zip(values, sizes, strict=True)]
        for values, sizes in zip(log_likelihoods, choice_bytes, strict=True)
    ]
    correct = tuple(_first_highest(v) == answer for v, answer in zip(log_likelihoods, answers, strict=True))
    correct_norm = tuple(_first_highest(v) == answer for v, answer in zip(per_byte, answers, strict=True))
    margins = tuple(_margin(v, answer) for v, answer in zip(log_likelihoods, answers, strict=True))
    acc, acc_stderr = mean_estimate(correct)
    acc_norm, acc_norm_stderr = mean_estimate(correct_norm)
    margin, margin_stderr = mean_estimate(margins)
    overlap, overlap_stderr = mean_estimate(overlaps)
    chances = tuple(1 / len(values) for values in log_likelihoods)
    correct_perplexity = tuple(
        _first_highest([-value for value in values]) == answer
        for values, answer in zip(whole_nll or (), answers if whole_nll else (), strict=True)
    )
    acc_perplexity, acc_perplexity_stderr = mean_estimate(correct_perplexity) if whole_nll else (None, None)
    return ChoicesScore(
        acc=acc,
        acc_stderr=acc_stderr,
        acc_norm=acc_norm,
        acc_norm_stderr=acc_norm_stderr,
        margin=margin,
        margin_stderr=margin_stderr,
        chance=mean_estimate(chances)[0],
        majority=max(Counter(answers).values()) / len(answers),
        overlap=overlap,
        overlap_stderr=overlap_stderr,
        num_items=len(answers),
        num_truncated=num_truncated,
        fingerprint=fingerprint,
        tokens_per_s=tokens_per_s,
        item_correct=correct,
        item_correct_norm=correct_norm,
        item_margin=margins,
        item_chance=chances,
        acc_perplexity=acc_perplexity,
        acc_perplexity_stderr=acc_perplexity_stderr,
        item_correct_perplexity=correct_perplexity,
        item_subject=tuple(subjects),
    )


def _scores_before_predicted(model: Any, batch: BlockBatch, family: Family) -> Float[Tensor, "tokens vocab"]:
    """Return the logits from which each predicted token is predicted, in row order."""
    before = batch.predicted.roll(-1, dims=1)  # a row's first token is never predicted
    columns = before.any(0).nonzero()[:, 0]
    inputs = model_inputs(batch, family, model)
    if _has_branches(batch):
        weight = next(model.parameters())
        inputs["attention_mask"] = blocked_where(~branch_mask(batch.position_ids, batch.document), weight)
    logits: Tensor = model(**inputs, logits_to_keep=columns.to(inputs["input_ids"].device)).logits
    return logits[before[:, columns].to(logits.device)]


def branch_mask(
    position_ids: Int64[Tensor, "batch seq"], document: Int64[Tensor, "batch seq"]
) -> Bool[Tensor, "batch 1 seq seq"]:
    """Return which key each query may read: earlier tokens of its own row and of the trunk that this is a branch of."""
    starts = position_ids == 0
    changes = torch.ones_like(starts)
    changes[:, 1:] = document[:, 1:] != document[:, :-1]
    row = (changes | starts).cumsum(-1)
    trunk = torch.where(starts, row, 0).cummax(-1).values
    allowed = (row[:, :, None] == row[:, None, :]) | (trunk[:, :, None] == row[:, None, :])
    return (allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool, device=allowed.device).tril())[:, None]


def _has_branches(batch: BlockBatch) -> bool:
    """Return whether a document begins at a position above 0."""
    begins = batch.document[:, 1:] != batch.document[:, :-1]
    return bool((begins & (batch.position_ids[:, 1:] > 0)).any())


def _is_choice(batch: BlockBatch, choice_starts: Int64[Tensor, " rows"]) -> Bool[Tensor, " tokens"]:
    """Return which predicted tokens belong to a choice."""
    return batch.position_ids[batch.predicted] >= choice_starts[batch.document[batch.predicted]]


def _targets(batch: BlockBatch, last_ids: Int64[Tensor, "rows endings"]) -> Int64[Tensor, "tokens endings"]:
    """Return the predicted tokens, each row's last one in every variant of it."""
    owners = batch.document[batch.predicted]
    is_last = torch.ones_like(owners, dtype=torch.bool)
    is_last[:-1] = owners[1:] != owners[:-1]
    targets = batch.input_ids[batch.predicted][:, None].repeat(1, last_ids.shape[1])
    targets[is_last] = last_ids[owners[is_last]]
    return targets


def _first_highest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)  # max() takes the first of equal ones


def _margin(values: Sequence[float], answer: int) -> float:
    return values[answer] - max(value for place, value in enumerate(values) if place != answer)
