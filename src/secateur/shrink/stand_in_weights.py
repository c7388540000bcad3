"""Full-size weights under which a dense model predicts as if units were gone, to measure many plans without building.

A projection that reads removed units gets zero columns there, and reconstructed ones elsewhere. A sub-layer that goes
as a whole gets a projection of zeros, its bias included. Norms after the sub-layer must map zeros to zeros; those
of all families here do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.families.geometry import Geometry, UnitAxis
from secateur.records.units import EXPERT, SHARED_CHANNEL
from secateur.shrink.apply import Reconstruct, kept_channels

ChooseUnits = Callable[[str, int, int], Sequence[int]]
"""(unit kind, layer, how many stay) -> the units that stay, ascending."""


@dataclass(slots=True)
class StandInWeights:
    """Makes the weights for any number of units that stay, and keeps those used last.

    Attributes:
        geometry: of the dense model.
        load_tensor: its parameters by name; None for those it does not have.
        choose: which units stay.
        reconstruct: gives a projection's kept columns; None keeps them as they are.
        limit_bytes: memory for weights that are kept for later, without their zero columns.
    """

    geometry: Geometry
    load_tensor: Callable[[str], Tensor | None]
    choose: ChooseUnits
    reconstruct: Reconstruct | None = None
    limit_bytes: int = 2**30
    _made: OrderedDict[tuple[str, int, int], tuple[Tensor, Tensor]] = field(default_factory=OrderedDict)
    _bytes: int = 0

    def patch(self, counts: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Return the parameters that change when so many units stay, by kind and layer; full layers have none."""
        changed: dict[str, Tensor] = {}
        for kind, per_layer in counts.items():
            for axis, kept in zip(self.geometry.axes[kind], per_layer, strict=True):
                if kept < axis.num_units:
                    changed |= self.site(axis, kept)
        return changed

    def site(self, axis: UnitAxis, kept: int) -> dict[str, Tensor]:
        """Return the parameters of one projection that change when ``kept`` units of its axis stay."""
        if axis.kind == EXPERT:
            assert kept == 0, "experts are left out one sub-layer at a time"
            found = {name: self.load_tensor(name) for name in self._ends(axis)}
            return {name: torch.zeros_like(weight) for name, weight in found.items() if weight is not None}
        name = f"{axis.reader}.weight"
        dense = self._weight(name)
        if kept == 0:
            bias = self.load_tensor(f"{axis.reader}.bias")
            gone = {name: _zeros(dense)}
            return gone if bias is None else {**gone, f"{axis.reader}.bias": _zeros(bias)}
        channels, columns = self._columns(axis, kept, dense)
        matrix = torch.zeros_like(dense)
        (matrix if self._rows_first else matrix.T)[:, channels] = columns
        return {name: matrix}

    def _ends(self, axis: UnitAxis) -> list[str]:
        """Return the parameters that end the sub-layer of routed experts, those of a shared expert among them."""
        shared = self.geometry.axes.get(SHARED_CHANNEL, ())
        readers = [other.reader for other in shared if other.layer == axis.layer]
        linear = [f"{reader}.{leaf}" for reader in readers for leaf in ("weight", "bias")]
        return [*(f"{axis.reader}.{leaf}" for leaf in ("down_proj", "down_proj_bias")), *linear]

    @property
    def _rows_first(self) -> bool:
        return self.geometry.family.weight_layout == "out_in"

    def _weight(self, name: str) -> Tensor:
        weight = self.load_tensor(name)
        assert weight is not None, f"the model has no {name}"
        return weight

    def _columns(self, axis: UnitAxis, kept: int, dense: Tensor) -> tuple[Tensor, Tensor]:
        key = axis.kind, axis.layer, kept
        if key in self._made:
            self._made.move_to_end(key)
            return self._made[key]
        channels = kept_channels(axis, self.choose(*key))
        matrix = dense if self._rows_first else dense.T
        columns = matrix[:, channels] if self.reconstruct is None else self.reconstruct(axis, channels, matrix)
        made = torch.tensor(channels, device=dense.device), columns.contiguous()
        self._made[key] = made
        self._bytes += made[1].nbytes
        while self._bytes > self.limit_bytes and len(self._made) > 1:
            _, (_, dropped) = self._made.popitem(last=False)
            self._bytes -= dropped.nbytes
        return made


def _zeros(like: Tensor) -> Tensor:
    """Return zeros of a tensor's shape that take the memory of one number."""
    return like.new_zeros(()).expand_as(like)
