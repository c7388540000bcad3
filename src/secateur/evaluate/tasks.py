"""Tasks of the lm-evaluation-harness on a model in memory; the harness is an optional package.

Source: the harness's Python interface, ``lm_eval.simple_evaluate`` with ``lm_eval.models.huggingface.HFLM``
(EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness, docs/interface.md). Its numbers are taken as they are;
what is added is the number of each document, for paired comparisons.
"""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch

from secateur.errors import ConfigError, UnavailableError
from secateur.progress import Progress, Task, silent
from secateur.recipe import TasksSpec
from secateur.records.tasks import TaskMetric, TaskScore
from secateur.registry import unknown_name
from secateur.store.artifacts import digest

HOW_TO_INSTALL = "pip install 'secateur[tasks]'"
SEED = 1234
"""Of the choice of few-shot examples and of everything else that is drawn; the harness's own default."""

_BOOTSTRAPS = 1000
"""Draws for the standard error of what is not a mean."""


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Leave the process's random numbers as they were: the harness seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def harness_version() -> str:
    """Return the version of the harness.

    Raises:
        UnavailableError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UnavailableError(
            f"evaluate.tasks needs the lm-evaluation-harness, and lm_eval is not installed. Install it: "
            f"{HOW_TO_INSTALL}, or leave evaluate.tasks out."
        )
    return importlib.metadata.version("lm_eval")


def load_tasks(spec: TasksSpec) -> Any:
    """Return the harness's manager of tasks, once every task asked for was found and its data could be read.

    The folder in ``include_path`` is looked at first and alone, because the list of the harness's own tasks takes long
    to read; what was loaded once in a process is not loaded again.

    Raises:
        UnavailableError: the harness is not installed, or a task's data could not be had.
        ConfigError: the folder does not exist, a task is not known, or it needs what is not done here.
    """
    harness_version()
    return _loaded(tuple(spec.names), _folder(spec))


@lru_cache(maxsize=1)
@_same_random_numbers()
def _loaded(names: tuple[str, ...], folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    with _quiet():
        manager = TaskManager(include_path=str(folder), include_defaults=False) if folder else None
        if manager is None or not set(names) <= set(manager.all_tasks):
            manager = TaskManager(include_path=str(folder) if folder else None)
    for name in names:
        if name not in manager.all_tasks:
            raise ConfigError(_unknown_task(name, manager.all_tasks, folder))
    for name in names:
        try:
            with _quiet():
                loaded = _tasks_of(name, manager)
        except Exception as error:  # a task's own code and data may fail with anything
            raise UnavailableError(
                f"task {name} cannot be loaded: {type(error).__name__}: {_one_line(error)} Check its data: paths in a "
                "task file count from the folder that the command runs in; data from a hub need a connection."
            ) from None
        for task in loaded:
            _require_runnable(name, task)
    return manager


@_same_random_numbers()
def run_tasks(
    model: Any,
    tokenizer: Any,
    spec: TasksSpec,
    manager: Any,
    *,
    progress: Progress = silent,
    label: str = "run tasks",
) -> dict[str, TaskScore]:
    """Return how a model does on the tasks, and on all tasks of the groups asked for, by name.

    Random numbers of the process are as before afterwards, and so is the tokenizer.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        spec: names of the tasks, examples before each question, and how many documents are asked.
        manager: what ``load_tasks`` returned.
        progress: told about the model's answers.
        label: of the task, for progress.

    Raises:
        ConfigError: the harness refuses or fails; what it says is in the message.
    """
    from lm_eval import simple_evaluate

    with _quiet() as aloud:
        asked = _language_model(model, tokenizer, spec.batch_size, lambda n: progress(label, n, "answers"), aloud)
        try:
            found = simple_evaluate(
                model=asked,
                tasks=list(spec.names),
                num_fewshot=spec.num_fewshot,
                batch_size=spec.batch_size,
                limit=spec.limit,
                bootstrap_iters=_BOOTSTRAPS,
                log_samples=True,
                task_manager=manager,
                random_seed=SEED,
                numpy_random_seed=SEED,
                torch_random_seed=SEED,
                fewshot_random_seed=SEED,
            )
        except (ValueError, TypeError, KeyError, AssertionError, ImportError) as error:
            raise ConfigError(
                f"the lm-evaluation-harness cannot run {', '.join(spec.names)}: {type(error).__name__}: "
                f"{_one_line(error)} Check the task, or leave it out of evaluate.tasks.names."
            ) from error
    return read_results(found)


def read_results(found: Mapping[str, Any]) -> dict[str, TaskScore]:
    """Return what ``lm_eval.simple_evaluate`` gave as scores by task, without groups that have no numbers."""
    scores = {}
    for task, numbers in found["results"].items():
        samples = found.get("samples", {}).get(task, [])
        better = found.get("higher_is_better", {}).get(task) or {}
        metrics = tuple(_metrics(numbers, samples, better))
        if metrics:
            shots = found.get("n-shot", {}).get(task)
            scores[task] = TaskScore(
                task=task,
                version=_version(found.get("versions", {}).get(task)),
                num_fewshot=shots if isinstance(shots, int) else None,
                num_samples=_num_samples(found, task, samples),
                fingerprint=_fingerprint(samples),
                metrics=metrics,
                is_group=not samples,
            )
    return scores


def _metrics(
    numbers: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], better: Mapping[str, Any]
) -> Iterator[TaskMetric]:
    for key, value in numbers.items():
        name, comma, filter_name = key.partition(",")
        if not comma or name.endswith("_stderr") or not _is_number(value):
            continue
        stderr = numbers.get(f"{name}_stderr,{filter_name}")
        yield TaskMetric(
            name=name,
            filter=filter_name,
            value=float(value),
            stderr=float(stderr) if _is_number(stderr) else None,
            higher_is_better=better[name] if isinstance(better.get(name), bool) else None,
            samples=_per_document(name, filter_name, float(value), samples),
        )


def _per_document(name: str, filter_name: str, value: float, samples: Sequence[Mapping[str, Any]]) -> tuple[float, ...]:
    """Return the number of each document in their order, where the metric is their mean."""
    mine = [one for one in samples if one.get("filter", "none") == filter_name]
    values = [one.get(name) for one in sorted(mine, key=lambda one: int(one["doc_id"]))]
    plain = tuple(float(one) for one in values if _is_number(one))
    if not plain or len(plain) < len(values):
        return ()
    return plain if math.isclose(math.fsum(plain) / len(plain), value, rel_tol=1e-9, abs_tol=1e-9) else ()


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, bool | int | float | np.number | np.bool_) and math.isfinite(value)


def _num_samples(found: Mapping[str, Any], task: str, samples: Sequence[Mapping[str, Any]]) -> int:
    """Return how many documents were asked; for a group those of its tasks."""
    counted = found.get("n-samples", {}).get(task, {}).get("effective")
    if counted is not None:
        return int(counted)
    below = found.get("group_subtasks", {}).get(task, ())
    return len({one["doc_id"] for one in samples}) or sum(
        _num_samples(found, name, found.get("samples", {}).get(name, [])) for name in below
    )


def _fingerprint(samples: Sequence[Mapping[str, Any]]) -> str:
    hashes = ("doc_hash", "prompt_hash", "target_hash")
    asked = {(int(one["doc_id"]), *(str(one.get(name)) for name in hashes)) for one in samples}
    return digest(sorted(asked)) if asked else ""


def _version(version: object) -> str:
    return "" if version in (None, "N/A", "Yaml") else str(version)


def _folder(spec: TasksSpec) -> Path | None:
    if spec.include_path is None:
        return None
    folder = Path(spec.include_path).expanduser().absolute()
    if not folder.is_dir():
        raise ConfigError(
            f"evaluate.tasks.include_path: {spec.include_path} is not a folder. Give the folder of your task files."
        )
    return folder


def _unknown_task(name: str, known: Sequence[str], folder: Path | None) -> str:
    """Return the message for a task that is not known; the harness has thousands, so only near ones are named."""
    import difflib

    near = difflib.get_close_matches(name, known, n=5)
    if len(known) <= 20:
        return f"evaluate.tasks.names: {unknown_name('task', name, known)}"
    hint = f" Near names: {', '.join(near)}." if near else ""
    where = f" and in {folder}" if folder else "; for your own task files set evaluate.tasks.include_path"
    return (
        f"evaluate.tasks.names: unknown task {name!r}.{hint} Looked among the {len(known):,} tasks of the harness"
        f"{where}. List them with `lm-eval ls tasks`."
    )


def _tasks_of(name: str, manager: Any) -> list[Any]:
    """Return the task of a name, or all tasks of a group, with their data."""
    if hasattr(manager, "load"):
        return list(manager.load([name])["tasks"].values())
    from lm_eval.tasks import get_task_dict  # before there was ``load``

    return list(_leaves(get_task_dict([name], manager)))


def _leaves(loaded: object) -> Iterator[Any]:
    """Yield the tasks in what the harness loads: mappings of names or groups to tasks or mappings."""
    if isinstance(loaded, Mapping):
        for inner in loaded.values():
            yield from _leaves(inner)
    elif loaded is not None:
        yield loaded


def _require_runnable(name: str, task: Any) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"task {name} runs code that a model writes, which secateur does not do. Leave it out.")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"task {name} shows pictures, and only language models are measured here. Leave it out.")


def _language_model(
    model: Any, tokenizer: Any, batch_size: int, show: Callable[[int], AbstractContextManager[Task]], aloud: Any
) -> Any:
    """Return the model as the harness takes it: it draws no bars, and ``show`` tells what is done instead."""
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):  # type: ignore[misc]
        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return self._shown(super().generate_until, requests)

        def get_model_info(self) -> dict[str, Any]:
            return {}  # the harness's own asks the hub

        def _model_call(self, inps: Any, *others: Any, **named: Any) -> Any:
            found = super()._model_call(inps, *others, **named)
            self._advance(len(inps))
            return found

        def _model_generate(self, context: Any, *others: Any, **named: Any) -> Any:
            found = super()._model_generate(context, *others, **named)
            self._advance(len(context))
            return found

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, *others: Any, **named: Any) -> Any:
            return super()._loglikelihood_tokens(requests, True, *others, **named)

        def _advance(self, number: int) -> None:
            told = min(number, self._left)
            self._task.advance(told)
            self._left -= told

        def _shown(self, answer: Any, requests: Any) -> Any:
            self._left = len(requests)
            with aloud(), show(self._left) as self._task:
                return answer(requests, disable_tqdm=True)

    # the harness gives the tokenizer a padding token
    return Quiet(pretrained=model, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)


@contextmanager
def _quiet() -> Iterator[Any]:
    """Keep the harness's bars, prints, log and warnings off the terminal; gives a context in which we are heard."""
    stdout, stderr = sys.stdout, sys.stderr

    @contextmanager
    def aloud() -> Iterator[None]:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            yield

    log = logging.getLogger("lm_eval")
    level, alone = log.level, os.environ.get("DISABLE_MULTIPROC")
    log.setLevel(logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstraps without a pool of processes
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield aloud
    finally:
        log.setLevel(level)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300].rstrip(".") + "."
