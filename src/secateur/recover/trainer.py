"""transformers' Trainer with our objective, order of blocks, schedule, evaluations and checkpoints.

What Trainer and accelerate do stays theirs: the loop, accumulation, clipping, mixed precision, several processes, and
the optimizer's and generators' part of a checkpoint. They are given the model inside a module whose forward is the
objective, so that an objective may call any part of the model: the wrappers of DDP, FSDP and DeepSpeed, and automatic
mixed precision, act where that forward begins and ends. It is thrown away afterwards and leaves nothing in the model.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import RecoveryError
from secateur.progress import Task, say
from secateur.records.recovery import CurvePoint, StopReason
from secateur.recover.batch import Objective, TrainingBatch
from secateur.recover.checkpoints import Checkpoints
from secateur.recover.curve import Probe, best_step, domain_loss, stop_reason
from secateur.recover.examples import EpochOrder, TrainingExamples, collate
from secateur.recover.monitor import LossMonitor
from secateur.recover.rng import preserved_rng
from secateur.recover.schedule import Schedule, learning_rate_factor

_CHECK_EVERY = {"cpu": 1}
"""Steps between looks at the loss; on other devices each look waits for the device."""
_CHECK_EVERY_ELSEWHERE = 8


@dataclass(frozen=True, slots=True)
class Schedules:
    """When what happens in a training.

    Attributes:
        num_steps: optimizer steps.
        evaluations: after which of them the model is evaluated.
        learning_rate: the shape of its course; ``warmup_ratio`` the share of the steps before its highest.
        target: the domain loss to reach; None for none.
        patience: evaluations without a new best, at a falling training loss, before it ends; None for no limit.
        domains: the buckets whose mean loss is the domain loss.
        seed: of the order of the blocks.
    """

    num_steps: int
    evaluations: frozenset[int]
    learning_rate: Schedule
    warmup_ratio: float
    target: float | None
    patience: int | None
    domains: tuple[str, ...]
    seed: int


@dataclass
class Course:
    """How far a training is, as far as the optimizer does not know; stored with every checkpoint.

    Attributes:
        points: its evaluations.
        monitor: watches the loss.
        tokens: training tokens seen.
        training_s: seconds spent on training steps; ``seconds`` with evaluations and checkpoints.
        stopped: why it ended; None while it has not.
    """

    points: list[CurvePoint] = field(default_factory=list)
    monitor: LossMonitor = field(default_factory=LossMonitor)
    tokens: int = 0
    training_s: float = 0.0
    seconds: float = 0.0
    stopped: StopReason | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        numbers = {name: getattr(self, name) for name in ("tokens", "training_s", "seconds", "stopped")}
        return {**numbers, "points": [asdict(point) for point in self.points], "monitor": self.monitor.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Course:
        """Return the course that ``to_dict`` wrote; what else is in ``data`` is passed over."""
        numbers = {name: data[name] for name in ("tokens", "training_s", "seconds", "stopped")}
        points = [CurvePoint(**point) for point in data["points"]]
        return cls(points, LossMonitor.from_dict(data["monitor"]), **numbers)


class ObjectiveModule(nn.Module):
    """A module whose forward is an objective of the model in it, or any other work with that model."""

    accepts_loss_kwargs = True

    def __init__(self, model: Any, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective.__call__  # bound, so that a teacher in it is not among the parameters

    @property
    def config(self) -> Any:
        """The model's configuration, which DeepSpeed reads sizes from."""
        return self.model.config

    @property
    def _no_split_modules(self) -> Any:
        """What FSDP wraps one by one."""
        return self.model._no_split_modules

    def forward(self, batch: dict[str, Tensor] | None = None, work: Callable[[Any], Any] | None = None) -> Any:
        """Return the objective's sum over a batch, or what ``work`` returns."""
        if work is not None:
            return work(self.model)
        assert batch is not None
        wanted = ("input_ids", "position_ids", "learned", "index")
        return self._objective(self.model, TrainingBatch(**{name: batch[name] for name in wanted}))


