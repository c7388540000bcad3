"""Tables: numbers with digits that mean something, and text that cannot break the table."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from secateur.records.evaluation import Evaluation, paired_difference
from secateur.records.plan import LayerPlan
from secateur.report.tables import (
    Table,
    attribution_table,
    cut_table,
    evidence_table,
    format_bytes,
    format_count,
    parts_table,
    plan_table,
    removed_blocks,
    result_table,
    segmentation_table,
    speed_table,
    verdict,
    vocabulary_table,
    with_error,
)

from .records import asked, evaluation, plan, text_score, vocabulary_effect, vocabulary_plan


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (12.0345, 0.213, "12.03 ± 0.21"),
        (12.0346, 0.0213, "12.035 ± 0.021"),
        (12.0345, 2.13, "12.0 ± 2.1"),
        (1234.5, 21.3, "1,234 ± 21"),
        (123456.7, 2130.0, "123,457 ± 2,130"),
        (1.0, 1e-12, "1.000000 ± 0.000000"),
        (0.5, 0.1, "0.50 ± 0.10"),
        (12.0345, math.inf, "12.03"),
        (12.0345, math.nan, "12.03"),
        (12.0345, 0.0, "12.03"),
    ],
)
def test_a_value_is_shown_to_two_digits_of_its_error(value: float, error: float, shown: str) -> None:
    """No digit is shown that the error makes meaningless; an unknown error is not shown at all."""
    assert with_error(value, error) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0"), (999, "999"), (1000, "1.0 k"), (134_515_008, "134.5 M"), (1_711_376_384, "1.7 B"), (-2500, "-2.5 k")],
)
def test_counts_are_short(count: int, shown: str) -> None:
    """Thousands, millions and billions have the field's letters."""
    assert format_count(count) == shown


@pytest.mark.parametrize(("size", "shown"), [(0, "0 B"), (999, "999 B"), (538_090_408, "538.1 MB"), (4e9, "4.0 GB")])
def test_sizes_are_decimal(size: float, shown: str) -> None:
    """As disks and downloads are labelled."""
    assert format_bytes(size) == shown


def test_markdown_survives_any_text() -> None:
    """A bar in a cell or a head is text, not a column."""
    shown = Table("t", ["a|b", "n"], [["x|y", "1"], ["z", "2"]]).markdown()
    assert shown.splitlines() == [r"| a\|b | n |", "|---|---:|", r"| x\|y | 1 |", "| z | 2 |"]


def test_the_result_table_has_what_a_newcomer_asks() -> None:
    """Per model: size and share removed; per bucket: perplexity, bits per byte and the ratio to the dense model."""
    table = result_table(evaluation())
    measures = ("perplexity", "bits/byte", "ppl / dense")
    columns = [f"{bucket} {measure}" for bucket in ("medical", "general") for measure in measures]
    assert table.columns == ["model", "parameters", "weights", *columns]
    dense, pruned, random = table.rows
    assert dense[:3] == ["dense", "3.5 M", "7.0 MB"]
    assert pruned[:3] == ["pruned", "3.0 M (-14.3%)", "6.0 MB"]
    assert dense[3] == "7.389 ± 0.074"
    assert dense[4] == "1.0000 ± 0.0050"
    assert dense[5] == dense[8] == "1"
    assert (pruned[5], random[5]) == ("1.105", "2.718")
    assert [len(row) for row in table.rows] == [len(table.columns)] * 3


def test_the_ratio_has_the_error_of_the_paired_difference() -> None:
    """Its error comes from the differences per document, far below the error of either perplexity."""
    both = evaluation(dense=2.0, pruned=2.1)
    moved = text_score(2.1, document_nll=(30 * 2.1 - 1.3, 70 * 2.1 + 1.3))
    models = {
        **both.models,
        "pruned": replace(both.models["pruned"], text={**both.models["pruned"].text, "medical": moved}),
    }
    difference = paired_difference(moved, both.models["dense"].text["medical"])
    shown = result_table(Evaluation(models, 0)).rows[1][5]
    assert shown == with_error(math.exp(0.1), math.exp(0.1) * difference.stderr)
    assert "±" in shown


def test_the_evidence_is_how_much_was_measured_on() -> None:
    """Documents, tokens, bytes and what was left out, per bucket."""
    medical, general = evidence_table(evaluation()).rows
    assert medical == ["medical", "2", "100", "4,567", "0", "0123456789ab"]
    assert general[4] == "3"


def test_the_parts_add_up() -> None:
    """Each part before and after; the last row is the sum; a part without parameters has no share."""
    rows = parts_table(plan().parameters_dense, plan().parameters_pruned).rows
    assert rows[2] == ["ffn", "2,000,000", "1,500,000", "-500,000", "-25.0%"]
    assert rows[3] == ["head", "0", "0", "+0", ""]
    assert rows[-1] == ["total", "3,501,000", "3,001,000", "-500,000", "-14.3%"]
    assert [row[0] for row in rows] == ["embedding", "attention", "ffn", "head", "other", "total"]


def test_the_plan_table_shows_both_sides_of_the_cut() -> None:
    """Per layer and kind: kept, of how many, and the scores at the border; nothing where nothing was removed."""
    table = plan_table(plan())
    assert table.rows[1] == ["1", "3", "4", "0.125", "0.25"]
    whole = LayerPlan(num_units=2, keep=(0, 1))
    both = plan_table(plan(layers={**plan().layers, "gqa_group": (whole, whole)}))
    assert both.rows[0] == ["0", "3", "4", "0.125", "0.25", "2", "2", "", ""]
    assert len(both.columns) == 9


