"""Measurements: their standard errors, their comparison, and their JSON form."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from secateur.records.choices import ChoicesScore, share_interval
from secateur.records.evaluation import (
    Evaluation,
    McNemar,
    ModelScore,
    SegmentationChange,
    TextScore,
    VocabularyEffect,
    mcnemar,
    paired_accuracy,
    paired_answers,
    paired_bits_per_byte,
    paired_difference,
    paired_margin,
    ratio_estimate,
    sign_test,
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
        "document_bytes": (40, 60, 100),
    }
    return TextScore(**{**fields, **changes})


def evaluation(**changes: Any) -> Evaluation:
    """Return a made-up evaluation of two models."""
    models = {
        name: ModelScore(name, {"ffn": 5, "embedding": 2}, 28, {"medical": text_score(**changes)})
        for name in ("dense", "pruned")
    }
    return Evaluation(models=models, seed=3)


def choices_score(*correct: bool, **changes: Any) -> ChoicesScore:
    """Return a made-up score of questions that were answered like this."""
    correct = correct or (True, False, True, True)
    fields: dict[str, Any] = {
        "acc": sum(correct) / len(correct),
        "acc_stderr": 0.25,
        "acc_norm": 0.5,
        "acc_norm_stderr": 0.3,
        "margin": 0.5,
        "margin_stderr": math.inf,
        "chance": 0.25,
        "majority": 0.25,
        "overlap": 0.3,
        "overlap_stderr": 0.1,
        "num_items": len(correct),
        "num_truncated": 1,
        "fingerprint": "questions",
        "tokens_per_s": 1000.0,
        "item_correct": correct,
        "item_correct_norm": correct[::-1],
        "item_margin": tuple(1.5 if right else -2.5 for right in correct),
        "item_chance": (0.25,) * len(correct),
    }
    return ChoicesScore(**{**fields, **changes})


def vocabulary_effect(**changes: Any) -> VocabularyEffect:
    """Return a made-up effect of a smaller vocabulary."""
    change = SegmentationChange(tokens_before=63, tokens_after=70, tokens_lost=4, documents_touched=2, num_documents=3)
    restricted = text_score(document_nll=(39.0, 29.0, 49.0), **changes)
    return VocabularyEffect(text_score(**changes), restricted, **asdict(change))


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
    plain = evaluation(**changes)
    for record in (plain, replace(plain, vocabulary={"medical": vocabulary_effect(**changes)})):
        assert Evaluation.from_dict(record.to_dict()) == record
        assert Evaluation.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_answers_survive_plain_data_and_json() -> None:
    """Per set and per question; a model that was asked nothing has none."""
    record = evaluation()
    models = {name: replace(model, choices={"quiz": choices_score()}) for name, model in record.models.items()}
    asked = replace(record, models=models)
    assert Evaluation.from_dict(json.loads(json.dumps(asked.to_dict()))) == asked
    assert record.to_dict()["models"]["dense"]["choices"] == {}
    for field in ("item_correct", "acc"):
        data = asked.to_dict()
        del data["models"]["dense"]["choices"]["quiz"][field]
        with pytest.raises((KeyError, TypeError), match=field):
            Evaluation.from_dict(data)


def test_the_vocabulary_stayed_whole_unless_it_is_said() -> None:
    """An evaluation without a smaller vocabulary has no effect of one, and says so in its file."""
    record = evaluation()
    assert record.vocabulary == {}
    assert record.to_dict()["vocabulary"] == {}


@pytest.mark.parametrize("version", [None, 3, 5, "4"])
def test_an_evaluation_of_another_version_is_not_read(version: object) -> None:
    """Fields may mean something else there; what reads the file says that it can be made again."""
    data = {**evaluation().to_dict(), "schema_version": version}
    with pytest.raises(TypeError, match=r"schema version .*, and this secateur reads 4"):
        Evaluation.from_dict(data)


def test_a_file_without_the_new_fields_is_not_read() -> None:
    """What is missing is named."""
    for key in ("schema_version", "vocabulary"):
        data = evaluation().to_dict()
        del data[key]
        with pytest.raises(KeyError, match=key):
            Evaluation.from_dict(data)
    data = evaluation().to_dict()
    del data["models"]["dense"]["text"]["medical"]["document_bytes"]
    with pytest.raises(KeyError, match="document_bytes"):
        Evaluation.from_dict(data)


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


def test_another_segmentation_is_compared_per_token_of_the_reference() -> None:
    """The same bytes under other tokens: the difference is per token of the second model's segmentation."""
    finer = text_score(document_nll=(45.0, 31.0, 54.0), document_tokens=(20, 20, 60), num_tokens=100)
    dense = text_score()
    difference = paired_difference(finer, dense)
    assert difference.mean == pytest.approx(10 / 60)
    assert difference == paired_difference(replace(finer, document_tokens=dense.document_tokens), dense)
    assert paired_difference(dense, finer).mean == pytest.approx(-10 / 100)


