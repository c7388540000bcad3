"""The main job: every name is resolved first, then the stages run in order; each result is kept and reused.

    check -> calibrate -> plan -> shrink -> recover -> evaluate -> export

Where token ids go as well, they are counted and chosen during the check (``vocabulary``), because that needs
no weights.

Stages do not know each other; this file hands one's record to the next and remembers what is done.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch

from secateur.allocate import Request, choose_blocks, make_plan, same_size_plan, with_constants
from secateur.allocate.blocks import BlockCut, Order
from secateur.allocate.budget import parameters_after, token_cost
from secateur.allocate.constants import require_biases
from secateur.allocate.counts import keep_best
from secateur.allocate.vocabulary import size_for_budget
from secateur.calibrate import (
    ImpactListener,
    collect,
    collect_gradients,
    collect_grams,
    collect_impacts,
    collect_with_grams,
)
from secateur.calibrate.gradients import require_dtype
from secateur.corpus import (
    PackedBlocks,
    check_sources,
    source_signature,
)
from secateur.corpus.split import Split, assign_split
from secateur.errors import ConfigError
from secateur.evaluate import evaluate_text
from secateur.evaluate.footprint import memory_bytes
from secateur.evaluate.output_change import Measure, OutputChange
from secateur.export import export_huggingface
from secateur.export.model_card import read_front_matter, render_model_card
from secateur.families.geometry import parameters_by_part
from secateur.pipeline import processes
from secateur.pipeline.bounds import smallest_within
from secateur.pipeline.card import describe_corpora, describe_origin, hub_id_of, terms_of
from secateur.pipeline.depth import DepthStage, Meters
from secateur.pipeline.evaluation import VOCABULARY, Candidate, EvaluationStage, Row, SmallerVocabulary
from secateur.pipeline.exports import ExportStage, check_exports, width_note, with_export_widths
from secateur.pipeline.generations import GenerationsStage
from secateur.pipeline.gradients import GradientStage
from secateur.pipeline.grams import GramStage, Reconstructor, Supply, summary
from secateur.pipeline.impacts import ImpactStage, require_no_mix
from secateur.pipeline.page import try_page
from secateur.pipeline.recovery import (
    BASELINES,
    FINETUNED,
    RANDOM_RECOVERED,
    RECOVERED,
    RecoveryStage,
    Student,
    Teacher,
)
from secateur.pipeline.rounds import (
    Round,
    drop_weights,
    joined,
    read_result_plan,
    require_sizes,
    run_rounds,
    take_result,
)
from secateur.pipeline.search import MEASURED, Search, build_choices, find_counts, is_measured, quick_reconstruct
from secateur.pipeline.speed import SpeedStage, Timed
from secateur.pipeline.streams import FittedWeights, fit_on_pruned_stream
from secateur.pipeline.tasks import TasksStage
from secateur.pipeline.texts import Texts
from secateur.pipeline.vocabulary import VocabularyStage
from secateur.progress import Progress, silent
from secateur.recipe import LOSS_BOUNDS, Recipe
from secateur.records.evaluation import (
    Evaluation,
    PairedDifference,
    TextScore,
    relative_rise,
)
from secateur.records.exported import Exported
from secateur.records.generations import Generations
from secateur.records.gradients import GradientStatistics
from secateur.records.gram import GramsInMemory
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.recovery import Recovery
from secateur.records.scores import Scores
from secateur.records.speed import SpeedComparison
from secateur.records.statistics import BucketStatistics, merge_buckets, mix_buckets, normalised
from secateur.records.tasks import TaskResults
from secateur.recover.train import check_training
from secateur.registry import unknown_name
from secateur.report.choices import choices_table
from secateur.report.markdown import render_report
from secateur.report.tables import evidence_table, parts_table, result_table, verdict
from secateur.score import METHODS, Outcome, TextRecords, notes_on, rehearse, score_units
from secateur.shrink import check_plan, shrink_config, shrink_generation_config, shrink_parameters
from secateur.shrink.apply import Reconstruct
from secateur.shrink.stand_in_weights import StandInWeights
from secateur.store.artifacts import (
    STATISTICS_VERSION,
    digest,
    read_json,
    read_statistics,
    statistics_digest,
    write_json,
    write_scores,
    write_statistics,
)
from secateur.store.checkpoints import (
    build_model,
    choose_device,
    choose_dtype,
    fingerprint,
    generation_data,
    load_model,
    load_tokenizer,
    parameter,
    resolve_model,
    weight_bytes,
)
from secateur.store.run_folder import RunFolder, Shared
from secateur.stream.sources import LoadedLayers

Stage = Literal["calibrate", "plan", "shrink", "recover", "evaluate", "export"]
STAGES: tuple[Stage, ...] = ("calibrate", "plan", "shrink", "recover", "evaluate", "export")

TRAINED = (FINETUNED, RECOVERED, RANDOM_RECOVERED)
_BEFORE_RECOVERY = "This is the model before its training; the trained one was saved as `recovered`. "
ROWS = ("dense", FINETUNED, "pruned", RECOVERED, "random", RANDOM_RECOVERED, "reversed")
"""Rows of the evaluation, in the order of the table."""


@dataclass(slots=True)
class RunResult:
    """What a run has made so far; later stages are None where the run was told to stop earlier.

    Attributes:
        folder: the run folder.
        statistics: per bucket.
        plan: what stays.
        model_folder: the pruned Hugging Face folder; after recovery the recovered one.
        recoveries: what each training went through, by the name of its row.
        evaluation: what was measured.
        speed: how large and how fast dense model and result are; None where that was not asked.
        generations: what dense model and result answer to the same prompts; None where that was not asked.
        tasks: how both do on tasks of the lm-evaluation-harness; None where that was not asked.
        exports: the result in other forms, as the recipe's ``export`` asks.
        page: the report to look at, or None with the reason in ``no_page``.
        summary: one sentence.
        reused: names of the stages whose earlier results were still valid.
        notes: what whoever shares the model must know of the dense model's licence.
    """

    folder: Path
    statistics: Mapping[str, BucketStatistics] = field(default_factory=dict)
    plan: Plan | None = None
    model_folder: Path | None = None
    recoveries: Mapping[str, Recovery] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    speed: SpeedComparison | None = None
    generations: Generations | None = None
    tasks: TaskResults | None = None
    exports: Sequence[Exported] = ()
    page: Path | None = None
    no_page: str = ""
    summary: str = ""
    reused: list[str] = field(default_factory=list)
    notes: tuple[str, ...] = ()


def versions() -> dict[str, str]:
    """Return the versions that results depend on."""
    packages = ("secateur", "torch", "transformers", "tokenizers", "safetensors")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in packages}}


def require_buckets(asked: Iterable[str], known: Iterable[str], key: str = "buckets") -> None:
    """Raise ConfigError for the first bucket that is asked for and not known."""
    names = list(known)
    for name in asked:
        if name not in names:
            raise ConfigError(f"{key}: " + unknown_name("bucket", name, names))


def run(
    recipe: Recipe, *, until: Stage = "export", progress: Progress = silent, shared: Shared | None = None
) -> RunResult:
    """Do the main job and return what it made.

    Args:
        recipe: what is asked.
        until: last stage to run.
        progress: told about everything that takes time.
        shared: where results that other runs made may be found; None where the run is by itself.

    Raises:
        SecateurError: anything a user can mend; raised before the expensive work wherever that is possible.
        VerificationError: an engine does not run an export as the model it was made from; all else is done.
    """
    if until not in STAGES:
        raise ConfigError(unknown_name("stage", until, STAGES))
    if until == "recover" and recipe.recover is None:
        raise ConfigError("the recipe has no recover section, which says how to train. Add one, such as recover: {}.")
    if processes.are_several() and until != "recover":
        raise ConfigError(
            "several processes were started, and only training is done by several. Launch `secateur recover`, then run "
            "this command by itself."
        )
    with processes.main_first():
        job = _Job(recipe, progress, shared=shared)
        job.check(until)
        job.calibrate()
        if until != "calibrate":
            job.plan()
        if until not in ("calibrate", "plan"):
            job.shrink()
    if until in ("recover", "evaluate", "export"):
        job.recover()
    if until in ("evaluate", "export"):
        job.evaluate()
    if until == "export":
        job.export()
    return job.result


def refuse_impossible(recipe: Recipe) -> None:
    """Refuse a recipe that can never work, as far as that is known before weights and whole texts are read.

    Raises:
        SecateurError: as ``run`` would; nothing is written.
    """
    _Job(recipe, silent).refuse_impossible()


def inputs_key(recipe: Recipe) -> str:
    """Return the hash of everything that a recipe's results depend on, wherever and on whatever they are computed."""
    job = _Job(recipe, silent)
    asked = {name: [asdict(item) for item in items] for name, items in job.texts.questions.items()}
    apart: Any = {"output": True, "device": True, "calibrate": {"batch_size"}, "evaluate": {"batch_size"}}
    return digest(job.model_fingerprint, job.source_keys, asked, recipe.model_dump(exclude=apart))


