"""A sweep on two local workers of Ray gives what one process gives; skipped where Ray is not installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur.errors import ConfigError, UnavailableError
from secateur.pipeline.cluster import Cluster
from secateur.pipeline.sweep import run_sweep
from secateur.pipeline.trials import Trial, prepare, run_trials
from secateur.recipe import parse_recipe
from secateur.records.sweep import Sweep
from secateur.sweep_recipe import parse_sweep
from tests.pico import Pico


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    """A cluster of two processors on this machine."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install 'secateur[ray]')")
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 * 2**20,
            runtime_env={"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}},
        )
        yield ray
        ray.shutdown()


def swept(pico: Pico, output: Path, **run: Any) -> Sweep:
    """Return a sweep of three points, one of which fails."""
    data = pico.recipe(output, evaluate={"max_tokens": 768, "controls": []}, general=None)
    points = [{"prune.budget": {"channels": share}} for share in (0.2, 0.5)]
    points.append({"name": "nothing", "prune.budget": {"threshold": 1e9}, "prune.min_keep_ratio": 0.99})
    recipe, spec = parse_sweep({**data, "sweep": {"points": points}})
    return run_sweep(recipe, spec, **run).sweep


def numbers(sweep: Sweep) -> list[dict[str, Any]]:
    """Return the points without how long they took."""
    return [{**point, "seconds": 0} for point in sweep.to_dict()["points"]]


@pytest.mark.filterwarnings("ignore")
def test_two_workers_give_what_one_process_gives(pico: Pico, tmp_path: Path, workers: Any) -> None:
    """The same numbers, bit for bit, failures too; and a second call finds all that is done."""
    alone = swept(pico, tmp_path / "alone")
    spread = swept(pico, tmp_path / "spread", run=Cluster().run_jobs)
    assert [point.status for point in spread.points] == ["done", "done", "failed"]
    assert numbers(spread) == numbers(alone)
    again = swept(pico, tmp_path / "spread", run=Cluster().run_jobs)
    assert [point.seconds for point in again.done] == [point.seconds for point in spread.done]
    recipe = parse_recipe(pico.recipe(tmp_path / "large"))
    with pytest.raises(ConfigError, match="asks for 64 CPU, and the whole cluster has 2"):
        Cluster(cpus=64.0).run_jobs(prepare(recipe, [Trial("a", {})], keep_models=False))


def test_without_ray_the_command_to_install_it_is_said(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is run."""
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    recipe = parse_recipe(pico.recipe(tmp_path / "out"))
    with pytest.raises(UnavailableError, match=r"pip install 'secateur\[ray\]'"):
        Cluster().run_jobs(prepare(recipe, [Trial("a", {})], keep_models=False))
    assert run_trials(recipe, [Trial("a", {})], max_time=0.0)[0].status == "skipped"
