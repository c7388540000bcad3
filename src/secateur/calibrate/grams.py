"""Sums of x xT at the input of the reading projections, for chosen unit kinds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, MutableMapping
from functools import partial

from torch import Tensor

from secateur.calibrate.accumulators import GramSum
from secateur.calibrate.one_pass import RealTokens, Taps, not_finite, require_linear
from secateur.errors import FamilyError
from secateur.families.geometry import Geometry
from secateur.records.blocks import BlockBatch
from secateur.records.gram import GramsInMemory
from secateur.records.statistics import SiteKey


class GramListener:
    """Adds up the Gram matrices of one pass; kinds that share a projection share its matrix.

    Args:
        geometry: of the model.
        kinds: whose reading projections are listened to.
        place: where the matrices of a layer are put once it is done; None holds all of them to the end.

    Raises:
        FamilyError: the family has no such unit kind, or no linear layer reads it.
    """

    def __init__(
        self, geometry: Geometry, kinds: Collection[str], place: MutableMapping[SiteKey, Tensor] | None = None
    ) -> None:
        unknown = sorted(set(kinds) - set(geometry.axes))
        if unknown:
            raise FamilyError(
                f"a {geometry.family.name} model has no units called {', '.join(unknown)}. "
                f"It has: {', '.join(geometry.axes)}."
            )
        require_linear(kinds, "Gram matrices")
        self._readers = {
            axis.site: axis.reader
            for kind, layers in geometry.axes.items()
            if kind in kinds
            for axis in layers
            if axis.num_units
        }
        self._sums: defaultdict[SiteKey, GramSum] = defaultdict(GramSum)
        self._tokens: RealTokens | None = None
        self._place = place
        self._count = 0

    def taps(self) -> Taps:
        """Return the inputs of the reading projections."""
        return Taps(inputs={reader: partial(self._add, site) for site, reader in self._readers.items()})

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""
        self._tokens = tokens

    def _add(self, site: SiteKey, values: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        for rows in self._tokens.by_run(values):
            self._sums[site].update(rows)

    def end_batch(self, batch: BlockBatch) -> None:
        """Count the batch; raise CheckpointError naming the first place whose activations are not finite."""
        self._require_finite()
        self._count += batch.num_tokens

    def end_layer(self) -> None:
        """Put away the matrices so far where there is a place for them; raise CheckpointError as ``end_batch`` does."""
        self._require_finite()
        if self._place is not None:
            for site in sorted(self._sums):
                self._place[site] = self._sums.pop(site).result()

    def _require_finite(self) -> None:
        for site, sums in self._sums.items():  # in the order in which they ran
            if not sums.is_finite():
                raise not_finite(f"input of {self._readers[site]}")

    def take(self) -> GramsInMemory:
        """Return the sums and forget them, one by one, so that memory never holds all of them twice."""
        if self._place is not None:
            return GramsInMemory(self._count, self._place)
        return GramsInMemory(self._count, {site: self._sums.pop(site).result() for site in sorted(self._sums)})
