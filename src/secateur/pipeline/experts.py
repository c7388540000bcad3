"""A family of experts: the recipe's model cut for each domain by itself, over one calibration, every model kept.

An expert is a run of its own in ``trials/<name>``, with its model, page and exports, calibrated and trained on its
domain's text alone and measured on all texts. ``experts.json`` and the page of the family are written when they are
done; experts that are there are reused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.errors import ConfigError, SecateurError, VerificationError
from secateur.pipeline.job import run
from secateur.pipeline.page import PAGE, read_record, try_document
from secateur.pipeline.recovery import RANDOM_RECOVERED, RECOVERED
from secateur.pipeline.result import versions
from secateur.pipeline.shared import SharedStages
from secateur.pipeline.trials import RECORD, SHARED, TRIALS, Job, Trial, TrialResult, named, prepare, run_jobs
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, with_overrides
from secateur.records.comparison import per_dense_token
from secateur.records.evaluation import Evaluation, ModelScore, paired_difference
from secateur.records.experts import Expert, ExpertFamily
from secateur.records.matrix import DomainMatrix, RowKind, measured_texts, size_matrix
from secateur.registry import unknown_name
from secateur.report.page.document import Document
from secateur.report.page.experts import experts_document
from secateur.report.page.render import render_page
from secateur.store.artifacts import read_json, write_json, write_text

EXPERTS = "experts.json"


@dataclass(frozen=True, slots=True)
class ExpertsResult:
    """What a family has come to.

    Attributes:
        folder: where it lies.
        family: the numbers, and where each model is.
        page: the report to look at, or None with the reason in ``no_page``.
        reused: names of the experts that were there already.
        unverified: by expert, what an engine had against one of its exports; all else of it is done.
    """

    folder: Path
    family: ExpertFamily
    page: Path | None
    no_page: str
    reused: Sequence[str]
    unverified: Mapping[str, str]


def run_experts(
    recipe: Recipe,
    *,
    only: Sequence[str] | None = None,
    max_time: float | None = None,
    progress: Progress = silent,
    on_result: Callable[[TrialResult], None] = lambda result: None,
) -> ExpertsResult:
    """Make an expert of every domain, each with its model, and measure all of them on all text.

    Args:
        recipe: an expert is made of each of its domains; its output is the folder of the family.
        only: domains to make an expert of now; others that are there stay in the family. None makes all.
        max_time: seconds after which no further expert is begun.
        progress: told about everything that takes time.
        on_result: called once for every expert that was asked for.

    Raises:
        SecateurError: the recipe is of one model, an expert can never work, or none could be made.
    """
    _require_family(recipe)
    base = with_overrides(recipe, _for_all(recipe))
    trials = {name: _trial(recipe, name) for name in recipe.domain}
    chosen = _chosen(recipe, only)
    jobs = prepare(base, [trials[name] for name in chosen], keep_models=True)
    there = [job for name in trials if name not in chosen for job in _if_done(base, trials[name])]
    results = run_jobs(jobs, progress=progress, max_time=max_time, keep_models=True, on_result=on_result)
    results += run_jobs(there, keep_models=True)
    exports, unverified, failures = _export([*jobs, *there], results, progress)
    family = _collect(recipe, results, exports, {**unverified, **failures})
    folder = Path(recipe.output).expanduser()
    write_json(folder / EXPERTS, family.to_dict())
    write_text(folder / "recipe.yml", family.matrix.recipe_yaml)
    page, reason = try_document(folder, lambda: experts_document(family))
    reused = [one.trial.name for one in results if one.reused]
    return ExpertsResult(folder, family, page, reason, reused, unverified)


def read_family(folder: Path) -> ExpertFamily:
    """Return the family in a folder.

    Raises:
        CheckpointError: it is missing or broken; the message says how to make it again.
    """
    file = folder / EXPERTS
    again = f"Make it again: secateur experts {folder / 'recipe.yml'} --output {folder}"
    return read_record(file, ExpertFamily.from_dict, again)


def document_of(folder: Path) -> Document:
    """Return what the page of a family says, from its folder alone."""
    return experts_document(read_family(folder))


def write_experts_page(folder: Path) -> Path:
    """Write ``report.html`` of a family's folder from what lies in it, and return its path."""
    write_text(folder / PAGE, render_page(document_of(folder)))
    return folder / PAGE


def _require_family(recipe: Recipe) -> None:
    if len(recipe.domain) < 2:
        raise ConfigError(
            f"a family of experts needs two domains, and the recipe has {', '.join(recipe.domain)} alone. Add another, "
            "or make the one model with secateur run."
        )
    if recipe.loss_bounds():
        raise ConfigError(
            "max_domain_loss and max_general_loss bound the loss on every domain, and an expert is for one of them. "
            "Give a share, for example {channels: 0.2}."
        )
    if dimensions := recipe.prune.options.get("dimensions"):
        raise ConfigError(
            f"prune.options.dimensions says which texts one expert is for ({', '.join(map(str, dimensions))}), so that "
            "all experts would be the same. Make that one with secateur run, or leave dimensions out."
        )


def _chosen(recipe: Recipe, only: Sequence[str] | None) -> list[str]:
    if only is None:
        return list(recipe.domain)
    for name in only:
        if name not in recipe.domain:
            raise ConfigError(unknown_name("domain", name, recipe.domain))
    if not only:
        raise ConfigError(f"name at least one domain to make an expert of: {', '.join(recipe.domain)}.")
    return [name for name in recipe.domain if name in only]


