"""The measured part of a run: what each cut loses on its own, and a search over plans that measures them whole.

    measure cuts one by one -> knapsack -> (search: evolve from there)

Losses are KL divergences to the dense model on calibration text. Both parts keep what they have in the run folder,
batch by batch and generation by generation, so that a run that was stopped goes on.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocate.blocks import BlockCut, removal_order
from secateur.allocate.budget import Shapes, cost_per_unit
from secateur.allocate.counts import floor_count
from secateur.allocate.evolution import Counts, Schedule, SearchState, Space, evolve
from secateur.allocate.knapsack import Option, choose_options, interpolated_loss
from secateur.allocate.request import Request, parameters_to_remove
from secateur.allocate.widths import kept_multiple
from secateur.errors import CheckpointError, ConfigError, PlanError
from secateur.evaluate.output_change import ChangeSums, MakePatch, OutputChange
from secateur.families.geometry import Geometry, UnitAxis
from secateur.progress import Progress
from secateur.recipe import UNIT_BUDGETS, SearchSpec
from secateur.records.gram import Grams
from secateur.records.scores import Scores
from secateur.records.units import (
    ATTENTION,
    FFN_CHANNEL,
    GQA_GROUP,
    LAYER,
    LAYER_UNIT_KINDS,
    QUERY_HEAD,
    SUBLAYER_OF,
    WHOLE_KINDS,
)
from secateur.shrink.apply import Reconstruct
from secateur.shrink.reconstruct import reconstruct
from secateur.shrink.stand_in_weights import StandInWeights
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.run_folder import RunFolder

_FINALISTS = 4
"""Uniform shapes that are measured on the whole text."""

_MOST_COUNTS = 64
"""Counts per site that the knapsack and the search choose from; wide layers get coarser steps."""


@dataclass(frozen=True, slots=True)
class Choices:
    """What may be chosen, site by site.

    Attributes:
        allowed: by unit kind and layer, the counts that may stay, ascending, the dense count last; 0 where the whole
            sub-layer may go.
        costs: by kind and layer, parameters of one unit.
        layers_may_go: by layer, whether it may go as a whole.
    """

    allowed: Mapping[str, Sequence[Sequence[int]]]
    costs: Mapping[str, Sequence[int]]
    layers_may_go: Sequence[bool]

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(next(iter(self.allowed.values())))

    def dense(self) -> Counts:
        """Return the counts of the dense model."""
        return {kind: [counts[-1] for counts in per_layer] for kind, per_layer in self.allowed.items()}


def allowed_counts(num_units: int, *, floor: int, multiple: int, may_go: bool) -> list[int]:
    """Return the counts that one site may keep, ascending: multiples from the floor on, all, and 0 where it may go."""
    step = multiple * -(-num_units // (multiple * _MOST_COUNTS))
    first = -(-floor // multiple) * multiple
    counts = [n for n in range(first, num_units, step) if n > 0]
    return [*([0] if may_go else []), *counts, num_units]


@dataclass(frozen=True, slots=True)
class _Cut:
    """One cut that is measured on its own: the counts of the kinds it touches in one layer."""

    layer: int
    counts: tuple[tuple[str, int], ...]

    @property
    def name(self) -> str:
        """Say which cut it is, such as ``3:ffn_channel=512``."""
        return f"{self.layer}:" + "+".join(f"{kind}={kept}" for kind, kept in self.counts)


@dataclass(slots=True)
class Search:
    """Measures and searches for one run.

    Attributes:
        meters: measures on the texts, by bucket name; with ``weights`` their means are mixed.
        weights: by bucket name; they add up to 1.
        stand_ins: gives the weights of candidates.
        choices: what may be chosen.
        spec: levels, tokens, time.
        folder: where to keep what was measured.
        key: hash of everything that a cut's measurement depends on beside the cut itself.
        seed: of the search.
        progress: told about everything that takes time.
        reused: gets the names of stages whose results were there already.
    """

    meters: Mapping[str, OutputChange]
    weights: Mapping[str, float]
    stand_ins: StandInWeights
    choices: Choices
    spec: SearchSpec
    folder: RunFolder
    key: str
    seed: int
    progress: Progress
    reused: list[str]
    _losses: dict[_Cut, float] = field(default_factory=dict)

    # -- one cut at a time ---------------------------------------------------------------------------------------

    def cuts(self) -> list[_Cut]:
        """Return the cuts that are measured alone, in layer order."""
        cuts: list[_Cut] = []
        for layer in range(self.choices.num_layers):
            for kind, per_layer in self.choices.allowed.items():
                cuts += [_Cut(layer, ((kind, kept),)) for kept in self._measured(per_layer[layer])]
            if self.choices.layers_may_go[layer]:
                cuts.append(_Cut(layer, tuple((kind, 0) for kind in self.choices.allowed)))
        return cuts

    def _measured(self, allowed: Sequence[int]) -> list[int]:
        """Return the counts of a site that are measured: those nearest to the asked levels, and 0."""
        full = allowed[-1]
        partial = [count for count in allowed[:-1] if count > 0]
        wanted = {min(partial, key=lambda n: (abs(1 - n / full - level), n)) for level in self.spec.levels if partial}
        return sorted(wanted | ({0} & set(allowed)), reverse=True)

    def losses(self) -> dict[_Cut, float]:
        """Return what every measured cut loses on its own, in nats per token; measured once."""
        if not self._losses:
            self._losses = self._measure_cuts()
        return self._losses

    def _measure_cuts(self) -> dict[_Cut, float]:
        """Measure the cuts that were not measured before, for whatever budget or units, and keep all."""
        cuts = self.cuts()
        stage, file = "search:cuts", self.folder.path / "search" / "cuts.json"
        self.folder.is_done(stage, self.key, file)  # brings what runs beside this one have measured
        known = _read_losses(file, self.key)
        missing = [cut for cut in cuts if cut.name not in known]
        if not missing:
            self.reused.append(stage)
        else:
            self.folder.forget(stage)
            started = time.perf_counter()
            known |= self._measure(missing, file, known)
            write_json(file, {"key": self.key, "losses": known})
            self.folder.finish(stage, self.key, started, cuts=len(known))
        return {cut: known[cut.name] for cut in cuts}

    def _measure(self, cuts: Sequence[_Cut], file: Path, known: Mapping[str, float]) -> dict[str, float]:
        """Return the loss of each cut by its name; what is measured so far is kept batch by batch, beside the known."""
        candidates: list[list[MakePatch]] = [[] for _ in range(self.choices.num_layers)]
        for cut in cuts:
            candidates[cut.layer].append(partial(self._patch, cut))
        total = dict.fromkeys((cut.name for cut in cuts), 0.0)
        key = digest(self.key, list(total))
        before = _read_partial(file, key)
        batches = sum(meter.num_batches for meter in self.meters.values())
        with self.progress(f"measure {len(cuts)} single cuts", batches, "batches") as task:
            for name, meter in self.meters.items():
                sums = before.get(name)
                task.advance(sums.num_batches if sums else 0)
                for sums in meter.alone(candidates, sums):  # noqa: B020 - the sums grow
                    before[name] = sums
                    write_json(file, {"key": self.key, "losses": dict(known), **_partial(key, before)})
                    task.advance(1)
                assert sums is not None, "a text has at least one batch"
                for cut_name, mean in zip(total, sums.means(), strict=True):
                    total[cut_name] += self.weights[name] * mean
        return total

    def _patch(self, cut: _Cut) -> dict[str, torch.Tensor]:
        geometry = self.stand_ins.geometry
        patch: dict[str, torch.Tensor] = {}
        for kind, kept in cut.counts:
            patch |= self.stand_ins.site(geometry.axes[kind][cut.layer], kept)
        return patch

    # -- the knapsack --------------------------------------------------------------------------------------------

    def knapsack(self, wanted: float) -> Counts:
        """Return the counts that remove ``wanted`` parameters and lose least, if losses add up.

        Raises:
            PlanError: the units that may go do not hold so many parameters.
        """
        losses = self.losses()
        chosen = choose_options([self._options(layer, losses) for layer in range(self.choices.num_layers)], wanted)
        return {kind: [option.counts[kind] for option in chosen] for kind in self.choices.allowed}

    def _options(self, layer: int, losses: Mapping[_Cut, float]) -> list[Option]:
        by_kind = {kind: self._site_losses(kind, layer, losses) for kind in self.choices.allowed}
        options = [
            self._option(layer, dict(zip(by_kind, counts, strict=True)), by_kind)
            for counts in product(*(list(site) for site in by_kind.values()))
        ]
        if self.choices.layers_may_go[layer]:
            gone = dict.fromkeys(self.choices.allowed, 0)
            options.append(Option(gone, self._removed(layer, gone), losses[_Cut(layer, tuple(gone.items()))]))
        return options

    def _option(self, layer: int, counts: Mapping[str, int], by_kind: Mapping[str, Mapping[int, float]]) -> Option:
        return Option(
            dict(counts), self._removed(layer, counts), sum(by_kind[kind][kept] for kind, kept in counts.items())
        )

    def _removed(self, layer: int, counts: Mapping[str, int]) -> int:
        return sum(
            self.choices.costs[kind][layer] * (self.choices.allowed[kind][layer][-1] - kept)
            for kind, kept in counts.items()
        )

    def _site_losses(self, kind: str, layer: int, losses: Mapping[_Cut, float]) -> dict[int, float]:
        """Return the loss of a site at every count it may keep, from those that were measured."""
        allowed = self.choices.allowed[kind][layer]
        full, least = allowed[-1], 1e-9
        points: list[tuple[float, float]] = []
        for kept in self._measured(allowed):
            least = max(least * (1 + 1e-6), losses[_Cut(layer, ((kind, kept),))])  # removing more never loses less
            if kept > 0:
                points.append((1 - kept / full, least))
        site = {kept: interpolated_loss(1 - kept / full, points) for kept in allowed if 0 < kept < full and points}
        site[full] = 0.0
        if 0 in allowed:
            site[0] = least
        return site

    # -- the search ----------------------------------------------------------------------------------------------

    def search(self, wanted: float) -> Counts:
        """Return the best counts that an evolutionary search finds from the knapsack's on.

        Raises:
            ConfigError: the time limit is too short for one generation.
            PlanError: the budget cannot be met.
        """
        start = self.knapsack(wanted)
        space = self._space(start, wanted)
        schedule = Schedule(generations=self.spec.generations, offspring=self.spec.offspring)
        stage, file = "search:evolve", self.folder.path / "search" / "evolution.json"
        key = digest(
            self.key, self.choices.allowed, start, wanted, self.spec.model_dump(exclude={"time_limit"}), self.seed
        )
        done_key = digest(key, self.spec.time_limit)  # with more time the same search goes on
        if self.folder.is_done(stage, done_key, file):
            self.reused.append(stage)
            return SearchState(**read_json(file)["state"]).best
        self.folder.forget(stage)
        started = time.perf_counter()
        state, spent = SearchState(start), 0.0
        if file.is_file() and (saved := read_json(file)).get("key") == key:
            state, spent = SearchState(**saved["state"]), saved["seconds"]
        limit = None if self.spec.time_limit is None else self.spec.time_limit - spent
        if limit is not None and state.generation == 0:
            self._require_time(start, schedule, limit)

        def save(current: SearchState) -> None:
            seconds = spent + time.perf_counter() - started
            write_json(file, {"key": key, "seconds": seconds, "state": current.to_dict()})
            task.advance(1)

        with self.progress("search for widths", schedule.generations, "generations") as task:
            task.advance(state.generation)
            state = evolve(
                state,
                space,
                self._fitness,
                schedule,
                seed=self.seed,
                is_over=lambda: limit is not None and time.perf_counter() - started > limit,
                save=save,
            )
        self.folder.finish(stage, done_key, started, generations=state.generation, loss=state.loss)
        return state.best

    def _space(self, start: Counts, wanted: float) -> Space:
        """Return what the search may choose from; layers that the knapsack took out whole stay out."""
        allowed = {
            kind: [
                counts if kept or counts[0] == 0 else [0] for counts, kept in zip(per_layer, start[kind], strict=True)
            ]
            for kind, per_layer in self.choices.allowed.items()
        }
        gone = sum(
            self.choices.costs[kind][layer] * full[-1]
            for kind, per_layer in self.choices.allowed.items()
            for layer, full in enumerate(per_layer)
            if allowed[kind][layer] == [0]
        )
        space = Space(allowed, self.choices.costs, wanted - gone, 0.0)
        over = max(space.removed(start) - space.wanted, 0.0)
        step = max(cost for costs in self.choices.costs.values() for cost in costs) / 2
        return Space(allowed, self.choices.costs, space.wanted, max(over, step))

    def _fitness(self, candidates: Sequence[Counts], stage: int) -> list[float]:
        patches = [partial(self.stand_ins.patch, candidate) for candidate in candidates]
        total = [0.0] * len(patches)
        for name, meter in self.meters.items():
            batches = None if stage else max(1, meter.num_batches // 4)
            for index, mean in enumerate(meter.together(patches, max_batches=batches)):
                total[index] += self.weights[name] * mean
        return total

    # -- layers that are all alike ---------------------------------------------------------------------------------

    def uniform(self, candidates: Sequence[Counts]) -> Counts:
        """Return the candidate that changes the outputs least: all on a quarter of the text, the best ones on all."""
        stage, file = "search:shapes", self.folder.path / "search" / "shapes.json"
        key = digest(self.key, list(candidates))
        if self.folder.is_done(stage, key, file):
            self.reused.append(stage)
            best: Counts = read_json(file)["best"]
            return best
        self.folder.forget(stage)
        started = time.perf_counter()
        with self.progress(f"measure {len(candidates)} uniform shapes", 2, "rounds") as task:
            first = self._fitness(candidates, 0)
            task.advance(1)
            order = sorted(range(len(candidates)), key=lambda index: (first[index], index))
            finalists = [candidates[index] for index in order[:_FINALISTS]]
            losses = self._fitness(finalists, 1)
            task.advance(1)
        best = finalists[losses.index(min(losses))]
        write_json(file, {"key": key, "best": best, "finalists": finalists, "losses": losses})
        self.folder.finish(stage, key, started, shapes=len(candidates), loss=min(losses))
        return best

    def _require_time(self, start: Counts, schedule: Schedule, limit: float) -> None:
        started = time.perf_counter()
        self._fitness([start], 0)
        runs = schedule.offspring + 4 * (1 + schedule.survivors[0])
        needed = (time.perf_counter() - started) * runs
        if needed > limit:
            raise ConfigError(
                f"prune.search.time_limit leaves {limit:.0f} s for the search, but one generation of "
                f"{schedule.offspring} candidates takes about {needed:.0f} s here. Raise the limit, lower "
                "prune.search.offspring or prune.search.tokens, or use allocation: knapsack."
            )


def _read_losses(file: Path, key: str) -> dict[str, float]:
    """Return what single cuts lose, by their names, as far as that was measured for this key."""
    if not file.is_file() or (data := read_json(file)).get("key") != key:
        return {}
    try:
        return {str(name): float(loss) for name, loss in data["losses"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _not_ours(file, error) from None


def _read_partial(file: Path, key: str) -> dict[str, ChangeSums]:
    """Return the sums of a measurement that was stopped; none where there are none for this key."""
    if not file.is_file() or (data := read_json(file)).get("partial_key") != key:
        return {}
    try:
        return {
            name: ChangeSums(torch.tensor(part["sums"], dtype=torch.float64), part["num_tokens"], part["num_batches"])
            for name, part in data["partial"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_ours(file, error) from None


def _partial(key: str, sums: Mapping[str, ChangeSums]) -> dict[str, Any]:
    """Return a measurement that may be stopped here, as ``_read_partial`` reads it."""
    partial = {
        name: {"sums": part.sums.tolist(), "num_tokens": part.num_tokens, "num_batches": part.num_batches}
        for name, part in sums.items()
    }
    return {"partial_key": key, "partial": partial}


def _not_ours(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is not what secateur wrote: {error!r}. Delete it; it will be made again.")


MEASURED = ("knapsack", "search")
"""Allocations that measure cuts on text."""
SEARCH_RIDGE = 0.1
"""Ridge of the reconstruction while candidates are measured; the one that held-out text chooses most often."""


def is_measured(request: Request, scores: Scores) -> bool:
    """Return whether counts come from measurements: where they are asked for, and there are layers to cut."""
    return request.allocation in MEASURED and bool(scores.values)


def quick_reconstruct(grams: Grams) -> Reconstruct:
    """Return a reconstruction at one fixed ridge on the dense stream: what every candidate can afford."""

    def fit(axis: UnitAxis, keep: Sequence[int], weight: Tensor) -> Tensor:
        gram = grams.load(axis.site).to(weight.device) / grams.count
        return reconstruct(weight, gram, torch.tensor(list(keep)), ridge=SEARCH_RIDGE)

    return fit


def find_counts(
    search: Search, request: Request, geometry: Geometry, shapes: Shapes, scores: Scores, given_up: int
) -> Counts:
    """Return the units that stay, by kind and layer, as measured for a budget.

    Args:
        search: measures.
        request: the budget, the shape and the allocation.
        geometry: of the dense model.
        shapes: its parameters by name, tied ones once.
        scores: of the units; those of whole layers say in which order layers go where all must be alike.
        given_up: parameters that the vocabulary gives up.

    Raises:
        PlanError: the budget cannot be met.
    """
    wanted = wanted_parameters(request, search.choices, shapes, geometry, given_up)
    if wanted <= 0:
        raise PlanError(
            f"the vocabulary alone gives up {given_up:,} parameters, which is all that the budget asks for. Raise the "
            "budget, or prune the vocabulary alone."
        )
    if request.shape == "uniform":
        order = (
            [layer for _, layer in removal_order(geometry, scores.values, [LAYER])] if LAYER in scores.values else []
        )
        order = [layer for layer in order if search.choices.layers_may_go[layer]]
        multiple = kept_multiple(geometry, FFN_CHANNEL, geometry.num_units(FFN_CHANNEL), request)
        return search.uniform(uniform_candidates(geometry, search.choices, order, wanted, multiple))
    return search.knapsack(wanted) if request.allocation == "knapsack" else search.search(wanted)


def require_dense_layers(geometry: Geometry, allocation: str) -> None:
    """Raise PlanError where an allocation that measures cuts is asked for in a model with experts."""
    if geometry.experts and allocation in MEASURED:
        raise PlanError(
            f"allocation: {allocation} measures cuts of dense layers, and this {geometry.family.name} model has layers "
            "with experts. Use another allocation."
        )


def build_choices(
    geometry: Geometry, shapes: Shapes, request: Request, scores: Scores, kinds: Sequence[str]
) -> Choices:
    """Return what may be chosen where units of ``kinds`` may go.

    Args:
        geometry: of the dense model.
        shapes: its parameters by name, tied ones once.
        request: floors and multiples.
        scores: of the units.
        kinds: channels, groups, sub-layers and layers that may go; or query heads and channels.
    """
    require_dense_layers(geometry, request.allocation)
    cut = BlockCut(geometry)
    allowed: dict[str, list[list[int]]] = {}
    for kind in LAYER_UNIT_KINDS:
        coarser = {SUBLAYER_OF[kind], LAYER} if kind in WHOLE_KINDS else set()
        if kind not in geometry.axes or not ({kind} | coarser) & set(kinds):
            continue
        multiple = kept_multiple(geometry, kind, geometry.num_units(kind), request)
        allowed[kind] = []
        for axis in geometry.axes[kind]:
            counts = allowed_counts(
                axis.num_units,
                floor=floor_count(axis.num_units, request.min_keep_ratio),
                multiple=multiple,
                may_go=SUBLAYER_OF[kind] in kinds and cut.allows((SUBLAYER_OF[kind], axis.layer)),
            )
            allowed[kind].append(counts if kind in kinds else [n for n in counts if n in (0, axis.num_units)])
    costs = {kind: cost_per_unit(geometry, kind, shapes) for kind in allowed}
    gone = [LAYER in kinds and cut.allows((ATTENTION, layer)) for layer in range(geometry.num_layers)]
    return Choices(allowed, costs, gone)


def wanted_parameters(request: Request, choices: Choices, shapes: Shapes, geometry: Geometry, given_up: int) -> float:
    """Return how many parameters the layers must lose; what the vocabulary gives up counts for budgets over all."""
    if {"parameters", "bytes"} & set(request.budget):
        return parameters_to_remove(request, shapes, geometry) - given_up
    ((key, share),) = request.budget.items()
    kind = next(kind for kind, name in UNIT_BUDGETS.items() if name == key)
    counts = zip(choices.costs[kind], choices.allowed[kind], strict=True)
    return share * sum(cost * allowed[-1] for cost, allowed in counts)


def uniform_candidates(
    geometry: Geometry, choices: Choices, order: Sequence[int], wanted: float, multiple: int
) -> list[Counts]:
    """Return the models whose layers are all alike that remove about ``wanted`` parameters.

    Layers go in the given order, groups (or query heads) and channels as many as it takes; every combination of a
    number of layers and a number of groups that leaves a possible number of channels is one candidate.

    Args:
        geometry: of the dense model.
        choices: what may be chosen; all layers have the same.
        order: layers that may go, the first to go first; empty where layers must stay.
        wanted: parameters to remove.
        multiple: kept channels are multiples of it.

    Raises:
        PlanError: there is no such model.
    """
    candidates: list[Counts] = []
    sizes = {kind: per_layer[0][-1] for kind, per_layer in choices.allowed.items()}
    heads = QUERY_HEAD if QUERY_HEAD in sizes else GQA_GROUP
    groups = [n for n in choices.allowed.get(heads, [[1]])[0] if n and geometry.is_allowed(heads, n)]
    for num_gone in range(len(order) + 1):
        gone = set(order[:num_gone])
        stay = geometry.num_layers - num_gone
        for kept_groups in groups if heads in sizes else [0]:
            left = wanted - sum(choices.costs[kind][layer] * sizes[kind] for kind in sizes for layer in gone)
            if heads in sizes:
                left -= stay * choices.costs[heads][0] * (sizes[heads] - kept_groups)
            kept = {heads: kept_groups}
            if FFN_CHANNEL in sizes:
                cost, full = choices.costs[FFN_CHANNEL][0], sizes[FFN_CHANNEL]
                exact = full - left / (stay * cost)
                kept[FFN_CHANNEL] = min(full, int(exact / multiple + 0.5) * multiple)
                left -= stay * cost * (full - kept[FFN_CHANNEL])
                if kept[FFN_CHANNEL] < min(n for n in choices.allowed[FFN_CHANNEL][0] if n > 0):
                    continue
            step = stay * choices.costs[FFN_CHANNEL][0] * multiple if FFN_CHANNEL in sizes else 0.01 * wanted
            if abs(left) <= step / 2 * (1 + 1e-9):
                candidates.append(
                    {
                        kind: [0 if layer in gone else kept[kind] for layer in range(geometry.num_layers)]
                        for kind in sizes
                    }
                )
    if not candidates:
        raise PlanError(
            f"no model whose layers are all alike removes {wanted:,.0f} parameters from these units. Use shape: "
            "uneven, another budget, or more unit kinds."
        )
    return candidates
