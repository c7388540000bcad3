"""A pruned model as one GGUF file for llama.cpp and what is built on it; read back and compared before it is named.

The ``gguf`` library writes; llama.cpp itself is needed for k-quants only. Parameters are read, converted and written
one at a time. What comes from where is decided in ``gguf_architectures``, ``gguf_tokenizer`` and ``gguf_types``.
"""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, quants
from numpy.typing import NDArray

from secateur.errors import ExportError
from secateur.export import ggml
from secateur.export.gguf_architectures import Layout, TensorSource, Value, plan_layout
from secateur.export.gguf_tokenizer import TokenizerLayout, plan_tokenizer
from secateur.export.gguf_types import Quantization, kind_notes, pack, quantization, tensor_kinds
from secateur.export.stored import StoredParameters, load_description, open_parameters
from secateur.files import replacing_path
from secateur.store.artifacts import disk_errors
from secateur.store.checkpoints import read_generation_config
from secateur.store.tokenizers import tokenizer_data

Array = NDArray[np.float32]

_STEP = {
    "F32": 0.0,
    "F16": 2**-10,
    "BF16": 2**-8,
    "Q8_0": 1 / 126,
    "Q5_1": 1 / 14,
    "Q5_0": 1 / 14,
    "Q4_1": 1 / 6,
    "Q4_0": 1 / 6,
    "Q6_K": 0.04,
    "Q5_K": 0.09,
    "Q4_K": 0.16,
    "Q3_K": 0.35,
    "Q2_K": 0.7,
}
"""Largest allowed difference of a weight, over the largest of its row; for k-quants 1.3 times what was seen."""
_SMALLEST = 1e-5
_FACTOR = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 16, "Q5_K": 63 * 32, "Q6_K": 128 * 32}
"""The largest number that a k-quant multiplies its float16 scales by."""


