"""Near duplicates are found exactly as comparing every pair would, and the first of a group stays."""

from __future__ import annotations

import random

import numpy as np
import pytest

from secateur.corpus.near_duplicates import SHINGLE_WORDS, distinct_documents, jaccard, near_duplicates, shingle_sets
from secateur.errors import ConfigError

WORDS = [f"word{number}" for number in range(60)]


def documents(seed: int, count: int = 60) -> list[str]:
    """Return texts of which many are others with a few words changed, so that all similarities occur."""
    draw = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(count):
        if texts and draw.random() < 0.6:
            words = list(draw.choice(texts))
            for _ in range(draw.randint(0, 6)):
                words[draw.randrange(len(words))] = draw.choice(WORDS)
            words = words[: draw.randint(max(len(words) // 2, 1), len(words))]
        else:
            words = draw.choices(WORDS, k=draw.randint(1, 60))
        texts.append(words)
    return [" ".join(words) for words in texts]


def brute_force_sets(texts: list[str]) -> list[set[tuple[str, ...]]]:
    """Return the shingles themselves."""
    found = []
    for text in texts:
        words = text.split()
        width = min(SHINGLE_WORDS, len(words))
        found.append({tuple(words[start : start + width]) for start in range(len(words) - width + 1)})
    return found


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_comparing_every_pair(threshold: float, seed: int) -> None:
    """Prefix filtering misses no pair and invents none."""
    texts = documents(seed)
    sets = brute_force_sets(texts)
    stays: list[int] = []
    expected: dict[int, int] = {}
    for index, shingles in enumerate(sets):
        alike = [o for o in stays if len(shingles & sets[o]) / len(shingles | sets[o]) >= threshold]
        if alike:
            expected[index] = alike[0]
        else:
            stays.append(index)
    assert expected or threshold > 0.9, "the test needs duplicates"
    assert near_duplicates(texts, threshold) == expected
    assert distinct_documents(texts, threshold) == stays


def test_jaccard_of_hashes_is_that_of_the_shingles() -> None:
    """Hashes of different shingles differ, and of equal ones are equal."""
    texts = documents(3)
    hashed, plain = shingle_sets(texts), brute_force_sets(texts)
    for first in range(0, 60, 7):
        for second in range(60):
            expected = len(plain[first] & plain[second]) / len(plain[first] | plain[second])
            assert jaccard(hashed[first], hashed[second]) == expected
    assert jaccard(np.array([1, 2]), np.array([3, 4, 5, 6, 7]), 0.5) == 0.0


def test_spacing_case_and_punctuation_do_not_count() -> None:
    texts = ["The nurse gave the patient ten drops.", "THE nurse  gave,\nthe patient: ten drops", "The nurse left."]
    assert distinct_documents(texts, 0.99) == [0, 2]


def test_scripts_without_spaces_are_compared_by_character() -> None:
    """One character changed in a long sentence leaves a near duplicate, not another word."""
    sentence = "患者は毎朝十ミリグラムの薬を飲み続けたので血圧が下がり医師は量を減らした"
    texts = [sentence, sentence.replace("朝", "晩"), "医師は患者に薬を出さなかった"]
    assert distinct_documents(texts, 0.7) == [0, 2]


def test_texts_without_words_are_compared_as_they_are() -> None:
    assert distinct_documents(["{}", "{ }", "{}", "()", ""], 0.9) == [0, 1, 3, 4]
    assert distinct_documents([], 0.9) == []


def test_no_chain_drops_what_is_like_nothing_that_stays() -> None:
    """The third text is like the second, which goes, and not like the first: it stays."""
    words = [f"w{number}" for number in range(40)]
    texts = [" ".join(words[start : start + 24]) for start in (0, 6, 12)]
    assert distinct_documents(texts, 0.5) == [0, 2]


def test_a_threshold_out_of_range_is_refused() -> None:
    for threshold in (0.0, 1.5):
        with pytest.raises(ConfigError, match="must be above 0 and at most 1"):
            near_duplicates(["a"], threshold)


def test_collisions_need_more_than_reordering() -> None:
    """The hash of a shingle depends on the order of its words and on how often each occurs."""
    texts = ["a b c d e", "e d c b a", "a a b c d", "a b b c d", "a b c d d"]
    assert len({int(s[0]) for s in shingle_sets(texts)}) == 5
