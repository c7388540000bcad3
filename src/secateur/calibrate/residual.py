"""How much the residual stream turns in every layer and sub-layer: sums of cosines over tokens, for one pass.

What runs before or after what is seen while the model runs, so nothing here depends on a family. The stream that enters
a feed-forward sub-layer is what the first of its modules and norms to run receives. Where that is the layer's own
input, or where the sub-layer shares its norm, both sub-layers read and add to the same stream (they are parallel), and
each is judged against the layer's input alone.
"""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.calibrate.accumulators import Scratch, cosine_sums
from secateur.calibrate.one_pass import RealTokens, Taps
from secateur.calibrate.taps import OnPair
from secateur.families.geometry import Geometry, family_sublayer
from secateur.records.blocks import BlockBatch
from secateur.records.units import ATTENTION, FFN, LAYER

_KINDS = (LAYER, ATTENTION, FFN)


class ResidualSums:
    """Running sums of the cosine of the residual stream before and after each layer and each of its sub-layers."""

    def __init__(self, geometry: Geometry, scratch: Scratch) -> None:
        self._geometry = geometry
        self._scratch = scratch
        self._tokens: RealTokens | None = None
        self._sums = {kind: [torch.zeros((), dtype=torch.float64)] * geometry.num_layers for kind in _KINDS}
        self._enters_ffn: Tensor | None = None
        self._attention_adds: Tensor | None = None

    def taps(self) -> Taps:
        """Return what to call at which modules."""
        geometry = self._geometry
        inputs = self._modules(FFN) if family_sublayer(geometry.family, FFN).norms else []
        through: dict[str, OnPair] = dict.fromkeys(self._modules(ATTENTION), self._leave_attention)
        through |= {geometry.layer_name(n): partial(self._leave_layer, n) for n in range(geometry.num_layers)}
        return Taps(inputs=dict.fromkeys(inputs, self._enter_ffn), through=through)

    def _modules(self, kind: str) -> list[str]:
        geometry = self._geometry
        layers = [layer for layer in range(geometry.num_layers) if geometry.has_sublayer(kind, layer)]
        return [module for layer in layers for module in geometry.block_modules(kind, layer)]

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""
        self._tokens = tokens

    def end_batch(self, batch: BlockBatch) -> None:
        """Do nothing: whoever reads the sums asks whether they are finite."""

    @property
    def enters_ffn(self) -> Tensor | None:
        """The stream that enters the feed-forward sub-layer that is running; None outside of one."""
        return self._enters_ffn

    def _enter_ffn(self, stream: Tensor) -> None:
        if self._enters_ffn is None:
            self._enters_ffn = stream

    def _leave_attention(self, _stream: Tensor, added: Tensor) -> None:
        self._attention_adds = added  # of its modules and norms, the last to run is the one whose output is added

    def _leave_layer(self, layer: int, before: Tensor, after: Tensor) -> None:
        between, added = self._enters_ffn, self._attention_adds
        self._enters_ffn = self._attention_adds = None
        if not self._geometry.has_sublayer(FFN, layer):
            between = after
        if added is not None and (between is None or between is before):
            self._add_parallel(layer, before, added, after)
        else:
            self._add_sequential(layer, before, before if between is None else between, after)

    def _add_sequential(self, layer: int, before: Tensor, between: Tensor, after: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        for start, middle, end in zip(*map(self._tokens.by_block, (before, between, after)), strict=True):
            pairs = {LAYER: (0, 2), ATTENTION: (0, 1), FFN: (1, 2)}
            self._add(layer, cosine_sums((start, middle, end), pairs, self._scratch))

    def _add_parallel(self, layer: int, before: Tensor, added: Tensor, after: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        for start, attention, end in zip(*map(self._tokens.by_block, (before, added, after)), strict=True):
            streams = (start, end, start + attention, end - attention)
            pairs = {LAYER: (0, 1), ATTENTION: (0, 2), FFN: (0, 3)}
            self._add(layer, cosine_sums(streams, pairs, self._scratch))

    def _add(self, layer: int, cosines: dict[str, Float64[Tensor, ""]]) -> None:
        for kind, cosine in cosines.items():
            self._sums[kind][layer] = self._sums[kind][layer].to(cosine.device) + cosine

    def is_finite(self, layer: int) -> bool:
        """Return whether the sums of a layer are finite."""
        return all(bool(torch.isfinite(sums[layer])) for sums in self._sums.values())

    def of_layers(self) -> Float64[Tensor, " layers"]:
        """Return the sum over tokens of cos(layer input, layer output) per layer, on the CPU."""
        return self._result(LAYER)

    def of_sublayers(self) -> dict[str, Float64[Tensor, " layers"]]:
        """Return, for ``attention`` and ``ffn``, the sum over tokens of the cosine across the sub-layer, on the CPU."""
        return {kind: self._result(kind) for kind in (ATTENTION, FFN)}

    def _result(self, kind: str) -> Tensor:
        return torch.stack([total.cpu() for total in self._sums[kind]])
