"""Runs set side by side: how their results differ on the same documents, and which units they keep in common.

Plain numbers, imports without torch; where runs are read from and how the result is shown is elsewhere.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from secateur.errors import ConfigError
from secateur.records.evaluation import (
    TWO_SIDED_95,
    ModelScore,
    PairedDifference,
    TextScore,
    mcnemar,
    paired_accuracy,
    paired_bits_per_byte,
    paired_difference,
    relative_rise,
)
from secateur.records.plan import LayerPlan, Plan
from secateur.records.units import LAYER_UNIT_KINDS
from secateur.registry import unknown_name

Judgement = Literal["better", "worse", "no clear difference", "the same", "unknown", "no signal"]
"""What an interval of 95 % says of a difference; ``unknown`` where a single document leaves its error unknown, and
``no signal`` for answers to questions that the dense model itself does not answer better than a guess."""

_LEVEL = 0.05
"""Chance of a split of answers at which it is no longer taken for chance."""

_DENSE_DIFFERS = 1e-3
"""Relative difference of two losses of one dense model on one text from which it is said."""

_EVERYWHERE = ("output",)
"""Recipe keys that differ between any two runs and say nothing about them."""


@dataclass(frozen=True, slots=True)
class ComparedRun:
    """One run as a comparison sees it.

    Attributes:
        name: what it is called beside the others.
        folder: where it lies.
        model: its dense model, as the recipe names it.
        model_fingerprint: of that model.
        domains: names of the domain buckets.
        dense: the row of the dense model.
        result: the row of the model that the run was for: the recovered one, or else the pruned one.
        plan: what was cut.
        recipe: the resolved recipe as plain data.
        chosen: the same without what is the default.
    """

    name: str
    folder: str
    model: str
    model_fingerprint: str
    domains: Sequence[str]
    dense: ModelScore
    result: ModelScore
    plan: Plan
    recipe: Mapping[str, Any]
    chosen: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TextDifference:
    """How a run's result differs from the baseline's on one bucket; all are run minus baseline, so lower is better.

    Attributes:
        run: name of the run.
        bucket: name of the text.
        nll: in nats per token of the dense model's segmentation; exp of it is the ratio of two perplexities.
        bits_per_byte: in bits per UTF-8 byte.
        relative: as part of the baseline's loss.
        judgement: of the run.
    """

    run: str
    bucket: str
    nll: PairedDifference
    bits_per_byte: PairedDifference
    relative: PairedDifference
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class AnswersDifference:
    """How a run's result differs from the baseline's on one set of questions; run minus baseline, higher is better.

    Attributes:
        run: name of the run.
        questions: name of the set.
        acc: difference of the shares answered right.
        acc_norm: the same with lengths of choices accounted for.
        p_value: of ``acc``, by McNemar's exact test on the questions that only one of the two answers right.
        judgement: of the run, by that test.
    """

    run: str
    questions: str
    acc: PairedDifference
    acc_norm: PairedDifference
    p_value: float
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which of some units two plans keep.

    Attributes:
        num_units: units before the cut.
        kept_baseline: units that the baseline keeps.
        kept: units that the other run keeps.
        shared: units that both keep.
    """

    num_units: int
    kept_baseline: int
    kept: int
    shared: int

    @property
    def alike(self) -> float:
        """Units that both keep over units that either keeps (Jaccard), 0 to 1; 1 where neither keeps any."""
        either = self.kept_baseline + self.kept - self.shared
        return self.shared / either if either else 1.0

    @property
    def alike_by_chance(self) -> float:
        """The same for two draws of as many units by chance, with the expected number of shared ones."""
        shared = self.kept_baseline * self.kept / self.num_units if self.num_units else 0.0
        either = self.kept_baseline + self.kept - shared
        return shared / either if either else 1.0

    def __add__(self, other: Overlap) -> Overlap:
        """Return the two together, as of different units."""
        return Overlap(
            self.num_units + other.num_units,
            self.kept_baseline + other.kept_baseline,
            self.kept + other.kept,
            self.shared + other.shared,
        )