class _Job:
    """One run: holds what is loaded, so that nothing is loaded twice or before it is needed."""

    def __init__(
        self,
        recipe: Recipe,
        progress: Progress,
        teacher: Teacher | None = None,
        reference: RecoveryStage | None = None,
        shared: Shared | None = None,
    ) -> None:
        self.recipe = self._asked = recipe
        self.teacher = teacher
        self.reference = reference
        self.progress = progress
        place = Path(recipe.output).expanduser()
        self.folder = RunFolder.open(place, read_only=not processes.is_main(), shared=shared)
        self.result = RunResult(self.folder.path)
        self._searched: tuple[Scores, Search] | None = None
        self._control: tuple[str, Candidate] | None = None

    # -- what is asked, resolved ---------------------------------------------------------------------------------

    @cached_property
    def checkpoint(self) -> Any:
        return resolve_model(self.recipe.model, trust_remote_code=self.recipe.trust_remote_code)

    @cached_property
    def model_fingerprint(self) -> str:
        return fingerprint(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.checkpoint, trust_remote_code=self.recipe.trust_remote_code)

    @cached_property
    def dense(self) -> Any:
        with self.progress("load the model", None, "") as task:
            model = load_model(
                self.checkpoint,
                device=self.recipe.device,
                dtype=self.recipe.dtype,
                trust_remote_code=self.recipe.trust_remote_code,
            )
            task.advance(1)
        return model

    @cached_property
    def layer_kinds(self) -> list[str]:
        return self.recipe.prune.layer_kinds()

    @cached_property
    def vocabulary(self) -> VocabularyStage | None:
        """The vocabulary's part of the run; None where the vocabulary stays whole."""
        spec = self.recipe.prune.vocabulary_spec()
        if spec is None:
            return None
        default = list(self.recipe.domain) if self.recipe.prune.mix else self.pruning_buckets
        names = self._named(spec.buckets, default, "prune.vocabulary.buckets")
        corpora = self.recipe.buckets()
        return VocabularyStage(
            spec,
            {name: (corpora[name], self.source_keys[name]) for name in names},
            self.checkpoint,
            self.tokenizer,
            self.folder,
            self.progress,
            self.result.reused,
        )

    @cached_property
    def vocabulary_plan(self) -> VocabularyPlan | None:
        """Which token ids stay; where the budget is met by the vocabulary alone, as many as it leaves."""
        return self._vocabulary_for(self.request)

    def _vocabulary_for(self, request: Request) -> VocabularyPlan | None:
        if self.vocabulary is None:
            return None
        by_budget = not self.layer_kinds and {"parameters", "bytes"} & set(request.budget)
        shapes, geometry = self.checkpoint.shapes, self.checkpoint.geometry
        return self.vocabulary.plan(size_for_budget(request, geometry, shapes) if by_budget else None)

    @cached_property
    def calibration_buckets(self) -> list[str]:
        """Buckets that are run through the model; none where only the vocabulary is cut."""
        if not self.layer_kinds:
            return []
        return self._named(self.recipe.calibrate.buckets, list(self.recipe.buckets()), "calibrate.buckets")

    @cached_property
    def pruning_buckets(self) -> list[str]:
        mix = self.recipe.prune.mix
        asked, key = (list(mix), "prune.mix") if mix else (self.recipe.prune.buckets, "prune.buckets")
        named = self._named(asked, list(self.recipe.domain), key)
        missing = [name for name in named if self.layer_kinds and name not in self.calibration_buckets]
        if missing:
            raise ConfigError(f"{key} names {missing[0]}, which calibrate.buckets leaves out. Add it there.")
        return named

    def _named(self, asked: Sequence[str] | None, default: list[str], key: str) -> list[str]:
        require_buckets(asked or (), self.recipe.buckets(), key)
        return list(asked) if asked else default

    @cached_property
    def reference_buckets(self) -> list[str]:
        """Buckets that the method looks at one by one, by its options."""
        prune = self.recipe.prune
        if not prune.width_kinds():
            return []
        named = METHODS[prune.method].named_buckets(prune.options)
        key = f"prune.method {prune.method}"
        require_buckets(named, self.recipe.buckets(), key)
        require_buckets(named, self.calibration_buckets, f"{key} with calibrate.buckets")
        require_no_mix(prune.method, METHODS[prune.method].reads_impacts(prune.options), prune.mix)
        return named

    @cached_property
    def impacts(self) -> ImpactStage:
        """What single documents say, as a part of the run; it does nothing where the method does without."""
        prune = self.recipe.prune
        kinds = prune.width_kinds() if METHODS[prune.method].reads_impacts(prune.options) else []
        geometry, who = self.checkpoint.geometry, f"method {prune.method}"
        return ImpactStage(
            kinds=kinds,
            buckets=self.pruning_buckets,
            references=self.reference_buckets,
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            listen=lambda name: ImpactListener(self.dense, self.texts.split(name, "calibration"), geometry, kinds, who),
            collect=lambda name: collect_impacts(
                self.dense,
                self.texts.split(name, "calibration"),
                geometry,
                kinds,
                batch_size=self.recipe.calibrate.batch_size,
                progress=self.progress,
                label=f"impact on documents of {name}",
                who=who,
            ),
        )

    def _records_of(self, name: str) -> TextRecords:
        """Return what is known of one bucket alone."""
        return TextRecords(
            self.result.statistics[name],
            (name,),
            self.grams.load_bucket(name),
            self.gradients.load_bucket(name),
            self.impacts.load_bucket(name),
        )

    @cached_property
    def grams(self) -> GramStage:
        """The Gram matrices' part of the run; it does nothing where neither method nor reconstruction needs them."""
        prune = self.recipe.prune
        measured = prune.reconstruct != "none" and prune.allocation in MEASURED
        needed = prune.reconstruct == "dense" or measured or METHODS[prune.method].reads_grams(prune.options)
        return GramStage(
            kinds=prune.width_kinds() if needed else [],
            buckets=self.pruning_buckets,
            judged=prune.reconstruct == "dense",
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            collect=self._collect_grams,
            mix=prune.mix,
            references=self.reference_buckets if METHODS[prune.method].contrast else [],
        )

    def _collect_grams(self, name: str, split: Split) -> GramsInMemory:
        return collect_grams(
            self.dense,
            self.texts.split(name, split),
            self.checkpoint.geometry,
            self.grams.kinds,
            batch_size=self.recipe.calibrate.batch_size,
            progress=self.progress,
            label=f"Gram matrices of {name} ({split})",
        )

    @cached_property
    def gradients(self) -> GradientStage:
        """The gradients' part of the run; it does nothing where the method does without."""
        prune = self.recipe.prune
        return GradientStage(
            kinds=prune.width_kinds() if METHODS[prune.method].reads_gradients(prune.options) else [],
            buckets=self.pruning_buckets,
            max_tokens=self.recipe.calibrate.gradient_tokens,
            outputs=METHODS[prune.method].reads_output_gradients(prune.options),
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            collect=self._collect_gradients,
            mix=prune.mix,
            references=self.reference_buckets if METHODS[prune.method].contrast else [],
            sketch=METHODS[prune.method].reads_gradient_sketches(prune.options),
        )

    def _collect_gradients(self, name: str) -> GradientStatistics:
        return collect_gradients(
            self.dense,
            self.texts.split(name, "calibration"),
            self.checkpoint.geometry,
            self.gradients.kinds,
            max_tokens=self.gradients.max_tokens,
            outputs=self.gradients.outputs,
            sketch=self.gradients.sketch,
            progress=self.progress,
            label=f"gradients on {name}",
            who=f"method {self.recipe.prune.method}",
        )

    @cached_property
    def request(self) -> Request:
        return Request.of(self.recipe.prune, bytes_per_parameter=float(self.checkpoint.dtype.itemsize))

    @cached_property
    def source_keys(self) -> dict[str, str]:
        return {name: digest(source_signature(spec), spec.model_dump()) for name, spec in self.recipe.buckets().items()}

    def check(self, until: Stage) -> None:
        """Resolve every name and refuse what cannot work, before weights are read, text is run or files are written."""
        self.refuse_impossible()
        if self.vocabulary is not None:
            self._rehearse_plan()
        self._read_new_text(until)
        self._require_enough_text()
        self.folder.describe(
            versions=versions(),
            model=self.recipe.model,
            model_fingerprint=self.model_fingerprint,
            seed=self.recipe.prune.seed,
            notes=list(self.result.notes),
        )
        self.folder.write_text("recipe.yml", self.recipe.to_yaml())
        if self.vocabulary is not None:
            self.vocabulary.save()

    def refuse_impossible(self) -> None:
        """Refuse what cannot work as far as that is known without reading whole texts; nothing is written."""
        METHODS[self.recipe.prune.method].check_options(self.recipe.prune.options)
        METHODS[self.recipe.prune.depth_method].check_options(self.recipe.prune.depth_options)
        if self.recipe.export:
            check_exports(self.recipe)
            self.recipe = with_export_widths(self.recipe, self.checkpoint.geometry)
        _ = self.pruning_buckets, self.reference_buckets
        for spec in self.recipe.buckets().values():
            check_sources(spec)
        _ = self.texts.questions
        terms = terms_of(self.checkpoint)
        self.result.notes = (f"sharing: {terms.describe()}",) if terms.duties else ()
        device = choose_device(self.recipe.device)
        if self.gradients.kinds:
            dtype = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, device)
            require_dtype(dtype, "the model", f"method {self.recipe.prune.method}")
        if self.vocabulary is not None:
            self.vocabulary.check()
        if self.recipe.recover is not None:
            check_training(self.recipe.recover, device)
            require_sizes(self.recipe)
        if self.recovery is not None:
            self.recovery.check()
        self.speed.check()
        self.generations.check()
        self.tasks.check(self._dense_key)
        self._rehearse()
        if self.vocabulary is None:
            self._rehearse_plan()
        self.exports.check_model(lambda: self.tokenizer)
        self._require_enough_text()

    def _rehearse(self) -> None:
        """Try the methods on made-up statistics, and refuse measurements that cannot be made."""
        geometry = self.checkpoint.geometry
        geometry.require_positions(self.recipe.calibrate.block_size)
        prune = self.recipe.prune
        rehearse(prune.method, geometry, prune.width_kinds(), prune.options, self.pruning_buckets)
        rehearse(prune.depth_method, geometry, prune.block_kinds(), prune.depth_options)
        self._check_measurements()
        if prune.bias_compensation:
            require_biases(geometry, prune.width_kinds(), self.checkpoint.shapes)

    def _rehearse_plan(self) -> None:
        """Plan on made-up scores, so that a budget that cannot be met is refused before calibration.

        Where the vocabulary is cut too, its tokens are counted for that.
        """
        geometry, kinds = self.checkpoint.geometry, self.layer_kinds
        vocabulary = self.vocabulary_plan
        if "threshold" in self.request.budget or self._bounds or not kinds:
            return
        counts = {kind: geometry.num_units(kind) for kind in kinds}
        values = {kind: [torch.arange(n, dtype=torch.float64) for n in per_layer] for kind, per_layer in counts.items()}
        scores = Scores("rehearsal", {}, (), values)
        request = replace(self.request, influence=[0.0] * geometry.num_layers)
        make_plan(scores, geometry, self.checkpoint.shapes, request, vocabulary=vocabulary)

    def _check_measurements(self) -> None:
        """Refuse to measure on less than a block of text, or an order of removals that nothing asks for."""
        prune, block_size = self.recipe.prune, self.recipe.calibrate.block_size
        in_order = bool(prune.block_kinds()) and bool(METHODS[prune.depth_method].measure)
        if (in_order or prune.allocation in MEASURED) and prune.search.tokens < block_size:
            raise ConfigError(
                f"prune.search.tokens is {prune.search.tokens}, less than one block of {block_size} tokens. Raise it, "
                "or lower calibrate.block_size."
            )
        if in_order and prune.allocation in MEASURED and prune.shape == "uneven":
            raise ConfigError(
                f"allocation: {prune.allocation} measures whole blocks itself, so depth_method: {prune.depth_method} "
                "would be measured for nothing. Leave depth_method out, or use another allocation."
            )

    def _read_new_text(self, until: Stage) -> None:
        """Read the text that is still to be calibrated on, and the test text, so that too little is said now."""
        for name in self.calibration_buckets:
            missing = self.gradients.is_missing(name) or self.impacts.is_missing(name)
            if missing or not self._is_calibrated(name):
                _ = self.texts.split(name, "calibration")
            for split in self.grams.missing(name):
                _ = self.texts.split(name, split)
            if self.recipe.prune.reconstruct == "pruned" and name in self.pruning_buckets and until != "calibrate":
                _ = self.texts.split(name, "validation")
            if name in self._bounds and until != "calibrate":
                _ = self.texts.sizing(name)
        if self.recovery is not None and until in ("recover", "evaluate", "export"):
            self.recovery.save_documents()
        measured = until in ("evaluate", "export")
        if measured and not self.evaluation.is_done("dense", self._evaluation_key("dense", None)):
            _ = self.texts.test

    def _require_enough_text(self) -> None:
        """Refuse Gram matrices that would be singular; before the text is read, by the most that may be taken."""
        if (supply := self._supply()) is not None:
            supply.require()

    def _supply(self) -> Supply | None:
        """Return how much text Gram matrices rest on; None where none are needed or no limit is known yet."""
        wanted = self.layer_kinds if self.recipe.prune.reconstruct == "pruned" else self.grams.kinds
        kinds = [kind for kind in wanted if kind in self.checkpoint.geometry.axes]
        if not kinds:
            return None
        tokens = {name: self._num_calibration_tokens(name) for name in self.pruning_buckets}
        known = {name: count for name, count in tokens.items() if count is not None}
        if len(known) < len(tokens):
            return None
        return Supply.of(self.checkpoint.geometry, kinds, known, self.recipe.prune.mix)

    def _num_calibration_tokens(self, name: str) -> int | None:
        """Return the tokens of a bucket that are calibrated on; before it is read, the most that may be."""
        if name in self.result.statistics:
            return self.result.statistics[name].num_tokens
        if self.texts.has(name, "calibration"):
            return self.texts.split(name, "calibration").num_tokens
        if self._is_calibrated(name):
            return read_statistics(self._statistics_file(name))[0].num_tokens
        return self.recipe.calibrate.max_tokens

    # -- stages --------------------------------------------------------------------------------------------------

    def calibrate(self) -> None:
        statistics = {name: self._calibrate_bucket(name) for name in self.calibration_buckets}
        self.result.statistics = statistics
        for name in self.calibration_buckets:
            calibrated_now = f"calibrate:{name}" not in self.result.reused
            self.result.reused += self.grams.take(name)[calibrated_now:]  # the first came with the calibration
            self.result.reused += self.gradients.take(name)
            self.result.reused += self.impacts.take(name)[calibrated_now:]  # heard in the calibration pass

    def _calibrate_bucket(self, name: str) -> BucketStatistics:
        stage, file = f"calibrate:{name}", self._statistics_file(name)
        if self._is_calibrated(name):
            self.result.reused.append(stage)
            return read_statistics(file)[0]
        self.folder.forget(stage)
        started = time.perf_counter()
        blocks = self.texts.split(name, "calibration")
        options: dict[str, Any] = {
            "batch_size": self.recipe.calibrate.batch_size,
            "progress": self.progress,
            "label": f"calibrate on {name}",
            "also": self.impacts.listeners(name),
        }
        if self.grams.splits(name):  # both in one pass
            statistics, grams = collect_with_grams(
                self.dense, blocks, self.checkpoint.geometry, self.grams.kinds, **options
            )
            self.grams.write(name, "calibration", grams, started)
        else:
            statistics = collect(self.dense, blocks, self.checkpoint.geometry, **options)
        self.impacts.keep(name, options["also"], started)
        write_statistics(
            file,
            statistics,
            {
                "bucket": name,
                "model_fingerprint": self.model_fingerprint,
                "family": self.checkpoint.geometry.family.name,
                "versions": versions(),
                "text": blocks.describe(),
            },
        )
        self.folder.finish(stage, self._calibration_key(name), started, tokens=statistics.num_tokens)
        return statistics

    def _statistics_file(self, name: str) -> Path:
        return self.folder.path / "statistics" / f"{name}.safetensors"

    def _calibration_key(self, name: str) -> str:
        options = self.recipe.calibrate.model_dump(exclude={"buckets", "batch_size", "gradient_tokens"})
        return digest(STATISTICS_VERSION, self.model_fingerprint, self.source_keys[name], options, self.recipe.dtype)

    def _is_calibrated(self, name: str) -> bool:
        file = self._statistics_file(name)
        key = self._calibration_key(name)
        return self.folder.is_done(f"calibrate:{name}", key, file, file.with_suffix(".json"))

    def _reconstructor(self, plan: Plan) -> Reconstructor | FittedWeights | None:
        """Return what gives the weights of projections that lose channels; None keeps their columns as they are."""
        if self.recipe.prune.reconstruct == "none" or not plan.narrows:
            return None
        if self.recipe.prune.reconstruct == "pruned":
            texts: dict[Split, list[PackedBlocks]] = {
                split: [self.texts.split(name, split) for name in self.pruning_buckets]
                for split in ("calibration", "validation")
            }
            return fit_on_pruned_stream(
                LoadedLayers(self.dense, self.checkpoint.geometry),
                plan,
                texts["calibration"],
                texts["validation"],
                batch_size=self.recipe.calibrate.batch_size,
                shares=list(normalised(self.recipe.prune.mix).values()) if self.recipe.prune.mix else None,
                progress=self.progress,
            )
        return self.grams.reconstructor()

    # -- text ----------------------------------------------------------------------------------------------------

    @cached_property
    def texts(self) -> Texts:
        """The text of this run."""
        return Texts(
            self.recipe,
            self.checkpoint,
            lambda: self.tokenizer,
            self._learned_documents,
            self._seen_documents,
            self.vocabulary is not None,
            self.progress,
        )

    def _learned_documents(self, name: str) -> Collection[int]:
        """Return the hashes of the documents of a bucket that are calibrated on, or that models are trained on."""
        trained = self.recovery.training_documents() if self.recovery is not None else frozenset()
        return trained.union(self._calibration_documents(name))

    def _seen_documents(self) -> frozenset[int]:
        """Return the hashes of every document that is, or in this run will be, calibrated on, counted or trained on."""
        seen: set[int] = set(self.recovery.documents() if self.recovery is not None else ())
        if self.vocabulary is not None:
            seen.update(h for counts in self.vocabulary.counts.values() for h in counts.documents.tolist())
        for name in self.calibration_buckets:
            seen.update(self._calibration_documents(name))
        return frozenset(seen)

    def _seen_test_documents(self) -> frozenset[int]:
        """Return those of the seen documents that could be in a test text, if they were not seen.

        Where text is split by hash there are none, so that what is measured does not depend on what else was read.
        """
        specs = self.recipe.buckets().values()
        if any(spec.test is not None for spec in specs):
            return self._seen_documents()
        shares = {spec.splits.model_dump_json(): spec.splits for spec in specs}.values()
        return frozenset(
            document
            for document in self._seen_documents()
            if any(assign_split(document, ratios) == "test" for ratios in shares)
        )

    def _calibration_documents(self, name: str) -> Collection[int]:
        if name in self.result.statistics:
            return set(self.result.statistics[name].documents.tolist())
        if self._is_calibrated(name):
            return set(read_statistics(self._statistics_file(name))[0].documents.tolist())
        return set(self.texts.split(name, "calibration").documents.tolist())

    def _merged(self) -> BucketStatistics:
        if self.recipe.prune.mix:
            return mix_buckets(self.result.statistics, self.recipe.prune.mix)
        first, *rest = (self.result.statistics[name] for name in self.pruning_buckets)
        for statistics in rest:
            first = merge_buckets(first, statistics)
        return first

    def _score(
        self,
        method: str,
        statistics: BucketStatistics,
        options: Mapping[str, Any],
        depth_method: str,
        depth_options: Mapping[str, Any],
        *,
        kinds: Sequence[str] | None = None,
        request: Request | None = None,
    ) -> Scores:
        """Return the scores of some kinds of unit, by default all that are cut; ``request`` says how far to measure."""
        return score_units(
            method,
            statistics,
            self.checkpoint.geometry,
            self.layer_kinds if kinds is None else kinds,
            load_tensor=lambda name: parameter(self.dense, name),
            options=options,
            seed=self.recipe.prune.seed,
            buckets=self.pruning_buckets,
            inputs_fingerprint=self.model_fingerprint,
            grams=self.grams.load("calibration"),
            gradients=self.gradients.load(),
            depth_method=depth_method,
            depth_options=depth_options,
            removal_losses=self._removal_losses(depth_method, request or self.request),
            impacts=self.impacts.load(),
            by_bucket={name: self._records_of(name) for name in self.reference_buckets},
        )

    def _removal_losses(self, depth_method: str, request: Request) -> Mapping[str, Sequence[float]] | None:
        """Return what is measured as blocks go, as many as a budget asks; for a bound only the first of each."""
        kinds = self.recipe.prune.block_kinds()
        if not (kinds and METHODS[depth_method].measure):
            return None
        geometry, shapes = self.checkpoint.geometry, self.checkpoint.shapes

        def choose(order: Order) -> BlockCut:
            if set(request.budget) & set(LOSS_BOUNDS):
                return BlockCut(geometry)
            vocabulary = self._vocabulary_for(request)
            given_up = vocabulary.num_removed * token_cost(geometry, shapes) if vocabulary else 0
            competing = kinds if request.allocation in MEASURED else self.layer_kinds
            return choose_blocks(competing, geometry, shapes, request, order, given_up=given_up)

        return self._depth.removal_losses(kinds, choose)

    @cached_property
    def _depth(self) -> DepthStage:
        """The measured removals of whole blocks; it does nothing before it is asked."""
        prune, measure = self.recipe.prune, METHODS[self.recipe.prune.depth_method].measure
        assert measure, "only methods with a measure have blocks taken out"
        mix = normalised(prune.mix) if prune.mix else {}
        return DepthStage(
            self.checkpoint.geometry,
            lambda name: parameter(self.dense, name),
            lambda: self._meters(measure),
            self.folder,
            digest([self._calibration_key(name) for name in self.pruning_buckets], mix, prune.search.tokens, measure),
            self.progress,
            self.result.reused,
        )

    def _meters(self, measure: Measure) -> Meters:
        """Return what measures candidates on the first calibration text of every bucket that decides."""
        prune, source = self.recipe.prune, LoadedLayers(self.dense, self.checkpoint.geometry)
        texts = {name: self.texts.read(name, "calibration", prune.search.tokens) for name in self.pruning_buckets}
        sizes = {name: float(blocks.num_tokens) for name, blocks in texts.items()}
        meters = {name: OutputChange(source, blocks, measure=measure) for name, blocks in texts.items()}
        return Meters(meters, normalised(prune.mix or sizes))

    def plan(self) -> None:
        file, prune = self.folder.path / "plan.json", self.recipe.prune
        merged = self._merged() if self.layer_kinds else None
        key = self._plan_key(merged)
        if self.folder.is_done("plan", key, file):
            self.result.reused.append("plan")
            self.result.plan = self._read_plan(file, merged)
            if merged is not None and not self._has_scores():
                self._write_scores(merged)
            self._check_exports()
            return
        started = time.perf_counter()
        self.folder.forget("plan")
        scores = Scores(prune.method, {}, self.pruning_buckets, {}) if merged is None else self._write_scores(merged)
        plan = self._bounded_plan(scores, merged) if self._bounds else self._plan_for(self.request, scores, merged)
        plan = replace(plan, notes=(*plan.notes, *self._method_notes(scores, plan)))
        self.result.plan = self._with_constants(self._with_text(plan), merged)
        write_json(file, self.result.plan.to_dict())
        self.folder.finish("plan", key, started)
        self._check_exports()

    def _method_notes(self, scores: Scores, plan: Plan) -> list[str]:
        """Return what the method says of a plan that was made with its scores."""
        fingerprints = {name: bucket.corpus_fingerprint for name, bucket in self.result.statistics.items()}
        options = self.recipe.prune.options
        return notes_on(scores.method, Outcome(options, scores.values, plan, fingerprints)) if plan.layers else []

    def _check_exports(self) -> None:
        """Refuse a plan that the exports cannot hold, before any weight is cut."""
        plan = self._required_plan()
        self.exports.check_plan(plan, lambda: self._tokenizer_of(plan))

    def _plan_key(self, merged: BucketStatistics | None) -> str:
        inputs = [] if merged is None else [statistics_digest(merged), *self.gradients.keys(), *self.impacts.keys()]
        inputs += [statistics_digest(self.result.statistics[name]) for name in self.reference_buckets]
        if self.vocabulary is not None:
            inputs += [self.vocabulary.vocabulary.fingerprint, self.vocabulary.merged.fingerprint]
        if self._bounds:
            inputs.append(str(self.recipe.evaluate.max_tokens))
        return digest(self.model_fingerprint, inputs, self.recipe.prune.model_dump(), self.checkpoint.dtype.itemsize)

    def _plan_for(self, request: Request, scores: Scores, merged: BucketStatistics | None) -> Plan:
        """Return the plan that meets a budget in size."""
        geometry, shapes = self.checkpoint.geometry, self.checkpoint.shapes
        vocabulary = self._vocabulary_for(request)
        if merged is not None:
            request = replace(request, influence=merged.layer_influence())
        return make_plan(
            scores,
            geometry,
            shapes,
            request,
            vocabulary=vocabulary,
            model_fingerprint=self.model_fingerprint,
            calibration_tokens=0 if merged is None else merged.num_tokens,
            counts=self._measured_counts(request, scores, vocabulary) if is_measured(request, scores) else None,
        )

    def _measured_counts(
        self, request: Request, scores: Scores, vocabulary: VocabularyPlan | None
    ) -> Mapping[str, Sequence[int]]:
        geometry, shapes = self.checkpoint.geometry, self.checkpoint.shapes
        given_up = vocabulary.num_removed * token_cost(geometry, shapes) if vocabulary else 0
        if self._searched is None or self._searched[0] is not scores:
            self._searched = scores, self._search(scores)
        return find_counts(self._searched[1], request, geometry, shapes, scores, given_up)

    def _search(self, scores: Scores) -> Search:
        prune, geometry = self.recipe.prune, self.checkpoint.geometry
        meters = self._meters("kl")
        grams = self.grams.load("calibration") if prune.reconstruct != "none" else None
        of_a_cut = {"method", "options", "normalize", "reconstruct", "buckets", "mix", "seed"}
        cuts = prune.model_dump(include=of_a_cut)
        return Search(
            meters=meters.by_bucket,
            weights=meters.weights,
            stand_ins=StandInWeights(
                geometry,
                lambda name: parameter(self.dense, name),
                lambda kind, layer, count: keep_best(
                    scores.values[kind][layer], count, groups=geometry.axes[kind][layer].num_groups
                ),
                None if grams is None else quick_reconstruct(grams),
            ),
            choices=build_choices(geometry, self.checkpoint.shapes, self.request, scores, prune.layer_kinds()),
            spec=prune.search,
            folder=self.folder,
            key=digest([self._calibration_key(name) for name in self.pruning_buckets], cuts, prune.search.tokens),
            seed=prune.seed,
            progress=self.progress,
            reused=self.result.reused,
        )

    # -- budgets in quality --------------------------------------------------------------------------------------

    @cached_property
    def _bounds(self) -> dict[str, float]:
        """By bucket, how much its loss may rise; empty where the budget is a size."""
        return self.recipe.loss_bounds()

    def _bounded_plan(self, scores: Scores, merged: BucketStatistics | None) -> Plan:
        geometry, shapes = self.checkpoint.geometry, self.checkpoint.shapes
        total = sum(parameters_by_part(shapes, geometry).values())
        by_rule = self.vocabulary_plan if self.layer_kinds else None
        plan = smallest_within(
            self._bounds,
            least=by_rule.num_removed * token_cost(geometry, shapes) / total if by_rule else 0.0,
            plan=lambda share: self._plan_of_size(share, scores, merged),
            measure=lambda plan: self._rises(self._with_constants(plan, merged)),
            file=self.folder.path / "search" / "sizes.json",
            key=digest(self._plan_key(merged), [self._calibration_key(name) for name in self._bounds]),
            progress=self.progress,
        )
        return replace(plan, budget=dict(self.request.budget))

    def _plan_of_size(self, share: float, scores: Scores, merged: BucketStatistics | None) -> Plan:
        """Return the plan that removes a share of all parameters; measured removals go as far as that needs."""
        request, prune = replace(self.request, budget={"parameters": share}), self.recipe.prune
        if merged is not None and scores.cumulative:
            depth = prune.depth_method, prune.depth_options
            blocks = self._score(depth[0], merged, depth[1], *depth, kinds=prune.block_kinds(), request=request)
            scores = replace(scores, values={**scores.values, **blocks.values})
        return self._plan_for(request, scores, merged)

    def _rises(self, plan: Plan) -> dict[str, PairedDifference]:
        """Return by how much a plan's model loses more than the dense one, per bounded bucket, on validation text."""
        model = self._pruned(plan, None, self._reconstructor(plan))
        tokenizer = self._tokenizer_of(plan)
        return {
            name: relative_rise(self._validation_score(name, model, tokenizer), self._dense_validation[name])
            for name in self._bounds
        }

    @cached_property
    def _dense_validation(self) -> dict[str, TextScore]:
        return {name: self._validation_score(name, self.dense, self.tokenizer) for name in self._bounds}

    def _validation_score(self, name: str, model: Any, tokenizer: Any) -> TextScore:
        return evaluate_text(
            model,
            self.texts.resegmented(self.texts.sizing(name), tokenizer),
            self.checkpoint.geometry.family,
            batch_size=self.recipe.evaluate.batch_size,
            progress=self.progress,
            label=f"evaluate on {name} (validation)",
        )

    @property
    def _scores_file(self) -> Path:
        prune = self.recipe.prune
        name = prune.method if prune.width_kinds() else prune.depth_method
        return self.folder.path / "scores" / f"{name}.safetensors"

    def _has_scores(self) -> bool:
        return self._scores_file.exists() and self._scores_file.with_suffix(".json").exists()

    def _write_scores(self, statistics: BucketStatistics) -> Scores:
        prune = self.recipe.prune
        scores = self._score(prune.method, statistics, prune.options, prune.depth_method, prune.depth_options)
        write_scores(self._scores_file, scores)
        return scores

    def _read_plan(self, file: Path, statistics: BucketStatistics | None) -> Plan:
        """Return the plan on disk; a person may have edited its kept units, so what follows from them is redone."""
        plan, geometry = Plan.from_dict(read_json(file)), self.checkpoint.geometry
        check_plan(plan, geometry)
        removed = {kind: [layer.num_removed for layer in layers] for kind, layers in plan.layers.items()}
        tokens_removed = plan.vocabulary.num_removed if plan.vocabulary else 0
        left = parameters_after(self.checkpoint.shapes, geometry, removed, tokens_removed=tokens_removed)
        return self._with_constants(replace(plan, parameters_pruned=left), statistics)

    def _with_text(self, plan: Plan) -> Plan:
        """Return the plan with the weights of its texts, and a note where they are few for what is asked of them."""
        mix, supply = self.recipe.prune.mix, self._supply()
        notes = [*width_note(self._asked, self.recipe), *(supply.notes() if supply is not None else [])]
        return replace(plan, mix=normalised(mix) if mix else {}, notes=(*plan.notes, *notes))

    def _with_constants(self, plan: Plan, statistics: BucketStatistics | None) -> Plan:
        if statistics is None:
            return plan
        means = self.recipe.prune.bias_compensation
        return with_constants(plan, self.checkpoint.geometry, statistics.moments, self.checkpoint.shapes, means=means)

    def shrink(self) -> None:
        plan = self._required_plan()
        folder = self.folder.path / "model"
        key = digest(self.model_fingerprint, plan.to_dict(), str(self.checkpoint.dtype), self._reconstruction_key())
        self.result.model_folder = folder
        if self.folder.is_done("shrink", key, folder / "config.json"):
            self.result.reused.append("shrink")
            return
        started = time.perf_counter()
        self.folder.forget("shrink")
        tokenizer = self._tokenizer_of(plan)
        reconstructor = self._reconstructor(plan)
        pruned = self._pruned(plan, self.checkpoint.dtype, reconstructor)
        with self.progress("save and reload", None, "") as task:
            difference = self._export(pruned, tokenizer, plan, folder)
            task.advance(1)
        files = [str(file.relative_to(self.folder.path)) for file in sorted(folder.iterdir())]
        saved = fingerprint(resolve_model(str(folder)))
        facts: dict[str, Any] = {"reload_difference": difference, "files": files, "model_fingerprint": saved}
        if reconstructor is not None:
            facts["reconstruction"] = dict(summary(reconstructor.reports))
        self.folder.finish("shrink", key, started, **facts)
        self._write_card(())

    def _export(self, model: Any, tokenizer: Any, plan: Plan | None, folder: Path) -> float:
        return export_huggingface(
            model,
            tokenizer,
            plan,
            folder,
            source=self.checkpoint.folder,
            provenance=self._provenance(),
        )

    def _provenance(self) -> dict[str, Any]:
        """Return where a saved model comes from."""
        return {
            "model": hub_id_of(self.recipe.model) or self.checkpoint.name,
            "calibration": {n: s.corpus_fingerprint for n, s in self.result.statistics.items()},
            "versions": versions(),
        }

    def _required_plan(self) -> Plan:
        assert self.result.plan is not None, "plan() comes first"
        return self.result.plan

    def _reconstruction_key(self) -> list[str]:
        if self.recipe.prune.reconstruct == "none":
            return []
        keys = [self.recipe.prune.reconstruct, *(self._calibration_key(name) for name in self.pruning_buckets)]
        return [*keys, digest(normalised(self.recipe.prune.mix))] if self.recipe.prune.mix else keys

    def _pruned(self, plan: Plan, dtype: torch.dtype | None = None, reconstruct: Reconstruct | None = None) -> Any:
        """Return the pruned model; only parameters take ``dtype``, rotary tables stay as precise as they were."""
        geometry = self.checkpoint.geometry
        config = shrink_config(self.checkpoint.config, plan, geometry)
        with self.progress("shrink", None, "") as task:
            refitted = reconstruct.refitted if isinstance(reconstruct, FittedWeights) else None
            dense = self.dense.state_dict().items()
            parameters = list(shrink_parameters(dense, plan, geometry, reconstruct, refitted))
            task.advance(1)
        return build_model(
            config,
            ((name, tensor.to(dtype or tensor.dtype)) for name, tensor in parameters),
            self.dense,
            shrink_generation_config(generation_data(self.dense), plan),
        )

    def _tokenizer_of(self, plan: Plan) -> Any:
        """Return the tokenizer of a plan's model: the dense one, or the smaller one, compared with it first."""
        if plan.vocabulary is None:
            return self.tokenizer
        assert self.vocabulary is not None, "only a recipe with a vocabulary makes such a plan"
        return self.vocabulary.smaller(plan.vocabulary)

    # -- recovery ------------------------------------------------------------------------------------------------

    @cached_property
    def recovery(self) -> RecoveryStage | None:
        """Recovery's part of the run; None where nothing is trained."""
        if self.recipe.recover is None:
            return None
        return RecoveryStage(
            self.recipe.recover,
            list(self.recipe.domain),
            "general" if self.recipe.general else None,
            self.texts,
            self.checkpoint.geometry.family,
            self.folder,
            digest(
                self.model_fingerprint,
                self.source_keys,
                self.recipe.calibrate.model_dump(exclude={"batch_size", "gradient_tokens"}),
            ),
            lambda: self.dense,
            self.teacher or Teacher(self._teaching_model, None, range(self.checkpoint.geometry.num_layers)),
            self.reference,
            self.recipe.evaluate.batch_size,
            self.progress,
            self.result.reused,
        )

    def recover(self) -> None:
        """Train the pruned model, and before it the dense one where that says when to stop."""
        if self.recovery is None:
            return
        if self.recovery.spec.needs_finetuned:
            self._train(FINETUNED)
        for name in self._trained_rows() if processes.are_several() else [RECOVERED]:
            self._train(name)
        self.result.model_folder = self.recovery.saved(RECOVERED)

    def _teaching_model(self) -> Any:
        """Return the dense model, or its fine-tuned copy where that is what teaches."""
        assert self.recipe.recover is not None, "only called where there is a recovery"
        if self.recipe.recover.distill.teacher == "dense":
            return self.dense
        return self._finetuned

    @cached_property
    def _finetuned(self) -> Any:
        """The dense model trained on the same text; kept on disk where it teaches."""
        assert self.recovery is not None, "only called where there is a recovery"
        if not self.recovery.saved(FINETUNED).exists():
            self.result.recoveries = {k: v for k, v in self.result.recoveries.items() if k != FINETUNED}
            self._train(FINETUNED, needed=True)
        return self._saved_candidate(self.recovery.saved(FINETUNED)).model

    def _train(self, name: str, *, needed: bool = False) -> None:
        """Train the model of a row, if that was not done; weights of a baseline that was measured may be gone."""
        assert self.recovery is not None, "only called where there is a recovery"
        if name in self.result.recoveries:
            return
        key = self._training_key(name)
        measured = not needed and name != RECOVERED and self.evaluation.is_done(name, self._evaluation_key(name, None))
        if not (self.recovery.is_done(name, key) and (measured or self.recovery.saved(name).exists())):
            if name == RECOVERED and self.recovery.spec.rounds > 1:
                self._recover_in_rounds(key)
            else:
                self.recovery.run(name, key, partial(self._student, name), self._save_trained)
        else:
            self.result.reused.append(f"recover:{name}")
        self.result.recoveries = {**self.result.recoveries, name: self.recovery.recovery(name)}
        if name == RECOVERED:
            self._write_card(())

    def _recover_in_rounds(self, key: str) -> None:
        assert self.recovery is not None, "only called where there is a recovery"
        started, plan = time.perf_counter(), self._required_plan()
        self.folder.forget(f"recover:{RECOVERED}")
        teacher = self.recovery.teacher
        rounds: list[Round] = []

        def run_round(recipe: Recipe) -> Round:
            seen = teacher
            for earlier in rounds:
                seen = seen.after(earlier.plan)
            reference = self.recovery if plan.vocabulary else None
            job = _Job(recipe, self.progress, seen, reference, None if rounds else self.folder.shared)
            job.check("recover")
            job.calibrate()
            job.plan()
            job.shrink()
            job.recover()
            assert job.result.plan is not None and job.result.model_folder is not None
            rounds.append(Round(job.result.plan, job.result.model_folder, job.result.recoveries[RECOVERED]))
            return rounds[-1]

        run_rounds(self.recipe, plan, self.folder.path / "rounds", run_round)
        take_result(rounds, self.recovery.saved(RECOVERED), self._provenance())
        self.recovery.keep_joined(RECOVERED, key, joined(rounds, RECOVERED), started)
        drop_weights(rounds)

    def _training_key(self, name: str) -> str:
        assert self.recovery is not None, "only called where there is a recovery"
        if name == FINETUNED:
            return self.recovery.training_key(name, None, self.model_fingerprint)
        cut: list[Any] = [self.folder.manifest["stages"]["shrink"]["model_fingerprint"]]
        if name == RANDOM_RECOVERED:
            cut += [self.recipe.prune.model_dump(), self._reconstruction_key()]
        return self.recovery.training_key(name, self._required_plan(), cut)

    def _student(self, name: str) -> Student:
        """Return the model of a row as it is before training, with weights of its own."""
        if name == FINETUNED:
            model = load_model(
                self.checkpoint,
                device=self.recipe.device,
                dtype="float32",
                trust_remote_code=self.recipe.trust_remote_code,
            )
            return Student(model, self.tokenizer, None)
        plan = self._required_plan()
        if name == RECOVERED:
            pruned = self._saved_candidate(self.folder.path / "model", "float32")
            return Student(pruned.model, pruned.tokenizer, plan)
        control, self._control = self._control_candidate("random", plan), None
        for parameter_ in control.model.parameters():
            parameter_.data = parameter_.data.clone()  # what was not cut is still the dense model's
        return Student(control.model, control.tokenizer, self._control_plan("random", plan))

    def _save_trained(self, model: Any, student: Student, folder: Path) -> dict[str, Any]:
        """Write a trained model and return facts for the manifest."""
        for parameter_ in model.parameters():  # and not the rotary tables, which stay as precise as they were
            parameter_.data = parameter_.data.to(self.checkpoint.dtype)
        with self.progress("save and reload", None, "") as task:
            plan = student.plan if folder == self.folder.path / RECOVERED else None
            difference = self._export(model, student.tokenizer, plan, folder)
            task.advance(1)
        facts = {"reload_difference": difference, "model_fingerprint": fingerprint(resolve_model(str(folder)))}
        if folder.name == FINETUNED and self._is_kept(FINETUNED):
            facts["files"] = [str(file.relative_to(self.folder.path)) for file in sorted(folder.iterdir())]
        return facts

    # -- evaluation ----------------------------------------------------------------------------------------------

    @cached_property
    def evaluation(self) -> EvaluationStage:
        """The evaluation's part of the run."""
        return EvaluationStage(
            self.folder,
            self.texts,
            self.checkpoint.geometry.family,
            self.recipe.evaluate.batch_size,
            self.recipe.prune.seed,
            self.progress,
            self.result.reused,
        )

    def evaluate(self) -> None:
        plan, vocabulary = self._required_plan(), None
        folder = self.folder.path / "model"
        rows = {
            "dense": Row(self._evaluation_key("dense", None), self._dense_candidate),
            "pruned": Row(self._evaluation_key("pruned", plan), partial(self._saved_candidate, folder)),
        }
        for control in self.recipe.evaluate.controls:
            rows[control] = Row(self._evaluation_key(control, plan), partial(self._control_candidate, control, plan))
        trained = self._trained_rows()
        for name in trained:
            rows[name] = Row(self._evaluation_key(name, None), partial(self._trained_candidate, name))
        if plan.vocabulary is not None:
            key = self._evaluation_key(VOCABULARY, plan)
            vocabulary = SmallerVocabulary(
                key, plan.vocabulary.keep, lambda: self._tokenizer_of(plan), lambda: self.dense
            )
        evaluation = self.evaluation.measure({name: rows[name] for name in ROWS if name in rows}, vocabulary)
        for name in trained:
            self._train(name)
            if self.recovery is not None and not self._is_kept(name):
                self.recovery.drop(name)
        self.result.evaluation = evaluation
        self.result.summary = verdict(evaluation, list(self.recipe.domain), self._bounds)
        assert self.result.model_folder is not None, "shrink() comes first"
        self.result.exports = self.exports.found(self.result.model_folder)
        self.result.speed = self._measure_speed(self.result.model_folder)
        self._ask(plan, self.result.model_folder)
        self._write_reports(plan, evaluation)

    @cached_property
    def speed(self) -> SpeedStage:
        """The speed's part of the evaluation; it does nothing where the recipe does not ask for it."""
        recipe = self.recipe
        return SpeedStage(
            recipe.evaluate.speed,
            self.checkpoint,
            self._read_test_text,
            list(recipe.domain),
            digest([self.source_keys[name] for name in recipe.domain]),
            recipe.device,
            recipe.dtype,
            recipe.trust_remote_code,
            self.folder,
            self.progress,
            self.result.reused,
        )

    def _read_test_text(self, name: str, num_tokens: int) -> Sequence[str]:
        """Return documents of a bucket's test text with about so many tokens, and a block of them at least."""
        return self.texts.read(name, "test", max(num_tokens, self.recipe.calibrate.block_size), keep_text=True).texts

    def _measure_speed(self, result: Path) -> SpeedComparison | None:
        """Return the speeds of the dense model and of the result in a folder; None where they are not asked for."""
        if self.speed.spec is None:
            return None

        def load_result() -> tuple[Any, Any]:
            found = self._saved_candidate(result)
            return found.model, found.tokenizer

        def load_dense() -> tuple[Any, Any]:
            return self.dense, self.tokenizer

        name = "pruned" if self.recovery is None else RECOVERED
        return self.speed.measure(
            [
                Timed("dense", self.model_fingerprint, self.checkpoint.folder, self.checkpoint.size_bytes, load_dense),
                Timed(name, fingerprint(resolve_model(str(result))), result, weight_bytes(result), load_result),
            ]
        )

    @cached_property
    def generations(self) -> GenerationsStage:
        """The generations' part of the evaluation; it does nothing where the recipe does not ask for it."""
        spec = self.recipe.evaluate.generations
        return GenerationsStage(spec, self.texts, self.folder, self.progress, self.result.reused)

    @cached_property
    def tasks(self) -> TasksStage:
        """The tasks' part of the evaluation; it does nothing where the recipe names none."""
        return TasksStage(self.recipe.evaluate.tasks, self.folder, self.progress, self.result.reused)

    @property
    def _dense_key(self) -> str:
        return digest(self.model_fingerprint, self.recipe.dtype)

    def _ask(self, plan: Plan, folder: Path) -> None:
        """Let the dense model and the result in a folder answer prompts and do tasks, as far as the recipe asks."""
        name = "pruned" if self.recovery is None else RECOVERED
        key = digest(self._evaluation_key("dense", None), self._evaluation_key(name, plan))
        loaded: list[tuple[Any, Any]] = []

        def result() -> tuple[Any, Any]:
            if not loaded:
                found = self._saved_candidate(folder)
                loaded.append((found.model, found.tokenizer))
            return loaded[0]

        def dense() -> tuple[Any, Any]:
            return self.dense, self.tokenizer

        self.result.generations = self.generations.run(key, plan, name, dense, result)
        self.result.tasks = self.tasks.run(self._dense_key, key, name, dense, result)

    def _evaluation_key(self, name: str, plan: Plan | None) -> str:
        """Return the key of a row; the dense model's does not depend on the plan."""
        options = self.recipe.evaluate.model_dump(include={"max_tokens"})
        asked = {name: [asdict(item) for item in items] for name, items in self.texts.questions.items()}
        whole = [name for name, spec in self.recipe.evaluate.choices.items() if spec.perplexity]
        calibration = self.recipe.calibrate.model_dump(exclude={"batch_size", "gradient_tokens"})
        text = [self.model_fingerprint, self.source_keys, options, calibration, self.recipe.dtype]
        cut: list[Any] = []
        if name in TRAINED:
            cut = [self._training_key(name)]
        elif name != "dense" and plan is not None:
            cut = [plan.to_dict(), self.recipe.prune.model_dump(), self._reconstruction_key()]
        return digest(text, cut, sorted(self._seen_test_documents()), *([asked] if asked else []), *whole)

    def _dense_candidate(self) -> Candidate:
        return Candidate(self.dense, self.checkpoint.size_bytes, self.tokenizer)

    def _saved_candidate(self, folder: Path, dtype: str | None = None) -> Candidate:
        saved, changed = resolve_model(str(folder)), self._required_plan().vocabulary is not None
        model = load_model(saved, device=self.recipe.device, dtype=dtype or self.recipe.dtype)
        return Candidate(model, weight_bytes(folder), load_tokenizer(saved) if changed else self.tokenizer)

    def _trained_rows(self) -> list[str]:
        if self.recovery is None:
            return []
        return [RECOVERED, *(BASELINES[name] for name in self.recovery.spec.baselines)]

    def _trained_candidate(self, name: str) -> Candidate:
        """Return the trained model of a row; a baseline is trained now, and its weights go once it is measured."""
        assert self.recovery is not None, "only rows of a recovery are trained"
        self._train(name)
        found = self._saved_candidate(self.recovery.saved(name))
        if name == FINETUNED:
            found = replace(found, tokenizer=self.tokenizer)
        return found if self._is_kept(name) else replace(found, forget=partial(self.recovery.drop, name))

    def _is_kept(self, name: str) -> bool:
        """Whether a trained model's weights stay: the result's do, and those of a baseline that teaches other sizes."""
        assert self.recovery is not None, "only rows of a recovery are trained"
        return name == RECOVERED or (name == FINETUNED and self.recovery.spec.is_taught_by_finetuned)

    def _control_candidate(self, name: str, plan: Plan) -> Candidate:
        if self._control is not None and self._control[0] == name:
            return self._control[1]
        control = self._control_plan(name, plan)
        model = self._pruned(control, None, self._reconstructor(control))
        size = memory_bytes(model) // model.dtype.itemsize * self.checkpoint.dtype.itemsize
        found = Candidate(model, size, self._tokenizer_of(control))
        trained = name == "random" and RANDOM_RECOVERED in self._trained_rows()
        self._control = (name, found) if trained else None
        return found

    def _control_plan(self, name: str, plan: Plan) -> Plan:
        """Keep as many units per layer as the plan does, but others: drawn at random, or the plan's own worst."""
        seed, vocabulary = self.recipe.prune.seed, None
        if plan.vocabulary is not None:
            assert self.vocabulary is not None, "only a recipe with a vocabulary makes such a plan"
            vocabulary = self.vocabulary.control(name, plan.vocabulary, seed)
        if not plan.layers:
            return replace(plan, vocabulary=vocabulary, method=name)
        merged = self._merged()
        if name == "reversed":
            size = {"parameters": 1 - plan.total_pruned / plan.total_dense}
            scores = self._score(
                plan.method,
                merged,
                plan.options,
                plan.depth_method,
                plan.depth_options,
                request=replace(self.request, budget=size) if self._bounds else None,
            )
            upside_down = {kind: [-layer for layer in layers] for kind, layers in scores.values.items()}
            scores = replace(scores, method=name, values=upside_down)
        else:
            scores = self._score(name, merged, {}, name, {})
        return self._with_constants(same_size_plan(plan, scores, self.checkpoint.geometry, vocabulary), merged)

    # -- export --------------------------------------------------------------------------------------------------

    @cached_property
    def exports(self) -> ExportStage:
        """The exports' part of the run; it does nothing where there are none."""
        return ExportStage(
            self.recipe.export,
            self.recipe.prune,
            list(self.recipe.domain),
            self.checkpoint,
            self.texts,
            self.folder,
            self.progress,
            self.result.reused,
        )

    def export(self) -> None:
        """Write the result in the forms that are asked for; the report names them, and then what failed is said."""
        if not self.recipe.export:
            return
        assert self.result.model_folder is not None and self.result.evaluation is not None, "they come first"
        self.result.exports, failures = self.exports.run(self.result.model_folder)
        self._write_reports(self._required_plan(), self.result.evaluation)
        if failures:
            raise failures[0]

    # -- words ---------------------------------------------------------------------------------------------------

    def _write_reports(self, plan: Plan, evaluation: Evaluation) -> None:
        speeds = {name: statistics.tokens_per_s for name, statistics in self.result.statistics.items()}
        report = render_report(
            plan,
            evaluation,
            model_name=self.checkpoint.name,
            domains=list(self.recipe.domain),
            manifest=self.folder.manifest,
            calibration_tokens_per_s=speeds,
            recipe_yaml=self.recipe.to_yaml(),
            bounds=self._bounds,
            recoveries=self.result.recoveries,
            notes=self.result.notes,
            exports=self.result.exports,
            speed=self.result.speed,
            generations=self.result.generations,
            tasks=self.result.tasks,
        )
        self.folder.write_text("report.md", report)
        tables = [result_table(evaluation), choices_table(evaluation), evidence_table(evaluation)]
        self._write_card([table.markdown() + "\n" for table in tables if table.rows])
        self.result.page, self.result.no_page = try_page(self.folder.path)

    def _write_card(self, tables: Sequence[str]) -> None:
        """Write the model card into every model folder of the run that there is."""
        in_rounds = self.recipe.recover is not None and self.recipe.recover.rounds > 1
        for folder, recovery in (("model", None), (RECOVERED, self.result.recoveries.get(RECOVERED))):
            place, plan = self.folder.path / folder, self._required_plan()
            if not (place / "config.json").is_file():
                continue
            if folder == RECOVERED and in_rounds:
                plan = read_result_plan(place)
            untrained = folder != RECOVERED and RECOVERED in self.result.recoveries
            card = render_model_card(
                plan,
                base_model=self.recipe.model if self.checkpoint.name == self.recipe.model else self.checkpoint.name,
                base_metadata=read_front_matter(self.checkpoint.folder),
                domains=list(self.recipe.domain),
                tables=[*tables, parts_table(plan.parameters_dense, plan.parameters_pruned).markdown() + "\n"],
                summary=(_BEFORE_RECOVERY if untrained else "") + self.result.summary,
                version=versions()["secateur"],
                recovery=recovery,
                evaluation=self.result.evaluation,
                row=RECOVERED if folder == RECOVERED else "pruned",
                corpora=describe_corpora(self.recipe, self.result.statistics),
                origin=describe_origin(self.recipe, self.checkpoint, self.model_fingerprint, versions()),
            )
            self.folder.write_text(f"{folder}/README.md", card)
