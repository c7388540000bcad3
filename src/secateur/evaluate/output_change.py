"""How much a change of some weights changes what a model predicts: the yardstick of searches over plans.

A candidate is a *patch*: parameters by name with the values that they take for a moment. Pruning a projection's inputs
is patching it with zero columns, so candidates are compared without building models. For each batch of text the dense
model runs once, then every candidate; where a patch touches one layer only, the layers before it do not run again.

Three measures, all means over predicted tokens, in nats: ``kl`` is KL(dense || patched) of the next-token distributions
and ``js`` their Jensen-Shannon divergence (FinerCut, Zhang et al. 2024, arXiv 2405.18218), both 0 for no change;
``loss`` is the patched model's own loss on the text (BlockPruner, Zhong et al. 2024, arXiv 2406.10594).

Dims: ``rows`` predicted tokens, ``vocab`` token ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.evaluate.perplexity import log_totals
from secateur.families.geometry import Geometry
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.stream.forward import run_logits
from secateur.stream.layers import run_layer
from secateur.stream.sources import LayerSource
from secateur.stream.stand_ins import LayerInputs, layers_giving, plain_tensors, record_layer_inputs

Measure = Literal["kl", "js", "loss"]
Patch = Mapping[str, Tensor]
"""Parameter name -> the values it takes, of the parameter's own shape."""
MakePatch = Callable[[], Patch]
"""Makes a patch when it is its turn, so that those of many candidates are never in memory together."""

_ROWS_AT_ONCE = 32


@contextmanager
def patched(model: Any, patch: Patch) -> Iterator[None]:
    """Give parameters other values for as long as the context lasts; nothing is copied."""
    with ExitStack() as stack:
        for name, values in patch.items():
            parameter = model.get_parameter(name)
            assert parameter.shape == values.shape, f"{name} has shape {tuple(parameter.shape)}"
            stack.callback(_set, parameter, parameter.data)
            _set(parameter, values.to(parameter))
        yield


def _set(parameter: Tensor, values: Tensor) -> None:
    parameter.data = values


@dataclass(slots=True)
class ChangeSums:
    """Sums of a measure over the batches done so far, one per candidate.

    Attributes:
        sums: over predicted tokens.
        num_tokens: predicted tokens behind them.
        num_batches: batches behind them.
    """

    sums: Float64[Tensor, " candidates"]
    num_tokens: int = 0
    num_batches: int = 0

    def means(self) -> list[float]:
        """Return the measure per candidate."""
        return [float(value) for value in self.sums / self.num_tokens]


