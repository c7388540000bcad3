"""Reconstruction on the already pruned stream: layer after layer, attention before FFN, each seeing what is left.

Every projection that ends a sub-layer is fitted, from the first cut on, also where it loses no channel itself. What is
wanted of it is what its dense weight makes of the inputs that it now receives, plus half of what the residual stream
has lost by then against the dense model's. So later layers repair part of what earlier ones lost.

Source: the sequential form is that of OSSCAR (arXiv 2403.12983) and Tyr-the-Pruner (arXiv 2503.09657); formula and
choice of the ridge are those of ``shrink.reconstruct``. Where we differ: the target. Asking for the dense model's
output of the projection, given pruned inputs (OSSCAR), came out worse than not looking at the pruned stream at all,
because what the inputs cannot predict makes the fit shrink. In families with a norm after the sub-layer the stream is
out of a linear map's reach, and only the inputs are the pruned ones.

Routed experts of a layer that loses some have no such projection. Of them only the scales are fitted, towards the same
target: what all of them make of the inputs, plus half of what the stream has lost.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.calibrate.routing import require_plain_experts, run_experts
from secateur.errors import PlanError
from secateur.families.geometry import Geometry, UnitAxis
from secateur.families.schema import SubLayer
from secateur.pipeline.gates import SlicedRouters, cut_experts, gate_report, gate_sums, token_factors
from secateur.pipeline.grams import ModuleReport
from secateur.progress import Progress, silent
from secateur.records.blocks import TokenBlocks
from secateur.records.plan import Plan
from secateur.records.units import ATTENTION, AXIS_OF, EXPERT, FFN, MOE_UNIT_KINDS, SUBLAYER_OF
from secateur.shrink import kept_channels
from secateur.shrink.gates import GateSums, choose_scales
from secateur.shrink.reconstruct import choose_reconstruction, reconstruct
from secateur.shrink.slicing import fold_constants
from secateur.store.removed import remove_sublayers
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import LayerStream, reader_input, reader_inputs, reader_names, run_layer
from secateur.stream.sources import LayerSource
from secateur.stream.spill import SpilledTensors
from secateur.stream.stand_ins import plain_tensors

RESIDUAL_SHARE = 0.5
"""Part of what the residual stream has lost that a projection is asked to give back. All of it asks for more than the
pruned inputs can predict; none of it leaves the losses of earlier layers where they are."""


@dataclass(slots=True)
class _Sums:
    """Sums over one text at one projection: x xT of the inputs that stay, t xT with what is wanted, and t squared."""

    gram: Tensor
    target: Tensor
    power: float

    @classmethod
    def empty(cls, out: int, channels: int, device: torch.device) -> _Sums:
        new = partial(torch.zeros, device=device)
        return cls(new(channels, channels), new(out, channels), 0.0)

    def add(self, inputs: Tensor, wanted: Tensor) -> None:
        inputs, wanted = inputs.float(), wanted.float()
        self.gram.addmm_(inputs.T, inputs)
        self.target.addmm_(wanted.T, inputs)
        self.power += float(wanted.double().square().sum())

    def scaled(self, factor: float) -> _Sums:
        return self if factor == 1.0 else _Sums(self.gram * factor, self.target * factor, self.power * factor)


@dataclass(slots=True)
class _Text:
    """One text on its way through the model.

    Attributes:
        stream: its batches.
        dense: what enters the layer in the dense model.
        middle: what the dense model's stream holds after attention.
        after: what leaves the layer in the dense model.
        pruned: what enters the layer in the pruned model.
        scale: its weight in sums.
    """

    stream: LayerStream
    dense: HiddenStates
    middle: HiddenStates
    after: HiddenStates
    pruned: HiddenStates
    scale: float

    def run_dense(self, module: nn.Module, layer: int, attention: str | None) -> None:
        """Put the dense stream through a layer; ``attention`` is the projection that ends the attention sub-layer."""
        names = [attention] if attention else []
        for index, (_, call) in enumerate(self.stream.calls(layer)):
            output, inputs = reader_inputs(module, self.dense[index], call, names)
            _store(self.after, index, output)
            with plain_tensors():
                added = module.get_submodule(attention)(inputs[attention]) if attention else 0.0
            _store(self.middle, index, self.dense[index] + added)

    def sums(
        self,
        twin: nn.Module,
        layer: int,
        name: str,
        weight: Tensor,
        keep: Sequence[int],
        *,
        attention: bool,
        share: float,
    ) -> _Sums:
        """Return the sums at a projection of the pruned layer, whose weight is still ``weight`` there."""
        kept = torch.tensor(list(keep), device=weight.device)
        total = _Sums.empty(len(weight), len(kept), weight.device)
        for index, (batch, call) in enumerate(self.stream.calls(layer)):
            if attention:  # what comes after attention is not needed
                found = reader_input(twin, self.pruned[index], call, name)
            else:
                output, seen = reader_inputs(twin, self.pruned[index], call, [name])
                found = seen[name]
            real = batch.valid.to(found.device)
            inputs = found.reshape(*real.shape, -1)  # some families flatten batches before their FFN
            with plain_tensors():
                if attention:
                    output = self.pruned[index] + twin.get_submodule(name)(inputs)
                lost = (self.middle if attention else self.after)[index] - output
                wanted = inputs[real] @ weight.to(inputs).T + share * lost[real]
                total.add(inputs[real].index_select(1, kept), wanted)
        return total.scaled(self.scale)

    def advance(self, twin: nn.Module, layer: int) -> None:
        with torch.no_grad():
            for index, (_, call) in enumerate(self.stream.calls(layer)):
                self.dense[index] = self.after[index]
                self.pruned[index] = run_layer(twin, self.pruned[index], call)


def _store(states: HiddenStates, index: int, value: Tensor) -> None:
    if index < len(states):
        states[index] = value
    else:
        states.append(value)


@dataclass(frozen=True, slots=True)
class FittedWeights:
    """Weights of the projections, as ``shrink_parameters`` asks for them.

    Attributes:
        weights: of those that lost channels, by module, out x kept.
        refitted: of those that lost none but make up for others, by module, out x channels.
        reports: one entry per projection, and one for the experts of a layer that loses some, in the order of fitting;
            errors are relative to what was wanted.
        scales: by layer, of the routed experts that stay; layers whose experts stay as they are have none.
    """

    weights: MutableMapping[str, Tensor]
    refitted: MutableMapping[str, Tensor]
    reports: list[ModuleReport]
    scales: MutableMapping[int, Tensor] = field(default_factory=dict)

    def __call__(self, axis: UnitAxis, keep: Sequence[int], weight: Tensor) -> Tensor:
        """Return the fitted weight of an axis's reader."""
        return self.weights[axis.reader].to(weight)


