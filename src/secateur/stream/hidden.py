"""The hidden states of all batches between two layers, in memory or on disk.

Dims: ``batch`` blocks, ``seq`` tokens per block, ``hidden`` residual width.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from secateur.store.artifacts import disk_errors

PREFIX = "hidden-states-"
"""What the names of the folders begin with."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """One batch's states: the tensor or the file that holds them, and how they come back."""

    held: Tensor | Path
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class HiddenStates:
    """A list of one tensor per batch, bit for bit as they were put in, on the device they came from.

    Use it as a context manager; at the end its files and tensors are gone. Tensors in memory are not copied: do not
    change in place what was put in or taken out.

    Args:
        folder: where to keep the states as files, in a folder of their own; None keeps them in memory.
        device: where states in memory are held in the meantime; None leaves them on the device they came from.

    Raises:
        ExportError: the disk is full or the folder cannot be written, here or when states are put in.
    """

    def __init__(self, folder: Path | None = None, *, device: torch.device | None = None) -> None:
        self._device = device
        self._stored: list[_Stored] = []
        self._folder: Path | None = None
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                self._folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=folder))

    def __len__(self) -> int:
        return len(self._stored)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Float[Tensor, "batch seq hidden"]:
        stored = self._stored[index]
        if isinstance(stored.held, Tensor):
            return stored.held.to(stored.device)
        # Read, not mapped: the file is overwritten while what it held may still be in use.
        flat = torch.from_numpy(np.fromfile(stored.held, dtype=np.uint8))
        return flat.view(stored.dtype).reshape(stored.shape).to(stored.device)

    def __setitem__(self, index: int, states: Float[Tensor, "batch seq hidden"]) -> None:
        self._stored[index] = self._store(range(len(self))[index], states)

    def append(self, states: Float[Tensor, "batch seq hidden"]) -> None:
        """Add the states of one more batch."""
        self._stored.append(self._store(len(self), states))

    def close(self) -> None:
        """Let go of all states and remove their files."""
        self._stored.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _store(self, index: int, states: Tensor) -> _Stored:
        states = states.detach()
        held: Tensor | Path
        if self._folder is None:
            held = states if self._device is None else states.to(self._device)
        else:
            held = self._folder / str(index)
            flat = states.cpu().reshape(-1).view(torch.uint8).numpy()
            with disk_errors(held), held.open("wb") as output:  # numpy's tofile would lose why it failed
                output.write(flat.data)
        return _Stored(held, states.shape, states.dtype, states.device)
