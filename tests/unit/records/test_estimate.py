"""The estimate as a record: totals, and the way to JSON and back."""

from __future__ import annotations

import json

import pytest

from secateur.records.estimate import Estimate, Machine, StageEstimate
from tests.unit.estimate.papers import RATES, on_paper, recipe


def test_it_comes_back_from_json() -> None:
    """Every field, advice and machine included."""
    found = on_paper(recipe(recover={}), Machine(10**6, 10**6, 10**6))
    data = found.to_dict()
    assert Estimate.from_dict(json.loads(json.dumps(data))).to_dict() == data
    assert data["total"]["fits_memory"] is False
    assert data["total"]["peak_bytes"] == found.peak_bytes
    with pytest.raises(ValueError, match="version"):
        Estimate.from_dict({**data, "schema_version": 0})


def test_totals_are_of_all_stages() -> None:
    """Seconds add up, memory does not; the disk holds what earlier stages left and what the present one needs."""
    stages = (
        StageEstimate("a", "", 1.0, {"x": 5, "y": 1}, disk_bytes=10, temporary_bytes=100),
        StageEstimate("b", "", None, {"x": 7}, disk_bytes=1, temporary_bytes=20),
        StageEstimate("c", "", 2.0, {"x": 1}, disk_bytes=3),
    )
    found = Estimate("m", 1, 1, "float32", "cpu", stages, RATES)
    assert (found.seconds, found.peak_bytes, found.peak_stage.name, found.disk_bytes) == (3.0, 7, "b", 110)
    assert found.fits_memory is None and found.fits_disk is None


def test_a_gpu_and_the_main_memory_must_both_do() -> None:
    """One of them is not enough."""
    stages = (StageEstimate("a", "", 1.0, {"x": 5}, {"y": 5}),)
    found = Estimate("m", 1, 1, "bfloat16", "cuda", stages, RATES)
    from dataclasses import replace

    for gpu, main, fits in ((5, 5, True), (4, 5, False), (5, 4, False)):
        machine = Machine(9, main, 9, "a GPU", 9, gpu)
        assert replace(found, machine=machine).fits_memory is fits
