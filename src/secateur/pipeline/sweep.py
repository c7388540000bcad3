"""A sweep: its points run as trials over one calibration, and what they show together.

``sweep.json`` and ``sweep.parquet`` in the output folder are written anew after every point, the page at the end. Which
points lie on the front of size and quality is decided here, from the losses of single documents.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from secateur.errors import CheckpointError, ConfigError
from secateur.files import replacing_path
from secateur.pipeline.evaluation import VOCABULARY
from secateur.pipeline.page import PAGE, try_document
from secateur.pipeline.recovery import RANDOM_RECOVERED, RECOVERED
from secateur.pipeline.result import versions
from secateur.pipeline.trials import Job, Trial, TrialResult, drop_models, prepare, run_jobs, skipped
from secateur.progress import Progress, silent
from secateur.recipe import Recipe
from secateur.records.choices import ChoicesScore
from secateur.records.evaluation import CONFIDENCE_95, Evaluation, ModelScore, PairedDifference, ratio_estimate
from secateur.records.plan import Plan
from secateur.records.sweep import (
    BEHIND,
    FRONT,
    LEVEL,
    Accuracy,
    BucketScore,
    DenseModel,
    Sweep,
    SweepPoint,
    columns_of,
)
from secateur.report.page.records import ratio
from secateur.report.page.render import render_page
from secateur.report.page.sweep import sweep_document
from secateur.store.artifacts import digest, disk_errors, read_json, write_json, write_text
from secateur.sweep_recipe import Point, SweepSpec, chosen, points_of

SWEEP, PARQUET = "sweep.json", "sweep.parquet"

NOT_CHOSEN = "not chosen this time"


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What a sweep has made.

    Attributes:
        folder: of the sweep.
        sweep: its points.
        page: the report to look at, or None with the reason in ``no_page``.
    """

    folder: Path
    sweep: Sweep
    page: Path | None
    no_page: str


Runner = Callable[..., list[TrialResult]]


def run_sweep(
    recipe: Recipe,
    spec: SweepSpec,
    *,
    only: Sequence[str] = (),
    max_time: float | None = None,
    progress: Progress = silent,
    on_result: Callable[[TrialResult, SweepPoint], None] = lambda result, point: None,
    run: Runner = run_jobs,
) -> SweepResult:
    """Run the points of a sweep that are not done yet, and return what all of them show.

    Args:
        recipe: what all points have in common; its output is the folder of the sweep.
        spec: what is varied.
        only: names of the points to run, ``*`` and ``?`` as in file names; the others stay as they are. Without any,
            all are run.
        max_time: seconds after which no further point is started.
        progress: told about everything that takes time.
        on_result: called after every point that was not done before.
        run: runs the trials; the arguments are those of ``run_jobs``.

    Raises:
        SecateurError: a point can never work (the message names it; nothing has run then), or no point could be run.
    """
    points = points_of(spec)
    names = {point.name for point in chosen(points, only)}
    trials = [Trial(point.name, point.overrides) for point in points]
    jobs = prepare(recipe, trials, keep_models=spec.keep_models is True)
    book = _Book(recipe, spec, points, jobs)
    for job in jobs:
        if job.trial.name not in names and not job.is_done:
            book.add(skipped(job, NOT_CHOSEN))
    to_run = [job for job in jobs if job.is_done or job.trial.name in names]

    def note(result: TrialResult) -> None:
        book.add(result)
        if result.reused:
            return
        book.write()
        if spec.keep_models == "front":
            book.drop_models_behind()
        on_result(result, book.point(result.trial.name))

    started = time.perf_counter()
    run(to_run, progress=progress, max_time=max_time, keep_models=bool(spec.keep_models), on_result=note)
    if spec.keep_models == "front":
        gone = {point.name for point in book.write().front if not point.has_model}
        again = [replace(job, is_done=False) for job in to_run if job.trial.name in gone]
        left = None if max_time is None else max_time - (time.perf_counter() - started)
        run(again, progress=progress, max_time=left, keep_models=True, on_result=note)
    sweep = book.write()
    failed = [point for point in sweep.points if point.status == "failed"]
    if failed and not sweep.done:
        raise ConfigError(f"no point could be run. {failed[0].name}: {failed[0].message}")
    page, reason = try_sweep_page(book.folder)
    return SweepResult(book.folder, sweep, page, reason)


