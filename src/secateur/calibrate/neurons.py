"""How much single documents need single rows and columns of weight matrices: the neurons of Cus-Prun as published.

A neuron is one row of a matrix that writes channels (gate, up, query, key, value) or one column of one that reads them
(down, output). Its impact on a document is how far the output of its sub-layer moves, ||without - with||_2 over tokens
and hidden channels, when that row (with its bias) or column alone is zero. For comparison only: what can be cut is
units, which ``impacts`` judges; no stock model loses a row of one matrix.

With x what the reading projection W receives, in token t:

- a column of ``down`` or ``output``: the output moves by -x_j w_j, so the impact is sqrt(sum_t x_tj^2) ||w_j||;
- a row of ``up``, or of ``gate`` where act(0) = 0 as for SiLU, GELU and ReLU: the same x_j becomes 0, so these have the
  impact of the column of ``down`` that they feed;
- a row of ``value``: the x of its channel become 0 in all r query heads of its group, and the impact is
  sqrt(sum_t x_tT WT W x_t) over those r columns, their cross terms included;
- a row of ``query`` or ``key``: attention is run again without it. Query heads do not meet before W, and neither do
  groups, so one run without channel i of every head gives the impact of as many neurons as there are heads.

All of it is exact, whatever the model does to queries and keys (rotation, norms, caps): there is no expansion of the
softmax. An FFN without a norm after it is the last thing in its layer, so its impacts are those on the layer's output;
attention's are those on the attention block's, before any norm after it.

Source: Zhao et al. 2025, Cus-Prun, arXiv 2506.02561, for the definition.

Dims: ``seq`` tokens of a block, ``channels`` inputs of the reading projection, ``neurons`` of one matrix in one layer,
``groups`` of ``q`` query heads and one key/value head each, ``dim`` channels of a head.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.calibrate.one_pass import RealTokens, not_finite
from secateur.calibrate.precision import exact_float32
from secateur.errors import FamilyError
from secateur.families.geometry import Geometry, Segment, UnitAxis
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.impacts import ImpactStatistics, judged
from secateur.records.units import SiteKey
from secateur.stream.forward import run_backbone

_TOGETHER = 16
"""Channels of every head that attention is run again without at a time."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Rows or columns of one matrix that are neurons.

    Attributes:
        site: layer and name of the impacts that say how much its neurons are needed.
        segment: where its rows or columns are; ``segment.width`` is not used.
        neurons: how many there are.
    """

    site: SiteKey
    segment: Segment
    neurons: int


@dataclass(frozen=True, slots=True)
class _Attention:
    """One layer's attention, by its matrices."""

    layer: int
    query: Segment
    key: Segment
    value: Segment
    output: Segment
    groups: int

    @property
    def module(self) -> str:
        return self.output.module.rpartition(".")[0]

    @property
    def dim(self) -> int:
        return self.key.width

    @property
    def heads(self) -> int:
        return self.groups * self.query.width // self.dim


def _attention(geometry: Geometry, axis: UnitAxis) -> _Attention:
    """Return a layer's attention.

    Raises:
        FamilyError: queries, keys and values are not rows of their own.
    """
    written = [segment for segment in axis.segments if segment.side == "out"]
    read = [segment for segment in axis.segments if segment.side == "in"]
    if len(written) != 3 or len(read) != 1 or written[1].width != written[2].width:
        raise FamilyError(
            f"neurons of queries, keys and values cannot be told apart in {geometry.family.name} models, whose layers "
            f"declare {len(written)} matrices for them. Use a family with separate ones, such as llama."
        )
    query, key, value = written
    return _Attention(axis.layer, query, key, value, read[0], axis.num_units)


def _there(geometry: Geometry, kind: str) -> list[UnitAxis]:
    """Return the axes of a kind in the layers that have it.

    Raises:
        FamilyError: no layer has it, or some have experts beside it.
    """
    found = [axis for axis in geometry.axes.get(kind, ()) if axis.num_units]
    if not found or any(axis.num_units for axis in geometry.axes.get("expert", ())):
        raise FamilyError(
            f"neurons are rows and columns of a layer's attention and its one FFN, and this {geometry.family.name} "
            "model is built otherwise. Use a dense model, such as a llama."
        )
    return found


