"""The run as a Markdown page, for pull requests and lab notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.records.evaluation import Evaluation
from secateur.records.exported import Exported
from secateur.records.generations import Generations
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.records.speed import SpeedComparison
from secateur.records.tasks import TaskResults
from secateur.report.choices import (
    choices_evidence_table,
    choices_sentences,
    choices_table,
    paired_answers_table,
    subjects_table,
)
from secateur.report.generations import generations_lines
from secateur.report.recovery import curve_table, describe_recovery
from secateur.report.speed import describe_measurement, describe_speed, footprint_table, timings_table
from secateur.report.tables import (
    SEGMENTATION_NOTE,
    Table,
    attribution_table,
    cut_table,
    evidence_table,
    format_bytes,
    parts_table,
    plan_table,
    removed_blocks,
    result_table,
    segmentation_table,
    speed_table,
    verdict,
    vocabulary_table,
)
from secateur.report.tasks import tasks_lines


def render_report(
    plan: Plan,
    evaluation: Evaluation,
    *,
    model_name: str,
    domains: Sequence[str],
    manifest: Mapping[str, Any],
    calibration_tokens_per_s: Mapping[str, float],
    recipe_yaml: str,
    bounds: Mapping[str, float] | None = None,
    recoveries: Mapping[str, Recovery] | None = None,
    notes: Sequence[str] = (),
    exports: Sequence[Exported] = (),
    speed: SpeedComparison | None = None,
    generations: Generations | None = None,
    tasks: TaskResults | None = None,
) -> str:
    """Return the report of a run as Markdown.

    Args:
        plan: what was cut.
        evaluation: what was measured.
        model_name: of the dense model.
        domains: names of the domain buckets.
        manifest: versions, fingerprints, seeds and timings of the run.
        calibration_tokens_per_s: per bucket.
        recipe_yaml: the recipe as resolved.
        bounds: by bucket, how much its loss was allowed to rise; None where the budget was a size.
        recoveries: trainings by the name of their row; None where nothing was trained.
        notes: what else to say, before the tables.
        exports: the result in other forms.
        speed: how large and how fast dense model and result are; None where it was not measured.
        generations: what both answer to the same prompts; None where none were asked.
        tasks: how both do on tasks of the lm-evaluation-harness; None where there were none.
    """
    asked = [choices_table(evaluation), paired_answers_table(evaluation), subjects_table(evaluation)]
    tables = [result_table(evaluation), *(table for table in asked if table.rows), cut_table(plan)]
    if plan.vocabulary is not None:
        tables += [attribution_table(evaluation), segmentation_table(evaluation), vocabulary_table(plan.vocabulary)]
    tables += [
        parts_table(plan.parameters_dense, plan.parameters_pruned),
        evidence_table(evaluation),
        *([choices_evidence_table(evaluation)] if asked[0].rows else []),
        speed_table(evaluation, calibration_tokens_per_s),
    ]
    if recoveries:
        tables.append(curve_table(recoveries))
    if plan.layers:
        tables.append(plan_table(plan))
    remarks = "".join(f"- {note}\n" for note in (*plan.notes, *notes, *choices_sentences(evaluation)))
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    counted = " or counted" if plan.vocabulary else ""
    counted += " or trained on" if recoveries else ""
    trainings = "".join(f"- {describe_recovery(recovery)}\n" for recovery in (recoveries or {}).values())
    return (
        f"# {model_name}, pruned for {', '.join(domains)}\n\n"
        f"{verdict(evaluation, domains, bounds)}\n\n"
        f"{describe_choice(plan)} All numbers are from documents that were not calibrated on{counted}.\n\n"
        + (f"{SEGMENTATION_NOTE}\n\n" if plan.vocabulary else "")
        + (f"{remarks}\n" if remarks else "")
        + (f"{trainings}\n" if trainings else "")
        + "\n".join(_section(table) for table in tables)
        + "".join(f"\n{line}\n" for line in [*tasks_lines(tasks), *generations_lines(generations)])
        + "".join(f"\n{line}\n" for line in [*_speed_lines(speed), *_export_lines(exports)])
        + "\n## How this was made\n\n"
        f"Model fingerprint `{manifest['model_fingerprint']}`; {versions}.\n\n"
        f"```yaml\n{recipe_yaml}```\n"
    )


def _speed_lines(speed: SpeedComparison | None) -> list[str]:
    """Return Markdown paragraphs on size and speed, below a heading; nothing where they were not measured."""
    if speed is None:
        return []
    told = [" ".join(describe_speed(speed)), *describe_measurement(speed)]
    return ["## Size and speed", *told, timings_table(speed).markdown(), footprint_table(speed).markdown()]


def _export_lines(exports: Sequence[Exported]) -> list[str]:
    """Return Markdown paragraphs on the exports, below a heading; nothing where there are none."""
    if not exports:
        return []
    items = [f"- `{each.path}`: {describe_export(each)}" for each in exports]
    return ["## Exports", "\n".join(items)]


def describe_export(exported: Exported) -> str:
    """Return what an export is, how large, and how it was checked."""
    what = f"{exported.target} ({exported.form}), {format_bytes(exported.size_bytes)}"
    return "; ".join([what, *exported.sentences()])


def describe_choice(plan: Plan) -> str:
    """Return in sentences how a plan's units were chosen."""
    domains, sentences = ", ".join(plan.calibrated_on) or "no text", []
    mixture = ", ".join(f"{name} ({share:.3g})" for name, share in plan.mix.items())
    counted = "the domains" if plan.mix else domains
    if plan.layers:
        sentences.append(
            f"Method `{plan.method}`, budget {dict(plan.budget)}, shape `{plan.shape}`, calibrated on "
            f"{plan.calibration_tokens:,} tokens of {f'the mixture {mixture}' if mixture else domains}."
        )
    if blocks := removed_blocks(plan):
        chosen = f" (chosen by `{plan.depth_method}`)" if plan.depth_method else ""
        sentences.append(f"{blocks[:1].upper()}{blocks[1:]}{chosen}.")
    if plan.vocabulary is not None:
        sentences.append(
            f"Token ids were kept by the rule {dict(plan.vocabulary.rule)} over {plan.vocabulary.counted_tokens:,} "
            f"tokens of {counted}; those kept cover {plan.vocabulary.covered_ratio:.3%} of them."
        )
    return " ".join(sentences)


def _section(table: Table) -> str:
    return f"## {table.title.capitalize()}\n\n{table.markdown()}\n"
