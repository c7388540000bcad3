"""What weakens the evidence of a run, in sentences; and the few numbers at its top."""

from __future__ import annotations

import math

from secateur.report.page.document import Tile
from secateur.report.page.records import FINETUNED, MINUS, PRUNED, RANDOM, RECOVERED, TIMES, Ratio, RunRecords, ratio
from secateur.report.tables import format_bytes, format_count, with_error

FEW_DOCUMENTS = 30


def tiles(records: RunRecords) -> list[Tile]:
    """Return size, bytes, and the loss on domain, general text and beside a random cut; what is missing is said."""
    dense, result = records.dense, records.result
    found = [
        Tile(
            "parameters",
            _change(result.total_parameters, dense.total_parameters),
            f"{format_count(dense.total_parameters)} → {format_count(result.total_parameters)}, counted exactly",
        ),
        Tile(
            "weights",
            _change(result.size_bytes, dense.size_bytes),
            f"{format_bytes(dense.size_bytes)} → {format_bytes(result.size_bytes)}, counted exactly",
        ),
    ]
    found += [_ratio_tile(records, bucket) for bucket in records.domains]
    if result.name == RECOVERED and FINETUNED in records.evaluation.models:
        finetuned = records.evaluation.models[FINETUNED]
        for bucket in records.domains:
            one = ratio(result.text[bucket], finetuned.text[bucket])
            found.append(Tile(f"on {bucket}, relative to dense trained alike", f"{one.short()} {TIMES}", _spread(one)))
    if records.others:
        found += [_ratio_tile(records, bucket) for bucket in records.others]
    else:
        found.append(Tile("general text", "not measured", "what the model forgot is not known", is_missing=True))
    return [*found, _control_tile(records)]


def _change(after: int, before: int) -> str:
    return f"{100 * (after / before - 1):+.1f} %".replace("-", MINUS)


def _ratio_tile(records: RunRecords, bucket: str) -> Tile:
    one = ratio(records.result.text[bucket], records.dense.text[bucket])
    return Tile(f"perplexity on {bucket}, relative to dense", f"{one.short()} {TIMES}", _spread(one))


def _full(one: Ratio) -> str:
    return f"{with_error(one.value, one.stderr)} {TIMES}"


def _spread(one: Ratio) -> str:
    if not one.interval():
        return "one document: its error is unknown"
    return f"± {with_error(one.value, one.stderr).rpartition(' ± ')[2]}; 95 % interval {one.interval()}"


def _control_tile(records: RunRecords) -> Tile:
    name = "random_recovered" if records.result.name == RECOVERED else RANDOM
    models = records.evaluation.models
    what = "a random cut of the same size" + (", trained alike" if name != RANDOM else "")
    if name not in models:
        return Tile(what, "not measured", "whether the method beats chance is not known", is_missing=True)
    bucket = records.domains[0]
    one = ratio(models[name].text[bucket], records.dense.text[bucket])
    return Tile(f"{what}, on {bucket}, relative to dense", f"{one.short()} {TIMES}", _spread(one))


def cautions(records: RunRecords) -> list[str]:
    """Return what a careful reader holds against the numbers of this run; the last one holds for every run."""
    found = [*_about_controls(records), *_about_text(records), *_about_questions(records)]
    if records.plan.vocabulary is not None:
        found.append(
            "The tokenizer changed: ratios compare the loss on the same text, but perplexities per token of different "
            "rows do not compare."
        )
    found.append(
        "Intervals say how the numbers would move with other documents of the same kind. They do not cover other seeds "
        "of calibration or training, nor text unlike the test text. Loss is not the task: try the model on yours."
    )
    return found


def _about_controls(records: RunRecords) -> list[str]:
    models, result, found = records.evaluation.models, records.result, []
    trained = result.name == RECOVERED
    control = "random_recovered" if trained else RANDOM
    if control not in models:
        wanted = (
            "recover.baselines: [dense, random] and evaluate.controls: [random]"
            if trained
            else "evaluate.controls: [random]"
        )
        found.append(
            f"No random cut of the same size was {'trained and ' if trained else ''}measured, so this run cannot show "
            f"that the choice of units matters. Set {wanted}."
        )
    else:
        for bucket in records.domains:
            gap = ratio(models[control].text[bucket], result.text[bucket])
            if gap.low is None or gap.low <= 1:
                found.append(
                    f"On {bucket}, {result.name} is not clearly better than {control} ({_full(gap)} its perplexity, "
                    f"95 % interval {gap.interval() or 'unknown'}): the choice of units shows no effect."
                )
    if trained and FINETUNED not in models:
        found.append(
            "The dense model was not fine-tuned on the same text, so training and pruning are not told apart: a ratio "
            "below 1 may be due to training alone. Set recover.baselines: [dense]."
        )
    elif trained:
        for bucket in records.domains:
            alone = ratio(models[FINETUNED].text[bucket], records.dense.text[bucket])
            beside = ratio(result.text[bucket], models[FINETUNED].text[bucket])
            found.append(
                f"Training changed {bucket} as well as pruning: training alone brings the dense model to "
                f"{_full(alone)} its perplexity. What the cut cost is the ratio to that model, {_full(beside)}."
            )
    if trained and PRUNED in models:
        found += [
            f"On {bucket}, training made {bucket} worse than the untrained cut."
            for bucket in records.domains
            if ratio(result.text[bucket], models[PRUNED].text[bucket]).value > 1
        ]
    return found


def _about_questions(records: RunRecords) -> list[str]:
    found = []
    for name, score in records.dense.choices.items():
        low, high = score.interval()
        share = f"{score.acc:.1%} (95 % interval {low:.1%} to {high:.1%})"
        if not any(score.has_signal(measure) for measure in score.measures):
            found.append(
                f"The questions {name} give no signal: the dense model answers {share} right, and {score.to_beat:.1%} "
                "need no knowledge. What pruning did to such answers cannot be seen. Ask easier questions, or more."
            )
        elif score.acc <= score.overlap:
            found.append(
                f"Whoever picks the choice with the most words of the question answers {score.overlap:.1%} of {name} "
                f"right, and the dense model {share}: these questions may not need knowledge."
            )
    return found


def _about_text(records: RunRecords) -> list[str]:
    found = []
    for bucket, score in records.dense.text.items():
        if score.num_documents < FEW_DOCUMENTS:
            found.append(
                f"{bucket} was measured on {score.num_documents} documents; below {FEW_DOCUMENTS}, the intervals are "
                "themselves uncertain. Raise evaluate.max_tokens."
            )
        if score.num_excluded:
            found.append(
                f"{score.num_excluded:,} test documents of {bucket} had been seen in calibration and were left out; "
                "near-duplicates are not detected."
            )
    if not records.others:
        found.append("No general text was measured: what the model can no longer do is not known. Set general.")
    for bucket in records.others:
        one = ratio(records.result.text[bucket], records.dense.text[bucket])
        if one.low is not None and math.isfinite(one.value) and one.low > 1.5:
            found.append(
                f"On {bucket} text the perplexity is {_full(one)} the dense model's: use this model on its domain only."
            )
    return found
