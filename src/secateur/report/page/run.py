"""The page of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from secateur.report.page.cautions import cautions, tiles
from secateur.report.page.document import Document
from secateur.report.page.records import RunRecords
from secateur.report.page.sections import sections
from secateur.report.tables import Table, verdict


def run_document(records: RunRecords) -> Document:
    """Return what the page of a run says."""
    return Document(
        kind="Pruning report",
        title=f"{records.short_model}, ",
        subject=f"pruned for {', '.join(records.domains)}",
        verdict=verdict(records.evaluation, records.domains, records.bounds),
        sections=sections(records),
        tiles=tiles(records),
        cautions=[*cautions(records), *(note[:1].upper() + note[1:] for note in records.notes)],
        made=how_made(records),
        recipe_yaml=records.recipe_yaml,
        commands=["secateur run recipe.yml --output again", "secateur report RUN_FOLDER"],
        version=str(records.manifest.get("versions", {}).get("secateur", "")),
    )


def how_made(records: RunRecords) -> Sequence[Table]:
    """Return the facts that let a reader repeat a run, and how long its stages took."""
    manifest: Mapping[str, Any] = records.manifest
    facts = [
        ["dense model", records.model],
        ["its fingerprint", str(manifest.get("model_fingerprint", ""))],
        ["seed of the cut", str(manifest.get("seed", ""))],
        ["seed of the controls", str(records.evaluation.seed)],
        ["calibrated on", f"{records.plan.calibration_tokens:,} tokens of {', '.join(records.plan.calibrated_on)}"],
        *([name, str(version)] for name, version in manifest.get("versions", {}).items()),
    ]
    stages = [
        [name, str(timedelta(seconds=round(stage.get("seconds", 0)))), str(stage.get("finished", ""))]
        for name, stage in manifest.get("stages", {}).items()
    ]
    made = [Table("what it was made from", ["fact", "value"], facts)]
    return [*made, Table("stages", ["stage", "time", "finished"], stages)] if stages else made
