"""A made-up comparison of speeds: the second model is a quarter smaller and faster, except where rounds disagree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from secateur.records.speed import KvCache, Machine, ModelSpeed, Setting, SpeedComparison, Timing

SHORT, LONG = Setting(10, 1, 3), Setting(100, 2, 3)


def machine(**changes: Any) -> Machine:
    """Return a machine."""
    return replace(Machine("Abacus 9", 2, 1, "cpu", "2.9.0", "5.0.0", "float32"), **changes)


def speed_comparison(**changes: Any) -> SpeedComparison:
    """Return two models in two settings and three rounds; at the longer one rounds fall on both sides of 1."""
    parts = {"embedding": 1000, "attention": 1000, "ffn": 2000, "head": 0, "other": 0}
    dense = ModelSpeed(
        name="dense",
        parameters=parts,
        disk_bytes=16_100,
        memory_bytes={"float32": 16_000},
        kv_cache=KvCache(512),
        timings=(
            Timing(SHORT, (0.1, 0.2, 0.4), (0.2, 0.4, 0.8)),
            Timing(LONG, (1.0, 1.0, 1.0), (2.0, 2.0, 2.0), 20_000),
        ),
        text_bytes_per_token=4.0,
    )
    pruned = replace(
        dense,
        name="pruned",
        parameters={**parts, "ffn": 1000},
        disk_bytes=12_100,
        memory_bytes={"float32": 12_000},
        kv_cache=KvCache(256),
        timings=(
            Timing(SHORT, (0.05, 0.1, 0.2), (0.1, 0.1, 0.2)),
            Timing(LONG, (0.8, 1.25, 0.5), (1.0, 1.6, 1.0), 15_000),
        ),
    )
    made = SpeedComparison({"dense": dense, "pruned": pruned}, machine(), 3, "of a process", 0.5)
    return replace(made, **changes)