def test_bits_per_byte_are_compared_on_the_same_documents() -> None:
    """The difference of the totals in bits over all bytes, whatever the tokens; opposite when turned round."""
    first = text_score(document_nll=(45.0, 31.0, 54.0), document_tokens=(20, 20, 60))
    difference = paired_bits_per_byte(first, text_score())
    assert difference.mean == pytest.approx(10 / math.log(2) / 200)
    mean, stderr = ratio_estimate([5 / math.log(2), 1 / math.log(2), 4 / math.log(2)], [40, 60, 100])
    assert (difference.mean, difference.stderr) == pytest.approx((mean, stderr))
    assert paired_bits_per_byte(text_score(), first).mean == pytest.approx(-difference.mean)


def test_a_constant_difference_per_byte_has_no_error() -> None:
    """Half a bit more for every byte is half a bit, without doubt."""
    more = tuple(nll + 0.5 * math.log(2) * size for nll, size in zip((40.0, 30.0, 50.0), (40, 60, 100), strict=True))
    difference = paired_bits_per_byte(text_score(document_nll=more), text_score())
    assert difference.mean == pytest.approx(0.5)
    assert difference.stderr == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"corpus_fingerprint": "other"},
        {"document_bytes": (40, 60, 101)},
        {"document_bytes": (), "document_tokens": (10, 20, 31)},
        {"document_nll": (1.0, 2.0), "document_tokens": (10, 20), "document_bytes": (40, 60)},
    ],
)
def test_models_measured_on_different_text_are_not_compared(changes: dict[str, Any]) -> None:
    """A paired comparison needs the same documents."""
    for compare in (paired_difference, paired_bits_per_byte):
        for pair in (
            (text_score(), replace(text_score(), **changes)),
            (replace(text_score(), **changes), text_score()),
        ):
            with pytest.raises(ValueError, match=r"same test documents|needs the bytes of each document"):
                compare(*pair)


def test_scores_from_before_there_were_bytes_are_compared_by_their_tokens() -> None:
    """Records that do not know the bytes of each document still compare, per token only."""
    old = text_score(document_bytes=())
    assert paired_difference(old, text_score()).mean == 0.0
    assert paired_difference(old, old).mean == 0.0
    with pytest.raises(ValueError, match="needs the bytes of each document; measure both models again"):
        paired_bits_per_byte(text_score(), old)
    with pytest.raises(ValueError, match="needs the bytes of each document"):
        paired_bits_per_byte(old, old)


def test_accuracies_are_compared_question_by_question() -> None:
    """The mean of the differences and its textbook error; opposite when turned round; none for the same answers."""
    first, second = choices_score(True, True, False, True, True), choices_score(True, False, True, False, True)
    deltas = np.array([0, 1, -1, 1, 0])
    difference = paired_accuracy(first, second)
    assert difference.mean == pytest.approx(deltas.mean())
    assert difference.stderr == pytest.approx(deltas.std(ddof=1) / math.sqrt(5))
    assert paired_accuracy(second, first).mean == pytest.approx(-deltas.mean())
    same = paired_accuracy(first, first)
    assert (same.mean, same.stderr) == (0.0, 0.0)


def test_each_measure_is_compared_by_its_own_items() -> None:
    """``acc_norm`` by whether it counts a question, and margins in nats."""
    first, second = choices_score(True, True, False), choices_score(False, True, False)
    third = choices_score(False, True, False, item_correct_norm=(True, True, True))
    assert paired_accuracy(first, third, norm=True).mean == pytest.approx(-1 / 3)
    assert paired_accuracy(first, second).mean == pytest.approx(1 / 3)
    difference = paired_margin(first, second)
    assert difference.mean == pytest.approx(4 / 3)
    assert difference.stderr == pytest.approx(4 / 3)