@dataclass(frozen=True, slots=True)
class GgufReport:
    """What was written.

    Attributes:
        file: where.
        architecture: llama.cpp's name; ``deci`` or ``openelm`` where layers differ.
        quantization: of the matrices, or the mixture of theirs; norms and biases are F32.
        num_tensors: in the file.
        size_bytes: of the file.
        largest_error: largest difference between a weight read back and the model's, over the largest of its row.
        notes: what a user of the file should know.
    """

    file: Path
    architecture: str
    quantization: str
    num_tensors: int
    size_bytes: int
    largest_error: float
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GgufPlan:
    """What a GGUF file will hold.

    Attributes:
        layout: tensors and the model's metadata.
        tokenizer: metadata of the tokenizer; None where none was given.
        quantization: of the matrices.
        kinds: type of every tensor, by name.
    """

    layout: Layout
    tokenizer: TokenizerLayout | None
    quantization: Quantization
    kinds: Mapping[str, GGMLQuantizationType]

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user of the file should know."""
        described = () if self.tokenizer is None else self.tokenizer.notes
        return (*self.layout.notes, *described, *kind_notes(self.layout, self.kinds, self.quantization))


def plan_gguf(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    quantize: str = "F16",
    tokenizer: Any = None,
    generation: Mapping[str, Any] | None = None,
) -> GgufPlan:
    """Return what a model's GGUF file will hold; no weight is read.

    Args:
        config: the plain data of its configuration, defaults included.
        shapes: the shape of every stored parameter.
        quantize: one of ``gguf_types.QUANTIZATIONS``.
        tokenizer: its transformers tokenizer; None leaves the tokenizer out of the check.
        generation: the plain data of its generation configuration.

    Raises:
        ExportError: llama.cpp cannot express the model, its tokenizer or the quantisation.
    """
    chosen = quantization(quantize)
    layout = plan_layout(config, shapes)
    described = None
    if tokenizer is not None:
        rows = layout.metadata[f"{layout.architecture}.vocab_size"]
        assert isinstance(rows, int)
        described = plan_tokenizer(tokenizer_data(tokenizer), _special_ids(config, generation or {}, tokenizer), rows)
    return GgufPlan(layout, described, chosen, tensor_kinds(layout, chosen))


def export_gguf(
    folder: Path,
    target: Path,
    *,
    quantize: str = "F16",
    name: str = "",
    check: Callable[[Path], None] = lambda file: None,
) -> GgufReport:
    """Write the model in a Hugging Face folder as a GGUF file, read it back, and return what was written.

    The file appears under its name only after every tensor and every key agreed with the model.

    Args:
        folder: model, configuration and tokenizer, as ``export_huggingface`` writes them.
        target: the file; replaced if it exists.
        quantize: one of ``gguf_types.QUANTIZATIONS``.
        name: of the model, for those who read the file; by default the folder's.
        check: called with the finished file before it gets its name; where it raises, there is no such name.

    Raises:
        ExportError: llama.cpp cannot express the model, its tokenizer or the quantisation; the disk is full; or the
            file does not read back as the model.
        UnavailableError: the quantisation needs llama.cpp's own library, and it is not installed.
    """
    if quantization(quantize).is_mixture:
        ggml.require_ggml()
    with open_parameters(folder) as parameters:
        config, tokenizer = load_description(folder)
        planned = plan_gguf(
            config,
            parameters.shapes,
            quantize=quantize,
            tokenizer=tokenizer,
            generation=read_generation_config(folder),
        )
        layout, kinds = planned.layout, planned.kinds
        assert planned.tokenizer is not None
        size = sum(_num_bytes(tensor.shape, kinds[tensor.name]) for tensor in layout.tensors)
        metadata = {
            "general.name": _model_name(name or folder.resolve().name, tokenizer),
            "general.file_type": planned.quantization.file_type,
            "general.quantization_version": 2,
            **layout.metadata,
            **planned.tokenizer.metadata,
            **_chat_template(tokenizer),
        }
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _require_space(target, size)
            with replacing_path(target) as work:
                _write(work, layout, metadata, kinds, parameters)
                error = _compare(work, layout, metadata, kinds, parameters)
                check(work)
        return GgufReport(
            file=target,
            architecture=layout.architecture,
            quantization=planned.quantization.name,
            num_tensors=len(layout.tensors),
            size_bytes=target.stat().st_size,
            largest_error=error,
            notes=planned.notes,
        )


def _chat_template(tokenizer: Any) -> dict[str, Value]:
    template = tokenizer.chat_template
    template = template.get("default") if isinstance(template, dict) else template
    return {"tokenizer.chat_template": template} if template else {}


def _model_name(name: str, tokenizer: Any) -> str:
    """Return the name to write; at one with "phi-3" llama.cpp looks for Phi-3's tokens, to drop spaces after them."""
    wanted = {"<unk>", "<s>", "<|endoftext|>"} <= set(tokenizer.get_vocab()) and any(
        token.rstrip for token in tokenizer.added_tokens_decoder.values()
    )
    plain = re.sub(r"(?i)phi-?(?=3)", "phi ", name)
    if wanted:
        return name if plain != name else f"phi-3 {name}"
    return plain


def _special_ids(config: Mapping[str, Any], generation: Mapping[str, Any], tokenizer: Any) -> dict[str, int]:
    """Return the ids that llama.cpp treats specially; a second end token becomes its end of turn."""
    ends = config.get("eos_token_id")
    ends = list(ends) if isinstance(ends, list) else [ends]
    more = generation.get("eos_token_id")
    ends += more if isinstance(more, list) else [more]
    first = tokenizer.eos_token_id
    ids = {
        "bos": tokenizer.bos_token_id if tokenizer.bos_token_id is not None else config.get("bos_token_id"),
        "eos": first if first is not None else ends[0],
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id if tokenizer.pad_token_id is not None else config.get("pad_token_id"),
    }
    others = [end for end in dict.fromkeys(ends) if end is not None and end != ids["eos"]]
    ids["eot"] = others[0] if others else None
    return {name: int(number) for name, number in ids.items() if number is not None}


def _num_bytes(shape: tuple[int, ...], kind: GGMLQuantizationType) -> int:
    block, size = GGML_QUANT_SIZES[kind]
    return math.prod(shape) // int(block) * int(size)


