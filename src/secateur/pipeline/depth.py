"""Whole layers and sub-layers taken out one after another, for the methods that measure which one is missed least.

    measure every block that may go -> take out the lowest -> measure those that are left without it -> ...

The loop is that of BlockPruner (Zhong et al. 2024, arXiv 2406.10594) and of FinerCut (Zhang et al. 2024, arXiv
2405.18218). A block that is out for a moment adds nothing to the residual stream; no model is built. What was measured
stays in the run folder, round by round: a run that was stopped goes on, and another budget measures only new rounds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from torch import Tensor

from secateur.allocate.blocks import Block, BlockCut, Order
from secateur.errors import CheckpointError
from secateur.evaluate.output_change import MakePatch, OutputChange, Patch
from secateur.families.geometry import Geometry
from secateur.progress import Progress, Task
from secateur.records.units import ATTENTION, FFN, LAYER
from secateur.score.run import LoadTensor
from secateur.shrink.stand_in_weights import StandInWeights
from secateur.store.artifacts import read_json, write_json
from secateur.store.run_folder import RunFolder

STAGE = "search:depth"
_SUBLAYERS = (ATTENTION, FFN)
_COMPETING = ((LAYER,), _SUBLAYERS)
"""Block kinds whose scores compare with each other."""


@dataclass(frozen=True, slots=True)
class Meters:
    """What measures, on which texts.

    Attributes:
        by_bucket: measures on the texts, by bucket name.
        weights: of the buckets; they add up to 1.
    """

    by_bucket: Mapping[str, OutputChange]
    weights: Mapping[str, float]


@dataclass
class DepthStage:
    """Measures removals for one run.

    Attributes:
        geometry: of the dense model.
        load_tensor: its parameters by name; None for those it does not have.
        load_meters: gives what measures; called only where something is still to be measured.
        folder: where to keep what was measured.
        key: hash of everything that the measurements depend on.
        progress: told about measurements.
        reused: gets the name of the stage where all of it was there already.
    """

    geometry: Geometry
    load_tensor: LoadTensor
    load_meters: Callable[[], Meters]
    folder: RunFolder
    key: str
    progress: Progress
    reused: list[str]
    _num_measured: int = field(default=0, init=False)
    _is_new: bool = field(default=False, init=False)

    def removal_losses(self, kinds: Sequence[str], choose: Callable[[Order], BlockCut]) -> dict[str, list[float]]:
        """Return by block kind, for every layer, what is measured without its block.

        A block that goes has what was measured after its removal, or a hair more than the block before it where that is
        larger; a block that stays what it had in the last round, and more than the last that went. So the order of the
        numbers is the order of the removals.

        Args:
            kinds: block kinds that may go.
            choose: takes blocks from an order, as far as the budget asks, and returns those that go.

        Raises:
            CheckpointError: the file with earlier measurements is broken, or outputs are not finite.
            PlanError: the budget cannot be met.
        """
        started = time.perf_counter()
        losses: dict[Block, float] = {}
        cut = choose(partial(self._order, losses))
        for competing in _COMPETING:
            asked = [kind for kind in competing if kind in kinds]
            if asked and not any(kind in asked for kind, _ in losses):
                losses |= self._round(cut, asked)  # the budget is too small for one of them
            losses |= _lifted(losses, asked, cut)
        self._finish(started)
        layers = range(self.geometry.num_layers)
        return {kind: [_loss_of((kind, layer), losses, cut) for layer in layers] for kind in kinds}

    def _order(self, losses: dict[Block, float], cut: BlockCut, kinds: Sequence[str]) -> Iterator[Block]:
        """Yield the block to go next, given what has gone; the numbers of all that were measured go into ``losses``."""
        last = -math.inf
        while measured := self._round(cut, kinds):
            best = min(measured, key=lambda block: (measured[block], -block[1], block[0]))
            last = max(measured[best], math.nextafter(last, math.inf))
            above = math.nextafter(last, math.inf)
            losses |= {block: max(value, above) for block, value in measured.items()}
            losses[best] = last
            yield best
            assert not cut.allows(best), "whoever asks for the next block has taken this one"

    # -- measuring -----------------------------------------------------------------------------------------------

    def _round(self, cut: BlockCut, kinds: Sequence[str]) -> dict[Block, float]:
        """Return what is measured without each block of some kinds that may go next, by block."""
        gone = self._gone(cut)
        known = self._rounds.setdefault(gone, {})
        candidates = list(cut.candidates(kinds))
        missing = [block for block in candidates if block not in known]
        if missing:
            if not self._num_measured:
                self.folder.forget(STAGE)
            known |= self._measure(missing, gone)
            self._num_measured += len(missing)
            self._write()
        return {block: known[block] for block in candidates}

    def _gone(self, cut: BlockCut) -> tuple[Block, ...]:
        """Return the sub-layers that have gone."""
        return tuple(
            (kind, layer)
            for kind in _SUBLAYERS
            for layer in range(self.geometry.num_layers)
            if self.geometry.has_sublayer(kind, layer) and layer not in cut.left(kind)
        )

    def _measure(self, blocks: Sequence[Block], gone: Sequence[Block]) -> dict[Block, float]:
        """Return what is measured without each block, and without those that have gone."""
        base: dict[str, Tensor] = {}
        for block in gone:
            base |= self._without(block)
        per_layer = [[block for block in blocks if block[1] == layer] for layer in range(self.geometry.num_layers)]
        candidates: list[list[MakePatch]] = [[partial(self._without, block) for block in layer] for layer in per_layer]
        order = [block for layer in per_layer for block in layer]
        totals = dict.fromkeys(order, 0.0)
        batches = sum(meter.num_batches for meter in self._meters.by_bucket.values())
        label = f"try {len(blocks)} blocks, {len(gone)} sub-layers gone"
        with self.progress(label, batches, "batches") as task:
            for name, meter in self._meters.by_bucket.items():
                for block, mean in zip(order, _means(meter, candidates, base, task), strict=True):
                    totals[block] += self._meters.weights[name] * mean
        return totals

    def _without(self, block: Block) -> dict[str, Tensor]:
        """Return the parameters that change when a block is taken out."""
        kind, layer = block
        patch: dict[str, Tensor] = {}
        for sublayer in _SUBLAYERS if kind == LAYER else (kind,):
            if self.geometry.has_sublayer(sublayer, layer):
                patch |= self._stand_ins.site(self.geometry.sublayer_axis(sublayer, layer), 0)
        return patch

    @cached_property
    def _meters(self) -> Meters:
        return self.load_meters()

    @cached_property
    def _stand_ins(self) -> StandInWeights:
        return StandInWeights(self.geometry, self.load_tensor, lambda kind, layer, count: ())

    # -- what was measured ---------------------------------------------------------------------------------------

    @property
    def _file(self) -> Path:
        return self.folder.path / "search" / "depth.json"

    @cached_property
    def _rounds(self) -> dict[tuple[Block, ...], dict[Block, float]]:
        """By the sub-layers that had gone, what was measured without each further block."""
        self.folder.is_done(STAGE, self.key, self._file)  # takes what another run of a sweep measured
        if not self._file.is_file() or (data := read_json(self._file)).get("key") != self.key:
            return {}
        try:
            return {
                tuple(map(_read_block, entry["gone"])): {
                    _read_block(name): float(value) for name, value in entry["measured"].items()
                }
                for entry in data["rounds"]
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"{self._file} is not what secateur wrote: {error!r}. Delete it; it will be made again."
            ) from None

    def _write(self) -> None:
        rounds = [
            {
                "gone": [_name(block) for block in gone],
                "measured": {_name(block): value for block, value in measured.items()},
            }
            for gone, measured in self._rounds.items()
            if measured
        ]
        write_json(self._file, {"key": self.key, "rounds": rounds})

    def _finish(self, started: float) -> None:
        """Record that all is measured, or that it was."""
        rounds = sum(map(bool, self._rounds.values()))
        if self._num_measured or not self.folder.is_done(STAGE, self.key, self._file):
            self.folder.finish(STAGE, self.key, started, rounds=rounds, measured=self._num_measured)
            self._num_measured, self._is_new = 0, True
        elif not self._is_new and STAGE not in self.reused:
            self.reused.append(STAGE)


def _means(meter: OutputChange, candidates: Sequence[Sequence[MakePatch]], base: Patch, task: Task) -> list[float]:
    """Return what a meter says of every candidate on top of ``base``."""
    means: list[float] = []
    for sums in meter.alone(candidates, base=base):
        means = sums.means()
        task.advance(1)
    return means


def _lifted(losses: Mapping[Block, float], kinds: Sequence[str], cut: BlockCut) -> dict[Block, float]:
    """Return the numbers of the blocks of some kinds that stay, all above those of the blocks that go."""
    of_kinds = {block: value for block, value in losses.items() if block[0] in kinds}
    gone = [value for (kind, layer), value in of_kinds.items() if layer not in cut.left(kind)]
    above = math.nextafter(max(gone, default=-math.inf), math.inf)
    return {block: max(value, above) for block, value in of_kinds.items() if block[1] in cut.left(block[0])}


def _loss_of(block: Block, losses: Mapping[Block, float], cut: BlockCut) -> float:
    """Return the number of a block; where it was never tried, that of the first to go or of the last to stay.

    The first where a coarser block took it along; the last where the model cannot do without it.
    """
    if block in losses:
        return losses[block]
    competing = next(kinds for kinds in _COMPETING if block[0] in kinds)
    others = [value for (kind, _), value in losses.items() if kind in competing]
    return (max if block[1] in cut.left(block[0]) else min)(others, default=0.0)


def _name(block: Block) -> str:
    return f"{block[0]} {block[1]}"


def _read_block(name: str) -> Block:
    kind, layer = name.split()
    return kind, int(layer)