def _for_all(recipe: Recipe) -> dict[str, Any]:
    """Return what every expert has instead of what the recipe says of texts taken together."""
    changes: dict[str, Any] = {"prune.mix": None, "prune.combine": "mean", "calibrate.buckets": None}
    if recipe.prune.vocabulary is not None:
        changes["prune.vocabulary.buckets"] = None
    return changes


def _trial(recipe: Recipe, name: str) -> Trial:
    """Return the run of one expert: its domain alone decides and is trained on."""
    changes: dict[str, Any] = {"prune.buckets": [name]}
    if recipe.recover is not None:
        changes["recover.buckets"] = [name]
    return Trial(name, changes)


def _if_done(base: Recipe, trial: Trial) -> list[Job]:
    """Return an expert that is not asked for now, where it is there as the recipe wants it."""
    if not (Path(base.output).expanduser() / TRIALS / trial.name / RECORD).is_file():
        return []
    try:
        return [job for job in prepare(base, [trial], keep_models=True) if job.is_done]
    except SecateurError:
        return []


def _export(
    jobs: Sequence[Job], results: Sequence[TrialResult], progress: Progress
) -> tuple[dict[str, tuple[str, ...]], dict[str, str], dict[str, str]]:
    """Return the exported paths by expert, what engines had against some, and why others are not there."""
    found: dict[str, tuple[str, ...]] = {}
    unverified: dict[str, str] = {}
    failures: dict[str, str] = {}
    for number, (job, result) in enumerate(zip(jobs, results, strict=True), start=1):
        name = job.trial.name
        if result.status != "done" or not job.recipe.export:
            continue
        try:
            found[name] = _exported(job, named(progress, f"{number}/{len(jobs)} {name}"))
        except VerificationError as error:
            unverified[name] = str(error)
        except SecateurError as error:
            failures[name] = f"its exports: {error}"
    return found, unverified, failures


def _exported(job: Job, progress: Progress) -> tuple[str, ...]:
    """Return the exports of an expert, made where they are not there; its record remembers them."""
    record = read_json(job.folder / RECORD)
    there = record.get("exports", ())
    if there and all(Path(path).exists() for path in there):
        return tuple(there)
    made = run(job.recipe, progress=progress, shared=SharedStages(job.folder.parent.parent / SHARED)).exports
    paths = tuple(str(one.path) for one in made)
    write_json(job.folder / RECORD, {**record, "exports": list(paths)})
    return paths


def _notes(recipe: Recipe) -> list[str]:
    notes = []
    if recipe.prune.combine != "mean":
        notes.append("prune.combine is left out, because every expert is calibrated on its domain alone.")
    if recipe.prune.mix or recipe.prune.buckets:
        key = "mix" if recipe.prune.mix else "buckets"
        notes.append(f"prune.{key} is left out, because every expert is calibrated on its domain alone.")
    if recipe.recover is not None and recipe.recover.buckets:
        notes.append("recover.buckets is left out, because every expert is trained on its domain alone.")
    return notes


def _collect(
    recipe: Recipe,
    results: Sequence[TrialResult],
    exports: Mapping[str, tuple[str, ...]],
    troubles: Mapping[str, str],
) -> ExpertFamily:
    failures = {one.trial.name: one.message for one in results if one.evaluation is None}
    made = {one.trial.name: one for one in results if one.evaluation is not None}
    done = {name: made[name] for name in recipe.domain if name in made}
    if not done:
        name, message = next(iter(failures.items()))
        raise ConfigError(f"no expert could be made. {name}: {message}")
    first = next(iter(done.values()))
    assert first.evaluation is not None and first.plan is not None, "it was measured"
    dense, domains = first.evaluation.models["dense"], tuple(recipe.domain)
    rows: dict[str, tuple[RowKind, ModelScore, str]] = {
        name: ("domain", _result(one.evaluation), str(one.folder)) for name, one in done.items() if one.evaluation
    }
    budget = recipe.prune.budget.model_dump(exclude_none=True) if recipe.prune.budget is not None else {}
    try:
        size = size_matrix(budget, rows, dense, domains)
    except ValueError as error:
        raise ConfigError(
            f"the experts were measured on different test text ({error}): documents that one of them had learned from "
            "were left out there. Give explicit calibration and test files, or remove duplicates from the corpus."
        ) from None
    matrix = DomainMatrix(
        model=recipe.model,
        model_fingerprint=first.plan.model_fingerprint,
        method=recipe.prune.method,
        domains=domains,
        texts=measured_texts(dense, domains),
        parameters_dense=dense.total_parameters,
        sizes=(size,),
        seed=recipe.prune.seed,
        failures={**failures, **troubles},
        notes=tuple(_notes(recipe)),
        recipe_yaml=recipe.to_yaml(),
        versions=versions(),
    )
    return ExpertFamily(matrix, tuple(_expert(name, one, exports.get(name, ())) for name, one in done.items()))


def _result(evaluation: Evaluation) -> ModelScore:
    """Return the row of the model that a run was for."""
    return evaluation.models.get(RECOVERED, evaluation.models["pruned"])


def _expert(name: str, result: TrialResult, exports: tuple[str, ...]) -> Expert:
    assert result.evaluation is not None, "only experts that are done are asked"
    models = result.evaluation.models
    dense, own = models["dense"].text[name], _result(result.evaluation)
    is_trained = RECOVERED in models
    control = models.get(RANDOM_RECOVERED) if is_trained else models.get("random")
    return Expert(
        name=name,
        size_bytes=own.size_bytes,
        folder=str(result.folder),
        model=str(result.folder / (RECOVERED if is_trained else "model")),
        as_cut=paired_difference(models["pruned"].text[name], dense) if is_trained else None,
        against_random=None if control is None else per_dense_token(own.text[name], control.text[name], dense),
        exports=exports,
    )
