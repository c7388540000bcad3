"""How models do on tasks of the lm-evaluation-harness: plain numbers, imports without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.records.evaluation import PairedDifference, ratio_estimate

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class TaskMetric:
    """One number of a task.

    Attributes:
        name: such as ``acc`` or ``exact_match``.
        filter: what the harness did to the answers first; ``none`` where nothing.
        value: the number.
        stderr: its standard error as the harness gives it; None where it gives none.
        higher_is_better: None where the task does not say.
        samples: the number of each document, where ``value`` is their mean; else empty.
    """

    name: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: tuple[float, ...] = field(repr=False, default=())

    @property
    def label(self) -> str:
        """The name, and the filter where there is one."""
        return self.name if self.filter == "none" else f"{self.name} ({self.filter})"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One model on one task, or on a group of tasks.

    Attributes:
        task: its name.
        version: of the task, as its author numbers it; empty where not given.
        num_fewshot: solved examples before each question; None for a group whose tasks differ.
        num_samples: documents that were asked.
        fingerprint: identifies the documents, the prompts and the right answers; empty for a group.
        metrics: what came out.
        is_group: whether it sums up other tasks that are there too.
    """

    task: str
    version: str
    num_fewshot: int | None
    num_samples: int
    fingerprint: str
    metrics: tuple[TaskMetric, ...]
    is_group: bool = False

    def find(self, name: str, filter_name: str) -> TaskMetric | None:
        """Return a metric, or None where there is none such."""
        return next((one for one in self.metrics if (one.name, one.filter) == (name, filter_name)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskScore:
        """Return the score that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong.
        """
        metrics = tuple(TaskMetric(**{**one, "samples": tuple(one["samples"])}) for one in data["metrics"])
        return cls(**{**data, "metrics": metrics})


@dataclass(frozen=True, slots=True)
class TaskResults:
    """The dense model and the result of a run on the same tasks.

    Attributes:
        harness: version of lm-eval.
        limit: documents of each task that were asked, or the share of them below 1; None for all.
        models: by row, the dense model's first; by task, the scores.
        schema_version: version of this record's JSON form.
    """

    harness: str
    limit: float | None
    models: Mapping[str, Mapping[str, TaskScore]]
    schema_version: int = SCHEMA_VERSION

    @property
    def dense(self) -> Mapping[str, TaskScore]:
        """The dense model's scores."""
        return self.models["dense"]

    @property
    def result(self) -> str:
        """Name of the row that stands for the run's model."""
        return next(name for name in self.models if name != "dense")

    def difference(self, task: str, metric: TaskMetric) -> PairedDifference | None:
        """Return the result's number less the dense model's, paired by document; None where it cannot be.

        That needs the number of each document, and that both models were asked the same.
        """
        scores = [self.models[name].get(task) for name in (self.result, "dense")]
        first, second = (score and score.find(metric.name, metric.filter) for score in scores)
        if not (first and second and first.samples and len(first.samples) == len(second.samples)):
            return None
        if len({score.fingerprint for score in scores if score}) > 1:
            return None
        deltas = [a - b for a, b in zip(first.samples, second.samples, strict=True)]
        return PairedDifference(*ratio_estimate(deltas, [1] * len(deltas)))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the paired differences written out for readers."""
        models = {name: {task: score.to_dict() for task, score in row.items()} for name, row in self.models.items()}
        differences = [
            {"task": task, "metric": one.name, "filter": one.filter, "mean": gap.mean, "stderr": _known(gap.stderr)}
            for task, score in self.models[self.result].items()
            for one in score.metrics
            if (gap := self.difference(task, one)) is not None
        ]
        return {
            "schema_version": self.schema_version,
            "harness": self.harness,
            "limit": self.limit,
            "models": models,
            "differences": differences,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TaskResults:
        """Return the record that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        models = {
            name: {task: TaskScore.from_dict(score) for task, score in row.items()}
            for name, row in data["models"].items()
        }
        return cls(data["harness"], data["limit"], models)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None
