"""Scales of experts that stay, fitted to text: what all experts of a layer gave against what those left give.

The model's own code says where a token goes once experts went: the block around the experts is made anew with the
pruned configuration and the router's rows that stay, and what it hands to its experts is heard. So no family's rules
for choosing experts are repeated here. What the experts give is computed with the dense model's own tensors.

Dims: ``tokens`` of a batch; ``chosen`` experts of each token; ``hidden`` residual width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from secateur.calibrate.accumulators import widened
from secateur.calibrate.by_layer import run_pass_by_layer
from secateur.calibrate.one_pass import RealTokens, Taps, run_pass
from secateur.calibrate.precision import exact_float32
from secateur.calibrate.routing import require_plain_experts, run_experts
from secateur.calibrate.taps import tapped
from secateur.families.geometry import Geometry, RoutedExperts
from secateur.pipeline.grams import ModuleReport
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.plan import Plan
from secateur.records.units import EXPERT
from secateur.shrink import shrink_config, shrink_parameters
from secateur.shrink.apply import new_layer_indices
from secateur.shrink.gates import GateFit, GateSums, choose_scales
from secateur.store.checkpoints import meta_model
from secateur.stream.stand_ins import plain_tensors
from secateur.stream.streamed import StreamedModel


def cut_experts(plan: Plan, geometry: Geometry) -> dict[int, RoutedExperts]:
    """Return the experts of the layers that lose some and keep others, by layer."""
    found = {}
    for layer, entry in enumerate(plan.layers.get(EXPERT, ())):
        experts = geometry.experts[layer] if entry.is_narrowed else None
        if experts is not None:
            found[layer] = experts
    return found


class SlicedRouters:
    """Says where tokens go once experts went, by the pruned model's own code.

    Args:
        config: of the dense model.
        plan: made for it.
        geometry: of it.
        dtype: that it computes in.
    """

    def __init__(self, config: Mapping[str, Any], plan: Plan, geometry: Geometry, dtype: torch.dtype) -> None:
        self.experts = cut_experts(plan, geometry)
        """By layer."""
        self._plan = plan
        self._geometry = geometry
        self._indices = new_layer_indices(plan, geometry)
        self._model = meta_model(shrink_config(config, plan, geometry), dtype)
        self._blocks: dict[int, nn.Module] = {}

    def block(self, layer: int) -> str:
        """Return the name of the module of the dense model that holds a layer's router and experts."""
        return self.experts[layer].module.rpartition(".")[0]

    def keep(self, layer: int) -> tuple[int, ...]:
        """Return the experts of a layer that stay."""
        return self._plan.layers[EXPERT][layer].keep

    def has(self, layer: int) -> bool:
        """Return whether a layer was loaded."""
        return layer in self._blocks

    def load(self, layer: int, block: nn.Module) -> None:
        """Take the weights of a layer from the dense model's block, all but those of the experts."""
        name, inside = self.block(layer), self.experts[layer].module + "."
        dense = ((f"{name}.{leaf}", tensor) for leaf, tensor in block.state_dict().items())
        outside = [(leaf, tensor) for leaf, tensor in dense if not leaf.startswith(inside)]
        old, new = (self._geometry.layer_name(at) for at in (layer, self._indices[layer]))
        place = new + name.removeprefix(old)
        sliced = self._model.get_submodule(place)
        with plain_tensors():
            kept = shrink_parameters(outside, self._plan, self._geometry)
            state = {leaf.removeprefix(place + "."): tensor for leaf, tensor in kept}
            sliced.load_state_dict(state, strict=False, assign=True)
        self._blocks[layer] = sliced

    def release(self) -> None:
        """Let go of all weights."""
        for block in self._blocks.values():
            block.to("meta")
        self._blocks.clear()

    def choose(
        self, layer: int, hidden: Float[Tensor, "tokens hidden"]
    ) -> tuple[Int64[Tensor, "tokens chosen"], Float[Tensor, "tokens chosen"]]:
        """Return the experts of each token by their dense numbers, and their weights."""
        leaf = self.experts[layer].module.rpartition(".")[2]
        try:
            with tapped(self._blocks[layer], inputs={}, outputs={}, through={}, instead={leaf: _heard}):
                self._blocks[layer](hidden[None])
        except _Chosen as chosen:
            return torch.tensor(self.keep(layer), device=hidden.device)[chosen.experts], chosen.gates
        raise AssertionError("the block did not ask its experts")


class _Chosen(Exception):
    def __init__(self, experts: Tensor, gates: Tensor) -> None:
        super().__init__()
        self.experts = experts
        self.gates = gates


