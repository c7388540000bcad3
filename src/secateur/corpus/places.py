"""Where tokens end in a text, so that it can be cut there under another tokenizer; pure, it knows only offsets.

A *place* is one whole number: the characters before a token's end, and below that the token's rank among the tokens
that end there. Several do where a character is several byte tokens. Zero-width tokens, which cover no character, come
after all others that end there, because they belong to what follows. Places ascend with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

_BITS = 16
_ZERO_WIDTH = 1 << 15
_WHOLE = _ZERO_WIDTH - 1

TEXT_START = -1
"""Before every token, zero-width ones too."""


@dataclass(frozen=True, slots=True)
class TextSpan:
    """The part of a document's text that a piece covers, in places.

    Attributes:
        start: tokens that end at or before it belong to earlier pieces.
        end: tokens that end at or before it belong to this piece or earlier ones.
        scored_from: tokens that end at or before it are context, which is not predicted.
    """

    start: int
    end: int
    scored_from: int


def token_places(offsets: Sequence[tuple[int, int]], num_characters: int) -> Int64[np.ndarray, " tokens"]:
    """Return the place where each token ends.

    Args:
        offsets: start and end of each token in characters; an end may fall behind an earlier one, and then counts as
            equal to it.
        num_characters: length of the text.
    """
    starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
    empty = np.cumsum(starts == ends)
    reach = np.minimum(np.maximum.accumulate(ends), num_characters) if len(ends) else ends
    first = np.searchsorted(reach, reach)  # of the tokens that end at the same character
    is_late = empty > empty[first] - (starts == ends)[first]
    rank = np.minimum(np.arange(len(ends)) - first, _WHOLE - 1)
    places: Int64[np.ndarray, " tokens"] = (reach << _BITS) + rank + is_late * _ZERO_WIDTH
    return places


def places_after(places: Int64[np.ndarray, " tokens"], num_characters: int) -> Int64[np.ndarray, " tokens"]:
    """Return for each token the place to cut behind it, under any tokenizer.

    Where its last character is complete the cut is behind the whole character, however many tokens that has; behind
    the last token it is behind the whole text.
    """
    cuts = places.copy()
    if len(places):
        is_complete = np.ones(len(places), dtype=bool)
        is_complete[:-1] = places[1:] > (places[:-1] | _WHOLE)
        is_late = places & _ZERO_WIDTH > 0
        cuts = np.where(is_complete & ~is_late, places | _WHOLE, places)
        cuts[-1] = (num_characters << _BITS) | _ZERO_WIDTH | _WHOLE
    return cuts


def characters_before(place: int) -> int:
    """Return how many characters lie before a place."""
    return place >> _BITS


def count_until(places: Int64[np.ndarray, " tokens"], place: int) -> int:
    """Return how many tokens end at or before a place."""
    return int(np.searchsorted(places, place, side="right"))


def count_covering(places: Int64[np.ndarray, " tokens"], place: int) -> int:
    """Return how many tokens it takes to cover the text before a place; the last may reach over it."""
    covering = int(np.searchsorted(places >> _BITS, characters_before(place))) + 1
    return max(count_until(places, place), min(covering, len(places)))
