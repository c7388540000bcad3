"""What recovery training lowers: sums over learned tokens, with gradients; pure tensor functions that run no model.

Logits over a large vocabulary are the largest tensors of a training step. The losses here read them a few rows at a
time and make each row's gradient in the same pass, so besides the logits that they are given they hold one tensor of
their size, the gradient, in their dtype, and only where a gradient is asked for. Sums are in float32, or in float64 for
float64 logits.

A loss sees predictions, not tokens: ``wanted`` marks the positions whose prediction of the next token is learned. Only
these rows are read. For the logits of a whole row of tokens that is

    next_token_loss(logits, next_tokens(input_ids), predicts(learned))

Dims: ``batch`` blocks, ``seq`` positions per block, ``vocab`` token ids, ``dense`` token ids of the teacher, ``tokens``
wanted positions in row order, ``k`` token ids that are known of the teacher, ``hidden`` residual width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from secateur.records.top_classes import TopClasses

_Term = Callable[[Tensor, slice], tuple[Tensor, Tensor]]
"""(logits of some wanted rows, which of the wanted rows) -> (loss per row, its gradient); it may use up the logits."""
_ENTRIES_ON_CPU = 2**18
"""Logits at once; a few tensors of this size should stay in the processor's cache."""
_ENTRIES_ELSEWHERE = 2**24


