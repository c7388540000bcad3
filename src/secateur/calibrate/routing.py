"""What the routed experts of mixture-of-experts layers do, in the one pass: sums per expert and per expert's channel.

transformers runs all experts of a layer at once and returns only their weighted sum. So for the length of a pass the
module's forward is replaced by one that returns the same and notes each expert's own output on the way. It is written
against the interface that every such module of transformers has, and knows no family.

Source: the sums are those of EASY-EP (Dong et al. 2025, arXiv 2504.06792) and REAP (Lasby et al. 2025, arXiv
2510.13999). The former sets the routed experts' whole output against the residual stream that it is added to, so a
token's sums are taken once the last of its experts has run.

Dims: ``tokens`` of a batch, padding among them; ``pairs`` of a token and one of its experts, sorted by expert;
``hidden`` residual width; ``width`` hidden channels of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from secateur.calibrate.accumulators import Scratch, widened
from secateur.calibrate.one_pass import RealTokens, Taps
from secateur.calibrate.precision import exact_float32
from secateur.calibrate.residual import ResidualSums
from secateur.errors import CheckpointError, FamilyError
from secateur.families.geometry import Geometry, RoutedExperts
from secateur.records.blocks import BlockBatch
from secateur.records.routing import RoutingSums
from secateur.records.statistics import Moments, SequenceSums, SiteKey
from secateur.records.units import EXPERT, EXPERT_CHANNEL

_NEEDED = ("num_experts", "down_proj", "is_transposed", "has_bias", "has_gate", "_apply_gate")
"""What a module must have for its experts to be run one by one."""
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights that are not quantised."""
_SHORT = 1e-16
"""Products of lengths below it count as that long, so that a silent stream has a cosine."""


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """Every token with each of its experts, sorted by expert.

    Attributes:
        bounds: where each expert's pairs begin, and at last how many pairs there are.
        expert: index of the expert.
        token: index of the token.
        gate: weight that the router gives the expert.
        activation: what enters the expert's down projection.
        output: what the expert makes of the token, before the weight.
    """

    bounds: Sequence[int]
    expert: Int64[Tensor, " pairs"]
    token: Int64[Tensor, " pairs"]
    gate: Float[Tensor, " pairs"]
    activation: Float[Tensor, "pairs width"]
    output: Float[Tensor, "pairs hidden"]


def run_experts(
    module: Any,
    hidden: Float[Tensor, "tokens hidden"],
    experts: Int64[Tensor, "tokens chosen"],
    gates: Float[Tensor, "tokens chosen"],
) -> tuple[Float[Tensor, "tokens hidden"], RoutedPairs]:
    """Return what a module of fused experts returns, and what each expert contributed to it.

    Args:
        module: of transformers' interface for experts.
        hidden: what enters the experts.
        experts: the chosen ones of each token.
        gates: their weights.
    """
    chosen = experts.shape[1]
    expert, order = torch.sort(experts.flatten(), stable=True)
    counts = torch.bincount(expert, minlength=module.num_experts)
    bounds = [0, *counts.cumsum(0).tolist()]
    token, gate = order // chosen, gates.flatten()[order]
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _by_expert(module, name, hidden.index_select(0, token), expert, bounds)
    activation = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    output = _by_expert(module, "down_proj", activation, expert, bounds)
    if getattr(module, "has_post_expert_norm", False):
        output = module.post_expert_norm(output)
    total = _weighted_sums(output, order, gates).to(hidden.dtype)
    return total, RoutedPairs(bounds, expert, token, gate, activation, output)


def _weighted_sums(
    output: Float[Tensor, "pairs hidden"], order: Int64[Tensor, " pairs"], gates: Float[Tensor, "tokens chosen"]
) -> Float[Tensor, "tokens hidden"]:
    """Return each token's sum of outputs times gates; ``order`` says which of the tokens' choices each pair is."""
    dtype = torch.result_type(output, gates)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    chosen = output.index_select(0, places).to(dtype).view(*gates.shape, -1)
    with exact_float32():
        return torch.bmm(gates[:, None].to(dtype), chosen).squeeze(1)


def _by_expert(module: Any, name: str, rows: Tensor, expert: Tensor, bounds: Sequence[int]) -> Tensor:
    """Return each row times the weight of its own expert, plus that expert's bias."""
    weights = getattr(module, name) if module.is_transposed else getattr(module, name).mT
    rows = rows.to(weights.dtype)
    result = rows.new_empty(len(rows), weights.shape[2])
    for index, (start, stop) in enumerate(pairwise(bounds)):
        if start < stop:
            torch.mm(rows[start:stop], weights[index], out=result[start:stop])
    return result.add_(getattr(module, f"{name}_bias")[expert]) if module.has_bias else result


