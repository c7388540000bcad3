"""Scores and plans of every method have not changed; where a change is meant, ``make golden`` writes them anew."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest

from secateur.score import METHODS
from tests.golden.compute import FILE, compute

EXPECTED: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
TOLERANCE = EXPECTED["relative_tolerance"]


@cache
def actual() -> dict[str, Any]:
    """Return what the code computes now."""
    return compute()


def test_every_method_has_golden_numbers() -> None:
    """A new method adds an entry to the golden file, and no entry is left over."""
    assert {name.split()[0] for name in EXPECTED["methods"]} == set(METHODS)
    assert set(actual()["methods"]) == set(EXPECTED["methods"])


def test_the_model_is_the_one_the_numbers_were_made_with() -> None:
    """Layer cosines are reproduced, so a difference in scores is the method's own."""
    assert actual()["cosine_sum"] == pytest.approx(EXPECTED["cosine_sum"], rel=TOLERANCE)
    for kind, total in EXPECTED["sublayer_cosine_sum"].items():
        assert actual()["sublayer_cosine_sum"][kind] == pytest.approx(total, rel=TOLERANCE)


CASES = [(name, kind) for name, entry in EXPECTED["methods"].items() for kind in entry]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_scores_and_plans_have_not_changed(name: str, kind: str) -> None:
    """Every score to the stated tolerance, every kept unit exactly, every refusal word for word."""
    expected, now = EXPECTED["methods"][name][kind], actual()["methods"][name][kind]
    assert now.keys() == expected.keys()
    if "refused" in expected:
        assert now == expected
        return
    assert now.get("keep") == expected.get("keep")
    for ours, golden in zip(now["scores"], expected["scores"], strict=True):
        assert ours == pytest.approx(golden, rel=TOLERANCE)
