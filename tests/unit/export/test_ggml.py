"""llama.cpp's own rounding functions: called right, or not at all."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from secateur.errors import ExportError, UnavailableError
from secateur.export import ggml

needs_library = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")
ERRORS = {"Q2_K": 0.33, "Q3_K": 0.17, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.021}
"""Root mean square of the difference, over that of the weights; normal ones."""


@pytest.fixture(autouse=True)
def library() -> Iterator[None]:
    """Forget what was loaded."""
    ggml._library.cache_clear()
    yield
    ggml._library.cache_clear()


def found(monkeypatch: pytest.MonkeyPatch, folder: Path | None) -> None:
    """Put the package xllamacpp into a folder, or nowhere."""
    spec = None if folder is None else SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


@needs_library
@pytest.mark.parametrize("kind", ggml.KINDS)
def test_rows_read_back_by_the_gguf_library(kind: GGMLQuantizationType) -> None:
    """Nearly as they were, however many threads wrote them; each row alone gives the same bytes."""
    values = np.random.default_rng(0).normal(size=(7, 512)).astype(np.float32)
    stored = ggml.quantize(values, kind)
    read = quants.dequantize(stored, kind)
    assert 0 < np.linalg.norm(read - values) / np.linalg.norm(values) < ERRORS[kind.name]
    assert np.array_equal(np.concatenate([ggml.quantize(row[None], kind) for row in values]), stored)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert np.array_equal(ggml.quantize(values, kind), stored)
        assert np.array_equal(ggml.quantize(np.asfortranarray(values), kind), stored)
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(ValueError, match="rows of 96 are no whole number of blocks of 256"):
        ggml.quantize(values[:, :96], kind)


def test_without_the_library_the_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No package, a package without its library, and a file that is none."""
    for folder in (None, tmp_path):
        found(monkeypatch, folder)
        with pytest.raises(UnavailableError, match=r"is not installed. Run: pip install .*xllamacpp. Or write F16"):
            ggml.require_ggml()
    (tmp_path / "xllamacpp.abi3.so").write_bytes(b"nothing")
    with pytest.raises(UnavailableError, match=r"xllamacpp.abi3.so cannot be called: .* pip install"):
        ggml.require_ggml()


class Function:
    """A function of a library; ctypes puts its types on it."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def __call__(self, *_: Any) -> int:
        """Return the answer that was given."""
        return self.answer


def test_another_version_of_the_library_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One without the functions, one with other blocks, and one that writes another number of bytes."""
    found(monkeypatch, tmp_path)
    (tmp_path / "xllamacpp.abi3.so").touch()
    sizes = Function(84)
    for library, words in (
        (SimpleNamespace(), "cannot be called: .*ggml_quantize_chunk"),
        (SimpleNamespace(ggml_quantize_chunk=Function(1), ggml_row_size=sizes), "stores Q3_K in 84 bytes .* in 110"),
    ):
        monkeypatch.setattr(ggml.ctypes, "CDLL", lambda _, library=library: library)
        with pytest.raises(UnavailableError, match=words):
            ggml.require_ggml()
    monkeypatch.setattr(ggml, "_library", lambda _: SimpleNamespace(ggml_quantize_chunk=Function(1)))
    with pytest.raises(ExportError, match="wrote 1 bytes of Q4_K where 288 were expected"):
        ggml.quantize(np.ones((1, 512), np.float32), GGMLQuantizationType.Q4_K)