def _require_space(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ExportError(
            f"{target.parent} has {free / 1e9:.2f} GB free and the file needs {size / 1e9:.2f} GB. Free space, or "
            "choose another output or a smaller quantisation."
        )


def _values(tensor: TensorSource, parameters: StoredParameters) -> Array:
    """Return a tensor in float32, in llama.cpp's order."""
    if not tensor.parameters:
        filled: Array = np.broadcast_to(np.array(tensor.values, dtype=np.float32), tensor.shape).copy()
        return filled
    parts = [parameters.read(name).float().numpy() for name in tensor.parameters]
    array = parts[0] if len(parts) == 1 else np.concatenate(parts)
    if tensor.transposed:
        array = array.T
    if tensor.interleaved:
        array = _queries_first(array, tensor.interleaved)
    if tensor.heads:
        array = _rotary_pairs(array, tensor.heads)
    if tensor.offset:
        array = array + np.float32(tensor.offset)
    return np.ascontiguousarray(array)


def _rotary_pairs(rows: Array, heads: int) -> Array:
    """Return the rows with those that rotate together side by side; transformers keeps them half a head apart."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _queries_first(rows: Array, heads: int) -> Array:
    """Return the rows of queries, then keys, then values; GPT-NeoX keeps the three of each head together."""
    parts = rows.reshape(heads, 3, len(rows) // heads // 3, *rows.shape[1:])
    return parts.swapaxes(0, 1).reshape(rows.shape)


def _write(
    file: Path,
    layout: Layout,
    metadata: Mapping[str, Value],
    kinds: Mapping[str, GGMLQuantizationType],
    parameters: StoredParameters,
) -> None:
    writer = GGUFWriter(file, layout.architecture)
    try:
        for key, value in metadata.items():
            _add(writer, key, value)
        for tensor in layout.tensors:
            kind = kinds[tensor.name]
            size = _num_bytes(tensor.shape, kind)
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in layout.tensors:
            writer.write_tensor_data(_quantized(tensor, kinds[tensor.name], parameters))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _quantized(tensor: TensorSource, kind: GGMLQuantizationType, parameters: StoredParameters) -> NDArray[Any]:
    values = _values(tensor, parameters)
    if not np.isfinite(values).all():
        raise ExportError(f"{', '.join(tensor.parameters)} has values that are not finite. Prune again.")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        stored: NDArray[Any] = pack(values, kind)
    if stored.dtype == np.float16 and not np.isfinite(stored).all():
        raise ExportError(
            f"{', '.join(tensor.parameters)} has the value {np.abs(values).max():.3g}, and float16 ends at 65504. "
            "Write BF16 or F32."
        )
    return stored


def _compare(
    file: Path,
    layout: Layout,
    metadata: Mapping[str, Value],
    kinds: Mapping[str, GGMLQuantizationType],
    parameters: StoredParameters,
) -> float:
    """Return the largest error of a file against its model, over the largest weight of a row."""
    reader = GGUFReader(file)
    for key, value in {"general.architecture": layout.architecture, **metadata}.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if not _same(found, value):
            raise ExportError(f"{key} reads back as {found!r:.200} instead of {value!r:.200}; the file is not kept.")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    if list(stored) != [tensor.name for tensor in layout.tensors]:
        raise ExportError("the file reads back with other tensors than were written; it is not kept.")
    return max(_error(tensor, stored[tensor.name], kinds[tensor.name], parameters) for tensor in layout.tensors)


def _same(found: Any, value: Value) -> bool:
    if isinstance(value, float):
        return bool(np.float32(value) == np.float32(found))
    if isinstance(value, list) and value and isinstance(value[0], float):
        return bool(np.array_equal(np.array(value, np.float32), np.array(found, np.float32)))
    return bool(found == value)


def _error(tensor: TensorSource, stored: Any, kind: GGMLQuantizationType, parameters: StoredParameters) -> float:
    expected = _values(tensor, parameters)
    found = quants.dequantize(stored.data, kind)
    if found.shape != expected.shape:
        raise ExportError(
            f"{tensor.name} reads back as {found.shape} instead of {expected.shape}; the file is not kept."
        )
    largest = np.abs(expected).max(axis=-1, initial=0.0)
    difference = np.abs(found - expected).max(axis=-1, initial=0.0)
    wrong = difference > _STEP[kind.name] * largest + _coarseness(kind)
    if wrong.any() or not np.isfinite(found).all():
        raise ExportError(
            f"{tensor.name} reads back with an error of {difference.max():.3g}; the file is not kept. Report this."
        )
    return float((difference / np.maximum(largest, _SMALLEST)).max(initial=0.0))


def _coarseness(kind: GGMLQuantizationType) -> float:
    """Return the largest difference that the short exponents of float16 scales make, however small the weights are."""
    if kind == GGMLQuantizationType.F32:
        return 0.0
    return max(_SMALLEST, _FACTOR.get(kind.name, 0) * 2.0**-25)