class RecoveryTrainer(Trainer):  # type: ignore[misc]  # transformers has no types
    """Trains a model inside an ``ObjectiveModule``.

    Args:
        model: the model; its parameters that require a gradient are trained.
        objective: what is lowered.
        examples: the training text.
        args: transformers' settings.
        schedules: ours.
        course: how far the training is already; it is kept up to date.
        checkpoints: where checkpoints go.
        probe: evaluates the model on held-out text.
        task: told about tokens.
    """

    def __init__(
        self,
        model: Any,
        objective: Objective,
        examples: TrainingExamples,
        args: TrainingArguments,
        *,
        schedules: Schedules,
        course: Course,
        checkpoints: Checkpoints,
        probe: Callable[[Any], Probe],
        task: Task,
    ) -> None:
        self._module = ObjectiveModule(model, objective)
        super().__init__(model=self._module, args=args, train_dataset=examples, data_collator=collate)
        self.remove_callback(PrinterCallback)
        self.add_callback(_Steps(self))
        self._names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._schedules, self._course, self._checkpoints = schedules, course, checkpoints
        self._probe, self._task = probe, task
        self._order = EpochOrder(examples.num_blocks, schedules.seed)
        self._check_every = _CHECK_EVERY.get(args.device.type, _CHECK_EVERY_ELSEWHERE)
        self._pending: list[Tensor] = []
        self._loss_since, self._learned_since = 0.0, 0.0
        self._begun = self._clock = time.perf_counter()

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over the processes, or held elsewhere, while training."""
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    def start(self) -> None:
        """Evaluate the untrained model and write its checkpoint, before anything else."""
        self._measure(0, 0.0, None)
        self._write_weights(0)
        self.complete_checkpoint(0)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """Return one step's batches, and the learned tokens in those of all processes."""
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        learned = torch.stack([batch["learned"].sum() for batch in samples]).sum().to(device)
        tokens = torch.stack([batch["num_tokens"].sum() for batch in samples]).sum().to(device)
        self._counts = [learned.float(), tokens.float()]
        self._loss_sum = torch.zeros((), device=device)
        return samples, self.accelerator.reduce(learned, "sum").clamp(min=1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        """Return the batch's part of the mean over all learned tokens of the step.

        Gradients are averaged over processes, so each one's part is multiplied by their number.
        """
        total = model(inputs)
        self._loss_sum += total.detach().float()
        return total * self.accelerator.num_processes / num_items_in_batch

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Make the schedule of the learning rate."""
        if self.lr_scheduler is None:
            plan = self._schedules

            def factor(step: int) -> float:
                return learning_rate_factor(step, num_training_steps, plan.warmup_ratio, plan.learning_rate)

            self.lr_scheduler: Any = LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return self._order

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the trained weights into the checkpoint that is being saved."""
        self._write_weights(self.state.global_step)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self._module.model, self._checkpoints.read_weights(self._course.points[-1].step))

    def begin_epoch(self, epoch: float) -> None:
        """Choose the order of the blocks; the next batches are of the epoch that ``epoch`` lies in."""
        self._order.epoch = int(epoch)

    def end_step(self, control: TrainerControl) -> None:
        """Note a step's loss, and evaluate the model where that is due."""
        step = self.state.global_step
        self._pending.append(torch.stack([self._loss_sum, *self._counts]))
        due = step in self._schedules.evaluations
        if due or len(self._pending) >= self._check_every:
            self._look(step)
        if not due:
            return
        self._course.training_s += time.perf_counter() - self._clock
        train_loss = self._loss_since / max(self._learned_since, 1.0)
        self._loss_since, self._learned_since = 0.0, 0.0
        self._measure(step, float(self.state.epoch), train_loss)
        if self._course.stopped is None:
            control.should_save = True
        else:
            control.should_training_stop = True
            self._write_weights(step)
            self.complete_checkpoint(step)

    def complete_checkpoint(self, step: int) -> None:
        """Mark the checkpoint of the present step as complete and delete those that are no longer needed."""
        self.accelerator.wait_for_everyone()
        best = best_step(self._course.points, self._schedules.domains)
        if self.args.should_save:
            self._checkpoints.complete(step, {**self._course.to_dict(), "best_step": best})
            self._checkpoints.keep_only({step, best})
        self._clock = time.perf_counter()

    def _look(self, step: int) -> None:
        """Read the losses of the last steps and stop if they went wrong; the same on all processes."""
        rows: list[list[float]] = self.accelerator.reduce(torch.stack(self._pending), "sum").tolist()
        self._pending = []
        for number, (loss_sum, learned, tokens) in enumerate(rows, step - len(rows) + 1):
            wrong = self._course.monitor.add(loss_sum / learned) if learned else None
            if wrong is not None:
                raise self._diverged(number, wrong)
            self._loss_since += loss_sum
            self._learned_since += learned
            self._course.tokens += round(tokens)
            self._task.advance(round(tokens))
        if self._learned_since:
            say(self._task, f"loss {self._loss_since / self._learned_since:.3f}")

    def _measure(self, step: int, epoch: float, train_loss: float | None) -> None:
        """Evaluate the model, add the point to the curve, and decide whether to stop."""
        self._module.eval()
        with preserved_rng():
            probe = self._agreed(self._inside(self._probe))
        self._module.train()
        course, plan = self._course, self._schedules
        loss = domain_loss(probe.losses, plan.domains)
        if not math.isfinite(loss):
            raise self._diverged(step, f"the loss on held-out text is {loss}")
        point = CurvePoint(step, epoch, course.tokens, train_loss, dict(probe.losses), dict(probe.accuracy))
        course.points.append(point)
        course.stopped = stop_reason(
            course.points, plan.domains, num_steps=plan.num_steps, target=plan.target, patience=plan.patience
        )
        now = time.perf_counter()
        course.seconds, self._begun = course.seconds + now - self._begun, now
        if self.args.report_to:
            self._report(probe)

    def _report(self, probe: Probe) -> None:
        """Tell the reporters what an evaluation found; the training loss that may be due stays due."""
        due = self.control.should_log
        losses = {f"validation/{bucket}": value for bucket, value in probe.losses.items()}
        self.log({**losses, **{f"accuracy/{name}": value for name, value in probe.accuracy.items()}})
        self.control.should_log = due

    def _inside(self, work: Callable[[Any], Any]) -> Any:
        """Return what ``work`` returns for the model, within the wrappers where its weights are only whole there."""
        if self.sharded and self.is_in_train:
            return self.model_wrapped(work=work)
        return work(self._module.model)

    def _agreed(self, probe: Probe) -> Probe:
        """Return the main process's evaluation: rounding may differ, and all must decide alike."""
        if self.accelerator.num_processes == 1:
            return probe
        from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]

        agreed: Probe = broadcast_object_list([probe])[0]
        return agreed

    def _write_weights(self, step: int) -> None:
        weights = self._weights()
        if self.args.should_save:
            self._checkpoints.write_weights(step, weights)

    def _weights(self) -> dict[str, Tensor]:
        """Return the trained parameters, whole; only on the main process where they are sharded."""
        if self.sharded and self.is_in_train:
            state = self.accelerator.get_state_dict(self.model_wrapped)
            return {name: state[f"model.{name}"] for name in self._names if f"model.{name}" in state}
        parameters = dict(self._module.model.named_parameters())
        return {name: parameters[name].detach() for name in self._names}

    def _diverged(self, step: int, what: str) -> RecoveryError:
        points, plan = self._course.points, self._schedules
        kept = ""
        if points:
            best = best_step(points, plan.domains)
            kept = f" The last good state, after step {best}, is kept in {self._checkpoints.place(best)}."
        return RecoveryError(
            f"{what} at step {step} of {plan.num_steps}.{kept} Lower recover.learning_rate (now "
            f"{self.args.learning_rate:g}); if that does not help, recover.max_grad_norm (now "
            f"{self.args.max_grad_norm:g}), or set recover.precision: float32."
        )


class _Steps(TrainerCallback):  # type: ignore[misc]  # transformers has no types
    """Tells the trainer where its loop is."""

    def __init__(self, trainer: RecoveryTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trainer.begin_epoch(state.epoch or 0.0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.end_step(control)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer.complete_checkpoint(state.global_step)


def load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights into a model's parameters of the same names, in place."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            parameters[name].copy_(weight)
