"""Pruned models, and the masked dense models they must equal; the masks share no code with the slicing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families.geometry import Geometry
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.store.checkpoints import build_model, generation_data

Kept = Mapping[str, Sequence[Sequence[int]]]
"""Per unit kind and layer, the units that stay."""
Constants = Mapping[tuple[int, str], Mapping[int, float]]
"""Per (layer, unit kind), the value at which an input channel of the reader is held."""


def choose_units(geometry: Geometry, kinds: Sequence[str], shape: str, seed: int = 0) -> Kept:
    """Return units to keep: about half per layer, the same number everywhere only where ``shape`` is uniform.

    Of units in groups, as many of each group.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[list[int]]] = {}
    for kind in kinds:
        sizes = [axis.num_units for axis in geometry.axes[kind]]
        if shape == "uniform":
            allowed = [count for count in geometry.allowed_counts(kind) if count < min(sizes)]
            counts = [allowed[len(allowed) // 3]] * len(sizes)
        elif geometry.axes[kind][0].per_group is not None:
            counts = [max(1, size // 2) if layer % 2 == 0 else size for layer, size in enumerate(sizes)]
        else:
            counts = [max(1, 2 * size // 3 - layer * size // 3) for layer, size in enumerate(sizes)]
            assert len(set(counts)) > 1 or max(sizes) == 1
        kept[kind] = [
            _draw(size, count, axis.num_groups, generator)
            for axis, size, count in zip(geometry.axes[kind], sizes, counts, strict=True)
        ]
    return kept


def _draw(size: int, count: int, groups: int, generator: torch.Generator) -> list[int]:
    """Return ``count`` of ``size`` units, as many of each of the consecutive groups."""
    each = size // groups
    drawn = [torch.randperm(each, generator=generator)[: count // groups] + group * each for group in range(groups)]
    return sorted(torch.cat(drawn).tolist())


def plan_keeping(
    geometry: Geometry,
    kept: Kept,
    shape: str,
    constants: Constants | None = None,
    tokens: Sequence[int] | None = None,
) -> Plan:
    """Return the plan that keeps exactly the given units, and the given token ids."""
    constants = constants or {}
    layers = {
        kind: tuple(
            LayerPlan(
                num_units=axis.num_units,
                keep=tuple(units),
                constants=tuple(sorted(constants.get((axis.layer, kind), {}).items())),
            )
            for axis, units in zip(geometry.axes[kind], per_layer, strict=True)
        )
        for kind, per_layer in kept.items()
    }
    return Plan(
        family=geometry.family.name,
        model_fingerprint="",
        shape=shape,
        method="by hand",
        options={},
        budget={},
        layers=layers,
        parameters_dense={},
        parameters_pruned={},
        vocabulary=None if tokens is None else VocabularyPlan(geometry.dimensions["vocab_size"], tuple(tokens)),
    )


def prune(model: Any, plan: Plan, geometry: Geometry, **fitted: Any) -> Any:
    """Return the pruned model; ``fitted`` goes to ``shrink_parameters``."""
    config = shrink_config(model.config.to_dict(), plan, geometry)
    generation = shrink_generation_config(generation_data(model), plan)
    parameters = shrink_parameters(model.state_dict().items(), plan, geometry, **fitted)
    return build_model(config, parameters, model, generation)


@contextmanager
def masked(model: nn.Module, geometry: Geometry, kept: Kept, constants: Constants | None = None) -> Iterator[None]:
    """Hold the removed units' channels at zero, or at their constant, where the reading projection receives them."""
    constants = constants or {}
    dtype = next(model.parameters()).dtype
    with ExitStack() as stack:
        for kind, per_layer in kept.items():
            for axis, units in zip(geometry.axes[kind], per_layer, strict=True):
                if not axis.num_units:
                    continue
                channels = axis.num_units * axis.reader_width
                mask = torch.tensor([float(i // axis.reader_width in units) for i in range(channels)], dtype=dtype)
                held = constants.get((axis.layer, kind), {})
                shift = torch.tensor([held.get(i, 0.0) for i in range(channels)], dtype=dtype)

                def hook(
                    _module: nn.Module, args: tuple[Tensor, ...], mask: Tensor = mask, shift: Tensor = shift
                ) -> tuple[Tensor, ...]:
                    return (args[0] * mask + shift, *args[1:])

                stack.callback(model.get_submodule(axis.reader).register_forward_pre_hook(hook).remove)
        yield


def logits(model: Any, token_ids: Tensor) -> Tensor:
    """Return a model's logits without a cache."""
    with torch.inference_mode():
        result: Tensor = model(input_ids=token_ids, use_cache=False).logits
        return result


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of ``second``."""
    return float((first - second).abs().max() / second.abs().max())
