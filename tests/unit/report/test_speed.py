"""Sizes and speeds in tables and sentences."""

from __future__ import annotations

from dataclasses import replace

from secateur.records.speed import KvCache
from secateur.report.markdown import render_report
from secateur.report.speed import describe_measurement, describe_speed, footprint_table, timings_table

from .records import evaluation, plan
from .speeds import machine, speed_comparison


def test_sizes_stand_beside_the_first_models() -> None:
    """Parameters by part, weights on disk and in memory, cache, and the peak of the setting it was measured at."""
    table = footprint_table(speed_comparison())
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(table.columns) == ["what it takes", "dense", "pruned", "of dense"]
    assert rows["parameters"] == ["4,000", "3,000", "75.0%"]
    assert rows["parameters: ffn"] == ["2,000", "1,000", "50.0%"]
    assert "parameters: head" not in rows
    assert rows["weights on disk"] == ["16.1 kB", "12.1 kB", "75.2%"]
    assert rows["weights in memory (float32)"] == ["16.0 kB", "12.0 kB", "75.0%"]
    assert rows["KV cache per token"] == ["512 B", "256 B", "50.0%"]
    assert [row for row in rows if row.startswith("peak")] == ["peak memory (2 x 100 tokens)"]
    assert rows["peak memory (2 x 100 tokens)"] == ["20.0 kB", "15.0 kB", "75.0%"]


def test_a_model_that_was_never_on_disk_has_no_such_row() -> None:
    """Nothing is said of what is not known."""
    speed = speed_comparison()
    models = {name: replace(model, disk_bytes=None) for name, model in speed.models.items()}
    assert "weights on disk" not in [row[0] for row in footprint_table(replace(speed, models=models)).rows]


def test_timings_have_spreads_and_ratios_within_rounds() -> None:
    """One row per setting and model; the first model is 1."""
    rows = [[*row] for row in timings_table(speed_comparison()).rows]
    assert rows[0] == [
        "1 x 10 tokens",
        "dense",
        "200 (100 to 400)",
        "50.0 (25.0 to 100.0)",
        "1",
        "5.00 (2.50 to 10.00)",
        "1",
    ]
    assert rows[1][4] == "2.00 (2.00 to 2.00)"
    assert rows[1][6] == "4.00 (2.00 to 4.00)"
    assert [row[:2] for row in rows[2:]] == [["2 x 100 tokens", "dense"], ["2 x 100 tokens", "pruned"]]


def test_the_machine_is_named_and_what_is_uncertain_is_said() -> None:
    """Where rounds fall on both sides of 1 no difference is claimed; a busy machine is confessed."""
    speed = speed_comparison()
    [how, peak] = describe_measurement(speed)
    assert "Abacus 9, 2 cores, 1 thread, float32, torch 2.9.0, transformers 5.0.0" in how
    assert "3 times" in how
    assert peak == "Peak memory: of a process."
    [told, unclear] = describe_speed(speed)
    assert told == (
        "Beside dense, pruned reads prompts 1.25 to 2.00 times as fast and adds tokens 2.00 to 4.00 times as fast; its "
        "weights take 75.0% of the memory, its KV cache 50.0%."
    )
    assert unclear.endswith("no difference is shown, for reading prompts at 2 x 100 tokens.")
    busy = describe_measurement(speed_comparison(load=5.24, machine=machine(cores=4)))
    assert any("a load of 5.2 on 4 cores" in paragraph for paragraph in busy)


def test_windows_and_other_tokenizers_are_mentioned() -> None:
    """A window bounds the cache; more tokens for the same text eat part of the speed."""
    speed = speed_comparison()
    dense, pruned = speed.models.values()
    models = {
        "dense": replace(dense, kv_cache=KvCache(512, 256, 1, 64)),
        "pruned": replace(pruned, text_bytes_per_token=3.2),
    }
    speed = replace(speed, models=models)
    told = " ".join(describe_measurement(speed))
    assert "In 1 layer of dense the cache stops growing at 63 tokens." in told
    assert "for the same text pruned needs 25.0% more of them than dense" in told
    rows = {row[0]: row[1] for row in footprint_table(speed).rows}
    assert rows["KV cache of 103 tokens"] == "42.5 kB"


def test_the_markdown_report_has_the_tables() -> None:
    """Below a heading of their own; without a measurement there is none."""
    options = {
        "model_name": "pico",
        "domains": ["medical"],
        "calibration_tokens_per_s": {},
        "recipe_yaml": "model: a\n",
    }
    manifest = {"versions": {}, "model_fingerprint": "abc"}
    plain, timed = (
        render_report(plan(), evaluation(), manifest=manifest, speed=speed, **options)  # type: ignore[arg-type]
        for speed in (None, speed_comparison())
    )
    assert "## Size and speed" not in plain
    assert "## Size and speed\n\nBeside dense, pruned reads" in timed
    assert "| KV cache per token | 512 B | 256 B | 50.0% |" in timed
