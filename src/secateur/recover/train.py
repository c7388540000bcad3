"""A whole recovery training: prepared, resumed where one was cut off, and ended with the best weights it had.

It runs in one process or, started by ``accelerate launch``, in several: each holds a share of the batches, and with
FSDP or DeepSpeed of the weights.
"""

from __future__ import annotations

import copy
import gc
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ConfigError
from secateur.families.schema import Family
from secateur.progress import Progress, silent
from secateur.recipe import RecoverSpec
from secateur.records.recovery import Recovery
from secateur.recover.batch import Objective
from secateur.recover.checkpoints import Checkpoints
from secateur.recover.curve import Probe, best_step, evaluation_steps
from secateur.recover.examples import TrainingExamples
from secateur.recover.failures import explained
from secateur.recover.lora import add_lora, merge_lora, require_peft
from secateur.recover.precision import MixedPrecision, is_float64, mixed_precision, widen_
from secateur.recover.rng import preserved_rng
from secateur.registry import unknown_name
from secateur.store.artifacts import digest

FULL_LEARNING_RATE = 1e-4
"""Of all weights, where the recipe names none."""
LORA_LEARNING_RATE = 2e-4
"""Of adapters, where the recipe names none."""


def learning_rate(options: RecoverSpec) -> float:
    """Return the highest learning rate of a training."""
    if options.learning_rate is not None:
        return options.learning_rate
    return FULL_LEARNING_RATE if options.lora is None else LORA_LEARNING_RATE


def check_training(options: RecoverSpec, device: torch.device) -> None:
    """Raise what ``train`` would raise about its options, before a model is loaded.

    Raises:
        ConfigError: a package is missing, a reporter is unknown, or the device cannot compute in the precision.
    """
    mixed_precision(options.precision, device)
    if options.lora is not None:
        require_peft()
    _require_reporters(options.report_to)


def _require_reporters(names: Sequence[str]) -> None:
    if not names:
        return
    from transformers.integrations import get_available_reporting_integrations
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise ConfigError(unknown_name("recover.report_to", name, INTEGRATION_TO_CALLBACK))
        if name not in get_available_reporting_integrations():
            raise ConfigError(
                f"recover.report_to names {name}, whose package is not installed. Install it (pip install {name}), or "
                "remove it."
            )


def train(
    model: Any,
    examples: TrainingExamples,
    objective: Objective,
    options: RecoverSpec,
    *,
    family: Family,
    name: str,
    folder: Path,
    probe: Callable[[Any], Probe],
    domains: Sequence[str],
    target: float | None = None,
    key: str,
    progress: Progress = silent,
) -> tuple[Any, Recovery]:
    """Return the trained model with the best weights it had, in evaluation mode, and what it went through.

    It is evaluated before the first step, after the last, and ``options.evaluations`` times in all after the first;
    the best weights are those of the least mean loss over the domain's buckets, and may be the untrained ones. Called
    again after it was cut off, it goes on from the last evaluation, with the same result. When it had ended already,
    it returns the same at once, until ``forget`` deletes what it keeps in ``folder``.

    Args:
        model: a transformers causal language model, on its device. It is trained in place and is the result (with
            weights sharded over processes, a copy of it is). One in 16 bits comes back in float32.
        examples: the training text.
        objective: what is lowered, per learned token.
        options: how. ``batch_size`` is blocks per process and forward pass.
        family: of the model.
        name: of the trained model's row.
        folder: for checkpoints, this training's own, and the same for all processes. Each takes about 12 bytes per
            trained parameter, and there are at most three for a moment.
        probe: evaluates a model on held-out text; it must not change the model and is called on every process.
        domains: the buckets of ``probe``'s losses that count.
        target: ends the training at the first evaluation whose domain loss is at most this, in nats per token.
        key: identifies all that the training depends on: weights, text, objective, options. Checkpoints of another key
            or of another number of processes are deleted.
        progress: told about tokens.

    Raises:
        ConfigError: an option cannot be had here.
        RecoveryError: the training diverged, or memory ran out.
        ExportError: the disk is full.
    """
    device = next(model.parameters()).device
    check_training(options, device)
    precision = mixed_precision(options.precision, device)
    if is_float64(model) and options.precision == "auto":
        precision = "no"
    widen_(model)
    with explained(options, examples.block_size, folder), preserved_rng(), _on(device), _ready(model, options):
        trained = model if options.lora is None else add_lora(model, options.lora, family, options.seed)
        if options.gradient_checkpointing:
            _newest(model, "checkpointing_enable")({"use_reentrant": False})
        return _train(
            trained,
            examples,
            objective,
            options,
            precision=precision,
            name=name,
            folder=folder,
            key=key,
            probe=probe,
            domains=tuple(domains),
            target=target,
            progress=progress,
        )


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make a GPU the one that Trainer takes; of several processes each is given its own by accelerate."""
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    return torch.cuda.device(device) if device.type == "cuda" and alone else nullcontext()


@contextmanager
def _ready(model: Any, options: RecoverSpec) -> Iterator[None]:
    """Have all parameters trained; put this and other settings of the model back at the end."""
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    parameters = dict(model.named_parameters())
    use_cache = model.config.use_cache
    model.requires_grad_(True)
    try:
        yield
    finally:
        if options.gradient_checkpointing:
            _newest(model, "checkpointing_disable")()
        model.config.use_cache = use_cache
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
            parameter.grad = None


def _newest(model: Any, name: str) -> Callable[..., None]:
    """Return a method of transformers' models by its present name, or its former one."""
    method: Callable[..., None] = getattr(model, f"activation_{name}", None) or getattr(model, f"gradient_{name}")
    return method


