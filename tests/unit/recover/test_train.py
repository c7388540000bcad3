"""A whole training: its steps, its curve, its end, and going on after it was cut off."""

from __future__ import annotations

import gc
import json
import math
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback, integrations
from transformers.integrations import integration_utils

from secateur.errors import ConfigError, ExportError, RecoveryError
from secateur.families.loader import families
from secateur.progress import Task
from secateur.records.recovery import Recovery
from secateur.recover import forget
from secateur.recover.batch import TrainingBatch
from secateur.recover.checkpoints import Checkpoints
from secateur.recover.curve import Probe
from secateur.recover.examples import EpochOrder
from secateur.recover.schedule import learning_rate_factor
from secateur.recover.teacher import NextToken
from secateur.recover.train import FULL_LEARNING_RATE, LORA_LEARNING_RATE, check_training, learning_rate
from secateur.recover.trainer import RecoveryTrainer
from tests.command import environment
from tests.conftest import pico_model
from tests.training import (
    LLAMA,
    lessons,
    pico_student,
    run_training,
    spec,
    text_probe,
    told_probe,
    whole_batch,
)

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module", autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Keep the collector, which every training runs once, from looking through all that the tests have imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def weights(model: Any) -> Tensor:
    """Return all parameters as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Hitting:
    """``NextToken`` to which something happens at one of its calls."""

    name = "finetune"

    def __init__(self, call: int, happens: Callable[[Tensor], Tensor]) -> None:
        self._inner, self._call, self._happens, self._calls = NextToken(LLAMA), call, happens, 0

    def __call__(self, model: Any, batch: TrainingBatch) -> Tensor:
        """Return the loss, or what happens to it."""
        self._calls += 1
        loss = self._inner(model, batch)
        return self._happens(loss) if self._calls >= self._call else loss


class Listener:
    """A progress that keeps what it is told."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, int | None, str]] = []
        self.tokens = 0
        self.said: list[str] = []

    @contextmanager
    def __call__(self, label: str, total: int | None, unit: str) -> Iterator[Task]:
        """Note the task, of which this is the listener too."""
        self.tasks.append((label, total, unit))
        yield self

    def advance(self, amount: int) -> None:
        """Count."""
        self.tokens += amount

    def say(self, text: str) -> None:
        """Note."""
        self.said.append(text)


# -- steps -------------------------------------------------------------------------------------------------------------


