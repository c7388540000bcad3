"""Many runs of one recipe with parts of it changed, over one calibration and one measurement of the dense model.

Every trial is a run of its own in ``trials/<name>`` of the recipe's output, and gives what that run would have given
by itself. What several of them need (statistics, Gram matrices, gradients, token counts, rows of the dense model) is
made by the first that needs it, kept in ``shared``, and found there by the others.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.errors import CheckpointError, ConfigError, ExportError, SecateurError
from secateur.pipeline.job import inputs_key, refuse_impossible, run
from secateur.pipeline.recovery import FINETUNED, RECOVERED
from secateur.pipeline.shared import SharedStages
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, with_overrides
from secateur.records.evaluation import Evaluation
from secateur.records.plan import Plan
from secateur.store.artifacts import disk_errors, read_json, write_json
from secateur.store.run_folder import RunFolder

TRIALS, SHARED, RECORD = "trials", "shared", "trial.json"

Status = Literal["done", "failed", "skipped"]
Finish = Callable[["TrialResult"], None]


@dataclass(frozen=True, slots=True)
class Trial:
    """A recipe with parts of it changed.

    Attributes:
        name: of its folder, and in tables; letters, digits, ``_``, ``-`` and ``.``.
        overrides: dotted recipe keys and their values, such as ``{"prune.budget": {"channels": 0.2}}``.
    """

    name: str
    overrides: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What came of a trial.

    Attributes:
        trial: the trial.
        folder: its run folder.
        status: ``done``; ``failed`` with the reason in ``message``; ``skipped`` where the time was up before it began.
        message: why it failed or was skipped; empty where it is done.
        seconds: that it took when it was run.
        reused: whether all of it was there already.
        plan: what it cut; None where it is not done.
        evaluation: what was measured; None where it is not done.
        summary: one sentence.
    """

    trial: Trial
    folder: Path
    status: Status
    message: str
    seconds: float
    reused: bool
    plan: Plan | None
    evaluation: Evaluation | None
    summary: str


@dataclass(frozen=True, slots=True)
class Job:
    """A trial that was checked and may be run.

    Attributes:
        trial: the trial.
        recipe: the whole recipe of it.
        key: hash of everything that its results depend on.
        is_done: whether they are there.
    """

    trial: Trial
    recipe: Recipe
    key: str
    is_done: bool

    @property
    def folder(self) -> Path:
        """Its run folder."""
        return Path(self.recipe.output)


def run_trials(
    recipe: Recipe,
    trials: Sequence[Trial],
    *,
    progress: Progress = silent,
    max_time: float | None = None,
    keep_models: bool = False,
    on_result: Finish = lambda result: None,
) -> list[TrialResult]:
    """Run every trial that is not done yet, and return all of them in order.

    All trials are checked before the first one runs. One that fails while it runs does not stop the others, and is run
    again the next time. Nothing is exported: ``secateur run`` on the recipe in a trial's folder does that.

    Args:
        recipe: what all trials have in common; its output is the folder of them all.
        trials: with different names.
        progress: told about everything that takes time.
        max_time: seconds after which no further trial is started; those that are done already count as always.
        keep_models: whether the models stay; otherwise they are deleted once they have been measured.
        on_result: called after every trial.

    Raises:
        SecateurError: a trial can never work (the message names it); nothing has run then.
    """
    jobs = prepare(recipe, trials, keep_models=keep_models)
    return run_jobs(jobs, progress=progress, max_time=max_time, keep_models=keep_models, on_result=on_result)


def run_jobs(
    jobs: Sequence[Job],
    *,
    progress: Progress = silent,
    max_time: float | None = None,
    keep_models: bool = False,
    on_result: Finish = lambda result: None,
) -> list[TrialResult]:
    """Run trials that were prepared, one after the other; the arguments are those of ``run_trials``."""
    started = time.perf_counter()
    started_folder(jobs)
    results = []
    for number, job in enumerate(jobs, start=1):
        if not job.is_done and max_time is not None and time.perf_counter() - started >= max_time:
            result = skipped(job, f"not started: {max_time:g} seconds were over. The same command goes on with it.")
        else:
            result = run_job(job, named(progress, f"{number}/{len(jobs)} {job.trial.name}"), keep_models=keep_models)
        results.append(result)
        on_result(result)
    return results


def started_folder(jobs: Sequence[Job]) -> None:
    """Make the output of trials a folder that is known to be theirs."""
    for job in jobs[:1]:
        with disk_errors(job.folder):
            job.folder.parent.mkdir(parents=True, exist_ok=True)


