"""A loss that went wrong is noticed, and ordinary noise is not."""

from __future__ import annotations

import json
import math
import random

import pytest

from secateur.recover.monitor import WINDOW, LossMonitor


def watch(losses: list[float]) -> list[str | None]:
    """Return what a new monitor says to each loss."""
    monitor = LossMonitor()
    return [monitor.add(loss) for loss in losses]


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_is_wrong_at_once(loss: float) -> None:
    """Also at the first step."""
    assert watch([loss])[-1] == f"the training loss is {loss}"


def test_a_loss_that_explodes_is_noticed_within_a_window() -> None:
    """And what it says names both losses."""
    said = watch([2.0] * 20 + [9.0] * WINDOW)
    assert not any(said[:20])
    assert said[-1] == "the training loss rose from 2.000 to 9.000 nats per token"


def test_noise_spikes_and_small_losses_are_not_noticed() -> None:
    """A loss that varies by half, single hard batches, a small one that grows tenfold, a rise to guessing from 4."""
    draw = random.Random(0)
    assert not any(watch([3.0 * math.exp(draw.gauss(0, 0.5)) for _ in range(2000)]))
    assert not any(watch([50.0 if i % 3 == 2 else 2.0 for i in range(60)]))
    assert not any(watch([0.1] * 10 + [1.0] * 30))
    assert not any(watch([4.0] * 10 + [11.0] * 30))


def test_a_monitor_read_back_goes_on_as_if_never_stopped() -> None:
    """Through JSON, at any moment."""
    losses = [2.0] * 5 + [3.0] * 10 + [9.5] * WINDOW
    expected = watch(losses)
    for cut in range(len(losses)):
        monitor = LossMonitor()
        said = [monitor.add(loss) for loss in losses[:cut]]
        monitor = LossMonitor.from_dict(json.loads(json.dumps(monitor.to_dict())))
        assert said + [monitor.add(loss) for loss in losses[cut:]] == expected