def _heard(_module: nn.Module, _hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
    raise _Chosen(experts, gates)


def gate_sums(
    routers: SlicedRouters,
    layer: int,
    module: nn.Module,
    hidden: Float[Tensor, "tokens hidden"],
    wanted: Float[Tensor, "tokens hidden"],
    real: Bool[Tensor, " tokens"],
) -> GateSums:
    """Return the sums over a batch's real tokens, on the CPU.

    Args:
        routers: of the pruned model.
        layer: index of a layer that was loaded.
        module: the dense model's experts.
        hidden: what enters them.
        wanted: what the experts that stay are to give together.
        real: False on padding.
    """
    hidden, wanted = hidden[real], widened(wanted[real])
    experts, gates = routers.choose(layer, hidden)
    _, pairs = run_experts(module, hidden, experts, gates)
    order = torch.argsort(pairs.token, stable=True)
    outputs = widened(pairs.output).mul(widened(pairs.gate)[:, None])[order].view(*experts.shape, -1).to(wanted.dtype)
    keep = routers.keep(layer)
    places = torch.zeros(routers.experts[layer].num_experts, dtype=torch.int64, device=hidden.device)
    places[list(keep)] = torch.arange(len(keep), device=hidden.device)
    at = places[pairs.expert[order].view(experts.shape)]
    with exact_float32():
        inner, along = torch.bmm(outputs, outputs.mT), torch.bmm(outputs, wanted[:, :, None])
    products = torch.zeros(len(keep), len(keep), dtype=torch.float64, device=hidden.device)
    pair = at[:, :, None].expand_as(inner), at[:, None].expand_as(inner)
    products.index_put_(pair, inner.double(), accumulate=True)
    sums = products.new_zeros(len(keep)).index_add_(0, at.flatten(), along.flatten().double())
    return GateSums(products.cpu(), sums.cpu(), float(wanted.double().square().sum()))


class GateListener:
    """Adds up what scales are fitted to, in a pass of the dense model.

    Args:
        routers: of the pruned model.
    """

    def __init__(self, routers: SlicedRouters) -> None:
        self.sums = {layer: GateSums.empty(len(routers.keep(layer))) for layer in routers.experts}
        self._routers = routers
        self._tokens: RealTokens | None = None

    def taps(self) -> Taps:
        """Return what to call at the blocks with experts, and what runs in place of the experts' own forward."""
        routers = self._routers
        return Taps(
            instead={experts.module: partial(self._run, layer) for layer, experts in routers.experts.items()},
            modules={routers.block(layer): partial(self._meet, layer) for layer in routers.experts},
        )

    def start_batch(self, tokens: RealTokens) -> None:
        """Note where the real tokens of the next batch are."""
        self._tokens = tokens

    def end_batch(self, batch: BlockBatch) -> None:
        """Do nothing: sums that are not finite are refused when scales are fitted."""

    def end_layer(self) -> None:
        """Let go of the layer's weights."""
        self._routers.release()

    def _meet(self, layer: int, block: nn.Module, _hidden: Tensor) -> None:
        if not self._routers.has(layer):
            require_plain_experts(block.get_submodule(self._leaf(layer)), self._routers.experts[layer].module)
            self._routers.load(layer, block)

    def _leaf(self, layer: int) -> str:
        return self._routers.experts[layer].module.rpartition(".")[2]

    def _run(self, layer: int, module: nn.Module, hidden: Tensor, experts: Tensor, gates: Tensor) -> Tensor:
        assert self._tokens is not None, "no batch was started"
        added, _ = run_experts(module, hidden, experts, gates)
        real = self._tokens.real(hidden.device).flatten()
        self.sums[layer] += gate_sums(self._routers, layer, module, hidden, added, real)
        return added


def fit_on_dense_stream(
    model: Any,
    config: Mapping[str, Any],
    plan: Plan,
    geometry: Geometry,
    fitted: Sequence[TokenBlocks],
    held_out: Sequence[TokenBlocks],
    *,
    dtype: torch.dtype,
    batch_size: int,
    shares: Sequence[float] | None = None,
    progress: Progress = silent,
) -> tuple[dict[int, Tensor], list[ModuleReport]]:
    """Return the scales of the experts that stay, by layer, and how well they fit; layers take no note of each other.

    Args:
        model: the dense model, or one that is run layer by layer.
        config: of it.
        plan: made for it.
        geometry: of it.
        fitted: texts to fit to.
        held_out: texts that choose how far the fit goes.
        dtype: that the model computes in.
        batch_size: blocks per forward pass.
        shares: weight of each text's mean, adding up to 1; None counts every token the same.
        progress: told about finished tokens.

    Raises:
        CheckpointError: the experts are quantised.
        PlanError: what they give is not finite.
    """
    routers = SlicedRouters(config, plan, geometry, dtype)
    run = run_pass_by_layer if isinstance(model, StreamedModel) else run_pass
    totals: list[dict[int, GateSums]] = []
    for split, label in ((fitted, "calibration"), (held_out, "validation")):
        total = {layer: GateSums.empty(len(routers.keep(layer))) for layer in routers.experts}
        for blocks, factor in zip(split, token_factors(split, shares), strict=True):
            listener = GateListener(routers)
            run(
                model,
                blocks,
                geometry,
                [listener],
                batch_size=batch_size,
                progress=progress,
                label=f"fit experts ({label})",
            )
            total = {layer: sums + listener.sums[layer].scaled(factor) for layer, sums in total.items()}
        totals.append(total)
    routers.release()
    fits = {layer: choose_scales(totals[0][layer], totals[1][layer]) for layer in routers.experts}
    reports = [gate_report(routers.experts[layer], fit) for layer, fit in fits.items()]
    return {layer: fit.scales for layer, fit in fits.items() if fit.ridge is not None}, reports


def gate_report(experts: RoutedExperts, fit: GateFit) -> ModuleReport:
    """Return how the scales of a layer's experts were chosen."""
    return ModuleReport(experts.module, fit.ridge, fit.error_before, fit.error_after)


def all_scales(plan: Plan, scales: Mapping[int, Tensor]) -> dict[int, list[float]]:
    """Return the scales of all experts of the layers that have any, those that go included: they count 1."""
    found = {}
    for layer, values in scales.items():
        entry = plan.layers[EXPERT][layer]
        every = [1.0] * entry.num_units
        for expert, value in zip(entry.keep, values.tolist(), strict=True):
            every[expert] = value
        found[layer] = every
    return found


def token_factors(texts: Sequence[TokenBlocks], shares: Sequence[float] | None) -> list[float]:
    """Return the factors that give each text its share of the sums of all of them together."""
    if shares is None:
        return [1.0] * len(texts)
    total = sum(text.num_tokens for text in texts)
    return [share * total / text.num_tokens for text, share in zip(texts, shares, strict=True)]