def matrices(geometry: Geometry) -> list[Matrix]:
    """Return the matrices whose rows or columns are neurons, in the order of the layers.

    Raises:
        FamilyError: queries, keys and values are not rows of their own, or there are experts.
    """
    found = []
    for axis in _there(geometry, "ffn_channel"):
        found += [Matrix((axis.layer, "ffn"), segment, axis.num_units) for segment in axis.segments]
    for axis in _there(geometry, "gqa_group"):
        attention = _attention(geometry, axis)
        found += [
            Matrix((axis.layer, name), segment, axis.num_units * segment.width)
            for name, segment in (
                ("query", attention.query),
                ("key", attention.key),
                ("value", attention.value),
                ("output", attention.output),
            )
        ]
    return sorted(found, key=lambda matrix: matrix.site[0])


def collect_neuron_impacts(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    *,
    progress: Progress = silent,
    label: str = "impact of neurons",
) -> ImpactStatistics:
    """Return what every document says of the neurons of every layer, by sites (layer, name of the matrix).

    Rows of gate and up and columns of down share the site ``ffn``, because their impacts are the same. Every
    attention is run once per channel of a head for queries, and once for keys: on a model of 135 million parameters in
    blocks of 256 tokens 24 times a plain pass, growing with the square of the block. One number per neuron and document
    is held until the end.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        blocks: packed text.
        geometry: of this model.
        progress: told about finished tokens.
        label: name of the work for ``progress``.

    Raises:
        CheckpointError: activations are not finite; the place is named.
        FamilyError: queries, keys and values are not rows of their own, or there are experts.
    """
    attentions = [_attention(geometry, axis) for axis in _there(geometry, "gqa_group")]
    readers = {axis.layer: axis.reader for axis in _there(geometry, "ffn_channel")}
    found: defaultdict[SiteKey, dict[int, Tensor]] = defaultdict(dict)
    model.eval()
    with torch.inference_mode(), exact_float32(), progress(label, blocks.num_tokens, "tokens") as task:
        for batch in blocks.batches(1):
            tokens = RealTokens(batch.valid, batch.document)
            for site, energies in _energies(model, batch, geometry, attentions, readers):
                if not bool(torch.isfinite(energies).all()):
                    raise not_finite(f"{site[1]} neurons of layer {site[0]}")
                for document, rows in tokens.by_document(energies):
                    known = found[site].get(document)
                    total = rows.double().sum(0)
                    found[site][document] = total if known is None else known + total
            task.advance(batch.num_tokens)
    units = {site: judged(torch.stack(list(by.values())).sqrt().cpu()) for site, by in sorted(found.items())}
    return ImpactStatistics(max((len(by) for by in found.values()), default=0), units)


def _energies(
    model: Any,
    batch: BlockBatch,
    geometry: Geometry,
    attentions: list[_Attention],
    readers: Mapping[int, str],
) -> Iterator[tuple[SiteKey, Float[Tensor, "seq neurons"]]]:
    """Yield per site the squared change of the sub-layer's output in every token, without each neuron."""
    with _heard(model, attentions, readers) as heard:
        run_backbone(model, batch, geometry.family)
    for layer, reader in readers.items():
        weight = _weight(model, geometry, reader)
        yield (layer, "ffn"), heard.inputs[reader][0].square() * weight.square().sum(0)
    for attention in attentions:
        weight = _weight(model, geometry, attention.output.module)
        inputs = heard.inputs[attention.output.module][0]
        yield (attention.layer, "output"), inputs.square() * weight.square().sum(0)
        yield (attention.layer, "value"), _value_energies(attention, inputs, weight)
        again = _Again(model.get_submodule(attention.module), attention, heard, weight.shape[0])
        for name, segment, joined in (
            ("query", attention.query, attention.heads),
            ("key", attention.key, attention.groups),
        ):
            yield (attention.layer, name), _rerun_energies(again, segment, joined, inputs, weight)


def _weight(model: Any, geometry: Geometry, module: str) -> Float[Tensor, "hidden channels"]:
    weight: Tensor = model.get_submodule(module).weight.detach()
    weight = weight if geometry.family.weight_layout == "out_in" else weight.T
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _value_energies(
    attention: _Attention, inputs: Float[Tensor, "seq channels"], weight: Float[Tensor, "hidden channels"]
) -> Float[Tensor, "seq neurons"]:
    split = (-1, attention.groups, attention.heads // attention.groups, attention.dim)
    columns, rows = weight.reshape(split), inputs.to(weight).reshape(split)
    products = torch.einsum("hgqc,hgpc->gcqp", columns, columns)
    energies = torch.einsum("sgqc,gcqp,sgpc->sgc", rows, products, rows)
    return energies.clamp_min(0.0).flatten(1)


def _rerun_energies(
    again: _Again,
    segment: Segment,
    joined: int,
    inputs: Float[Tensor, "seq channels"],
    weight: Float[Tensor, "hidden channels"],
) -> Float[Tensor, "seq neurons"]:
    """Return the energies of the rows of queries or keys.

    Args:
        again: runs the attention again.
        segment: the rows.
        joined: parts that do not meet before the output projection, each with its own rows: heads, or groups.
        inputs: of the output projection, with all rows there.
        weight: of the output projection.
    """
    columns = weight.reshape(len(weight), joined, -1)
    products = torch.einsum("hjc,hje->jce", columns, columns)
    found = []
    for first in range(0, again.attention.dim, _TOGETHER):
        channels = list(range(again.attention.dim))[first : first + _TOGETHER]
        moved = (again.without(segment, channels, joined) - inputs).to(weight)
        change = moved.reshape(*moved.shape[:2], joined, -1)
        found.append((torch.einsum("bsjc,jce->bsje", change, products) * change).sum(-1))
    return torch.cat(found).permute(1, 2, 0).clamp_min(0.0).flatten(1)


class _Heard:
    """What one pass leaves behind: inputs of reading projections, outputs and calls of attention's parts."""

    def __init__(self) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}


