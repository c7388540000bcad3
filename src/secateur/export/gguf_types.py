"""Which type each tensor of a GGUF file is stored in: one type for all matrices, or one of llama.cpp's mixtures.

A mixture such as Q4_K_M stores most matrices in one k-quant and gives more bits to those that lose most by it. Which
those are, and what is taken where a row is no whole number of blocks of 256, follows llama.cpp.

Source: llama.cpp, ``src/llama-quant.cpp`` (commit 007dbbf3, 2026), without its exceptions for Falcon, mixtures of
experts and the 70B Llama.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, LlamaFileType, quants
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from secateur.errors import ExportError
from secateur.export import ggml
from secateur.export.gguf_architectures import Layout, TensorSource

Kinds = Mapping[str, Kind]

PLAIN = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What the ``gguf`` library writes by itself."""
MIXTURES = ("Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_M", "Q2_K")
"""What llama.cpp's own library is needed for."""
QUANTIZATIONS = (*PLAIN, *MIXTURES)
SPEED_MULTIPLE = 32
"""Widths that are no multiple of this are slow in llama.cpp, whatever the type."""
_BLOCK = 32
"""Rows of quantised matrices are multiples of this: the block of the types that stand in for k-quants."""
_K_BLOCK = 256
_K_STEPS = 8
"""So many blocks of a k-quant a width must have before whole ones are worth the coarser choice of widths."""
_INSTEAD = {
    Kind.Q2_K: Kind.Q4_0,
    Kind.Q3_K: Kind.Q4_0,
    Kind.Q4_K: Kind.Q5_0,
    Kind.Q5_K: Kind.Q5_1,
    Kind.Q6_K: Kind.Q8_0,
}
_KEPT_WIDE = ("position_embd",)
_OUTER = ("token_embd", "output")
"""In four- and five-bit files these stay at eight bits: every token passes through them."""
_VALUES = ("attn_v", "attn_qkv")


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a file's matrices are stored.

    Attributes:
        name: one of ``QUANTIZATIONS``.
        kind: the type of most matrices.
        file_type: llama.cpp's number of it.
    """

    name: str
    kind: Kind
    file_type: int

    @property
    def is_mixture(self) -> bool:
        """Whether llama.cpp's library is needed to write it."""
        return self.name in MIXTURES


def quantization(name: str) -> Quantization:
    """Return a type or mixture by its name, in capitals or not.

    Raises:
        ExportError: it is not one of ``QUANTIZATIONS``.
    """
    known = name.upper()
    if known not in QUANTIZATIONS:
        raise ExportError(f"unknown quantisation {name!r}; known: {', '.join(QUANTIZATIONS)}.")
    file_type = LlamaFileType["ALL_F32" if known == "F32" else f"MOSTLY_{known}"]
    return Quantization(known, Kind[known.removesuffix("_M").removesuffix("_S")], int(file_type))


def needed_multiple(name: str) -> int:
    """Return what rows must be multiples of."""
    chosen = quantization(name)
    return _BLOCK if chosen.is_mixture else int(GGML_QUANT_SIZES[chosen.kind][0])


def advised_multiple(name: str, uneven: bool, width: int) -> int:
    """Return what feed-forward widths should be multiples of, in a model whose dense width is ``width``."""
    if quantization(name).is_mixture and width % _K_BLOCK == 0 and width >= _K_STEPS * _K_BLOCK:
        return _K_BLOCK
    return max(needed_multiple(name), SPEED_MULTIPLE if uneven else 1)


def bytes_per_weight(name: str) -> float:
    """Return what a weight takes in most matrices, scales included."""
    block, size = GGML_QUANT_SIZES[quantization(name).kind]
    return float(size / block)


def pack(values: NDArray[np.float32], kind: Kind) -> NDArray[np.generic]:
    """Return values as a type stores them.

    Raises:
        UnavailableError: llama.cpp's library is needed and not here.
    """
    stored: NDArray[np.generic] = ggml.quantize(values, kind) if kind in ggml.KINDS else quants.quantize(values, kind)
    return stored


# -- which tensor gets which type --------------------------------------------------------------------------------------


def tensor_kinds(layout: Layout, chosen: Quantization) -> dict[str, Kind]:
    """Return how every tensor is stored, by name; vectors and positions in F32, as llama.cpp wants them.

    Raises:
        ExportError: rows are no whole number of blocks; tensors and nearest widths are named.
    """
    matrices = [tensor for tensor in layout.tensors if _is_rounded(tensor)]
    kinds = {tensor.name: Kind.F32 for tensor in layout.tensors}
    kinds |= _mixed(layout, matrices, chosen) if chosen.is_mixture else _alike(matrices, chosen)
    _require_blocks(layout, kinds)
    return kinds


