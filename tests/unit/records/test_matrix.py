"""The domain matrix: paired by document, every domain counted the same, and the same after a round trip."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from secateur.records.evaluation import paired_difference
from secateur.records.matrix import CONTROL, OTHERS, DomainMatrix, SizeMatrix, size_matrix
from tests.unit.report.compared import documents, model
from tests.unit.report.matrices import DOMAINS, full_matrix, scores


def of(size: SizeMatrix, domain: str, other: str) -> float:
    """Return the mean of one difference."""
    [one] = [one for one in size.differences if (one.domain, one.other) == (domain, other)]
    return one.nll.mean


def test_cells_are_paired_with_the_dense_model() -> None:
    """Each cell is the paired difference of its row's model and the dense model on its text."""
    models, dense = scores()
    size = size_matrix({"channels": 0.2}, models, dense, DOMAINS)
    assert [row.name for row in size.rows] == [*DOMAINS, "general", CONTROL]
    for row in size.rows:
        for text, found in row.to_dense.items():
            assert found == paired_difference(models[row.name][1].text[text], dense.text[text])


def test_own_minus_others_mean_is_of_documents() -> None:
    """Its mean is that of the single differences, and its error knows that they share the own model's documents."""
    models, dense = scores()
    size = size_matrix({"channels": 0.2}, models, dense, DOMAINS)
    singles = [of(size, "legal", name) for name in DOMAINS if name != "legal"]
    assert of(size, "legal", OTHERS) == pytest.approx(sum(singles) / len(singles))
    texts = {name: models[name][1].text["legal"] for name in DOMAINS}
    deltas = [
        own - (a + b) / 2
        for own, a, b in zip(
            texts["legal"].document_nll, texts["medical"].document_nll, texts["code"].document_nll, strict=True
        )
    ]
    count = len(deltas)
    mean = sum(deltas) / count
    spread = sum((delta - mean) ** 2 for delta in deltas)
    [one] = [one for one in size.differences if (one.domain, one.other) == ("legal", OTHERS)]
    assert one.nll.stderr == pytest.approx(math.sqrt(spread * count / (count - 1)) / (10 * count))


def test_the_mean_over_domains_counts_each_the_same() -> None:
    """Errors of different texts are independent."""
    models, dense = scores()
    size = size_matrix({}, models, dense, DOMAINS)
    found = [one.nll for one in size.differences if one.other == "general"]
    mean = size.mean_against("general")
    assert mean is not None
    assert mean.mean == pytest.approx(sum(one.mean for one in found) / 3)
    assert mean.stderr == pytest.approx(math.sqrt(sum(one.stderr**2 for one in found)) / 3)
    assert size.mean_against("nothing") is None


def test_the_best_row_is_never_the_control() -> None:
    """A random cut that happens to be best is a caution, and not a text that was calibrated on."""
    models, dense = scores()
    lucky = replace(models[CONTROL][1], text={name: documents([1.0] * 40) for name in dense.text})
    size = size_matrix({}, {**models, CONTROL: ("control", lucky, "")}, dense, DOMAINS)
    assert [size.best(name) for name in DOMAINS] == list(DOMAINS)
    assert {one.judgement for one in size.differences if one.other == CONTROL} == {"worse"}


def test_rows_on_other_text_cannot_be_set_side_by_side() -> None:
    """They raise, instead of being subtracted."""
    models, dense = scores()
    other = {name: replace(score, corpus_fingerprint="other") for name, score in dense.text.items()}
    with pytest.raises(ValueError, match="same test documents"):
        size_matrix({}, {**models, "medical": ("domain", model("pruned", other), "")}, dense, DOMAINS)


def test_a_matrix_comes_back_from_json() -> None:
    """Also one with an error that is not known, which JSON cannot say; other versions are refused."""
    matrix = full_matrix()
    assert DomainMatrix.from_dict(json.loads(json.dumps(matrix.to_dict(), allow_nan=False))) == matrix
    single = full_matrix(count=1)
    again = DomainMatrix.from_dict(json.loads(json.dumps(single.to_dict(), allow_nan=False)))
    assert again == single
    assert math.isinf(again.sizes[0].differences[0].nll.stderr)
    with pytest.raises(TypeError, match="schema version 0"):
        DomainMatrix.from_dict({**matrix.to_dict(), "schema_version": 0})


@pytest.mark.parametrize(
    ("budget", "label"),
    [
        ({"channels": 0.25}, "25 % of channels removed"),
        ({"channels": 0.125, "groups": 0.5}, "12.5 % of channels and 50 % of groups removed"),
        ({"threshold": 0.01}, "threshold 0.01"),
        ({}, "the smaller vocabulary"),
    ],
)
def test_a_size_has_a_label_that_people_read(budget: dict[str, float], label: str) -> None:
    """Shares are removed shares."""
    assert SizeMatrix(budget, (), ()).label == label
