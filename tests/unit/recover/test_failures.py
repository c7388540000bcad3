"""Memory and disks that are too small, in the words of the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from secateur.errors import ExportError, RecoveryError
from secateur.recover.failures import explained
from tests.training import spec


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_too_little_memory_names_the_settings_to_change_and_their_values(error: BaseException) -> None:
    """In the order in which they should be tried."""
    with (
        pytest.raises(RecoveryError, match="memory ran out") as caught,
        explained(spec(batch_size=6, accumulation=3), 512, Path("work")),
    ):
        raise error
    message = str(caught.value)
    wanted = [
        "recover.batch_size (now 6) and raise recover.accumulation (now 3)",
        "recover.gradient_checkpointing: true (now false)",
        "recover.lora: true (now none)",
        "calibrate.block_size (now 512)",
    ]
    places = [message.index(words) for words in wanted]
    assert places == sorted(places)


def test_what_was_tried_already_is_not_advised() -> None:
    """Only what is left."""
    with (
        pytest.raises(RecoveryError) as caught,
        explained(spec(batch_size=1, gradient_checkpointing=True, lora=True), 64, Path("work")),
    ):
        raise MemoryError
    assert str(caught.value).endswith("In this order: lower calibrate.block_size (now 64).")


def test_a_full_disk_is_said_and_other_errors_pass() -> None:
    """PyTorch reports a full disk as a RuntimeError."""
    with (
        pytest.raises(ExportError, match=r"disk is full: .* to work\. Free space"),
        explained(spec(), 64, Path("work")),
    ):
        raise RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/3")
    with pytest.raises(RuntimeError, match="mine"), explained(spec(), 64, Path("work")):
        raise RuntimeError("mine")
