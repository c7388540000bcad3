"""The domain matrix: the recipe's model pruned on each domain's text alone, and each result measured on all domains.

Rows are trials over one calibration and one measurement of the dense model. ``matrix.json`` and the page are written
when they are done; trials that are there are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError
from secateur.pipeline.page import PAGE, read_record, try_document
from secateur.pipeline.result import versions
from secateur.pipeline.trials import Trial, TrialResult, run_trials
from secateur.progress import Progress, silent
from secateur.recipe import Budget, Recipe, with_overrides
from secateur.records.evaluation import ModelScore
from secateur.records.matrix import CONTROL, GENERAL, DomainMatrix, RowKind, SizeMatrix, measured_texts, size_matrix
from secateur.report.page.document import Document
from secateur.report.page.matrix import matrix_document
from secateur.report.page.render import render_page
from secateur.store.artifacts import write_json, write_text

MATRIX = "matrix.json"

_SHARES = frozenset({"channels", "groups", "heads", "layers", "attention", "ffn", "parameters"})
"""Budget keys that are removed shares, and that several sizes can be asked of."""

_LEFT_OUT: Mapping[str, Any] = {
    "recover": None,
    "export": [],
    "evaluate.choices": {},
    "evaluate.speed": None,
    "evaluate.generations": None,
    "evaluate.tasks": None,
}
"""Parts of a recipe that a matrix does without, and what stands in their place."""


@dataclass(frozen=True, slots=True)
class MatrixResult:
    """What a matrix has made.

    Attributes:
        folder: where it lies.
        matrix: the numbers.
        page: the report to look at, or None with the reason in ``no_page``.
        reused: names of the trials whose earlier results were still valid.
    """

    folder: Path
    matrix: DomainMatrix
    page: Path | None
    no_page: str
    reused: Sequence[str]


@dataclass(frozen=True, slots=True)
class _Cell:
    """A trial's place in the matrix."""

    row: str
    budget: Mapping[str, Any]
    trial: Trial


def run_matrix(
    recipe: Recipe,
    *,
    budgets: Sequence[float] | None = None,
    max_time: float | None = None,
    keep_models: bool = False,
    progress: Progress = silent,
    on_result: Callable[[TrialResult], None] = lambda result: None,
) -> MatrixResult:
    """Prune on each domain's text alone (and on general text alone), measure every result on all text, and compare.

    Args:
        recipe: its domains are rows and columns, its general text (if any) one more of both; its output is the folder.
        budgets: removed shares to repeat the matrix at; None takes the recipe's budget alone.
        max_time: seconds after which no further trial is started.
        keep_models: whether the pruned models stay.
        progress: told about everything that takes time.
        on_result: called after every trial.

    Raises:
        SecateurError: the recipe has no two texts to compare, a trial can never work, or none could be run.
    """
    _require_rows(recipe)
    cells = _cells(recipe, _budgets(recipe, budgets))
    base = with_overrides(recipe, {key: value for key, value in _LEFT_OUT.items() if _is_there(recipe, key)})
    trials = [cell.trial for cell in cells]
    results = run_trials(
        base, trials, progress=progress, max_time=max_time, keep_models=keep_models, on_result=on_result
    )
    matrix = _collect(recipe, cells, results)
    folder = Path(recipe.output).expanduser()
    write_json(folder / MATRIX, matrix.to_dict())
    write_text(folder / "recipe.yml", matrix.recipe_yaml)
    page, reason = try_document(folder, lambda: matrix_document(matrix))
    return MatrixResult(folder, matrix, page, reason, [one.trial.name for one in results if one.reused])


def read_matrix(folder: Path) -> DomainMatrix:
    """Return the matrix in a folder.

    Raises:
        CheckpointError: it is missing or broken; the message says how to make it again.
    """
    file = folder / MATRIX
    again = f"Make it again: secateur matrix {folder / 'recipe.yml'} --output {folder}"
    return read_record(file, DomainMatrix.from_dict, again)


def document_of(folder: Path) -> Document:
    """Return what the page of a matrix says, from its folder alone."""
    return matrix_document(read_matrix(folder))


def write_matrix_page(folder: Path) -> Path:
    """Write ``report.html`` of a matrix's folder from what lies in it, and return its path."""
    write_text(folder / PAGE, render_page(document_of(folder)))
    return folder / PAGE


def _require_rows(recipe: Recipe) -> None:
    if len(recipe.buckets()) < 2:
        raise ConfigError(
            f"a matrix needs two texts to compare, and the recipe has {', '.join(recipe.buckets())} alone. Add another "
            "domain, or general."
        )
    if recipe.loss_bounds():
        raise ConfigError(
            "a matrix compares models of one size, and max_domain_loss or max_general_loss gives each its own. Give a "
            "share, for example {channels: 0.2}."
        )


