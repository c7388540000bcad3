"""Objectives on pico models, against the losses' formulas on the logits of whole batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.errors import CheckpointError, ConfigError
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.recipe import DistillSpec
from secateur.records.units import FFN_CHANNEL, GQA_GROUP
from secateur.recover import teacher as teacher_module
from secateur.recover.batch import Objective, TrainingBatch
from secateur.recover.examples import TrainingExamples
from secateur.recover.teacher import CachedDistillation, Distillation, NextToken, cache_teacher, matching_layers
from secateur.store.teacher_logits import TeacherLogits
from secateur.stream.forward import packed_inputs
from tests.blocks import hand_made_blocks
from tests.conftest import PICO_SIZES, geometry_of, pico_model
from tests.pruning import plan_keeping, prune

VOCAB = PICO_SIZES["vocab_size"]
KEEP = torch.cat([torch.arange(3), torch.arange(7, VOCAB, 3)])
"""The special tokens, and a third of the others."""
LLAMA = families()["llama"]


def examples_of(vocab_size: int = VOCAB) -> TrainingExamples:
    """Return the hand-made blocks; in each, learned are the predicted tokens at even places."""
    even = (torch.arange(16) % 2 == 0).expand(4, 16)
    return TrainingExamples([hand_made_blocks(vocab_size)], [even])


def batch_of(examples: TrainingExamples, blocks: Sequence[int] = (0, 1, 2, 3)) -> TrainingBatch:
    items = [examples[block] for block in blocks]
    return TrainingBatch(
        *(torch.stack([item[name] for item in items]) for name in ("input_ids", "position_ids", "learned", "index"))
    )


def student_of(model: Any, family: Family, *, tokens: Tensor | None = None, removed_layers: Sequence[int] = ()) -> Any:
    """Return the dense model without some token ids and layers."""
    geometry = geometry_of(model, family)
    kept = {
        kind: [[] if layer in removed_layers else list(range(axis.num_units)) for layer, axis in enumerate(axes)]
        for kind, axes in geometry.axes.items()
        if kind in (FFN_CHANNEL, GQA_GROUP)
    }
    ids = None if tokens is None else tokens.tolist()
    shape = "uneven" if removed_layers else "uniform"
    plan = plan_keeping(geometry, kept if removed_layers else {}, shape, tokens=ids)
    return copy.deepcopy(prune(model, plan, geometry))  # what is not cut is the dense model's own tensor


def nudge(model: nn.Module) -> Any:
    """Change every parameter a little, always in the same way."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return model


def whole_logits(model: Any, family: Family, batch: TrainingBatch, keep: Tensor | None = None) -> Tensor:
    ids = batch.input_ids if keep is None else keep[batch.input_ids]
    result: Tensor = model(**packed_inputs(ids, batch.position_ids, family, model)).logits
    return result if keep is None else result[..., keep]


