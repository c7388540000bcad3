"""Tensors by key in files of their own, for what belongs to all layers together and is made one layer at a time."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Hashable, Iterator, MutableMapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from secateur.store.artifacts import disk_errors

Key = TypeVar("Key", bound=Hashable)

PREFIX = "spilled-"
"""What the names of the folders begin with."""


class SpilledTensors(MutableMapping[Key, Tensor]):
    """A mapping whose tensors lie on disk and are read, to the CPU, each time they are asked for.

    Its files are removed when nobody holds the mapping any more, or at ``close``.

    Args:
        folder: where to make a folder for the files.

    Raises:
        ExportError: the disk is full or the folder cannot be written, here or when a tensor is put in.
    """

    def __init__(self, folder: Path) -> None:
        self._entries: dict[Key, tuple[Path, torch.Size, torch.dtype]] = {}
        self._made = 0
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))
        self._remove = weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)

    def __getitem__(self, key: Key) -> Tensor:
        file, shape, dtype = self._entries[key]
        return torch.from_numpy(np.fromfile(file, dtype=np.uint8)).view(dtype).reshape(shape)

    def __setitem__(self, key: Key, value: Tensor) -> None:
        value = value.detach().cpu().contiguous()
        file = self._entries[key][0] if key in self._entries else self._folder / str(self._made)
        with disk_errors(file), file.open("wb") as output:
            output.write(value.reshape(-1).view(torch.uint8).numpy().data)
        self._made += key not in self._entries
        self._entries[key] = (file, value.shape, value.dtype)

    def __delitem__(self, key: Key) -> None:
        self._entries.pop(key)[0].unlink(missing_ok=True)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def close(self) -> None:
        """Forget all tensors and remove their files."""
        self._entries.clear()
        self._remove()