def prepare(recipe: Recipe, trials: Sequence[Trial], *, keep_models: bool) -> list[Job]:
    """Return what is to be run, each trial with its whole recipe, after refusing what can never work.

    Args:
        recipe: what all trials have in common.
        trials: with different names.
        keep_models: whether a trial without its model counts as not done.

    Raises:
        SecateurError: a trial can never work (the message names it), or the output holds something else.
    """
    output = Path(recipe.output).expanduser()
    _require_own_folder(output)
    if not trials:
        raise ConfigError("there is nothing to run: the list of points is empty.")
    for trial in trials:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", trial.name):
            raise ConfigError(
                f"{trial.name!r} cannot be the name of a folder. Use letters, digits, '_', '-', '+' and '.' only."
            )
        if "output" in trial.overrides:
            raise ConfigError(f"{trial.name}: output is where all points go together; set it outside of them.")
    names = [trial.name.lower() for trial in trials]  # some file systems do not tell A from a
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two points are called {name}, and each has its own folder. Give them different names.")
    return [_prepared(recipe, trial, output, keep_models) for trial in trials]


def _require_own_folder(output: Path) -> None:
    if output.is_dir() and any(output.iterdir()) and not (output / TRIALS).is_dir():
        first = sorted(item.name for item in output.iterdir())[0]
        raise ExportError(
            f"output folder {output} is not empty and holds no {TRIALS} (it holds {first}). Choose another output, or "
            "empty it."
        )


def _prepared(recipe: Recipe, trial: Trial, output: Path, keep_models: bool) -> Job:
    try:
        folder = output / TRIALS / trial.name
        whole = with_overrides(recipe, {**trial.overrides, "output": str(folder)})
        key = inputs_key(whole)
        is_done = _is_done(folder, key, keep_models)
        if not is_done:
            refuse_impossible(whole)
    except SecateurError as error:
        raise type(error)(f"point {trial.name} cannot be run: {error}") from None
    return Job(trial, whole, key, is_done)


def _is_done(folder: Path, key: str, keep_models: bool) -> bool:
    if not all((folder / name).is_file() for name in (RECORD, "plan.json", "evaluation.json")):
        return False
    record = read_json(folder / RECORD)
    return record["key"] == key and record["status"] == "done" and (not keep_models or (folder / "model").is_dir())


def run_job(job: Job, progress: Progress = silent, *, keep_models: bool = False) -> TrialResult:
    """Return what comes of a trial; what goes wrong in it is recorded and said in the result.

    Args:
        job: as ``prepare`` gave it.
        progress: told about everything that takes time.
        keep_models: whether the model stays once it has been measured.
    """
    if job.is_done:
        return read_trial(job)
    RunFolder.open(job.folder).save()  # makes the folder one that may hold results
    started = time.perf_counter()
    summary, message = "", ""
    try:
        shared = SharedStages(job.folder.parent.parent / SHARED)
        summary = run(job.recipe, until="evaluate", progress=progress, shared=shared).summary
        if not keep_models:
            drop_models(job.folder)
    except Exception as error:
        message = str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"
    record = {
        "name": job.trial.name,
        "overrides": dict(job.trial.overrides),
        "key": job.key,
        "status": "failed" if message else "done",
        "message": message,
        "seconds": round(time.perf_counter() - started, 3),
        "summary": summary,
    }
    write_json(job.folder / RECORD, record)
    return _result(job, record, reused=False)


def read_trial(job: Job) -> TrialResult:
    """Return what came of a trial that is done.

    Raises:
        CheckpointError: a file of it is broken; the message says which.
    """
    return _result(job, read_json(job.folder / RECORD), reused=True)


def skipped(job: Job, message: str) -> TrialResult:
    """Return what stands for a trial that is not run."""
    return TrialResult(job.trial, job.folder, "skipped", message, 0.0, False, None, None, "")


def _result(job: Job, record: Mapping[str, Any], *, reused: bool) -> TrialResult:
    status, plan, evaluation = record["status"], None, None
    if status == "done":
        plan = _read(job.folder / "plan.json", Plan.from_dict)
        evaluation = _read(job.folder / "evaluation.json", Evaluation.from_dict)
    seconds, summary = record["seconds"], record["summary"]
    return TrialResult(job.trial, job.folder, status, record["message"], seconds, reused, plan, evaluation, summary)


def _read(file: Path, parse: Callable[[Mapping[str, Any]], Any]) -> Any:
    try:
        return parse(read_json(file))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not what secateur wrote: {error!r}. Delete it; the same command makes it again."
        ) from None


def drop_models(folder: Path) -> None:
    """Delete the models of a trial; its plan stays, and ``secateur run`` on its recipe makes them again."""
    for name in ("model", RECOVERED, f"recovery/{FINETUNED}", "recovery/teacher", "rounds"):
        shutil.rmtree(folder / name, ignore_errors=True)


def named(progress: Progress, name: str) -> Progress:
    """Return progress whose labels begin with a name."""
    return lambda label, total, unit: progress(f"{name}: {label}", total, unit)
