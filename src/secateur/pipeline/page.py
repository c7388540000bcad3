"""``report.html`` of a run folder: its records are read from disk, and no model is; a run and a rebuild do the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from secateur.errors import CheckpointError, ConfigError, SecateurError
from secateur.recipe import Recipe, load_recipe
from secateur.records.evaluation import Evaluation
from secateur.records.exported import Exported
from secateur.records.generations import Generations
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.records.speed import SpeedComparison
from secateur.records.tasks import TaskResults
from secateur.records.units import LAYER_UNIT_KINDS
from secateur.report.page import Document, RunRecords, render_page, run_document
from secateur.report.page.frequency import FrequencyCurve, frequency_curve
from secateur.report.page.importance import ImportanceBin, bin_importance
from secateur.store.artifacts import read_json, read_scores, read_statistics, read_token_counts, write_text

PAGE = "report.html"

T = TypeVar("T")


def write_page(folder: Path) -> Path:
    """Write ``report.html`` of a run folder from what lies in it, and return its path.

    Raises:
        SecateurError: a result is missing or broken (the message says which file, and how to make it again), charts
            cannot be drawn here, or the page cannot be written.
    """
    target = folder / PAGE
    write_text(target, render_page(run_document(read_run(folder))))
    return target


def try_document(folder: Path, document: Callable[[], Document]) -> tuple[Path | None, str]:
    """Write a page at the end of long work: return its path, or None and why there is none.

    Work whose results are all there does not fail for its page. A page of earlier work does not stay in its place.
    """
    try:
        write_text(folder / PAGE, render_page(document()))
        return folder / PAGE, ""
    except Exception as error:
        (folder / PAGE).unlink(missing_ok=True)
        return None, str(error) if isinstance(error, SecateurError) else f"{type(error).__name__}: {error}"


def try_page(folder: Path) -> tuple[Path | None, str]:
    """Write the page at the end of a run: return its path, or None and why there is none."""
    return try_document(folder, lambda: run_document(read_run(folder)))


def read_run(folder: Path) -> RunRecords:
    """Return the records of a finished run.

    Raises:
        ConfigError: the folder is not a run of secateur, or its recipe cannot be read.
        CheckpointError: a result is missing or broken.
    """
    if not (folder / "manifest.json").is_file():
        raise ConfigError(
            f"{folder} is not a run folder of secateur: it has no manifest.json. Give the folder of a run."
        )
    recipe = load_recipe(folder / "recipe.yml")
    again = f"Make it again: secateur run {folder / 'recipe.yml'} --output {folder}"
    manifest = read_record(folder / "manifest.json", lambda data: data, again)
    plan = read_record(folder / "plan.json", Plan.from_dict, again)
    evaluation = read_record(folder / "evaluation.json", Evaluation.from_dict, again)
    for name in ("dense", "pruned"):
        if name not in evaluation.models:
            raise CheckpointError(f"{folder / 'evaluation.json'} has no row {name}: the run is not finished. {again}")
    missing = [name for name in recipe.domain if name not in evaluation.models["dense"].text]
    if missing:
        raise CheckpointError(f"{folder / 'evaluation.json'} does not measure {', '.join(missing)}. {again}")
    return RunRecords(
        model=str(manifest.get("model", recipe.model)),
        domains=list(recipe.domain),
        plan=plan,
        evaluation=evaluation,
        manifest=manifest,
        recipe_yaml=(folder / "recipe.yml").read_text(encoding="utf-8"),
        bounds=recipe.loss_bounds(),
        calibration_tokens_per_s=_speeds(folder, recipe, again),
        recoveries=_recoveries(folder, evaluation, again),
        notes=[*map(str, manifest.get("notes", ()))],
        exports=_exports(folder, manifest),
        speed=_speed(folder, recipe, again),
        generations=_asked(folder / "generations.json", recipe.evaluate.generations, Generations.from_dict, again),
        tasks=_asked(folder / "tasks.json", recipe.evaluate.tasks, TaskResults.from_dict, again),
        importance=_importance(folder, plan, again),
        frequencies=_frequencies(folder, recipe, again),
    )


def read_record(file: Path, parse: Callable[[dict[str, Any]], T], again: str) -> T:
    """Return the record in a JSON file; every error names the file and how to make it again."""
    if not file.is_file():
        raise CheckpointError(f"{file} is missing. {again}")
    try:
        return parse(read_json(file))
    except SecateurError as error:
        told = str(error) if str(file) in str(error) else f"{file}: {error}"
        raise CheckpointError(f"{told} {again}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is broken or of another version ({error}). Delete it. {again}") from None


def _tensors(read: Callable[[Path], T], file: Path, again: str) -> T | None:
    """Return a record of tensors, or None where there is none: a page does without."""
    if not file.is_file():
        return None
    try:
        return read(file)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {again}") from None


def _speeds(folder: Path, recipe: Recipe, again: str) -> dict[str, float]:
    files = {name: folder / "statistics" / f"{name}.json" for name in recipe.buckets()}
    return {
        name: read_record(file, lambda data: float(data["tokens_per_s"]), again)
        for name, file in files.items()
        if file.is_file()
    }


def _speed(folder: Path, recipe: Recipe, again: str) -> SpeedComparison | None:
    """Return what was measured of size and speed; None where the recipe does not ask, or nothing is there."""
    file = folder / "speed.json"
    if recipe.evaluate.speed is None or not file.is_file():
        return None
    return read_record(file, SpeedComparison.from_dict, again)


def _asked(file: Path, spec: object, parse: Callable[[dict[str, Any]], T], again: str) -> T | None:
    """Return the record in a file; None where the recipe does not ask for it, or it is not there."""
    return read_record(file, parse, again) if spec is not None and file.is_file() else None


def _recoveries(folder: Path, evaluation: Evaluation, again: str) -> dict[str, Recovery]:
    files = {name: folder / "recovery" / f"{name}.json" for name in evaluation.models}
    trained = {name for name in files if name in ("recovered", "dense_finetuned", "random_recovered")}
    return {name: read_record(file, Recovery.from_dict, again) for name, file in files.items() if name in trained}


def _exports(folder: Path, manifest: Mapping[str, Any]) -> list[Exported]:
    """Return the exports that were made since the model was, and that are still there."""
    stages: Mapping[str, Mapping[str, Any]] = manifest.get("stages", {})
    made = max(stages.get(name, {}).get("finished", "") for name in ("shrink", "recover:recovered"))
    found = []
    for stage in stages.values():
        if "exported" in stage and stage["finished"] >= made:
            path = folder / stage["files"][0]
            if path.exists():
                found.append(Exported.from_dict({**stage["exported"], "path": path}))
    return found


def _importance(folder: Path, plan: Plan, again: str) -> dict[str, list[ImportanceBin]]:
    """Return binned scores of the kinds that the plan narrows; scores of another plan's units are left out."""
    scores = _tensors(read_scores, folder / "scores" / f"{plan.method}.safetensors", again)
    if scores is None:
        return {}
    found = {}
    for kind in LAYER_UNIT_KINDS:
        if kind in plan.layers and kind in scores.values:
            values: Sequence[npt.NDArray[np.float64]] = [layer.double().numpy() for layer in scores.values[kind]]
            counts = [layer.num_units for layer in plan.layers[kind]]
            if [len(layer) for layer in values] == counts and all(np.isfinite(layer).all() for layer in values):
                found[kind] = bin_importance(values, plan.layers[kind])
    return found


def _frequencies(folder: Path, recipe: Recipe, again: str) -> dict[str, FrequencyCurve]:
    """Return the curve of each domain: of all its counted text where there is some, else of its calibration text."""
    found = {}
    for name in recipe.domain:
        counted = _tensors(read_token_counts, folder / "tokens" / f"{name}.safetensors", again)
        if counted is not None:
            found[name] = frequency_curve(counted.counts.numpy())
            continue
        calibrated = _tensors(read_statistics, folder / "statistics" / f"{name}.safetensors", again)
        if calibrated is not None:
            found[name] = frequency_curve(calibrated[0].token_counts.numpy())
    return found