def test_the_steps_are_those_of_adam_on_the_mean_over_learned_tokens(tmp_path: Path) -> None:
    """Against a loop written out: order, learning rates, clipping and decay."""
    options = spec(batch_size=4, epochs=1.5, weight_decay=0.1, warmup_ratio=0.3, max_grad_norm=0.5)
    model, recovery = run_training(tmp_path, options, model=pico_student(torch.float64))

    examples, reference = lessons(), pico_student(torch.float64)
    batch, objective = whole_batch(examples), NextToken(LLAMA)
    decayed = [p for name, p in reference.named_parameters() if "norm" not in name]
    others = [p for name, p in reference.named_parameters() if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    order = EpochOrder(12, seed=0)
    blocks = [*order]
    order.epoch = 1
    blocks += [*order]
    num_steps = math.ceil(1.5 * 3)
    assert recovery.steps == num_steps
    for step in range(num_steps):
        chosen = blocks[4 * step : 4 * step + 4]
        part = TrainingBatch(*(getattr(batch, name)[chosen] for name in TrainingBatch.__slots__))
        (objective(reference, part) / part.num_learned).backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * learning_rate_factor(step, num_steps, 0.3, "cosine")
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(weights(model), weights(reference), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_accumulation_gives_the_step_of_the_whole_batch(batch_size: int, tmp_path: Path) -> None:
    """Although the documents in its parts have different lengths; and the curve is the same."""
    whole, recovery = run_training(tmp_path / "whole", spec(batch_size=4), model=pico_student(torch.float64))
    options = spec(batch_size=batch_size, accumulation=4 // batch_size)
    parts, other = run_training(tmp_path / "parts", options, model=pico_student(torch.float64))
    torch.testing.assert_close(weights(parts), weights(whole), rtol=1e-9, atol=1e-12)
    assert [point.tokens for point in other.points] == [point.tokens for point in recovery.points]
    for point, wished in zip(other.points[1:], recovery.points[1:], strict=True):
        assert point.train_loss == pytest.approx(wished.train_loss)


def test_recomputed_activations_change_nothing(tmp_path: Path) -> None:
    """The same weights, and the model is as before afterwards."""
    plain, _ = run_training(tmp_path / "plain", spec(epochs=1))
    model, _ = run_training(tmp_path / "again", spec(epochs=1, gradient_checkpointing=True))
    torch.testing.assert_close(weights(model), weights(plain))
    assert not model.is_activation_checkpointing


def test_the_curve_counts_steps_epochs_and_tokens(tmp_path: Path) -> None:
    """And its losses are those that the probe and the objective had."""
    listener = Listener()
    model, recovery = run_training(tmp_path, spec(accumulation=2), progress=listener)
    examples = lessons()
    assert [point.step for point in recovery.points] == [0, 2, 3, 4, 6]
    assert [point.epoch for point in recovery.points] == pytest.approx([0, 2 / 3, 1, 4 / 3, 2])
    assert recovery.points[2].tokens == examples.num_tokens
    assert recovery.tokens == recovery.points[-1].tokens == listener.tokens == 2 * examples.num_tokens
    assert listener.tasks == [("train recovered", 2 * examples.num_tokens, "tokens")]
    assert listener.said[-1].startswith("loss ")
    assert recovery.points[0].train_loss is None
    assert recovery.best_step == 6
    assert recovery.best.losses == text_probe(examples)(model).losses
    assert recovery.points[-1].losses["medical"] < recovery.points[0].losses["medical"] - 0.5
    assert (recovery.name, recovery.objective, recovery.stopped) == ("recovered", "finetune", "end")
    assert recovery.text_fingerprint == examples.fingerprint
    assert recovery.trained_parameters == model.num_parameters()
    assert 0 < recovery.tokens / recovery.tokens_per_s < recovery.seconds


def test_a_training_says_nothing_on_the_console(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Only to its progress."""
    run_training(tmp_path, spec(lora=True, gradient_checkpointing=True))
    assert capfd.readouterr() == ("", "")


def test_the_optimizer_goes_with_its_training(tmp_path: Path) -> None:
    """What follows a training has the memory that its optimizer had."""
    run_training(tmp_path, spec())
    assert not [thing for thing in gc.get_objects() if isinstance(thing, torch.optim.Optimizer)]


def test_reporters_are_told_the_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of training with the learning rate, and those of every evaluation, by step."""
    told: dict[str, list[int]] = {}

    class Reporter(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            for name in logs:
                told.setdefault(name, []).append(state.global_step)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "neptune", Reporter)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: ["neptune"])
    run_training(tmp_path, spec(report_to=["neptune"]))
    assert told["validation/medical"] == [0, 3, 6, 9, 12]
    assert told["loss"] == told["learning_rate"] == [*range(1, 13)]


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True])
def test_the_model_comes_back_as_it_was_built(lora: bool, tmp_path: Path) -> None:
    """Same class, names, tie and settings; in evaluation mode and float32; and other weights."""
    model = pico_student(torch.bfloat16)
    model.lm_head.weight.requires_grad_(False)
    names, before, use_cache = list(model.state_dict()), weights(model).float(), model.config.use_cache
    trained, _ = run_training(tmp_path, spec(lora=lora), model=model)
    assert trained is model
    assert list(trained.state_dict()) == names
    assert trained.lm_head.weight is trained.model.embed_tokens.weight
    assert not trained.training
    assert trained.config.use_cache == use_cache
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert all(parameter.grad is None for parameter in trained.parameters())
    assert [n for n, p in trained.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]
    assert not torch.equal(weights(trained), before)


@pytest.mark.parametrize("lora", [False, True])
def test_training_that_never_helps_returns_the_untouched_weights(lora: bool, tmp_path: Path) -> None:
    """The untrained model counts as an evaluation."""
    before = weights(pico_student())
    model, recovery = run_training(tmp_path, spec(lora=lora, patience=None), probe=told_probe(1.0, 2.0, 3.0, 4.0, 5.0))
    assert recovery.best_step == 0
    assert recovery.stopped == "end"
    assert torch.equal(weights(model), before)


def test_the_best_weights_are_returned_and_not_the_last(tmp_path: Path) -> None:
    """Those of the evaluation with the least loss."""
    seen: list[Tensor] = []
    losses = iter([5.0, 4.0, 3.0, 4.0, 3.5])

    def probe(model: Any) -> Probe:
        seen.append(weights(model).clone())
        return Probe({"medical": next(losses), "other": 0.0}, {"exam": 0.25})

    model, recovery = run_training(tmp_path, spec(patience=None), probe=probe)
    assert recovery.best == recovery.points[2]
    assert recovery.best.accuracy == {"exam": 0.25}
    assert torch.equal(weights(model), seen[2])
    assert not torch.equal(weights(model), seen[-1])


def test_adapters_are_probed_as_they_will_be_merged(tmp_path: Path) -> None:
    """The best point's loss is that of the returned model; and few parameters were trained."""
    model, recovery = run_training(tmp_path, spec(lora={"rank": 2, "targets": ["q_proj"]}, learning_rate=0.02))
    assert recovery.best.losses["medical"] == pytest.approx(text_probe(lessons())(model).losses["medical"], abs=1e-5)
    assert recovery.points[-1].losses["medical"] < recovery.points[0].losses["medical"] - 0.1
    assert recovery.trained_parameters == 2 * 2 * (64 + 64)


# -- when it ends ------------------------------------------------------------------------------------------------------


def test_a_model_that_reaches_the_target_at_once_is_not_trained(tmp_path: Path) -> None:
    """Its weights are untouched and no token was seen."""
    before = weights(pico_student())
    model, recovery = run_training(tmp_path, probe=told_probe(1.0), target=1.0)
    assert (recovery.stopped, recovery.steps, recovery.tokens, recovery.tokens_per_s) == ("recovered", 0, 0, 0.0)
    assert torch.equal(weights(model), before)


def test_a_training_stops_at_the_first_evaluation_that_reaches_the_target(tmp_path: Path) -> None:
    """And goes no further."""
    _, recovery = run_training(tmp_path, probe=told_probe(3.0, 2.0, 0.9), target=1.0)
    assert (recovery.stopped, recovery.steps, recovery.best_step, recovery.target) == ("recovered", 6, 6, 1.0)


def test_a_training_that_overfits_stops_with_the_weights_before(tmp_path: Path) -> None:
    """After as many evaluations as it has patience."""
    _, recovery = run_training(tmp_path, spec(evaluations=6, patience=2), probe=told_probe(3.0, 1.0, 1.1, 1.2))
    assert (recovery.stopped, recovery.steps, recovery.best_step) == ("overfitting", 6, 2)


def test_probing_does_not_change_the_training(tmp_path: Path) -> None:
    """Neither random numbers that it draws nor the mode it leaves the model in; adapters drop out."""
    options = spec(lora={"dropout": 0.3}, epochs=1)
    inner = text_probe(lessons())

    def greedy(model: Any) -> Probe:
        assert not model.training
        torch.rand(7), random.random(), np.random.rand(3)
        return inner(model)

    plain, recovery = run_training(tmp_path / "plain", options)
    probed, other = run_training(tmp_path / "probed", options, probe=greedy)
    assert torch.equal(weights(probed), weights(plain))
    assert other.points == recovery.points


def test_the_seed_alone_decides_the_random_numbers(tmp_path: Path) -> None:
    """Those of the caller go on as they would have."""

    def train(name: str, seed: int) -> Tensor:
        return weights(run_training(tmp_path / name, spec(lora={"dropout": 0.3}, epochs=1, seed=seed))[0])

    torch.manual_seed(9)
    wished = torch.rand(3)
    torch.manual_seed(9)
    first = train("a", 0)
    assert torch.equal(torch.rand(3), wished)
    assert torch.equal(train("b", 0), first)
    assert not torch.equal(train("c", 1), first)


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", *sorted(n for n, f in families().items() if f.packing == "mask")])
def test_bfloat16_products_train_float32_weights(name: str, tmp_path: Path) -> None:
    """Also in families whose pieces are told apart by a mask; small steps are not lost."""
    family = families()[name]
    model = pico_model(family, torch.float32)
    before = weights(model)
    options = spec(precision="bfloat16", learning_rate=1e-4, epochs=1)
    examples = lessons()
    batch = whole_batch(examples)

    def probe(model: Any) -> Probe:
        with torch.inference_mode():
            return Probe({"medical": float(NextToken(family)(model, batch)) / batch.num_learned}, {})

    given = {"family": family, "objective": NextToken(family), "probe": probe}
    trained, recovery = run_training(tmp_path, options, model=model, **given)
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    moved = (weights(trained) - before).abs()
    assert 0 < float(moved.max()) < 1e-3
    assert recovery.points[-1].losses["medical"] < recovery.points[0].losses["medical"]


def test_options_that_cannot_be_had_are_refused_before_any_work(tmp_path: Path) -> None:
    """Formats, reporters and their packages."""
    for changes, message in (
        ({"precision": "float16"}, "runs on a CPU"),
        ({"report_to": ["tensorbord"]}, r"unknown recover.report_to 'tensorbord'. Did you mean 'tensorboard'"),
        ({"report_to": ["neptune"]}, r"neptune, whose package is not installed. Install it \(pip install neptune\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_training(spec(**changes), torch.device("cpu"))
        with pytest.raises(ConfigError, match=message):
            run_training(tmp_path, spec(**changes))
    assert not any(tmp_path.iterdir())


def test_adapters_have_a_higher_learning_rate_by_default() -> None:
    """And a rate that is named is taken."""
    assert learning_rate(spec(learning_rate=None)) == FULL_LEARNING_RATE
    assert learning_rate(spec(learning_rate=None, lora=True)) == LORA_LEARNING_RATE > FULL_LEARNING_RATE
    assert learning_rate(spec(learning_rate=0.5)) == 0.5


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_with_the_last_good_state(value: float, tmp_path: Path) -> None:
    """The step, the place and what to lower are named."""
    objective = Hitting(5, lambda loss: loss * value)
    with pytest.raises(RecoveryError, match=rf"training loss is {value} at step 5 of 12") as caught:
        run_training(tmp_path, objective=objective)
    kept = tmp_path / "checkpoint-3"
    assert f"after step 3, is kept in {kept}. Lower recover.learning_rate (now 0.002)" in str(caught.value)
    assert (kept / "complete.json").is_file()


def test_a_loss_that_explodes_stops(tmp_path: Path) -> None:
    """Within a few steps."""
    objective = Hitting(10, lambda loss: 10 * loss)
    with pytest.raises(RecoveryError, match=r"loss rose from .* at step 1\d of 24"):
        run_training(tmp_path, spec(epochs=4), objective=objective)


def test_a_probe_that_is_not_finite_stops(tmp_path: Path) -> None:
    """It is no evaluation, so it can be neither best nor a target reached."""
    with pytest.raises(
        RecoveryError, match=r"held-out text is nan at step 3 of 12\. The last good state, after step 0"
    ):
        run_training(tmp_path, probe=told_probe(1.0, math.nan))
    with pytest.raises(RecoveryError, match=r"held-out text is inf at step 0 of 12\. Lower"):
        run_training(tmp_path / "other", probe=told_probe(math.inf))


def test_memory_that_runs_out_is_said(tmp_path: Path) -> None:
    """With the present settings."""

    def too_large(loss: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(RecoveryError, match=r"recover.batch_size \(now 2\).*calibrate.block_size \(now 16\)"):
        run_training(tmp_path, objective=Hitting(3, too_large))


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By PyTorch's own writer."""

    def full(*_: Any) -> None:
        raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ExportError, match="the disk is full"):
        run_training(tmp_path)


# -- going on ----------------------------------------------------------------------------------------------------------


class CutOff(BaseException):
    """What stands for the end of the process."""


DROPPING = {"lora": {"dropout": 0.2}, "epochs": 2, "evaluations": 4}
"""Options of a training that draws random numbers at every step."""


def cut_off_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a training end after a step, before its evaluation."""
    end_step = RecoveryTrainer.end_step

    def cut(self: RecoveryTrainer, control: Any) -> None:
        if self.state.global_step == step:
            raise CutOff
        end_step(self, control)

    monkeypatch.setattr(RecoveryTrainer, "end_step", cut)


def cut_off_writing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a training end when a step's checkpoint has all its files but the last one."""
    complete = Checkpoints.complete

    def cut(self: Checkpoints, at: int, state: Any) -> None:
        if at == step:
            raise CutOff
        complete(self, at, state)

    monkeypatch.setattr(Checkpoints, "complete", cut)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tensor, Recovery]:
    """The weights and the curve of the training that was never cut off."""
    model, recovery = run_training(tmp_path_factory.mktemp("whole"), spec(**DROPPING))
    return weights(model), recovery


@pytest.mark.parametrize(
    ("cut", "step"),
    [(cut_off_at, 2), (cut_off_at, 8), (cut_off_at, 11), (cut_off_writing, 9), (cut_off_writing, 12)],
)
def test_a_training_that_was_cut_off_ends_as_if_it_had_not_been(
    cut: Callable[[int, pytest.MonkeyPatch], None],
    step: int,
    uninterrupted: tuple[Tensor, Recovery],
    tmp_path: Path,
) -> None:
    """Before the first evaluation, after one at an epoch's end, after one inside an epoch, and while writing."""
    wished, recovery = uninterrupted
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        cut(step, patch)
        run_training(tmp_path, spec(**DROPPING))
    model, other = run_training(tmp_path, spec(**DROPPING))
    assert torch.equal(weights(model), wished)
    assert other.points == recovery.points
    assert other.stopped == recovery.stopped


def test_going_on_does_not_begin_again(tmp_path: Path) -> None:
    """Only the evaluations and tokens after the last checkpoint are done once more."""
    options = spec(**DROPPING)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CutOff):
        cut_off_at(8, patch)
        run_training(tmp_path, options)
    asked: list[int] = []
    inner, listener = text_probe(lessons()), Listener()

    def probe(model: Any) -> Probe:
        asked.append(1)
        return inner(model)

    _, recovery = run_training(tmp_path, options, probe=probe, progress=listener)
    assert len(asked) == 2
    assert listener.tokens == recovery.tokens - recovery.points[2].tokens == listener.tasks[0][1]


def test_a_training_that_had_ended_is_returned_at_once(tmp_path: Path) -> None:
    """Until it is forgotten; one of another key is trained anew."""

    def never(model: Any) -> Probe:
        raise AssertionError("it was evaluated again")

    model, recovery = run_training(tmp_path)
    again, same = run_training(tmp_path, probe=never)
    assert same == recovery
    assert torch.equal(weights(again), weights(model))
    with pytest.raises(AssertionError):
        run_training(tmp_path, probe=never, key="another")
    run_training(tmp_path)
    forget(tmp_path)
    with pytest.raises(AssertionError):
        run_training(tmp_path, probe=never)


def test_at_most_the_newest_and_the_best_checkpoint_are_kept(tmp_path: Path) -> None:
    """The last needs no optimizer any more."""
    seen: list[list[str]] = []
    losses = iter([5.0, 1.0, 2.0, 3.0, 2.5])

    def probe(model: Any) -> Probe:
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        return Probe({"medical": next(losses)}, {})

    run_training(tmp_path, spec(patience=None), probe=probe)
    assert seen == [
        [],
        ["checkpoint-0"],
        ["checkpoint-3"],
        ["checkpoint-3", "checkpoint-6"],
        ["checkpoint-3", "checkpoint-9"],
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-12", "checkpoint-3"]
    files = {path.name for path in (tmp_path / "checkpoint-12").iterdir()}
    assert files == {"complete.json", "state.json", "weights.safetensors"}


# -- other processes ---------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from secateur.recover.checkpoints import Checkpoints
from secateur.recover.trainer import RecoveryTrainer
from tests.training import run_training, spec

torch.set_num_threads(1)
kind, method = (RecoveryTrainer, "end_step") if sys.argv[2] == "between" else (Checkpoints, "complete")
original = getattr(kind, method)

def kill(self, *arguments):
    step = self.state.global_step if kind is RecoveryTrainer else arguments[0]
    if step == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *arguments)

setattr(kind, method, kill)
run_training(Path(sys.argv[1]), spec(**{options!r}))
"""

SEVERAL = """
import json, os, sys
from pathlib import Path
import torch
from tests.training import pico_student, run_training, spec

torch.set_num_threads(1)
writes = []
os_replace = os.replace
os.replace = lambda source, target: (writes.append(str(target)), os_replace(source, target))[1]
model, recovery = run_training(Path(sys.argv[1]), spec(**{options!r}), model=pico_student(torch.float64))
if "RANK" in os.environ:
    total = float(sum(parameter.detach().abs().sum() for parameter in model.parameters()))
    answer = {{"total": total, "points": recovery.to_dict()["points"], "stopped": recovery.stopped, "writes": writes}}
    Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(answer))
