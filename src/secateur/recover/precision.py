"""In which number format the products of a training are computed; its weights stay in float32."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from secateur.errors import ConfigError

Precision = Literal["auto", "float32", "bfloat16", "float16"]
MixedPrecision = Literal["no", "bf16", "fp16"]
"""What accelerate calls it."""


def mixed_precision(precision: Precision, device: torch.device) -> MixedPrecision:
    """Return the format to compute in on a device; ``auto`` is bfloat16 where the hardware multiplies it, else float32.

    Raises:
        ConfigError: the device cannot compute in this format.
    """
    if precision == "float16" and device.type == "cpu":
        raise ConfigError(
            "recover.precision is float16, and the training runs on a CPU, which has no use for it. Use auto, bfloat16 "
            "or float32."
        )
    if precision == "bfloat16" and device.type == "cuda" and not _multiplies_bfloat16(device):
        raise ConfigError("recover.precision is bfloat16, which this GPU does not have. Use auto, float16 or float32.")
    if precision == "auto":
        return "bf16" if _multiplies_bfloat16(device) else "no"
    names: dict[str, MixedPrecision] = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}
    return names[precision]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, check, bool)()) for check in checks)


def widen_(model: nn.Module) -> None:
    """Turn a model of 16 bits into float32, in place: small steps would be lost in rounding. Float64 stays."""
    if not is_float64(model):
        model.float()


def is_float64(model: nn.Module) -> bool:
    """Return whether a model is in float64, which is computed as it is."""
    return any(parameter.dtype == torch.float64 for parameter in model.parameters())