def kind_notes(layout: Layout, kinds: Kinds, chosen: Quantization) -> list[str]:
    """Return a sentence on matrices that are stored in other types, because their rows do not fit a k-quant."""
    if not chosen.is_mixture:
        return []
    matrices = [tensor for tensor in layout.tensors if _is_rounded(tensor)]
    other = [tensor for tensor in matrices if tensor.shape[-1] % _K_BLOCK]
    if not other:
        return []
    names = " and ".join(sorted({kinds[tensor.name].name for tensor in other}))
    return [
        f"{len(other)} of {len(matrices)} matrices have rows that are no multiple of {_K_BLOCK}; they are stored as "
        f"{names}, which take more bytes, as llama.cpp does."
    ]


def _is_rounded(tensor: TensorSource) -> bool:
    return len(tensor.shape) > 1 and _role(tensor) not in _KEPT_WIDE


def _role(tensor: TensorSource) -> str:
    """Return a tensor's name without layer and ending: ``ffn_down`` of ``blk.3.ffn_down.weight``."""
    return tensor.name.split(".")[-2]


def _alike(matrices: list[TensorSource], chosen: Quantization) -> dict[str, Kind]:
    outer = Kind.Q8_0 if chosen.name.startswith(("Q4", "Q5")) else chosen.kind
    return {tensor.name: outer if _role(tensor) in _OUTER else chosen.kind for tensor in matrices}


def _mixed(layout: Layout, matrices: list[TensorSource], chosen: Quantization) -> dict[str, Kind]:
    """Return the types of a mixture; a model without an output head reads the embedding as one."""
    head = "output" if any(_role(tensor) == "output" for tensor in matrices) else "token_embd"
    values = [tensor for tensor in matrices if _role(tensor) in _VALUES]
    downs = [tensor for tensor in matrices if _role(tensor) == "ffn_down"]
    shared = _queries_per_key(layout)
    kinds = {}
    for tensor in matrices:
        kind = chosen.kind
        if _role(tensor) == head:
            kind = Kind.Q6_K if tensor.shape[-1] % _K_BLOCK == 0 else Kind.Q8_0
        elif _role(tensor) in _VALUES:
            kind = _kind_of_values(chosen, values.index(tensor), len(values), shared)
        elif _role(tensor) == "ffn_down":
            kind = _kind_of_down(chosen, downs.index(tensor), len(downs))
        elif _role(tensor) == "attn_output":
            kind = {"Q2_K": Kind.Q3_K, "Q3_K_M": Kind.Q4_K}.get(chosen.name, kind)
        kinds[tensor.name] = _INSTEAD.get(kind, kind) if tensor.shape[-1] % _K_BLOCK else kind
    return kinds


def _kind_of_values(chosen: Quantization, number: int, count: int, queries_per_key: int) -> Kind:
    if chosen.name == "Q2_K":
        return Kind.Q4_K if queries_per_key >= 4 else Kind.Q3_K
    if chosen.name == "Q3_K_M":
        return Kind.Q5_K if number < 2 else Kind.Q4_K
    if chosen.name == "Q4_K_S" and number < 4:
        return Kind.Q5_K
    return Kind.Q6_K if chosen.name.endswith("_M") and _gets_more_bits(number, count) else chosen.kind


def _kind_of_down(chosen: Quantization, number: int, count: int) -> Kind:
    if chosen.name == "Q2_K":
        return Kind.Q3_K
    if chosen.name == "Q3_K_M":
        return Kind.Q5_K if number < count // 16 else Kind.Q4_K
    if chosen.name == "Q4_K_S" and number < count // 8:
        return Kind.Q5_K
    return Kind.Q6_K if chosen.name.endswith("_M") and _gets_more_bits(number, count) else chosen.kind


def _gets_more_bits(number: int, count: int) -> bool:
    """Return whether a layer is in the first or last eighth, or each third one between."""
    return number < count // 8 or number >= 7 * count // 8 or (number - count // 8) % 3 == 2


def _queries_per_key(layout: Layout) -> int:
    """Return how many query heads of the first layer share a key/value head."""
    first = []
    for key in ("head_count", "head_count_kv"):
        value = layout.metadata[f"{layout.architecture}.attention.{key}"]
        first.append(int(value[0] if isinstance(value, list) else value))
    return first[0] // max(1, first[1])


def _require_blocks(layout: Layout, kinds: Kinds) -> None:
    """Refuse rows that are no whole number of quantisation blocks, before anything is written."""
    wrong: dict[int, list[str]] = {}
    block = 1
    for tensor in layout.tensors:
        size = int(GGML_QUANT_SIZES[kinds[tensor.name]][0])
        if tensor.shape[-1] % size:
            block = size
            wrong.setdefault(tensor.shape[-1], []).append(tensor.name)
    if wrong:
        parts = [
            f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} have rows of {width} "
            f"(nearest that fit: {_nearest(width, block)})"
            for width, names in sorted(wrong.items())[:5]
        ]
        more = f"; and {len(wrong) - 5} more widths" if len(wrong) > 5 else ""
        raise ExportError(
            f"quantised rows hold whole blocks of {block} weights, and {'; '.join(parts)}{more}. Write F16 or BF16, or "
            f"prune to widths that are multiples of {block}."
        )


def _nearest(width: int, block: int) -> str:
    below = width // block * block
    return f"{below} or {below + block}" if below else str(block)