@dataclass(frozen=True, slots=True)
class PlanDifference:
    """Which units of one kind a run and the baseline keep, per layer of the dense model."""

    run: str
    kind: str
    layers: tuple[Overlap, ...]

    @property
    def total(self) -> Overlap:
        """All layers together."""
        return sum(self.layers, Overlap(0, 0, 0, 0))

    @property
    def alike_by_chance(self) -> float:
        """Expected share of units in common, were each layer's drawn by chance."""
        shared = sum(one.kept_baseline * one.kept / one.num_units for one in self.layers if one.num_units)
        either = self.total.kept_baseline + self.total.kept - shared
        return shared / either if either else 1.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """Several runs on the same test text.

    Attributes:
        runs: in the order given, but the baseline first.
        buckets: names of the text that all were measured on.
        questions: names of the sets of questions that all were asked.
        texts: differences of every run but the baseline, per bucket; ``answers`` the same per set of questions.
        plans: per run but the baseline and per kind of unit, which units are the same; none where the dense models
            differ. ``vocabularies`` the same for token ids, by run, where any run cut some.
        recipes: per dotted recipe key that differs, every run's value as text; "" where the key is not set.
        notes: what could not be compared, and what a reader must know.
    """

    runs: tuple[ComparedRun, ...]
    buckets: tuple[str, ...]
    questions: tuple[str, ...]
    texts: tuple[TextDifference, ...]
    answers: tuple[AnswersDifference, ...]
    plans: tuple[PlanDifference, ...]
    vocabularies: Mapping[str, Overlap]
    recipes: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...]

    @property
    def baseline(self) -> ComparedRun:
        """The run that all others are compared with."""
        return self.runs[0]

    @property
    def others(self) -> tuple[ComparedRun, ...]:
        """The runs that are compared with it."""
        return self.runs[1:]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without losses of single documents and lists of kept units."""
        return {
            "baseline": self.baseline.name,
            "buckets": list(self.buckets),
            "questions": list(self.questions),
            "runs": {run.name: self._run(run) for run in self.runs},
            "differences": [_with_intervals(asdict(one)) for one in self.texts],
            "answers": [_with_intervals(asdict(one)) for one in self.answers],
            "plans": [
                {
                    "run": one.run,
                    "kind": one.kind,
                    "total": _overlap(one.total),
                    "layers": list(map(_overlap, one.layers)),
                }
                for one in self.plans
            ],
            "vocabularies": {name: _overlap(one) for name, one in self.vocabularies.items()},
            "recipes": {key: dict(values) for key, values in self.recipes.items()},
            "notes": list(self.notes),
        }

    def _run(self, run: ComparedRun) -> dict[str, Any]:
        text = {}
        for bucket in self.buckets:
            score, dense = run.result.text[bucket], run.dense.text[bucket]
            text[bucket] = {
                "perplexity": score.perplexity,
                "perplexity_stderr": score.perplexity_stderr,
                "bits_per_byte": score.bits_per_byte,
                "bits_per_byte_stderr": score.bits_per_byte_stderr,
                "dense_perplexity": dense.perplexity,
                "to_dense": _with_interval(paired_difference(score, dense)),
                "corpus_fingerprint": score.corpus_fingerprint,
            }
        return {
            "folder": run.folder,
            "model": run.model,
            "model_fingerprint": run.model_fingerprint,
            "row": run.result.name,
            "parameters": run.result.total_parameters,
            "parameters_dense": run.dense.total_parameters,
            "size_bytes": run.result.size_bytes,
            "text": text,
        }


def judge(difference: PairedDifference) -> Judgement:
    """Return what the 95 % interval of a difference in loss, first minus second, says of the first."""
    if not math.isfinite(difference.stderr):
        return "unknown"
    if difference.mean == 0 and difference.stderr == 0:
        return "the same"
    if abs(difference.mean) <= TWO_SIDED_95 * difference.stderr:
        return "no clear difference"
    return "better" if difference.mean < 0 else "worse"


def interval(difference: PairedDifference) -> tuple[float, float] | None:
    """Return the ends of a difference's 95 % interval; None where its error is unknown."""
    if not math.isfinite(difference.stderr):
        return None
    spread = TWO_SIDED_95 * difference.stderr
    return difference.mean - spread, difference.mean + spread


def per_dense_token(first: TextScore, second: TextScore, dense: TextScore) -> PairedDifference:
    """Return the difference of two models on the same documents in nats per token of the dense model's segmentation.

    So that differences of models with other tokenizers add up with those to the dense model.

    Raises:
        ValueError: the scores come from different text.
    """
    return paired_difference(first, replace(second, document_tokens=dense.document_tokens))


