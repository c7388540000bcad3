"""Which whole layers and sub-layers go: the lowest-scored ones, one after another, as far as a budget asks.

Where attention and FFN sub-layers compete with each other, a sub-layer's score is divided by its parameters, because
the larger one saves more; scores of removals one after another are an order already and compare as they are. A block
that the model or its caches cannot do without is passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from secateur.allocate.budget import Shapes, block_cost
from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.records.units import ATTENTION, FFN, LAYER, UNIT_NAMES

Block = tuple[str, int]
"""(block kind, layer)."""
Order = Callable[["BlockCut", Sequence[str]], Iterable[Block]]
"""(what goes so far, block kinds that compete) -> blocks, the first to go first. It may look at what has gone each time
the next one is asked for."""
RATIO_KEYS = {LAYER: "layers", ATTENTION: "attention", FFN: "ffn"}
"""What a budget calls the share of each block kind."""
_SUBLAYERS = (ATTENTION, FFN)


class BlockCut:
    """A growing set of blocks that go, in which what is left always makes a working model.

    At least one layer stays, and the first layer of every type of attention keeps its attention.

    Args:
        geometry: of the dense model.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self._left = {
            kind: {layer for layer in range(geometry.num_layers) if geometry.has_sublayer(kind, layer)}
            for kind in _SUBLAYERS
        }

    def left(self, kind: str) -> list[int]:
        """Return the layers that still have a block of a kind."""
        layers = self._left[ATTENTION] | self._left[FFN] if kind == LAYER else self._left[kind]
        return sorted(layers)

    @property
    def is_empty(self) -> bool:
        """Whether nothing goes."""
        return all(
            layer in self._left[kind]
            for kind in _SUBLAYERS
            for layer in range(self.geometry.num_layers)
            if self.geometry.has_sublayer(kind, layer)
        )

    def allows(self, block: Block) -> bool:
        """Return whether a block is there and may go too."""
        kind, layer = block
        after = {name: left - {layer} if kind in (name, LAYER) else left for name, left in self._left.items()}
        stay = after[ATTENTION] | after[FFN]
        if layer not in self.left(kind) or not stay:
            return False
        if layer not in stay and LAYER in self.geometry.fixed_blocks:
            return False
        return self.geometry.first_without_attention(sorted(stay), after[ATTENTION]) is None

    def take(self, block: Block) -> None:
        """Let a block go."""
        kind, layer = block
        for name in _SUBLAYERS:
            if kind in (name, LAYER):
                self._left[name].discard(layer)

    def take_first(self, order: Iterable[Block], count: int) -> int:
        """Let the first ``count`` blocks that may go, go; return how many did. No further ones are asked for."""
        taken, blocks = 0, iter(order)
        while taken < count and (block := next(blocks, None)) is not None:
            if self.allows(block):
                self.take(block)
                taken += 1
        return taken

    def candidates(self, kinds: Sequence[str]) -> Iterator[Block]:
        """Yield the blocks of some kinds that may go next, layer by layer."""
        blocks = ((kind, layer) for layer in range(self.geometry.num_layers) for kind in kinds)
        return (block for block in blocks if self.allows(block))


def removal_order(
    geometry: Geometry, scores: Mapping[str, Sequence[Tensor]], kinds: Sequence[str], shapes: Shapes | None = None
) -> list[Block]:
    """Return the blocks of some kinds, lowest score first; among equals the later layer goes first.

    Args:
        geometry: of the dense model.
        scores: per kind, one vector per layer, of length 1, or 0 where there is no such block.
        kinds: block kinds that compete with each other.
        shapes: the model's parameters by name; needed where several kinds compete.
    """
    keyed: list[tuple[float, int, str]] = []
    for kind in kinds:
        costs = (
            block_cost(geometry, kind, shapes) if shapes is not None and len(kinds) > 1 else [1] * geometry.num_layers
        )
        keyed += [
            (float(score) / cost, -layer, kind)
            for layer, (score, cost) in enumerate(zip(scores[kind], costs, strict=True))
            if len(score)
        ]
    return [(kind, -negative) for _, negative, kind in sorted(keyed)]


def take_ratio(cut: BlockCut, kind: str, ratio: float, order: Order) -> None:
    """Let a share of the blocks of a kind go, rounded to the nearest whole number.

    Args:
        cut: grows.
        kind: block kind.
        ratio: of the blocks that are left.
        order: in which they go.

    Raises:
        PlanError: that is none, all, or more than can go; the shares that work are said.
    """
    total = len(cut.left(kind))
    count = int(ratio * total + 0.5)
    most = min(total - 1, _copy(cut).take_first([(kind, layer) for layer in reversed(cut.left(kind))], total))
    if 0 < count <= most and (most := cut.take_first(order(cut, [kind]), count)) == count:
        return
    problem = "rounds to none" if count == 0 else "would leave none" if count >= total else "is too much"
    works = (
        f"1 to {most} of them can go: budget.{RATIO_KEYS[kind]} from {1 / total:.3g} to {most / total:.3g}"
        if most
        else "None of them can go"
    )
    kept = "; the first layer of each type keeps its attention" if kind == ATTENTION else ""
    raise PlanError(f"removing {ratio:.4g} of {total} {UNIT_NAMES[kind]} {problem}. {works}{kept}.")


def take_parameters(
    cut: BlockCut,
    kinds: Sequence[str],
    aim: float,
    order: Order,
    shapes: Shapes,
    *,
    nearest: bool,
) -> int:
    """Let blocks of some kinds go, and return the parameters that go with them.

    No more blocks are asked for once none that may go would.

    Args:
        cut: grows.
        kinds: block kinds that compete with each other.
        aim: parameters to remove. Blocks go as long as they fit into it.
        order: in which they go.
        shapes: the model's parameters by name.
        nearest: let one more go where that comes nearer to the aim.
    """
    costs = {kind: block_cost(cut.geometry, kind, shapes) for kind in (*_SUBLAYERS, LAYER)}
    removed, blocks = 0, iter(order(cut, kinds))

    def goes(block: Block) -> bool:
        over = removed + _cost(cut, *block, costs) - aim
        return over <= 0 or (nearest and over < aim - removed)

    while removed < aim and any(map(goes, cut.candidates(kinds))) and (block := next(blocks, None)) is not None:
        if not cut.allows(block):
            continue
        if not goes(block):
            break
        cost = _cost(cut, *block, costs)
        cut.take(block)
        removed += cost
    return removed


def left_cost(cut: BlockCut, kinds: Sequence[str], shapes: Shapes) -> int:
    """Return the parameters of all blocks of some kinds that are still there."""
    return sum(block_cost(cut.geometry, kind, shapes)[layer] for kind in kinds for layer in cut.left(kind))


def _cost(cut: BlockCut, kind: str, layer: int, costs: Mapping[str, Sequence[int]]) -> int:
    """Return what goes with a block now: a layer's last sub-layer takes what is left of the layer with it."""
    others = [other for other in _SUBLAYERS if other != kind and layer not in cut.left(other)]
    if kind == LAYER or others:
        return costs[LAYER][layer] - sum(costs[other][layer] for other in others)
    return costs[kind][layer]


def _copy(cut: BlockCut) -> BlockCut:
    copied = BlockCut(cut.geometry)
    for kind in _SUBLAYERS:
        for layer in set(copied.left(kind)) - set(cut.left(kind)):
            copied.take((kind, layer))
    return copied
