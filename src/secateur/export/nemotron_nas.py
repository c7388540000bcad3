"""A Llama-like model as a Nemotron-NAS folder, which engines with static model code read layer by layer.

NVIDIA's Nemotron models of this type have layers of different sizes, described in ``block_configs``; vLLM, SGLang,
TensorRT-LLM, ExLlamaV3 and mlx-lm have a class for them (``DeciLMForCausalLM``). It computes what Llama computes, with
three limits: every layer has all query heads, feed-forward widths come from a factor that is rounded up to multiples of
256, and there are no biases (TensorRT-LLM and SGLang would leave them out without a word). What does not fit is
refused, or filled up with zeros, which changes no answer and saves no time.

Source: vLLM ``nemotron_nas.py``, SGLang ``nemotron_nas.py``, TensorRT-LLM ``modeling_nemotron_nas.py``, mlx-lm
``nemotron-nas.py`` and NVIDIA's own configuration class of Llama-3_1-Nemotron-51B, read for the formulas.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from secateur.errors import ExportError
from secateur.export.stored import (
    LayerSizes,
    Shapes,
    StoredParameters,
    load_description,
    open_parameters,
    stored_shape,
)
from secateur.families.geometry import resolve_dimensions
from secateur.families.loader import dense_model_type, families
from secateur.store.artifacts import atomic_folder, disk_errors, write_json
from secateur.store.checkpoints import copy_side_files
from secateur.store.tokenizers import compare_reloaded_tokenizer, save_tokenizer

FAMILIES = ("llama", "mistral")
"""The families whose layers are computed as Llama's, without biases."""
WIDTH_MULTIPLE = 256
"""Readers round feed-forward widths up to multiples of this number."""
CONFIGURATION_FILE = "configuration_decilm.py"
_TEMPLATE = Path(__file__).with_name("templates") / f"{CONFIGURATION_FILE}.template"
_SHARD_BYTES = 4_000_000_000
_LISTED = 4
_CARRIED = (
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
    "rms_norm_eps",
    "hidden_act",
    "initializer_range",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "use_cache",
    "rope_parameters",
)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One tensor of the folder and how it is made from one parameter of the model.

    Attributes:
        name: in the folder.
        shape: of the tensor.
        parameter: in the model; None for one filled with ``fill``.
        axis: along which blocks are laid anew; None copies the parameter as it is.
        block: rows (or columns) in a block.
        blocks: per block of the tensor, which block of the parameter it is; -1 for zeros.
        fill: the value of a tensor that no parameter gives.
    """

    name: str
    shape: tuple[int, ...]
    parameter: str | None
    axis: int | None = None
    block: int = 1
    blocks: tuple[int, ...] = ()
    fill: float = 0.0


@dataclass(frozen=True, slots=True)
class NemotronNasPlan:
    """A model as a Nemotron-NAS folder describes it.

    Attributes:
        config: the contents of config.json, but for the data type.
        tensors: what the folder holds.
        added_parameters: numbers that filling up adds; 0 where nothing is filled.
        notes: what the reader of the folder should know.
    """

    config: Mapping[str, Any]
    tensors: tuple[TensorPlan, ...]
    added_parameters: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NemotronNasReport:
    """What was written.

    Attributes:
        path: the folder.
        num_layers: in the folder; layers that had lost both sub-layers are left out.
        num_tensors: in the folder.
        size_bytes: of the weight files.
        added_parameters: zeros added to fill layers up.
        notes: what the reader of the folder should know.
    """

    path: Path
    num_layers: int
    num_tensors: int
    size_bytes: int
    added_parameters: int
    notes: tuple[str, ...]


def width_of_ffn_mult(ffn_mult: float, hidden_size: int) -> int:
    """Return the feed-forward width that readers make of ``ffn_mult``: two thirds of it, in whole multiples of 256."""
    return math.ceil(int(2 * ffn_mult * hidden_size / 3) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def ffn_mult_of_width(width: int, hidden_size: int) -> float:
    """Return the ``ffn_mult`` from which every reader gets exactly ``width``.

    It has six decimals, because mlx-lm rounds it to so many before it computes the width.

    Raises:
        ExportError: the width is no positive multiple of 256, so no factor gives it.
    """
    if width < 1 or width % WIDTH_MULTIPLE:
        raise ExportError(
            f"no ffn_mult gives a feed-forward width of {width}; nearest that can be had: {_nearest(width)}."
        )
    ffn_mult = round(1.5 * width / hidden_size, 6)
    if width_of_ffn_mult(ffn_mult, hidden_size) != width:
        raise ExportError(f"no ffn_mult of six decimals gives the width {width} with hidden_size {hidden_size}.")
    return ffn_mult


def plan_nemotron_nas(config: Mapping[str, Any], shapes: Shapes, *, round_to_fit: bool = False) -> NemotronNasPlan:
    """Return the Nemotron-NAS form of a model.

    Args:
        config: the plain data of its configuration, defaults included.
        shapes: the shape of every stored parameter.
        round_to_fit: fill layers up with zeros where their sizes cannot be expressed, instead of refusing them.

    Raises:
        ExportError: the family is computed otherwise than Llama, or layers have sizes that cannot be expressed; they
            are named, with the nearest sizes that can.
    """
    return _Planner(config, shapes, round_to_fit).plan()


def export_nemotron_nas(folder: Path, target: Path, *, round_to_fit: bool = False) -> NemotronNasReport:
    """Write the model in a Hugging Face folder as a Nemotron-NAS folder, read it back, and return what was written.

    The folder appears under its name only after every tensor was read back equal, in the shape that ``block_configs``
    says.

    Args:
        folder: model, configuration and tokenizer, as ``export_huggingface`` writes them.
        target: the new folder; replaced if it exists.
        round_to_fit: fill layers up with zeros where their sizes cannot be expressed, instead of refusing them.

    Raises:
        ExportError: the model cannot be expressed, the disk is full, or the folder does not read back as the model.
    """
    with open_parameters(folder) as parameters:
        config, tokenizer = load_description(folder)
        plan = plan_nemotron_nas(config, parameters.shapes, round_to_fit=round_to_fit)
        with disk_errors(target), atomic_folder(target) as work:
            save_tokenizer(tokenizer, work)
            compare_reloaded_tokenizer(tokenizer, work, ())  # while no config.json asks for trust in its code
            dtype = _write_tensors(work, plan, parameters)
            write_json(work / "config.json", {**plan.config, "torch_dtype": dtype, "dtype": dtype})
            shutil.copyfile(_TEMPLATE, work / CONFIGURATION_FILE)
            _copy_beside(folder, work)
            size = _compare(work, plan, parameters)
    return NemotronNasReport(
        path=target,
        num_layers=plan.config["num_hidden_layers"],
        num_tensors=len(plan.tensors),
        size_bytes=size,
        added_parameters=plan.added_parameters,
        notes=plan.notes,
    )


class _Planner:
    def __init__(self, config: Mapping[str, Any], shapes: Shapes, round_to_fit: bool) -> None:
        self.config, self.shapes, self.round_to_fit = config, shapes, round_to_fit
        self.family = _family(str(config.get("model_type")))
        plain = {key: value for key, value in config.items() if key != "per_layer_config"}
        sizes = resolve_dimensions(self.family, plain)
        self.hidden, self.head_dim = sizes["hidden_size"], sizes["head_dim"]
        self.heads = self.hidden // self.head_dim
        self.prefix = self.family.layers
        self.places = sizes["num_layers"]
        self.tensors: list[TensorPlan] = []
        self.used: set[str] = set()
        self.added = 0

    def plan(self) -> NemotronNasPlan:
        self._require_values()
        layers = [layer for layer in map(self._layer, range(self.places)) if layer.heads or layer.width]
        if not layers:
            raise ExportError("every layer of this model was removed, and engines need one. Keep a layer.")
        if not self.round_to_fit:
            self._require_sizes(layers)
        self._copy("model.embed_tokens.weight")
        blocks = [self._block(number, layer) for number, layer in enumerate(layers)]
        self._copy("model.norm.weight")
        if not self.config.get("tie_word_embeddings"):
            self._copy("lm_head.weight")
        self._require_all_used()
        return NemotronNasPlan(
            self._config(blocks), tuple(self.tensors), self.added, tuple(self._notes(layers, blocks))
        )

    def _require_values(self) -> None:
        found = {name: self.config.get(name) for name in ("hidden_act", "attention_bias", "mlp_bias")}
        if found["hidden_act"] not in (None, "silu", "swish"):
            raise ExportError(
                f"hidden_act of this model is {found['hidden_act']!r}, and Nemotron-NAS computes with 'silu'. Use the "
                "Hugging Face folder."
            )
        biases = sorted(name for name in self.shapes if name.endswith(".bias"))
        if biases:
            raise ExportError(
                f"this model has biases ({_listed(biases)}), and TensorRT-LLM and SGLang would leave them out of a "
                "Nemotron-NAS model without a word. Use the Hugging Face folder."
            )
        rope = self.config.get("rope_parameters") or {}
        kind, share = rope.get("rope_type", "default"), rope.get("partial_rotary_factor") or 1.0
        if kind not in ("default", "llama3") or share != 1.0:
            what = repr(kind) if share == 1.0 else f"a share of {share} of each head"
            raise ExportError(
                f"the rotary positions of this model are {what}, and Nemotron models have 'default' and 'llama3'. Use "
                "the Hugging Face folder."
            )
        if self.hidden % self.head_dim:
            raise ExportError(
                f"hidden_size {self.hidden} of this model is no multiple of its head_dim {self.head_dim}, and engines "
                "derive the heads of a Nemotron-NAS model from both. Use the Hugging Face folder."
            )

    def _name(self, place: int, module: str) -> str:
        return f"{self.prefix}.{place}.{module}.weight"

    def _layer(self, place: int) -> LayerSizes:
        down = self.shapes.get(self._name(place, "mlp.down_proj"))
        width = 0 if down is None else down[1]
        if self._name(place, "self_attn.o_proj") not in self.shapes:
            return LayerSizes(place, 0, 0, width)
        rows = [stored_shape(self.shapes, self._name(place, f"self_attn.{part}_proj"))[0] for part in "qk"]
        heads = rows[0] // self.head_dim
        if heads > self.heads:
            raise ExportError(
                f"layer {place} of this model has {heads} query heads of {self.head_dim}, more than hidden_size "
                f"{self.hidden} holds, and Nemotron-NAS cannot say so. Use the Hugging Face folder."
            )
        return LayerSizes(place, heads, rows[1] // self.head_dim, width)

    def _require_sizes(self, layers: Sequence[LayerSizes]) -> None:
        """Refuse what ``block_configs`` cannot say, all of it at once."""
        widths = [
            f"layer {layer.place} has {layer.width} (nearest: {_nearest(layer.width)})"
            for layer in layers
            if layer.width % WIDTH_MULTIPLE
        ]
        heads = [f"layer {layer.place} has {layer.heads}" for layer in layers if layer.heads not in (0, self.heads)]
        problems = []
        if widths:
            problems.append(f"feed-forward widths must be multiples of {WIDTH_MULTIPLE}, and {_listed(widths)}")
        if heads:
            problems.append(f"every attention must keep {self.heads} query heads, and {_listed(heads)}")
        if not layers[0].heads:
            problems.append(f"the first layer must have attention, and layer {layers[0].place} has none")
        if problems:
            raise ExportError(
                f"Nemotron-NAS cannot say this model's sizes: {'; '.join(problems)}. Prune channels in multiples of "
                f"{WIDTH_MULTIPLE}, and whole layers or sub-layers instead of gqa_groups and query_heads."
            )

    def _block(self, number: int, layer: LayerSizes) -> dict[str, Any]:
        return {"attention": self._attention(number, layer), "ffn": self._ffn(number, layer)}

    def _attention(self, number: int, layer: LayerSizes) -> dict[str, Any]:
        if not layer.heads and number:
            return {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False}
        kv_heads, queries, keys = _grouping(layer, self.heads)
        wide, narrow = self.heads * self.head_dim, kv_heads * self.head_dim
        for part, shape, axis, blocks in (
            ("q_proj", (wide, self.hidden), 0, queries),
            ("k_proj", (narrow, self.hidden), 0, keys),
            ("v_proj", (narrow, self.hidden), 0, keys),
            ("o_proj", (self.hidden, wide), 1, queries),
        ):
            self._lay(number, layer.place, f"self_attn.{part}", shape, axis, self.head_dim, blocks)
        norm = () if layer.heads else (-1,)
        self._lay(number, layer.place, "input_layernorm", (self.hidden,), None, 1, norm, fill=1.0)
        return {"n_heads_in_group": self.heads // kv_heads, "no_op": False, "replace_with_linear": False}

    def _ffn(self, number: int, layer: LayerSizes) -> dict[str, Any]:
        if not layer.width:
            return {"ffn_mult": None, "no_op": True, "replace_with_linear": False}
        width = math.ceil(layer.width / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        blocks = (*range(layer.width), *[-1] * (width - layer.width))
        for part, shape, axis in (
            ("gate_proj", (width, self.hidden), 0),
            ("up_proj", (width, self.hidden), 0),
            ("down_proj", (self.hidden, width), 1),
        ):
            self._lay(number, layer.place, f"mlp.{part}", shape, axis, 1, blocks)
        self._lay(number, layer.place, "post_attention_layernorm", (self.hidden,), None, 1, ())
        return {
            "ffn_mult": ffn_mult_of_width(width, self.hidden),
            "no_op": False,
            "replace_with_linear": False,
        }

    def _lay(
        self,
        number: int,
        place: int,
        module: str,
        shape: tuple[int, ...],
        axis: int | None,
        block: int,
        blocks: tuple[int, ...],
        fill: float = 0.0,
    ) -> None:
        """Add a layer's tensor, made from the parameter of the same name at another place."""
        target, source = self._name(number, module), self._name(place, module)
        if set(blocks) == {-1}:
            self.tensors.append(TensorPlan(target, shape, None, fill=fill))
            self.added += math.prod(shape)
            return
        found = stored_shape(self.shapes, source)
        self.used.add(source)
        self.added += math.prod(shape) - math.prod(found)
        if found == shape and blocks == tuple(range(len(blocks))):
            axis, block, blocks = None, 1, ()
        self.tensors.append(TensorPlan(target, shape, source, axis, block, blocks))

    def _copy(self, name: str) -> None:
        self.tensors.append(TensorPlan(name, stored_shape(self.shapes, name), name))
        self.used.add(name)

    def _require_all_used(self) -> None:
        tied = {"lm_head.weight"} if self.config.get("tie_word_embeddings") else set()
        left = sorted(name for name in set(self.shapes) - self.used - tied if not name.endswith("rotary_emb.inv_freq"))
        if left:
            raise ExportError(
                f"Nemotron-NAS has no place for {_listed(left)};"
                " leaving them out would change the model. Use the Hugging Face folder."
            )

    def _config(self, blocks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        carried = {name: self.config[name] for name in _CARRIED if self.config.get(name) is not None}
        rope = dict(self.config.get("rope_parameters") or {})
        theta = float(rope.pop("rope_theta", self.config.get("rope_theta") or 10000.0))
        groups = [block["attention"]["n_heads_in_group"] for block in blocks if not block["attention"]["no_op"]]
        factors = [block["ffn"]["ffn_mult"] for block in blocks if not block["ffn"]["no_op"]]
        return {
            "architectures": ["DeciLMForCausalLM"],
            "model_type": "nemotron-nas",
            "auto_map": {"AutoConfig": f"{CONFIGURATION_FILE.removesuffix('.py')}.DeciLMConfig"},
            **carried,
            "max_position_embeddings": self._context(),
            "num_hidden_layers": len(blocks),
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads // min(groups),
            "head_dim": self.head_dim,
            "intermediate_size": max((width_of_ffn_mult(factor, self.hidden) for factor in factors), default=256),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": theta,
            "rope_scaling": rope if rope.get("rope_type", "default") != "default" else None,
            "block_configs": list(blocks),
        }

    def _context(self) -> int:
        context, window = int(self.config["max_position_embeddings"]), self.config.get("sliding_window")
        return min(context, int(window)) if window else context

    def _notes(self, layers: Sequence[LayerSizes], blocks: Sequence[Mapping[str, Any]]) -> list[str]:
        notes = [f"Engines ask to trust the folder's code, {CONFIGURATION_FILE}, which reads block_configs."]
        if self.added:
            filled = sum(
                layer.heads != self.heads or bool(layer.width % WIDTH_MULTIPLE)
                for number, layer in enumerate(layers)
                if layer.heads or not number or layer.width % WIDTH_MULTIPLE
            )
            notes.append(f"{self.added:,} zeros were added in {filled} layers; they cost memory and time.")
        groups = {block["attention"]["n_heads_in_group"] for block in blocks} - {None}
        if len(groups) > 1:
            notes.append(
                f"Layers have {_words(sorted(self.heads // group for group in groups))} key/value heads; SGLang "
                "refuses Nemotron-NAS models in which that number differs."
            )
        if self._context() < int(self.config["max_position_embeddings"]):
            notes.append(
                f"Nemotron-NAS has no sliding window, so the context length written is the window of {self._context()} "
                f"tokens (the model's is {self.config['max_position_embeddings']})."
            )
        left_out = self.places - len(layers)
        if left_out:
            notes.append(f"{left_out} layers that had lost both sub-layers were left out; later ones moved up.")
        return notes


def _family(model_type: str) -> Any:
    for name in FAMILIES:
        if dense_model_type(model_type) in families()[name].model_types:
            return families()[name]
    raise ExportError(
        f"models of type {dense_model_type(model_type)!r} are computed otherwise than Nemotron-NAS ones; those that "
        f"can be written so: {', '.join(FAMILIES)}. Use the Hugging Face folder."
    )


def _nearest(width: int) -> str:
    below = width // WIDTH_MULTIPLE * WIDTH_MULTIPLE
    return f"{below} or {below + WIDTH_MULTIPLE}" if below else str(WIDTH_MULTIPLE)


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return f"{', '.join(items[:_LISTED])}{more}"


def _words(numbers: Sequence[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"


def _grouping(layer: LayerSizes, heads: int) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Return key/value heads, and which query and key/value head of the layer stands at each place; -1 is zeros.

    Of all numbers of key/value heads that divide the query heads the smallest is taken. A group with more query heads
    than fit into one of the new groups is spread over several, each with a copy of its key/value head.
    """
    if not layer.heads:
        return 1, (-1,) * heads, (-1,)
    each = layer.heads // layer.kv_heads
    for kv_heads in (number for number in range(1, heads + 1) if heads % number == 0):
        room = heads // kv_heads
        copies = math.ceil(each / room)
        if layer.kv_heads * copies <= kv_heads:
            break
    queries, keys = [-1] * heads, [-1] * kv_heads
    for head in range(layer.heads):
        group, inside = divmod(head, each)
        new = group * copies + inside // room
        queries[new * room + inside % room] = head
        keys[new] = group
    return kv_heads, tuple(queries), tuple(keys)


def _copy_beside(folder: Path, work: Path) -> None:
    """Copy the generation configuration and licence texts."""
    copy_side_files(folder, work)
    generation = folder / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, work / generation.name)


def _make(tensor: TensorPlan, parameters: StoredParameters, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the folder."""
    if tensor.parameter is None:
        return torch.full(tensor.shape, tensor.fill, dtype=dtype)
    source = parameters.read(tensor.parameter)
    if not bool(torch.isfinite(source).all()):
        raise ExportError(f"{tensor.parameter} has values that are not finite. Prune again.")
    if tensor.axis is None:
        return source.contiguous()
    made = source.new_zeros(tensor.shape)
    kept = [place for place, block in enumerate(tensor.blocks) if block >= 0]
    taken = [tensor.blocks[place] for place in kept]
    made.index_copy_(
        tensor.axis,
        _indices(kept, tensor.block),
        source.index_select(tensor.axis, _indices(taken, tensor.block)),
    )
    return made


def _indices(blocks: Sequence[int], block: int) -> Tensor:
    return (torch.tensor(blocks)[:, None] * block + torch.arange(block)).flatten()


def _write_tensors(work: Path, plan: NemotronNasPlan, parameters: StoredParameters) -> str:
    """Write the tensors in files of at most 4 GB and return the name of their data type."""
    dtype = parameters.read(plan.tensors[0].parameter or "").dtype
    shards: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in plan.tensors:
        size = math.prod(tensor.shape) * dtype.itemsize
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if shards[1:] else "model.safetensors"
        save_file(
            {tensor.name: _make(tensor, parameters, dtype) for tensor in shard}, work / name, metadata={"format": "pt"}
        )
        places |= {tensor.name: name for tensor in shard}
    if shards[1:]:
        total = sum(math.prod(tensor.shape) for tensor in plan.tensors) * dtype.itemsize
        write_json(work / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
    return str(dtype).removeprefix("torch.")


def _compare(work: Path, plan: NemotronNasPlan, parameters: StoredParameters) -> int:
    """Read the folder back, compare it with the model and its own config.json, and return the bytes of its weights."""
    config = json.loads((work / "config.json").read_text(encoding="utf-8"))
    expected = expected_shapes(config)
    with open_parameters(work) as written:
        if written.shapes != expected:
            wrong = sorted(set(written.shapes.items()) ^ set(expected.items()))
            raise ExportError(f"the folder reads back with other tensors than its config.json says: {wrong[:3]}.")
        for tensor in plan.tensors:
            found = written.read(tensor.name)
            if not torch.equal(found, _make(tensor, parameters, found.dtype)):
                raise ExportError(f"{tensor.name} reads back differently; the folder is not kept.")
    return sum(file.stat().st_size for file in work.glob("*.safetensors"))


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the tensors that an engine makes room for, by name, from a Nemotron-NAS configuration alone."""
    hidden, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    head_dim = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number, block in enumerate(config["block_configs"]):
        parts: dict[str, tuple[int, ...]] = {}
        if not block["attention"]["no_op"]:
            narrow = heads // block["attention"]["n_heads_in_group"] * head_dim
            parts |= {"self_attn.q_proj": (heads * head_dim, hidden), "self_attn.o_proj": (hidden, heads * head_dim)}
            parts |= {"self_attn.k_proj": (narrow, hidden), "self_attn.v_proj": (narrow, hidden)}
            parts |= {"input_layernorm": (hidden,)}
        if not block["ffn"]["no_op"]:
            width = width_of_ffn_mult(block["ffn"]["ffn_mult"], hidden)
            parts |= {"mlp.gate_proj": (width, hidden), "mlp.up_proj": (width, hidden)}
            parts |= {"mlp.down_proj": (hidden, width), "post_attention_layernorm": (hidden,)}
        shapes |= {f"model.layers.{number}.{part}.weight": shape for part, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes
