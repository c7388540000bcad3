"""Speeds as records: units, ratios within rounds, and JSON."""

from __future__ import annotations

import json
import random

import pytest

from secateur.records.speed import KvCache, Setting, SpeedComparison, Spread, Timing

from ..report.speeds import machine, speed_comparison


def test_tokens_per_second_are_of_the_whole_batch() -> None:
    """A prefill reads batch x prompt tokens; decoding adds one token per sequence less than was asked for."""
    timing = Timing(Setting(prompt_length=50, batch_size=4, new_tokens=11), (2.0, 4.0), (1.0, 0.5))
    assert timing.prefill_tokens_per_s == (100.0, 50.0)
    assert timing.decode_tokens_per_s == (40.0, 80.0)
    assert timing.setting.num_tokens == 4 * 61


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows both models down fourfold changes speeds and leaves every ratio as it was."""
    speed = speed_comparison()
    timings = speed.models["dense"].timings[0]
    assert max(timings.prefill_tokens_per_s) / min(timings.prefill_tokens_per_s) == pytest.approx(4)
    ratio = speed.prefill_ratio("pruned", 0)
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    decode = speed.decode_ratio("pruned", 0)
    assert (decode.median, decode.low, decode.high) == pytest.approx((4.0, 2.0, 4.0))
    apart = speed.prefill_ratio("pruned", 1)
    assert (apart.low, apart.high) == pytest.approx((0.8, 2.0))


def test_ratios_agree_with_brute_force() -> None:
    """Median and ends of the ratio are those of the sorted list of quotients, round by round."""
    draw = random.Random(3)
    first, second = ([draw.uniform(0.1, 2.0) for _ in range(5)] for _ in range(2))
    found = Spread.of([a / b for a, b in zip(first, second, strict=True)])
    ordered = sorted(first[i] / second[i] for i in range(5))
    assert (found.low, found.median, found.high) == (ordered[0], ordered[2], ordered[4])


def test_json_keeps_every_round() -> None:
    """What is written to disk and read again is equal."""
    speed = speed_comparison()
    again = SpeedComparison.from_dict(json.loads(json.dumps(speed.to_dict())))
    assert again == speed
    assert [model.name for model in again.others] == ["pruned"]


def test_another_version_or_no_model_is_refused() -> None:
    """Old files are not misread."""
    data = speed_comparison().to_dict()
    with pytest.raises(TypeError, match="schema version 99"):
        SpeedComparison.from_dict({**data, "schema_version": 99})
    with pytest.raises(ValueError, match="no models"):
        SpeedComparison.from_dict({**data, "models": {}})


def test_layers_with_a_window_stop_growing() -> None:
    """They keep what the next token can see; the others keep everything."""
    cache = KvCache(bytes_per_token=30, sliding_bytes_per_token=10, num_sliding=1, window=5)
    assert [cache.bytes_at(length) for length in (1, 4, 5, 9)] == [30, 120, 20 * 5 + 40, 20 * 9 + 40]
    assert KvCache(30).bytes_at(9) == 270


def test_a_machine_is_busy_when_more_want_to_compute_than_there_are_cores() -> None:
    """An unknown load says nothing."""
    assert [speed_comparison(load=load).was_busy for load in (None, 1.9, 2.4, 2.6)] == [False, False, False, True]
    assert "Abacus 9, 2 cores, 1 thread" in machine().words
    assert machine(device="H100").words.startswith("H100 beside Abacus 9")