def _budgets(recipe: Recipe, shares: Sequence[float] | None) -> list[Mapping[str, Any] | None]:
    """Return the budgets of all sizes as plain data; None where the recipe needs none."""
    given = recipe.prune.budget.model_dump(exclude_none=True) if recipe.prune.budget is not None else None
    if shares is None:
        return [given]
    if given is None or len(given) != 1 or not set(given) <= _SHARES:
        shown = ", ".join(given) if given else "none"
        raise ConfigError(
            f"several sizes need a recipe with one budget that is a share ({', '.join(sorted(_SHARES))}); got {shown}."
        )
    if wrong := [share for share in shares if not 0 < share < 1]:
        raise ConfigError(f"budgets are shares that are removed, between 0 and 1; got {wrong[0]:g}.")
    if len(set(shares)) < len(shares) or not shares:
        raise ConfigError(f"give every budget once; got {', '.join(f'{share:g}' for share in shares) or 'none'}.")
    (key,) = given
    return [Budget.model_validate({key: share}).model_dump(exclude_none=True) for share in shares]


def _cells(recipe: Recipe, budgets: Sequence[Mapping[str, Any] | None]) -> list[_Cell]:
    """Return the trials of all sizes; the control of a size is measured with its first row."""
    rows = list(recipe.buckets())
    cells = []
    for budget in budgets:
        for row in rows:
            changes: dict[str, Any] = {"prune.buckets": [row], "prune.mix": None, "calibrate.buckets": None}
            if recipe.prune.combine != "mean":
                changes["prune.combine"] = "mean"
            changes["evaluate.controls"] = ["random"] if row == rows[0] else []
            if budget is not None:
                changes["prune.budget"] = dict(budget)
            if recipe.prune.vocabulary is not None:
                changes["prune.vocabulary.buckets"] = None
            size = "-".join(f"{key}-{value:g}" for key, value in (budget or {}).items())
            cells.append(_Cell(row, budget or {}, Trial(f"{row}-{size}" if size else row, changes)))
    return cells


def _is_there(recipe: Recipe, key: str) -> bool:
    """Return whether a recipe has a part that a matrix leaves out."""
    section: Any = recipe
    for name in key.split("."):
        section = getattr(section, name)
    return bool(section)


def _notes(recipe: Recipe) -> list[str]:
    left = [key for key in _LEFT_OUT if _is_there(recipe, key)]
    notes = []
    if left:
        notes.append(f"{', '.join(left)} of the recipe {'is' if len(left) == 1 else 'are'} left out of a matrix.")
    if recipe.recover is not None:
        notes.append("The models are as cut: a training on all domains would hide what the calibration text did.")
    if recipe.prune.combine != "mean":
        notes.append("prune.combine is left out, because every row is calibrated on one text alone.")
    if recipe.prune.mix or recipe.prune.buckets:
        key = "mix" if recipe.prune.mix else "buckets"
        notes.append(f"prune.{key} is left out, because every row is calibrated on one text alone.")
    return notes


def _collect(recipe: Recipe, cells: Sequence[_Cell], results: Sequence[TrialResult]) -> DomainMatrix:
    pairs = list(zip(cells, results, strict=True))
    failures = {result.trial.name: result.message for result in results if result.evaluation is None}
    done = [result for result in results if result.evaluation is not None]
    if not done:
        name, message = next(iter(failures.items()))
        raise ConfigError(f"no row of the matrix could be measured. {name}: {message}")
    dense = _score(done[0], "dense")
    domains = tuple(recipe.domain)
    sizes: dict[str, list[tuple[_Cell, TrialResult]]] = {}
    for cell, result in pairs:
        sizes.setdefault(str(cell.budget), []).append((cell, result))
    assert done[0].plan is not None, "it was measured"
    return DomainMatrix(
        model=recipe.model,
        model_fingerprint=done[0].plan.model_fingerprint,
        method=recipe.prune.method,
        domains=domains,
        texts=measured_texts(dense, domains),
        parameters_dense=dense.total_parameters,
        sizes=tuple(size for group in sizes.values() if (size := _size(group, dense, domains)).rows),
        seed=recipe.prune.seed,
        failures=failures,
        notes=tuple(_notes(recipe)),
        recipe_yaml=recipe.to_yaml(),
        versions=versions(),
    )


def _score(result: TrialResult, name: str) -> ModelScore:
    assert result.evaluation is not None, "only trials that are done are asked"
    return result.evaluation.models[name]


def _size(group: Sequence[tuple[_Cell, TrialResult]], dense: ModelScore, domains: Sequence[str]) -> SizeMatrix:
    models: dict[str, tuple[RowKind, ModelScore, str]] = {}
    control: tuple[RowKind, ModelScore, str] | None = None
    for cell, result in group:
        if result.evaluation is None:
            continue
        kind: RowKind = "general" if cell.row == GENERAL else "domain"
        models[cell.row] = (kind, _score(result, "pruned"), str(result.folder))
        if "random" in result.evaluation.models:
            control = ("control", _score(result, "random"), str(result.folder))
    if control is not None:
        models[CONTROL] = control
    try:
        return size_matrix(group[0][0].budget, models, dense, domains)
    except ValueError as error:
        raise ConfigError(
            f"the rows were measured on different test text ({error}): documents that one of them had counted were "
            "left out there. Give explicit calibration and test files, or remove duplicates from the corpus."
        ) from None
