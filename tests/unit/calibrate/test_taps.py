"""Taps see what modules see, and always detach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate.taps import tapped


class Layer(nn.Module):
    """A module that takes its input by keyword and returns a tuple, as decoder layers may."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, hidden: Tensor, *, scale: float = 1.0) -> tuple[Tensor, None]:
        """Return the scaled output and something else."""
        return self.linear(hidden) * scale, None


class Model(nn.Module):
    """One layer, called by keyword or by position."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()

    def forward(self, hidden: Tensor, by_keyword: bool = False) -> Tensor:
        """Return the layer's first output."""
        return (self.layer(hidden=hidden, scale=2.0) if by_keyword else self.layer(hidden, scale=2.0))[0]


def num_hooks(model: nn.Module) -> int:
    """Return how many hooks are attached anywhere in a model."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def nothing(*_: Any) -> None:
    """Ignore what a tap saw."""


@pytest.mark.parametrize("by_keyword", [False, True])
def test_taps_see_inputs_outputs_and_both(by_keyword: bool) -> None:
    """The first input, the output, and for a layer its input with the first of its outputs, however it is called."""
    model, seen = Model(), {}

    def keep(name: str) -> Any:
        return lambda *tensors: seen.update({name: tensors})

    hidden = torch.randn(4, 3)
    with tapped(
        model,
        inputs={"layer.linear": keep("input")},
        outputs={"layer.linear": keep("output")},
        through={"layer": keep("through")},
    ):
        result = model(hidden, by_keyword)
    assert torch.equal(seen["input"][0], hidden)
    assert torch.equal(seen["output"][0] * 2.0, result)
    assert torch.equal(seen["through"][0], hidden)
    assert torch.equal(seen["through"][1], result)
    assert torch.equal(model(hidden), result), "a tap changes nothing"


def test_taps_detach_at_the_end() -> None:
    """Afterwards no hook is left and nothing is called."""
    model, calls = Model(), []
    with tapped(model, inputs={"layer.linear": calls.append}, outputs={}, through={"layer": nothing}):
        assert num_hooks(model) == 2
        model(torch.randn(1, 3))
    assert num_hooks(model) == 0
    model(torch.randn(1, 3))
    assert len(calls) == 1


def test_taps_detach_on_an_error_inside_the_block() -> None:
    """An interrupted pass leaves the model as it was."""
    model = Model()
    with (
        pytest.raises(KeyboardInterrupt),
        tapped(model, inputs={"layer.linear": nothing}, outputs={"layer.linear": nothing}, through={}),
    ):
        raise KeyboardInterrupt
    assert num_hooks(model) == 0


def test_taps_detach_on_an_error_inside_a_tap() -> None:
    """So does a tap that fails itself."""
    model = Model()

    def fail(_: Tensor) -> None:
        raise RuntimeError("mine")

    with (
        pytest.raises(RuntimeError, match="mine"),
        tapped(model, inputs={"layer.linear": fail}, outputs={}, through={"layer": nothing}),
    ):
        model(torch.randn(1, 3))
    assert num_hooks(model) == 0


def test_a_name_that_does_not_exist_leaves_no_hook_behind() -> None:
    """Hooks attached before the mistake was met are detached too."""
    model = Model()
    with (
        pytest.raises(AttributeError),
        tapped(model, inputs={"layer.linear": nothing}, outputs={"layer.typo": nothing}, through={}),
    ):
        pass
    assert num_hooks(model) == 0
