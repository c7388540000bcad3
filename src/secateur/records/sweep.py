"""What a sweep found: one record per point, plain numbers only; imports without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1

_ABSENT = object()

FRONT, LEVEL, BEHIND = "front", "level", "behind"
"""How a point stands to the others; see ``SweepPoint.standing``."""


@dataclass(frozen=True, slots=True)
class BucketScore:
    """How one point's model predicts one bucket's test text.

    Attributes:
        perplexity: per token; ``perplexity_stderr`` its standard error.
        bits_per_byte: comparable across tokenizers; ``bits_per_byte_stderr`` its standard error.
        ratio: perplexity over the dense model's on the same documents; 1 is no difference, higher is worse.
        ratio_stderr: its standard error, paired by document; None where a single document leaves it unknown.
        low: lower end of the 95 % interval of the ratio, ``high`` the upper one; None where they are unknown.
    """

    perplexity: float
    perplexity_stderr: float | None
    bits_per_byte: float
    bits_per_byte_stderr: float | None
    ratio: float
    ratio_stderr: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How one set of questions was answered: the share of right answers, plain and normalised by bytes.

    Standard errors are None for a single question; ``chance`` is the expected share for a guess.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float
    acc_norm_stderr: float | None
    chance: float
    num_items: int


@dataclass(frozen=True, slots=True)
class SweepPoint:
    """One point of a sweep.

    Attributes:
        name: of the point and of its folder.
        overrides: dotted recipe keys and their values.
        folder: relative to the sweep's.
        status: ``done``, ``failed`` or ``skipped``.
        message: why it failed or was skipped.
        seconds: that it took when it was run.
        method: that chose the units; what charts colour by.
        row: of the evaluation that counts: ``recovered`` where there was a recovery, else ``pruned``.
        parameters: of its model; None where it is not done, here and below.
        pruning_ratio: share of the dense model's parameters that went.
        size_bytes: of its weights.
        text: per bucket.
        choices: per set of questions.
        loss: mean over the domains of the loss above the dense model's, in nats per token of the dense segmentation.
        loss_stderr: its standard error, paired by document; None where it is unknown.
        random_ratio: perplexity over the dense model's, geometric mean over the domains, of the random control.
        beats_random: whether the loss is lower than the random control's by more than chance; None where there is none.
        fingerprint: of the test text; points with different ones cannot be compared.
        is_comparable: whether it was measured on the text that most points were measured on.
        standing: ``front`` where no other point has fewer parameters and a lower loss; ``level`` where one has, but
            the difference is within the standard error; ``behind`` where it is not. Empty where it cannot be said.
        beaten_by: the point of the front that shows it most clearly, where it is ``behind``.
        has_model: whether its model lies in its folder.
    """

    name: str
    overrides: Mapping[str, Any]
    folder: str
    status: str
    message: str = ""
    seconds: float = 0.0
    method: str = ""
    row: str = ""
    parameters: int | None = None
    pruning_ratio: float | None = None
    size_bytes: int | None = None
    text: Mapping[str, BucketScore] = field(default_factory=dict)
    choices: Mapping[str, Accuracy] = field(default_factory=dict)
    loss: float | None = None
    loss_stderr: float | None = None
    random_ratio: float | None = None
    beats_random: bool | None = None
    fingerprint: str = ""
    is_comparable: bool = True
    standing: str = ""
    beaten_by: str = ""
    has_model: bool = False


@dataclass(frozen=True, slots=True)
class DenseModel:
    """What the points are compared with: its size, and perplexity and bits per byte by bucket."""

    parameters: int
    size_bytes: int
    perplexity: Mapping[str, float]
    bits_per_byte: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Sweep:
    """All points of a sweep, in the order of the file.

    Attributes:
        model: the dense model, as the recipe names it.
        domains: names of the domain buckets; every other measured bucket is general text.
        points: as asked for; those that are not done too.
        dense: None where no point is done.
        varied: the dotted recipe keys that differ between points.
        recipe_yaml: what all points have in common, every default written out, and what is varied.
        versions: of the packages that the results depend on.
        model_fingerprint: of the dense model; ``seed`` of the base recipe.
        schema_version: version of this record's JSON form.
    """

    model: str
    domains: Sequence[str]
    points: Sequence[SweepPoint]
    dense: DenseModel | None
    varied: Sequence[str]
    recipe_yaml: str
    versions: Mapping[str, str]
    model_fingerprint: str
    seed: int
    schema_version: int = SCHEMA_VERSION

    @property
    def done(self) -> list[SweepPoint]:
        """The points that were measured."""
        return [point for point in self.points if point.status == "done"]

    @property
    def front(self) -> list[SweepPoint]:
        """The points that no other one beats in both size and loss, the largest first."""
        found = [point for point in self.points if point.standing == FRONT]
        return sorted(found, key=lambda point: -(point.parameters or 0))

    @property
    def buckets(self) -> list[str]:
        """Names of all measured texts, the domains first."""
        return list(self.dense.perplexity) if self.dense else []

    @property
    def question_sets(self) -> list[str]:
        """Names of all sets of questions."""
        return list(dict.fromkeys(name for point in self.done for name in point.choices))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sweep:
        """Return the sweep that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        points = [_point(point) for point in data["points"]]
        dense = None if data["dense"] is None else DenseModel(**data["dense"])
        return cls(**{**data, "points": points, "dense": dense})


def _point(data: Mapping[str, Any]) -> SweepPoint:
    text = {bucket: BucketScore(**score) for bucket, score in data["text"].items()}
    choices = {name: Accuracy(**score) for name, score in data["choices"].items()}
    return SweepPoint(**{**data, "text": text, "choices": choices})


def columns_of(sweep: Sweep) -> dict[str, list[Any]]:
    """Return the points as columns of plain values, one row per point, such as ``medical.ratio``; for data frames.

    What was varied stands under its dotted key: as it is where all values are numbers or all are words, else as JSON.
    """
    points = sweep.points
    plain = ("name", "status", "method", "row", "parameters", "pruning_ratio", "size_bytes", "loss", "loss_stderr")
    columns: dict[str, list[Any]] = {name: [getattr(point, name) for point in points] for name in plain}
    for key in sweep.varied:
        columns[key] = _same_kind([point.overrides.get(key, _ABSENT) for point in points])
    for bucket in sweep.buckets:
        for name in BucketScore.__dataclass_fields__:
            columns[f"{bucket}.{name}"] = [
                getattr(point.text[bucket], name) if bucket in point.text else None for point in points
            ]
    for asked in sweep.question_sets:
        for name in Accuracy.__dataclass_fields__:
            columns[f"{asked}.{name}"] = [
                getattr(point.choices[asked], name) if asked in point.choices else None for point in points
            ]
    for name in ("random_ratio", "beats_random", "is_comparable", "standing", "beaten_by", "seconds", "message"):
        columns[name] = [getattr(point, name) for point in points]
    columns["folder"] = [point.folder for point in points]
    return columns


def _same_kind(values: list[Any]) -> list[Any]:
    given = [value for value in values if value is not _ABSENT]
    if all(isinstance(value, str) for value in given) or all(type(value) is bool for value in given):
        return [None if value is _ABSENT else value for value in values]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in given):
        return [None if value is _ABSENT else float(value) for value in values]
    written = (json.dumps(value, sort_keys=True, ensure_ascii=False, default=str) for value in given)
    return [None if value is _ABSENT else next(written) for value in values]