@contextmanager
def _heard(model: Any, attentions: list[_Attention], readers: Mapping[int, str]) -> Iterator[_Heard]:
    """Note what passes through the modules while the context lasts."""
    heard, handles = _Heard(), []

    def keep_input(name: str) -> Any:
        return lambda _module, args: heard.inputs.__setitem__(name, args[0])

    def keep_output(name: str) -> Any:
        return lambda _module, _args, output: heard.outputs.__setitem__(name, output)

    def keep_call(name: str) -> Any:
        return lambda _module, args, kwargs: heard.calls.__setitem__(name, (args, kwargs))

    try:
        for name in (*readers.values(), *(attention.output.module for attention in attentions)):
            handles.append(model.get_submodule(name).register_forward_pre_hook(keep_input(name)))
        for attention in attentions:
            for name in {attention.query.module, attention.key.module, attention.value.module}:
                handles.append(model.get_submodule(name).register_forward_hook(keep_output(name)))
            module = model.get_submodule(attention.module)
            handles.append(module.register_forward_pre_hook(keep_call(attention.module), with_kwargs=True))
        yield heard
    finally:
        for handle in handles:
            handle.remove()


class _Given(nn.Module):
    """Stands in for a projection: returns what it was given."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.values = values

    def forward(self, _hidden: Tensor) -> Tensor:
        return self.values


class _Taken(nn.Module):
    """Stands in for the output projection: keeps what it receives."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.values = torch.empty(0)

    def forward(self, values: Tensor) -> Tensor:
        self.values = values
        return values.new_zeros(*values.shape[:-1], self.hidden)


@dataclass(frozen=True, slots=True)
class _Again:
    """Runs one attention again as it was called, with other outputs of its projections.

    Attributes:
        module: the attention.
        attention: its matrices.
        heard: its call, and what its projections gave.
        hidden: width of what it returns.
    """

    module: nn.Module
    attention: _Attention
    heard: _Heard
    hidden: int

    def without(self, segment: Segment, channels: list[int], parts: int) -> Float[Tensor, "runs seq channels"]:
        """Return what the output projection receives, one run for each channel that is zero in every part."""
        names = {self.attention.query.module, self.attention.key.module, self.attention.value.module}
        given = {name: self.heard.outputs[name].expand(len(channels), -1, -1) for name in names}
        silenced = given[segment.module].clone()
        starts = segment.offset + self.attention.dim * torch.arange(parts, device=silenced.device)
        for run, channel in enumerate(channels):
            silenced[run, :, starts + channel] = 0.0
        given[segment.module] = silenced
        taken = _Taken(self.hidden)
        args, kwargs = self.heard.calls[self.attention.module]
        hidden = args[0] if args else kwargs["hidden_states"]
        args, kwargs = args[1:], {name: value for name, value in kwargs.items() if name != "hidden_states"}
        stand_ins = {**{name: _Given(values) for name, values in given.items()}, self.attention.output.module: taken}
        with _in_place(self.module, self.attention.module, stand_ins):
            self.module(hidden.expand(len(channels), -1, -1), *args, **kwargs)
        return taken.values


@contextmanager
def _in_place(parent: nn.Module, name: str, stand_ins: Mapping[str, nn.Module]) -> Iterator[None]:
    """Put stand-ins in the places of a module's children, and the children back afterwards."""
    children = {full: full.removeprefix(name + ".") for full in stand_ins}
    before = {child: getattr(parent, child) for child in children.values()}
    try:
        for full, child in children.items():
            setattr(parent, child, stand_ins[full])
        yield
    finally:
        for child, module in before.items():
            setattr(parent, child, module)
