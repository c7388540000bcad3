"""Which GGUF tensor comes from which parameters, and what describes the model to llama.cpp; computes no tensor.

llama.cpp's ordinary architectures give every layer the same sizes. Where layers differ, the model is described as
``deci`` or ``openelm``, whose loaders read heads and feed-forward width per layer. What those loaders get wrong without
a word is avoided here: a first layer without attention gets one head of zeros, attention without a feed-forward
sub-layer gets a feed-forward of zeros, and a layer that lost both is left out.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from secateur.errors import ExportError
from secateur.export.stored import LayerSizes, Shapes, stored_shape
from secateur.families.geometry import resolve_dimensions
from secateur.families.loader import UNEVEN_PREFIX, dense_model_type, families
from secateur.families.schema import Family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_TABLE = "gguf_architectures.toml"
_STAND_IN_WIDTH = 32
"""Width of a feed-forward sub-layer of zeros: one quantisation block."""
_PER_LAYER = ("deci", "openelm")

Value = bool | int | float | str | list[int] | list[float] | list[str]


class Architecture(BaseModel):
    """One family as llama.cpp knows it; the keys are explained at the top of the table."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    architecture: str
    uneven: str | None = None
    rope: Literal["pairs", "halves", "none"]
    norm_offset: float = 0.0
    full_heads: bool = False
    biases: tuple[str, ...] = ()
    model: dict[str, str]
    layer: dict[str, str]
    metadata: dict[str, str]
    require: dict[str, tuple[Any, ...]] = {}
    nearly: dict[str, tuple[Any, ...]] = {}
    interleaved: tuple[str, ...] = ()
    context: str = "max_position_embeddings"
    window_limits_context: bool = False
    window_pattern: int | None = None
    query_scale: bool = False
    head_bias: bool = False
    ignored: tuple[str, ...] = ()


@cache
def architectures() -> dict[str, Architecture]:
    """Return what is known of each family, by the name of its family file."""
    text = (resources.files("secateur.export") / _TABLE).read_text(encoding="utf-8")
    return {name: Architecture.model_validate(data) for name, data in tomllib.loads(text).items()}


@dataclass(frozen=True, slots=True)
class TensorSource:
    """One GGUF tensor and how it is made.

    Attributes:
        name: in the file.
        shape: rows first, as in numpy.
        parameters: names in the checkpoint, joined along the first axis; none for a stand-in.
        transposed: the checkpoint keeps (in, out).
        heads: the rows of so many heads are reordered, so that rotary pairs lie side by side; 0 for none.
        interleaved: the rows are the query, key and value of so many heads in turn, and all queries go first; 0 where
            they are not.
        offset: added to every value.
        values: the values of a tensor that no parameter gives.
    """

    name: str
    shape: tuple[int, ...]
    parameters: tuple[str, ...] = ()
    transposed: bool = False
    heads: int = 0
    interleaved: int = 0
    offset: float = 0.0
    values: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """A model as a GGUF file describes it.

    Attributes:
        architecture: llama.cpp's name.
        metadata: keys with the architecture's prefix, and their values.
        tensors: in the order of the file.
        notes: what the reader of the file should know.
    """

    architecture: str
    metadata: dict[str, Value]
    tensors: tuple[TensorSource, ...]
    notes: tuple[str, ...]


def plan_layout(config: Mapping[str, Any], shapes: Shapes) -> Layout:
    """Return the GGUF form of a model.

    Args:
        config: the plain data of its configuration, defaults included.
        shapes: the shape of every stored parameter.

    Raises:
        ExportError: llama.cpp does not know the family, or would compute something else than transformers does.
    """
    return _Planner(config, shapes).layout()


def _find(model_type: str) -> tuple[Family, Architecture]:
    known = architectures()
    for family in families().values():
        if dense_model_type(model_type) in family.model_types and family.name in known:
            return family, known[family.name]
    raise ExportError(
        f"models of type {model_type.removeprefix(UNEVEN_PREFIX)!r} cannot be written as GGUF; known: "
        f"{', '.join(known)}. Export a Hugging Face folder instead."
    )


