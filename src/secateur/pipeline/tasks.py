"""The tasks' part of a run: tasks of the lm-evaluation-harness, on the dense model and on the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from secateur.errors import CheckpointError
from secateur.evaluate.tasks import harness_version, load_tasks, run_tasks
from secateur.progress import Progress, silent
from secateur.recipe import TasksSpec
from secateur.records.tasks import TaskResults, TaskScore
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.run_folder import RunFolder

STAGE, DENSE_STAGE = "evaluate:tasks", "tasks:dense"
FILE = "tasks.json"

T = TypeVar("T")

Loader = Callable[[], tuple[Any, Any]]
"""Returns a transformers model and its tokenizer."""


@dataclass
class TasksStage:
    """Runs tasks on two models and keeps the results in ``tasks.json``, the dense model's in ``tasks/dense.json`` too.

    Attributes:
        spec: which tasks; None where there are none.
        folder: the run's folder.
        progress: told about everything that takes time.
        reused: gets the names of stages whose results were still valid.
    """

    spec: TasksSpec | None
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)
    _manager: Any = None

    @property
    def _file(self) -> Path:
        return self.folder.path / FILE

    @property
    def _dense_file(self) -> Path:
        return self.folder.path / "tasks" / "dense.json"

    def check(self, dense_key: str) -> None:
        """Refuse tasks that are not known or have no data; tasks that the dense model has done are taken as they are.

        Args:
            dense_key: hash of everything that the dense model's results depend on, the tasks apart.
        """
        if self.spec is not None:
            harness_version()
            if not self._has_dense(dense_key):
                _ = self._tasks()

    def run(self, dense_key: str, key: str, row: str, dense: Loader, result: Loader) -> TaskResults | None:
        """Return how both models do, from the folder as far as it is there; None where no task is asked for.

        Args:
            dense_key: hash of everything that the dense model's results depend on, the tasks apart.
            key: the same for the result.
            row: name of the result.
            dense: loads the dense model.
            result: loads the result.
        """
        if self.spec is None:
            self._file.unlink(missing_ok=True)
            return None
        whole = digest(self._key(dense_key), self._key(key), row)
        if self.folder.is_done(STAGE, whole, self._file):
            self.reused.append(STAGE)
            return read_tasks(self._file)
        started = time.perf_counter()
        self.folder.forget(STAGE)
        models = {"dense": self._dense_scores(self._key(dense_key), dense), row: self._scores(row, result)}
        found = TaskResults(harness_version(), self.spec.limit, models)
        write_json(self._file, found.to_dict())
        self.folder.finish(STAGE, whole, started)
        return found

    def _dense_scores(self, key: str, dense: Loader) -> Mapping[str, TaskScore]:
        """Return the dense model's scores; they do not depend on what is cut, so another cut uses them again."""
        if self.folder.is_done(DENSE_STAGE, key, self._dense_file):
            self.reused.append(DENSE_STAGE)
            return _parsed(self._dense_file, _scores)
        started = time.perf_counter()
        self.folder.forget(DENSE_STAGE)
        scores = self._scores("dense", dense)
        write_json(self._dense_file, {task: score.to_dict() for task, score in scores.items()})
        self.folder.finish(DENSE_STAGE, key, started)
        return scores

    def _scores(self, row: str, load: Loader) -> dict[str, TaskScore]:
        assert self.spec is not None, "only called where there are tasks"
        model, tokenizer = load()
        label = f"run tasks with {row}"
        return run_tasks(model, tokenizer, self.spec, self._tasks(), progress=self.progress, label=label)

    def _has_dense(self, key: str) -> bool:
        return self.folder.is_done(DENSE_STAGE, self._key(key), self._dense_file)

    def _tasks(self) -> Any:
        assert self.spec is not None, "only called where there are tasks"
        if self._manager is None:
            with self.progress("read the tasks", None, "") as task:
                self._manager = load_tasks(self.spec)
                task.advance(1)
        return self._manager

    def _key(self, model_key: str) -> str:
        assert self.spec is not None, "only called where there are tasks"
        options = self.spec.model_dump(exclude={"batch_size"})
        return digest(model_key, options, harness_version(), _contents(self.spec.include_path))


def read_tasks(file: Path) -> TaskResults:
    """Return the results in a file.

    Raises:
        CheckpointError: the file is broken, or of another version.
    """
    return _parsed(file, TaskResults.from_dict)


def _scores(data: Mapping[str, Any]) -> dict[str, TaskScore]:
    return {task: TaskScore.from_dict(score) for task, score in data.items()}


def _parsed(file: Path, parse: Callable[[Mapping[str, Any]], T]) -> T:
    try:
        return parse(read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} does not hold results of tasks that secateur wrote: {error!r}. Delete it; it will be made again."
        ) from None


def _contents(folder: str | None) -> list[list[str]]:
    """Return what identifies the files of a folder of tasks: names and contents."""
    if folder is None:
        return []
    place = Path(folder).expanduser()
    files = (file for file in sorted(place.rglob("*")) if file.is_file() and "__pycache__" not in file.parts)
    return [[str(file.relative_to(place)), digest(file.read_bytes().hex())] for file in files]
