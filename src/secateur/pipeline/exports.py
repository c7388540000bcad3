"""Exports as a part of a run: refused before anything is cut where they cannot be, written and verified at the end.

What an export needs of the widths becomes part of the plan. Each file or folder is kept in ``exports/`` of the run
folder, with a hash of the model that it was made from, and made again when that model changed.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.allocate import Request
from secateur.allocate.widths import kept_multiple
from secateur.errors import ConfigError, ExportError, VerificationError
from secateur.export.targets import ROUND_TO_FIT, TARGETS, ModelFacts, Options, Target, export_folder
from secateur.families.geometry import Geometry, UnitAxis
from secateur.pipeline.texts import Texts
from secateur.progress import Progress, silent
from secateur.recipe import ExportSpec, PruneSpec, Recipe
from secateur.records.exported import Exported
from secateur.records.plan import LayerPlan, Plan
from secateur.records.units import ATTENTION, AXES_OF, FFN, FFN_CHANNEL, SUBLAYER_OF
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.store.artifacts import digest
from secateur.store.checkpoints import Checkpoint, fingerprint, read_generation_config, resolve_model
from secateur.store.run_folder import RunFolder

EXPORTS = "exports"
"""The folder of a run where exports lie."""
_MOST_PROMPTS = 1000
"""The engine answers the first few; of all others only the tokens are compared."""
_PROMPT_WORDS = 24
_PROMPT_TOKENS = 32_768


@dataclass(frozen=True, slots=True)
class _Asked:
    """One export of a recipe, its names resolved."""

    spec: ExportSpec
    target: Target
    quantize: str

    @classmethod
    def of(cls, spec: ExportSpec) -> _Asked:
        target = TARGETS[spec.to]
        return cls(spec, target, target.quantization(spec.quantize))

    @property
    def words(self) -> str:
        """What is asked for, in words."""
        return f"{self.target.name} {self.quantize}".strip()

    @property
    def options(self) -> Options:
        return Options(self.quantize, self.spec.round_to_fit)


def check_exports(recipe: Recipe) -> None:
    """Refuse exports that no model could have: unknown names, the same twice, or widths that do not fit.

    Raises:
        ConfigError: see above; what fits is said.
        UnavailableError: what a target needs is not installed; the command to get it is said.
    """
    asked = [_Asked.of(spec) for spec in recipe.export]
    names = [one.target.file_name("model", one.quantize) for one in asked]
    for one, name in zip(asked, names, strict=True):
        one.target.require_installed(one.quantize)
        if names.count(name) > 1:
            raise ConfigError(f"export names {one.words} more than once. Leave one of them out.")
        _require_multiple(one, recipe.prune)


def _require_multiple(one: _Asked, prune: PruneSpec) -> None:
    needed, given = one.target.needed_multiple(one.quantize), prune.multiple_of
    if given == "auto" or one.spec.round_to_fit or FFN_CHANNEL not in prune.width_kinds() or given % needed == 0:
        return
    nearest = math.ceil(given / needed) * needed
    raise ConfigError(
        f"prune.multiple_of is {given}, and export {one.words} needs FFN widths that are multiples of {needed}. Set it "
        f"to {nearest}, another multiple of {needed}, or auto, or export another type. {ROUND_TO_FIT}"
    )


def with_export_widths(recipe: Recipe, geometry: Geometry) -> Recipe:
    """Return the recipe with ``prune.multiple_of`` as its exports need it, where that was left to us.

    The recipe comes back as it is where nothing changes, so that a run to which an export is added stays the same run.
    """
    prune = recipe.prune
    if prune.multiple_of != "auto" or FFN_CHANNEL not in prune.width_kinds() or not recipe.export:
        return recipe
    uneven, width = prune.shape == "uneven", min(filter(None, geometry.num_units(FFN_CHANNEL)), default=0)
    wanted = [
        math.lcm(one.target.needed_multiple(one.quantize), one.target.advised_multiple(one.quantize, uneven, width))
        for one in map(_Asked.of, recipe.export)
    ]
    request = Request.of(prune, bytes_per_parameter=1.0)
    ours = kept_multiple(geometry, FFN_CHANNEL, geometry.num_units(FFN_CHANNEL), request)
    multiple = math.lcm(ours, *wanted)
    if multiple == ours:
        return recipe
    return recipe.model_copy(update={"prune": prune.model_copy(update={"multiple_of": multiple})})


def width_note(asked: Recipe, planned: Recipe) -> list[str]:
    """Return a sentence on widths that exports need, where a recipe said nothing of them."""
    if asked.prune.multiple_of == planned.prune.multiple_of:
        return []
    names = ", ".join(one.words for one in map(_Asked.of, asked.export))
    return [f"FFN widths are multiples of {planned.prune.multiple_of}, because the result is exported as {names}"]


@dataclass
class ExportStage:
    """Checks exports against the model and the plan, and makes them.

    Attributes:
        specs: the recipe's ``export``.
        prune: the recipe's ``prune``.
        domains: names of the domain's buckets, whose text the engine is asked about.
        checkpoint: the dense model.
        texts: gives the text.
        folder: the run's folder.
        progress: told about everything that takes time.
        reused: gets the names of exports that were still valid.
    """

    specs: Sequence[ExportSpec]
    prune: PruneSpec
    domains: Sequence[str]
    checkpoint: Checkpoint
    texts: Texts
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)

    @cached_property
    def _asked(self) -> list[_Asked]:
        return [_Asked.of(spec) for spec in self.specs]

    # -- before anything is cut ----------------------------------------------------------------------------------

    def check_model(self, tokenizer: Callable[[], Any]) -> None:
        """Refuse what follows from family, tokenizer, shape and units, before text is run through the model.

        The check is made on the model as this recipe may cut it: with the largest smaller sizes that fit, which differ
        between layers where the recipe says that they may.

        Raises:
            ExportError: a target cannot hold such a model.
        """
        for one in self._asked:
            plan = sample_plan(self.checkpoint.geometry, self.prune, one.target.needed_multiple(one.quantize))
            self._require_fit(one, self._facts(plan, tokenizer()))

    def check_plan(self, plan: Plan, tokenizer: Callable[[], Any]) -> None:
        """Refuse a plan whose model a target cannot hold, before any weight is cut.

        Args:
            plan: what stays.
            tokenizer: returns that of the pruned model.

        Raises:
            ExportError: layers, and the nearest sizes that fit, are named.
        """
        stage, started = "check exports", time.perf_counter()
        key = digest(plan.to_dict(), [asdict(one.options) | {"to": one.target.name} for one in self._asked])
        if not self._asked or self.folder.is_done(stage, key):
            return
        facts = self._facts(plan, tokenizer())
        for one in self._asked:
            self._require_fit(one, facts)
        self.folder.finish(stage, key, started)

    def _require_fit(self, one: _Asked, facts: ModelFacts) -> None:
        try:
            one.target.require_fit(facts, one.options)
        except ExportError as error:
            raise ExportError(f"export {one.words}: {error}") from None

    def _facts(self, plan: Plan, tokenizer: Any) -> ModelFacts:
        """Return what is known of the model that a plan leaves."""
        geometry = self.checkpoint.geometry
        bare = {
            kind: tuple(replace(layer, constants=(), merged=()) for layer in layers)
            for kind, layers in plan.layers.items()
        }
        dense = ((name, torch.empty(shape, device="meta")) for name, shape in self.checkpoint.shapes.items())
        pruned = shrink_parameters(dense, replace(plan, layers=bare), geometry)
        return ModelFacts(
            config=shrink_config(self.checkpoint.config, plan, geometry),
            shapes={name: tuple(tensor.shape) for name, tensor in pruned},
            tokenizer=tokenizer,
            generation=shrink_generation_config(read_generation_config(self.checkpoint.folder), plan),
        )

    # -- at the end ----------------------------------------------------------------------------------------------

    def found(self, model: Path) -> list[Exported]:
        """Return the exports that were made from this very model and are still there."""
        if not (self.specs and (model / "config.json").is_file()):
            return []
        weights = fingerprint(resolve_model(str(model)))
        return [self._kept(one) for one in self._asked if self._is_done(one, weights)]

    def run(self, model: Path) -> tuple[list[Exported], list[VerificationError]]:
        """Return the exports of a model folder, and what failed in an engine; what is there and valid is reused.

        Raises:
            ExportError: a target cannot hold the model, or the disk is full.
        """
        exports: list[Exported] = []
        failures: list[VerificationError] = []
        weights = fingerprint(resolve_model(str(model)))
        for one in self._asked:
            if self._is_done(one, weights) and not self._can_now_be_verified(one):
                self.reused.append(self._stage(one))
                exports.append(self._kept(one))
                continue
            try:
                exports.append(self._export(one, model, weights))
            except VerificationError as error:
                failures.append(error)
        return exports, failures

    def _export(self, one: _Asked, model: Path, weights: str) -> Exported:
        path, started = self._path(one), time.perf_counter()
        self.folder.forget(self._stage(one))
        self._clear_leftovers()
        with self.progress(f"export {one.words}", None, "") as task:
            made = export_folder(
                model,
                path,
                one.target.name,
                quantize=one.quantize or None,
                round_to_fit=one.spec.round_to_fit,
                name=self._name,
                prompts=self.prompts() if one.target.can_verify() else (),
            )
            task.advance(1)
        facts: dict[str, Any] = {"files": [str(path.relative_to(self.folder.path))], "exported": made.to_dict()}
        self.folder.finish(self._stage(one), self._key(one, weights), started, **facts)
        return made

    def prompts(self) -> list[str]:
        """Return pieces of documents that no model has learned from: first the beginnings, of every domain in turn."""
        starts: list[list[str]] = []
        others: list[str] = []
        for name in self.domains:
            texts = self.texts.read(name, "test", _PROMPT_TOKENS, keep_text=True).texts
            pieces = [found for text in texts if (found := _pieces(text))]
            starts.append([found[0] for found in pieces])
            others += [piece for found in pieces for piece in found[1:]]
        most = max(map(len, starts), default=0)
        turns = [text[place] for place in range(most) for text in starts if place < len(text)]
        return [*turns, *others][:_MOST_PROMPTS]

    def _clear_leftovers(self) -> None:
        """Delete what a killed run was writing."""
        for left in (self.folder.path / EXPORTS).glob(".*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)

    @property
    def _name(self) -> str:
        return self.folder.path.resolve().name

    def _path(self, one: _Asked) -> Path:
        return self.folder.path / EXPORTS / one.target.file_name(self._name, one.quantize)

    def _stage(self, one: _Asked) -> str:
        return f"export:{one.words}"

    def _key(self, one: _Asked, weights: str) -> str:
        return digest(weights, asdict(one.options), one.target.name)

    def _is_done(self, one: _Asked, weights: str) -> bool:
        return self.folder.is_done(self._stage(one), self._key(one, weights), self._path(one))

    def _entry(self, one: _Asked) -> Mapping[str, Any]:
        entry: Mapping[str, Any] = self.folder.manifest["stages"][self._stage(one)]["exported"]
        return entry

    def _kept(self, one: _Asked) -> Exported:
        return replace(Exported.from_dict(self._entry(one)), path=self._path(one))

    def _can_now_be_verified(self, one: _Asked) -> bool:
        return bool(self._entry(one)["not_verified"]) and one.target.can_verify()


def _pieces(text: str) -> list[str]:
    words = text.split()
    return [" ".join(words[start : start + _PROMPT_WORDS]) for start in range(0, len(words), _PROMPT_WORDS)]


def sample_plan(geometry: Geometry, prune: PruneSpec, multiple: int) -> Plan:
    """Return a plan of the kind that a recipe may make, as small a cut as there is, with sizes in whole multiples.

    Args:
        geometry: of the dense model.
        prune: says which units go and in which shape.
        multiple: channels that a cut leaves are a multiple of this wherever a count allows it.
    """
    kinds, uneven = prune.width_kinds(), prune.shape == "uneven"
    blocks = [kind for kind in (ATTENTION, FFN) if kind in prune.block_kinds()]
    layers: dict[str, tuple[LayerPlan, ...]] = {}
    whole = [axis for block in blocks for axis in AXES_OF[block] if axis in geometry.axes]
    for kind in dict.fromkeys([*kinds, *whole]):
        counts = [_counts(geometry, axis, prune, multiple) if kind in kinds else [] for axis in geometry.axes[kind]]
        layers[kind] = tuple(
            LayerPlan(axis.num_units, tuple(range(_pick(fits, axis.num_units, int(uneven and layer > 0)))))
            for layer, (axis, fits) in enumerate(zip(geometry.axes[kind], counts, strict=True))
        )
    for place, block in enumerate(blocks):
        _take_sublayer(layers, geometry, block, place)
    return Plan(
        family=geometry.family.name,
        model_fingerprint="",
        shape="uniform"
        if all(len({len(entry.keep) for entry in per_layer if entry.num_units}) <= 1 for per_layer in layers.values())
        else "uneven",
        method="sample",
        options={},
        budget={},
        layers=layers,
        parameters_dense={},
        parameters_pruned={},
        calibrated_on=(),
        calibration_tokens=0,
    )


def _counts(geometry: Geometry, axis: UnitAxis, prune: PruneSpec, multiple: int) -> list[int]:
    """Return the smaller counts of a layer's units that may be kept and leave whole multiples, descending."""
    step = geometry.step(axis.kind)
    if axis.kind == FFN_CHANNEL and prune.multiple_of != "auto":
        step = prune.multiple_of
    return [
        count
        for count in range(axis.num_units - 1, 0, -1)
        if count % step == 0
        and count * axis.reader_width % multiple == 0
        and not geometry.why_impossible(axis.kind, count)
        and (prune.shape == "uneven" or geometry.is_allowed(axis.kind, count))
    ]


def _pick(counts: Sequence[int], whole: int, place: int) -> int:
    return counts[place] if place < len(counts) else whole


def _take_sublayer(layers: dict[str, tuple[LayerPlan, ...]], geometry: Geometry, block: str, from_the_end: int) -> None:
    """Take a sub-layer out of a late layer, where there are two that have it."""
    there = [layer for layer in range(geometry.num_layers) if geometry.has_sublayer(block, layer)]
    if len(there) < from_the_end + 2:
        return
    gone = there[-1 - from_the_end]
    for kind in (kind for kind in layers if SUBLAYER_OF[kind] == block):
        layers[kind] = tuple(replace(entry, keep=()) if n == gone else entry for n, entry in enumerate(layers[kind]))
