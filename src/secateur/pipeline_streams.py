"""Reconstruction on the already pruned stream: layer after layer, attention before FFN, each seeing what is left.

Every projection that loses channels is fitted so that, given what the pruned layers before it now produce, its output
comes as near as it can to that of the dense model. So later layers repair part of what earlier ones lost.

Source: the sequential form of OSSCAR (arXiv 2403.12983) and Tyr-the-Pruner (arXiv 2503.09657); formula and choice of
the ridge are those of ``shrink.reconstruct``.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families.geometry import Geometry, UnitAxis
from secateur.pipeline_grams import ModuleReport
from secateur.progress import Progress, silent
from secateur.records.blocks import TokenBlocks
from secateur.records.plan import Plan
from secateur.records.units import GQA_GROUP
from secateur.shrink import kept_channels
from secateur.shrink.reconstruct import choose_reconstruction, reconstruct
from secateur.shrink.slicing import fold_constants
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import LayerStream, reader_inputs, reader_names, run_layer
from secateur.stream.sources import LayerSource


@dataclass(slots=True)
class _Sums:
    """Sums over one text at one projection: pruned inputs with themselves, with the dense ones, and those alone."""

    gram: Tensor
    cross: Tensor
    dense: Tensor

    @classmethod
    def empty(cls, channels: int, device: torch.device) -> _Sums:
        return cls(*(torch.zeros(channels, channels, device=device) for _ in range(3)))

    def add(self, pruned: Tensor, dense: Tensor) -> None:
        pruned, dense = pruned.float(), dense.float()
        self.gram.addmm_(pruned.T, pruned)
        self.cross.addmm_(pruned.T, dense)
        self.dense.addmm_(dense.T, dense)


@dataclass(slots=True)
class _Text:
    """One text on its way through the model: its batches, and where the dense and the pruned stream stand."""

    stream: LayerStream
    dense: HiddenStates
    pruned: HiddenStates

    def sums(self, module: nn.Module, twin: nn.Module, layer: int, name: str, channels: int) -> _Sums:
        total: _Sums | None = None
        for index, (batch, call) in enumerate(self.stream.calls(layer)):
            _, wanted = reader_inputs(module, self.dense[index], call, [name])
            _, got = reader_inputs(twin, self.pruned[index], call, [name])
            total = total or _Sums.empty(channels, got[name].device)
            real = batch.valid.to(got[name].device)
            total.add(got[name][real], wanted[name][real])
        assert total is not None, "a text has at least one batch"
        return total

    def advance(self, module: nn.Module, twin: nn.Module, layer: int) -> None:
        with torch.no_grad():
            for index, (_, call) in enumerate(self.stream.calls(layer)):
                self.dense[index] = run_layer(module, self.dense[index], call)
                self.pruned[index] = run_layer(twin, self.pruned[index], call)


@dataclass(frozen=True, slots=True)
class FittedWeights:
    """Weights of the projections that lost channels, as ``shrink_parameters`` asks for them.

    Attributes:
        weights: by module, out x kept.
        reports: one entry per projection, in the order of fitting; errors are of the output of the dense model.
    """

    weights: Mapping[str, Tensor]
    reports: Sequence[ModuleReport]

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
    progress: Progress = silent,
) -> FittedWeights:
    """Return the weights of every projection that loses channels, fitted layer after layer.

    Args:
        source: the dense model's layers; it is not changed.
        plan: made for this model.
        fitted: texts to fit to.
        held_out: texts that choose the ridge.
        batch_size: blocks per forward pass.
        progress: told about finished layers.

    Raises:
        PlanError: too little text for so many channels.
    """
    geometry = source.geometry
    weights: dict[str, Tensor] = {}
    reports: list[ModuleReport] = []
    with ExitStack() as stack:
        texts = [_start(stack, LayerStream(source, blocks, batch_size)) for blocks in (*fitted, *held_out)]
        task = stack.enter_context(progress("reconstruct on the pruned stream", geometry.num_layers, "layers"))
        for layer in range(geometry.num_layers):
            with source.layer(layer) as module:
                twin: nn.Module = copy.deepcopy(module)
                for kind in _in_order(plan, layer):
                    axis, units = geometry.axes[kind][layer], plan.layers[kind][layer]
                    name = reader_names(geometry, layer)[kind]
                    channels = axis.num_units * axis.reader_width
                    sums = [text.sums(module, twin, layer, name, channels) for text in texts]
                    keep = kept_channels(axis, units.keep)
                    reader = twin.get_submodule(name)
                    weight = _matrix(reader, geometry)
                    _fold(reader, weight, units.constants)
                    chosen, report = _fit(axis, weight, keep, sums[: len(fitted)], sums[len(fitted) :])
                    weights[axis.reader] = chosen
                    reports.append(report)
                    _put(reader, geometry, keep, chosen)
                for text in texts:
                    text.advance(module, twin, layer)
            task.advance(1)
    return FittedWeights(weights, reports)


def _start(stack: ExitStack, stream: LayerStream) -> _Text:
    text = _Text(stream, stack.enter_context(HiddenStates()), stack.enter_context(HiddenStates()))
    stream.start(text.dense)
    stream.start(text.pruned)
    return text


def _in_order(plan: Plan, layer: int) -> list[str]:
    """Return the kinds that lose units in a layer, attention before FFN."""
    kinds = [kind for kind, layers in plan.layers.items() if layers[layer].num_removed]
    return sorted(kinds, key=lambda kind: kind != GQA_GROUP)


def _total(sums: Sequence[_Sums]) -> _Sums:
    return _Sums(*(sum(getattr(part, name) for part in sums) for name in ("gram", "cross", "dense")))


def _fit(
    axis: UnitAxis, weight: Tensor, keep: Sequence[int], fitted: Sequence[_Sums], held_out: Sequence[_Sums]
) -> tuple[Tensor, ModuleReport]:
    kept, fit, judge = torch.tensor(list(keep)), _total(fitted), _total(held_out)
    chosen = choose_reconstruction(
        weight,
        fit.gram,
        judge.gram,
        kept,
        cross=fit.cross,
        held_out_cross=judge.cross,
        held_out_dense=judge.dense,
    )
    report = ModuleReport(axis.reader, chosen.ridge, chosen.error_before, chosen.error_after)
    if chosen.ridge is None:
        return chosen.kept_weight, report
    both = _total([fit, judge])
    return reconstruct(weight, both.gram, kept, ridge=chosen.ridge, cross=both.cross), report


def _matrix(reader: Any, geometry: Geometry) -> Tensor:
    """Return a copy of a projection's weight as out x channels."""
    weight: Tensor = reader.weight.detach()
    return (weight if geometry.family.weight_layout == "out_in" else weight.T).clone()


def _fold(reader: Any, weight: Tensor, constants: Sequence[tuple[int, float]]) -> None:
    """Move what removed constant channels add into the twin's bias, and out of the weight that is to be matched."""
    if constants:
        channels = [channel for channel, _ in constants]
        with torch.no_grad():
            reader.bias.copy_(fold_constants(reader.bias, weight[:, channels], [value for _, value in constants]))
        weight[:, channels] = 0.0


def _put(reader: Any, geometry: Geometry, keep: Sequence[int], kept_weight: Tensor) -> None:
    """Write a fitted weight into the full-size twin; columns of channels that went become zero."""
    with torch.no_grad():
        target = reader.weight if geometry.family.weight_layout == "out_in" else reader.weight.T
        target.zero_()
        target[:, list(keep)] = kept_weight.to(target)
