"""The main job's stages as functions on models that are already loaded; recipes and folders stay out of the way.

statistics = secateur.calibrate(model, tokenizer, texts)
plan = secateur.plan(model, statistics, budget={"channels": 0.2})
smaller = secateur.shrink(model, plan)
score = secateur.evaluate(smaller, tokenizer, held_out_texts, exclude=statistics)

Where token ids go too, the tokenizer shrinks with the model:

counts = secateur.count_tokens(tokenizer, texts)
plan = secateur.plan(model, vocabulary={"min_count": 1}, tokenizer=tokenizer, token_counts=counts)
smaller, its_tokenizer = secateur.shrink(model, plan), secateur.shrink_tokenizer(tokenizer, plan)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from secateur import pipeline
from secateur.allocate import Request, make_plan, with_constants
from secateur.allocate.vocabulary import choose_tokens, size_for_budget
from secateur.calibrate import collect
from secateur.corpus import count_split_tokens, load_split, resegment
from secateur.errors import ConfigError, PlanError, TokenizerError
from secateur.evaluate import evaluate_text
from secateur.evaluate.footprint import model_shapes
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of
from secateur.pipeline_vocabulary import read_vocabulary
from secateur.progress import Progress, silent
from secateur.recipe import CorpusSpec, PruneSpec, Recipe, load_recipe, parse_prune, parse_recipe
from secateur.records.evaluation import TextScore
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Statistics, merge_buckets
from secateur.records.token_counts import TokenCounts
from secateur.score import score_units
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.store.checkpoints import build_model, fingerprint_loaded, generation_data, parameter
from secateur.store.tokenizers import (
    check_smaller_tokenizer,
    smaller_tokenizer,
    tokenizer_data,
    tokenizer_fingerprint,
)

Text = CorpusSpec | Sequence[str] | str | Path
"""Documents, or where they are: a list of strings, a file, folder or glob, or a corpus spec."""


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    until: pipeline.Stage = "evaluate",
    progress: Progress = silent,
    **overrides: Any,
) -> pipeline.RunResult:
    """Do the whole job that a recipe describes and return what it made.

    Args:
        recipe: a recipe, its plain data, or the path of a YAML file.
        until: last stage to run: calibrate, plan, shrink or evaluate.
        progress: told about everything that takes time.
        overrides: top-level recipe keys that win over the recipe's, for example ``output="runs/b"``.

    Raises:
        SecateurError: anything a user can mend.
    """
    if isinstance(recipe, str | Path):
        recipe = load_recipe(recipe, overrides)
    else:
        data = recipe.model_dump() if isinstance(recipe, Recipe) else dict(recipe)
        recipe = parse_recipe({**data, **overrides})
    return pipeline.run(recipe, until=until, progress=progress)


def _geometry(model: Any) -> Geometry:
    return build_geometry(family_of(model.config.model_type), model.config.to_dict())


def _source(text: Text) -> CorpusSpec | Sequence[str]:
    return CorpusSpec(path=str(text)) if isinstance(text, str | Path) else text


def calibrate(
    model: Any,
    tokenizer: Any,
    text: Text | Mapping[str, Text],
    *,
    max_tokens: int | None = 65_536,
    block_size: int = 512,
    batch_size: int = 4,
    progress: Progress = silent,
) -> Statistics:
    """Return the statistics of one pass of text through a loaded model.

    Args:
        model: a transformers causal language model.
        tokenizer: its fast tokenizer.
        text: documents or where they are, or several named buckets of them. The calibration split is used: by default
            80 % of the documents, chosen by their hash.
        max_tokens: per bucket; None for all.
        block_size: tokens per block; longer documents are cut.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.

    Raises:
        CorpusError: unreadable or too little text.
        FamilyError: the model type is not supported.
        CheckpointError: activations are not finite.
    """
    geometry = _geometry(model)
    geometry.require_positions(block_size)
    named = text if isinstance(text, Mapping) else {"domain": text}
    blocks = {
        name: load_split(
            _source(source), "calibration", tokenizer, block_size=block_size, max_tokens=max_tokens, name=name
        )
        for name, source in named.items()
    }
    buckets = {
        name: collect(model, packed, geometry, batch_size=batch_size, progress=progress, label=f"calibrate on {name}")
        for name, packed in blocks.items()
    }
    return Statistics(fingerprint_loaded(model), geometry.family.name, buckets, pipeline.versions())


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
        buckets: which buckets to judge by; default all but one called ``general``.
        tokenizer: the model's tokenizer; needed only to cut the vocabulary.
        token_counts: of ``count_tokens``, on as much domain text as there is; by default the tokens of the calibration
            pass, which are far fewer.
        options: further keys of a recipe's ``prune`` section: shape, units, vocabulary, allocation, seed, options ...

    Raises:
        ConfigError: an unknown method, option or bucket, or the vocabulary is to be cut and no tokenizer is given.
        PlanError: the budget cannot be met, or the statistics were taken on a model of another size.
        TokenizerError: the tokenizer is of a kind that cannot be rebuilt.
    """
    spec: PruneSpec = parse_prune({"method": method, "budget": budget, **options})
    geometry, shapes = _geometry(model), model_shapes(model)
    request = Request.of(spec, bytes_per_parameter=float(model.dtype.itemsize))
    if spec.layer_kinds() and statistics is None:
        raise ConfigError("units of layers are chosen from statistics, and none were given. Pass those of calibrate().")
    merged, chosen = _merged(statistics, buckets, geometry) if statistics is not None else (None, [])
    pass_counts = None if merged is None else merged.token_counts
    counts = pass_counts if token_counts is None else token_counts.counts
    scores = Scores(spec.method, {}, chosen, {})
    if merged is not None and spec.layer_kinds():
        scores = score_units(
            spec.method,
            merged,
            geometry,
            spec.layer_kinds(),
            load_tensor=lambda name: parameter(model, name),
            options=spec.options,
            seed=spec.seed,
            buckets=chosen,
            inputs_fingerprint=statistics.model_fingerprint if statistics is not None else "",
        )
    made = make_plan(
        scores,
        geometry,
        shapes,
        request,
        vocabulary=_plan_vocabulary(model, tokenizer, spec, request, counts),
        model_fingerprint="" if statistics is None else statistics.model_fingerprint,
        calibration_tokens=merged.num_tokens if merged is not None and spec.layer_kinds() else 0,
    )
    return made if merged is None else with_constants(made, geometry, merged.moments, shapes)