def fit_on_pruned_stream(
    source: LayerSource,
    plan: Plan,
    fitted: Sequence[TokenBlocks],
    held_out: Sequence[TokenBlocks],
    *,
    batch_size: int,
    shares: Sequence[float] | None = None,
    config: Mapping[str, Any] | None = None,
    folder: Path | None = None,
    progress: Progress = silent,
) -> FittedWeights:
    """Return the weights of every projection that loses channels, fitted layer after layer.

    Args:
        source: the dense model's layers; it is not changed.
        plan: made for this model.
        fitted: texts to fit to.
        held_out: texts that choose the ridge.
        batch_size: blocks per forward pass.
        shares: weight of each text's mean, adding up to 1, in the order of the texts and the same for both splits;
            None counts every token the same.
        config: of the dense model; needed only where experts are cut.
        folder: where hidden states and fitted weights lie as files as long as they are needed; None keeps them in
            memory.
        progress: told about finished layers.

    Raises:
        ExportError: the disk is full.
        PlanError: too little text for so many channels, or the plan cuts channels of experts.
    """
    geometry = source.geometry
    _require_dense_cuts(plan)
    routers: SlicedRouters | None = None
    if cut_experts(plan, geometry):
        assert config is not None, "the pruned model's routers are made from the configuration"
        routers = SlicedRouters(config, plan, geometry, source.model.dtype)
    found = (
        FittedWeights({}, {}, [])
        if folder is None
        else FittedWeights(SpilledTensors(folder), SpilledTensors(folder), [])
    )
    with ExitStack() as stack:
        texts = [
            _start(stack, LayerStream(source, blocks, batch_size), scale, folder)
            for split in (fitted, held_out)
            for blocks, scale in zip(split, token_factors(split, shares), strict=True)
        ]
        task = stack.enter_context(progress("reconstruct on the pruned stream", geometry.num_layers, "layers"))
        for layer in range(geometry.num_layers):
            with source.layer(layer) as module:
                readers = _readers(geometry, layer)
                for text in texts:
                    text.run_dense(module, layer, readers.get(ATTENTION))
                twin: nn.Module = copy.deepcopy(module)
                removed = _removed(plan, layer)
                remove_sublayers(twin, geometry.family, removed)
                for sublayer, name in readers.items():
                    if sublayer not in removed:
                        _fit_reader(found, plan, geometry, layer, sublayer, name, twin, texts, len(fitted))
                if routers is not None and layer in routers.experts:
                    _fit_experts(found, routers, geometry, layer, twin, texts, len(fitted))
                for text in texts:
                    text.advance(twin, layer)
                if routers is not None:
                    routers.release()
                del twin  # before the next layer and its twin are made
            task.advance(1)
    return found


