"""What a page is made from, all of it plain; and what is computed of it for several sections."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.records.evaluation import (
    TWO_SIDED_95,
    Evaluation,
    ModelScore,
    PairedDifference,
    TextScore,
    paired_difference,
)
from secateur.records.exported import Exported
from secateur.records.generations import Generations
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.records.speed import SpeedComparison
from secateur.records.tasks import TaskResults
from secateur.report.page.frequency import FrequencyCurve
from secateur.report.page.importance import ImportanceBin
from secateur.report.tables import with_error

DENSE, PRUNED, RECOVERED, FINETUNED, RANDOM = "dense", "pruned", "recovered", "dense_finetuned", "random"

TIMES, MINUS = "\u00d7", "\u2212"
"""As printed in numbers."""


@dataclass(frozen=True, slots=True)
class RunRecords:
    """The records of one finished run.

    Attributes:
        model: of what the dense model is, as the recipe names it.
        domains: names of the domain buckets; every other measured bucket is general text.
        plan: what was cut.
        evaluation: what was measured.
        manifest: versions, fingerprints, seed and stages.
        recipe_yaml: the recipe as resolved.
        bounds: by bucket, how much its loss was allowed to rise.
        calibration_tokens_per_s: per bucket.
        recoveries: trainings by the name of their row.
        notes: what else a reader must know.
        exports: the result in other forms.
        speed: how large and how fast dense model and result are; None where it was not measured.
        generations: what both answer to the same prompts; None where none were asked.
        tasks: how both do on tasks of the lm-evaluation-harness; None where there were none.
        importance: per unit kind, binned scores; empty where no scores lie in the run.
        frequencies: per domain, how often its most used token ids occur.
    """

    model: str
    domains: Sequence[str]
    plan: Plan
    evaluation: Evaluation
    manifest: Mapping[str, Any]
    recipe_yaml: str
    bounds: Mapping[str, float] = field(default_factory=dict)
    calibration_tokens_per_s: Mapping[str, float] = field(default_factory=dict)
    recoveries: Mapping[str, Recovery] = field(default_factory=dict)
    notes: Sequence[str] = ()
    exports: Sequence[Exported] = ()
    speed: SpeedComparison | None = None
    generations: Generations | None = None
    tasks: TaskResults | None = None
    importance: Mapping[str, Sequence[ImportanceBin]] = field(default_factory=dict)
    frequencies: Mapping[str, FrequencyCurve] = field(default_factory=dict)

    @property
    def dense(self) -> ModelScore:
        """The row that all others are compared with."""
        return self.evaluation.models[DENSE]

    @property
    def result(self) -> ModelScore:
        """The row of the model that the run was for: the recovered one, or else the pruned one."""
        return self.evaluation.models.get(RECOVERED, self.evaluation.models[PRUNED])

    @property
    def others(self) -> list[str]:
        """Measured buckets that are no domain."""
        return [bucket for bucket in self.dense.text if bucket not in self.domains]

    @property
    def short_model(self) -> str:
        """The dense model's name without the folders of the machine it lay on."""
        name = self.model.replace("\\", "/").rstrip("/")
        is_path = name.startswith(("/", ".", "~")) or name[1:3] == ":/"
        return name.rpartition("/")[2] if is_path else name


@dataclass(frozen=True, slots=True)
class Ratio:
    """A perplexity over another one on the same documents.

    Attributes:
        value: the ratio; 1 means no difference, higher is worse.
        stderr: its standard error, to first order.
        low: lower end of the 95 % interval (on the scale of losses, so it is never below zero); None where a single
            document leaves it unknown. ``high`` is the upper end.
    """

    value: float
    stderr: float
    low: float | None
    high: float | None

    def short(self) -> str:
        """Return the value with the digits that its error leaves it."""
        return with_error(self.value, self.stderr).partition(" ± ")[0]

    def interval(self) -> str:
        """Return the 95 % interval, such as ``0.98 to 1.03``; nothing where it is unknown."""
        if self.low is None or self.high is None:
            return ""
        return " to ".join(with_error(end, self.stderr).partition(" ± ")[0] for end in (self.low, self.high))


def ratio(score: TextScore, reference: TextScore) -> Ratio:
    """Return the paired ratio of two models' perplexities, per token of the second one's segmentation."""
    return ratio_of(paired_difference(score, reference))


def ratio_of(difference: PairedDifference) -> Ratio:
    """Return a difference of losses in nats per token as the ratio of two perplexities."""
    value = _exp(difference.mean)
    if not math.isfinite(difference.stderr):
        return Ratio(value, math.inf, None, None)
    spread = TWO_SIDED_95 * difference.stderr
    return Ratio(value, value * difference.stderr, _exp(difference.mean - spread), _exp(difference.mean + spread))


def _exp(nats: float) -> float:
    return math.exp(max(-700.0, min(nats, 700.0)))
