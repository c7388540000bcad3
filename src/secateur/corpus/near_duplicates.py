"""Texts that say nearly the same as another one: found exactly, without comparing every pair. Pure.

The measure is the Jaccard similarity of two texts' sets of shingles: how many they have in common, over how many
different ones both have together. A shingle is five words in a row, in lower case (NFKC, case-folded); punctuation and
spacing do not count. A text of fewer words is one shingle. In scripts that put no spaces between words every character
is a word.

Pairs are found by prefix filtering: with shingles in one order, rarest first, two texts that share at least o of theirs
share one among the first n - o + 1 of each (n: shingles of that text); and a Jaccard similarity of t takes o >= t n.
Only texts that share such a shingle are compared, and no pair is missed.
Source: S. Chaudhuri et al., "A primitive operator for similarity joins in data cleaning", ICDE 2006; R. Bayardo et al.,
"Scaling up all pairs similarity search", WWW 2007. Shingles: A. Broder, "On the resemblance and containment of
documents", 1997. (Shingles are compared by 64-bit hashes.)
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, UInt64

from secateur.errors import ConfigError
from secateur.progress import Progress, silent

SHINGLE_WORDS = 5
"""Words of a shingle."""

_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, Japanese and Chinese characters."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ROUNDING = 1e-9


def distinct_documents(texts: Sequence[str], threshold: float, *, progress: Progress = silent) -> list[int]:
    """Return the indices of the texts that are left when near duplicates of an earlier one go, ascending.

    Args:
        texts: in the order that decides which of a group is first.
        threshold: Jaccard similarity from which on two texts are near duplicates, above 0 and at most 1.
        progress: told about finished texts.

    Raises:
        ConfigError: the threshold is out of range.
    """
    dropped = near_duplicates(texts, threshold, progress=progress)
    return [index for index in range(len(texts)) if index not in dropped]


def near_duplicates(texts: Sequence[str], threshold: float, *, progress: Progress = silent) -> dict[int, int]:
    """Return, for each text that goes, the first text that stays and is its near duplicate.

    Texts are judged in order, and only against those that stay: no two that stay are near duplicates, and nothing goes
    that is not one of a text that stays.

    Args:
        texts: in the order that decides which of a group is first.
        threshold: Jaccard similarity from which on two texts are near duplicates, above 0 and at most 1.
        progress: told about finished texts.

    Raises:
        ConfigError: the threshold is out of range.
    """
    if not 0.0 < threshold <= 1.0:
        raise ConfigError(
            f"recover.select.near_duplicates is {threshold:g}, a share of common shingles that must be above 0 and at "
            "most 1. Write for example 0.8."
        )
    found: dict[int, int] = {}
    stays_with: defaultdict[int, list[int]] = defaultdict(list)
    with progress("find near duplicates", len(texts), "documents") as task:
        sets = _by_rarity(shingle_sets(texts))
        for index, (shingles, num_rare) in enumerate(sets):
            prefix = shingles[num_rare : len(shingles) - _least_common(len(shingles), threshold) + 1].tolist()
            candidates = sorted({other for shingle in prefix for other in stays_with.get(shingle, ())})
            first = next((o for o in candidates if jaccard(shingles, sets[o][0], threshold) >= threshold), None)
            if first is not None:
                found[index] = first
            else:
                for shingle in prefix:
                    stays_with[shingle].append(index)
            task.advance(1)
    return found


def words_of(text: str) -> list[str]:
    """Return the words of a text in order, in lower case; a text without any is one word."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(normal) or [" ".join(normal.split())]


def shingle_sets(texts: Sequence[str]) -> list[UInt64[np.ndarray, " _"]]:
    """Return the hashes of each text's different shingles, ascending."""
    hashes: dict[str, int] = {}
    return [_shingles(text, hashes) for text in texts]


def jaccard(
    first: UInt64[np.ndarray, " _"] | Int64[np.ndarray, " _"],
    second: UInt64[np.ndarray, " _"] | Int64[np.ndarray, " _"],
    threshold: float = 0.0,
) -> float:
    """Return the share of two sets' different members that both have.

    Args:
        first: members, each once.
        second: members, each once.
        threshold: where the sizes alone put the share below it, 0 is returned.
    """
    small, large = sorted((len(first), len(second)))
    if large == 0 or small < threshold * large - _ROUNDING:
        return 0.0
    common = len(np.intersect1d(first, second, assume_unique=True))
    return common / (small + large - common)


def _least_common(num_shingles: int, threshold: float) -> int:
    """Return how many shingles a text has in common with any near duplicate, at least."""
    return max(math.ceil(threshold * num_shingles - _ROUNDING), 1)


def _shingles(text: str, hashes: dict[str, int]) -> UInt64[np.ndarray, " _"]:
    """Return the hashes of the text's shingles; ``hashes`` remembers those of words."""
    words = words_of(text)
    values = np.array([hashes.get(word) or hashes.setdefault(word, _hash(word)) for word in words], dtype=np.uint64)
    width = min(SHINGLE_WORDS, len(values))
    total = np.zeros(len(values) - width + 1, dtype=np.uint64)
    for place in range(width):  # a polynomial in the words' hashes, mixed after every word
        total = total * _MULTIPLIER + values[place : place + len(total)]
        total ^= total >> np.uint64(29)
    return np.unique(total * _MULTIPLIER)


def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(errors="surrogatepass"), digest_size=8).digest(), "big")


def _by_rarity(
    sets: Sequence[UInt64[np.ndarray, " _"]],
) -> list[tuple[Int64[np.ndarray, " _"], int]]:
    """Return each set as ranks, rarest shingle first, and how many of its shingles no other text has.

    Those cannot be in common with any text, so that nobody need look for them.
    """
    if not sets:
        return []
    _, inverse, counts = np.unique(np.concatenate(sets), return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), dtype=np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    num_single = int((counts == 1).sum())
    ends = np.cumsum([len(shingles) for shingles in sets])
    ranked = [np.sort(part) for part in np.split(rank[inverse], ends[:-1])]
    return [(part, int(np.searchsorted(part, num_single))) for part in ranked]
