"""A trial whose worker is lost begins again; Ray itself is a stand-in here (``tests/e2e/test_sweep_ray.py`` has it)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from secateur.pipeline import cluster
from secateur.pipeline.cluster import MOST_ATTEMPTS, Cluster
from secateur.pipeline.trials import Job, Trial, TrialResult
from secateur.recipe import parse_recipe

RECIPE = {"model": "m", "domain": {"text": "t.txt"}, "prune": {"budget": {"channels": 0.2}}}


class RayError(Exception):
    """As Ray's base of all its errors."""


class RayTaskError(RayError):
    """As Ray's for an exception within a task."""


class WorkerCrashedError(RayError):
    """As Ray's for a worker that is gone."""


class Stand:
    """What the cluster asks of Ray, with workers that are calls here."""

    exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)

    def __init__(self, work: Callable[[Job], TrialResult]) -> None:
        self.work = work
        self.options: dict[str, Any] = {}
        self.begun: list[str] = []
        self._made: dict[int, Job] = {}

    def is_initialized(self) -> bool:
        """Return whether there is a cluster."""
        return True

    def cluster_resources(self) -> dict[str, float]:
        """Return what the cluster has."""
        return {"CPU": 2.0}

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        """Keep the options and return what makes a task of a function."""
        self.options = options
        return lambda _: SimpleNamespace(remote=self._begin)

    def _begin(self, job: Job, *_: Any) -> int:
        self.begun.append(job.trial.name)
        self._made[len(self.begun)] = job
        return len(self.begun)

    def wait(self, references: list[int], num_returns: int) -> tuple[list[int], list[int]]:
        """Return the first that is done."""
        return references[:num_returns], references[num_returns:]

    def get(self, reference: int) -> TrialResult:
        """Run the work of a task."""
        return self.work(self._made[reference])


def jobs(folder: Path, *names: str) -> list[Job]:
    """Return trials that were not run."""
    return [
        Job(Trial(name, {}), parse_recipe({**RECIPE, "output": str(folder / "trials" / name)}), "key", is_done=False)
        for name in names
    ]


def done(job: Job) -> TrialResult:
    """Return a result."""
    return TrialResult(job.trial, job.folder, "done", "", 1.0, False, None, None, "fine")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Stand, list[TrialResult]]]:
    """Return a function that runs three trials whose workers do some work."""

    def run_with(work: Callable[[Job], TrialResult], **options: Any) -> tuple[Stand, list[TrialResult]]:
        ray = Stand(work)
        monkeypatch.setattr(cluster.Cluster, "_connect", lambda _: (ray, False))
        return ray, Cluster().run_jobs(jobs(tmp_path, "a", "b", "c"), **options)

    return run_with


def test_a_lost_worker_s_trial_begins_again(run: Callable[..., tuple[Stand, list[TrialResult]]]) -> None:
    """On any worker, with the same job, whose folder has what was finished; Ray is told to try nothing itself."""
    losses = {"a": 1, "b": MOST_ATTEMPTS - 1, "c": 0}

    def work(job: Job) -> TrialResult:
        if losses[job.trial.name]:
            losses[job.trial.name] -= 1
            raise WorkerCrashedError("The worker died unexpectedly.")
        return done(job)

    heard: list[str] = []
    ray, results = run(work, on_result=lambda result: heard.append(result.trial.name), max_time=1e9)
    assert [result.status for result in results] == ["done"] * 3
    assert sorted(ray.begun) == ["a"] * 2 + ["b"] * MOST_ATTEMPTS + ["c"]
    assert ray.begun[:2] == ["a", "a"], "the first is alone until it is done"
    assert sorted(heard) == ["a", "b", "c"]
    assert ray.options["max_retries"] == 0


def test_a_trial_that_loses_every_worker_fails_and_the_others_go_on(
    run: Callable[..., tuple[Stand, list[TrialResult]]],
) -> None:
    """It is begun so often and no more; the message says what happened and that its stages are kept."""

    def work(job: Job) -> TrialResult:
        if job.trial.name == "b":
            raise WorkerCrashedError("Task was killed due to the node running low on memory.\nMore lines")
        return done(job)

    ray, results = run(work)
    assert [result.status for result in results] == ["done", "failed", "done"]
    assert ray.begun.count("b") == MOST_ATTEMPTS
    assert f"its worker was lost {MOST_ATTEMPTS} times" in results[1].message
    assert "low on memory." in results[1].message and "What was finished is kept" in results[1].message


def test_an_error_in_a_trial_is_no_lost_worker(run: Callable[..., tuple[Stand, list[TrialResult]]]) -> None:
    """It would come again, so it is said at once: the last line of the worker's trace."""

    def work(job: Job) -> TrialResult:
        if job.trial.name == "c":
            raise RayTaskError("ray::_run_there()\n  File x\nKeyError: 'layer'")
        return done(job)

    ray, results = run(work)
    assert [result.status for result in results] == ["done", "done", "failed"]
    assert ray.begun.count("c") == 1 and results[2].message.endswith("KeyError: 'layer'")
