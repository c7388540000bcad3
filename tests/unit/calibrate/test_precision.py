"""Products of float32 are exact inside the context, and every setting is as it was after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from secateur.calibrate.precision import exact_float32

BACKENDS: dict[str, Any] = {
    "all": torch.backends,
    "cuda": torch.backends.cuda.matmul,
    "cpu": torch.backends.mkldnn.matmul,
}
by_device = pytest.mark.skipif(not hasattr(BACKENDS["cuda"], "fp32_precision"), reason="PyTorch before 2.9")


def settings() -> dict[str, str | None]:
    """Return every setting that decides how float32 is multiplied; the common one is None where it cannot be read."""
    values: dict[str, str | None] = {name: getattr(b, "fp32_precision", None) for name, b in BACKENDS.items()}
    try:
        return {**values, "common": torch.get_float32_matmul_precision()}
    except RuntimeError:
        return {**values, "common": None}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Leave the process as PyTorch starts it."""
    start = settings()
    assert start["common"] == "highest"
    yield
    torch.set_float32_matmul_precision("highest")
    for name, backend in BACKENDS.items():
        if start[name] is not None:
            backend.fp32_precision = start[name]
    assert settings() == start


def common(value: str) -> Callable[[], None]:
    """Return what sets the one setting for all devices."""
    return lambda: torch.set_float32_matmul_precision(value)


def one(name: str, value: str) -> Callable[[], None]:
    """Return what sets one of the newer settings."""
    return lambda: setattr(BACKENDS[name], "fp32_precision", value)


CHOICES = [
    pytest.param(lambda: None, id="nothing chosen"),
    pytest.param(common("high"), id="high"),
    pytest.param(common("medium"), id="medium"),
    pytest.param(lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True), id="allow_tf32"),
    pytest.param(one("all", "tf32"), id="tf32 everywhere", marks=by_device),
    pytest.param(one("cuda", "tf32"), id="tf32 on CUDA", marks=by_device),
    pytest.param(one("cpu", "bf16"), id="bfloat16 on the CPU", marks=by_device),
]


@pytest.mark.parametrize("choose", CHOICES)
def test_inside_it_is_exact_and_afterwards_as_before(choose: Callable[[], None]) -> None:
    """However the user chose speed, in the old way or in the new one."""
    choose()
    before = settings()
    with exact_float32():
        inside = settings()
        assert inside["common"] == "highest"
        assert {inside["cuda"], inside["cpu"]} <= {"ieee", "none", None}
    assert settings() == before


@pytest.mark.parametrize("choose", CHOICES)
def test_an_error_inside_restores_too(choose: Callable[[], None]) -> None:
    """What failed has no lasting effect."""
    choose()
    before = settings()
    with pytest.raises(ValueError, match="stop"), exact_float32():
        raise ValueError("stop")
    assert settings() == before
