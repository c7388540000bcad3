"""The gradient pass: blocks forwards and backwards through the dense model, one at a time; sums per unit come out.

Parameters are frozen while it runs, so no gradient of the whole model is ever held. The weight gradient of one
projection at a time, G = (gradient at its output)^T (its input), is formed when the backward pass comes by, multiplied
with the weight, summed per unit and dropped.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from secateur.calibrate.one_pass import require_linear
from secateur.calibrate.precision import exact_float32
from secateur.errors import CheckpointError, ConfigError, CorpusError
from secateur.families.geometry import Geometry, Segment, UnitAxis
from secateur.progress import Progress, silent
from secateur.records.blocks import BlockBatch, TokenBlocks
from secateur.records.gradients import OPTIONAL, SUMS, GradientStatistics, UnitGradients
from secateur.records.statistics import SiteKey
from secateur.stream.forward import run_logits

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What gradients can be taken in; those of float16 underflow."""

_NO_TARGET = -100
"""Marks positions after which no token is predicted."""


def require_dtype(dtype: torch.dtype, what: str, who: str) -> None:
    """Raise ConfigError where gradients cannot be taken in a dtype.

    Args:
        dtype: of the weights.
        what: whose dtype it is, for the message.
        who: who needs gradients, for the message.
    """
    if dtype not in DTYPES:
        raise ConfigError(
            f"{who} needs gradients; {what} is {str(dtype).removeprefix('torch.')}, in which they cannot be taken. "
            "Load the model unquantised, with dtype: float32 or bfloat16."
        )


def require_differentiable(model: nn.Module, geometry: Geometry, kinds: Collection[str], who: str) -> None:
    """Raise ConfigError if a parameter, or a weight that a unit has a part of, is of a dtype without gradients."""
    for name, parameter in model.named_parameters():
        require_dtype(parameter.dtype, name, who)
    for kind in kinds:
        for module in {segment.module for axis in _present(geometry, kind) for segment in axis.segments}:
            weight = getattr(model.get_submodule(module), "weight", None)
            if not isinstance(weight, Tensor):
                raise ConfigError(
                    f"{who} needs gradients; {module} has no plain weight (it is quantised, or wrapped). Load the "
                    "model unquantised, with dtype: float32 or bfloat16."
                )
            require_dtype(weight.dtype, f"{module}.weight", who)


def _present(geometry: Geometry, kind: str) -> list[UnitAxis]:
    return [axis for axis in geometry.axes[kind] if axis.num_units]


@contextmanager
def differentiated(model: Any) -> Iterator[None]:
    """Let gradients flow from the loss to the embedding's output and to no parameter, while the context lasts.

    The model is in evaluation mode meanwhile. Afterwards every parameter and module is as it was, frozen ones too.
    """
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.callback(_restore, modes, flags)
        model.eval()
        model.requires_grad_(False)
        stack.callback(model.get_input_embeddings().register_forward_hook(_start_of_graph).remove)
        yield