def compare_runs(
    runs: Sequence[ComparedRun], *, baseline: str | None = None, buckets: Sequence[str] | None = None
) -> Comparison:
    """Return the runs side by side, every difference paired by document with the baseline.

    Args:
        runs: two or more, with names of their own.
        baseline: name of the run that others are compared with; None takes the first.
        buckets: names of the text to compare on; None takes all that every run was measured on.

    Raises:
        ConfigError: there are fewer than two runs, a name is unknown, or a text is not the same in all runs.
    """
    if len(runs) < 2:
        raise ConfigError(f"a comparison needs at least two runs; got {len(runs)}. Give another run folder.")
    names = [run.name for run in runs]
    if baseline is not None and baseline not in names:
        raise ConfigError(unknown_name("baseline", baseline, names))
    first = next(run for run in runs if run.name == (baseline or names[0]))
    ordered = (first, *(run for run in runs if run is not first))
    shared, notes = _shared_buckets(ordered, buckets)
    questions, more = _shared_questions(ordered)
    notes += [*more, *_about_dense(ordered, shared)]
    is_one_model = len({run.model_fingerprint for run in runs}) == 1
    return Comparison(
        runs=ordered,
        buckets=tuple(shared),
        questions=tuple(questions),
        texts=tuple(_text_difference(run, first, bucket) for bucket in shared for run in ordered[1:]),
        answers=tuple(_answers_difference(run, first, name) for name in questions for run in ordered[1:]),
        plans=tuple(_plan_differences(ordered)) if is_one_model else (),
        vocabularies=_vocabularies(ordered) if is_one_model else {},
        recipes=recipe_differences(ordered),
        notes=tuple(notes),
    )


def _shared_buckets(runs: Sequence[ComparedRun], asked: Sequence[str] | None) -> tuple[list[str], list[str]]:
    """Return the text that all runs were measured on, and what is left out; other text under one name is refused."""
    everywhere = [name for name in runs[0].dense.text if all(name in run.dense.text for run in runs)]
    if not everywhere:
        measured = "; ".join(f"{run.name}: {', '.join(run.dense.text)}" for run in runs)
        raise ConfigError(
            f"these runs have no test text in common ({measured}). Compare runs whose recipes have the same buckets."
        )
    for name in asked or ():
        if name not in everywhere:
            raise ConfigError(unknown_name("bucket that all runs were measured on:", name, everywhere))
    chosen = [name for name in everywhere if asked is None or name in asked]
    for name in chosen:
        for run in runs[1:]:
            _require_same_text(name, runs[0], run, [other for other in everywhere if other != name])
    notes = []
    for run in runs:
        if alone := [name for name in run.dense.text if name not in everywhere]:
            notes.append(f"{', '.join(alone)} of {run.name} is not compared, because not every run was measured on it.")
    if left := [name for name in everywhere if name not in chosen]:
        notes.append(f"{', '.join(left)} is not compared, as asked.")
    return chosen, notes


def _require_same_text(bucket: str, first: ComparedRun, second: ComparedRun, others: Sequence[str]) -> None:
    one, two = first.result.text[bucket], second.result.text[bucket]
    prints = one.corpus_fingerprint, two.corpus_fingerprint
    if prints[0] == prints[1] and one.document_bytes == two.document_bytes:
        return
    advice = f", or compare on other text only: --bucket {others[0]}" if others else ""
    raise ConfigError(
        f"{first.name} and {second.name} were measured on different {bucket} test text: fingerprint {prints[0][:16]} "
        f"({one.num_documents:,} documents, {one.num_bytes:,} bytes) and {prints[1][:16]} ({two.num_documents:,} "
        f"documents, {two.num_bytes:,} bytes). Their losses say nothing about each other. Run one again with the "
        f"other's corpus, splits, tokenizer, calibrate.block_size and evaluate.max_tokens{advice}."
    )


def _shared_questions(runs: Sequence[ComparedRun]) -> tuple[list[str], list[str]]:
    shared, notes = [], []
    for name in dict.fromkeys(name for run in runs for name in run.result.choices):
        asked = [model.choices.get(name) for run in runs for model in (run.dense, run.result)]
        prints = {score.fingerprint for score in asked if score is not None}
        if None in asked:
            notes.append(f"The questions {name} are not compared, because not every run was asked them.")
        elif len(prints) > 1:
            shown = " and ".join(sorted(one[:16] for one in prints))
            notes.append(f"The questions {name} are not compared, because they are not the same: {shown}.")
        else:
            shared.append(name)
    return shared, notes


def _about_dense(runs: Sequence[ComparedRun], buckets: Sequence[str]) -> list[str]:
    """Return what is to be said where the dense models, or their measured losses, are not the same."""
    first, notes = runs[0], []
    for run in runs[1:]:
        if run.model_fingerprint != first.model_fingerprint:
            notes.append(
                f"{run.name} was made from another dense model ({run.model}, {run.model_fingerprint[:12]}) than "
                f"{first.name} ({first.model}, {first.model_fingerprint[:12]}): ratios to dense are each to their own, "
                "and kept units are not compared."
            )
            continue
        for bucket in buckets:
            one, two = (sum(each.dense.text[bucket].document_nll) for each in (first, run))
            if one and abs(two / one - 1) > _DENSE_DIFFERS:
                notes.append(
                    f"The same dense model lost {two / one - 1:+.2%} on {bucket} in {run.name} against {first.name}: "
                    "other dtype, device or library version. Differences between these runs hold that, too."
                )
    return notes


