"""The estimate as a person reads it."""

from __future__ import annotations

from secateur.records.estimate import Machine
from secateur.report.estimate import advice_table, format_seconds, memory_table, sentences, stages_table
from tests.unit.estimate.papers import on_paper, recipe


def test_every_stage_has_a_row_and_all_of_them_one() -> None:
    """Unpredicted times are question marks; what may be less says so."""
    found = on_paper(recipe(evaluate={"max_tokens": 512, "tasks": ["hellaswag"], "controls": []}))
    rows = {row[0]: row for row in stages_table(found).rows}
    assert list(rows) == [*(stage.name for stage in found.stages), "in all"]
    assert rows["tasks"][1] == "?"
    assert rows["calibrate:medical"][1].startswith("at most ")
    assert len(stages_table(on_paper(recipe(), device="cuda")).columns) == 6, "main memory beside the GPU's"


def test_the_memory_at_the_peak_adds_up() -> None:
    """Largest first, with shares of the whole."""
    rows = memory_table(on_paper(recipe())).rows
    assert {"logits", "dense weights", "activations"} <= {row[0] for row in rows}
    assert sum(int(row[2].rstrip("%")) for row in rows) in range(98, 103)


def test_the_verdict_names_settings_where_it_does_not_fit() -> None:
    """As they are written on the command line."""
    asked = recipe()
    needed = on_paper(asked).peak_bytes
    told = "\n".join(sentences(on_paper(asked, Machine(needed, round(0.85 * needed), 10**12))))
    assert "memory: DOES NOT FIT" in told and "disk: fits" in told
    assert "it would fit with: --set " in told
    assert "fits, but hardly" in "\n".join(sentences(on_paper(asked, Machine(needed, needed, 10**12))))
    hopeless = "\n".join(sentences(on_paper(asked, Machine(9, 9, 10**12))))
    assert "no setting of this recipe makes it fit" in hopeless


def test_advice_is_written_as_an_option() -> None:
    """With what it saves and what it takes."""
    first = advice_table(on_paper(recipe())).rows[0]
    assert "=" in first[0] and first[1] == "memory" and first[4][0] in "+-"


def test_times_are_in_the_unit_that_people_would_take() -> None:
    """Seconds, minutes, hours, days."""
    times = [format_seconds(seconds) for seconds in (None, 3.14, 42.0, 210.0, 7560.0, 432_000.0)]
    assert times == ["?", "3.1 s", "42 s", "3.5 min", "2.1 h", "5.0 days"]