def test_speeds_are_those_that_were_met() -> None:
    """A bucket whose calibration was not timed is left out."""
    rows = speed_table(evaluation(dense=2.0), {"medical": 810.4, "general": 0.0}).rows
    assert rows == [
        ["calibrate medical", "810"],
        ["evaluate dense on medical", "1,234"],
        ["evaluate dense on general", "1,234"],
    ]
    assert speed_table(asked(dense=[True, False]), {}).rows[2] == ["ask dense exam", "4,321"]


def test_the_verdict_is_a_sentence_per_domain() -> None:
    """Smaller by how much, at what loss, and what a random cut of the same size would have cost."""
    assert verdict(evaluation(), ["medical"]) == (
        "14.3% fewer parameters; perplexity on held-out medical text is 1.105 x the dense model's "
        "(random pruning at the same size: 2.718 x)."
    )
    without = verdict(evaluation(dense=2.0, pruned=2.1), ["medical", "general"])
    assert without.count("fewer parameters") == 2 and "random" not in without


def test_a_hopeless_model_does_not_overflow() -> None:
    """A loss of thousands of nats has a finite perplexity to print."""
    table = result_table(evaluation(dense=2.0, pruned=5000.0))
    assert all(cell for cell in table.rows[1])


def test_the_saving_is_told_by_kind_of_unit() -> None:
    """Units removed, what they owned, and their share of the saving; the vocabulary counts embedding and head."""
    parts = plan().parameters_dense
    both = plan(vocabulary=vocabulary_plan(), parameters_pruned={**parts, "ffn": 1_500_000, "embedding": 500_000})
    assert cut_table(both).rows == [
        ["FFN channels", "2", "8", "25.0%", "500,000", "50.0%"],
        ["token ids", "500", "1,000", "50.0%", "500,000", "50.0%"],
    ]
    assert cut_table(plan()).rows == [["FFN channels", "2", "8", "25.0%", "500,000", "100.0%"]]


def test_whole_layers_and_sub_layers_are_told() -> None:
    """By number in a line, and as rows of the table of savings; nothing is said where none go."""
    all_, none = LayerPlan(2, (0, 1)), LayerPlan(2, ())
    layers = {"ffn_channel": (all_, none, none, none, all_), "gqa_group": (all_, none, none, all_, none)}
    deep = plan(shape="uneven", layers=layers)
    assert removed_blocks(deep) == "layers removed: 1-2; attention removed: 4; ffn removed: 3"
    assert [row[:4] for row in cut_table(deep).rows] == [
        ["FFN channels", "6", "10", "60.0%"],
        ["GQA groups", "6", "10", "60.0%"],
        ["decoder layers", "2", "5", "40.0%"],
        ["attention sub-layers", "1", "5", "20.0%"],
        ["FFN sub-layers", "1", "5", "20.0%"],
    ]
    assert removed_blocks(plan()) == ""


def test_experts_beside_channels_of_dense_layers_are_told_together() -> None:
    """What each owned is not known, so their saving is said once; kinds that no layer has get no row."""
    none = LayerPlan(0, ())
    layers = {
        "ffn_channel": (LayerPlan(4, (0, 1)), none),
        "expert": (none, LayerPlan(8, (1, 3))),
        "shared_channel": (none, none),
    }
    assert cut_table(plan(layers=layers)).rows == [
        ["FFN channels", "2", "4", "50.0%", "500,000", "100.0% in all (FFN channels, experts)"],
        ["experts", "6", "8", "75.0%", "", ""],
    ]
    whole = plan(shape="uneven", layers={**layers, "expert": (none, LayerPlan(8, ()))})
    assert removed_blocks(whole) == "ffn removed: 1"
    assert cut_table(whole).rows[-1] == ["FFN sub-layers", "1", "2", "50.0%", "", ""]


def test_the_reasons_of_kept_token_ids_are_listed() -> None:
    """One row a reason, then all that stay, then all there were."""
    rows = vocabulary_table(vocabulary_plan()).rows
    assert rows == [["special", "20"], ["used", "480"], ["all that stay", "500"], ["before", "1,000"]]


def test_the_loss_adds_up_from_its_causes() -> None:
    """Segmentation, softmax and other units are steps from the dense model to the pruned one."""
    measured = evaluation(dense=2.0, pruned=2.2)
    effect = {name: vocabulary_effect(nll, nll + 0.3, nll + 0.1) for name, nll in (("medical", 2.0), ("general", 2.5))}
    rows = attribution_table(replace(measured, vocabulary=effect)).rows
    assert [row[0] for row in rows] == ["medical", "general"]
    steps = [float(cell.split(" %")[0]) for cell in rows[0][2:]]
    assert [step / steps[3] for step in steps] == pytest.approx([1.5, -1.0, 0.5, 1.0], abs=0.02)
    assert sum(steps[:3]) == pytest.approx(steps[3], abs=0.02)


def test_the_segmentation_is_told_in_tokens_per_byte() -> None:
    """Before and after over the same bytes, the tokens that went, and the documents they were in."""
    measured = replace(evaluation(), vocabulary={"medical": vocabulary_effect(2.0, 2.3, 2.1)})
    assert segmentation_table(measured).rows == [["medical", "0.0223", "0.0241", "+7.84%", "2.94%", "50.0%"]]
