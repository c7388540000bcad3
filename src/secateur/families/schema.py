"""What a family file may say, and how its little expressions are read; every key is used, or parsing fails.

A family file maps the field's words (``num_key_value_heads``) to one model type's configuration keys and weight names.
An *axis* lists, for one kind of unit, every weight slice that must be cut together. Expressions are sums and products
of dimension names and integers, such as ``"num_attention_heads * head_dim"``; ``/`` must divide exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from secateur.errors import FamilyError
from secateur.records.units import (
    BLOCK_KINDS,
    EXPERT,
    LAYER_UNIT_KINDS,
    MOE_UNIT_KINDS,
    PARTS,
    REQUIRED_UNIT_KINDS,
)

_TOKEN = re.compile(r"\s*([A-Za-z_][A-Za-z0-9_]*|[0-9]+|[*/+])")


def evaluate(expression: str, names: Mapping[str, int]) -> int:
    """Return the value of a sum of products, for example ``"units * q_per_kv + 1"``.

    Raises:
        FamilyError: the expression is malformed, names an unknown dimension, or divides with a remainder.
    """
    total, product, operator = 0, None, "*"
    for token in _tokens(expression):
        if token == "+":
            if product is None or operator:
                raise FamilyError(f"cannot read the expression {expression!r}")
            total, product, operator = total + product, None, "*"
        elif token in "*/":
            if operator or product is None:
                raise FamilyError(f"cannot read the expression {expression!r}")
            operator = token
        else:
            value = int(token) if token.isdigit() else _lookup(token, names, expression)
            if not operator:
                raise FamilyError(f"cannot read the expression {expression!r}")
            if product is None:
                product = value
            elif operator == "*":
                product *= value
            else:
                if value == 0 or product % value:
                    raise FamilyError(f"{expression}: {product} / {value} is not a whole number")
                product //= value
            operator = ""
    if product is None or operator:
        raise FamilyError(f"cannot read the expression {expression!r}")
    return total + product


def _tokens(expression: str) -> list[str]:
    tokens, position, text = [], 0, expression.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if not match:
            raise FamilyError(f"cannot read the expression {expression!r}")
        tokens.append(match[1])
        position = match.end()
    return tokens


def _lookup(name: str, names: Mapping[str, int], expression: str) -> int:
    if name not in names:
        raise FamilyError(f"{expression}: {name} is not a dimension of this model; known: {', '.join(sorted(names))}")
    return names[name]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Dimension(_Data):
    """One size: read from configuration key ``config``, else ``default``; or derived as ``value``."""

    config: str | None = None
    default: str | None = None
    value: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"config": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one_source(self) -> Dimension:
        if (self.config is None) == (self.value is None) or (self.value and self.default):
            raise ValueError("a dimension has either a config key or a value; a default goes with a config key")
        return self


class Member(_Data):
    """A run of rows (``side = "out"``) or columns (``side = "in"``) of one linear layer, ``width`` of them per unit."""

    module: str
    side: Literal["out", "in"]
    width: str = "1"
    offset: str = "0"


class TensorMember(_Data):
    """Entries of one parameter or buffer that is no linear layer's weight or bias.

    Attributes:
        name: path inside the layer, for example ``mlp.experts.down_proj``; a model may lack it.
        dim: dimension that is cut, ``width`` entries per unit from ``offset`` on.
        stacked: whether dimension 0 counts the axis' groups and each group's own units lie along ``dim``, as the
            hidden channels of fused experts do.
        buffer: whether it is a buffer, which counts as no parameter.
    """

    name: str
    dim: int = Field(default=0, ge=0)
    width: str = "1"
    offset: str = "0"
    stacked: bool = False
    buffer: bool = False

    @model_validator(mode="after")
    def _groups_come_first(self) -> TensorMember:
        if self.stacked and self.dim == 0:
            raise ValueError(f"{self.name} is stacked, so dimension 0 counts groups and units lie along another one")
        return self


class Output(_Data):
    """A linear layer's output before the activation function, from ``offset`` on, one value per unit."""

    module: str
    offset: str = "0"

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"module": data} if isinstance(data, str) else data


class Divisor(_Data):
    """A rule of the configuration class: ``number`` must divide ``of``; ``always`` in uneven models too."""

    number: str
    of: str
    always: bool = False


