"""The learning rate of every step of a training, as a share of its highest; pure."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["cosine", "linear", "constant"]


def learning_rate_factor(step: int, num_steps: int, warmup_ratio: float, schedule: Schedule) -> float:
    """Return the share of the learning rate at a step, counted from 0.

    It rises in equal parts during the warm-up and is 1 at the first step after it. Then it falls by half a cosine
    (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts) or in equal parts, to reach 0 where the step
    after the last one would be; or it stays. No step is taken at 0, which would waste it.

    Args:
        step: steps done before this one.
        num_steps: steps in all.
        warmup_ratio: share of the steps that are warm-up, rounded down.
        schedule: what follows the warm-up.
    """
    warmup = int(num_steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / (num_steps - warmup))
    return 1.0 - done if schedule == "linear" else (1.0 + math.cos(math.pi * done)) / 2.0
