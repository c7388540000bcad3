"""Which number format a training computes in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.errors import ConfigError
from secateur.recover.precision import is_float64, mixed_precision, widen_

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("has_units", [True, False])
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(has_units: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else float32."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert mixed_precision("auto", CPU) == ("bf16" if has_units else "no")
    assert mixed_precision("bfloat16", CPU) == "bf16"
    assert mixed_precision("float32", CPU) == "no"


def test_auto_asks_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated bfloat16 does not count, and asked for by name it is refused."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert mixed_precision("auto", GPU) == "no"
    assert mixed_precision("float16", GPU) == "fp16"
    with pytest.raises(ConfigError, match=r"bfloat16, which this GPU does not have. Use auto, float16 or float32"):
        mixed_precision("bfloat16", GPU)


def test_float16_on_a_cpu_is_refused() -> None:
    """With what to use."""
    with pytest.raises(ConfigError, match=r"float16, and the training runs on a CPU.*Use auto, bfloat16"):
        mixed_precision("float16", CPU)


def test_weights_of_sixteen_bits_are_widened_and_float64_is_left_alone() -> None:
    """In place, so tied weights stay tied."""
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]).to(torch.bfloat16)
    tied[1].weight = tied[0].weight
    before = tied[0].weight.detach().float()
    widen_(tied)
    assert tied[1].weight is tied[0].weight
    assert torch.equal(tied[0].weight, before)
    double = nn.Linear(2, 2).double()
    widen_(double)
    assert is_float64(double)
    assert not is_float64(tied)