def _start_of_graph(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.requires_grad_()


def _restore(modes: list[tuple[nn.Module, bool]], flags: list[tuple[nn.Parameter, bool]]) -> None:
    for module, training in modes:
        module.training = training
    for parameter, requires_grad in flags:
        parameter.requires_grad_(requires_grad)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one projection holds of the units of a site; ``index`` is its place among the unit's slices."""

    site: SiteKey
    num_units: int
    segment: Segment
    is_reader: bool
    index: int


class _GradientSums:
    """What a pass adds up; its methods are called by hooks while a block runs backwards."""

    def __init__(self, geometry: Geometry, kinds: Collection[str], *, outputs: bool, sketch: bool) -> None:
        self.outputs: dict[SiteKey, Tensor] | None = {} if outputs else None
        self.sketches: dict[SiteKey, Tensor] | None = {} if sketch else None
        self.signs: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.weight_layout = geometry.family.weight_layout
        self.parts: defaultdict[str, list[_Part]] = defaultdict(list)
        self.totals: dict[SiteKey, dict[str, Tensor]] = {}
        self.block: defaultdict[SiteKey, dict[str, Tensor]] = defaultdict(dict)
        self.count = 0
        for kind in kinds:
            for axis in _present(geometry, kind):
                for index, segment in enumerate(axis.segments):
                    is_reader = segment.module == axis.reader
                    part = _Part((axis.layer, kind), axis.num_units, segment, is_reader, index)
                    self.parts[segment.module].append(part)

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hear the gradients of every projection for as long as the context lasts."""
        with ExitStack() as stack:
            for name in self.parts:
                module = model.get_submodule(name)
                hook = partial(self._on_forward, name)
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _on_forward(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        values = args[0] if args else next(iter(kwargs.values()))
        output.register_hook(partial(self._on_backward, name, module, values.detach()))  # type: ignore[no-untyped-call]

    def _on_backward(self, name: str, module: Any, values: Tensor, gradient: Tensor) -> None:
        with torch.no_grad():
            weight = module.weight if self.weight_layout == "out_in" else module.weight.T
            bias = getattr(module, "bias", None)
            slopes = weight_gradient(weight, values, gradient)
            for part in self.parts[name] if self.sketches is not None else ():
                self._add_sketch(part, slopes)
            products = slopes.mul_(weight)
            for part in self.parts[name]:
                self._add(part, products)
                if part.is_reader and self.outputs is not None:
                    self._add_output(part.site, gradient)
                if part.segment.side == "out" and bias is not None:
                    column = bias[:, None]
                    self._add(part, weight_gradient(column, torch.ones_like(values[..., :1]), gradient).mul_(column))

    def _add(self, part: _Part, products: Float[Tensor, "out in"]) -> None:
        segment = part.segment
        rows = products if segment.side == "out" else products.T
        rows = rows[segment.offset : segment.offset + part.num_units * segment.width]
        found = {name: sums.reshape(part.num_units, -1).sum(1) for name, sums in weight_sums(rows).items()}
        if part.is_reader:
            found["mask"] = rows.sum(1).double().reshape(part.num_units, -1).sum(1)
        here = self.block[part.site]
        for name, values in found.items():
            here[name] = here[name] + values if name in here else values

    def _add_output(self, site: SiteKey, gradient: Tensor) -> None:
        assert self.outputs is not None
        rows = gradient.reshape(-1, gradient.shape[-1])
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if site not in self.outputs:
            self.outputs[site] = rows.new_zeros(rows.shape[1], rows.shape[1])
        with exact_float32():
            self.outputs[site].addmm_(rows.T, rows)

    def _add_sketch(self, part: _Part, slopes: Float[Tensor, "out in"]) -> None:
        """Add the projections of one slice's gradient; biases are left out."""
        assert self.sketches is not None
        segment = part.segment
        rows = slopes if segment.side == "out" else slopes.T
        rows = rows[segment.offset : segment.offset + part.num_units * segment.width]
        place = part.index, rows.shape[1], segment.width
        if place not in self.signs:
            columns, within = sketch_signs(*place)
            self.signs[place] = columns.to(rows), within.to(rows)
        columns, within = self.signs[place]
        with exact_float32():
            found = ((rows @ columns).reshape(part.num_units, segment.width, -1) * within).sum(1)
        self.sketches[part.site] = self.sketches[part.site] + found if part.site in self.sketches else found

    def end_block(self) -> None:
        """Add what the block left; a unit's mask is squared only now that all of its channels are in.

        Raises:
            CheckpointError: it is not finite; the place is named.
        """
        for (layer, kind), found in sorted(self.block.items()):
            mask = found.pop("mask")
            found |= {"mask_sq": mask.square(), "mask_abs": mask.abs()}
            if not all(bool(torch.isfinite(values).all()) for values in found.values()):
                raise CheckpointError(
                    f"gradients at the {kind}s of layer {layer} are not finite (NaN or infinite). Check the "
                    "checkpoint, or run with dtype: float32."
                )
            before = self.totals.get((layer, kind))
            self.totals[layer, kind] = {name: found[name] + (before[name] if before else 0.0) for name in SUMS}
        self.block.clear()
        self.count += 1

    def result(self, num_tokens: int) -> GradientStatistics:
        """Return the sums so far, on the CPU."""
        asked = dict(zip(OPTIONAL, (self.outputs, self.sketches), strict=True))
        optional = {name: found for name, found in asked.items() if found is not None}
        units = {
            site: UnitGradients(
                self.count,
                **{name: sums[name].cpu() for name in SUMS},
                **{name: found[site].cpu() for name, found in optional.items()},
            )
            for site, sums in sorted(self.totals.items())
        }
        return GradientStatistics(num_tokens, units)


SKETCH_DIRECTIONS = 64
"""Random directions that a unit's gradient is projected on: cosines are then known to about an eighth."""


def sketch_signs(
    index: int, columns: int, width: int
) -> tuple[Float[Tensor, "columns directions"], Float[Tensor, "width directions"]]:
    """Return the signs of one slice of a unit: those of its columns and of its rows, whose products are the directions.

    They depend on nothing but the arguments, so that sketches of different texts compare.

    Args:
        index: place of the slice among the unit's slices.
        columns: numbers per row.
        width: rows per unit.
    """
    generator = torch.Generator().manual_seed(index)
    shapes = (columns, SKETCH_DIRECTIONS), (width, SKETCH_DIRECTIONS)
    first, second = (torch.randint(0, 2, shape, generator=generator) * 2.0 - 1.0 for shape in shapes)
    return first, second


def weight_gradient(
    weight: Float[Tensor, "out in"], values: Float[Tensor, "... in"], gradient: Float[Tensor, "... out"]
) -> Float[Tensor, "out in"]:
    """Return dL/dw_ij of a projection, from its input and the gradient at its output; float32 or wider."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    inputs, outputs = (matrix.reshape(-1, matrix.shape[-1]).to(wide) for matrix in (values, gradient))
    with exact_float32():
        return outputs.T @ inputs


def weight_sums(products: Float[Tensor, "rows columns"]) -> dict[str, Float64[Tensor, " rows"]]:
    """Return sums over each row of s, as ``UnitGradients`` names them: |s|, s^2 and |s - s^2 / 2|."""
    squares = products.square()
    return {
        "weight_sq": squares.sum(1).double(),
        "weight_mixed": squares.mul_(-0.5).add_(products).abs_().sum(1).double(),
        "weight_abs": torch.abs(products, out=squares).sum(1).double(),
    }


def block_loss(model: Any, batch: BlockBatch, geometry: Geometry) -> Float[Tensor, ""]:
    """Return the mean loss over the predicted tokens of one block, in nats; float32 or wider."""
    logits = run_logits(model, batch, geometry.family)[0]
    targets = torch.full_like(batch.input_ids[0], _NO_TARGET)
    positions = batch.predicted[0].nonzero()[:, 0]
    targets[positions - 1] = batch.input_ids[0][positions]  # rather than rows of the logits, which would be copied
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return nn.functional.cross_entropy(wide, targets.to(wide.device), ignore_index=_NO_TARGET)


def collect_gradients(
    model: Any,
    blocks: TokenBlocks,
    geometry: Geometry,
    kinds: Collection[str],
    *,
    max_tokens: int | None = None,
    outputs: bool = False,
    sketch: bool = False,
    progress: Progress = silent,
    label: str = "gradients",
    who: str = "the gradient pass",
) -> GradientStatistics:
    """Return sums per unit of the loss's gradients on ``blocks``.

    One block runs at a time. Besides the model, memory holds the activations of one block, its logits, and weight
    gradients of one projection. No parameter gets a gradient, and frozen ones may stay frozen.

    Args:
        model: a transformers causal language model, on its device, in float32, bfloat16 or float64.
        blocks: packed calibration text.
        geometry: of this model.
        kinds: unit kinds to judge.
        max_tokens: whole blocks are taken from the start for as long as they have no more tokens than this, one at
            least; None for all.
        outputs: also sum g gT at the outputs of the reading projections: out x out x 4 bytes for each.
        sketch: also sum random projections of each unit's gradient, so that those of two texts can be compared.
        progress: told about finished tokens.
        label: name of the work for ``progress``.
        who: who needs gradients, for messages.

    Raises:
        ConfigError: weights are quantised or in float16.
        FamilyError: the family cannot cut one of the kinds, so that no weights belong to its units, or no linear layer
            reads them.
        CheckpointError: gradients are not finite; the layer is named.
        CorpusError: no token of the text is predicted.
    """
    geometry.require_cuttable(kinds)
    require_linear(kinds, "gradients")
    require_differentiable(model, geometry, kinds, who)
    sums = _GradientSums(geometry, kinds, outputs=outputs, sketch=sketch)
    limit = blocks.num_tokens if max_tokens is None else min(max_tokens, blocks.num_tokens)
    num_tokens = 0
    with differentiated(model), sums.listening(model), progress(label, limit, "tokens") as task:
        for batch in blocks.batches(1):
            if num_tokens and num_tokens + batch.num_tokens > limit:
                break
            num_tokens += batch.num_tokens
            if bool(batch.predicted.any()):
                block_loss(model, batch, geometry).backward()  # type: ignore[no-untyped-call]
                sums.end_block()
            task.advance(batch.num_tokens)
    if not sums.count:
        raise CorpusError(f"{who} needs a loss, and no calibration token is predicted: every document is one token.")
    return sums.result(num_tokens)
