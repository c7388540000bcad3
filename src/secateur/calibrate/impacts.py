"""How much single documents need single units: what a layer's output would lose on each document without each unit.

It is exact, and comes out of the one pass: no unit is ever removed. With x what the reading projection receives of a
unit in token t and W its columns there, the projection's output changes by -W x. So the impact on a document is

- sqrt(sum_t x_t^2) ||w|| for a unit of one channel;
- sqrt(<sum_t x_t x_tT, WT W>) for a unit of several, their cross terms included.

Where the output goes through an RMS norm of its own before it joins the stream, removing a unit also changes the
length that all of it is divided by. With f the projection's output, g the norm's gain, r0 and r1 the root mean squares
of f and f - W x, and k = 1/r1 - 1/r0, token t then adds

    k^2 ||g f||^2 - 2 (k / r1) <g^2 f, W x> + ||g W x||^2 / r1^2.

For an FFN that is the change of the layer's output; for attention it is that of the attention block's, which the FFN
after it then sees.

Dims: ``tokens`` real tokens of one document in one block, ``channels`` inputs of the projection, ``units`` of ``width``
channels each, ``hidden`` outputs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from secateur.calibrate.one_pass import RealTokens, Taps, not_finite, require_linear, run_pass
from secateur.calibrate.precision import exact_float32
from secateur.calibrate.taps import OnPair, OnTensor
from secateur.errors import ConfigError, FamilyError
from secateur.families.geometry import Geometry, UnitAxis, family_sublayer
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.impacts import ImpactStatistics, UnitImpacts, judged
from secateur.records.statistics import SiteKey
from secateur.records.units import SUBLAYER_OF

_CACHED_VALUES = 2**17
"""Inputs that a processor looks at together behind a norm, where a dozen intermediate results are as large."""
_BATCH = 64
"""Blocks that are looked at together to count the tokens of documents; no model runs."""


@dataclass(frozen=True, slots=True)
class _Norm:
    """y = gain * f / sqrt(mean(f^2) + epsilon)."""

    gain: Float[Tensor, " hidden"]
    epsilon: float


@dataclass(frozen=True, slots=True)
class _Place:
    """The units of one kind at one reading projection.

    Attributes:
        axis: the units.
        weight: of the projection, a column per channel.
        products: per unit WT W; for units of one channel their squared norms, units x 1 x 1.
        norm: that the output goes through before it joins the stream; None where there is none.
        scaled: per unit WT diag(gain^2) W, where there is a norm.
    """

    axis: UnitAxis
    weight: Float[Tensor, "hidden channels"]
    products: Float[Tensor, "units width width"]
    norm: _Norm | None
    scaled: Float[Tensor, "units width width"] | None

    def energy(self, inputs: Float[Tensor, "tokens channels"]) -> Float64[Tensor, " units"]:
        """Return the sum over tokens of the squared change of the projection's output, per unit."""
        rows = inputs.to(self.products)
        if self.axis.reader_width == 1:
            lengths: Tensor = torch.linalg.vector_norm(rows, dim=0)
            return lengths.double().square() * self.products[:, 0, 0].double()
        if len(rows) < self.axis.reader_width:
            return self._quadratic(rows, self.products).clamp_min(0.0).sum(0).double()
        units = self._by_unit(rows)
        found: Tensor = (units.mT @ units) * self.products
        return found.sum((1, 2)).double()

    def _by_unit(self, rows: Float[Tensor, "tokens channels"]) -> Float[Tensor, "units tokens width"]:
        return rows.reshape(len(rows), self.axis.num_units, self.axis.reader_width).transpose(0, 1)

    def energy_after_norm(
        self, inputs: Float[Tensor, "tokens channels"], outputs: Float[Tensor, "tokens hidden"]
    ) -> Float64[Tensor, " units"]:
        """Return the sum over tokens of the squared change of the norm's output, per unit."""
        some = max(1, _CACHED_VALUES // inputs.shape[1]) if inputs.device.type == "cpu" else len(inputs)
        parts = zip(torch.split(inputs, some), torch.split(outputs, some), strict=True)
        return torch.stack([self._energy_after_norm(*part) for part in parts]).sum(0)

    def _energy_after_norm(
        self, inputs: Float[Tensor, "tokens channels"], outputs: Float[Tensor, "tokens hidden"]
    ) -> Float64[Tensor, " units"]:
        assert self.norm is not None and self.scaled is not None, "only where there is a norm"
        rows, full = inputs.to(self.products), outputs.to(self.products)
        square, along = full.square(), full @ self.weight
        gained = full * self.norm.gain
        along_gained = (gained * self.norm.gain) @ self.weight
        overlap, overlap_gained = self._per_unit(rows * along), self._per_unit(rows * along_gained)
        change = (2 * overlap - self._quadratic(rows, self.products)) / full.shape[1]
        before = (square.mean(1, keepdim=True) + self.norm.epsilon).sqrt()
        after = (before.square() - change).clamp_min(self.norm.epsilon).sqrt()
        shift = change / (before * after * (before + after))
        moved = shift.square() * gained.square().sum(1, keepdim=True) - 2 * shift / after * overlap_gained
        moved += self._quadratic(rows, self.scaled) / after.square()
        return moved.clamp_min(0.0).sum(0).double()

    def _per_unit(self, values: Float[Tensor, "tokens channels"]) -> Float[Tensor, "tokens units"]:
        return values if self.axis.reader_width == 1 else self._by_unit(values).sum(2).T

    def _quadratic(
        self, rows: Float[Tensor, "tokens channels"], products: Float[Tensor, "units width width"]
    ) -> Float[Tensor, "tokens units"]:
        if self.axis.reader_width == 1:
            return rows.square() * products[:, 0, 0]
        units = self._by_unit(rows)
        found: Tensor = (units @ products) * units
        return found.sum(2).T


class ImpactListener:
    """Adds up the impacts of one pass; a document is judged once its last token has been run.

    Its sums are held meanwhile: one number per unit for every document that has begun and not ended.

    Args:
        model: that the pass will run; its reading projections and norms are looked at now.
        blocks: that the pass will run.
        geometry: of the model.
        kinds: unit kinds to judge.
        who: who needs impacts, for messages.

    Raises:
        FamilyError: the family cannot cut one of the kinds, no linear layer reads it, or a norm after a sub-layer is of
            an unknown form.
        ConfigError: the weights are quantised.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: TokenBlocks,
        geometry: Geometry,
        kinds: Collection[str],
        who: str = "the impact on documents",
    ) -> None:
        geometry.require_cuttable(kinds)
        require_linear(kinds, "impacts")
        self._places = {
            (axis.layer, kind): _place(model, geometry, axis, who)
            for kind in kinds
            for axis in geometry.axes[kind]
            if axis.num_units
        }
        self._left = _document_lengths(blocks)
        self._open: defaultdict[int, dict[SiteKey, Tensor]] = defaultdict(dict)
        self._totals: dict[SiteKey, UnitImpacts] = {}
        self._tokens: RealTokens | None = None
        self._count = 0

    def taps(self) -> Taps:
        """Return the reading projections: their inputs, and where a norm follows their outputs too."""
        inputs: dict[str, OnTensor] = {}
        through: dict[str, OnPair] = {}
        readers: defaultdict[str, list[SiteKey]] = defaultdict(list)
        for site, place in self._places.items():
            readers[place.axis.reader].append(site)
        for reader, sites in readers.items():
            if self._places[sites[0]].norm is None:
                inputs[reader] = partial(self._add, sites)
            else:
                through[reader] = partial(self._add_normed, sites)
        return Taps(inputs=inputs, through=through)

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the documents of the next batch are."""
        self._tokens = tokens

    def _add(self, sites: list[SiteKey], inputs: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        with exact_float32():
            for document, rows in self._tokens.by_document(inputs):
                for site in sites:
                    self._put(document, site, self._places[site].energy(rows))

    def _add_normed(self, sites: list[SiteKey], inputs: Tensor, outputs: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        with exact_float32():
            pairs = zip(self._tokens.by_document(inputs), self._tokens.by_document(outputs), strict=True)
            for (document, rows), (_, made) in pairs:
                for site in sites:
                    self._put(document, site, self._places[site].energy_after_norm(rows, made))

    def _put(self, document: int, site: SiteKey, energy: Float64[Tensor, " units"]) -> None:
        found = self._open[document]
        found[site] = found[site] + energy if site in found else energy

    def end_batch(self, batch: BlockBatch) -> None:
        """Judge the documents that have ended; raise CheckpointError where activations were not finite."""
        ended = []
        for document, count in _token_counts(batch).items():
            self._left[document] -= count
            if self._left[document] == 0:
                ended.append(document)
        if not ended:
            return
        found = [self._open.pop(document) for document in ended]
        for site, place in self._places.items():
            energies = torch.stack([energy[site] for energy in found])
            if not bool(torch.isfinite(energies).all()):
                raise not_finite(f"input of {place.axis.reader}")
            found_here = judged(energies.sqrt())
            self._totals[site] = self._totals[site] + found_here if site in self._totals else found_here
        self._count += len(ended)

    def result(self) -> ImpactStatistics:
        """Return what the documents say, on the CPU."""
        assert not self._open, "a document has not ended: the blocks that ran are not those that were announced"
        units = {
            site: UnitImpacts(
                total.count,
                total.impact_max.cpu(),
                total.impact_sq.cpu(),
                total.rank_max.cpu(),
                total.rank_sum.cpu(),
                total.rank_counts.cpu(),
            )
            for site, total in sorted(self._totals.items())
        }
        return ImpactStatistics(self._count, units)


def _document_lengths(blocks: TokenBlocks) -> Counter[int]:
    """Return how many tokens will be run of each document."""
    lengths: Counter[int] = Counter()
    for batch in blocks.batches(_BATCH):
        lengths.update(_token_counts(batch))
    return lengths


def _token_counts(batch: BlockBatch) -> Counter[int]:
    """Return how many tokens of each document a batch holds."""
    return Counter(batch.document[batch.valid].tolist())


def _place(model: nn.Module, geometry: Geometry, axis: UnitAxis, who: str) -> _Place:
    raw: Any = getattr(model.get_submodule(axis.reader), "weight", None)
    if not isinstance(raw, Tensor) or not raw.is_floating_point() or raw.element_size() < 2:
        raise ConfigError(
            f"{who} needs weights; {axis.reader} has no plain weight (it is quantised, or wrapped). Load the model "
            "unquantised, or use a method that reads statistics alone, such as activation_norm."
        )
    weight = raw.detach() if geometry.family.weight_layout == "out_in" else raw.detach().T
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    norm = _norm_after(model, geometry, axis, weight)
    scaled = None if norm is None else _unit_products(weight * norm.gain[:, None], axis)
    return _Place(axis, weight, _unit_products(weight, axis), norm, scaled)


def _unit_products(weight: Float[Tensor, "hidden channels"], axis: UnitAxis) -> Float[Tensor, "units width width"]:
    units = weight.T.reshape(axis.num_units, axis.reader_width, -1)
    if axis.reader_width == 1:
        return units.square().sum(2, keepdim=True)
    with exact_float32():
        return units @ units.mT


def _norm_after(model: nn.Module, geometry: Geometry, axis: UnitAxis, weight: Tensor) -> _Norm | None:
    """Return the norm between the reading projection and the stream, in the dtype of ``weight``.

    Raises:
        FamilyError: it is no RMS norm with a gain.
    """
    norms = family_sublayer(geometry.family, SUBLAYER_OF[axis.kind]).norms
    if len(norms) < 2:
        return None
    name = f"{geometry.layer_name(axis.layer)}.{norms[-1]}"
    module: Any = model.get_submodule(name)
    epsilon = next((float(getattr(module, key)) for key in ("eps", "variance_epsilon") if hasattr(module, key)), None)
    if epsilon is not None:
        with torch.no_grad():
            gain = module(weight.new_ones(1, len(weight)))[0].to(weight) * (1 + epsilon) ** 0.5
            probe = torch.linspace(-1.0, 2.0, len(weight)).to(weight)
            expected = gain * probe / (probe.square().mean() + epsilon).sqrt()
            if torch.allclose(module(probe[None])[0].to(weight), expected, rtol=1e-2, atol=1e-3):
                return _Norm(gain, epsilon)
    raise FamilyError(
        f"{name} is not an RMS norm, so what a unit's removal does to its output is not known. Use a method other than "
        "cus_prun."
    )


def collect_impacts(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    kinds: Collection[str],
    *,
    batch_size: int = 4,
    progress: Progress = silent,
    label: str = "impact on documents",
    who: str = "the impact on documents",
) -> ImpactStatistics:
    """Return what every document of ``blocks`` says of the units, by a pass of its own.

    ``collect(also=[ImpactListener(...)])`` takes the same in the calibration pass.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: packed calibration text.
        geometry: of this model.
        kinds: unit kinds to judge.
        batch_size: blocks per forward pass.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        who: who needs impacts, for messages.

    Raises:
        CheckpointError: activations are not finite; the place is named.
        FamilyError: the family cannot cut one of the kinds, no linear layer reads it, or a norm after a sub-layer is of
            an unknown form.
        ConfigError: the weights are quantised.
    """
    listener = ImpactListener(model, blocks, geometry, kinds, who)
    run_pass(model, blocks, geometry, [listener], batch_size=batch_size, progress=progress, label=label)
    return listener.result()
