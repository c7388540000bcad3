"""Matrix products of float32 in float32: settings that let the hardware round the factors first are put aside."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Multiply float32 matrices as float32 (no TF32 on CUDA, no bfloat16 on the CPU) while the context lasts.

    The settings belong to the whole process and are put back at the end. PyTorch has one setting for all devices and,
    since 2.9, one per device; the former cannot be read once the latter disagree with it.
    """
    common = _common()
    if common == "highest":
        yield
        return
    devices = _devices()
    before = [device.fp32_precision for device in devices]
    try:
        if common is None:
            for device in devices:
                device.fp32_precision = "ieee"
        else:
            torch.set_float32_matmul_precision("highest")
        yield
    finally:
        if common is not None:
            torch.set_float32_matmul_precision(common)
        for device, precision in zip(devices, before, strict=True):
            device.fp32_precision = precision


def _common() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _devices() -> list[Any]:
    matmuls = (getattr(backend, "matmul", None) for backend in (torch.backends.cuda, torch.backends.mkldnn))
    return [matmul for matmul in matmuls if hasattr(matmul, "fp32_precision")]