class _Book:
    """Collects the results of a sweep's points and writes what they show so far."""

    def __init__(self, recipe: Recipe, spec: SweepSpec, points: Sequence[Point], jobs: Sequence[Job]) -> None:
        self.recipe, self.spec, self.points = recipe, spec, points
        self.folder = Path(recipe.output).expanduser()
        self.jobs = jobs
        self.results: dict[str, TrialResult] = {}
        self.sweep: Sweep | None = None

    def add(self, result: TrialResult) -> None:
        self.results[result.trial.name] = result

    def point(self, name: str) -> SweepPoint:
        assert self.sweep is not None, "write() comes first"
        return next(point for point in self.sweep.points if point.name == name)

    def write(self) -> Sweep:
        """Write what is known so far."""
        results = [self.results[point.name] for point in self.points if point.name in self.results]
        common = yaml.safe_load(self.recipe.to_yaml()) | {"sweep": self.spec.model_dump(mode="json")}
        self.sweep = summarise(
            results,
            model=self.recipe.model,
            domains=list(self.recipe.domain),
            folder=self.folder,
            varied=list(dict.fromkeys(key for point in self.points for key in point.overrides)),
            recipe_yaml=yaml.safe_dump(common, sort_keys=False, allow_unicode=True),
            seed=self.recipe.prune.seed,
        )
        write_json(self.folder / SWEEP, self.sweep.to_dict())
        write_text(self.folder / "sweep.yml", self.sweep.recipe_yaml)
        _write_parquet(self.folder / PARQUET, self.sweep)
        return self.sweep

    def drop_models_behind(self) -> None:
        """Delete the models of points that others beat; a point that was beaten never comes back to the front."""
        assert self.sweep is not None, "write() comes first"
        for point in self.sweep.done:
            if point.standing != FRONT and point.has_model:
                drop_models(self.folder / point.folder)


def summarise(
    results: Sequence[TrialResult],
    *,
    model: str,
    domains: Sequence[str],
    folder: Path,
    varied: Sequence[str],
    recipe_yaml: str,
    seed: int,
) -> Sweep:
    """Return what the results of a sweep's points show together.

    Args:
        results: of the points, in their order.
        model: the dense model, as the recipe names it.
        domains: names of the domain buckets.
        folder: of the sweep.
        varied: the dotted recipe keys that differ between points.
        recipe_yaml: for the record, as ``seed``.
        seed: of the base recipe.
    """
    done = [result for result in results if result.evaluation is not None]
    prints = {result.trial.name: _fingerprint(_evaluation(result)) for result in done}
    common = Counter(prints.values()).most_common(1)[0][0] if prints else ""
    points = [_point(result, domains, folder, prints, common) for result in results]
    standing = standings(
        {
            result.trial.name: Measured.of(_evaluation(result), domains)
            for result in done
            if prints[result.trial.name] == common
        }
    )
    for place, point in enumerate(points):
        stands, by = standing.get(point.name, ("", ""))
        points[place] = replace(point, standing=stands, beaten_by=by)
    first = next((result for result in done if prints[result.trial.name] == common), None)
    return Sweep(
        model=model,
        domains=list(domains),
        points=points,
        dense=_dense(_evaluation(first).models["dense"]) if first else None,
        varied=varied,
        recipe_yaml=recipe_yaml,
        versions=versions(),
        model_fingerprint=_plan(first).model_fingerprint if first else "",
        seed=seed,
    )


