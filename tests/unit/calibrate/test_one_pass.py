"""Real tokens are found wherever the padding is, and listeners hear whole batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.calibrate.one_pass import RealTokens, Taps, run_pass
from secateur.families.loader import families
from secateur.progress import silent
from secateur.records.blocks import BlockBatch
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model

MASKS: dict[str, tuple[list[list[int]], list[list[int]], list[list[int]]]] = {
    "no padding": ([[1, 1, 1], [1, 1, 1]], [[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5]]),
    "padding last": ([[1, 1, 0], [1, 0, 0]], [[0, 1], [3]], [[0, 1], [3]]),
    "full, then padded": ([[1, 1, 1], [1, 1, 0]], [[0, 1, 2], [3, 4]], [[0, 1, 2, 3, 4]]),
    "padded, then full": ([[1, 0, 0], [1, 1, 1]], [[0], [3, 4, 5]], [[0], [3, 4, 5]]),
    "padding first": ([[0, 1, 1], [1, 1, 1]], [[1, 2], [3, 4, 5]], [[1, 2, 3, 4, 5]]),
    "padding between": ([[1, 0, 1], [0, 1, 0]], [[0, 2], [4]], [[0], [2], [4]]),
    "a block of padding": ([[0, 0, 0], [1, 1, 0]], [[], [3, 4]], [[3, 4]]),
    "nothing real": ([[0, 0, 0]], [[]], []),
}


@pytest.mark.parametrize(("mask", "by_block", "by_run"), MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("flat", [False, True])
def test_real_tokens_are_found(
    mask: list[list[int]], by_block: list[list[int]], by_run: list[list[int]], flat: bool
) -> None:
    """By block and by run, each real token is given once and in order, whether or not values keep the batch apart."""
    valid = torch.tensor(mask).bool()
    tokens = RealTokens(valid)
    values = torch.arange(valid.numel(), dtype=torch.float32).reshape(*valid.shape, 1).expand(-1, -1, 2)
    seen = values.reshape(-1, 2) if flat else values
    assert [rows[:, 0].tolist() for rows in tokens.by_block(seen)] == by_block
    assert [rows[:, 1].tolist() for rows in tokens.by_run(seen)] == by_run


def test_runs_are_not_copies() -> None:
    """What a run gives is a view of the model's own tensor."""
    values = torch.zeros(2, 3, 4)
    for rows in RealTokens(torch.tensor([[True, True, False], [True, False, False]])).by_run(values):
        assert rows.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()


class Recorder:
    """A listener that notes when it is called."""

    def __init__(self, reader: str) -> None:
        self.reader = reader
        self.calls: list[str] = []

    def taps(self) -> Taps:
        """Return one tap at the input of a module."""
        return Taps(inputs={self.reader: self._hear})

    def _hear(self, values: Tensor) -> None:
        self.calls.append(f"hear {values.shape[0]}")

    def start_batch(self, tokens: RealTokens) -> None:
        """Note the call."""
        self.calls.append(f"start {sum(len(rows) for rows in tokens.by_block(torch.zeros(*self.shape, 1)))}")

    shape = (2, 16)

    def end_batch(self, batch: BlockBatch) -> None:
        """Note the call."""
        self.calls.append(f"end {batch.num_tokens}")


def test_every_listener_hears_every_batch_between_start_and_end() -> None:
    """Two listeners may listen at one module; hooks are gone afterwards and evaluation mode is set."""
    family = families()["llama"]
    model = pico_model(family).train()
    geometry = geometry_of(model, family)
    listeners = [Recorder("model.layers.0.mlp.down_proj") for _ in range(2)]
    seconds = run_pass(model, hand_made_blocks(), geometry, listeners, batch_size=2, progress=silent, label="listen")
    for listener in listeners:
        assert listener.calls == ["start 30", "hear 2", "end 30", "start 20", "hear 2", "end 20"]
    assert seconds > 0
    assert not model.training
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