class OutputChange:
    """Measures candidates on one text.

    Args:
        source: the dense model; it is left as it was.
        blocks: the text.
        batch_size: blocks per batch. The logits of one batch are held twice.
        measure: what to measure.
    """

    def __init__(self, source: LayerSource, blocks: TokenBlocks, *, batch_size: int = 1, measure: Measure = "kl"):
        self.geometry: Geometry = source.geometry
        self._source = source
        self._blocks = blocks
        self._batch_size = batch_size
        self._measure = measure

    @property
    def num_batches(self) -> int:
        """Batches of the whole text."""
        return -(-self._blocks.num_blocks // self._batch_size)

    def together(self, candidates: Sequence[MakePatch], *, max_batches: int | None = None) -> list[float]:
        """Return the measure of every candidate; each may patch any layers.

        Args:
            candidates: what to measure.
            max_batches: use only so many batches, the first ones; None for all.

        Raises:
            CheckpointError: a candidate's outputs are not finite.
        """
        layered = [list(enumerate(candidates))]
        totals = ChangeSums(torch.zeros(len(candidates), dtype=torch.float64))
        for batch in self._batches(0, max_batches):
            self._add(batch, layered, totals)
        return totals.means()

    def alone(
        self, candidates: Sequence[Sequence[MakePatch]], done: ChangeSums | None = None, *, base: Patch | None = None
    ) -> Iterator[ChangeSums]:
        """Yield growing sums, batch by batch, for candidates that each patch one layer only.

        Args:
            candidates: per layer, those that patch this layer and no other.
            done: sums to go on from, of the same candidates; None starts anew.
            base: a patch of any layers that every candidate comes on top of; what outputs are compared with stays the
                unpatched model.

        Raises:
            CheckpointError: a candidate's outputs are not finite.
        """
        layered: list[list[tuple[int, MakePatch]]] = []
        count = 0
        for per_layer in candidates:
            layered.append(list(enumerate(per_layer, start=count)))
            count += len(per_layer)
        totals = done or ChangeSums(torch.zeros(count, dtype=torch.float64))
        for batch in self._batches(totals.num_batches, None):
            self._add(batch, layered, totals, base or {})
            yield totals

    def _batches(self, start: int, stop: int | None) -> Iterator[BlockBatch]:
        for index, batch in enumerate(self._blocks.batches(self._batch_size)):
            if stop is not None and index >= stop:
                return
            if index >= start:
                yield batch

    def _add(
        self,
        batch: BlockBatch,
        layered: Sequence[Sequence[tuple[int, MakePatch]]],
        totals: ChangeSums,
        base: Patch | None = None,
    ) -> None:
        model = self._source.model
        inputs = record_layer_inputs(model, batch, self.geometry.family)
        wanted = batch.predicted.to(inputs.hidden.device)
        targets = batch.input_ids.to(wanted.device)[wanted]
        dense: Tensor | None = None
        if self._measure != "loss":
            entering = self._entering(inputs)
            dense = self._logits(batch, entering[-1], wanted)
        with patched(model, base or {}):
            if base or dense is None:
                entering = self._entering(inputs)
            for first, candidates in enumerate(layered):
                for index, make in candidates:
                    patch = make()
                    with patched(model, patch):
                        hidden = entering[first]
                        for layer in range(first, self.geometry.num_layers):
                            hidden = self._run(layer, hidden, inputs.calls[layer])
                        logits = self._logits(batch, hidden, wanted)
                    value = float(_changes(self._measure, dense, logits, targets).double().sum())
                    if not math.isfinite(value):
                        raise CheckpointError(
                            "the outputs of a pruned candidate are not finite (changed: "
                            f"{', '.join(list(patch)[:3])}). Run with dtype: float32 if the model overflows in half "
                            "precision."
                        )
                    totals.sums[index] += value
        totals.num_tokens += len(targets)
        totals.num_batches += 1

    def _entering(self, inputs: LayerInputs) -> list[Tensor]:
        """Return the states that enter each layer, and last those that leave the last one."""
        states = [inputs.hidden]
        for layer in range(self.geometry.num_layers):
            states.append(self._run(layer, states[-1], inputs.calls[layer]))
        return states

    def _run(self, layer: int, hidden: Tensor, call: Any) -> Tensor:
        with plain_tensors(), self._source.layer(layer) as module:
            return run_layer(module, hidden, call)

    def _logits(self, batch: BlockBatch, hidden: Tensor, wanted: Tensor) -> Float[Tensor, "rows vocab"]:
        """Return the logits that predict the wanted tokens."""
        model, family = self._source.model, self.geometry.family
        with plain_tensors(), layers_giving(model, family, hidden):
            return run_logits(model, batch, family)[:, :-1][wanted[:, 1:]]


def _changes(
    measure: Measure,
    dense: Float[Tensor, "rows vocab"] | None,
    changed: Float[Tensor, "rows vocab"],
    targets: Int64[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    """Return the measure per row, a few rows at a time, so that buffers stay small; the loss needs no dense logits."""
    if measure == "loss":
        return log_totals(changed) - changed.gather(1, targets[:, None])[:, 0]
    assert dense is not None, "divergences are from the dense model's outputs"
    function = kl_divergence if measure == "kl" else js_divergence
    starts = range(0, len(dense), _ROWS_AT_ONCE)
    return torch.cat([function(dense[i : i + _ROWS_AT_ONCE], changed[i : i + _ROWS_AT_ONCE]) for i in starts])


def kl_divergence(first: Float[Tensor, "rows vocab"], second: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return KL(softmax(first) || softmax(second)) per row, in nats."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def js_divergence(first: Float[Tensor, "rows vocab"], second: Float[Tensor, "rows vocab"]) -> Float[Tensor, " rows"]:
    """Return the Jensen-Shannon divergence of both softmaxes per row, in nats; at most log 2."""
    log_p, log_q = first.log_softmax(-1), second.log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - torch.log(torch.tensor(2.0, dtype=log_p.dtype))
    return ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
