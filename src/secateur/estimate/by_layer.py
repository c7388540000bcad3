"""What a run with ``memory: by_layer`` takes: the same passes, with one layer in memory and the rest on the disk.

Where it differs from ``stages``: every pass through a model reads its layers from the disk again. In memory are what
lies outside the layers (embeddings, head) and one layer, twice, because pages of its file are resident while it is
copied. A text's hidden states lie on the disk, N h, and 4 N h while layers are fitted on the pruned stream. Of Gram
matrices one layer's are in memory. The smaller model is written parameter by parameter and never in memory as a whole.
"""

from __future__ import annotations

from collections import defaultdict

from secateur.estimate import costs
from secateur.estimate.size import ModelSize
from secateur.estimate.stages import DENSE, SAVE_S, Cost, Setting, Stages
from secateur.recipe import Recipe

LIBRARY_BYTES = 300_000_000
"""What the model's code and the C library hold besides, after the first layers: fitted to three runs, whose peaks then
came out at 0.84 to 1.13 of what was measured (BENCHMARKS.md)."""
ONE_LAYER, CODE = "one layer, and its file", "held after the first layers"
STREAMS, MEASURED = "residual streams of the text", "measured weights"


class ByLayerStages(Stages):
    """Predicts the stages of a recipe that runs models one layer at a time."""

    def __init__(self, recipe: Recipe, setting: Setting) -> None:
        super().__init__(recipe, setting)
        self._stream = 0

    def _outside(self, size: ModelSize) -> int:
        """Return the bytes of what stays in memory of a model: all that is not in its layers."""
        outside = size.parameters - sum(layer.parameters for layer in size.layers)
        return costs.weights_bytes(outside, self.setting.compute)

    def _with_dense(self) -> Cost:
        layer = max(layer.parameters for layer in self.size.layers)
        held = costs.weights_bytes(layer, self.setting.compute) + costs.weights_bytes(layer, self.size.stored)
        return Cost(memory={DENSE: self._outside(self.size), ONE_LAYER: held, CODE: LIBRARY_BYTES})

    def _forward_s(self, size: ModelSize, tokens: int, rate: float | None = None) -> float:
        """Return the seconds of a pass: its operations, and its layers read; notes the stream it leaves on the disk."""
        stream = costs.hidden_bytes(size, costs.in_blocks(tokens, self.block), self.setting.compute, 1)
        self._stream = max(self._stream, stream)
        in_layers = sum(layer.parameters for layer in size.layers)
        read = costs.weights_bytes(in_layers, self.size.stored) / self.rates.read
        load = costs.weights_bytes(in_layers, self.setting.compute) / self.rates.load
        moved = 2 * stream * len(size.layers) / self.rates.write  # read and written once a layer
        return super()._forward_s(size, tokens, rate) + read + load + moved

    def _sum_grams(self, cost: Cost, tokens: int) -> None:
        super()._sum_grams(cost, tokens)
        of_layer: defaultdict[int, int] = defaultdict(int)
        for site in self._gram_sites:
            of_layer[site.layer] += costs.gram_bytes([site])
        cost.host["Gram matrices"] = max(of_layer.values())

    def _save(self, cost: Cost, size: ModelSize) -> None:
        """Add writing a model and running it once from the disk."""
        stored = costs.weights_bytes(size.parameters, self.size.stored)
        cost.seconds += SAVE_S + stored / self.rates.write + 2 * stored / self.rates.read
        cost.disk += stored
        cost.memory["embeddings and head of the smaller model"] = self._outside(size)

    def _cut(self, cost: Cost) -> None:
        """Add reading the dense model once; what is cut is written at once and held by nobody."""
        cost.seconds += costs.weights_bytes(self.size.parameters, self.size.stored) / self.rates.read
        cost.seconds += costs.weights_bytes(self.size.parameters, self.setting.compute) / self.rates.load

    def _fit(self, cost: Cost, times: int = 1) -> None:
        super()._fit(cost, times)
        if STREAMS in cost.memory:
            self._stream = max(self._stream, cost.memory.pop(STREAMS))

    def _add(self, name: str, cost: Cost, *, unpredicted: bool = False) -> None:
        is_control = name.removeprefix("evaluate:") in self.recipe.evaluate.controls
        if is_control:  # cut on the disk, measured and deleted
            stored = costs.weights_bytes(self.small.parameters, self.size.stored)
            cost.temporary += stored
            cost.seconds += stored / self.rates.write
        if is_control or MEASURED in cost.memory:
            cost.memory[MEASURED] = self._outside(self.small)
        cost.temporary += self._stream
        self._stream = 0
        super()._add(name, cost, unpredicted=unpredicted)