class _Planner:
    def __init__(self, config: Mapping[str, Any], shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        self.family, self.table = _find(str(config.get("model_type")))
        plain = {key: value for key, value in config.items() if key != "per_layer_config"}
        self.sizes = resolve_dimensions(self.family, plain)
        self.head_dim = self.sizes["head_dim"]
        self.modules = {theirs: ours for ours, theirs in self.table.layer.items()}
        self.tied = bool(config.get("tie_word_embeddings"))
        self.used: set[str] = set()
        self.notes: list[str] = []
        layers = [self._layer(place) for place in range(self.sizes["num_layers"])]
        self.layers = [layer for layer in layers if layer.heads or layer.width]
        if not self.layers:
            raise ExportError("every layer of this model was removed, and llama.cpp needs one. Keep a layer.")
        self.architecture = self._choose()

    def layout(self) -> Layout:
        self._require_values()
        tensors = [*self._model_tensors(), *self._rope_factors()]
        for number, layer in enumerate(self.layers):
            tensors += self._layer_tensors(number, layer)
        self._require_all_used()
        return Layout(self.architecture, self._metadata(), tuple(tensors), tuple(self.notes))

    def _name(self, place: int, module: str, kind: str = "weight") -> str:
        return f"{self.family.layers}.{place}.{module}.{kind}"

    def _layer(self, place: int) -> LayerSizes:
        down = self.shapes.get(self._name(place, self.modules["ffn_down"]))
        columns = 0 if self.family.weight_layout == "in_out" else 1
        width = 0 if down is None else down[columns]
        if self._name(place, self.modules["attn_output"]) not in self.shapes:
            return LayerSizes(place, 0, 0, width)
        if "attn_qkv" in self.modules:
            heads = self.sizes["num_attention_heads"]
            return LayerSizes(place, heads, self.sizes.get("num_key_value_heads", heads), width)
        rows = [stored_shape(self.shapes, self._name(place, self.modules[name]))[0] for name in ("attn_q", "attn_k")]
        return LayerSizes(place, rows[0] // self.head_dim, rows[1] // self.head_dim, width)

    def _choose(self) -> str:
        """Return the plain architecture where it fits, else the one that takes sizes per layer."""
        first = self.layers[0]
        sizes = {(layer.heads, layer.kv_heads, layer.width) for layer in self.layers}
        even = len(sizes) == 1 and first.heads > 0 and first.width > 0
        narrow = self.table.full_heads and first.heads * self.head_dim != self.sizes["hidden_size"]
        if even and not narrow:
            return self.table.architecture
        what = "layers that differ in size" if not even else "fewer heads than hidden_size / head_dim"
        if self.table.uneven is None:
            raise ExportError(
                f"llama.cpp loads no {self.family.name} model with {what}. Prune with shape: uniform"
                f"{' and leave its heads whole' if narrow else ''}, or use the Hugging Face folder."
            )
        if self.table.uneven == "openelm" and not self.tied:
            raise ExportError(
                f"llama.cpp loads no {self.family.name} model with {what} whose output head is not tied to its "
                "embedding (tie_word_embeddings is false). Prune with shape: uniform, or use the Hugging Face folder."
            )
        self.notes.append(
            f"llama.cpp reads sizes per layer in its architecture {self.table.uneven!r}, so the file carries that "
            f"name; the model is a {self.family.name}."
        )
        return self.table.uneven

    def _require_values(self) -> None:
        for key, allowed in self.table.require.items():
            value = self.config.get(key)
            if value in self.table.nearly.get(key, ()):
                self.notes.append(f"llama.cpp approximates {key} {value!r}, so its answers differ a little.")
            if value is not None and value not in allowed:
                wanted = " or ".join(repr(item) for item in allowed) or "none"
                raise ExportError(
                    f"{key} of this model is {value!r}, and llama.cpp's {self.table.architecture} computes with "
                    f"{wanted}. Use the Hugging Face folder."
                )
        if self.table.query_scale:
            self._require_query_scale()
        if self.table.window_pattern:
            self._require_window_pattern(self.table.window_pattern)

    def _require_query_scale(self) -> None:
        """llama.cpp divides by the root of head_dim, except in one size that it knows by its number of layers."""
        scalar = self.config.get("query_pre_attn_scalar", self.head_dim)
        if scalar != self.head_dim:
            raise ExportError(
                f"query_pre_attn_scalar of this model is {scalar} and its head_dim {self.head_dim}; llama.cpp scales "
                f"{self.table.architecture} attention by head_dim. Use the Hugging Face folder."
            )

    def _require_window_pattern(self, period: int) -> None:
        """llama.cpp derives from the layer's number whether it sees a window or everything."""
        types = list(self.config.get("layer_types") or ())
        expected = [
            "full_attention" if number % period == period - 1 else "sliding_attention" for number in range(len(types))
        ]
        if types != expected:
            wrong = next(number for number in range(len(types)) if types[number] != expected[number])
            raise ExportError(
                f"layer {wrong} of this model has {types[wrong]}, where llama.cpp's {self.table.architecture} gives "
                f"full attention to the last of each {period} layers. Remove whole groups of {period} layers, or "
                "use the Hugging Face folder."
            )

    def _tensor(self, name: str, parameter: str, **how: Any) -> TensorSource:
        shape = stored_shape(self.shapes, parameter)
        self.used.add(parameter)
        shape = shape[::-1] if how.get("transposed") else shape
        return TensorSource(name, shape, (parameter,), **how)

    def _model_tensors(self) -> list[TensorSource]:
        tensors = []
        for theirs, modules in self._model_modules().items():
            module = next((name for name in modules if f"{name}.weight" in self.shapes), modules[-1])
            if theirs == "output" and self.tied:
                self.used.add(f"{module}.weight")
                continue
            offset = self.table.norm_offset if theirs.endswith("norm") else 0.0
            tensors.append(self._tensor(f"{theirs}.weight", f"{module}.weight", offset=offset))
            if f"{module}.bias" in self.shapes and (theirs.endswith("norm") or self.table.head_bias):
                tensors.append(self._tensor(f"{theirs}.bias", f"{module}.bias"))
        return tensors

    def _model_modules(self) -> dict[str, list[str]]:
        """Return the modules outside the layers by llama.cpp's name; some are stored by one of two names."""
        modules: dict[str, list[str]] = {}
        for module, theirs in self.table.model.items():
            modules.setdefault(theirs, []).append(module)
        return modules

    def _layer_tensors(self, number: int, layer: LayerSizes) -> list[TensorSource]:
        tensors = []
        for module, theirs in self.table.layer.items():
            if self._name(layer.place, module) in self.shapes:
                tensors += self._module_tensors(number, layer, module, theirs)
        if self.architecture in _PER_LAYER:
            tensors += self._stand_ins(number, layer)
        if self.architecture == "openelm":
            tensors = _fused(number, tensors)
        return tensors

    def _module_tensors(self, number: int, layer: LayerSizes, module: str, theirs: str) -> list[TensorSource]:
        weight, bias = (self._name(layer.place, module, kind) for kind in ("weight", "bias"))
        heads = {"attn_q": layer.heads, "attn_k": layer.kv_heads}.get(theirs, 0) if self._pairs() else 0
        interleaved = layer.heads if module in self.table.interleaved else 0
        matrix = len(stored_shape(self.shapes, weight)) == 2
        how = {
            "heads": heads,
            "interleaved": interleaved,
            "transposed": matrix and self.family.weight_layout == "in_out",
            "offset": 0.0 if matrix else self.table.norm_offset,
        }
        tensors = [self._tensor(f"blk.{number}.{theirs}.weight", weight, **how)]
        if bias in self.shapes and module in self.table.biases:
            tensors.append(self._tensor(f"blk.{number}.{theirs}.bias", bias, heads=heads, interleaved=interleaved))
        return tensors

    def _pairs(self) -> bool:
        return self.table.rope == "pairs" or self.architecture == "deci"

    def _stand_ins(self, number: int, layer: LayerSizes) -> list[TensorSource]:
        """Return zeros for sub-layers that the loader cannot do without."""
        hidden, tensors = self.sizes["hidden_size"], []
        if self._needs_head(number, layer):
            shapes: dict[str, tuple[int, ...]] = {
                name: (self.head_dim, hidden) for name in ("attn_q", "attn_k", "attn_v")
            }
            shapes |= {"attn_output": (hidden, self.head_dim), "attn_norm": (hidden,)}
            shapes |= {name: (self.head_dim,) for name in ("attn_q_norm", "attn_k_norm") if name in self.modules}
            tensors += _constants(number, shapes)
        if not layer.width:
            width = _STAND_IN_WIDTH
            tensors += _constants(
                number,
                {
                    "ffn_gate": (width, hidden),
                    "ffn_up": (width, hidden),
                    "ffn_down": (hidden, width),
                    "ffn_norm": (hidden,),
                },
            )
        return tensors

    def _needs_head(self, number: int, layer: LayerSizes) -> bool:
        return not layer.heads and (number == 0 or self.architecture == "openelm")

    def _rope_factors(self) -> list[TensorSource]:
        rope = self._rope()
        kind = rope.get("rope_type", "default")
        if self.table.rope == "none" or kind in ("default", "linear"):
            return []
        if kind != "llama3" or self.architecture not in ("llama", "deci"):
            raise ExportError(
                f"this model scales its rotary positions by {kind!r}, which is not written as GGUF yet; known: "
                "default, linear, llama3. Use the Hugging Face folder."
            )
        factors = llama3_factors(self.head_dim, rope)
        return [TensorSource("rope_freqs.weight", (len(factors),), values=factors)]

    def _rope(self) -> dict[str, Any]:
        rope = dict(self.config.get("rope_parameters") or {})
        return dict(rope["full_attention"]) if "full_attention" in rope else rope

    def _require_all_used(self) -> None:
        ignored = tuple(f".{name}" for name in (*self.table.ignored, "rotary_emb.inv_freq"))
        left = sorted(name for name in set(self.shapes) - self.used if not name.endswith(ignored))
        if left:
            raise ExportError(
                f"llama.cpp's {self.architecture} has no place for {', '.join(left[:4])}"
                f"{f' and {len(left) - 4} more' if len(left) > 4 else ''}; leaving them out would change the model. "
                "Use the Hugging Face folder."
            )

    def _metadata(self) -> dict[str, Value]:
        per_layer = self.architecture in _PER_LAYER
        rows: dict[str, list[int]] = {
            "attention.head_count": [],
            "attention.head_count_kv": [],
            "feed_forward_length": [],
        }
        for number, layer in enumerate(self.layers):
            stand_in = int(per_layer and self._needs_head(number, layer))
            rows["attention.head_count"].append(layer.heads or stand_in)
            rows["attention.head_count_kv"].append(layer.kv_heads or stand_in)
            rows["feed_forward_length"].append(layer.width or _STAND_IN_WIDTH)
        data: dict[str, Value] = {
            "block_count": len(self.layers),
            "context_length": self._context(),
            "embedding_length": self.sizes["hidden_size"],
            "vocab_size": stored_shape(self.shapes, next(iter(self.table.model)) + ".weight")[0],
            **{key: values if per_layer else values[0] for key, values in rows.items()},
        }
        for key, name in self.table.metadata.items():
            value = self.config.get(name)
            if value is not None:
                data[key] = value
        return {f"{self.architecture}.{key}": value for key, value in (data | self._rope_metadata()).items()}

    def _context(self) -> int:
        context, window = int(self.config[self.table.context]), self.config.get("sliding_window")
        if self.table.window_limits_context and window and window < context:
            self.notes.append(
                f"llama.cpp does not slide this architecture's window of {window} tokens, so that is the context "
                f"length written (the model's is {context})."
            )
            return int(window)
        return context

    def _rope_metadata(self) -> dict[str, Value]:
        if self.table.rope == "none":
            return {}
        rope = self._rope()
        dimensions = int(self.head_dim * float(rope.get("partial_rotary_factor") or 1.0))
        data: dict[str, Value] = {
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "rope.dimension_count": dimensions,
            "rope.freq_base": float(rope["rope_theta"]),
        }
        local = dict(self.config.get("rope_parameters") or {}).get("sliding_attention")
        if local:
            data["rope.freq_base_swa"] = float(local["rope_theta"])
        if rope.get("rope_type") == "linear":
            data |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
        return data


def llama3_factors(head_dim: int, rope: Mapping[str, Any]) -> tuple[float, ...]:
    """Return what each rotary frequency is divided by (Llama 3.1's scaling): 1 for short waves, ``factor`` for long."""
    factor, context = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    factors = []
    for pair in range(head_dim // 2):
        turns = context / (2 * math.pi * float(rope["rope_theta"]) ** (2 * pair / head_dim))
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / factor + smooth))
    return tuple(factors)


def _constants(number: int, shapes: Mapping[str, tuple[int, ...]]) -> list[TensorSource]:
    """Return matrices of zeros and norms of ones."""
    return [
        TensorSource(f"blk.{number}.{name}.weight", shape, values=(0.0 if len(shape) == 2 else 1.0,))
        for name, shape in shapes.items()
    ]


def _fused(number: int, tensors: Sequence[TensorSource]) -> list[TensorSource]:
    """Return the tensors with queries, keys and values in one, as ``openelm`` wants them."""
    names = [f"blk.{number}.attn_{part}.weight" for part in "qkv"]
    by_name = {tensor.name: tensor for tensor in tensors}
    parts = [by_name.pop(name) for name in names]
    fused = TensorSource(
        f"blk.{number}.attn_qkv.weight",
        (sum(part.shape[0] for part in parts), *parts[0].shape[1:]),
        tuple(name for part in parts for name in part.parameters),
        values=parts[0].values,
    )
    return [fused, *by_name.values()]
