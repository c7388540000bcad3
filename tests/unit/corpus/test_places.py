"""Places order tokens as they come, and a cut behind a token is the same place in the text under any tokenizer."""

from __future__ import annotations

from itertools import pairwise

import pytest

from secateur.corpus.places import (
    TEXT_START,
    characters_before,
    count_covering,
    count_until,
    places_after,
    token_places,
)

CASES = {
    "one per character": ([(0, 1), (1, 2), (2, 3)], 3),
    "byte tokens": ([(0, 1), (0, 1), (0, 1), (1, 2)], 2),
    "zero-width between": ([(0, 2), (2, 2), (2, 4)], 4),
    "zero-width first": ([(0, 0), (0, 0), (0, 3)], 3),
    "zero-width last": ([(0, 3), (3, 3)], 3),
    "gap and rest uncovered": ([(0, 1), (2, 3)], 6),
    "falling end": ([(0, 4), (1, 2), (4, 5)], 5),
    "beyond the text": ([(0, 2), (0, 9)], 2),
    "no token": ([], 4),
}


@pytest.mark.parametrize(("offsets", "length"), CASES.values(), ids=CASES)
def test_places_ascend_and_cuts_separate(offsets: list[tuple[int, int]], length: int) -> None:
    """Every token has its own place, in order, and cutting behind a token leaves exactly the later ones."""
    places = token_places(offsets, length)
    assert all(first < second for first, second in pairwise([TEXT_START, *places.tolist()]))
    cuts = places_after(places, length)
    assert [count_until(places, int(cut)) for cut in cuts] == list(range(1, len(offsets) + 1))
    assert [count_covering(places, int(cut)) for cut in cuts] == list(range(1, len(offsets) + 1))
    assert count_until(places, TEXT_START) == 0
    if offsets:
        assert characters_before(int(cuts[-1])) == length


def test_a_cut_behind_a_whole_character_takes_all_its_tokens() -> None:
    """One token for a character, cut behind it: under byte tokens the cut is behind the last of them."""
    cut = int(places_after(token_places([(0, 1), (1, 2)], 2), 2)[0])
    assert count_until(token_places([(0, 1), (0, 1), (0, 1), (1, 2)], 2), cut) == 3


def test_a_cut_inside_a_character_takes_as_many_of_its_tokens() -> None:
    """Cut behind the first of three byte tokens: behind the first of two, or behind the only one."""
    cut = int(places_after(token_places([(0, 1), (0, 1), (0, 1), (1, 2)], 2), 2)[0])
    assert count_until(token_places([(0, 1), (0, 1), (1, 2)], 2), cut) == 1
    assert count_until(token_places([(0, 1), (1, 2)], 2), cut) == 1


def test_zero_width_tokens_go_with_what_follows() -> None:
    """A cut behind a character leaves a zero-width token there to the next piece."""
    cut = int(places_after(token_places([(0, 2), (2, 4)], 4), 4)[0])
    assert count_until(token_places([(0, 2), (2, 2), (2, 4)], 4), cut) == 1


def test_covering_reaches_over_a_cut_inside_a_token() -> None:
    """The token that holds the last character before a cut is needed, zero-width tokens before it too."""
    cut = int(places_after(token_places([(0, 2), (2, 6)], 6), 6)[0])
    for offsets, until, covering in (
        ([(0, 1), (1, 3), (3, 6)], 1, 2),
        ([(0, 1), (1, 1), (1, 3), (3, 6)], 2, 3),
        ([(0, 2), (2, 6)], 1, 1),
        ([(0, 6)], 0, 1),
        ([(0, 1)], 1, 1),
        ([], 0, 0),
    ):
        places = token_places(offsets, 6)
        assert (count_until(places, cut), count_covering(places, cut)) == (until, covering)


def test_the_last_cut_is_behind_the_whole_text() -> None:
    """Whatever another tokenizer makes of text that this one passed over belongs to the last piece."""
    cut = int(places_after(token_places([(0, 2)], 4), 4)[0])
    assert count_until(token_places([(0, 2), (2, 4), (4, 4)], 4), cut) == 3
