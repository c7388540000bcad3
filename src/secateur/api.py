"""The main job's stages as functions on models that are already loaded; recipes and folders stay out of the way.

statistics = secateur.calibrate(model, tokenizer, texts)
plan = secateur.plan(model, statistics, budget={"channels": 0.2})
smaller = secateur.shrink(model, plan)
score = secateur.evaluate(smaller, tokenizer, held_out_texts, exclude=statistics)

With Gram matrices, methods such as ``obs`` can be used, and the channels that stay take over what they can:

statistics = secateur.calibrate(model, tokenizer, texts, grams=True)
smaller = secateur.shrink(model, secateur.plan(model, statistics, method="obs"), reconstruct=statistics)

Where token ids go too, the tokenizer shrinks with the model:

counts = secateur.count_tokens(tokenizer, texts)
plan = secateur.plan(model, vocabulary={"min_count": 1}, tokenizer=tokenizer, token_counts=counts)
smaller, its_tokenizer = secateur.shrink(model, plan), secateur.shrink_tokenizer(tokenizer, plan)

A short training brings back what a cut cost:

recovered, recovery = secateur.recover(smaller, tokenizer, texts, dense=model, plan=plan, learning_rate=3e-4)
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor

from secateur import pipeline
from secateur.allocate import Request, make_plan, with_constants
from secateur.allocate.constants import require_biases
from secateur.allocate.vocabulary import choose_tokens, size_for_budget
from secateur.calibrate import ImpactListener, collect, collect_gradients, collect_grams, collect_with_grams
from secateur.calibrate.gradients import require_differentiable
from secateur.corpus import PackedBlocks, count_split_tokens, load_split, resegment
from secateur.corpus.split import Split
from secateur.errors import ConfigError, PlanError, TokenizerError
from secateur.evaluate import evaluate_text
from secateur.evaluate.footprint import model_shapes
from secateur.export.targets import export_folder
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of
from secateur.pipeline.compare import compare as compare_folders
from secateur.pipeline.experts import ExpertsResult, run_experts
from secateur.pipeline.gradients import together as gradients_together
from secateur.pipeline.grams import Reconstructor, Supply, judging_tokens, together
from secateur.pipeline.impacts import require_no_mix
from secateur.pipeline.matrix import MatrixResult, run_matrix
from secateur.pipeline.recovery import Teacher
from secateur.pipeline.responses import Asking
from secateur.pipeline.search import MEASURED
from secateur.pipeline.speed import measure_folders
from secateur.pipeline.sweep import SweepResult, run_sweep
from secateur.pipeline.vocabulary import read_vocabulary
from secateur.progress import Progress, silent
from secateur.recipe import (
    CorpusSpec,
    PruneSpec,
    Recipe,
    load_recipe,
    parse_prune,
    parse_recipe,
    parse_recover,
    parse_speed,
)
from secateur.records.comparison import Comparison
from secateur.records.evaluation import TextScore
from secateur.records.exported import Exported
from secateur.records.gradients import GradientStatistics
from secateur.records.gram import BucketGrams, Grams
from secateur.records.impacts import ImpactStatistics, merge_impacts
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.recovery import Recovery
from secateur.records.scores import Scores
from secateur.records.speed import SpeedComparison
from secateur.records.statistics import (
    BucketStatistics,
    SiteKey,
    Statistics,
    merge_buckets,
    mix_buckets,
    normalised,
)
from secateur.records.token_counts import TokenCounts
from secateur.records.units import EXPERT, FUSED_KINDS, SITE_KINDS, SITE_OF
from secateur.recover.batch import Objective
from secateur.recover.curve import Probe
from secateur.recover.examples import TrainingExamples
from secateur.recover.teacher import Distillation, NextToken
from secateur.recover.train import train
from secateur.registry import unknown_name
from secateur.score import METHODS, Outcome, TextRecords, notes_on, score_units, union_note, with_merged_experts
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.store.artifacts import digest
from secateur.store.checkpoints import build_model, fingerprint_loaded, generation_data, parameter
from secateur.store.tokenizers import (
    check_smaller_tokenizer,
    smaller_tokenizer,
    tokenizer_data,
    tokenizer_fingerprint,
)
from secateur.sweep_recipe import load_sweep, parse_sweep

Text = CorpusSpec | Sequence[str] | str | Path
"""Documents, or where they are: a list of strings, a file, folder or glob, or a corpus spec."""


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    until: pipeline.Stage = "export",
    progress: Progress = silent,
    **overrides: Any,
) -> pipeline.RunResult:
    """Do the whole job that a recipe describes and return what it made.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file.
        until: last stage to run: calibrate, plan, shrink, recover, evaluate or export.
        progress: told about everything that takes time.
        overrides: top-level recipe keys that win over the recipe's, for example ``output="runs/b"``.

    Raises:
        SecateurError: anything a user can mend.
        VerificationError: an engine does not run an export as the model it was made from; all else is done.
    """
    return pipeline.run(_recipe(recipe, overrides), until=until, progress=progress)


def sweep(
    recipe: Mapping[str, Any] | str | Path,
    *,
    only: Sequence[str] = (),
    max_time: float | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> SweepResult:
    """Run a recipe with parts of it varied, over one calibration, and return what the points show together.

    Args:
        recipe: the path of a sweep file, or its plain data: a recipe with a section ``sweep``.
        only: names of the points to run, ``*`` and ``?`` as in file names; all without any.
        max_time: seconds after which no further point is started.
        progress: told about everything that takes time.
        overrides: top-level recipe keys that win over the recipe's, for example ``output="sweeps/b"``.

    Raises:
        SecateurError: a point can never work (the message names it; nothing has run then), or no point could be run.
    """
    if isinstance(recipe, str | Path):
        base, spec = load_sweep(recipe, overrides)
    else:
        base, spec = parse_sweep({**recipe, **overrides})
    return run_sweep(base, spec, only=only, max_time=max_time, progress=progress)


def compare(
    runs: Sequence[str | Path | pipeline.RunResult],
    *,
    baseline: str | Path | None = None,
    buckets: Sequence[str] | None = None,
) -> Comparison:
    """Set finished runs side by side: results, paired differences with confidence, kept units and recipes.

    Args:
        runs: two or more run folders, or what ``run`` returned.
        baseline: which of them the others are compared with, by its folder or its name; None takes the first.
        buckets: names of the text to compare on; None takes all that every run was measured on.

    Raises:
        ConfigError: a folder is no run, or the runs were measured on different text.
        CheckpointError: a result is missing or broken; the message says which, and how to make it again.
    """
    folders = [one.folder if isinstance(one, pipeline.RunResult) else Path(one) for one in runs]
    return compare_folders(folders, baseline=baseline, buckets=buckets)


def matrix(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    budgets: Sequence[float] | None = None,
    max_time: float | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> MatrixResult:
    """Prune on each of a recipe's domains alone, measure every result on all of them, and return the comparison.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file; its output is the folder of the matrix.
        budgets: removed shares to repeat it at; None takes the recipe's budget alone.
        max_time: seconds after which no further model is started.
        progress: told about everything that takes time.
        overrides: top-level recipe keys that win over the recipe's, for example ``output="runs/b"``.

    Raises:
        SecateurError: anything a user can mend.
    """
    whole = _recipe(recipe, overrides)
    return run_matrix(whole, budgets=budgets, max_time=max_time, progress=progress)


def experts(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    only: Sequence[str] | None = None,
    max_time: float | None = None,
    progress: Progress = silent,
    **overrides: Any,
) -> ExpertsResult:
    """Make one expert for each of a recipe's domains, over one calibration, and return how each does on all of them.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file; its output is the folder of the family.
        only: domains to make an expert of now; None makes all.
        max_time: seconds after which no further expert is begun.
        progress: told about everything that takes time.
        overrides: top-level recipe keys that win over the recipe's, for example ``output="runs/b"``.

    Raises:
        SecateurError: anything a user can mend.
    """
    whole = _recipe(recipe, overrides)
    return run_experts(whole, only=only, max_time=max_time, progress=progress)


def _recipe(recipe: Recipe | Mapping[str, Any] | str | Path, overrides: Mapping[str, Any]) -> Recipe:
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, overrides)
    data = recipe.model_dump() if isinstance(recipe, Recipe) else dict(recipe)
    return parse_recipe({**data, **overrides})


def _geometry(model: Any) -> Geometry:
    return build_geometry(family_of(model.config.model_type), model.config.to_dict())


def _source(text: Text) -> CorpusSpec | Sequence[str]:
    return CorpusSpec(path=str(text)) if isinstance(text, str | Path) else text


def calibrate(
    model: Any,
    tokenizer: Any,
    text: Text | Mapping[str, Text],
    *,
    grams: bool | str | Sequence[str] = False,
    gradients: bool = False,
    impacts: bool = False,
    max_tokens: int | None = 65_536,
    block_size: int = 512,
    batch_size: int = 4,
    gradient_tokens: int = 16_384,
    progress: Progress = silent,
) -> Statistics:
    """Return the statistics of one pass of text through a loaded model.

    Args:
        model: a transformers causal language model.
        tokenizer: its fast tokenizer.
        text: documents or where they are, or several named buckets of them. The calibration split is used: by default
            80 % of the documents, chosen by their hash. Of a corpus spec with ``responses`` it is the model's own
            answers to the split's prompts, written before anything else is done.
        grams: take Gram matrices too, which some methods and ``shrink(reconstruct=...)`` need: True for every kind of
            unit, or the names of those that are to be cut. They stay in memory, channels x channels x 8 bytes for every
            projection that reads the units, and are also taken of the validation split, a quarter as much text.
        gradients: take the loss's gradients too, which methods such as ``fisher`` need, in a backward pass.
        impacts: note in the same pass what every document needs, for methods such as ``cus_prun``.
        max_tokens: per bucket; None for all.
        block_size: tokens per block; longer documents are cut.
        batch_size: blocks per forward pass.
        gradient_tokens: per bucket, with ``gradients``: how much of its text is run backwards at most.
        progress: told about finished tokens.

    Raises:
        CorpusError: unreadable or too little text, or prompts that the model has no answer to.
        ConfigError: ``grams`` names a kind of unit that has none, gradients cannot be taken of these weights, or
            prompts cannot be asked.
        FamilyError: the model type is not supported.
        CheckpointError: activations are not finite.
    """
    geometry = _geometry(model)
    geometry.require_positions(block_size)
    kinds = list(dict.fromkeys(SITE_OF[kind] for kind in _gram_kinds(grams, geometry)))
    differentiated = _gram_kinds(gradients, geometry)
    if differentiated:
        require_differentiable(model, geometry, differentiated, "calibrate(..., gradients=True)")
    named = text if isinstance(text, Mapping) else {"domain": text}
    asking = Asking(geometry, model.config.to_dict(), lambda: tokenizer, block_size, max_tokens)
    for name, source in named.items():
        if isinstance(source, CorpusSpec) and source.responses is not None:
            asking.check(name, source)
    blocks: dict[str, PackedBlocks] = {}
    judging: dict[str, PackedBlocks] = {}
    for name, source in named.items():
        size: dict[str, Any] = {"block_size": block_size, "name": name}
        if isinstance(source, CorpusSpec) and source.responses is not None:
            blocks[name] = _answered(model, asking, name, source, progress)
        else:
            blocks[name] = load_split(_source(source), "calibration", tokenizer, max_tokens=max_tokens, **size)
        if kinds:
            size |= {"max_tokens": judging_tokens(max_tokens, block_size)}
            fitted_to = set(blocks[name].documents.tolist())
            judging[name] = load_split(_source(source), "validation", tokenizer, exclude=fitted_to, **size)
    Supply.of(geometry, kinds, {name: packed.num_tokens for name, packed in blocks.items()}).require()
    buckets, matrices, needs = {}, {}, dict[str, ImpactStatistics]()
    for name, packed in blocks.items():
        how: dict[str, Any] = {"batch_size": batch_size, "progress": progress, "label": f"calibrate on {name}"}
        heard = ImpactListener(model, packed, geometry, _gram_kinds(True, geometry)) if impacts else None
        also = [] if heard is None else [heard]
        if kinds:
            buckets[name], fitted = collect_with_grams(model, packed, geometry, kinds, **how, also=also)
            how["label"] = f"Gram matrices of {name} (validation)"
            held_out = collect_grams(model, judging[name], geometry, kinds, **how)
            matrices[name] = BucketGrams(fitted, held_out, torch.unique(judging[name].documents))
        else:
            buckets[name] = collect(model, packed, geometry, **how, also=also)
        if heard is not None:
            needs[name] = heard.result()
    slopes = {
        name: collect_gradients(
            model,
            packed,
            geometry,
            differentiated,
            max_tokens=gradient_tokens,
            outputs=True,
            sketch=True,
            progress=progress,
            label=f"gradients on {name}",
        )
        for name, packed in (blocks.items() if differentiated else ())
    }
    about = fingerprint_loaded(model), geometry.family.name
    return Statistics(*about, buckets, pipeline.versions(), matrices, slopes, needs)


def _answered(model: Any, asking: Asking, name: str, spec: CorpusSpec, progress: Progress) -> PackedBlocks:
    """Return what the model answers to the prompts of a corpus, and warn where that is next to nothing."""
    with TemporaryDirectory() as folder:
        blocks, found = asking.answer(
            model, name, spec, asking.prompts(name, spec), file=Path(folder) / "answers.jsonl", progress=progress
        )
    for doubt in asking.doubts(name, found.counts()):
        warnings.warn(doubt, stacklevel=3)
    return blocks


def _gram_kinds(grams: bool | str | Sequence[str], geometry: Geometry) -> list[str]:
    """Return the kinds of unit whose Gram matrices (or gradients) are asked for."""
    known = [kind for kind in geometry.axes if kind not in FUSED_KINDS and not geometry.why_fixed(kind)]
    if isinstance(grams, bool):
        return known if grams else []
    kinds = [grams] if isinstance(grams, str) else list(grams)
    for kind in kinds:
        if kind not in known:
            raise ConfigError("grams: " + unknown_name("kind of unit", kind, known))
    return kinds


@dataclass(frozen=True)
class _Texts:
    """The buckets of some statistics that decide, and how much each counts."""

    statistics: Statistics
    names: Sequence[str]
    mix: Mapping[str, float] | None

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        geometry: Geometry,
        buckets: Sequence[str] | None,
        mix: Mapping[str, float] | None,
    ) -> _Texts:
        """Return the chosen buckets; by default all but one called ``general``."""
        pipeline.require_buckets(mix or (), statistics.buckets, "mix")
        pipeline.require_buckets(buckets or (), statistics.buckets)
        _require_taken_on(statistics, geometry)
        return cls(statistics, list(mix or buckets or ()) or _domains(statistics), mix or None)

    @cached_property
    def merged(self) -> BucketStatistics:
        buckets = self.statistics.buckets
        return mix_buckets(buckets, self.mix) if self.mix else reduce(merge_buckets, [buckets[n] for n in self.names])

    @property
    def token_counts(self) -> Tensor:
        """How often the texts use each token id; a mixture weighs units of layers only, so all domain text counts."""
        names = _domains(self.statistics) if self.mix else self.names
        return reduce(merge_buckets, [self.statistics.buckets[n] for n in names]).token_counts

    def sites(self) -> frozenset[SiteKey]:
        """Return the sites whose Gram matrices every one of the texts has."""
        grams = [self.statistics.grams.get(name) for name in self.names]
        return frozenset.intersection(*(frozenset(part.calibration.sums) if part else frozenset() for part in grams))

    def require_grams(self, geometry: Geometry, kinds: Sequence[str], what: str) -> None:
        """Raise ConfigError where Gram matrices of one of the kinds are missing, CorpusError where they say nothing."""
        for kind in kinds:
            if SITE_OF[kind] not in {at for _, at in self.sites()}:
                raise ConfigError(
                    f"{what} needs Gram matrices for the {kind}s, and these statistics of {', '.join(self.names)} hold "
                    "none. Take them in the same pass: calibrate(..., grams=True)."
                )
        self.supply(geometry, kinds).require()

    def supply(self, geometry: Geometry, kinds: Sequence[str]) -> Supply:
        tokens = {name: self.statistics.buckets[name].num_tokens for name in self.names}
        return Supply.of(geometry, kinds, tokens, self.mix)

    def notes(self, geometry: Geometry, kinds: Sequence[str]) -> list[str]:
        """Return what is to be said of how much text the Gram matrices rest on, where there are some."""
        taken = {at for _, at in self.sites()}
        return self.supply(geometry, [kind for kind in kinds if SITE_OF.get(kind) in taken]).notes()

    def grams(self, split: Literal["calibration", "validation"]) -> Grams:
        return together({name: getattr(self.statistics.grams[name], split) for name in self.names}, self.mix)

    def gradients(self) -> GradientStatistics | None:
        """Return the gradients of the texts together; None where one of them has none."""
        found = self.statistics.gradients
        if any(name not in found for name in self.names):
            return None
        return gradients_together({name: found[name] for name in self.names}, self.mix)

    def impacts(self) -> ImpactStatistics | None:
        """Return what the documents of the texts say of the units; None where that was not collected."""
        found = self.statistics.impacts
        return merge_impacts([found[n] for n in self.names]) if all(n in found for n in self.names) else None

    def of_bucket(self, name: str) -> TextRecords:
        """Return what is known of one bucket alone, whether it is among the texts that decide or not."""
        known = self.statistics
        grams = known.grams[name].calibration if name in known.grams else None
        return TextRecords(known.buckets[name], (name,), grams, known.gradients.get(name), known.impacts.get(name))


def _domains(statistics: Statistics) -> list[str]:
    return [name for name in statistics.buckets if name != "general"] or list(statistics.buckets)


def count_tokens(
    tokenizer: Any, text: Text, *, max_tokens: int | None = None, progress: Progress = silent
) -> TokenCounts:
    """Return how often the calibration split of a text uses each token id; no model is run.

    Args:
        tokenizer: a fast tokenizer.
        text: documents or where they are; the calibration split is counted, all of it by default.
        max_tokens: how many tokens at most; None for all.
        progress: told about counted tokens.

    Raises:
        CorpusError: unreadable or too little text.
    """
    return count_split_tokens(
        _source(text), "calibration", tokenizer, num_ids=len(tokenizer), max_tokens=max_tokens, progress=progress
    )


def plan(
    model: Any,
    statistics: Statistics | None = None,
    *,
    budget: Mapping[str, int | float | str] | None = None,
    method: str = "contextual",
    buckets: Sequence[str] | None = None,
    mix: Mapping[str, int | float] | None = None,
    tokenizer: Any = None,
    token_counts: TokenCounts | None = None,
    **options: Any,
) -> Plan:
    """Return which units stay, from statistics that were taken once; takes seconds.

    Args:
        model: the model the statistics were taken on.
        statistics: of ``calibrate``; None where only the vocabulary is cut.
        budget: as in a recipe: one of channels, groups, parameters, bytes, threshold; default 10 % of FFN channels, or
            none where only the vocabulary is cut.
        method: scoring method.
        buckets: which buckets to judge by, every token alike; default all but one called ``general``.
        mix: weights of the buckets to judge by, of any scale, for example ``{"medical": 0.8, "general": 0.2}``; instead
            of ``buckets``. How much text each has does not matter.
        tokenizer: the model's tokenizer; needed only to cut the vocabulary.
        token_counts: of ``count_tokens``, on as much domain text as there is; by default the tokens of the calibration
            pass, which are far fewer.
        options: further keys of a recipe's ``prune`` section: shape, units, vocabulary, allocation, seed, options ...

    Raises:
        ConfigError: an unknown method, option or bucket; the vocabulary is to be cut and no tokenizer is given; or the
            method needs Gram matrices and the statistics hold none.
        CorpusError: the Gram matrices rest on too little text.
        PlanError: the budget cannot be met, or the statistics were taken on a model of another size.
        TokenizerError: the tokenizer is of a kind that cannot be rebuilt.
    """
    asked = {"method": method, "budget": budget, "buckets": None if buckets is None else list(buckets), "mix": mix}
    spec: PruneSpec = parse_prune({**asked, **options})
    geometry, shapes = _geometry(model), model_shapes(model)
    request = Request.of(spec, bytes_per_parameter=float(model.dtype.itemsize))
    kinds = spec.layer_kinds()
    if kinds and statistics is None:
        raise ConfigError("units of layers are chosen from statistics, and none were given. Pass those of calibrate().")
    if spec.reconstruct != "none":
        raise ConfigError(
            "a plan does not reconstruct; ask shrink for it: shrink(model, plan, reconstruct=statistics)."
        )
    _require_no_text(spec)
    if spec.bias_compensation:
        require_biases(geometry, spec.width_kinds(), shapes)
    texts = None if statistics is None else _Texts.of(statistics, geometry, spec.buckets, spec.mix)
    scores = Scores(spec.method, {}, () if texts is None else texts.names, {})
    if texts is not None and kinds:
        scores = _score(model, texts, spec, geometry)
        request = replace(request, influence=texts.merged.layer_influence())
    counts = token_counts.counts if token_counts is not None else None if texts is None else texts.token_counts
    made = make_plan(
        scores,
        geometry,
        shapes,
        request,
        vocabulary=_plan_vocabulary(model, tokenizer, spec, request, counts),
        model_fingerprint="" if statistics is None else statistics.model_fingerprint,
        calibration_tokens=texts.merged.num_tokens if texts is not None and kinds else 0,
    )
    if texts is None:
        return made
    made = with_merged_experts(
        made, scores, texts.merged, geometry, load_tensor=lambda name: parameter(model, name), seed=spec.seed
    )
    shares = normalised(texts.mix) if texts.mix else {}
    fingerprints = {name: bucket.corpus_fingerprint for name, bucket in texts.statistics.buckets.items()}
    said = notes_on(scores.method, Outcome(spec.options, scores.values, made, fingerprints)) if kinds else []
    said += [union_note(texts.names)] if spec.combine == "union" else []
    made = replace(made, mix=shares, notes=(*made.notes, *said, *texts.notes(geometry, kinds)))
    return with_constants(made, geometry, texts.merged.moments, shapes, means=spec.bias_compensation)


def _require_no_text(spec: PruneSpec) -> None:
    """Raise ConfigError for what can only be planned by running pruned models on text."""
    asked = [f"allocation: {spec.allocation}"] if spec.allocation in MEASURED else []
    asked += ["combine: guard"] if spec.combine == "guard" else []
    asked += ["a bound on the loss"] if spec.budget is not None and spec.budget.is_bound else []
    if asked:
        raise ConfigError(
            f"{asked[0]} measures pruned models on text, and a plan is made from statistics alone. Use a recipe: "
            "secateur.run(recipe, until='plan')."
        )


def _score(model: Any, texts: _Texts, spec: PruneSpec, geometry: Geometry) -> Scores:
    method = METHODS[spec.method]
    method.check_options(spec.options)
    reads_grams = bool(spec.width_kinds()) and method.reads_grams(spec.options)
    named = method.named_buckets(spec.options) if spec.width_kinds() else []
    pipeline.require_buckets(named, texts.statistics.buckets, f"method {spec.method}")
    require_no_mix(spec.method, method.reads_impacts(spec.options), spec.mix)
    union = spec.combine == "union"
    if reads_grams:
        texts.require_grams(geometry, spec.width_kinds(), f"method {spec.method}")
    return score_units(
        spec.method,
        texts.merged,
        geometry,
        spec.layer_kinds(),
        load_tensor=lambda name: parameter(model, name),
        options=spec.options,
        seed=spec.seed,
        buckets=texts.names,
        inputs_fingerprint=texts.statistics.model_fingerprint,
        grams=texts.grams("calibration") if reads_grams else None,
        gradients=texts.gradients(),
        depth_method=spec.depth_method,
        depth_options=spec.depth_options,
        impacts=texts.impacts(),
        by_bucket={name: texts.of_bucket(name) for name in [*named, *(texts.names if union else ())]},
        combine="union" if union else "mean",
    )


def _plan_vocabulary(
    model: Any, tokenizer: Any, spec: PruneSpec, request: Request, counts: Tensor | None
) -> VocabularyPlan | None:
    wanted = spec.vocabulary_spec()
    if wanted is None:
        return None
    if tokenizer is None:
        raise ConfigError("the vocabulary is to be cut, but no tokenizer was given. Pass tokenizer=.")
    if counts is None:
        raise ConfigError("the vocabulary is to be cut, but no tokens were counted. Pass token_counts=count_tokens().")
    geometry, shapes = _geometry(model), model_shapes(model)
    vocabulary = read_vocabulary(
        tokenizer,
        wanted,
        num_rows=geometry.dimensions["vocab_size"],
        configs=(model.config.to_dict(), generation_data(model)),
    )
    rule = wanted.rule()
    if request.budget and not spec.layer_kinds():
        rule = {"size": size_for_budget(request, geometry, shapes)}
    used = counts[: vocabulary.graph.num_ids]
    return choose_tokens(vocabulary, used, rule, multiple_of=wanted.multiple_of)


def _require_taken_on(statistics: Statistics, geometry: Geometry) -> None:
    """Raise PlanError where a model of this geometry cannot have given the statistics."""
    channels = {
        (axis.layer, kind): axis.num_units * axis.reader_width
        for kind in SITE_KINDS
        if kind != EXPERT
        for axis in geometry.axes.get(kind, ())
        if axis.num_units
    }
    for name, bucket in statistics.buckets.items():
        if {site: len(moments.sum) for site, moments in bucket.moments.items()} != channels:
            raise PlanError(
                f"the statistics of bucket {name!r} were taken on another model ({statistics.family}, "
                f"{len(bucket.cosine_sum)} layers). Calibrate this one."
            )


def shrink(model: Any, plan: Plan, *, reconstruct: Statistics | None = None) -> Any:
    """Return a new, physically smaller transformers model that shares no memory with the given one.

    Args:
        model: the model the plan was made for.
        plan: which units stay.
        reconstruct: statistics with Gram matrices, of ``calibrate(..., grams=True)``: projections that lost channels
            are fitted anew by least squares, on the buckets and with the weights that the plan was made with. How far
            each fit goes is chosen on validation text. None keeps the weights that stay as they are.

    Raises:
        ConfigError: the statistics hold no Gram matrices of what is cut, or nothing is cut that could be reconstructed.
        CorpusError: the Gram matrices rest on too little text.
        PlanError: the plan was made for another model, or the statistics were taken on one of another size.
    """
    geometry = _geometry(model)
    reconstructor = None if reconstruct is None else _reconstructor(plan, reconstruct, geometry)
    config = shrink_config(model.config.to_dict(), plan, geometry)
    kept = shrink_parameters(model.state_dict().items(), plan, geometry, reconstructor)
    generation = shrink_generation_config(generation_data(model), plan)
    return build_model(config, ((name, tensor.clone()) for name, tensor in kept), model, generation)


def _reconstructor(plan: Plan, statistics: Statistics, geometry: Geometry) -> Reconstructor:
    """Return what fits the projections that lose channels, on the text that the plan was made from."""
    cut = [kind for kind, layers in plan.layers.items() if any(layer.is_narrowed for layer in layers)]
    kinds = [kind for kind in cut if kind in geometry.axes]
    if EXPERT in kinds:
        raise ConfigError(
            "the scales of experts that stay are fitted by running text, and statistics hold none. Use a recipe "
            "(secateur.run) with prune.reconstruct, or leave reconstruct out."
        )
    if not kinds:
        raise ConfigError("this plan takes no channels from a projection, so nothing can be reconstructed.")
    pipeline.require_buckets(plan.calibrated_on, statistics.buckets, "text that the plan was made from")
    texts = _Texts.of(statistics, geometry, plan.calibrated_on, plan.mix)
    texts.require_grams(geometry, kinds, "reconstruction")
    return Reconstructor(texts.grams("calibration"), texts.grams("validation"))


def shrink_tokenizer(tokenizer: Any, plan: Plan) -> Any:
    """Return the tokenizer for the model that ``shrink`` gives: the same one where the vocabulary stays whole.

    The smaller tokenizer is compared with the dense one on text of every kind before it is returned.

    Raises:
        TokenizerError: the plan was made for another tokenizer, or drops ids that others need.
    """
    if plan.vocabulary is None:
        return tokenizer
    if plan.vocabulary.tokenizer_fingerprint != tokenizer_fingerprint(tokenizer_data(tokenizer)):
        raise TokenizerError("the plan's vocabulary was chosen for another tokenizer. Plan again with this one.")
    smaller = smaller_tokenizer(tokenizer, plan.vocabulary.keep)
    check_smaller_tokenizer(tokenizer, smaller, plan.vocabulary.keep, ())
    return smaller


_ONLY_IN_RECIPES = ("baselines", "evaluation_questions", "replay", "responses", "rounds", "select", "until")


def recover(
    model: Any,
    tokenizer: Any,
    texts: Mapping[str, Text],
    *,
    dense: Any = None,
    plan: Plan | None = None,
    folder: str | Path | None = None,
    block_size: int = 512,
    progress: Progress = silent,
    **options: Any,
) -> tuple[Any, Recovery]:
    """Return a trained copy of a pruned model with the best weights it had, and what the training went through.

    Trained is on the calibration split of every text but ``general``; the weights kept are those of the least mean loss
    on the validation split, at the latest of ``evaluations`` points.

    Args:
        model: the pruned model; it stays as it is.
        tokenizer: its fast tokenizer.
        texts: documents or where they are, by name; ``general`` is measured along the way and not trained on.
        dense: the model it was cut from, which teaches it; None trains on the text alone.
        plan: how it was cut, where ``dense`` is given.
        folder: for checkpoints, so that a training that was stopped goes on when called again; None keeps none.
        block_size: tokens per block.
        progress: told about trained tokens.
        options: keys of a recipe's ``recover`` section, such as ``learning_rate`` and ``lora``, but for those that say
            what it is compared with.

    Raises:
        ConfigError: an option is unknown or impossible here.
        CorpusError: unreadable or too little text.
        RecoveryError: the training diverged, or memory ran out.
    """
    for name in _ONLY_IN_RECIPES:
        if name in options:
            raise ConfigError(f"{name} needs a whole run; write it under recover in a recipe, and use secateur.run.")
    taught = options.get("method", "finetune" if dense is None else "distill") == "distill"
    spec = parse_recover({**options, "method": "distill" if taught else "finetune"})
    if taught and (dense is None or plan is None or spec.distill.cached_logits or spec.distill.teacher != "dense"):
        raise ConfigError(
            "method: distill needs the dense model and the plan by which this one was cut, as dense and plan, and "
            "neither cached_logits nor another teacher here. Give them, or set method='finetune'."
        )
    _geometry(model).require_positions(block_size)
    domains = [name for name in texts if name != "general"]
    if not domains:
        raise ConfigError(f"there is no text to train on: texts names {', '.join(texts) or 'nothing'}. Add a domain.")
    share = None if spec.max_tokens is None else spec.max_tokens // max(1, len(domains))

    def read(name: str, split: Split, tokens: int | None, exclude: frozenset[int] = frozenset()) -> PackedBlocks:
        return load_split(
            _source(texts[name]), split, tokenizer, block_size=block_size, max_tokens=tokens, exclude=exclude, name=name
        )

    lessons = {name: read(name, "calibration", share) for name in domains}
    learned = frozenset(document for blocks in lessons.values() for document in blocks.documents.tolist())
    judges = {name: read(name, "validation", spec.evaluation_tokens, learned) for name in texts}
    family = family_of(model.config.model_type)
    objective: Objective = NextToken(family)
    if taught:
        assert plan is not None
        layers = range(_geometry(dense).num_layers)
        teacher = Teacher(lambda: dense, None, layers).after(plan)
        keep = None if teacher.keep is None else torch.tensor(teacher.keep)
        objective = Distillation(dense, family, spec.distill, keep, list(teacher.layers))

    def probe(trained: Any) -> Probe:
        return Probe(
            {name: evaluate_text(trained, blocks, family).nll_per_token for name, blocks in judges.items()}, {}
        )

    examples = TrainingExamples(list(lessons.values()))
    models = [fingerprint_loaded(each) for each in (model, dense) if each is not None]
    judged = {name: blocks.fingerprint for name, blocks in judges.items()}
    key = digest(models, examples.fingerprint, judged, spec.model_dump(), plan.to_dict() if plan else None)
    with TemporaryDirectory() if folder is None else nullcontext(str(folder)) as place:
        return train(
            copy.deepcopy(model),
            examples,
            objective,
            spec,
            family=family,
            name="recovered",
            folder=Path(place),
            probe=probe,
            domains=domains,
            key=key,
            progress=progress,
        )


def evaluate(
    model: Any,
    tokenizer: Any,
    text: Text,
    *,
    exclude: Statistics | None = None,
    dense_tokenizer: Any = None,
    split: Literal["calibration", "validation", "test"] = "test",
    max_tokens: int | None = 16_384,
    block_size: int = 512,
    batch_size: int = 4,
    progress: Progress = silent,
) -> TextScore:
    """Return how well a loaded model predicts held-out text.

    Args:
        model: a transformers causal language model.
        tokenizer: its fast tokenizer.
        text: documents or where they are; the test split is used: by default 10 % of them, chosen by their hash.
        exclude: statistics whose documents must not be measured on, however the text was split.
        dense_tokenizer: of the dense model, where ``tokenizer`` is a smaller one: the text is then chosen and its bytes
            are counted as for the dense model, so that bits per byte can be compared.
        split: which split to measure on.
        max_tokens: how many tokens at most; None for all.
        block_size: tokens per block.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.

    Raises:
        CorpusError: unreadable or too little text.
    """
    _geometry(model).require_positions(block_size)
    used: list[BucketStatistics | BucketGrams] = [*exclude.buckets.values(), *exclude.grams.values()] if exclude else []
    seen = {document for part in used for document in part.documents.tolist()}
    blocks = load_split(
        _source(text),
        split,
        dense_tokenizer or tokenizer,
        block_size=block_size,
        max_tokens=max_tokens,
        exclude=seen,
        name="text",
        keep_text=dense_tokenizer is not None,
    )
    if dense_tokenizer is not None:
        blocks = resegment(blocks, tokenizer, max_block_size=_geometry(model).dimensions.get("num_positions"))
    family = family_of(model.config.model_type)
    return evaluate_text(
        model, blocks, family, batch_size=batch_size, num_excluded=blocks.num_excluded, progress=progress
    )


def measure_speed(
    *models: str | Path,
    prompt_lengths: Sequence[int] = (128, 512),
    new_tokens: int = 32,
    batch_sizes: Sequence[int] = (1, 4),
    rounds: int = 5,
    device: str = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto",
    with_peaks: bool = True,
    progress: Progress = silent,
) -> SpeedComparison:
    """Return how large and how fast models are, measured in turn on this machine.

    Args:
        models: model folders, folders of runs, hub ids or GGUF files; the first is what the others are compared with.
        prompt_lengths: tokens of a prompt.
        new_tokens: added to each prompt, the likeliest every time; at least 2.
        batch_sizes: prompts that are read and continued together.
        rounds: how often every model does everything, one model right after the other.
        device: to run on; ``auto`` is the first GPU, else the CPU.
        dtype: that all of them compute in; ``auto`` is the first one's stored dtype on a GPU and float32 on a CPU.
        with_peaks: measure the peak of memory as well; on a CPU every model is loaded again, in a process of its own.
        progress: told about every run of a model.

    Raises:
        ConfigError: no models, numbers that cannot be, or prompts longer than a model can read.
        CheckpointError: a model cannot be loaded.
    """
    asked = {
        "prompt_lengths": list(prompt_lengths),
        "new_tokens": new_tokens,
        "batch_sizes": list(batch_sizes),
        "rounds": rounds,
    }
    return measure_folders(
        [str(model) for model in models],
        parse_speed(asked),
        device=device,
        dtype=dtype,
        with_peaks=with_peaks,
        progress=progress,
    )


def export(
    folder: str | Path,
    to: str = "gguf",
    *,
    output: str | Path | None = None,
    quantize: str | None = None,
    round_to_fit: bool = False,
    verify: bool = True,
    prompts: Sequence[str] = (),
) -> Exported:
    """Write the model in a Hugging Face folder in another form, check it, and return what was written.

    It appears under its name only after it was read back and, where the target has an engine that is installed, after
    the engine agreed with transformers; whether one did is said in ``verified`` and ``not_verified``.

    Args:
        folder: model, configuration and tokenizer, as a run writes them.
        to: the target: ``gguf``, ``uniform``, ``nemotron-nas`` or ``onnx``.
        output: path of the file or folder; replaced if it exists. By default beside ``folder``, named after it.
        quantize: type of the weights, such as ``Q8_0``; by default the target's first.
        round_to_fit: fill sizes that the target cannot hold up with zeros, instead of refusing them.
        verify: ask the engine.
        prompts: text for the engine; by default some sentences on different matters.

    Raises:
        ConfigError: the target or the type is unknown.
        ExportError: the target cannot hold the model, the disk is full, or what was written does not read back.
        VerificationError: the engine does not run it, or runs it as another model.
    """
    return export_folder(
        Path(folder),
        None if output is None else Path(output),
        to,
        quantize=quantize,
        round_to_fit=round_to_fit,
        verify=verify,
        prompts=prompts,
    )
