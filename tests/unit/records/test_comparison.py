"""Runs side by side: paired differences, judgements, units in common and recipes; and what cannot be compared."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from secateur.errors import ConfigError
from secateur.records.choices import ChoicesScore
from secateur.records.comparison import ComparedRun, Overlap, compare_runs, judge
from secateur.records.evaluation import ModelScore, PairedDifference, TextScore
from secateur.records.plan import LayerPlan, VocabularyPlan
from tests.unit.report.compared import compared_run, documents
from tests.unit.report.records import choices_score, plan


def test_differences_are_those_of_the_documents() -> None:
    """Mean and error of nats per dense token, bits per byte and relative loss equal a computation by hand."""
    draw = random.Random(3)
    losses = {name: [draw.uniform(10, 30) for _ in range(50)] for name in ("dense", "a", "b")}
    runs = [compared_run(name, dense=losses["dense"], result=losses[name]) for name in ("a", "b")]
    [one] = compare_runs(runs).texts
    deltas = [b - a for a, b in zip(losses["a"], losses["b"], strict=True)]
    mean = sum(deltas) / 500  # ten tokens a document
    spread = sum((delta - 10 * mean) ** 2 for delta in deltas)
    assert one.nll.mean == pytest.approx(mean)
    assert one.nll.stderr == pytest.approx(math.sqrt(spread * 50 / 49) / 500)
    assert one.bits_per_byte.mean == pytest.approx(sum(deltas) / math.log(2) / 2000)
    assert one.relative.mean == pytest.approx(sum(deltas) / sum(losses["a"]))
    assert (one.run, one.bucket) == ("b", "medical")


def test_a_smaller_vocabulary_does_not_change_the_unit() -> None:
    """Nats are per token of the dense model, also where the baseline reads the text as other tokens."""
    a, b = compared_run("a", result=[20.0, 22.0]), compared_run("b", result=[21.0, 24.0])
    more = replace(a.result.text["medical"], document_tokens=(15, 15))
    a = replace(a, result=replace(a.result, text={"medical": more}))
    [one] = compare_runs([a, b]).texts
    assert one.nll.mean == pytest.approx(3.0 / 20)


@pytest.mark.parametrize(
    ("mean", "stderr", "expected"),
    [
        (-1.0, 0.5, "better"),
        (1.0, 0.5, "worse"),
        (0.97, 0.5, "no clear difference"),
        (0.0, 0.0, "the same"),
        (-0.1, 0.0, "better"),
        (3.0, math.inf, "unknown"),
    ],
)
def test_a_difference_is_judged_by_its_interval(mean: float, stderr: float, expected: str) -> None:
    """Surer than chance where 1.96 standard errors do not reach zero."""
    assert judge(PairedDifference(mean, stderr)) == expected


@pytest.mark.parametrize(
    ("dense", "run", "expected"),
    [(18, 20, "better"), (18, 12, "no clear difference"), (18, 6, "worse"), (6, 20, "no signal")],
)
def test_answers_are_judged_by_an_exact_test_and_only_with_a_signal(dense: int, run: int, expected: str) -> None:
    """A sign test on the questions that one alone answers; none where the dense model does not beat a guess."""

    def right(count: int) -> dict[str, ChoicesScore]:
        return {"exam": choices_score([place < count for place in range(20)])}

    runs = []
    for name, count in (("a", 13), ("b", run)):
        plain = compared_run(name)
        asked_dense = replace(plain.dense, choices=right(dense))
        runs.append(replace(plain, dense=asked_dense, result=replace(plain.result, choices=right(count))))
    [one] = compare_runs(runs).answers
    assert one.judgement == expected
    assert one.p_value == pytest.approx(min(1.0, 2 * 0.5 ** abs(run - 13)))
    assert one.acc.mean == pytest.approx((run - 13) / 20)


def test_questions_that_not_all_were_asked_are_left_out_and_named() -> None:
    """And so are other questions under the same name."""
    a, b = compared_run("a"), compared_run("b")
    one, other = {"exam": choices_score([True, False])}, {"exam": choices_score([True, False], fingerprint="0" * 16)}
    a = replace(a, dense=replace(a.dense, choices=one), result=replace(a.result, choices=one))
    assert compare_runs([a, b]).notes == ("The questions exam are not compared, because not every run was asked them.",)
    b = replace(b, dense=replace(b.dense, choices=other), result=replace(b.result, choices=other))
    [note] = compare_runs([a, b]).notes
    assert note.endswith("because they are not the same: 0000000000000000 and fedcba9876543210.")


def test_the_baseline_comes_first_whatever_the_order() -> None:
    """Differences are of the others, each once per text."""
    runs = [compared_run(name, result=[20.0 + place, 21.0]) for place, name in enumerate("abc")]
    comparison = compare_runs(runs, baseline="b")
    assert [run.name for run in comparison.runs] == ["b", "a", "c"]
    assert [(one.run, one.nll.mean > 0) for one in comparison.texts] == [("a", False), ("c", True)]


def test_other_test_text_is_refused_with_both_fingerprints() -> None:
    """Also where only the documents differ; other shared text can be asked for by name."""
    a, b = (compared_run(name, buckets=("medical", "general")) for name in "ab")
    other = replace(b.result.text["medical"], corpus_fingerprint="fedcba98765432100000")
    b = with_text(b, medical=other)
    with pytest.raises(ConfigError, match=r"different medical test text: fingerprint 0123456789abcdef .*") as caught:
        compare_runs([a, b])
    assert "fedcba9876543210 (" in str(caught.value)
    assert "--bucket general" in str(caught.value)
    comparison = compare_runs([a, b], buckets=["general"])
    assert comparison.buckets == ("general",)
    assert comparison.notes == ("medical is not compared, as asked.",)


def test_only_text_that_all_have_is_compared() -> None:
    """What one run has alone is named; with none in common there is no comparison."""
    a, b = compared_run("a", buckets=("medical", "legal")), compared_run("b", buckets=("medical",))
    comparison = compare_runs([a, b])
    assert comparison.buckets == ("medical",)
    assert "legal of a is not compared" in comparison.notes[0]
    with pytest.raises(ConfigError, match=r"no test text in common \(a: legal; b: medical\)"):
        compare_runs([compared_run("a", buckets=("legal",)), b])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "c"}, "unknown baseline 'c'"),
        ({"buckets": ["medicla"]}, "Did you mean 'medical'"),
    ],
)
def test_unknown_names_are_refused_with_the_known_ones(changes: dict[str, Any], message: str) -> None:
    """Of runs, and of text."""
    with pytest.raises(ConfigError, match=message):
        compare_runs([compared_run("a"), compared_run("b")], **changes)
    with pytest.raises(ConfigError, match="at least two runs; got 1"):
        compare_runs([compared_run("a")])


def test_other_dense_models_are_said_and_their_units_not_compared() -> None:
    """A name of a channel means nothing in another model."""
    comparison = compare_runs([compared_run("a"), replace(compared_run("b"), model_fingerprint="0" * 32)])
    assert comparison.plans == ()
    assert "b was made from another dense model" in comparison.notes[0]


def test_a_dense_model_that_measured_differently_is_said() -> None:
    """Other hardware or dtype: the difference is in every comparison."""
    a, b = compared_run("a", dense=[20.0, 20.0]), compared_run("b", dense=[20.1, 20.0])
    assert "lost +0.25% on medical in b against a" in compare_runs([a, b]).notes[0]
    assert compare_runs([a, replace(a, name="b")]).notes == ()


def test_units_in_common_are_counted_per_layer() -> None:
    """Against sets; a kind that one plan leaves whole counts as kept; what no plan cuts is not there."""
    cut = plan(layers={"ffn_channel": (LayerPlan(6, (0, 1, 2)), LayerPlan(6, (3, 4, 5)))})
    other = plan(layers={"ffn_channel": (LayerPlan(6, (1, 2, 5)), LayerPlan(6, ()))}, shape="uneven")
    whole = plan(layers={})
    runs = [compared_run(name, plan=one) for name, one in (("a", cut), ("b", other), ("c", whole))]
    first, second = compare_runs(runs).plans
    assert first.layers == (Overlap(6, 3, 3, 2), Overlap(6, 3, 0, 0))
    assert (first.layers[0].alike, first.layers[0].alike_by_chance) == (0.5, pytest.approx(1.5 / 4.5))
    assert first.total == Overlap(12, 6, 3, 2)
    assert second.layers == (Overlap(6, 3, 6, 3), Overlap(6, 3, 6, 3))
    assert second.total.alike == 0.5 == second.alike_by_chance


def test_units_alike_by_chance_are_what_random_cuts_have() -> None:
    """The expected number in common, beside many drawn cuts."""
    draw = random.Random(0)
    found = [len(set(draw.sample(range(200), 150)) & set(draw.sample(range(200), 100))) / 200 for _ in range(400)]
    expected = Overlap(200, 150, 100, 0).alike_by_chance
    assert expected == pytest.approx(75 / 175)
    assert 200 * sum(found) / len(found) == pytest.approx(75, rel=0.01)


def test_vocabularies_are_compared_where_one_is_cut() -> None:
    """A whole vocabulary keeps every id."""
    a = compared_run("a", plan=plan(vocabulary=VocabularyPlan(10, (0, 1, 2, 3))))
    comparison = compare_runs([a, compared_run("b")])
    assert comparison.vocabularies == {"b": Overlap(10, 4, 10, 4)}
    assert compare_runs([compared_run("a"), compared_run("b")]).vocabularies == {}


def test_recipe_keys_that_differ_are_listed_with_every_value() -> None:
    """Defaults count where both have the section, and not where one has it alone; outputs always differ."""
    common = {"output": "runs/a", "prune": {"method": "obs", "seed": 0, "budget": {"channels": 0.1}}, "general": None}
    trained = {"recover": {"method": "distill", "epochs": 2.0, "seed": 0}}
    a = replace(compared_run("a"), recipe=common, chosen={"prune": {"method": "obs"}})
    changed = {**common, "output": "runs/b", "prune": {**common["prune"], "seed": 1}}  # type: ignore[dict-item]
    b = replace(compared_run("b"), recipe={**changed, **trained}, chosen={"recover": {"epochs": 2.0}})
    assert compare_runs([a, b]).recipes == {
        "prune.seed": {"a": "0", "b": "1"},
        "recover.epochs": {"a": "", "b": "2.0"},
    }
    empty = replace(b, chosen={"recover": {}})
    assert compare_runs([a, empty]).recipes["recover"] == {"a": "", "b": "{}"}


def test_the_record_is_plain_data_for_json() -> None:
    """Unknown errors are null, and neither documents nor lists of units are in it."""
    one = {"dense": [20.0], "result": [21.0]}
    comparison = compare_runs([compared_run("a", **one), compared_run("b", **one)])
    text = json.dumps(comparison.to_dict(), allow_nan=False)
    assert json.loads(text)["differences"][0]["nll"] == {"mean": 0.0, "stderr": None, "low": None, "high": None}
    assert "document_nll" not in text


def with_text(run: ComparedRun, **texts: TextScore) -> ComparedRun:
    """Return a run whose models were measured on other text."""

    def changed(model: ModelScore) -> ModelScore:
        return replace(model, text={**model.text, **texts})

    return replace(run, dense=changed(run.dense), result=changed(run.result))


def test_made_up_runs_are_what_they_say() -> None:
    """The helper's totals are those of its documents."""
    score = documents([20.0, 30.0])
    assert score.nll_per_token * score.num_tokens == pytest.approx(sum(score.document_nll))