def _evaluation(result: TrialResult) -> Evaluation:
    assert result.evaluation is not None, "only asked of points that are done"
    return result.evaluation


def _plan(result: TrialResult) -> Plan:
    assert result.plan is not None, "only asked of points that are done"
    return result.plan


def _fingerprint(evaluation: Evaluation) -> str:
    """Return what identifies the test text of all buckets, whatever tokenizer a pruned model has."""
    return digest({name: score.corpus_fingerprint for name, score in evaluation.models["dense"].text.items()})[:16]


def _dense(dense: ModelScore) -> DenseModel:
    return DenseModel(
        dense.total_parameters,
        dense.size_bytes,
        {bucket: score.perplexity for bucket, score in dense.text.items()},
        {bucket: score.bits_per_byte for bucket, score in dense.text.items()},
    )


def _point(
    result: TrialResult, domains: Sequence[str], folder: Path, prints: Mapping[str, str], common: str
) -> SweepPoint:
    """Return the record of a point, all but its standing."""
    name, trial_folder = result.trial.name, str(result.folder.relative_to(folder).as_posix())
    plain = SweepPoint(
        name, dict(result.trial.overrides), trial_folder, result.status, result.message, round(result.seconds, 3)
    )
    if result.evaluation is None:
        return plain
    evaluation, plan = result.evaluation, _plan(result)
    measured = Measured.of(evaluation, domains)
    score, control = measured.score, measured.control
    beats = None
    if control is not None:
        gained = measured.above(control)
        beats = gained.mean < -CONFIDENCE_95 * gained.stderr
    dense = evaluation.models["dense"]
    return replace(
        plain,
        method=_method(plan),
        row=score.name,
        parameters=score.total_parameters,
        pruning_ratio=1 - score.total_parameters / dense.total_parameters,
        size_bytes=score.size_bytes,
        text={bucket: _bucket_score(score, dense, bucket) for bucket in dense.text},
        choices={asked: _accuracy(answers) for asked, answers in score.choices.items()},
        loss=measured.above(dense).mean,
        loss_stderr=_finite(measured.above(dense).stderr),
        random_ratio=None if control is None else _exp(measured.of_control().mean),
        beats_random=beats,
        fingerprint=prints[name],
        is_comparable=prints[name] == common,
        has_model=(result.folder / "model" / "config.json").is_file(),
    )


def _method(plan: Plan) -> str:
    """Return what chose the units: a method, that of whole layers where only these go, or how often tokens are used."""
    if not plan.layers:
        return VOCABULARY
    return plan.method if plan.narrows else plan.depth_method or plan.method


def _bucket_score(score: ModelScore, dense: ModelScore, bucket: str) -> BucketScore:
    text, one = score.text[bucket], ratio(score.text[bucket], dense.text[bucket])
    return BucketScore(
        text.perplexity,
        _finite(text.perplexity_stderr),
        text.bits_per_byte,
        _finite(text.bits_per_byte_stderr),
        one.value,
        _finite(one.stderr),
        one.low,
        one.high,
    )


def _accuracy(answers: ChoicesScore) -> Accuracy:
    errors = _finite(answers.acc_stderr), _finite(answers.acc_norm_stderr)
    return Accuracy(answers.acc, errors[0], answers.acc_norm, errors[1], answers.chance, answers.num_items)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700.0))


