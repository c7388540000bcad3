"""The page's sections: which charts and tables stand together, and the words between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from secateur.records.exported import Exported
from secateur.records.units import UNIT_NAMES
from secateur.report.choices import (
    choices_evidence_table,
    choices_sentences,
    choices_table,
    paired_answers_table,
    subjects_table,
)
from secateur.report.markdown import describe_choice, describe_export
from secateur.report.page.chart import quantile
from secateur.report.page.charts import (
    choices_charts,
    document_changes,
    document_charts,
    frequency_chart,
    importance_charts,
    layers_chart,
    loss_charts,
    parts_chart,
    recovery_charts,
)
from secateur.report.page.document import Section
from secateur.report.page.generations import generations_section
from secateur.report.page.importance import parameters_by_layer
from secateur.report.page.records import FINETUNED, RECOVERED, TIMES, RunRecords, ratio
from secateur.report.page.speed import speed_section
from secateur.report.page.tasks import tasks_section
from secateur.report.recovery import curve_table, describe_recovery
from secateur.report.tables import (
    SEGMENTATION_NOTE,
    Table,
    attribution_table,
    cut_table,
    evidence_table,
    parts_table,
    plan_table,
    result_table,
    segmentation_table,
    speed_table,
    vocabulary_table,
    with_error,
)

ROWS = {
    "dense": "the model before",
    "dense_finetuned": "the dense model, trained on the same text",
    "pruned": "the smaller model, as cut",
    "recovered": "the smaller model after training",
    "random": "the same cut with units drawn at random",
    "random_recovered": "the random cut after the same training",
    "reversed": "the same cut with the best units gone",
}
"""What the rows of an evaluation are."""


def sections(records: RunRecords) -> list[Section]:
    """Return the sections that there is something for, in the order of the page."""
    makers: list[Callable[[RunRecords], Section | None]] = [
        _domain,
        _choices,
        _tasks,
        _generations,
        _forgotten,
        _recovery,
        _parameters,
        _speed,
        _units,
        _vocabulary,
        _exports,
        _evidence,
    ]
    return [section for make in makers if (section := make(records)) is not None]


def _domain(records: RunRecords) -> Section:
    names = "; ".join(f"{name}, {ROWS[name]}" for name in records.evaluation.models if name in ROWS)
    charts = [*loss_charts(records, records.domains), *document_charts(records)]
    documents = document_table(records)
    return Section(
        "domain",
        "How good is it on its domain?",
        [
            "Each point is a model's perplexity divided by the dense model's on the same documents; lower is better, "
            "and the dashed line is the dense model. Bars are 95 % intervals of that ratio. The model of this run is "
            "in colour.",
            f"The rows are {names}.",
        ],
        charts,
        [result_table(records.evaluation), *([documents] if documents.rows else [])],
    )


def document_table(records: RunRecords) -> Table:
    """Return how the loss of single documents changed from the dense model to the result."""
    shares = {"10 %": 0.1, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "90 %": 0.9, "worst": 1.0}
    rows = []
    for bucket in records.domains:
        if changes := sorted(document_changes(records, bucket)):
            worse = sum(change > 0 for change in changes) / len(changes)
            cells = [f"{quantile(changes, share):+.1%}" for share in shares.values()]
            rows.append([bucket, f"{len(changes):,}", *cells, f"{worse:.0%}"])
    return Table("change in loss of single documents", ["bucket", "documents", *shares, "got worse"], rows)


def _choices(records: RunRecords) -> Section | None:
    charts = choices_charts(records)
    if not charts:
        return None
    makers = (choices_table, paired_answers_table, subjects_table, choices_evidence_table)
    tables = [make(records.evaluation) for make in makers]
    return Section(
        "choices",
        "Does it answer questions?",
        [
            "Shares of multiple-choice questions answered right, with 95 % intervals of each share by itself. Models "
            "answered the same questions, so differences are surer than the bars suggest: the table has them, paired. "
            "Where the dense model's interval reaches down to the dashed line, which needs no knowledge, there is no "
            "signal, and nothing is concluded.",
        ],
        charts,
        [table for table in tables if table.rows],
        choices_sentences(records.evaluation),
    )


def _forgotten(records: RunRecords) -> Section | None:
    if not records.others:
        return None
    text = []
    for bucket in records.others:
        one = ratio(records.result.text[bucket], records.dense.text[bucket])
        worst = f"{with_error(one.value, one.stderr)} {TIMES} the dense model's"
        text.append(f"On {bucket} text the perplexity of {records.result.name} is {worst} (± one standard error).")
        if FINETUNED in records.evaluation.models and records.result.name == RECOVERED:
            beside = ratio(records.evaluation.models[FINETUNED].text[bucket], records.dense.text[bucket])
            text[-1] += f" Training alone, without a cut, makes it {with_error(beside.value, beside.stderr)} {TIMES}."
    return Section("forgotten", "What did it forget?", text, loss_charts(records, records.others))


def _recovery(records: RunRecords) -> Section | None:
    if not records.recoveries:
        return None
    text = [describe_recovery(recovery).replace("`", "") for recovery in records.recoveries.values()]
    text.append(
        "Losses are of validation text, which was not trained on; a ring marks the weights that were kept. The "
        "training objective of a distillation and that of a fine-tuning are different quantities."
    )
    return Section(
        "recovery", "How did the training go?", text, recovery_charts(records), [curve_table(records.recoveries)]
    )


def _parameters(records: RunRecords) -> Section:
    charts = [parts_chart(records)]
    text = []
    tables = [parts_table(records.plan.parameters_dense, records.plan.parameters_pruned), cut_table(records.plan)]
    if (layers := layers_chart(records)) is not None:
        charts.append(layers)
        tables.append(_layer_parameters_table(records))
        text.append("By layer, the parts that have units to lose are shown, without norms.")
    return Section("parameters", "Where did the parameters go?", text, charts, tables)


def _tasks(records: RunRecords) -> Section | None:
    return None if records.tasks is None else tasks_section(records.tasks)


def _generations(records: RunRecords) -> Section | None:
    return None if records.generations is None else generations_section(records.generations)


def _speed(records: RunRecords) -> Section | None:
    return None if records.speed is None else speed_section(records.speed)


def _layer_parameters_table(records: RunRecords) -> Table:
    by_part = parameters_by_layer(records.plan)
    columns = ["layer", *(f"{part}{when}" for part in by_part for when in ("", " pruned"))]
    count = len(next(iter(by_part.values())))
    rows = [
        [str(layer), *(f"{round(number):,}" for part in by_part.values() for number in part[layer])]
        for layer in range(count)
    ]
    return Table("parameters by layer", columns, rows)


def _units(records: RunRecords) -> Section | None:
    plan = records.plan
    if not plan.layers:
        return None
    charts = importance_charts(records)
    text = [describe_choice(plan).replace("`", "")]
    if charts:
        text.append(
            "Each row is a layer, its units ordered from most to least important. Coloured cells stay, grey ones went; "
            "the darker (on a dark page: the brighter) a cell, the more important its units in the whole model."
        )
    tables = [_importance_table(records)] if charts else []
    return Section("units", "Which units stay?", text, charts, [*tables, plan_table(plan)], list(plan.notes))


def _importance_table(records: RunRecords) -> Table:
    kinds = {kind: bins for kind, bins in records.importance.items() if bins}
    columns = ["layer"]
    for kind in kinds:
        columns += [f"mean percentile of {UNIT_NAMES[kind]}", "of those kept", "of those removed", "kept"]
    layers = sorted({one.layer for bins in kinds.values() for one in bins})
    rows = []
    for layer in layers:
        row = [str(layer)]
        for bins in kinds.values():
            mine = [one for one in bins if one.layer == layer]
            kept = [(one.percentile, one.num_units * one.kept_ratio) for one in mine]
            gone = [(one.percentile, one.num_units * (1 - one.kept_ratio)) for one in mine]
            whole = [(one.percentile, float(one.num_units)) for one in mine]
            total = sum(weight for _, weight in whole)
            share = f"{sum(weight for _, weight in kept) / total:.1%}" if total else ""
            row += [_mean(whole), _mean(kept), _mean(gone), share]
        rows.append(row)
    return Table("importance by layer", columns, rows)


def _mean(weighted: Sequence[tuple[float, float]]) -> str:
    total = sum(weight for _, weight in weighted)
    return f"{sum(value * weight for value, weight in weighted) / total:.1f}" if total else ""


def _vocabulary(records: RunRecords) -> Section | None:
    chart, vocabulary = frequency_chart(records), records.plan.vocabulary
    if chart is None and vocabulary is None:
        return None
    charts = [chart] if chart else []
    tables = [frequency_table(records)] if chart else []
    text = []
    if vocabulary is not None:
        text = [
            f"{len(vocabulary.keep):,} of {vocabulary.num_tokens:,} token ids stay; they cover "
            f"{vocabulary.covered_ratio:.3%} of the {vocabulary.counted_tokens:,} tokens that were counted.",
            SEGMENTATION_NOTE,
        ]
        tables.append(vocabulary_table(vocabulary))
        if records.evaluation.vocabulary:
            tables += [segmentation_table(records.evaluation), attribution_table(records.evaluation)]
    return Section("vocabulary", "Which token ids does the domain use?", text, charts, tables)


def frequency_table(records: RunRecords) -> Table:
    """Return how much of each domain's text its most used token ids cover."""
    rows = []
    for name, curve in records.frequencies.items():
        wanted = [1, 10, 100, 1_000, 10_000, 100_000]
        points = [next((p for p in curve.points if p.rank >= rank), None) for rank in wanted]
        for point in dict.fromkeys([*points, curve.points[-1] if curve.points else None]):
            if point is not None:
                rows.append([name, f"{point.rank:,}", f"{point.per_million:,.4g}", f"{point.coverage:.3%}"])
    return Table("token frequency", ["domain", "most used ids", "uses of the last, per million", "of the text"], rows)


def _exports(records: RunRecords) -> Section | None:
    if not records.exports:
        return None
    return Section("exports", "In which other forms is it there?", items=[_export(each) for each in records.exports])


def _export(exported: Exported) -> str:
    return f"{exported.path.name}: {describe_export(exported)}"


def _evidence(records: RunRecords) -> Section:
    return Section(
        "evidence",
        "On what text was it measured?",
        ["No document that was calibrated on, counted or trained on is among the test text."],
        tables=[evidence_table(records.evaluation), speed_table(records.evaluation, records.calibration_tokens_per_s)],
    )