def predicts(learned: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Return which positions predict a learned token: those one before it."""
    shifted = learned.roll(-1, dims=-1)
    shifted[..., -1] = False
    return shifted


def next_tokens(input_ids: Int64[Tensor, "batch seq"]) -> Int64[Tensor, "batch seq"]:
    """Return the token after each position; after the last one comes an arbitrary one."""
    return input_ids.roll(-1, dims=-1)


def next_token_loss(
    logits: Float[Tensor, "batch seq vocab"], targets: Int64[Tensor, "batch seq"], wanted: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    """Return the sum of -log p(target) over the wanted positions, in nats.

    Args:
        logits: what is predicted.
        targets: the tokens that follow; arbitrary valid ids where not wanted.
        wanted: which positions count.
    """
    chosen = targets[wanted][:, None]

    def term(scores: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids = chosen[rows]
        scores -= scores.amax(-1, keepdim=True)
        right = scores.gather(1, ids)[:, 0]
        log_total, probabilities = _normalise(scores)
        probabilities.scatter_add_(1, ids, torch.full_like(right, -1.0)[:, None])
        return log_total - right, probabilities

    return _sum_rows(logits, wanted, 1.0, term)


def distillation_loss(
    student_logits: Float[Tensor, "batch seq vocab"],
    teacher_logits: Float[Tensor, "batch seq dense"],
    wanted: Bool[Tensor, "batch seq"],
    temperature: float = 1.0,
    keep: Int64[Tensor, " vocab"] | None = None,
) -> Float[Tensor, ""]:
    """Return the sum over the wanted positions of T^2 KL(teacher || student), both softened by the temperature T.

    The factor T^2 keeps gradients of about the same size whatever the temperature (Hinton et al. 2015, arXiv
    1503.02531, section 2). No gradient goes to the teacher.

    Args:
        student_logits: what is learned.
        teacher_logits: of the dense model, at the same positions.
        wanted: which positions count.
        temperature: both logits are divided by it.
        keep: the teacher's id of each of the student's token ids; the teacher's probability is shared out among these,
            as if there were no others. None where both number tokens alike.
    """
    given = teacher_logits.detach().flatten(0, -2)
    places = _places(wanted)

    def term(scores: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        taught = _rows(given, places[rows], scores.dtype, temperature, keep)
        taught -= taught.amax(-1, keepdim=True)
        scores -= scores.amax(-1, keepdim=True)
        difference = taught - scores
        log_total_taught, wished = _normalise(taught)
        log_total, probabilities = _normalise(scores)
        losses = torch.linalg.vecdot(wished, difference) - log_total_taught + log_total
        return losses, probabilities.sub_(wished)

    return _sum_rows(student_logits, wanted, temperature, term)


def top_k_distillation_loss(
    student_logits: Float[Tensor, "batch seq vocab"],
    teacher: TopClasses,
    wanted: Bool[Tensor, "batch seq"],
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Return the sum over the wanted positions of T^2 KL(teacher || student) over k + 1 classes.

    The k tokens that are known of the teacher are a class each; all others together are one. By the log-sum inequality
    the rest R, with P = sum of p and Q = sum of q over R, has P log(P / Q) <= sum over R of p log(p / q), so this is at
    most the full divergence of ``distillation_loss``, equal where the student shares the rest out as the teacher does.
    It says nothing about how the rest is shared out: its gradient leaves the proportions inside R alone. Teacher
    probabilities that do not sum to one (they are rounded when stored) are scaled to do so.

    Args:
        student_logits: what is learned.
        teacher: softened by the same temperature when it was made; one temperature cannot be had from another. Its
            rows are the wanted positions in row order. Where it knows all token ids, the rest is nothing.
        wanted: which positions count.
        temperature: the student's logits are divided by it.
    """
    k, vocab = teacher.indices.shape[-1], student_logits.shape[-1]

    def term(scores: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        ids = teacher.indices[rows].to(torch.int64)
        log_rest = teacher.log_rest[rows].to(scores.dtype)[:, None]
        if k == vocab:
            log_rest = torch.full_like(log_rest, -torch.inf)
        log_wished = torch.cat([teacher.values[rows].to(scores.dtype), log_rest], 1).log_softmax(-1)
        known, log_other, others = _split(scores, ids)
        log_classes = torch.cat([known, log_other], 1).log_softmax(-1)
        wished, classes = log_wished.exp(), log_classes.exp()
        losses = torch.where(wished > 0, wished * (log_wished - log_classes), 0.0).sum(-1)
        excess = classes - wished
        return losses, others.mul_(excess[:, -1:]).scatter_(1, ids, excess[:, :-1])

    return _sum_rows(student_logits, wanted, temperature, term)


def top_classes(
    logits: Float[Tensor, "batch seq dense"],
    wanted: Bool[Tensor, "batch seq"],
    k: int,
    temperature: float = 1.0,
    keep: Int64[Tensor, " vocab"] | None = None,
) -> TopClasses:
    """Return the k most likely tokens of each wanted position, in float32 or wider; all of them where there are fewer.

    Args:
        logits: of the teacher.
        wanted: which positions.
        k: how many tokens.
        temperature: the logits are divided by it.
        keep: the only ids that count; they are numbered anew in this order. None for all.
    """
    flat, places = logits.detach().flatten(0, -2), _places(wanted)
    num_ids = logits.shape[-1] if keep is None else len(keep)
    k, wide = min(k, num_ids), _wide(logits)
    parts = []
    for rows in _chunks(len(places), logits.shape[-1], logits.device):
        scores = _rows(flat, places[rows], wide, temperature, keep).log_softmax(-1)
        values, indices = scores.topk(k, dim=-1)
        parts.append((values, indices, _split(scores, indices)[1][:, 0]))
    if not parts:
        nothing = flat.new_empty((0, k), dtype=wide)
        return TopClasses(nothing, torch.empty_like(nothing, dtype=torch.int64), flat.new_empty(0, dtype=wide))
    values, indices, log_rest = (torch.cat(column) for column in zip(*parts, strict=True))
    return TopClasses(values, indices, log_rest)


def hidden_loss(
    student_states: Sequence[Float[Tensor, "batch seq hidden"]],
    teacher_states: Sequence[Float[Tensor, "batch seq hidden"]],
    wanted: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Return the sum over the wanted positions of the mean over layers of |student - teacher|^2 / |teacher|^2.

    Relative to the teacher's own length, because the residual stream grows with depth and a few positions are far
    longer than the others; so every layer and every token counts the same. No gradient goes to the teacher.

    Args:
        student_states: the residual stream after each of some layers, at least one.
        teacher_states: what it should be.
        wanted: which positions count.
    """
    return torch.stack(
        [_relative_error(*pair, wanted) for pair in zip(student_states, teacher_states, strict=True)]
    ).mean()


def _relative_error(
    student: Float[Tensor, "batch seq hidden"],
    teacher: Float[Tensor, "batch seq hidden"],
    wanted: Bool[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    wide = _wide(student)
    wished = teacher.detach()[wanted].to(wide)
    length = torch.linalg.vecdot(wished, wished).clamp_min(torch.finfo(wide).tiny)
    error = student[wanted].to(wide) - wished
    total: Tensor = (torch.linalg.vecdot(error, error) / length).sum()
    return total


def _sum_rows(logits: Tensor, wanted: Tensor, temperature: float, term: _Term) -> Float[Tensor, ""]:
    """Return the sum of T^2 ``term`` over the wanted rows of logits divided by T."""
    with_gradient = torch.is_grad_enabled() and logits.requires_grad
    total: Tensor = _RowSum.apply(logits, _places(wanted), temperature, term, with_gradient)  # type: ignore[no-untyped-call]
    return total


class _RowSum(torch.autograd.Function):
    """The sum of a term over rows. Its gradient is kept for these rows, in the logits' dtype, until it is asked for.

    Entries of a row's gradient are between -1 and 1 and most are tiny, so in float16 they are kept at the upper end of
    its range; what they are multiplied with comes afterwards, in float32.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, places: Tensor, temperature: float, term: _Term, with_gradient: bool
    ) -> Tensor:
        flat, wide = logits.detach().flatten(0, -2), _wide(logits)
        held = 2.0**15 if logits.dtype == torch.float16 else 1.0
        gradient = flat.new_empty((len(places) if with_gradient else 0, flat.shape[-1]))
        total = flat.new_zeros((), dtype=wide)
        for rows in _chunks(len(places), flat.shape[-1], flat.device):
            losses, slopes = term(_rows(flat, places[rows], wide, temperature), rows)
            total += losses.sum()
            if with_gradient:
                gradient[rows] = slopes if held == 1.0 else slopes.mul_(held)
        ctx.shape, ctx.factor = logits.shape, temperature / held
        ctx.save_for_backward(places, gradient)
        return total.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor, None, None, None, None]:
        places, gradient = ctx.saved_tensors
        factor = grad_total * ctx.factor
        full = gradient.new_zeros((ctx.shape[:-1].numel(), ctx.shape[-1]))
        for rows in _chunks(len(places), full.shape[-1], full.device):
            full[places[rows]] = (gradient[rows] * factor[None, None]).to(full.dtype)
        return full.view(ctx.shape), None, None, None, None


def _normalise(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return log sum exp of each row, and the softmax in the place of the scores, whose highest must be zero."""
    exponentials = scores.exp_()
    totals = exponentials.sum(-1, keepdim=True)
    return totals.log()[:, 0], exponentials.div_(totals)


def _split(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores of some ids, log sum exp of all others, and how these share it out, in the scores' place."""
    known = scores.gather(1, ids)
    others = scores.scatter_(1, ids, -torch.inf)
    highest = others.amax(-1, keepdim=True).clamp_min(torch.finfo(scores.dtype).min)
    shares = others.sub_(highest).exp_()
    totals = shares.sum(-1, keepdim=True)
    return known, highest + totals.log(), shares.div_(totals.clamp_min(torch.finfo(scores.dtype).tiny))


def _rows(flat: Tensor, places: Tensor, dtype: torch.dtype, temperature: float, keep: Tensor | None = None) -> Tensor:
    """Return some rows of logits in another dtype and divided by the temperature, always as a copy."""
    rows = flat.index_select(0, places)
    if keep is not None:
        rows = rows.index_select(1, keep)
    rows = rows.to(dtype)
    return rows if temperature == 1.0 else rows.div_(temperature)


def _places(wanted: Tensor) -> Tensor:
    """Return the places of the wanted positions among all positions, in row order."""
    return wanted.flatten().nonzero()[:, 0]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(num_rows: int, width: int, device: torch.device) -> list[slice]:
    """Return consecutive runs of rows that are not too large together."""
    size = max(1, (_ENTRIES_ON_CPU if device.type == "cpu" else _ENTRIES_ELSEWHERE) // max(1, width))
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]
