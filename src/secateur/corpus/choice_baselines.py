"""How far a set of multiple-choice questions goes without a model: words in common with the question. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.corpus.near_duplicates import words_of


def overlap_share(question: str, choices: Sequence[str], answer: int) -> float:
    """Return how likely it is right to pick the choice that has the most words of the question.

    Words are those of ``near_duplicates``, each counted once, whatever its case. Among choices with equally many the
    pick is by chance, so that a question without common words counts as a guess.

    Args:
        question: what is asked, with its context.
        choices: the texts to choose from.
        answer: index of the right one.

    Returns:
        1 / (choices with the most common words) if the right one is among them, otherwise 0.
    """
    asked = set(words_of(question))
    common = [len(asked & set(words_of(choice))) for choice in choices]
    best = max(common)
    return 1 / common.count(best) if common[answer] == best else 0.0
