"""Tensors on disk come back as they were, and their files go with the mapping."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import ExportError
from secateur.stream.spill import SpilledTensors


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_goes_in_comes_out(tmp_path: Path, dtype: torch.dtype) -> None:
    """Bit for bit, also transposed tensors, and again after another value or a removal."""
    spilled: SpilledTensors[tuple[int, str]] = SpilledTensors(tmp_path)
    first, second = torch.randn(3, 4).to(dtype), torch.randn(5).to(dtype)
    spilled[0, "a"], spilled[1, "a"] = first.T, first
    spilled[0, "a"] = second
    assert dict(spilled).keys() == {(0, "a"), (1, "a")}
    assert torch.equal(spilled[0, "a"], second) and torch.equal(spilled[1, "a"], first)
    del spilled[0, "a"]
    spilled[2, "a"] = first.T
    assert torch.equal(spilled[1, "a"], first) and torch.equal(spilled[2, "a"], first.T)
    with pytest.raises(KeyError):
        spilled[0, "a"]


def test_files_go_with_the_mapping(tmp_path: Path) -> None:
    """When it is closed, and when nobody holds it."""
    closed, dropped = SpilledTensors[int](tmp_path), SpilledTensors[int](tmp_path)
    closed[0] = dropped[0] = torch.ones(2)
    closed.close()
    assert len(list(tmp_path.iterdir())) == 1
    del dropped
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    """A file in the way is an error at once."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"file/sums cannot be written"):
        SpilledTensors(tmp_path / "file" / "sums")