def require_plain_experts(module: nn.Module, name: str) -> None:
    """Refuse a module whose experts cannot be run one by one.

    Raises:
        CheckpointError: the weights are quantised.
        FamilyError: the module lacks transformers' interface for experts.
    """
    missing = [part for part in _NEEDED if not hasattr(module, part)]
    if missing:
        raise FamilyError(
            f"{name} is a {type(module).__name__} without {', '.join(missing)}, so its experts cannot be run one by "
            "one. Use a transformers release between 5.15 and 6, and the model class that it has for this model type."
        )
    weight = module.down_proj
    if not (isinstance(weight, Tensor) and weight.ndim == 3 and weight.dtype in _PLAIN):
        found = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise CheckpointError(
            f"the experts in {name} are quantised ({found}), and what each gives can be noted only of plain weights. "
            "Load the model dequantised, or use a checkpoint in bfloat16, float16 or float32."
        )


class RoutingListener:
    """Adds up what every expert of a model does in one pass.

    Args:
        model: the model that is run.
        geometry: of it.
        residual: listens to the same pass; it knows the stream that enters each feed-forward sub-layer.

    Raises:
        CheckpointError: a layer's experts are quantised.
        FamilyError: they are no module of transformers' interface for experts.
    """

    def __init__(self, model: nn.Module, geometry: Geometry, residual: ResidualSums) -> None:
        self._model = model
        self._residual = residual
        self._experts = [experts for experts in geometry.experts if experts is not None]
        self._tokens: RealTokens | None = None
        self._sums = {experts.layer: _LayerSums(experts) for experts in self._experts}
        self._layers = {experts.layer: geometry.layer_name(experts.layer) for experts in self._experts}
        self._has_channels = {layer for layer in self._sums if _num_units(geometry, EXPERT_CHANNEL, layer)}
        self._scratch = Scratch()
        for experts in self._experts:
            require_plain_experts(model.get_submodule(experts.module), experts.module)

    def taps(self) -> Taps:
        """Return what runs in place of the experts' own forward."""
        return Taps(
            instead={experts.module: partial(self._run, experts.layer) for experts in self._experts},
            modules={experts.router: partial(self._ask, experts.layer) for experts in self._experts},
        )

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""
        self._tokens = tokens

    def end_batch(self, batch: BlockBatch) -> None:
        """Do nothing: whoever reads the sums asks whether they are finite."""

    def _ask(self, layer: int, router: nn.Module, hidden: Tensor) -> None:
        assert self._tokens is not None, "no batch was started"
        real = self._tokens.real(hidden.device).flatten()
        self._sums[layer].add_logits(router_logits(router, hidden.reshape(len(real), -1)[real]))

    def _run(self, layer: int, module: nn.Module, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        assert self._tokens is not None, "no batch was started"
        added, pairs = run_experts(module, hidden, experts, gates)
        stream = self._residual.enters_ffn
        assert stream is not None, "a family with experts names the norms before its feed-forward sub-layer"
        # Some layers scale what a sub-layer gives before they add it.
        scale = float(getattr(self._model.get_submodule(self._layers[layer]), "residual_multiplier", 1.0))
        real, sums = self._tokens.real(hidden.device), self._sums[layer]
        sums.add_pairs(pairs, real.flatten(), turned(stream.reshape(hidden.shape), added, scale))
        sums.count += sum(self._tokens.counts)
        if layer in self._has_channels:
            sums.add_channels(pairs, real, self._tokens.counts, self._scratch)
        return added

    def is_finite(self, layer: int) -> bool:
        """Return whether the sums of a layer are finite; so they are where it has no experts."""
        return layer not in self._sums or self._sums[layer].is_finite()

    def module(self, layer: int) -> str:
        """Return the name of the module that holds a layer's experts."""
        return self._sums[layer].experts.module

    def routing(self) -> dict[SiteKey, RoutingSums]:
        """Return the sums per expert, on the CPU."""
        return {(layer, EXPERT): sums.routing() for layer, sums in sorted(self._sums.items())}

    def moments(self) -> dict[SiteKey, Moments]:
        """Return the sums of the weighted channels of all experts, over all tokens, on the CPU."""
        return {(layer, EXPERT_CHANNEL): self._sums[layer].moments() for layer in sorted(self._has_channels)}

    def sequences(self) -> dict[SiteKey, SequenceSums]:
        """Return the same over blocks, on the CPU."""
        return {(layer, EXPERT_CHANNEL): self._sums[layer].sequences() for layer in sorted(self._has_channels)}


def _num_units(geometry: Geometry, kind: str, layer: int) -> int:
    return geometry.axes[kind][layer].num_units if kind in geometry.axes else 0


def router_logits(router: Any, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens experts"]:
    """Return what a router's linear map gives the experts for each token, float32 at least."""
    rows = widened(hidden)
    bias = getattr(router, "bias", None)
    with exact_float32():
        logits: Tensor = rows @ router.weight.to(rows.dtype).T
    return logits if bias is None else logits + bias.to(rows.dtype)


def turned(
    stream: Float[Tensor, "tokens hidden"], added: Float[Tensor, "tokens hidden"], scale: float = 1.0
) -> Float[Tensor, " tokens"]:
    """Return per token how far the stream turns by what is added to it, 1 - cosine and at least 0.

    It is computed in float32, for float64 inputs in float64, from the sine, because 1 - cosine would lose the digits of
    a small turn.
    """
    before, more = widened(stream), widened(added) * scale
    along = (more * before).sum(1) / before.square().sum(1).clamp_min(_SHORT)
    sideways = torch.addcmul(more, before, along[:, None], value=-1)
    after = more.add_(before)
    sine = torch.linalg.vector_norm(sideways, dim=1) / torch.linalg.vector_norm(after, dim=1).clamp_min(_SHORT)
    cosine = (1 - sine.clamp_max_(1.0).square()).sqrt()
    return torch.where(along < -1, 1 + cosine, sine.square() / (1 + cosine))


class _LayerSums:
    """Running sums of one layer, float64, on the device of its experts."""

    def __init__(self, experts: RoutedExperts) -> None:
        self.experts = experts
        self.count = 0
        """Real tokens so far."""
        self._sums: Tensor | None = None
        self._extremes: Tensor | None = None
        self._channels: Tensor | None = None
        self._logits: tuple[Tensor, Tensor] | None = None
        self._num_sequences = 0

    def add_pairs(self, pairs: RoutedPairs, real: Bool[Tensor, " tokens"], change: Float[Tensor, " tokens"]) -> None:
        """Add the real tokens of a batch; ``change`` is how far each turns the stream."""
        output, gate = widened(pairs.output), widened(pairs.gate)
        norm = torch.linalg.vector_norm(output, dim=1)
        activation = widened(torch.maximum(pairs.activation.amax(1), -pairs.activation.amin(1)))
        weighted = gate * norm
        sums = torch.stack([torch.ones_like(norm), gate, norm, weighted, weighted * change[pairs.token]]).double()
        extremes = torch.stack([norm, activation]).double()
        here = real[pairs.token]
        expert = pairs.expert
        totals = sums.new_zeros(len(sums), self.experts.num_experts)
        totals.index_add_(1, expert, sums.where(here, 0.0))
        largest = extremes.new_zeros(len(extremes), self.experts.num_experts)
        largest.scatter_reduce_(1, expert.expand_as(extremes), extremes.where(here, 0.0), "amax")
        self._sums = totals if self._sums is None else self._sums + totals
        self._extremes = largest if self._extremes is None else torch.maximum(self._extremes, largest)

    def add_logits(self, logits: Float[Tensor, "tokens experts"]) -> None:
        """Add what the router gives the experts for the real tokens of a batch."""
        rows = logits.double()
        found = rows.sum(0), rows.T @ rows
        have = self._logits
        self._logits = found if have is None else (have[0] + found[0], have[1] + found[1])

    def add_channels(
        self, pairs: RoutedPairs, real: Bool[Tensor, "blocks seq"], counts: Sequence[int], scratch: Scratch
    ) -> None:
        """Add the channels of a batch's real tokens (``counts`` in each block), times the weights of their experts."""
        found = channel_sums(pairs, real, self.experts.num_experts, scratch)
        lengths = found.new_tensor(counts).clamp_min_(1.0)
        in_block = found[1:-1].div(lengths[:, None]).square_().sum(0)
        totals = torch.stack([found[0], found[1:-1].sum(0), found[-1], in_block])
        self._num_sequences += sum(count > 0 for count in counts)
        self._channels = totals if self._channels is None else self._channels + totals

    def is_finite(self) -> bool:
        return self._sums is None or bool(torch.isfinite(self._sums).all())

    def routing(self) -> RoutingSums:
        assert self._sums is not None and self._extremes is not None, "nothing was collected"
        asked = (None, None) if self._logits is None else (part.cpu() for part in self._logits)
        return RoutingSums(self.count, *self._sums.cpu(), *self._extremes.cpu(), *asked)

    def moments(self) -> Moments:
        assert self._channels is not None, "nothing was collected"
        return Moments(self.count, *self._channels[:3].cpu())

    def sequences(self) -> SequenceSums:
        assert self._channels is not None, "nothing was collected"
        return SequenceSums(self._num_sequences, self._channels[3].cpu())


def channel_sums(
    pairs: RoutedPairs, real: Bool[Tensor, "blocks seq"], num_experts: int, scratch: Scratch
) -> Float64[Tensor, "sums channels"]:
    """Return sums over real tokens of x = gate * activation, per channel of each expert in turn.

    Row 0 holds the sum of x, the last row that of x^2, and the rows between them that of |x| in each block.
    """
    num_blocks, seq = real.shape
    gate = widened(pairs.gate).where(real.flatten()[pairs.token], 0.0).to(widened(pairs.activation[:0]).dtype)
    by_block = gate.new_zeros(num_blocks, len(gate))
    by_block.scatter_(0, (pairs.token // seq)[None], gate.abs()[None])
    squared, width = gate.square(), pairs.activation.shape[1]
    sums = gate.new_zeros(num_blocks + 2, num_experts, width)
    with exact_float32():
        for expert, (start, stop) in enumerate(pairwise(pairs.bounds)):
            if start == stop:
                continue
            rows = widened(pairs.activation[start:stop])
            magnitudes = torch.abs(rows, out=scratch.like(rows))
            sums[0, expert] = gate[start:stop] @ rows
            sums[1:-1, expert] = by_block[:, start:stop] @ magnitudes
            sums[-1, expert] = squared[start:stop] @ magnitudes.square_()
    return sums.flatten(1).double()
