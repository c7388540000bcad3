"""Scores, and the plan that meets a budget in size or in quality."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.allocate import Request, choose_blocks, make_plan, same_size_plan
from secateur.allocate.blocks import BlockCut, Order
from secateur.allocate.budget import parameters_after, token_cost
from secateur.allocate.counts import keep_best
from secateur.evaluate import evaluate_text
from secateur.evaluate.output_change import Measure, OutputChange
from secateur.families.geometry import parameters_by_part
from secateur.pipeline.bounds import smallest_within
from secateur.pipeline.cutting import Cutting
from secateur.pipeline.depth import DepthStage, Meters
from secateur.pipeline.exports import ExportStage, width_note
from secateur.pipeline.guard import least_worst
from secateur.pipeline.search import MEASURED, Search, build_choices, find_counts, is_measured, quick_reconstruct
from secateur.recipe import LOSS_BOUNDS
from secateur.records.evaluation import (
    PairedDifference,
    TextScore,
    relative_rise,
)
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.scores import Scores, ranked_experts
from secateur.records.statistics import BucketStatistics, normalised
from secateur.records.units import EXPERT
from secateur.score import METHODS, Outcome, notes_on, score_units, union_note, with_merged_experts
from secateur.shrink import check_plan
from secateur.shrink.stand_in_weights import StandInWeights
from secateur.store.artifacts import (
    digest,
    read_json,
    read_scores,
    statistics_digest,
    write_json,
    write_scores,
    write_text,
)
from secateur.store.checkpoints import (
    parameter,
)
from secateur.stream.sources import LoadedLayers


class Planning(Cutting):
    """Decides what stays."""

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

    def _check_exports(self) -> None:
        """Refuse a plan that the exports cannot hold, before any weight is cut."""
        plan = self._required_plan()
        self.exports.check_plan(plan, lambda: self._tokenizer_of(plan))

    def plan(self) -> None:
        """Decide what stays, or read the plan that is there."""
        file, prune = self.folder.path / "plan.json", self.recipe.prune
        merged = self._merged() if self.layer_kinds else None
        key = self._plan_key(merged)
        if self.folder.is_done("plan", key, file):
            self.result.reused.append("plan")
            if self._is_guarded:
                self._weigh(Plan.from_dict(read_json(file)).mix)
                merged = self._merged()
            self.result.plan = self._read_plan(file, merged)
            if merged is not None:
                scores = read_scores(self._scores_file) if self._has_scores() else self._write_scores(merged)
                self._write_ranking(scores, self.result.plan)
            self._check_exports()
            return
        started = time.perf_counter()
        self.folder.forget("plan")
        found = []
        if self._is_guarded:
            found.append(self._guard(key))
            merged = self._merged()
        scores = Scores(prune.method, {}, self.pruning_buckets, {}) if merged is None else self._write_scores(merged)
        plan = self._bounded_plan(scores, merged) if self._bounds else self._plan_for(self.request, scores, merged)
        plan = replace(plan, notes=(*plan.notes, *found, *self._method_notes(scores, plan)))
        self.result.plan = self._with_constants(self._with_text(plan), merged)
        write_json(file, self.result.plan.to_dict())
        self._write_ranking(scores, self.result.plan)
        self.folder.finish("plan", key, started)
        self._check_exports()

    def _write_ranking(self, scores: Scores, plan: Plan) -> None:
        """Write which experts of each layer matter most and which stay, for servers that prune while they load."""
        lines = [
            json.dumps({**ranked, "keep": list(plan.layers[EXPERT][ranked["layer"]].keep)})
            for ranked in ranked_experts(scores)
        ]
        file = self.folder.path / "experts.jsonl"
        if lines:
            write_text(file, "\n".join(lines) + "\n")
        else:
            file.unlink(missing_ok=True)

    def _method_notes(self, scores: Scores, plan: Plan) -> list[str]:
        """Return what the method says of a plan that was made with its scores."""
        fingerprints = {name: bucket.corpus_fingerprint for name, bucket in self.result.statistics.items()}
        if not plan.layers:
            return []
        told = notes_on(scores.method, Outcome(self.recipe.prune.options, scores.values, plan, fingerprints))
        return [*told, *([union_note(self.pruning_buckets)] if self.recipe.prune.combine == "union" else [])]

    def _plan_key(self, merged: BucketStatistics | None) -> str:
        inputs = [] if merged is None else [statistics_digest(merged), *self.gradients.keys(), *self.impacts.keys()]
        inputs += self.masks.keys()
        inputs += [statistics_digest(self.result.statistics[name]) for name in self.reference_buckets]
        if self.vocabulary is not None:
            inputs += [self.vocabulary.vocabulary.fingerprint, self.vocabulary.merged.fingerprint]
        if self._sized_buckets:
            inputs.append(str(self.recipe.evaluate.max_tokens))
        if self._is_guarded:
            inputs += [self.source_keys[name] for name in self.pruning_buckets]
        return digest(self.model_fingerprint, inputs, self.recipe.prune.model_dump(), self.checkpoint.dtype.itemsize)

    def _plan_for(self, request: Request, scores: Scores, merged: BucketStatistics | None) -> Plan:
        """Return the plan that meets a budget in size."""
        geometry, shapes = self.checkpoint.geometry, self.checkpoint.shapes
        vocabulary = self._vocabulary_for(request)
        if merged is not None:
            request = replace(request, influence=merged.layer_influence())
        plan = make_plan(
            scores,
            geometry,
            shapes,
            request,
            vocabulary=vocabulary,
            model_fingerprint=self.model_fingerprint,
            calibration_tokens=0 if merged is None else merged.num_tokens,
            counts=self._measured_counts(request, scores, vocabulary) if is_measured(request, scores) else None,
        )
        if merged is None:
            return plan
        seed = self.recipe.prune.seed
        return with_merged_experts(plan, scores, merged, geometry, load_tensor=self._weight, seed=seed)

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
        of_a_cut = {"method", "options", "normalize", "reconstruct", "buckets", "mix", "combine", "seed"}
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
            load_tensor=self._weight,
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
            masks=self.masks.load(),
            by_bucket={name: self._records_of(name) for name in self.reference_buckets},
            combine="union" if self.recipe.prune.combine == "union" else "mean",
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

    @cached_property
    def _bounds(self) -> dict[str, float]:
        """By bucket, how much its loss may rise; empty where the budget is a size."""
        return self.recipe.loss_bounds()

    @property
    def _is_guarded(self) -> bool:
        """Whether the weights of the texts are looked for."""
        return self.recipe.prune.combine == "guard"

    @property
    def _sized_buckets(self) -> list[str]:
        """The buckets whose validation text pruned models are measured on while the plan is made."""
        return self.pruning_buckets if self._is_guarded else list(self._bounds)

    def _guard(self, key: str) -> str:
        """Let the texts count as the worst of them needs it; return what to say of that."""
        prune = self.recipe.prune
        assert self.mix is not None, "a guard begins with some weights"
        found = least_worst(
            self.mix,
            steps=prune.guard.steps,
            plan=self._plan_under,
            measure=lambda plan: self._rises(self._with_constants(plan, self._merged())),
            refitted=prune.reconstruct != "none" or prune.bias_compensation,
            file=self.folder.path / "search" / "guard.json",
            key=key,
            progress=self.progress,
        )
        self._weigh(found.weights)
        return found.note

    def _plan_under(self, mix: Mapping[str, float]) -> Plan:
        """Return the plan of the recipe's size with texts that count by these weights, which stay in force."""
        self._weigh(mix)
        merged, prune = self._merged(), self.recipe.prune
        scores = self._score(prune.method, merged, prune.options, prune.depth_method, prune.depth_options)
        return self._plan_for(self.request, scores, merged)

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
        """Return by how much a plan's model loses more than the dense one, per sized bucket, on validation text."""
        model = self._pruned(plan, None, self._reconstructor(plan))
        tokenizer = self._tokenizer_of(plan)
        return {
            name: relative_rise(self._validation_score(name, model, tokenizer), self._dense_validation[name])
            for name in self._sized_buckets
        }

    @cached_property
    def _dense_validation(self) -> dict[str, TextScore]:
        return {name: self._validation_score(name, self.dense, self.tokenizer) for name in self._sized_buckets}

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
        mix, supply = self.mix, self._supply()
        notes = [*width_note(self._asked, self.recipe), *(supply.notes() if supply is not None else [])]
        notes += self.responses.notes(self.calibration_buckets)
        return replace(plan, mix=normalised(mix) if mix else {}, notes=(*plan.notes, *notes))

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