def _fit_experts(
    found: FittedWeights,
    routers: SlicedRouters,
    geometry: Geometry,
    layer: int,
    twin: nn.Module,
    texts: Sequence[_Text],
    num_fitted: int,
) -> None:
    """Fit the scales of the experts that stay; from then on the twin has no others."""
    experts, prefix = routers.experts[layer], geometry.layer_name(layer) + "."
    module: Any = twin.get_submodule(experts.module.removeprefix(prefix))
    require_plain_experts(module, experts.module)
    routers.load(layer, twin.get_submodule(routers.block(layer).removeprefix(prefix)))
    share = RESIDUAL_SHARE if _adds_to_stream(geometry, FFN) else 0.0
    sums = [_expert_sums(text, twin, layer, module, routers, share) for text in texts]
    nothing = GateSums.empty(len(routers.keep(layer)))
    fit = choose_scales(sum(sums[:num_fitted], nothing), sum(sums[num_fitted:], nothing))
    found.reports.append(gate_report(experts, fit))
    if fit.ridge is not None:
        found.scales[layer] = fit.scales
    every = torch.ones(experts.num_experts, dtype=torch.float64)
    every[list(routers.keep(layer))] = fit.scales

    def forward(hidden: Tensor, _experts: Tensor, gates: Tensor) -> Tensor:
        chosen, weights = routers.choose(layer, hidden)
        added, _ = run_experts(module, hidden, chosen, weights * every.to(weights)[chosen])
        return added

    module.forward = forward