def test_answers_to_other_questions_are_not_compared() -> None:
    """Neither another set nor another number of questions."""
    for other in (choices_score(fingerprint="others"), choices_score(True)):
        for compare in (paired_accuracy, paired_margin):
            with pytest.raises(ValueError, match="same questions for both models"):
                compare(choices_score(), other)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 1), (1, 0), (2, 5), (5, 2), (4, 4), (0, 9), (6, 7)])
def test_the_sign_test_equals_counting_all_outcomes(first: int, second: int) -> None:
    """Of all ways in which the cases can fall, the share of splits that are at least as uneven."""
    total = first + second
    least = abs(first - second)
    uneven = sum(abs(total - 2 * sum(falls)) >= least for falls in itertools.product((0, 1), repeat=total))
    assert sign_test(first, second) == pytest.approx(uneven / 2**total, rel=1e-12)
    assert sign_test(first, second) == sign_test(second, first)


def test_the_sign_test_holds_for_many_cases() -> None:
    """No overflow, and close to the normal law with continuity correction."""
    z = (abs(5200 - 4800) - 1) / math.sqrt(10_000)
    assert sign_test(5200, 4800) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.02)
    assert sign_test(20_000, 0) == 0.0


def test_mcnemar_counts_questions_that_only_one_model_answers() -> None:
    """Questions that both or neither answer do not count; a model beside itself has none."""
    first, second = (
        choices_score(True, True, True, False, True, False),
        choices_score(False, False, True, False, False, True),
    )
    assert mcnemar(first, second) == McNemar(3, 1, sign_test(3, 1))
    assert mcnemar(second, first) == McNemar(1, 3, sign_test(3, 1))
    assert mcnemar(first, first) == McNemar(0, 0, 1.0)
    assert mcnemar(first, second, "acc_norm") == McNemar(3, 1, sign_test(3, 1))
    with pytest.raises(ValueError, match="same questions for both models"):
        mcnemar(first, choices_score(fingerprint="others"))


def test_measures_that_were_not_scored_are_not_compared() -> None:
    """One model with the measure and one without are not the same questions."""
    scored = choices_score(item_correct_perplexity=(True, False, True, True), acc_perplexity=0.75)
    assert scored.measures == ("acc", "acc_norm", "acc_perplexity")
    assert paired_answers(scored, scored, "acc_perplexity").mean == 0.0
    with pytest.raises(ValueError, match="same questions"):
        paired_answers(scored, choices_score(), "acc_perplexity")


def test_subjects_are_written_for_readers_and_made_again() -> None:
    """The file holds the shares by subject; the record makes them from its questions."""
    score = choices_score(item_subject=("b", "a", "b", "b"))
    models = {name: replace(model, choices={"quiz": score}) for name, model in evaluation().models.items()}
    data = replace(evaluation(), models=models).to_dict()
    written = data["models"]["dense"]["choices"]["quiz"]["subjects"]
    assert list(written) == ["a", "b"]
    assert written["b"]["acc"] == 1.0
    assert written["b"]["num_items"] == 3
    assert Evaluation.from_dict(json.loads(json.dumps(data))).models == models
    assert asdict(score.subjects()["a"])["acc"] == 0.0


@pytest.mark.parametrize(("right", "items"), [(0, 5), (5, 5), (3, 10), (260, 1000), (1, 1)])
def test_an_interval_holds_what_the_score_test_does_not_reject(right: int, items: int) -> None:
    """Its ends are where the observed share is 1.96 standard errors, taken at the end, away."""
    share = right / items
    for end in share_interval(right, items):
        if 0 < end < 1:
            assert abs(share - end) / math.sqrt(end * (1 - end) / items) == pytest.approx(1.959964, rel=1e-6)


def test_a_signal_is_an_interval_above_what_needs_no_knowledge() -> None:
    """The better of guessing and one answer always; below them is no signal either."""
    right = tuple(i < 40 for i in range(100))
    good = choices_score(*right)
    assert good.interval()[0] == pytest.approx(0.309, abs=1e-3)
    assert good.has_signal()
    assert not replace(good, majority=0.31).has_signal()
    assert not replace(good, chance=0.33).has_signal()
    assert not choices_score(*(i < 5 for i in range(100))).has_signal()