def _text_difference(run: ComparedRun, baseline: ComparedRun, bucket: str) -> TextDifference:
    score, reference = run.result.text[bucket], baseline.result.text[bucket]
    nll = per_dense_token(score, reference, baseline.dense.text[bucket])
    bits, relative = paired_bits_per_byte(score, reference), relative_rise(score, reference)
    return TextDifference(run.name, bucket, nll, bits, relative, judge(nll))


def _answers_difference(run: ComparedRun, baseline: ComparedRun, name: str) -> AnswersDifference:
    score, reference = run.result.choices[name], baseline.result.choices[name]
    acc, norm = paired_accuracy(score, reference), paired_accuracy(score, reference, norm=True)
    test = mcnemar(score, reference)
    judgement: Judgement = "no clear difference"
    if not baseline.dense.choices[name].has_signal():
        judgement = "no signal"
    elif test.p_value < _LEVEL:
        judgement = "better" if test.only_first > test.only_second else "worse"
    return AnswersDifference(run.name, name, acc, norm, test.p_value, judgement)


def _plan_differences(runs: Sequence[ComparedRun]) -> list[PlanDifference]:
    found = []
    for kind in LAYER_UNIT_KINDS:
        known = next((run.plan.layers[kind] for run in runs if kind in run.plan.layers), None)
        if known is None:
            continue
        whole = tuple(LayerPlan(layer.num_units, tuple(range(layer.num_units))) for layer in known)
        kept = [run.plan.layers.get(kind, whole) for run in runs]
        for run, layers in zip(runs[1:], kept[1:], strict=True):
            pairs = zip(kept[0], layers, strict=True)
            found.append(PlanDifference(run.name, kind, tuple(_layer_overlap(one, two) for one, two in pairs)))
    return found


def _layer_overlap(first: LayerPlan, second: LayerPlan) -> Overlap:
    shared = len(set(first.keep) & set(second.keep))
    return Overlap(first.num_units, len(first.keep), len(second.keep), shared)


def _vocabularies(runs: Sequence[ComparedRun]) -> dict[str, Overlap]:
    known = next((run.plan.vocabulary for run in runs if run.plan.vocabulary is not None), None)
    if known is None:
        return {}
    every = range(known.num_tokens)
    kept = [set(run.plan.vocabulary.keep if run.plan.vocabulary is not None else every) for run in runs]
    return {
        run.name: Overlap(known.num_tokens, len(kept[0]), len(ids), len(kept[0] & ids))
        for run, ids in zip(runs[1:], kept[1:], strict=True)
    }


def recipe_differences(runs: Sequence[ComparedRun]) -> dict[str, dict[str, str]]:
    """Return per dotted recipe key whose values are not the same in all runs each one's value as text.

    Of a section that not every recipe has, keys with their default value are left out. Where the runs lie is not
    compared.
    """
    whole = {run.name: _flat(run.recipe) for run in runs}
    chosen = {run.name: _flat(run.chosen) for run in runs}
    keys = dict.fromkeys(key for values in (*whole.values(), *chosen.values()) for key in values)
    found = {}
    for key in keys:
        values = {run.name: whole[run.name].get(key, chosen[run.name].get(key, "")) for run in runs}
        is_everywhere = all(key in one for one in whole.values())
        is_wanted = is_everywhere or any(key in one for one in chosen.values())
        others = (one for name, one in whole.items() if key not in chosen[name])
        is_section = any(other.startswith(f"{key}.") for one in others for other in one)
        if len(set(values.values())) > 1 and is_wanted and not is_section and key not in _EVERYWHERE:
            found[key] = values
    return found


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested mappings as dotted keys with their values as JSON; what is null is left out."""
    found: dict[str, str] = {}
    for key, value in data.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            found[f"{prefix}{key}"] = shown
    return found


def _overlap(one: Overlap) -> dict[str, Any]:
    return {**asdict(one), "alike": one.alike}


def _with_interval(difference: PairedDifference) -> dict[str, Any]:
    """Return a difference as plain data; what is not known is null, because JSON knows no infinity."""
    ends = interval(difference)
    return {
        "mean": difference.mean,
        "stderr": difference.stderr if ends else None,
        "low": ends[0] if ends else None,
        "high": ends[1] if ends else None,
    }


def _with_intervals(data: dict[str, Any]) -> dict[str, Any]:
    """Replace every difference in plain data by one with its interval."""
    return {
        key: _with_interval(PairedDifference(**value)) if isinstance(value, dict) else value
        for key, value in data.items()
    }
