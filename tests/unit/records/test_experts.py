"""A family of experts: numbers paired by document, and the same after a round trip."""

from __future__ import annotations

import json

import pytest

from secateur.records.experts import ExpertFamily
from tests.unit.report.families import full_family


def test_an_expert_is_judged_on_its_own_text_and_on_the_others() -> None:
    """Elsewhere is the mean over the other domains, every domain alike; general text is apart."""
    family = full_family()
    [_, legal, _] = family.experts
    row = family.row(legal)
    assert family.own(legal) == row.to_dense["legal"]
    elsewhere = family.elsewhere(legal)
    assert elsewhere is not None
    assert elsewhere.mean == pytest.approx((row.to_dense["medical"].mean + row.to_dense["code"].mean) / 2)
    assert family.general(legal) == row.to_dense["general"]
    assert family.own(legal).mean < elsewhere.mean


def test_a_family_survives_json() -> None:
    """What is not known included; another version is refused."""
    family = full_family()
    plain = json.loads(json.dumps(family.to_dict()))
    assert ExpertFamily.from_dict(plain) == family
    with pytest.raises(TypeError, match="schema version 0"):
        ExpertFamily.from_dict({**plain, "schema_version": 0})
