"""What a run is asked for, resolved once: the model, its tokenizer, the buckets, the vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.allocate import Request
from secateur.allocate.vocabulary import size_for_budget
from secateur.corpus import (
    source_signature,
)
from secateur.errors import ConfigError
from secateur.pipeline import processes
from secateur.pipeline.card import hub_id_of
from secateur.pipeline.evaluation import Candidate
from secateur.pipeline.impacts import require_no_mix
from secateur.pipeline.recovery import (
    RecoveryStage,
    Teacher,
)
from secateur.pipeline.result import RunResult, require_buckets, versions
from secateur.pipeline.search import Search
from secateur.pipeline.vocabulary import VocabularyStage
from secateur.progress import Progress
from secateur.recipe import Recipe
from secateur.records.plan import Plan, VocabularyPlan
from secateur.records.scores import Scores
from secateur.score import METHODS, require_union
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    fingerprint,
    load_model,
    load_tokenizer,
    resolve_model,
)
from secateur.store.run_folder import RunFolder, Shared


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

    @cached_property
    def dense(self) -> Any:
        """The dense model, loaded when first asked for."""
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
        require_no_mix(prune.method, METHODS[prune.method].reads_impacts(prune.options), prune.mix)
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
        """By bucket, a hash of its files and of how they are read."""
        return {name: digest(source_signature(spec), spec.model_dump()) for name, spec in self.recipe.buckets().items()}

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
