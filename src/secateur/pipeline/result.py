"""What a run has made, and what its results depend on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from secateur.errors import ConfigError
from secateur.records.evaluation import (
    Evaluation,
)
from secateur.records.exported import Exported
from secateur.records.generations import Generations
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.records.speed import SpeedComparison
from secateur.records.statistics import BucketStatistics
from secateur.records.tasks import TaskResults
from secateur.registry import unknown_name

Stage = Literal["calibrate", "plan", "shrink", "recover", "evaluate", "export"]
STAGES: tuple[Stage, ...] = ("calibrate", "plan", "shrink", "recover", "evaluate", "export")


@dataclass(slots=True)
class RunResult:
    """What a run has made so far; later stages are None where the run was told to stop earlier.

    Attributes:
        folder: the run folder.
        statistics: per bucket.
        plan: what stays.
        model_folder: the pruned Hugging Face folder; after recovery the recovered one.
        checked: how the saved folder was held against what was made.
        recoveries: what each training went through, by the name of its row.
        evaluation: what was measured.
        speed: how large and how fast dense model and result are; None where that was not asked.
        generations: what dense model and result answer to the same prompts; None where that was not asked.
        tasks: how both do on tasks of the lm-evaluation-harness; None where that was not asked.
        exports: the result in other forms, as the recipe's ``export`` asks.
        page: the report to look at, or None with the reason in ``no_page``.
        summary: one sentence.
        reused: names of the stages whose earlier results were still valid.
        notes: what whoever shares the model must know of the dense model's licence.
    """

    folder: Path
    statistics: Mapping[str, BucketStatistics] = field(default_factory=dict)
    plan: Plan | None = None
    model_folder: Path | None = None
    checked: str = "reloaded from disk and compared"
    recoveries: Mapping[str, Recovery] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    speed: SpeedComparison | None = None
    generations: Generations | None = None
    tasks: TaskResults | None = None
    exports: Sequence[Exported] = ()
    page: Path | None = None
    no_page: str = ""
    summary: str = ""
    reused: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("secateur", "torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def require_buckets(asked: Iterable[str], known: Iterable[str], key: str = "buckets") -> None:
    """Raise ConfigError for the first bucket that is asked for and not known."""
    names = list(known)
    for name in asked:
        if name not in names:
            raise ConfigError(f"{key}: " + unknown_name("bucket", name, names))
