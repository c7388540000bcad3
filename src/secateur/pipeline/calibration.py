"""A run's text and what the dense model makes of it: statistics, Gram matrices, gradients, impacts, masks."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from secateur.calibrate import (
    ImpactListener,
    collect,
    collect_gradients,
    collect_grams,
    collect_impacts,
    collect_with_grams,
    learn_masks,
)
from secateur.calibrate.masks import Adapters
from secateur.corpus import PackedBlocks
from secateur.corpus.hashes import DocumentHashes
from secateur.corpus.split import Split, assign_split
from secateur.pipeline.gradients import GradientStage
from secateur.pipeline.grams import GramStage, Supply
from secateur.pipeline.impacts import ImpactStage
from secateur.pipeline.inputs import Inputs
from secateur.pipeline.masks import LORA_KEY, MaskStage
from secateur.pipeline.result import versions
from secateur.pipeline.search import MEASURED
from secateur.pipeline.sharding import Collected, Order, Passes, first_blocks
from secateur.pipeline.texts import Texts
from secateur.records.gradients import GradientStatistics
from secateur.records.gram import GramsInMemory
from secateur.records.impacts import ImpactStatistics
from secateur.records.masks import AdapterSettings, MaskSettings, MaskStatistics
from secateur.records.statistics import BucketStatistics, merge_buckets, mix_buckets
from secateur.records.units import EXPERT
from secateur.recover.lora import beside
from secateur.score import METHODS, TextRecords
from secateur.store.artifacts import (
    STATISTICS_VERSION,
    digest,
    read_statistics,
    write_statistics,
)


class Calibration(Inputs):
    """Calibrates, or finds that it was done."""

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
            self.responses,
        )

    def _learned_documents(self, name: str) -> Collection[int]:
        """Return the hashes of the documents of a bucket that decide about a model before it is measured."""
        return self._calibration_documents(name)

    def _seen_documents(self) -> DocumentHashes:
        """Return the hashes of every document that is, or in this run will be, calibrated on or counted."""
        counts = {} if self.vocabulary is None else self.vocabulary.counts
        counted = [found.documents.numpy() for found in counts.values()]
        return DocumentHashes(*counted, *map(self._calibration_documents, self.calibration_buckets))

    def _seen_test_documents(self) -> DocumentHashes:
        """Return those of the seen documents that could be in a test text, if they were not seen.

        Where text is split by hash there are none, so that what is measured does not depend on what else was read.
        """
        specs = self.recipe.buckets().values()
        if any(spec.test is not None for spec in specs):
            return self._seen_documents()
        shares = {spec.splits.model_dump_json(): spec.splits for spec in specs}.values()
        return DocumentHashes(
            document
            for document in self._seen_documents()
            if any(assign_split(document, ratios) == "test" for ratios in shares)
        )

    def _calibration_documents(self, name: str) -> Collection[int]:
        if self.responses.has(name):
            return self.responses.documents(name)
        if name in self.result.statistics:
            return DocumentHashes(self.result.statistics[name].documents.numpy())
        if self._is_calibrated(name):
            return DocumentHashes(read_statistics(self._statistics_file(name))[0].documents.numpy())
        return DocumentHashes(self.texts.split(name, "calibration").documents.numpy())

    @cached_property
    def grams(self) -> GramStage:
        """The Gram matrices' part of the run; it does nothing where neither method nor reconstruction needs them."""
        prune = self.recipe.prune
        measured = prune.reconstruct != "none" and prune.allocation in MEASURED
        needed = prune.reconstruct == "dense" or measured or METHODS[prune.method].reads_grams(prune.options)
        return GramStage(
            kinds=[kind for kind in prune.width_kinds() if kind != EXPERT] if needed else [],
            buckets=self.pruning_buckets,
            judged=prune.reconstruct == "dense",
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            collect=self._collect_grams,
            mix=self.mix,
            references=self.reference_buckets if METHODS[prune.method].contrast else [],
        )

    def _collect_grams(self, name: str, split: Split) -> GramsInMemory:
        found = self.passes.collect(Order("grams", name, split)).grams
        assert found is not None, "the pass takes them"
        return found

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
            mix=self.mix,
            references=self.reference_buckets if METHODS[prune.method].contrast else [],
            sketch=METHODS[prune.method].reads_gradient_sketches(prune.options),
        )

    def _collect_gradients(self, name: str) -> GradientStatistics:
        found = self.passes.collect(Order("gradients", name)).gradients
        assert found is not None, "the pass takes them"
        return found

    @cached_property
    def impacts(self) -> ImpactStage:
        """What single documents say, as a part of the run; it does nothing where the method does without."""
        prune = self.recipe.prune
        kinds = prune.width_kinds() if METHODS[prune.method].reads_impacts(prune.options) else []
        return ImpactStage(
            kinds=kinds,
            buckets=self.pruning_buckets,
            references=self.reference_buckets,
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            collect=self._collect_impacts,
        )

    def _collect_impacts(self, name: str) -> ImpactStatistics:
        found = self.passes.collect(Order("impacts", name)).impacts
        assert found is not None, "the pass takes them"
        return found

    @cached_property
    def masks(self) -> MaskStage:
        """The trained masks' part of the run; it does nothing where the method does without."""
        prune = self.recipe.prune
        return MaskStage(
            settings=METHODS[prune.method].mask_settings(prune.options),
            kinds=prune.width_kinds(),
            buckets=self.pruning_buckets,
            references=self.reference_buckets if METHODS[prune.method].contrast else [],
            max_tokens=self.recipe.calibrate.gradient_tokens,
            seed=prune.seed,
            folder=self.folder,
            facts={"model_fingerprint": self.model_fingerprint},
            key=self._calibration_key,
            learn=self._learn_masks,
            mix=self.mix,
        )

    def _learn_masks(self, name: str, settings: MaskSettings) -> MaskStatistics:
        return learn_masks(
            self.dense,
            self.texts.split(name, "calibration"),
            self.checkpoint.geometry,
            self.masks.kinds,
            settings,
            seed=self.masks.seed,
            max_tokens=self.masks.max_tokens,
            progress=self.progress,
            label=f"masks on {name}",
            who=f"method {self.recipe.prune.method}",
            adapt=None if settings.lora is None else partial(self._with_adapters, settings.lora),
        )

    def _with_adapters(self, settings: AdapterSettings, model: Any) -> AbstractContextManager[Adapters]:
        return beside(model, settings, self.checkpoint.geometry.family, self.masks.seed, LORA_KEY)

    def _records_of(self, name: str) -> TextRecords:
        """Return what is known of one bucket alone."""
        return TextRecords(
            self.result.statistics[name],
            (name,),
            self.grams.load_bucket(name),
            self.gradients.load_bucket(name),
            self.impacts.load_bucket(name),
            self.masks.load_bucket(name),
        )

    @property
    def passes(self) -> Passes:
        """The passes through the dense model, by this process or by all."""
        return Passes(self._run_pass, self._pass_text, self.folder.path, self.ranks)

    def _pass_text(self, order: Order) -> PackedBlocks:
        if self.folder.read_only:
            self.folder.look_again()  # the text may be what the model answered in process 0
        blocks = self.texts.split(order.bucket, order.split)
        return first_blocks(blocks, self.gradients.max_tokens) if order.work == "gradients" else blocks

    def _run_pass(self, order: Order, blocks: PackedBlocks) -> Collected:
        """Run blocks through the dense model for what is ordered."""
        name, geometry, who = order.bucket, self.checkpoint.geometry, f"method {self.recipe.prune.method}"
        options: dict[str, Any] = {"batch_size": self.recipe.calibrate.batch_size, "progress": self.progress}
        if order.work == "gradients":
            return Collected(
                gradients=collect_gradients(
                    self.dense,
                    blocks,
                    geometry,
                    self.gradients.kinds,
                    outputs=self.gradients.outputs,
                    sketch=self.gradients.sketch,
                    progress=self.progress,
                    label=f"gradients on {name}",
                    who=who,
                )
            )
        if order.work == "impacts":
            options |= {"label": f"impact on documents of {name}", "who": who}
            return Collected(impacts=collect_impacts(self.dense, blocks, geometry, self.impacts.kinds, **options))
        if order.work == "grams":
            options["label"] = f"Gram matrices of {name} ({order.split})"
            return Collected(grams=collect_grams(self.runnable, blocks, geometry, self.grams.kinds, **options))
        kinds = self.impacts.kinds
        also = [ImpactListener(self.dense, blocks, geometry, kinds, who)] if order.impacts else []
        options |= {"label": f"calibrate on {name}", "also": also}
        if order.grams:  # both in one pass
            statistics, grams = collect_with_grams(self.runnable, blocks, geometry, self.grams.kinds, **options)
        else:
            statistics, grams = collect(self.runnable, blocks, geometry, **options), None
        return Collected(statistics, grams, impacts=also[0].result() if also else None)

    def calibrate(self) -> None:
        """Take the statistics of every bucket, and whatever else the method needs."""
        statistics = {name: self._calibrate_bucket(name) for name in self.calibration_buckets}
        self.result.statistics = statistics
        for name in self.calibration_buckets:
            calibrated_now = f"calibrate:{name}" not in self.result.reused
            self.result.reused += self.grams.take(name)[calibrated_now:]  # the first came with the calibration
            self.result.reused += self.gradients.take(name)
            self.result.reused += self.masks.take(name)
            self.result.reused += self.impacts.take(name)[calibrated_now:]  # heard in the calibration pass

    def _calibrate_bucket(self, name: str) -> BucketStatistics:
        stage, file = f"calibrate:{name}", self._statistics_file(name)
        if self._is_calibrated(name):
            self.result.reused.append(stage)
            return read_statistics(file)[0]
        self.folder.forget(stage)
        started = time.perf_counter()
        blocks = self.texts.split(name, "calibration")
        grams, impacts = bool(self.grams.splits(name)), self.impacts.is_missing(name)
        found = self.passes.collect(Order("statistics", name, grams=grams, impacts=impacts))
        assert found.statistics is not None, "the pass takes them"
        statistics = found.statistics
        if found.grams is not None:
            self.grams.write(name, "calibration", found.grams, started)
        self.impacts.keep(name, found.impacts, started)
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
        asked = self.recipe.buckets()[name].responses
        answered = [] if asked is None else [asked.model_dump()]
        inputs = self.model_fingerprint, self.source_keys[name], options, self.recipe.dtype, *answered
        return digest(STATISTICS_VERSION, *inputs)

    def _is_calibrated(self, name: str) -> bool:
        file = self._statistics_file(name)
        key = self._calibration_key(name)
        return self.folder.is_done(f"calibrate:{name}", key, file, file.with_suffix(".json"))

    def _merged(self) -> BucketStatistics:
        if self.mix:
            return mix_buckets(self.result.statistics, self.mix)
        first, *rest = (self.result.statistics[name] for name in self.pruning_buckets)
        for statistics in rest:
            first = merge_buckets(first, statistics)
        return first

    def _weigh(self, mix: Mapping[str, float]) -> None:
        """Let the texts that decide count by these weights from now on, in all that is formed of them."""
        self.mix = mix
        for stage in ("grams", "gradients", "masks"):
            self.__dict__.pop(stage, None)  # they carry the weights, and are made again when they are asked for

    def _require_enough_text(self) -> None:
        """Refuse Gram matrices that would be singular; before the text is read, by the most that may be taken."""
        if (supply := self._supply()) is not None:
            supply.require()

    def _supply(self) -> Supply | None:
        """Return how much text Gram matrices rest on; None where none are needed or no limit is known yet."""
        wanted = self.layer_kinds if self.recipe.prune.reconstruct == "pruned" else self.grams.kinds
        kinds = [kind for kind in wanted if kind in self.checkpoint.geometry.axes and kind != EXPERT]
        if not kinds:
            return None
        tokens = {name: self._num_calibration_tokens(name) for name in self.pruning_buckets}
        known = {name: count for name, count in tokens.items() if count is not None}
        if len(known) < len(tokens):
            return None
        return Supply.of(self.checkpoint.geometry, kinds, known, self.mix)

    def _num_calibration_tokens(self, name: str) -> int | None:
        """Return the tokens of a bucket that are calibrated on; before it is read, the most that may be."""
        if name in self.result.statistics:
            return self.result.statistics[name].num_tokens
        if self.texts.has(name, "calibration"):
            return self.texts.split(name, "calibration").num_tokens
        if self._is_calibrated(name):
            return read_statistics(self._statistics_file(name))[0].num_tokens
        return self.recipe.calibrate.max_tokens