"""


def run_script(*arguments: object, prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Return a finished interpreter that can import the tests."""
    path = f"{REPOSITORY / 'src'}:{REPOSITORY}"
    return subprocess.run(
        [sys.executable, *prefix, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=path),
        timeout=180,
    )


@pytest.mark.slow
@pytest.mark.parametrize(("moment", "step"), [("between", 8), ("writing", 9)])
def test_a_killed_process_costs_nothing_but_time(
    moment: str, step: int, uninterrupted: tuple[Tensor, Recovery], tmp_path: Path
) -> None:
    """SIGKILL between two checkpoints or in the middle of writing one: the same call ends with the same weights."""
    (tmp_path / "killed.py").write_text(KILLED.format(options=DROPPING))
    done = run_script(tmp_path / "killed.py", tmp_path / "parts", moment, step)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert any((tmp_path / "parts").iterdir())
    wished, recovery = uninterrupted
    model, other = run_training(tmp_path / "parts", spec(**DROPPING))
    torch.testing.assert_close(weights(model), wished)
    assert [point.step for point in other.points] == [point.step for point in recovery.points]


@pytest.mark.slow
def test_two_processes_train_as_one_with_twice_the_batch(tmp_path: Path) -> None:
    """They end alike and with the same weights, and only the main process writes."""
    options = {"batch_size": 1, "accumulation": 2, "precision": "float32"}
    (tmp_path / "several.py").write_text(SEVERAL.format(options=options))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = run_script(tmp_path / "several.py", tmp_path / "work", tmp_path, prefix=launcher)
    assert done.returncode == 0, done.stderr
    main, other = (json.loads((tmp_path / rank).read_text()) for rank in "01")
    model, recovery = run_training(
        tmp_path / "one", spec(**{**options, "batch_size": 2}), model=pico_student(torch.float64)
    )
    total = float(weights(model).abs().sum())
    assert main["total"] == pytest.approx(total, rel=1e-9)
    assert other["total"] == pytest.approx(total, rel=1e-9)
    assert main["points"] == other["points"]
    for point, wished in zip(main["points"], recovery.points, strict=True):
        assert point["losses"] == pytest.approx(wished.losses)
        assert point["tokens"] == wished.tokens
    assert main["stopped"] == other["stopped"] == "end"
    assert main["writes"]
    assert not other["writes"]