def brute_kl(student: Tensor, teacher: Tensor, batch: TrainingBatch, temperature: float = 1.0) -> Tensor:
    rows = batch.learned[:, 1:]
    p, q = ((logits[:, :-1][rows] / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * (p.exp() * (p - q)).sum()


def brute_nll(logits: Tensor, batch: TrainingBatch) -> Tensor:
    rows = batch.learned[:, 1:]
    return nn.functional.cross_entropy(logits[:, :-1][rows], batch.input_ids[:, 1:][rows], reduction="sum")


def gradients(loss: Tensor, model: nn.Module) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return list(found)


def test_next_token_is_the_loss_of_learned_tokens(family: Family) -> None:
    """With the gradient of the plain formula, for packed text of every family."""
    model, batch = pico_model(family), batch_of(examples_of())
    objective: Objective = NextToken(family)
    found, expected = objective(model, batch), brute_nll(whole_logits(model, family, batch), batch)
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients(found, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(one, other)


def test_distillation_is_the_divergence_from_the_teacher(family: Family) -> None:
    """The teacher reads the dense ids, and its probability is shared out among the kept ones."""
    dense, batch = pico_model(family), batch_of(examples_of(len(KEEP)))
    student = nudge(student_of(dense, family, tokens=KEEP))
    found = Distillation(dense, family, DistillSpec(temperature=2.0), KEEP)(student, batch)
    expected = brute_kl(
        whole_logits(student, family, batch), whole_logits(dense, family, batch, KEEP).detach(), batch, 2.0
    )
    torch.testing.assert_close(found, expected)
    assert found.item() > 1e-3
    for one, other in zip(gradients(found, student), gradients(expected, student), strict=True):
        torch.testing.assert_close(one, other)


def test_the_dense_model_itself_has_nothing_to_learn(family: Family) -> None:
    """Nor has the dense model with rows of the vocabulary sliced out, in logits as in hidden states."""
    dense, spec = pico_model(family), DistillSpec(hidden_weight=1.0)
    for keep in (None, KEEP):
        student = student_of(dense, family, tokens=keep)
        batch = batch_of(examples_of(VOCAB if keep is None else len(KEEP)))
        loss = Distillation(dense, family, spec, keep)(student, batch)
        assert loss.item() == pytest.approx(0.0, abs=1e-9)
        assert max(float(gradient.abs().max()) for gradient in gradients(loss, student)) < 1e-9


def test_losses_are_added_with_their_weights() -> None:
    dense, batch = pico_model(LLAMA), batch_of(examples_of())
    student = nudge(student_of(dense, LLAMA))

    def loss(**weights: float) -> Tensor:
        names = ("logits_weight", "text_weight", "hidden_weight")
        spec = DistillSpec(**{name: weights.get(name, 0.0) for name in names})
        return Distillation(dense, LLAMA, spec)(student, batch).detach()

    parts = {"logits_weight": 0.5, "text_weight": 2.0, "hidden_weight": 3.0}
    torch.testing.assert_close(loss(**parts), sum(weight * loss(**{name: 1.0}) for name, weight in parts.items()))
    torch.testing.assert_close(loss(text_weight=1.0), NextToken(LLAMA)(student, batch).detach())


def test_the_teacher_is_never_changed() -> None:
    """It runs in evaluation mode and gets no gradient, and keeps what its parameters were set to."""
    dense, batch = pico_model(LLAMA, attention_dropout=0.5), batch_of(examples_of())
    student = nudge(student_of(dense, LLAMA))
    objective = Distillation(dense, LLAMA, DistillSpec(hidden_weight=1.0))
    before = [objective(student.eval(), batch) for _ in range(2)]
    dense.train()
    assert torch.equal(objective(student, batch), before[0])
    assert not dense.training
    objective(student.train(), batch).backward()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in dense.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not [hook for layer in dense.model.layers for hook in layer._forward_hooks]
    assert student.training


def streams(model: Any, family: Family, batch: TrainingBatch) -> list[Tensor]:
    """Return what leaves each layer."""
    seen: list[Tensor] = []
    with ExitStack() as stack, torch.no_grad():
        for layer in model.get_submodule(family.layers):
            handle = layer.register_forward_hook(
                lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
            )
            stack.callback(handle.remove)
        whole_logits(model, family, batch)
    return seen


def distance(student: Tensor, teacher: Tensor, batch: TrainingBatch) -> float:
    rows = batch.learned.roll(-1, 1)
    return float(((student - teacher)[rows].square().sum(-1) / teacher[rows].square().sum(-1)).sum())


def test_hidden_states_are_compared_as_they_leave_layers(family: Family) -> None:
    """Before any final norm, for a model's last layer as for the others."""
    dense, batch = pico_model(family), batch_of(examples_of())
    student = nudge(student_of(dense, family))
    pairs = zip(streams(student, family, batch), streams(dense, family, batch), strict=True)
    expected = sum(distance(*pair, batch) for pair in pairs) / 2
    spec = DistillSpec(logits_weight=0.0, hidden_weight=1.0)
    found = Distillation(dense, family, spec)(student, batch)
    assert found.item() == pytest.approx(expected)
    assert max(float(gradient.abs().max()) for gradient in gradients(found, student)) > 0


def test_a_removed_layers_work_is_asked_of_the_layer_before() -> None:
    dense, batch = pico_model(LLAMA, num_hidden_layers=4), batch_of(examples_of())
    student = student_of(dense, LLAMA, removed_layers=[1, 2])
    told, taught = streams(student, LLAMA, batch), streams(dense, LLAMA, batch)
    expected = (distance(told[0], taught[2], batch) + distance(told[1], taught[3], batch)) / 2
    spec = DistillSpec(logits_weight=0.0, hidden_weight=1.0)
    found = Distillation(dense, LLAMA, spec, kept_layers=[0, 3])(student, batch)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("kept", "num_layers", "expected"),
    [([0, 1, 2], 3, (0, 1, 2)), ([0, 3], 4, (2, 3)), ([1, 2], 5, (1, 4)), ([2], 4, (3,))],
)
def test_a_layer_before_a_gap_makes_up_for_it(kept: list[int], num_layers: int, expected: tuple[int, ...]) -> None:
    assert matching_layers(kept, num_layers) == expected


@pytest.mark.parametrize("removed", [[1], [2], [0, 2], [3]])
def test_layers_that_did_nothing_leave_nothing_to_learn(removed: list[int]) -> None:
    """Without layers that added nothing to the residual stream, hidden states and logits are the teacher's."""
    dense, batch = pico_model(LLAMA, num_hidden_layers=4), batch_of(examples_of())
    for layer in removed:
        nn.init.zeros_(dense.model.layers[layer].self_attn.o_proj.weight)
        nn.init.zeros_(dense.model.layers[layer].mlp.down_proj.weight)
    student = student_of(dense, LLAMA, removed_layers=removed)
    kept = [layer for layer in range(4) if layer not in removed]
    loss = Distillation(dense, LLAMA, DistillSpec(hidden_weight=1.0), kept_layers=kept)(student, batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-12)
    working = pico_model(LLAMA, num_hidden_layers=4)
    assert Distillation(working, LLAMA, DistillSpec(hidden_weight=1.0), kept_layers=kept)(student, batch) > 0.1


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_checkpointed_layers_learn_the_same(name: str, reentrant: bool) -> None:
    """Hidden states collected from layers that run twice have the gradient of those that run once."""
    family = families()[name]
    dense, batch = pico_model(family), batch_of(examples_of())
    student = nudge(student_of(dense, family))
    objective = Distillation(dense, family, DistillSpec(logits_weight=0.1, hidden_weight=1.0))
    student.enable_input_require_grads()

    def learnt() -> list[Tensor]:
        student.zero_grad()
        objective(student, batch).backward()  # reentrant checkpoints know no other way
        return [parameter.grad.clone() for parameter in student.parameters()]

    expected = learnt()
    student.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for one, other in zip(learnt(), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_adapters_learn_from_the_teacher_too() -> None:
    """Layers are found where peft wraps the model; only adapters get gradients."""
    peft = pytest.importorskip("peft")
    dense, batch = pico_model(LLAMA), batch_of(examples_of())
    student = nudge(student_of(dense, LLAMA))
    plain = Distillation(dense, LLAMA, DistillSpec(hidden_weight=1.0, text_weight=1.0))
    expected = plain(student, batch).detach()
    adapted = peft.get_peft_model(student, peft.LoraConfig(r=2, target_modules="all-linear")).double()
    found = plain(adapted, batch)
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    assert {name.split(".")[-2] for name, p in adapted.named_parameters() if p.grad is not None} == {"default"}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_cache_of_everything_is_the_teacher(tmp_path: Path, temperature: float) -> None:
    """In whatever order and company blocks come; float16 rounds the last digits."""
    dense, examples = pico_model(LLAMA), examples_of(len(KEEP))
    student = nudge(student_of(dense, LLAMA, tokens=KEEP))
    spec = DistillSpec(temperature=temperature, text_weight=0.5, cached_logits=VOCAB)
    online = Distillation(dense, LLAMA, spec, KEEP)
    cache = cache_teacher(dense, LLAMA, examples, KEEP, spec, tmp_path, "dense", batch_size=3)
    cached = CachedDistillation(LLAMA, spec, cache)
    assert cache.num_blocks == examples.num_blocks
    for blocks in ([2, 0, 3], [1], [3, 2, 1, 0]):
        batch = batch_of(examples, blocks)
        found, expected = cached(student, batch), online(student, batch)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)
        for one, other in zip(gradients(found, student), gradients(expected, student), strict=True):
            assert float((one - other).norm()) < 5e-3 * float(other.norm())


def test_a_cache_of_some_tokens_bounds_the_divergence(tmp_path: Path) -> None:
    dense, examples = pico_model(LLAMA), examples_of()
    student, batch = nudge(student_of(dense, LLAMA)), batch_of(examples)
    full = Distillation(dense, LLAMA, DistillSpec())(student, batch).item()
    bounds = []
    for k in (4, 32):
        spec = DistillSpec(cached_logits=k)
        cache = cache_teacher(dense, LLAMA, examples, None, spec, tmp_path / str(k), "dense")
        bounds.append(CachedDistillation(LLAMA, spec, cache)(student, batch).item())
    assert 0 < bounds[0] < bounds[1] < full * (1 + 1e-3)


class CountedModel:
    """A teacher that counts the blocks it reads, and stops working after some."""

    def __init__(self, model: Any, limit: int = 1000) -> None:
        self.model, self.limit, self.blocks = model, limit, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        """Run the model."""
        self.blocks += len(inputs["input_ids"])
        if self.blocks > self.limit:
            raise KeyboardInterrupt
        return self.model(**inputs)


def contents(cache: TeacherLogits) -> list[list[Any]]:
    found = [cache.load(block) for block in range(cache.num_blocks)]
    return [[block.values.tolist(), block.indices.tolist(), block.log_rest.tolist()] for block in found]


def test_a_stopped_cache_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks on disk are not run again, and the result is that of one go; a complete cache runs nothing."""
    monkeypatch.setattr(teacher_module, "_TOKENS_PER_FILE", 1)
    dense, examples, spec = pico_model(LLAMA), examples_of(), DistillSpec(cached_logits=5)

    def cache(model: Any, folder: str) -> TeacherLogits:
        return cache_teacher(model, LLAMA, examples, None, spec, tmp_path / folder, "dense", batch_size=1)

    whole = cache(dense, "whole")
    with pytest.raises(KeyboardInterrupt):
        cache(CountedModel(dense, limit=2), "stopped")
    going_on = CountedModel(dense)
    assert contents(cache(going_on, "stopped")) == contents(whole)
    assert going_on.blocks == 2
    idle = CountedModel(dense)
    assert contents(cache(idle, "stopped")) == contents(whole)
    assert idle.blocks == 0


@pytest.mark.parametrize("change", ["key", "k", "temperature", "vocabulary", "text"])
def test_a_cache_of_something_else_is_made_again(tmp_path: Path, change: str) -> None:
    dense, examples, spec = pico_model(LLAMA), examples_of(len(KEEP)), DistillSpec(cached_logits=5)
    arguments = {"examples": examples, "keep": KEEP, "spec": spec, "key": "dense"}
    cache_teacher(dense, LLAMA, folder=tmp_path, **arguments)
    arguments |= {
        "key": {"key": "other"},
        "k": {"spec": DistillSpec(cached_logits=6)},
        "temperature": {"spec": DistillSpec(cached_logits=5, temperature=2.0)},
        "vocabulary": {"keep": KEEP + 1 - (KEEP == VOCAB - 1).long()},
        "text": {"examples": TrainingExamples([hand_made_blocks(len(KEEP))])},
    }[change]
    again = CountedModel(dense)
    cache_teacher(again, LLAMA, folder=tmp_path, **arguments)
    assert again.blocks == examples.num_blocks


def test_a_cache_of_another_text_is_refused(tmp_path: Path) -> None:
    dense, spec = pico_model(LLAMA), DistillSpec(cached_logits=5)
    cache = cache_teacher(dense, LLAMA, examples_of(), None, spec, tmp_path, "dense")
    batch = batch_of(TrainingExamples([hand_made_blocks()]), [0])
    with pytest.raises(CheckpointError, match=r"of block 0, and \d+ are learned: it is of another text\. Delete it"):
        CachedDistillation(LLAMA, spec, cache)(dense, batch)


def test_a_teacher_with_broken_weights_is_refused(tmp_path: Path) -> None:
    dense = pico_model(LLAMA)
    nn.init.constant_(dense.lm_head.weight, torch.nan)
    with pytest.raises(CheckpointError, match="teacher's predictions are not finite on the training text"):
        cache_teacher(dense, LLAMA, examples_of(), None, DistillSpec(cached_logits=5), tmp_path, "dense")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_right_is_refused(tmp_path: Path) -> None:
    dense, spec, batch = pico_model(LLAMA), DistillSpec(), batch_of(examples_of(len(KEEP)))
    with pytest.raises(ConfigError, match=r"2 ids of a teacher that has 97, and some are not among these"):
        Distillation(dense, LLAMA, spec, torch.tensor([1, 97]))
    with pytest.raises(ConfigError, match=r"have layers \[0, 2\] of a teacher that has 2\. Give the teacher's layers"):
        Distillation(dense, LLAMA, spec, kept_layers=[0, 2])
    student = student_of(dense, LLAMA)
    with pytest.raises(ConfigError, match=r"student has 2 layers, and is said to have 1 of the teacher's"):
        Distillation(dense, LLAMA, DistillSpec(hidden_weight=1.0), kept_layers=[0])(student, batch)
    with pytest.raises(ConfigError, match=r"student has 97 token ids, and the teacher's predictions are for 33"):
        Distillation(dense, LLAMA, spec, KEEP)(student, batch)
    student.lm_head.weight = dense.lm_head.weight
    with pytest.raises(ConfigError, match=r"shares lm_head\.weight with its teacher, which would be trained with it"):
        Distillation(dense, LLAMA, spec)(student, batch)
    assert Distillation(dense, LLAMA, spec)(student.requires_grad_(False), batch) == 0
    with pytest.raises(ConfigError, match=r"hidden_weight is 1\.0, and cached logits say nothing about hidden states"):
        CachedDistillation(LLAMA, DistillSpec(hidden_weight=1.0), TeacherLogits(tmp_path, "key"))
    with pytest.raises(ConfigError, match=r"cached_logits is not set"):
        cache_teacher(dense, LLAMA, examples_of(), None, spec, tmp_path, "dense")


def test_a_cache_serves_a_training_in_mixed_precision(tmp_path: Path) -> None:
    """What is stored in float16 is read in the midst of bfloat16 autocast, and the loss is the same within rounding."""
    dense, examples, spec = pico_model(LLAMA, torch.float32), examples_of(), DistillSpec(cached_logits=8)
    cached = CachedDistillation(LLAMA, spec, cache_teacher(dense, LLAMA, examples, None, spec, tmp_path, "dense"))
    student, batch = nudge(copy.deepcopy(dense)), batch_of(examples)
    exact = float(cached(student, batch).detach())
    with torch.autocast("cpu", torch.bfloat16):
        assert float(cached(student, batch).detach()) == pytest.approx(exact, rel=0.05)
