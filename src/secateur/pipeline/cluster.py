"""Trials spread over a Ray cluster, each a task with the processors it asks for; results are those of one machine.

The first trial runs alone, so that what all of them need is made once. Every machine must see the same files under the
same paths: the model, the corpora and the output. Threads are as many as the processors of a task, so sums of floats
come out as in a run by itself with that many threads.

A trial whose worker was lost (killed, out of memory, or with its machine) begins again, on any worker, and goes on in
its folder after the stages that were finished there. We count attempts ourselves and let Ray make none, because Ray
tries tasks that ran out of memory again without end. An error within a trial is no lost worker, and is not tried again.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import ConfigError, UnavailableError
from secateur.pipeline.trials import Finish, Job, TrialResult, read_trial, run_job, skipped, started_folder
from secateur.progress import Progress, silent

HOW_TO_INSTALL = "pip install 'secateur[ray]'"

MOST_ATTEMPTS = 3
"""How often a trial is begun whose worker or machine is lost each time."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where trials run.

    Attributes:
        address: of a running cluster, ``auto`` for the one of this machine; None starts one here for the time being.
        cpus: processors of every trial; ``gpus`` its share of accelerators.
    """

    address: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0

    def run_jobs(
        self,
        jobs: Sequence[Job],
        *,
        progress: Progress = silent,
        max_time: float | None = None,
        keep_models: bool = False,
        on_result: Finish = lambda result: None,
    ) -> list[TrialResult]:
        """Run trials that were prepared, as many at a time as the cluster holds; as ``trials.run_jobs`` otherwise.

        Raises:
            UnavailableError: Ray is not installed, or the cluster cannot be reached.
            ConfigError: the cluster can never give a trial what it asks for.
        """
        started = time.perf_counter()
        started_folder(jobs)
        results = {job.trial.name: read_trial(job) for job in jobs if job.is_done}
        for result in results.values():
            on_result(result)
        waiting = [job for job in jobs if not job.is_done]
        if not waiting:
            return [results[job.trial.name] for job in jobs]
        ray, is_own = self._connect()
        try:
            most = self._most_at_once(ray)
            task = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_retries=0)(_run_there)
            running: dict[Any, Job] = {}
            attempts: Counter[str] = Counter()
            is_first = True
            with progress("run points", len(waiting), "points") as bar:
                while waiting or running:
                    while waiting and len(running) < (1 if is_first else most):
                        job = waiting.pop(0)
                        is_new = not attempts[job.trial.name]
                        if is_new and max_time is not None and time.perf_counter() - started >= max_time:
                            results[job.trial.name] = skipped(job, f"not started: {max_time:g} seconds were over.")
                            on_result(results[job.trial.name])
                            bar.advance(1)
                            continue
                        attempts[job.trial.name] += 1
                        running[task.remote(job, keep_models, os.getcwd())] = job
                    if not running:
                        continue
                    [ready], _ = ray.wait(list(running), num_returns=1)
                    job = running.pop(ready)
                    found = _outcome(ray, ready, job, attempts[job.trial.name])
                    if found is None:
                        waiting.insert(0, job)
                        continue
                    results[job.trial.name] = found
                    is_first = False
                    on_result(results[job.trial.name])
                    bar.advance(1)
        finally:
            if is_own:
                ray.shutdown()
        return [results[job.trial.name] for job in jobs]

    def _connect(self) -> tuple[Any, bool]:
        """Return Ray, and whether it was started here."""
        try:
            import ray
        except ImportError:
            raise UnavailableError(
                f"spreading points over a cluster needs Ray, which is not installed. Install it: {HOW_TO_INSTALL}"
            ) from None
        if ray.is_initialized():
            return ray, False
        try:
            ray.init(address=self.address, include_dashboard=None, log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise UnavailableError(
                f"the Ray cluster at {self.address or 'this machine'} cannot be reached: {error}. Start it with "
                "`ray start --head`, or leave the address out."
            ) from None
        return ray, True

    def _most_at_once(self, ray: Any) -> int:
        """Return how many trials the whole cluster can hold at a time."""
        there = ray.cluster_resources()
        asked = {"CPU": self.cpus, "GPU": self.gpus}
        for name, amount in asked.items():
            if amount > there.get(name, 0):
                raise ConfigError(
                    f"every point asks for {amount:g} {name}, and the whole cluster has {there.get(name, 0):g}. Lower "
                    f"--ray-{name.lower()}s, or start more workers."
                )
        return max(1, int(min(there[name] // amount for name, amount in asked.items() if amount)))


def _run_there(job: Job, keep_models: bool, place: str) -> TrialResult:
    """Run a trial in a worker, where relative paths mean what they mean in the command."""
    os.chdir(place)
    return run_job(job, keep_models=keep_models)


def _outcome(ray: Any, ready: Any, job: Job, attempt: int) -> TrialResult | None:
    """Return what came of a trial; None if its worker was lost and it may begin again."""
    try:
        result: TrialResult = ray.get(ready)
    except ray.exceptions.RayTaskError as error:
        return _failed(job, f"it ended with an error that is not one of secateur's: {_last_line(error)}")
    except ray.exceptions.RayError as error:
        if attempt < MOST_ATTEMPTS:
            return None
        return _failed(
            job,
            f"its worker was lost {attempt} times, the last time so: {_first_line(error)} What was finished is kept; "
            "give each point more memory (--ray-cpus leaves fewer of them on a machine), and start the command again.",
        )
    return result


def _failed(job: Job, message: str) -> TrialResult:
    return TrialResult(job.trial, job.folder, "failed", message, 0.0, False, None, None, "")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _last_line(error: Exception) -> str:
    """Return what a trace of a worker ends with: the error itself."""
    return next(iter(reversed(str(error).strip().splitlines())), type(error).__name__)
