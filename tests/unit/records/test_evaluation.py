"""Measurements: their standard errors, their comparison, and their JSON form."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from secateur.records.evaluation import (
    Evaluation,
    ModelScore,
    TextScore,
    paired_difference,
    ratio_estimate,
)


def text_score(**changes: Any) -> TextScore:
    """Return a made-up text score with some fields changed."""
    fields: dict[str, Any] = {
        "nll_per_token": 2.0,
        "nll_stderr": 0.25,
        "bits_per_byte": 0.9,
        "bits_per_byte_stderr": 0.1,
        "num_tokens": 60,
        "num_bytes": 200,
        "num_documents": 3,
        "num_excluded": 1,
        "corpus_fingerprint": "text",
        "tokens_per_s": 1000.0,
        "document_nll": (40.0, 30.0, 50.0),
        "document_tokens": (10, 20, 30),
    }
    return TextScore(**{**fields, **changes})


def evaluation(**changes: Any) -> Evaluation:
    """Return a made-up evaluation of two models."""
    models = {
        name: ModelScore(name, {"ffn": 5, "embedding": 2}, 28, {"medical": text_score(**changes)})
        for name in ("dense", "pruned")
    }
    return Evaluation(models=models, seed=3)


def test_perplexity_and_its_error_follow_from_the_loss() -> None:
    """exp(NLL), and to first order exp(NLL) times its standard error."""
    score = text_score()
    assert score.perplexity == pytest.approx(math.exp(2.0))
    assert score.perplexity_stderr == pytest.approx(math.exp(2.0) * 0.25)
    step = 1e-6
    slope = (text_score(nll_per_token=2 + step).perplexity - score.perplexity) / step
    assert score.perplexity_stderr == pytest.approx(slope * 0.25, rel=1e-5)


def test_an_absurd_loss_has_a_finite_perplexity() -> None:
    """A ruined model must not overflow the report."""
    assert math.isfinite(text_score(nll_per_token=5000.0).perplexity)


def test_a_models_parameters_add_up() -> None:
    """Total over parts."""
    assert evaluation().models["dense"].total_parameters == 7


@pytest.mark.parametrize("changes", [{}, {"nll_stderr": math.inf, "num_documents": 1}], ids=["usual", "one document"])
def test_an_evaluation_survives_plain_data_and_json(changes: dict[str, Any]) -> None:
    """What was written is what is read, an unknown standard error included."""
    record = evaluation(**changes)
    assert Evaluation.from_dict(record.to_dict()) == record
    assert Evaluation.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_the_file_states_the_perplexity_for_readers() -> None:
    """Derived numbers are written out, without changing the record."""
    record = evaluation()
    text = record.to_dict()["models"]["pruned"]["text"]["medical"]
    assert text["perplexity"] == pytest.approx(math.exp(2.0))
    assert text["perplexity_stderr"] == pytest.approx(math.exp(2.0) / 4)
    assert record == evaluation()


def test_a_ratio_and_its_error_match_the_formula_and_the_bootstrap() -> None:
    """The standard error is the linearised one, written out here in NumPy, and agrees with resampling documents."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(5, 200, size=80)
    totals = sizes * rng.normal(3.0, 0.5, size=80) + rng.normal(0, 2, size=80)
    ratio, stderr = ratio_estimate([float(t) for t in totals], [int(s) for s in sizes])
    assert ratio == pytest.approx(totals.sum() / sizes.sum(), rel=1e-12)
    residuals = totals - ratio * sizes
    assert stderr == pytest.approx(np.sqrt(80 * residuals.var(ddof=0) * 80 / 79) / sizes.sum(), rel=1e-9)
    draws = rng.integers(0, 80, size=(4000, 80))
    bootstrap = totals[draws].sum(1) / sizes[draws].sum(1)
    assert stderr == pytest.approx(bootstrap.std(), rel=0.05)


def test_documents_of_equal_size_give_the_textbook_error() -> None:
    """With equal sizes the ratio's error is the standard error of a mean."""
    totals = [4.0, 7.0, 1.0, 8.0]
    ratio, stderr = ratio_estimate(totals, [2, 2, 2, 2])
    assert ratio == 2.5
    assert stderr == pytest.approx(np.std(np.array(totals) / 2, ddof=1) / 2)


def test_one_document_has_no_error_and_none_has_no_ratio() -> None:
    """A single draw says nothing about its spread; no draw says nothing at all."""
    assert ratio_estimate([6.0], [3]) == (2.0, math.inf)
    with pytest.raises(ValueError, match="nothing was measured"):
        ratio_estimate([], [])
    with pytest.raises(ValueError, match="nothing was measured"):
        ratio_estimate([0.0], [0])


def test_totals_and_sizes_must_pair_up() -> None:
    """A missing size is our bug, not a shorter sum."""
    with pytest.raises(ValueError, match="zip"):
        ratio_estimate([1.0, 2.0, 3.0], [1, 2])


def test_a_paired_difference_is_signed_and_tighter() -> None:
    """First minus second, per token; a constant difference per token has no error at all."""
    first = text_score()
    second = text_score(document_nll=(39.0, 28.0, 47.0))
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(6 / 60)
    assert difference.stderr == pytest.approx(0.0, abs=1e-12)
    assert paired_difference(second, first).mean == pytest.approx(-0.1)
    assert paired_difference(first, first).mean == 0.0


@pytest.mark.parametrize("changes", [{"corpus_fingerprint": "other"}, {"document_tokens": (10, 20, 31)}])
def test_models_measured_on_different_text_are_not_compared(changes: dict[str, Any]) -> None:
    """A paired comparison needs the same documents."""
    with pytest.raises(ValueError, match="same test documents"):
        paired_difference(text_score(), replace(text_score(), **changes))