def _merged(
    statistics: Statistics, buckets: Sequence[str] | None, geometry: Geometry
) -> tuple[BucketStatistics, list[str]]:
    """Return the statistics of the chosen buckets together, and their names."""
    chosen = list(buckets) if buckets else [n for n in statistics.buckets if n != "general"] or list(statistics.buckets)
    pipeline.require_buckets(chosen, statistics.buckets)
    _require_taken_on(statistics, geometry)
    merged = statistics.buckets[chosen[0]]
    for name in chosen[1:]:
        merged = merge_buckets(merged, statistics.buckets[name])
    return merged, chosen


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
        (axis.layer, kind): axis.num_units * axis.reader_width for kind, axes in geometry.axes.items() for axis in axes
    }
    for name, bucket in statistics.buckets.items():
        if {site: len(moments.sum) for site, moments in bucket.moments.items()} != channels:
            raise PlanError(
                f"the statistics of bucket {name!r} were taken on another model ({statistics.family}, "
                f"{len(bucket.cosine_sum)} layers). Calibrate this one."
            )


def shrink(model: Any, plan: Plan) -> Any:
    """Return a new, physically smaller transformers model that shares no memory with the given one.

    Raises:
        PlanError: the plan was made for another model.
    """
    geometry = _geometry(model)
    config = shrink_config(model.config.to_dict(), plan, geometry)
    kept = shrink_parameters(model.state_dict().items(), plan, geometry)
    generation = shrink_generation_config(generation_data(model), plan)
    return build_model(config, ((name, tensor.clone()) for name, tensor in kept), model, generation)


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
        exclude: statistics whose calibration documents must not be measured on, however the text was split.
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
    seen = {h for bucket in (exclude.buckets.values() if exclude else ()) for h in bucket.documents.tolist()}
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