class Axis(_Data):
    """The coupled weight slices of one kind of unit.

    Attributes:
        name: the unit kind.
        count: dimension that counts the units.
        reader: the linear layer whose input holds the units in order, ``reader_width`` channels each; the module with
            the fused tensors for units of which a layer has a set per expert.
        linear: layers whose outputs are the units' values before the activation function.
        members: every slice of a linear layer that goes with a unit, the reader's columns included.
        tensors: every slice of another parameter or buffer that goes with a unit.
        layers: which layers have such units: all, or in families with experts those with or without (``dense``).
        config: configuration keys to write after a cut, as expressions over ``units`` and the dense dimensions.
        divisor: what the stock configuration class demands of the number that stays, if anything.
        per_group: units in each of the consecutive groups that must keep the same number of them, if there are groups.
        fixed: why these units cannot be cut in this family; statistics are taken all the same.
    """

    name: str
    count: str
    reader: str
    reader_width: str = "1"
    linear: tuple[Output, ...] = ()
    members: tuple[Member, ...] = ()
    tensors: tuple[TensorMember, ...] = ()
    layers: Literal["all", "dense", "experts"] = "all"
    config: dict[str, str] = {}
    divisor: Divisor | None = None
    per_group: str | None = None
    fixed: str | None = None

    @field_validator("name")
    @classmethod
    def _known_kind(cls, value: str) -> str:
        if value not in LAYER_UNIT_KINDS:
            raise ValueError(f"unknown unit kind {value!r}; known: {', '.join(LAYER_UNIT_KINDS)}")
        return value

    @model_validator(mode="after")
    def _cut_or_fixed(self) -> Axis:
        slices = self.members or self.tensors
        cut = slices and self.config
        if (slices or self.config or self.divisor or self.per_group) if self.fixed else not cut:
            raise ValueError("an axis has members and config to cut, or says in `fixed` why it has none")
        if self.per_group is None and any(tensor.stacked for tensor in self.tensors):
            raise ValueError(f"axis {self.name} has stacked tensors, so `per_group` must say how many units each holds")
        return self


class Flag(_Data):
    """Yes or no: read from configuration key ``config``, else ``default``."""

    config: str | None = None
    default: bool

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, data: object) -> object:
        return {"default": data} if isinstance(data, bool) else data


class Experts(_Data):
    """Where a family's routed experts are, and how a token finds its own.

    Attributes:
        module: inside a layer, what holds the fused tensors of all its experts.
        router: inside a layer, what scores them; its weight has one row each.
        count: dimension that counts a layer's experts.
        per_token: dimension that counts the experts a token is sent to.
        width: dimension that counts the hidden channels of one expert.
        num_groups: dimension that counts the groups that the router chooses among first; None: there are none.
        groups_per_token: dimension that counts those of them a token may be sent to.
        min_per_group: experts that the router's score of a group is made of.
        renormalised: whether the weights of the chosen experts are made to add up to 1.
        dense_first: configuration key that counts the first layers, which have no experts.
        dense_layers: configuration key that lists layers without experts.
        step: configuration key of a number n: only every n-th layer has experts.
    """

    module: str
    router: str
    count: str
    per_token: str
    width: str
    num_groups: str | None = None
    groups_per_token: str | None = None
    min_per_group: int = Field(default=1, ge=1)
    renormalised: Flag
    dense_first: str | None = None
    dense_layers: str | None = None
    step: str | None = None

    @property
    def sizes(self) -> tuple[str, ...]:
        """The dimensions that it names."""
        named = (self.count, self.per_token, self.width, self.num_groups, self.groups_per_token)
        return tuple(name for name in named if name is not None)

    @model_validator(mode="after")
    def _both_or_neither(self) -> Experts:
        if (self.num_groups is None) != (self.groups_per_token is None):
            raise ValueError("experts have both num_groups and groups_per_token, or neither")
        if self.step is not None and self.dense_layers is None:
            raise ValueError("experts with a step also need dense_layers, to say what is left of it once layers go")
        return self


class SubLayer(_Data):
    """One branch that adds to the residual stream: its modules inside a layer, and the norms that serve only it."""

    modules: tuple[str, ...] = Field(min_length=1)
    norms: tuple[str, ...] = ()


class FixedBlock(_Data):
    """Why some blocks cannot be taken out, where configuration keys have certain values (always, if none is named)."""

    units: tuple[str, ...] = Field(min_length=1)
    reason: str
    when: dict[str, bool | int | str] = {}

    @field_validator("units")
    @classmethod
    def _known_kinds(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(value) - set(BLOCK_KINDS))
        if unknown:
            raise ValueError(f"unknown unit kinds {unknown}; known: {', '.join(BLOCK_KINDS)}")
        return value


class Blocks(_Data):
    """What is taken out with a sub-layer or a whole layer.

    Attributes:
        attention: the attention sub-layer.
        ffn: the feed-forward sub-layer.
        per_layer: configuration keys of lists with one entry per layer; they are cut with the layers.
        layer_types: which of these lists names each layer's type of attention; caches count the text's length in the
            first layer of every type.
        fixed: blocks that cannot be taken out.
    """

    attention: SubLayer
    ffn: SubLayer
    per_layer: tuple[str, ...] = ()
    layer_types: str | None = None
    fixed: tuple[FixedBlock, ...] = ()

    @model_validator(mode="after")
    def _types_are_per_layer(self) -> Blocks:
        if self.layer_types is not None and self.layer_types not in self.per_layer:
            raise ValueError(f"layer_types names {self.layer_types!r}, which is not one of the lists under per_layer")
        return self