def _expert_sums(
    text: _Text, twin: nn.Module, layer: int, module: Any, routers: SlicedRouters, share: float
) -> GateSums:
    """Return the sums at the experts of the pruned layer, which still has all of them."""
    total = GateSums.empty(len(routers.keep(layer)))
    scale = float(getattr(twin, "residual_multiplier", 1.0))  # of what a sub-layer gives, in some families
    heard: list[tuple[Tensor, Tensor]] = []

    def note(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        heard.append((args[0], output))

    handle = module.register_forward_hook(note)
    try:
        for index, (batch, call) in enumerate(text.stream.calls(layer)):
            with plain_tensors():
                output = run_layer(twin, text.pruned[index], call)
                hidden, added = heard.pop()
                lost = (text.after[index] - output).reshape(added.shape)
                real = batch.valid.to(added.device).flatten()
                total += gate_sums(routers, layer, module, hidden, added + share / scale * lost, real)
    finally:
        handle.remove()
    return total.scaled(text.scale)


def _fit_reader(
    found: FittedWeights,
    plan: Plan,
    geometry: Geometry,
    layer: int,
    sublayer: str,
    name: str,
    twin: nn.Module,
    texts: Sequence[_Text],
    num_fitted: int,
) -> None:
    """Fit the projection that ends a sub-layer, in the twin too; nothing is done as long as nothing was lost."""
    kinds = [kind for kind in _in_order(plan, layer) if SUBLAYER_OF[kind] == sublayer]
    if not kinds and not _lost_before(plan, layer, sublayer):
        return
    axis = geometry.axes[kinds[0] if kinds else AXIS_OF[sublayer]][layer]
    reader = twin.get_submodule(name)
    weight = _matrix(reader, geometry)
    keep = list(range(weight.shape[1]))
    if kinds:
        units = plan.layers[kinds[0]][layer]
        keep = kept_channels(axis, units.keep)
        _fold(reader, geometry, weight, units.constants)
    share = RESIDUAL_SHARE if _adds_to_stream(geometry, sublayer) else 0.0
    sums = [text.sums(twin, layer, name, weight, keep, attention=sublayer == ATTENTION, share=share) for text in texts]
    chosen, report = _fit(axis, weight[:, keep], sums[:num_fitted], sums[num_fitted:])
    (found.weights if kinds else found.refitted)[axis.reader] = chosen
    found.reports.append(report)
    _put(reader, geometry, keep, chosen)


def _require_dense_cuts(plan: Plan) -> None:
    inside = [kind for kind in MOE_UNIT_KINDS if kind in plan.layers and kind != EXPERT]
    if inside:
        raise PlanError(
            f"reconstruction fits projections that every token goes through alike, and the plan cuts {inside[0]}s, "
            "whose share in the output is another for each token. Leave reconstruct out."
        )


def _readers(geometry: Geometry, layer: int) -> dict[str, str]:
    """Return the projections that end the sub-layers of a layer, by sub-layer, by their names inside it.

    An FFN of experts has none.
    """
    names = reader_names(geometry, layer)
    there = {sublayer: AXIS_OF[sublayer] for sublayer in (ATTENTION, FFN)}
    return {sublayer: names[kind] for sublayer, kind in there.items() if geometry.axes[kind][layer].num_units}


def _lost_before(plan: Plan, layer: int, sublayer: str) -> bool:
    """Return whether anything that runs before a sub-layer was cut."""
    return any(
        per_layer[at].num_removed
        for kind, per_layer in plan.layers.items()
        for at in range(layer + 1)
        if at < layer or (sublayer == FFN and SUBLAYER_OF[kind] == ATTENTION)
    )


def _adds_to_stream(geometry: Geometry, sublayer: str) -> bool:
    """Return whether a projection's output goes into the residual stream as it is, without a norm after it."""
    branch: SubLayer = getattr(geometry.family.blocks, sublayer)
    return len(branch.norms) <= 1


def _start(stack: ExitStack, stream: LayerStream, scale: float, folder: Path | None) -> _Text:
    dense, middle, after, pruned = (stack.enter_context(HiddenStates(folder)) for _ in range(4))
    text = _Text(stream, dense, middle, after, pruned, scale)
    stream.start(text.dense)
    stream.start(text.pruned)
    return text


def _in_order(plan: Plan, layer: int) -> list[str]:
    """Return the kinds that lose units in a layer, attention before FFN."""
    kinds = [kind for kind, layers in plan.layers.items() if layers[layer].is_narrowed]
    return sorted(kinds, key=lambda kind: SUBLAYER_OF[kind] != ATTENTION)


def _removed(plan: Plan, layer: int) -> list[str]:
    """Return the sub-layers that go whole; without both, a layer passes on what enters it."""
    return sorted({SUBLAYER_OF[kind] for kind, layers in plan.layers.items() if layers[layer].is_removed})


def _total(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(*(sum(getattr(part, name) for part in sums) for name in ("gram", "target", "power")))


def _fit(
    axis: UnitAxis, weight: Tensor, fitted: Sequence[_Sums], held_out: Sequence[_Sums]
) -> tuple[Tensor, ModuleReport]:
    """Return the weight fitted to sums over the channels that stay, which are all that ``weight`` has."""
    kept, fit, judge = torch.arange(weight.shape[1]), _total(fitted), _total(held_out)
    chosen = choose_reconstruction(
        weight,
        fit.gram,
        judge.gram,
        kept,
        target=fit.target,
        held_out_target=judge.target,
        held_out_power=judge.power,
    )
    report = ModuleReport(axis.reader, chosen.ridge, chosen.error_before, chosen.error_after)
    if chosen.ridge is None:
        return chosen.kept_weight, report
    both = _total([fit, judge])
    return reconstruct(weight, both.gram, kept, ridge=chosen.ridge, target=both.target), report


def _matrix(reader: Any, geometry: Geometry) -> Tensor:
    """Return a copy of a projection's weight as out x channels."""
    weight: Tensor = reader.weight.detach()
    return (weight if geometry.family.weight_layout == "out_in" else weight.T).clone()


def _fold(reader: Any, geometry: Geometry, weight: Tensor, constants: Sequence[tuple[int, float]]) -> None:
    """Move what removed constant channels add into the twin's bias, and out of the weight that is to be matched."""
    if constants:
        channels = [channel for channel, _ in constants]
        with torch.no_grad():
            reader.bias.copy_(fold_constants(reader.bias, weight[:, channels], [value for _, value in constants]))
        weight[:, channels] = 0.0
        _put(reader, geometry, range(weight.shape[1]), weight)


def _put(reader: Any, geometry: Geometry, keep: Sequence[int], kept_weight: Tensor) -> None:
    """Write a fitted weight into the full-size twin; columns of channels that went become zero."""
    with torch.no_grad():
        target = reader.weight if geometry.family.weight_layout == "out_in" else reader.weight.T
        target.zero_()
        target[:, list(keep)] = kept_weight.to(target)
