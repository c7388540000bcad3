"""Keep rules: what is asked for, what has to stay, and what others need, each told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from secateur.allocate import Request, make_plan
from secateur.allocate.budget import token_cost
from secateur.allocate.vocabulary import (
    COUNTED,
    NEEDED,
    ROUNDED,
    Vocabulary,
    choose_tokens,
    same_size_tokens,
    size_for_budget,
    smallest_size,
)
from secateur.errors import PlanError
from secateur.records.plan import VocabularyPlan
from secateur.records.scores import Scores
from secateur.vocabulary import read_tokenizer
from tests.allocation import HIDDEN, llama, random_scores, total

PIECES = ["<s>", "a", "b", "c", "d", "ab", "cd", "abcd", "ac", "acd", "bd"]
"""Ids 0 to 10; abcd is merged from ab and cd, acd from a and cd."""
MERGES = [["a", "b"], ["c", "d"], ["ab", "cd"], ["a", "c"], ["a", "cd"], ["b", "d"]]
ALPHABET = [0, 1, 2, 3, 4]


def vocabulary(num_rows: int = 13, **required: Sequence[int]) -> Vocabulary:
    """Return a vocabulary of eleven tokens, in an embedding with two rows to spare."""
    model = {"type": "BPE", "vocab": {piece: id for id, piece in enumerate(PIECES)}, "merges": MERGES}
    added = [{"id": 0, "content": "<s>", "special": True}]
    graph = read_tokenizer({"model": model, "added_tokens": added})
    return Vocabulary(graph, num_rows, {"alphabet": ALPHABET, **required}, "fingerprint")


def counts(**tokens: int) -> torch.Tensor:
    """Return counts by piece; the others are 0."""
    return torch.tensor([tokens.get(piece, 0) for piece in PIECES])


TEXT = counts(a=50, b=20, ab=10, abcd=6, ac=4, bd=10)


def kept(rule: Mapping[str, int | float], text: torch.Tensor = TEXT, **options: Any) -> list[str]:
    """Return the pieces that stay and are no single characters."""
    plan = choose_tokens(vocabulary(), text, rule, **options)
    return [PIECES[token] for token in plan.keep if token not in ALPHABET]


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ({"min_count": 1}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({"min_count": 5}, ["ab", "cd", "abcd", "bd"]),
        ({"min_count": 7}, ["ab", "bd"]),
        ({"min_count": 10}, ["ab", "bd"]),
        ({"min_count": 11}, []),
        ({"threshold": 0.0}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({"threshold": 0.04}, ["ab", "cd", "abcd", "bd"]),
        ({"threshold": 0.0399}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({"coverage": 0.7}, []),
        ({"coverage": 0.71}, ["ab"]),
        ({"coverage": 0.90}, ["ab", "bd"]),
        ({"coverage": 1.0}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({"size": 5}, []),
        ({"size": 6}, ["ab"]),
        ({"size": 8}, ["ab", "ac", "bd"]),
        ({"size": 9}, ["ab", "cd", "abcd", "bd"]),
        ({"size": 10}, ["ab", "cd", "abcd", "ac", "bd"]),
        ({"size": 11}, ["ab", "cd", "abcd", "ac", "acd", "bd"]),
    ],
)
def test_rules_keep_what_they_say_and_what_that_needs(rule: dict[str, float], pieces: list[str]) -> None:
    """Counts are compared, ties go to the lower id, and abcd never stays without cd.

    At size 8 only one place is left for abcd, which needs two, so the next token that fits takes it.
    """
    assert kept(rule) == pieces


def test_every_reason_is_told_once() -> None:
    """The reasons add up to what stays; an id that is needed and used counts as used."""
    plan = choose_tokens(vocabulary(terms=[9]), TEXT, {"min_count": 6})
    assert plan.reasons == {"alphabet": 5, "terms": 1, NEEDED: 1, COUNTED: 3}
    assert sum(plan.reasons.values()) == len(plan.keep) == 10
    assert plan.num_tokens == 13
    assert plan.counted_tokens == 100
    assert plan.covered_ratio == pytest.approx(0.96)
    assert (plan.rule, plan.tokenizer_fingerprint) == ({"min_count": 6}, "fingerprint")


def test_a_multiple_is_reached_with_real_tokens() -> None:
    """Rules are rounded up by the next most used tokens, a size down; rows without a token never stay."""
    assert kept({"min_count": 10}, multiple_of=4) == ["ab", "ac", "bd"]
    plan = choose_tokens(vocabulary(), TEXT, {"min_count": 10}, multiple_of=4)
    assert plan.reasons[ROUNDED] == 1
    assert kept({"size": 9}, multiple_of=4) == ["ab", "ac", "bd"]
    assert len(choose_tokens(vocabulary(), TEXT, {"min_count": 1}, multiple_of=64).keep) == len(PIECES)


def test_large_vocabularies_are_rounded_by_themselves() -> None:
    """From 8,192 rows on the automatic multiple is 64; here no tokens are left, so it stays short of it."""
    assert len(choose_tokens(vocabulary(8192), TEXT, {"min_count": 10}).keep) == len(PIECES)
    assert len(choose_tokens(vocabulary(8191), TEXT, {"min_count": 10}).keep) == 7


def test_what_cannot_be_met_is_said() -> None:
    """Too small a size names the minimum and what it is made of; a rule that removes nothing is no rule."""
    assert smallest_size(vocabulary(terms=[7])) == 8
    with pytest.raises(
        PlanError, match=r"a vocabulary of 7 ids is too small: 8 must stay \(5 alphabet, 1 terms, 2 need"
    ):
        choose_tokens(vocabulary(terms=[7]), TEXT, {"size": 7})
    with pytest.raises(PlanError, match="a vocabulary of 13 ids removes nothing: the model has 13"):
        choose_tokens(vocabulary(), TEXT, {"size": 13})
    with pytest.raises(PlanError, match="keeps all 11 token ids, so it removes nothing"):
        choose_tokens(vocabulary(11), counts(**dict.fromkeys(PIECES, 3)), {"min_count": 3})
    with pytest.raises(PlanError, match="no token of the domain's text was counted"):
        choose_tokens(vocabulary(), counts(), {"min_count": 1})


def test_controls_keep_as_many() -> None:
    """A control of the same size prefers what its scores prefer, and keeps what must stay and what is needed."""
    plan = choose_tokens(vocabulary(), TEXT, {"size": 8})
    scores = torch.zeros(11, dtype=torch.float64)
    scores[9] = 1.0
    control = same_size_tokens(plan, vocabulary(), scores)
    assert len(control.keep) == 8
    assert {0, 1, 2, 3, 4, 6, 9} < set(control.keep)


def cut(num_removed: int) -> VocabularyPlan:
    """Return a plan that removes the last token ids of a vocabulary of 100."""
    return VocabularyPlan(100, tuple(range(100 - num_removed)))


def test_a_budget_can_be_met_by_the_vocabulary_alone() -> None:
    """As few ids go as meet it; more than the vocabulary holds is refused."""
    geometry, shapes = llama([64, 64], [2, 2])
    assert token_cost(geometry, shapes) == HIDDEN
    wanted = 0.1 * total(shapes)
    size = size_for_budget(Request({"parameters": 0.1}), geometry, shapes)
    assert (100 - size) * HIDDEN >= wanted > (99 - size) * HIDDEN
    target = int(4 * (total(shapes) - wanted))
    assert size_for_budget(Request({"bytes": target}), geometry, shapes) == size
    with pytest.raises(PlanError, match="but the whole vocabulary has 4,800"):
        size_for_budget(Request({"parameters": 0.9}), geometry, shapes)


def test_the_vocabulary_counts_towards_a_budget_of_parameters() -> None:
    """Units of layers make up only what the vocabulary leaves; nothing left to them is an error."""
    geometry, shapes = llama([64, 64], [2, 2])
    scores = random_scores(geometry, ["ffn_channel"])
    request = Request({"parameters": 0.2}, multiple_of=1)
    alone = make_plan(scores, geometry, shapes, request)
    both = make_plan(scores, geometry, shapes, request, vocabulary=cut(60))
    assert both.vocabulary == cut(60)
    assert both.parameters_dense["embedding"] - both.parameters_pruned["embedding"] == 60 * HIDDEN
    assert abs(both.total_pruned - alone.total_pruned) <= 3 * HIDDEN * 2
    assert sum(layer.num_removed for layer in both.layers["ffn_channel"]) < sum(
        layer.num_removed for layer in alone.layers["ffn_channel"]
    )
    with pytest.raises(PlanError, match="the vocabulary alone gives up 4,560 parameters, and the budget asks for"):
        make_plan(scores, geometry, shapes, Request({"parameters": 0.05}), vocabulary=cut(95))


def test_a_plan_may_cut_the_vocabulary_alone() -> None:
    """It has no layers, the stock shape, and says by what the ids were chosen."""
    geometry, shapes = llama([64, 64], [2, 2])
    nothing = Scores("contextual", {"at": "linear"}, ("medical",), {})
    plan = make_plan(nothing, geometry, shapes, Request({}, shape="uneven"), vocabulary=cut(10))
    assert (plan.layers, plan.shape, plan.method, plan.options) == ({}, "uniform", "token_frequency", {})
    assert plan.total_dense - plan.total_pruned == 10 * HIDDEN