# -- the front ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """The rows of a point that its standing depends on.

    Attributes:
        score: of the model that the point is for.
        dense: of the dense model, whose tokens are counted.
        control: of the random control of the same size, trained alike; None where there is none.
        domains: names of the domain buckets.
    """

    score: ModelScore
    dense: ModelScore
    control: ModelScore | None
    domains: Sequence[str]

    @classmethod
    def of(cls, evaluation: Evaluation, domains: Sequence[str]) -> Measured:
        """Return the rows of an evaluation: the recovered model where there is one."""
        models = evaluation.models
        trained = RECOVERED in models
        control = models.get(RANDOM_RECOVERED if trained else "random")
        return cls(models[RECOVERED if trained else "pruned"], models["dense"], control, domains)

    def above(self, other: ModelScore) -> PairedDifference:
        """Return by how much this model's loss is higher than another one's; see ``_difference``."""
        return _difference(self.score, other, self.dense, self.domains)

    def of_control(self) -> PairedDifference:
        """Return by how much the control's loss is higher than the dense model's."""
        assert self.control is not None, "only asked where there is one"
        return _difference(self.control, self.dense, self.dense, self.domains)


def _difference(first: ModelScore, second: ModelScore, dense: ModelScore, domains: Sequence[str]) -> PairedDifference:
    """Return the mean over the domains of the difference in loss, paired by document, with its standard error.

    It is in nats per token of the dense model's segmentation, so that it is the same for every tokenizer; domains count
    alike, and their errors are independent, because their documents are.
    """
    means, variances = [], []
    for domain in domains:
        pairs = zip(first.text[domain].document_nll, second.text[domain].document_nll, strict=True)
        mean, stderr = ratio_estimate([a - b for a, b in pairs], dense.text[domain].document_tokens)
        means.append(mean)
        variances.append(stderr**2)
    return PairedDifference(math.fsum(means) / len(means), math.sqrt(math.fsum(variances)) / len(means))


def standings(points: Mapping[str, Measured]) -> dict[str, tuple[str, str]]:
    """Return how every point stands to the others: ``standing`` and ``beaten_by`` of ``SweepPoint``.

    Args:
        points: by name, all measured on the same text.
    """
    sizes = {name: point.score.total_parameters for name, point in points.items()}
    losses = {name: point.above(point.dense).mean for name, point in points.items()}

    def beats(one: str, other: str) -> bool:
        """Return whether ``one`` is at least as good in both size and loss, and better in one of them."""
        mine, others = (sizes[one], losses[one]), (sizes[other], losses[other])
        return mine[0] <= others[0] and mine[1] <= others[1] and mine != others

    front = [name for name in points if not any(beats(other, name) for other in points)]
    found = {name: (FRONT, "") for name in front}
    for name, point in points.items():
        if name in front:
            continue
        clearest, most = "", 0.0
        for other in front:
            if beats(other, name):
                lost = point.above(points[other].score)
                errors = lost.mean / lost.stderr if lost.stderr > 0 else math.inf if lost.mean > 0 else 0.0
                clearest, most = (other, errors) if errors > most else (clearest, most)
        found[name] = (BEHIND, clearest) if most > CONFIDENCE_95 else (LEVEL, "")
    return found


# -- files -------------------------------------------------------------------------------------------------------------


def _write_parquet(file: Path, sweep: Sweep) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = columns_of(sweep)
    with disk_errors(file), replacing_path(file) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def is_sweep(folder: Path) -> bool:
    """Return whether a folder is that of a sweep."""
    return (folder / SWEEP).is_file()


def read_sweep(folder: Path) -> Sweep:
    """Return the sweep in a folder.

    Raises:
        CheckpointError: ``sweep.json`` is missing or broken.
    """
    try:
        return Sweep.from_dict(read_json(folder / SWEEP))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / SWEEP} is not a sweep that this secateur wrote: {error!r}. Run `secateur sweep "
            f"{folder / 'sweep.yml'}` again; points that are done are not run again."
        ) from None


def write_sweep_page(folder: Path) -> Path:
    """Write ``report.html`` of a sweep from its ``sweep.json``, and return its path.

    Raises:
        SecateurError: the sweep cannot be read, charts cannot be drawn here, or the page cannot be written.
    """
    write_text(folder / PAGE, render_page(sweep_document(read_sweep(folder))))
    return folder / PAGE


def try_sweep_page(folder: Path) -> tuple[Path | None, str]:
    """Write the page at the end of a sweep: return its path, or None and why there is none."""
    return try_document(folder, lambda: sweep_document(read_sweep(folder)))
