"""Multiple choice as tables and sentences: shares of right answers, what needs no knowledge, and paired tests."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.records.choices import MEASURES, ChoicesScore, Measure
from secateur.records.evaluation import (
    Evaluation,
    ModelScore,
    PairedDifference,
    mcnemar,
    paired_answers,
    paired_margin,
)
from secateur.report.tables import Table, with_error

NO_SIGNAL = "no signal"
"""Said of answers of which nothing can be learned, because the dense model's are no better than without knowledge."""

GUESSING, SAME_ANSWER, COMMON_WORDS = "guessing", "same answer always", "most words in common"
"""What answers are held against, and needs no model."""

_LEAST_P = 1e-4


def choices_table(evaluation: Evaluation) -> Table:
    """Return how every model answered every set of questions; no rows where none were asked.

    Differences are to the dense model, paired by question; where its share is not clearly above what needs no knowledge
    there is no signal, and no difference. The first rows of a set need no model.
    """
    dense = next(iter(evaluation.models.values()))
    measures = _measures(dense)
    columns = ["questions", "model"]
    for measure in measures:
        columns += [f"{measure} (%)", "to dense"]
    rows = []
    for name, reference in dense.choices.items():
        for without, share in _without_model(reference).items():
            rows.append([name, without, *([share, ""] * len(measures)), "", ""])
        for model in evaluation.models.values():
            if name in model.choices:
                rows.append([name, model.name, *_answers(model.choices[name], reference, measures)])
    return Table("multiple choice (± one standard error)", [*columns, "margin (nats)", "to dense"], rows)


def _measures(model: ModelScore) -> list[Measure]:
    return [measure for measure in MEASURES if any(measure in score.measures for score in model.choices.values())]


def _without_model(score: ChoicesScore) -> dict[str, str]:
    return {
        GUESSING: f"{100 * score.chance:.1f}",
        SAME_ANSWER: f"{100 * score.majority:.1f}",
        COMMON_WORDS: with_error(100 * score.overlap, 100 * score.overlap_stderr),
    }


def _answers(score: ChoicesScore, dense: ChoicesScore, measures: Sequence[Measure]) -> list[str]:
    cells = []
    for measure in measures:
        if measure not in score.measures:
            cells += ["", ""]
            continue
        cells.append(with_error(100 * getattr(score, measure), 100 * getattr(score, f"{measure}_stderr")))
        if not dense.has_signal(measure):
            cells.append(NO_SIGNAL)
        else:
            cells.append("" if score is dense else _signed(paired_answers(score, dense, measure), 100))
    cells.append(with_error(score.margin, score.margin_stderr))
    cells.append("" if score is dense else _signed(paired_margin(score, dense)))
    return cells


def _signed(change: PairedDifference, scale: int = 1) -> str:
    return ("+" if change.mean > 0 else "") + with_error(scale * change.mean, scale * change.stderr)


def paired_answers_table(evaluation: Evaluation) -> Table:
    """Return the exact McNemar test between the dense and every other model, for all measures with a signal."""
    dense = next(iter(evaluation.models.values()))
    rows = []
    for name, reference in dense.choices.items():
        for measure in reference.measures:
            for model in evaluation.models.values():
                if model is dense or name not in model.choices or not reference.has_signal(measure):
                    continue
                score = model.choices[name]
                test, change = mcnemar(reference, score, measure), paired_answers(score, reference, measure)
                counts = [f"{test.only_first:,}", f"{test.only_second:,}"]
                rows.append([name, measure, model.name, _signed(change, 100), *counts, format_p(test.p_value)])
    columns = ["questions", "measure", "model", "to dense (points)", "only dense right", "only it right", "p"]
    return Table("answers beside the dense model's (exact McNemar test)", columns, rows)


def format_p(value: float) -> str:
    """Return a p-value with two digits that mean something."""
    return f"< {_LEAST_P:g}" if value < _LEAST_P else f"{value:.2g}"


def subjects_table(evaluation: Evaluation) -> Table:
    """Return every model's share of right answers by subject; no rows where questions have none."""
    dense = next(iter(evaluation.models.values()))
    asked = [model for model in evaluation.models.values() if model.choices]
    rows = []
    for name, reference in dense.choices.items():
        shares = [model.choices[name].subjects() if name in model.choices else {} for model in asked]
        for subject, score in reference.subjects().items():
            cells = [
                with_error(100 * own[subject].acc, 100 * own[subject].acc_stderr) if subject in own else ""
                for own in shares
            ]
            rows.append([name, subject, f"{score.num_items:,}", f"{100 * score.chance:.1f}", *cells])
    columns = ["questions", "subject", "asked", GUESSING, *(model.name for model in asked)]
    return Table("right answers by subject (acc, %)", columns, rows)


def choices_evidence_table(evaluation: Evaluation) -> Table:
    """Return how many questions were asked of each set, how, and whether the answers say anything."""
    dense = next(iter(evaluation.models.values()))
    rows = [
        [
            name,
            f"{score.num_items:,}",
            f"{score.to_beat:.1%}",
            *(_interval(score, measure) for measure in _measures(dense)),
            f"{score.num_truncated:,}",
            score.fingerprint[:12],
        ]
        for name, score in dense.choices.items()
    ]
    intervals = [f"dense {measure}, 95 % interval" for measure in _measures(dense)]
    columns = ["questions", "asked", "without knowledge", *intervals, "prompts cut to fit", "fingerprint"]
    return Table("questions", columns, rows)


def _interval(score: ChoicesScore, measure: Measure) -> str:
    if measure not in score.measures:
        return ""
    low, high = score.interval(measure)
    return f"{low:.1%} to {high:.1%}" + ("" if score.has_signal(measure) else f" ({NO_SIGNAL})")


def choices_sentences(evaluation: Evaluation) -> list[str]:
    """Return per set of questions what the answers of the run's result show, by ``acc``, or that they show nothing."""
    models = evaluation.models
    dense = next(iter(models.values()))
    result = models.get("recovered") or models.get("pruned")
    if result is None:
        return []
    return [
        _choices_sentence(name, reference, result.choices[name], result.name)
        for name, reference in dense.choices.items()
        if name in result.choices
    ]


def _choices_sentence(name: str, dense: ChoicesScore, score: ChoicesScore, result: str) -> str:
    low, high = dense.interval()
    share = f"{dense.acc:.1%} of {dense.num_items:,} questions (95 % interval {low:.1%} to {high:.1%})"
    if not dense.has_signal():
        others = [measure for measure in dense.measures if dense.has_signal(measure)]
        rest = f" Only {' and '.join(others)} can be compared." if others else " It says nothing about what was cut."
        known = f"The dense model answers {share} right, and {dense.to_beat:.1%} need no knowledge."
        return f"{name}: {NO_SIGNAL}. {known}{rest}"
    test, change = mcnemar(dense, score), paired_answers(score, dense, "acc")
    sign = "" if test.p_value < _LEAST_P else "= "
    text = (
        f"{name}: the dense model answers {share} right and {result} {score.acc:.1%}, a difference of "
        f"{_signed(change, 100)} points; {test.only_first:,} are answered right by dense only and "
        f"{test.only_second:,} by {result} only (exact McNemar test: p {sign}{format_p(test.p_value)})."
    )
    if dense.interval()[0] <= dense.overlap:
        text += (
            f" The choice with the most words of the question is right for {dense.overlap:.1%}, so that these answers "
            "may need no knowledge."
        )
    return text
