"""The functions of llama.cpp's own library that round weights to its types; called in the package ``xllamacpp``.

The ``gguf`` library reads llama.cpp's k-quants and cannot write them: the best scales of a block are searched for, and
that search is llama.cpp's. ``xllamacpp`` brings it compiled, and its library exports the functions by name.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from secateur.errors import ExportError, UnavailableError

KINDS = tuple(GGMLQuantizationType[name] for name in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"))
"""The types that this module writes: k-quants, in blocks of 256 weights of a row."""
_INSTALL = "Run: pip install --upgrade xllamacpp. Or write F16 and run llama.cpp's own llama-quantize on that file."
_ENDINGS = (".so", ".pyd", ".dylib")
_INTEGER = ctypes.c_int64


def require_ggml() -> None:
    """Check that llama.cpp's library is here.

    Raises:
        UnavailableError: xllamacpp is not installed, or its library cannot be called.
    """
    _library(_library_file())


def quantize(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.uint8]:
    """Return rows as llama.cpp stores them in one of ``KINDS``, in bytes.

    Args:
        values: shape (rows, columns), finite; columns are a multiple of the type's block.
        kind: one of ``KINDS``.

    Raises:
        UnavailableError: llama.cpp's library is not here.
        ExportError: it wrote another number of bytes than the type has.
        ValueError: rows are no whole number of blocks.
    """
    library = _library(_library_file())
    block, size = (int(number) for number in GGML_QUANT_SIZES[kind])
    rows, columns = values.shape
    if columns % block:
        raise ValueError(f"rows of {columns} are no whole number of blocks of {block}")
    values = np.ascontiguousarray(values, dtype=np.float32)
    stored = np.zeros((rows, columns // block * size), dtype=np.uint8)
    threads = torch.get_num_threads()
    each = max(1, math.ceil(rows / threads))

    def write(start: int) -> int:
        count = min(each, rows - start)
        source, target = (ctypes.c_void_p(array.ctypes.data) for array in (values, stored))
        return int(library.ggml_quantize_chunk(kind, source, target, start * columns, count, columns, None))

    with ThreadPoolExecutor(threads) as pool:
        written = sum(pool.map(write, range(0, rows, each)))
    if written != stored.nbytes:
        raise ExportError(
            f"llama.cpp's library wrote {written} bytes of {kind.name} where {stored.nbytes} were expected. Install "
            "another version of xllamacpp, or write Q8_0."
        )
    return stored


def _library_file() -> Path:
    found = importlib.util.find_spec("xllamacpp")
    folders = () if found is None else found.submodule_search_locations or ()
    files = [file for folder in folders for file in sorted(Path(folder).glob("xllamacpp*")) if file.suffix in _ENDINGS]
    if not files:
        raise UnavailableError(f"k-quants are written by llama.cpp's own library, which is not installed. {_INSTALL}")
    return files[0]


@cache
def _library(file: Path) -> Any:
    try:
        library = ctypes.CDLL(str(file))
        chunk, row_size = library.ggml_quantize_chunk, library.ggml_row_size
    except (OSError, AttributeError) as error:
        raise UnavailableError(f"llama.cpp's library in {file} cannot be called: {error}. {_INSTALL}") from None
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[_INTEGER] * 3, ctypes.c_void_p]
    row_size.argtypes = [ctypes.c_int, _INTEGER]
    chunk.restype = row_size.restype = ctypes.c_size_t
    for kind in KINDS:
        block, size = GGML_QUANT_SIZES[kind]
        if row_size(kind, block) != size:
            raise UnavailableError(
                f"llama.cpp's library in {file} stores {kind.name} in {row_size(kind, block)} bytes a block, and the "
                f"gguf package in {size}. {_INSTALL}"
            )
    return library
