"""A teacher's most likely next tokens for the blocks of a training text, to and from disk.

A folder of safetensors files, each with consecutive blocks in order. Every file is whole when it has its name, so a
folder whose writing was stopped holds the text's beginning, and writing goes on from there. Per learned token: ``k``
log-probabilities in float16, ``k`` token ids in int32, and the log of the remaining probability in float32, that is
6 k + 4 bytes.

Dims: ``tokens`` learned tokens of a block, in order; ``k`` token ids that are known of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files import replacing
from secateur.records.top_classes import TopClasses
from secateur.store.artifacts import disk_errors

TEACHER_LOGITS_VERSION = "1"
_COLUMNS = ("values", "indices", "log_rest")
_PATTERN = "blocks-*.safetensors"


@dataclass(frozen=True, slots=True, eq=False)
class _File:
    """One file: its first block, and where in the file each block begins; one entry more than blocks."""

    path: Path
    first: int
    offsets: Int64[Tensor, " bounds"]

    @property
    def stop(self) -> int:
        return self.first + len(self.offsets) - 1


class TeacherLogits:
    """What is known of a teacher's predictions for the blocks 0 to ``num_blocks`` - 1; read when asked for, not kept.

    Args:
        folder: where the files are or will be. Files there that were written under another key, or by another version,
            are removed.
        key: identifies all that the predictions depend on.

    Raises:
        CheckpointError: a file is broken, or one in the middle is missing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder = folder
        self._key = key
        self._files: list[_File] = []
        for path in sorted(folder.glob(_PATTERN)):
            file = _open(path, key)
            if file is None:
                path.unlink()
            elif file.first == self.num_blocks:
                self._files.append(file)
            else:
                raise CheckpointError(
                    f"{folder} lacks the teacher's predictions for blocks {self.num_blocks} to {file.first - 1}. "
                    "Delete it; it will be made again."
                )

    @property
    def num_blocks(self) -> int:
        """Blocks there are, from the first one on."""
        return self._files[-1].stop if self._files else 0

    @property
    def size_bytes(self) -> int:
        """Bytes on disk."""
        return sum(file.path.stat().st_size for file in self._files)

    def append(self, blocks: Sequence[TopClasses]) -> None:
        """Write the next blocks, at least one, as one more file.

        Raises:
            ExportError: the disk is full or the folder cannot be written.
        """
        compact = [as_stored(block) for block in blocks]
        offsets = torch.tensor([0, *map(len, compact)]).cumsum(0)
        tensors = {name: torch.cat([getattr(block, name) for block in compact]) for name in _COLUMNS}
        tensors["offsets"] = offsets
        metadata = {"version": TEACHER_LOGITS_VERSION, "key": self._key, "first": str(self.num_blocks)}
        path = self.folder / f"blocks-{self.num_blocks:09d}.safetensors"
        with disk_errors(path), replacing(path) as output:
            output.write(save(tensors, metadata))
        self._files.append(_File(path, self.num_blocks, offsets))

    def load(self, block: int) -> TopClasses:
        """Return what is known of the predictions of a block's learned tokens, with ids as int64.

        Raises:
            CheckpointError: the block is not there, or its file has gone or is broken.
        """
        file = next((file for file in self._files if file.first <= block < file.stop), None)
        if file is None:
            raise CheckpointError(
                f"{self.folder} has the teacher's predictions for {self.num_blocks} blocks, and block {block} is asked "
                "for. Delete the folder; it will be made again."
            )
        start, stop = file.offsets[block - file.first : block - file.first + 2].tolist()
        try:
            with safe_open(file.path, framework="pt") as stored:
                values, indices, log_rest = (stored.get_slice(name)[start:stop] for name in _COLUMNS)
        except (OSError, SafetensorError) as error:
            raise _unreadable(file.path, error) from None
        return TopClasses(values, indices.to(torch.int64), log_rest)


def as_stored(classes: TopClasses) -> TopClasses:
    """Return distributions on the CPU and in the precision that they are stored in."""
    return TopClasses(
        values=classes.values.to("cpu", torch.float16),
        indices=classes.indices.to("cpu", torch.int32),
        log_rest=classes.log_rest.to("cpu", torch.float32),
    )


def _open(path: Path, key: str) -> _File | None:
    """Return what is in a file; None where it is not of this key or version."""
    try:
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("version") != TEACHER_LOGITS_VERSION or metadata.get("key") != key:
                return None
            return _File(path, int(metadata["first"]), stored.get_tensor("offsets"))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}. Delete the folder it is in; it will be made again.")
