"""What to do when a training does not fit in memory or on the disk, said in the words of the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from secateur.errors import ExportError, RecoveryError
from secateur.recipe import RecoverSpec

_OUT_OF_MEMORY = ("DefaultCPUAllocator", "out of memory")
_DISK_FULL = ("PytorchStreamWriter failed", "No space left")


@contextmanager
def explained(options: RecoverSpec, block_size: int, folder: Path) -> Iterator[None]:
    """Turn memory and disks that are too small into errors that say which settings to change.

    Raises:
        RecoveryError: memory ran out.
        ExportError: the disk is full.
    """
    try:
        yield
    except MemoryError as error:
        raise _too_large(options, block_size, error) from None
    except RuntimeError as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY):
            raise _too_large(options, block_size, error) from None
        if any(words in str(error) for words in _DISK_FULL):
            raise ExportError(
                f"the disk is full: a checkpoint of the training could not be written to {folder}. Free space, or "
                "choose another output."
            ) from None
        raise


def _too_large(options: RecoverSpec, block_size: int, error: BaseException) -> RecoveryError:
    reason = str(error).strip().partition("\n")[0][:200].rstrip(". ") or "no reason was given"
    ways = []
    if options.batch_size > 1:
        ways.append(
            f"lower recover.batch_size (now {options.batch_size}) and raise recover.accumulation (now "
            f"{options.accumulation}) by the same factor, which leaves the result as it is"
        )
    if not options.gradient_checkpointing:
        ways.append("set recover.gradient_checkpointing: true (now false)")
    if options.lora is None:
        ways.append("train adapters with recover.lora: true (now none)")
    ways.append(f"lower calibrate.block_size (now {block_size})")
    return RecoveryError(f"memory ran out in the training ({reason}). In this order: {'; '.join(ways)}.")
