"""The run as a Markdown page, for pull requests and lab notebooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.records.evaluation import Evaluation
from secateur.records.plan import Plan
from secateur.report.tables import Table, evidence_table, parts_table, plan_table, result_table, speed_table, verdict


def render_report(
    plan: Plan,
    evaluation: Evaluation,
    *,
    model_name: str,
    domains: Sequence[str],
    manifest: Mapping[str, Any],
    calibration_tokens_per_s: Mapping[str, float],
    recipe_yaml: str,
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
    """
    tables = [
        result_table(evaluation),
        parts_table(plan.parameters_dense, plan.parameters_pruned),
        evidence_table(evaluation),
        speed_table(evaluation, calibration_tokens_per_s),
        plan_table(plan),
    ]
    notes = "".join(f"- {note}\n" for note in plan.notes)
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items())
    return (
        f"# {model_name}, pruned for {', '.join(domains)}\n\n"
        f"{verdict(evaluation, domains)}\n\n"
        f"Method `{plan.method}`, budget {dict(plan.budget)}, shape `{plan.shape}`, calibrated on "
        f"{plan.calibration_tokens:,} tokens of {', '.join(plan.calibrated_on)}. All numbers are from documents that "
        "were not calibrated on.\n\n"
        + (f"{notes}\n" if notes else "")
        + "\n".join(_section(table) for table in tables)
        + "\n## How this was made\n\n"
        f"Model fingerprint `{manifest['model_fingerprint']}`; {versions}.\n\n"
        f"```yaml\n{recipe_yaml}```\n"
    )


def _section(table: Table) -> str:
    return f"## {table.title.capitalize()}\n\n{table.markdown()}\n"
