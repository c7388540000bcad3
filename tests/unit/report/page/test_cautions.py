"""The numbers at the top, and what is held against them."""

from __future__ import annotations

from dataclasses import replace

from secateur.report.page.cautions import cautions, tiles

from ..records import evaluation, plan
from .runs import full_run, many_documents


def test_tiles_say_size_losses_and_control_with_their_errors() -> None:
    """Size is counted, losses carry an error and an interval."""
    shown = {tile.label: tile for tile in tiles(full_run(evaluation=many_documents(evaluation()), recoveries={}))}
    assert shown["parameters"].value == "\u221214.3 %"
    assert "counted exactly" in shown["weights"].detail
    domain = shown["perplexity on medical, relative to dense"]
    assert domain.value.startswith("1.10")
    assert "95 % interval 1.10" in domain.detail
    assert domain.detail.startswith("\u00b1 ")
    assert not any(tile.is_missing for tile in shown.values())


def test_what_was_not_measured_is_said_in_its_tile_and_in_words() -> None:
    """No control and no general text are gaps, and the page names the keys that close them."""
    measured = many_documents(evaluation(dense=2.0, pruned=2.1))
    models = {name: replace(model, text={"medical": model.text["medical"]}) for name, model in measured.models.items()}
    run = full_run(evaluation=replace(measured, models=models), recoveries={})
    assert [tile.label for tile in tiles(run) if tile.is_missing] == ["general text", "a random cut of the same size"]
    words = " ".join(cautions(run))
    assert "evaluate.controls: [random]" in words
    assert "No general text was measured" in words


def test_a_trained_model_is_compared_with_a_trained_dense_one() -> None:
    """Otherwise what training gave would be taken for what pruning kept."""
    run = full_run()
    assert any(tile.label == "on medical, relative to dense trained alike" for tile in tiles(run))
    assert any("What the cut cost is the ratio to that model, 1.10" in sentence for sentence in cautions(run))
    alone = {name: model for name, model in run.evaluation.models.items() if name != "dense_finetuned"}
    words = " ".join(cautions(full_run(evaluation=replace(run.evaluation, models=alone))))
    assert "recover.baselines: [dense]" in words


def test_a_method_that_does_not_beat_chance_is_named() -> None:
    """Where the interval of random over pruned holds 1, the choice of units shows no effect."""
    same = many_documents(evaluation(dense=2.0, pruned=2.1, random=2.1))
    assert any("shows no effect" in sentence for sentence in cautions(full_run(evaluation=same, recoveries={})))
    apart = many_documents(evaluation(dense=2.0, pruned=2.1, random=3.0))
    assert not any("shows no effect" in sentence for sentence in cautions(full_run(evaluation=apart, recoveries={})))


def test_few_documents_and_forgotten_text_are_named() -> None:
    """Two documents give no trustworthy interval; test documents left out are counted."""
    words = " ".join(cautions(full_run(evaluation=evaluation(dense=2.0, pruned=3.0), recoveries={}, plan=plan())))
    assert "medical was measured on 2 documents" in words
    assert "3 test documents of general had been seen" in words
    assert "use this model on its domain only" in words
    assert "tokenizer" not in words
