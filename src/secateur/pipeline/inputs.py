"""What a run is asked for, resolved once: the model, its tokenizer, the buckets, the vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.allocate import Request
from secateur.allocate.vocabulary import size_for_budget
from secateur.corpus import (
    source_signature,
)
from secateur.errors import ConfigError
from secateur.pipeline import processes
from secateur.pipeline.card import hub_id_of
from secateur.pipeline.evaluation import Candidate
from secateur.pipeline.guard import in_parts, require_guardable
from secateur.pipeline.impacts import require_no_mix
from secateur.pipeline.recovery import (
    RecoveryStage,
    Teacher,
)
from secateur.pipeline.responses import ResponsesStage
from secateur.pipeline.result import RunResult, require_buckets, versions
from secateur.pipeline.search import Search
from secateur.pipeline.vocabulary import VocabularyStage
from secateur.progress import Progress
from secateur.recipe import Recipe
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.ranks import ALONE, Ranks
from secateur.records.scores import Scores
from secateur.score import METHODS, require_union
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    Checkpoint,
    fingerprint,
    load_model,
    load_tokenizer,
    parameter,
    resolve_model,
)
from secateur.store.run_folder import RunFolder, Shared
from secateur.stream.sources import LayerSource, LazyLayers, LoadedLayers
from secateur.stream.streamed import StreamedModel


class Inputs:
    """What is loaded, so that nothing is loaded twice or before it is needed."""

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
        self.ranks: Ranks = ALONE
        place = Path(recipe.output).expanduser()
        self.folder = RunFolder.open(place, read_only=not processes.is_main(), shared=shared)
        self.result = RunResult(self.folder.path)
        self._searched: tuple[Scores, Search] | None = None
        self._control: tuple[str, Candidate] | None = None

    @cached_property
    def checkpoint(self) -> Any:
        """The dense model's folder, configuration and shapes; no weight is read."""
        return resolve_model(self.recipe.model, trust_remote_code=self.recipe.trust_remote_code)

    @cached_property
    def model_fingerprint(self) -> str:
        """What identifies the dense model's weights."""
        return fingerprint(self.checkpoint)

    @cached_property
    def tokenizer(self) -> Any:
        """The dense model's tokenizer."""
        return load_tokenizer(self.checkpoint, trust_remote_code=self.recipe.trust_remote_code)

    @property
    def is_by_layer(self) -> bool:
        """Whether models are run one layer at a time, and never loaded."""
        return self.recipe.memory == "by_layer"

    @cached_property
    def dense(self) -> Any:
        """The dense model, loaded when first asked for."""
        assert not self.is_by_layer, "what needs the whole model is refused before"
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
    def runnable(self) -> Any:
        """The dense model in memory, or, where the recipe says so, streamed layer by layer."""
        return self._streamed(self.checkpoint) if self.is_by_layer else self.dense

    def _close_dense(self) -> None:
        """Let go of the streamed dense model's embeddings and head; they are read again when they are asked for."""
        self.__dict__.pop("runnable", None)

    @property
    def layers(self) -> LayerSource:
        """The dense model's layers."""
        return self.runnable.source if self.is_by_layer else LoadedLayers(self.dense, self.checkpoint.geometry)

    def _weight(self, name: str) -> Tensor | None:
        """Return a parameter of the dense model, read now where the model is streamed; None where there is none."""
        return self.runnable.source.parameter(name) if self.is_by_layer else parameter(self.dense, name)

    def _streamed(self, checkpoint: Checkpoint, dtype: str | None = None) -> StreamedModel:
        """Return a model on disk, to be run layer by layer with its hidden states in the run's folder."""
        recipe = self.recipe
        remote = recipe.trust_remote_code and checkpoint is self.checkpoint
        computed = dtype or recipe.dtype
        source = LazyLayers(checkpoint, device=recipe.device, dtype=computed, trust_remote_code=remote)
        return StreamedModel(source, self.folder.path)

    @cached_property
    def layer_kinds(self) -> list[str]:
        """Kinds of units inside the layers that are cut; none where only the vocabulary is."""
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
        """Buckets that decide what stays."""
        mix = self.recipe.prune.mix
        asked, key = (list(mix), "prune.mix") if mix else (self.recipe.prune.buckets, "prune.buckets")
        named = self._named(asked, list(self.recipe.domain), key)
        missing = [name for name in named if self.layer_kinds and name not in self.calibration_buckets]
        if missing:
            raise ConfigError(f"{key} names {missing[0]}, which calibrate.buckets leaves out. Add it there.")
        return named

    @cached_property
    def mix(self) -> Mapping[str, float] | None:
        """How much each text counts that decides; None where every token counts the same.

        Where a guard looks for these weights they are those it begins with, and later those it has come to.
        """
        given = self.recipe.prune.mix
        if self.recipe.prune.combine != "guard":
            return given
        return in_parts(given or dict.fromkeys(self.pruning_buckets, 1.0))

    def _named(self, asked: Sequence[str] | None, default: list[str], key: str) -> list[str]:
        require_buckets(asked or (), self.recipe.buckets(), key)
        return list(asked) if asked else default

    @cached_property
    def reference_buckets(self) -> list[str]:
        """Buckets that the method looks at one by one: by its options, or because each is scored alone."""
        prune = self.recipe.prune
        if not prune.width_kinds():
            return []
        named = METHODS[prune.method].named_buckets(prune.options)
        key = f"prune.method {prune.method}"
        require_buckets(named, self.recipe.buckets(), key)
        require_buckets(named, self.calibration_buckets, f"{key} with calibrate.buckets")
        guard = prune.combine == "guard"
        require_no_mix(prune.method, METHODS[prune.method].reads_impacts(prune.options), prune.mix, guard=guard)
        if guard:
            require_guardable(prune.method, METHODS[prune.method].needs)
        if prune.combine == "union":
            require_union(prune.method, prune.options, self.pruning_buckets)
            return list(dict.fromkeys([*named, *self.pruning_buckets]))
        return named

    @cached_property
    def request(self) -> Request:
        """What is asked of an allocation."""
        return Request.of(self.recipe.prune, bytes_per_parameter=float(self.checkpoint.dtype.itemsize))

    @cached_property
    def source_keys(self) -> dict[str, str]:
        """By bucket, a hash of its files and of how they are read; who answers them is another matter."""
        specs = self.recipe.buckets().items()
        return {name: digest(source_signature(spec), spec.model_dump(exclude={"responses"})) for name, spec in specs}

    @cached_property
    def responses(self) -> ResponsesStage:
        """The dense model's own answers to prompts; it does nothing where no bucket is calibrated on them."""
        return ResponsesStage(
            self.recipe,
            self.checkpoint,
            lambda: self.tokenizer,
            lambda: self.dense,
            digest(self.model_fingerprint, self.recipe.dtype),
            self.source_keys,
            self.folder,
            self.progress,
            self.result.reused,
        )

    def _required_plan(self) -> Plan:
        assert self.result.plan is not None, "plan() comes first"
        return self.result.plan

    def _tokenizer_of(self, plan: Plan) -> Any:
        """Return the tokenizer of a plan's model: the dense one, or the smaller one, compared with it first."""
        if plan.vocabulary is None:
            return self.tokenizer
        assert self.vocabulary is not None, "only a recipe with a vocabulary makes such a plan"
        return self.vocabulary.smaller(plan.vocabulary)

    def _provenance(self) -> dict[str, Any]:
        """Return where a saved model comes from."""
        return {
            "model": hub_id_of(self.recipe.model) or self.checkpoint.name,
            "calibration": {n: s.corpus_fingerprint for n, s in self.result.statistics.items()},
            "versions": versions(),
        }
