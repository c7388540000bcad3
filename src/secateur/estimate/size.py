"""How large a model is, from shapes alone: parameters, what of them a token uses, and the widths that costs rest on."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from secateur.families.geometry import Geometry, build_geometry, parameters_by_part
from secateur.families.loader import family_of
from secateur.records.units import FUSED_KINDS, SITE_OF
from secateur.store.checkpoints import Checkpoint

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One decoder layer.

    Attributes:
        parameters: all of them.
        active: those of matrices that one token is multiplied with; of experts, those it is sent to.
        ffn: hidden channels of the FFN that one token goes through, all its experts' together.
    """

    parameters: int
    active: int
    ffn: int


@dataclass(frozen=True, slots=True)
class Site:
    """The input of one projection that reads units.

    Attributes:
        layer: layer index.
        kind: of the units.
        width: input channels.
        out: outputs.
    """

    layer: int
    kind: str
    width: int
    out: int


@dataclass(frozen=True, slots=True)
class ModelSize:
    """A model's sizes.

    Attributes:
        geometry: its family met by its configuration.
        config: its configuration as plain data.
        shapes: its parameters by name, tied ones once.
        parameters: how many there are.
        layers: its decoder layers.
        vocab: token ids.
        hidden: width of the residual stream.
        heads: channels of all query heads of a layer together, and ``kv`` of all key/value heads.
        stored: bytes per stored parameter.
    """

    geometry: Geometry
    config: Mapping[str, Any]
    shapes: Shapes
    parameters: int
    layers: tuple[LayerSize, ...]
    vocab: int
    hidden: int
    heads: int
    kv: int
    stored: int

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return len(self.layers)

    @property
    def in_layers(self) -> int:
        """Parameters of all decoder layers."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def widest(self) -> LayerSize:
        """The layer through which a token goes with the most channels."""
        return max(self.layers, key=lambda layer: layer.ffn)

    def by_part(self) -> dict[str, int]:
        """Return parameters by part of the model."""
        return parameters_by_part(self.shapes, self.geometry)

    def sites(self, kinds: Collection[str]) -> list[Site]:
        """Return the projections that read units of some kinds, each once; experts' fused tensors are none."""
        found: dict[tuple[int, str], Site] = {}
        for kind in kinds:
            if kind not in self.geometry.axes or kind in FUSED_KINDS:
                continue
            for axis in self.geometry.axes[kind]:
                width = axis.num_units * axis.reader_width
                if width:
                    found[axis.site] = Site(axis.layer, SITE_OF[kind], width, self.hidden)
        return [found[key] for key in sorted(found)]


def size_of(checkpoint: Checkpoint) -> ModelSize:
    """Return the sizes of a model on disk; its weights are not read."""
    return measure(checkpoint.geometry, checkpoint.config, checkpoint.shapes, checkpoint.dtype.itemsize)


def size_of_config(config: Mapping[str, Any], *, stored: int = 2) -> ModelSize:
    """Return the sizes of a model of which there is only a configuration.

    Args:
        config: as in config.json, ``model_type`` included.
        stored: bytes per stored parameter.

    Raises:
        FamilyError: the model type is not supported, or sizes are missing.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    family = family_of(str(config.get("model_type")))
    data = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    full = AutoConfig.for_model(config["model_type"], **data)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(full)
    shapes = {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}
    plain = full.to_dict()
    return measure(build_geometry(family, plain), plain, shapes, stored)


def measure(geometry: Geometry, config: Mapping[str, Any], shapes: Shapes, stored: int) -> ModelSize:
    """Return the sizes that shapes come to.

    Args:
        geometry: of the model.
        config: its configuration.
        shapes: its parameters by name, tied ones once.
        stored: bytes per stored parameter.
    """
    sizes = geometry.dimensions
    hidden = sizes["hidden_size"]
    num_heads = sizes.get("num_attention_heads", 1)
    head_dim = sizes.get("head_dim", hidden // num_heads)
    per_layer: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(geometry.num_layers)]
    for name, shape in shapes.items():
        layer = geometry.layer_of(name)
        if layer is not None:
            per_layer[layer].append((name, shape))
    return ModelSize(
        geometry=geometry,
        config=config,
        shapes=shapes,
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        layers=tuple(_layer_size(geometry, layer, found) for layer, found in enumerate(per_layer)),
        vocab=sizes["vocab_size"],
        hidden=hidden,
        heads=num_heads * head_dim,
        kv=sizes.get("num_key_value_heads", num_heads) * head_dim,
        stored=stored,
    )


def _layer_size(geometry: Geometry, layer: int, shapes: list[tuple[str, tuple[int, ...]]]) -> LayerSize:
    experts = geometry.experts[layer] if geometry.experts else None
    parameters, active = 0, 0.0
    for name, shape in shapes:
        count = math.prod(shape)
        parameters += count
        if experts is not None and name.startswith(experts.module + "."):
            active += count * experts.per_token / experts.num_experts
        elif len(shape) > 1:
            active += count
    ffn = sum(
        geometry.axes[kind][layer].num_units * geometry.axes[kind][layer].reader_width
        for kind in ("ffn_channel", "shared_channel")
        if kind in geometry.axes
    )
    if experts is not None:
        ffn += experts.per_token * experts.width
    return LayerSize(parameters, round(active), ffn)


def narrowed(size: ModelSize, shares: Mapping[str, float]) -> ModelSize:
    """Return the sizes of a model that keeps a share of each part, for memory and time; shapes stay the dense model's.

    Args:
        size: of the dense model.
        shares: what is kept, by part of the model (attention, ffn, embedding, head), 0..1, and ``layers`` of all
            layers; parts that are missing stay whole.
    """
    parts = size.by_part()
    depth = shares.get("layers", 1.0)
    kept = {part: shares.get(part, 1.0) * (depth if part in ("attention", "ffn") else 1.0) for part in parts}
    parameters = round(sum(count * kept[part] for part, count in parts.items()))
    inner = parts["attention"] + parts["ffn"]
    ratio = (parts["attention"] * kept["attention"] + parts["ffn"] * kept["ffn"]) / max(inner, 1)
    layers = tuple(
        LayerSize(
            round(layer.parameters * ratio), round(layer.active * ratio), round(layer.ffn * shares.get("ffn", 1.0))
        )
        for layer in size.layers
    )
    return replace(size, parameters=parameters, layers=layers, vocab=round(size.vocab * shares.get("embedding", 1.0)))