def _train(
    model: Any,
    examples: TrainingExamples,
    objective: Objective,
    options: RecoverSpec,
    *,
    precision: MixedPrecision,
    name: str,
    folder: Path,
    key: str,
    probe: Callable[[Any], Probe],
    domains: tuple[str, ...],
    target: float | None,
    progress: Progress,
) -> tuple[Any, Recovery]:
    from secateur.recover.trainer import Course, RecoveryTrainer, Schedules, load_weights

    trained_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    args = _arguments(options, next(model.parameters()).device, precision, folder, name)
    checkpoints = Checkpoints(folder, digest(key, args.world_size))
    batches = math.ceil(math.ceil(examples.num_blocks / options.batch_size) / args.world_size)
    steps_per_epoch = math.ceil(batches / options.accumulation)
    num_steps = max(1, math.ceil(options.epochs * steps_per_epoch - 1e-9))
    args.max_steps, args.logging_steps = num_steps, max(1, num_steps // 100)
    schedules = Schedules(
        num_steps=num_steps,
        evaluations=evaluation_steps(num_steps, options.evaluations),
        learning_rate=options.schedule,
        warmup_ratio=options.warmup_ratio,
        target=target,
        patience=options.patience,
        domains=domains,
        seed=options.seed,
    )
    step = _from_main(checkpoints.resumable if args.process_index == 0 else lambda: None)
    course = Course() if step is None else Course.from_dict(checkpoints.read_state(step))
    left = round(examples.num_tokens * num_steps / steps_per_epoch) - course.tokens
    shown = progress if args.process_index == 0 else silent
    spare = None
    if course.stopped is None:
        with shown(f"train {name}", max(left, 1), "tokens") as task:
            trainer = RecoveryTrainer(
                model,
                objective,
                examples,
                args,
                schedules=schedules,
                course=course,
                checkpoints=checkpoints,
                probe=probe,
                task=task,
            )
            spare = copy.deepcopy(model).cpu() if trainer.sharded else None
            if step is None:
                trainer.start()
            if course.stopped is None:
                trainer.train(resume_from_checkpoint=str(checkpoints.place(step)) if step else None)
            _wait_for_everyone()
        del trainer
        gc.collect()  # it hangs in a cycle, and the optimizer's states with it
    best = best_step(course.points, domains)
    result = model if spare is None else spare
    load_weights(result, checkpoints.read_weights(best))
    _wait_for_everyone()  # before the caller may delete the checkpoints
    if options.lora is not None:
        result = merge_lora(result)
    assert course.stopped is not None
    last = course.points[-1]
    return result.eval(), Recovery(
        name=name,
        objective=objective.name,
        points=tuple(course.points),
        best_step=best,
        steps=last.step,
        tokens=last.tokens,
        epochs=last.epoch,
        stopped=course.stopped,
        target=target,
        seconds=course.seconds,
        tokens_per_s=last.tokens / course.training_s if course.training_s else 0.0,
        text_fingerprint=examples.fingerprint,
        trained_parameters=trained_parameters,
    )


def _arguments(options: RecoverSpec, device: torch.device, precision: MixedPrecision, folder: Path, name: str) -> Any:
    """Return transformers' settings; the number of steps is filled in when the number of processes is known."""
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        max_steps=1,
        learning_rate=learning_rate(options),
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        optim="adamw_torch_fused" if device.type in ("cpu", "cuda") else "adamw_torch",
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=device.type == "cpu",
        seed=options.seed,
        data_seed=options.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="steps" if options.report_to else "no",
        logging_nan_inf_filter=False,
        report_to=options.report_to or "none",
        run_name=name,
        disable_tqdm=True,
        log_level="passive",
        dataloader_num_workers=0,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        ddp_find_unused_parameters=_leaves_the_head_out(options),
    )
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for several processes, not for threads of this one
    _spread_on_cpus_too()
    return args


def _spread_on_cpus_too() -> None:
    """Let FSDP be had on CPUs where it was asked for; accelerate gives it only to processes that it takes for GPUs'.

    Otherwise every process would hold all weights without a word. Where the tensors are, another field says.
    """
    from accelerate import PartialState  # type: ignore[import-untyped]
    from accelerate.utils import DistributedType, parse_flag_from_env  # type: ignore[import-untyped]

    state = PartialState()
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def _leaves_the_head_out(options: RecoverSpec) -> bool:
    """Return whether the model's last parameters may get no gradient, which several processes must be told."""
    return options.method == "distill" and not (options.distill.logits_weight or options.distill.text_weight)


def _wait_for_everyone() -> None:
    from accelerate import PartialState

    PartialState().wait_for_everyone()


def _from_main(ask: Callable[[], int | None]) -> int | None:
    """Return the main process's answer on all processes."""
    from accelerate.utils import broadcast_object_list

    answer: int | None = broadcast_object_list([ask()])[0]
    return answer