class OlderRope(_Data):
    """Where configurations kept, before transformers 5, what newer ones keep under ``rope_parameters``.

    Attributes:
        keys: older configuration key, and the path of its value inside ``rope_parameters`` (a dot goes deeper).
        scaling: path of the part that becomes ``rope_scaling`` where its type is not the default; empty: all of it.
        scaling_keys: the only keys that ``rope_scaling`` may have; empty: any.
    """

    keys: dict[str, str] = {"rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}
    scaling: str = ""
    scaling_keys: tuple[str, ...] = ()


class Family(_Data):
    """One family of decoder-only language models.

    Attributes:
        name: the family's name.
        model_types: the ``model_type`` values of the configurations it covers.
        layers: path of the module list of decoder layers in the causal language model.
        vocabulary: modules whose weight (and bias, if any) has one row per token id; those a model lacks are passed
            over. ``vocab_size`` under ``dimensions`` is read from the configuration key that counts them.
        weight_layout: ``out_in`` (``nn.Linear``) or ``in_out`` (GPT-2's ``Conv1D``).
        packing: how attention is kept within a document in a packed block: ``positions`` (transformers reads restarts
            in ``position_ids``) or ``mask`` (a mask must be passed).
        dimensions: sizes, by the field's words.
        parts: module name prefixes (inside the model or inside a layer) per part of the model.
        blocks: the sub-layers, and what belongs to whole layers. ``num_layers`` under ``dimensions`` is read from the
            configuration key that counts them.
        axes: the unit kinds.
        experts: where the routed experts are; None in families whose layers are all dense.
        older_rope: how configurations named the rotary settings before transformers 5.
        older_names: other configuration keys that had another name then: the older one, and the one of today.
    """

    name: str
    model_types: tuple[str, ...]
    layers: str
    vocabulary: tuple[str, ...]
    weight_layout: Literal["out_in", "in_out"] = "out_in"
    packing: Literal["positions", "mask"] = "positions"
    dimensions: dict[str, Dimension]
    parts: dict[str, tuple[str, ...]]
    blocks: Blocks
    axes: tuple[Axis, ...]
    experts: Experts | None = None
    older_rope: OlderRope = OlderRope()
    older_names: dict[str, str] = {}

    @model_validator(mode="after")
    def _complete(self) -> Family:
        unknown = set(self.parts) - set(PARTS)
        if unknown:
            raise ValueError(f"unknown parts {sorted(unknown)}; known: {', '.join(PARTS)}")
        if not self.vocabulary or getattr(self.dimensions.get("vocab_size"), "config", None) is None:
            raise ValueError("a family names its vocabulary modules, and the configuration key of vocab_size")
        if getattr(self.dimensions.get("num_layers"), "config", None) is None:
            raise ValueError("a family names the configuration key of num_layers")
        names = [axis.name for axis in self.axes]
        if len(set(names)) < len(names) or not set(REQUIRED_UNIT_KINDS) <= set(names):
            raise ValueError(
                f"a family describes each of {', '.join(REQUIRED_UNIT_KINDS)} once, and each of "
                f"{', '.join(MOE_UNIT_KINDS)} at most once; got {', '.join(names)}"
            )
        for axis in self.axes:
            if axis.count not in self.dimensions:
                raise ValueError(f"axis {axis.name} counts {axis.count}, which is not under [dimensions]")
        self._require_experts(names)
        return self

    def _require_experts(self, names: Sequence[str]) -> None:
        """Raise ValueError unless what is said about experts fits together."""
        if self.experts is None:
            about = [axis.name for axis in self.axes if axis.name in MOE_UNIT_KINDS or axis.layers != "all"]
            if about:
                raise ValueError(f"axes {', '.join(about)} are about layers with experts; say under [experts] where")
            return
        unknown = [size for size in self.experts.sizes if size not in self.dimensions]
        if unknown:
            raise ValueError(f"[experts] names {', '.join(unknown)}, which is not under [dimensions]")
        if EXPERT not in names:
            raise ValueError(f"a family with [experts] describes the axis {EXPERT}")
        wrong = [axis.name for axis in self.axes if (axis.name in MOE_UNIT_KINDS) != (axis.layers == "experts")]
        if wrong:
            raise ValueError(f'axes {", ".join(MOE_UNIT_KINDS)} and no others have layers = "experts"; see {wrong}')
