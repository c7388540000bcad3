from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from secateur.records.top_classes import TopClasses
from secateur.recover import losses
from secateur.recover.losses import (
    distillation_loss,
    hidden_loss,
    next_token_loss,
    next_tokens,
    predicts,
    top_classes,
    top_k_distillation_loss,
)

BATCH, SEQ, VOCAB = 3, 5, 11
Loss = Callable[[Tensor], Tensor]


def random(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale


@pytest.fixture
def wanted() -> Tensor:
    """Some positions of every row, none of the last row."""
    mask = torch.rand(BATCH, SEQ, generator=torch.Generator().manual_seed(7)) < 0.6
    mask[-1] = False
    return mask


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(0, VOCAB, (BATCH, SEQ), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def student() -> Tensor:
    return random(BATCH, SEQ, VOCAB, seed=1)


@pytest.fixture
def teacher() -> Tensor:
    return random(BATCH, SEQ, VOCAB, seed=2)


def brute_kl(student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float = 1.0) -> Tensor:
    p, q = (logits.div(temperature).softmax(-1)[wanted] for logits in (teacher, student))
    return temperature**2 * (p * (p.log() - q.log())).sum()


def gradient(loss: Loss, logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_()
    (result,) = torch.autograd.grad(3.0 * loss(leaf), leaf)
    return result


def require_same(first: Loss, second: Loss, logits: Tensor) -> None:
    """Two losses agree in value and gradient."""
    torch.testing.assert_close(first(logits), second(logits))
    torch.testing.assert_close(gradient(first, logits), gradient(second, logits))


def test_positions_that_predict_are_one_before_the_learned_tokens() -> None:
    learned = torch.tensor([[False, True, True, False], [True, False, False, True]])
    assert predicts(learned).tolist() == [[True, True, False, False], [False, False, True, False]]
    assert next_tokens(torch.tensor([[5, 6, 7]])).tolist()[0][:2] == [6, 7]


def test_next_token_loss_is_the_cross_entropy(student: Tensor, targets: Tensor, wanted: Tensor) -> None:
    require_same(
        lambda logits: next_token_loss(logits, targets, wanted),
        lambda logits: torch.nn.functional.cross_entropy(logits[wanted], targets[wanted], reduction="sum"),
        student,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_distillation_loss_is_the_softened_divergence(
    student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float
) -> None:
    """Scaled by the squared temperature; no gradient goes to the teacher."""
    require_same(
        lambda logits: distillation_loss(logits, teacher.requires_grad_(), wanted, temperature),
        lambda logits: brute_kl(logits, teacher.detach(), wanted, temperature),
        student,
    )
    assert not distillation_loss(student, teacher.requires_grad_(), wanted).requires_grad


def test_the_teacher_is_renormalised_among_kept_ids(teacher: Tensor, wanted: Tensor) -> None:
    keep = torch.tensor([1, 2, 5, 9])
    require_same(
        lambda logits: distillation_loss(logits, teacher, wanted, 2.0, keep),
        lambda logits: brute_kl(logits, teacher[..., keep], wanted, 2.0),
        random(BATCH, SEQ, len(keep), seed=3),
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, VOCAB - 1])
def test_top_k_loss_is_the_divergence_of_classes(
    student: Tensor, teacher: Tensor, wanted: Tensor, k: int, temperature: float
) -> None:
    """The k likeliest tokens are a class each and all others are one."""
    known = teacher[wanted].topk(k, dim=-1).indices

    def classes(logits: Tensor) -> Tensor:
        probabilities = (logits[wanted] / temperature).softmax(-1)
        of_known = probabilities.gather(1, known)
        return torch.cat([of_known, 1 - of_known.sum(-1, keepdim=True)], 1)

    def brute(logits: Tensor) -> Tensor:
        p, q = classes(teacher), classes(logits)
        return temperature**2 * (p * (p.log() - q.log())).sum()

    cached = top_classes(teacher, wanted, k, temperature)
    require_same(lambda logits: top_k_distillation_loss(logits, cached, wanted, temperature), brute, student)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_loss_grows_with_k_up_to_the_full_divergence(
    student: Tensor, teacher: Tensor, wanted: Tensor, temperature: float
) -> None:
    full = distillation_loss(student, teacher, wanted, temperature)
    bounds = [
        float(top_k_distillation_loss(student, top_classes(teacher, wanted, k, temperature), wanted, temperature))
        for k in range(1, VOCAB + 1)
    ]
    assert all(smaller < larger for smaller, larger in pairwise(bounds[:-1]))
    assert 0 < bounds[0] < float(full)
    assert bounds[-2:] == pytest.approx([float(full)] * 2)  # a rest of one token is a token
    everything = top_classes(teacher, wanted, 2 * VOCAB, temperature)
    require_same(
        lambda logits: top_k_distillation_loss(logits, everything, wanted, temperature),
        lambda logits: distillation_loss(logits, teacher, wanted, temperature),
        student,
    )


def test_top_classes_are_the_likeliest_kept_ids_in_the_new_numbering(teacher: Tensor, wanted: Tensor) -> None:
    keep = torch.tensor([0, 3, 4, 8, 10])
    found = top_classes(teacher, wanted, 2, 2.0, keep)
    wished = (teacher[wanted][:, keep] / 2.0).softmax(-1)
    torch.testing.assert_close(wished.gather(1, found.indices), found.values.exp())
    torch.testing.assert_close(found.values.exp(), wished.topk(2).values)
    torch.testing.assert_close(found.log_rest.exp(), wished.topk(5).values[:, 2:].sum(-1))
    assert len(top_classes(teacher, torch.zeros_like(wanted), 2)) == 0


def test_gradients_are_derivatives(student: Tensor, teacher: Tensor, wanted: Tensor, targets: Tensor) -> None:
    leaf = student.requires_grad_()
    cached = top_classes(teacher, wanted, 3, 2.0)
    for loss in (
        lambda logits: next_token_loss(logits, targets, wanted),
        lambda logits: distillation_loss(logits, teacher, wanted, 2.0),
        lambda logits: top_k_distillation_loss(logits, cached, wanted, 2.0),
    ):
        assert torch.autograd.gradcheck(loss, leaf, fast_mode=True)
    states, wished = random(BATCH, SEQ, 4).requires_grad_(), random(BATCH, SEQ, 4, seed=5)
    assert torch.autograd.gradcheck(lambda state: hidden_loss([state, 2 * state], [wished, wished], wanted), states)


def test_chunks_do_not_matter(
    student: Tensor, teacher: Tensor, wanted: Tensor, targets: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def results() -> list[Tensor]:
        cached = top_classes(teacher, wanted, 3)
        chosen: list[Loss] = [
            lambda logits: next_token_loss(logits, targets, wanted),
            lambda logits: distillation_loss(logits, teacher, wanted, keep=torch.arange(VOCAB)),
            lambda logits: top_k_distillation_loss(logits, cached, wanted),
        ]
        return [result for loss in chosen for result in (loss(student), gradient(loss, student))]

    together = results()
    for entries in (1, 2 * VOCAB + 1):
        monkeypatch.setattr(losses, "_ENTRIES_ON_CPU", entries)
        for one, other in zip(results(), together, strict=True):
            torch.testing.assert_close(one, other)


def test_unlearned_positions_do_not_matter(student: Tensor, teacher: Tensor, wanted: Tensor, targets: Tensor) -> None:
    """Not even where they are not numbers; their gradient is zero."""
    spoilt = torch.where(wanted[..., None], student, torch.nan)
    other = torch.where(wanted[..., None], teacher, torch.nan)
    cached = top_classes(teacher, wanted, 3)
    assert torch.equal(top_classes(other, wanted, 3).values, cached.values)
    pairs: list[tuple[Loss, Loss]] = [
        (lambda logits: next_token_loss(logits, targets, wanted),) * 2,
        (
            lambda logits: distillation_loss(logits, other, wanted),
            lambda logits: distillation_loss(logits, teacher, wanted),
        ),
        (lambda logits: top_k_distillation_loss(logits, cached, wanted),) * 2,
    ]
    for loss, clean in pairs:
        assert torch.equal(loss(spoilt), clean(student))
        found = gradient(loss, spoilt)
        assert torch.equal(found, gradient(clean, student))
        assert not found[~wanted].any()
        assert found[wanted].abs().amax(-1).all()


def test_a_student_like_its_teacher_has_nothing_to_learn(teacher: Tensor, wanted: Tensor) -> None:
    """Exactly, for the full vocabulary and for the rows of kept ids, whatever constant is added to the logits."""
    keep = torch.tensor([0, 1, 4, 6, 7])
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        taught = teacher.to(dtype)
        for ids in (None, keep):
            told = taught if ids is None else taught[..., ids]
            assert distillation_loss(told, taught, wanted, 2.0, ids) == 0
            assert not gradient(
                lambda logits, ids=ids, taught=taught: distillation_loss(logits, taught, wanted, 2.0, ids), told
            ).any()
    shifted = distillation_loss(teacher.float() + 1000.0, teacher.float(), wanted)
    assert float(shifted) == pytest.approx(0.0, abs=1e-6)
    assert float(top_k_distillation_loss(teacher, top_classes(teacher, wanted, 3), wanted)) == pytest.approx(
        0.0, abs=1e-12
    )


def test_top_k_loss_scales_rounded_probabilities_to_one(student: Tensor, teacher: Tensor, wanted: Tensor) -> None:
    """So that the loss is a divergence, which is never negative."""
    exact = top_classes(teacher, wanted, 4)
    rounded = TopClasses(exact.values + 0.01, exact.indices.int(), exact.log_rest + 0.01)
    torch.testing.assert_close(
        top_k_distillation_loss(student, rounded, wanted), top_k_distillation_loss(student, exact, wanted)
    )


@pytest.mark.parametrize("gap", [200.0, -200.0])
def test_extreme_predictions_stay_finite(gap: float) -> None:
    """Probabilities that float32 cannot hold have logarithms all the same, whichever class they are of."""
    wanted = torch.ones(1, 1, dtype=torch.bool)
    logits = torch.tensor([[[gap, 0.0, 0.0, 0.0]]])
    half = torch.tensor([[0.5]]).log()
    taught = TopClasses(half, torch.tensor([[0]]), half[0])
    known, rest = (0.0, math.log(3) - gap) if gap > 0 else (gap - math.log(3), 0.0)
    expected = math.log(0.5) - (known + rest) / 2
    assert float(top_k_distillation_loss(logits, taught, wanted)) == pytest.approx(expected)
    found = gradient(lambda logits: top_k_distillation_loss(logits, taught, wanted), logits)
    assert found.sum(-1).abs().max() < 1e-6 and found.isfinite().all()
    unlikely = next_token_loss(logits, torch.tensor([[1 if gap > 0 else 0]]), wanted)
    assert float(unlikely) == pytest.approx(abs(gap) + (0.0 if gap > 0 else math.log(3)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_summed_in_float32(dtype: torch.dtype, wanted: Tensor) -> None:
    student, teacher = (random(BATCH, SEQ, 4096, seed=seed).to(dtype) for seed in (4, 5))
    found = distillation_loss(student, teacher, wanted)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), brute_kl(student.double(), teacher.double(), wanted), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gradients_are_rounded_once(dtype: torch.dtype, wanted: Tensor) -> None:
    """Also where they are smaller than float16 can hold, as long as what they are multiplied with makes up for it."""
    teacher = random(BATCH, SEQ, 4096, seed=4, scale=0.05).to(dtype)
    student = ((1 + 8 * torch.finfo(dtype).eps) * teacher.double()).to(dtype)
    scale = 2.0**20
    found = gradient(lambda logits: scale * distillation_loss(logits, teacher, wanted), student)
    exact = gradient(lambda logits: scale * brute_kl(logits, teacher.double(), wanted), student.double())
    assert found.dtype == dtype
    assert exact.abs().max() / scale < 2e-5
    assert float((found.double() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps


def test_without_gradients_none_is_made(student: Tensor, teacher: Tensor, wanted: Tensor) -> None:
    with torch.no_grad():
        assert not distillation_loss(student.requires_grad_(), teacher, wanted).requires_grad


def test_hidden_loss_is_relative_to_the_teacher_and_the_mean_over_layers(wanted: Tensor) -> None:
    student, teacher = ([random(BATCH, SEQ, 4, seed=seed + i) for i in range(2)] for seed in (10, 20))
    brute = sum(
        float((s[place] - t[place]).square().sum() / t[place].square().sum())
        for s, t in zip(student, teacher, strict=True)
        for place in zip(*wanted.nonzero(as_tuple=True), strict=True)
    )
    found = hidden_loss(student, teacher, wanted)
    assert float(found) == pytest.approx(brute / 2)
    larger = hidden_loss([10 * state for state in student], [10 * state for state in teacher], wanted)
    assert float(larger) == pytest.approx(brute / 2)
    assert hidden_loss(teacher, teacher, wanted) == 0
    assert hidden_loss([torch.zeros(1, 1, 4)], [torch.zeros(1, 1, 4)], torch.ones(1, 1, dtype=torch.bool)) == 0
