"""Multiple-choice questions made from real text: definitions to their terms, and passages to their next sentence. Pure.

Nothing is written by a model. The right choice is what the text says; the wrong ones are what it says elsewhere, of
nearly the same length, so that neither length nor form gives the answer away. Near duplicates of another choice go
first: a wrong choice that says the same would be right. Whatever the order of the text, the same questions are made.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from secateur.corpus.choice_baselines import overlap_share
from secateur.corpus.near_duplicates import near_duplicates, words_of
from secateur.errors import ConfigError, CorpusError

Distractors = Literal["random", "near"]

NEAR_DUPLICATES = 0.5
"""Jaccard similarity of two texts' shingles from which on they count as the same choice."""

LENGTH_RATIOS = (1.15, 1.3, 1.6)
"""A wrong choice is at most so many times as long or short as the right one; the first that leaves enough to choose."""

MIN_WORDS, MAX_CHARACTERS = 4, 600
"""Choices with fewer words, or more characters, are not used."""

PASSAGE_SENTENCES = 3
"""Sentences that stand before the one that is looked for."""

_ENOUGH: Mapping[Distractors, int] = {"random": 12, "near": 100}
"""Shorter and longer texts, of each, from which wrong choices are drawn where there are so many."""
_NEAREST = 8
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(
    r"""(?<=[.!?])["'\u201d\u2019)\]]*\s+(?=["'\u201c\u2018(\[]*[^\W_a-z])|(?<=[\u3002\uff01\uff1f])"""
)


@dataclass(frozen=True, slots=True)
class TermRecord:
    """A term with its definition.

    Attributes:
        term: the term.
        question: what is asked about it.
        definition: the right choice.
        source: where it stands.
        subject: what it belongs to; may be blank.
    """

    term: str
    question: str
    definition: str
    source: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class SourceText:
    """A document.

    Attributes:
        text: all of it.
        source: where it stands.
        subject: what it belongs to; may be blank.
    """

    text: str
    source: str
    subject: str = ""


@dataclass(frozen=True, slots=True)
class MakeOptions:
    """How questions are made.

    Attributes:
        num: most questions.
        num_choices: choices of each, 2 to 26.
        distractors: ``random`` takes wrong choices of similar length by chance; ``near`` those of them that have most
            in common with question and right choice, rare words counting more, which is harder.
        seed: of what is drawn by chance.
    """

    num: int = 500
    num_choices: int = 4
    distractors: Distractors = "random"
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        if self.num < 1 or not 2 <= self.num_choices <= 26:
            raise ConfigError(
                f"{self.num} questions of {self.num_choices} choices cannot be made. Ask for at least 1 question, with "
                "2 to 26 choices."
            )


@dataclass(frozen=True, slots=True)
class MadeQuestion:
    """A question that was made.

    Attributes:
        question: what is asked; for a continuation, the passage.
        choices: the texts to choose from.
        answer: index of the right one.
        source: where question and right choice stand.
        subject: what it belongs to; may be blank.
    """

    question: str
    choices: tuple[str, ...]
    answer: int
    source: str
    subject: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as a row of a file of questions; without a subject where it has none."""
        subject = {"subject": self.subject} if self.subject else {}
        return {
            "question": self.question,
            "choices": list(self.choices),
            "answer": self.answer,
            **subject,
            "source": self.source,
        }


@dataclass(frozen=True, slots=True)
class MadeChoices:
    """A set of questions that was made.

    Attributes:
        questions: in an order drawn by chance.
        num_candidates: questions that the text could have given.
        left_out: how many texts or candidates were not used, by reason; without those beyond the number asked for.
    """

    questions: tuple[MadeQuestion, ...]
    num_candidates: int
    left_out: Mapping[str, int]

    def baselines(self) -> dict[str, float]:
        """Return the expected share of right answers of whoever knows nothing, by how the choice is picked."""
        count = len(self.questions)
        answers = Counter(made.answer for made in self.questions)
        longest = [_share(made, [len(choice) for choice in made.choices]) for made in self.questions]
        shortest = [_share(made, [-len(choice) for choice in made.choices]) for made in self.questions]
        words = [overlap_share(made.question, made.choices, made.answer) for made in self.questions]
        return {
            "guessing": sum(1 / len(made.choices) for made in self.questions) / count,
            "same answer always": max(answers.values()) / count,
            "longest choice": sum(longest) / count,
            "shortest choice": sum(shortest) / count,
            "most words in common": sum(words) / count,
        }


@dataclass(frozen=True, slots=True)
class _Candidate:
    question: str
    text: str
    document: str
    source: str
    subject: str
    words: frozenset[str] = field(default=frozenset())


def definition_questions(records: Sequence[TermRecord], options: MakeOptions) -> MadeChoices:
    """Return questions that ask for the definition of a term; wrong choices are other terms' definitions.

    Definitions that hold their own term are left out, because words alone would find them; so are further definitions
    of a term.

    Raises:
        CorpusError: there are not enough definitions for one question; the message says what was left out.
    """
    left_out: Counter[str] = Counter()
    found: dict[str, _Candidate] = {}
    for record in sorted(records, key=lambda one: (one.term, one.definition, one.source)):
        term, definition = " ".join(record.term.split()), " ".join(record.definition.split())
        key = " ".join(words_of(term))
        if not term or not definition:
            left_out["the term or its definition is blank"] += 1
        elif not _is_usable(definition):
            left_out[_UNUSABLE] += 1
        elif f" {key} " in f" {' '.join(words_of(definition))} ":
            left_out["the definition holds its own term"] += 1
        elif key in found:
            left_out["the term was there already"] += 1
        else:
            found[key] = _Candidate(record.question, definition, key, record.source, record.subject)
    return _make(list(found.values()), options, left_out, "definitions")


def continuation_questions(documents: Sequence[SourceText], options: MakeOptions) -> MadeChoices:
    """Return questions that ask which sentence comes after a passage; wrong choices stand in other documents.

    A document gives further questions only when every document has given one.

    Raises:
        CorpusError: there are not enough sentences for one question; the message says what was left out.
    """
    left_out: Counter[str] = Counter()
    found: list[_Candidate] = []
    seen: set[str] = set()
    for document in sorted(documents, key=lambda one: (one.text, one.source)):
        digest = hashlib.blake2b(" ".join(document.text.split()).encode(), digest_size=8).hexdigest()
        if digest in seen:
            left_out["the document was there already"] += 1
            continue
        seen.add(digest)
        pairs = _continuations(document.text, left_out)
        if not pairs:
            left_out["the document has no passage with a sentence after it"] += 1
        found += [_Candidate(passage, text, digest, document.source, document.subject) for passage, text in pairs]
    return _make(found, options, left_out, "sentences")


_UNUSABLE = f"the choice has fewer than {MIN_WORDS} words or more than {MAX_CHARACTERS} characters"


def _is_usable(text: str) -> bool:
    return len(words_of(text)) >= MIN_WORDS and len(text) <= MAX_CHARACTERS


def _continuations(text: str, left_out: Counter[str]) -> list[tuple[str, str]]:
    """Return passages with the sentence after each; no sentence is in two of them."""
    found = []
    for paragraph in _PARAGRAPH.split(text):
        sentences = [" ".join(each.split()) for each in _SENTENCE_END.split(paragraph) if each.strip()]
        for start in range(0, len(sentences) - 1, PASSAGE_SENTENCES + 1):
            *before, last = sentences[start : start + PASSAGE_SENTENCES + 1]
            passage = " ".join(before)
            if before and len(words_of(passage)) >= 2 * MIN_WORDS:
                if _is_usable(last):
                    found.append((passage, last))
                else:
                    left_out[_UNUSABLE] += 1
    return found


def _make(candidates: list[_Candidate], options: MakeOptions, left_out: Counter[str], what: str) -> MadeChoices:
    """Return questions of these candidates, each of whose texts is also a wrong choice of others."""
    candidates.sort(key=lambda one: (one.text, one.question))
    dropped = near_duplicates([one.text for one in candidates], NEAR_DUPLICATES)
    left_out["the choice is nearly the same as another one"] += len(dropped)
    distinct: dict[str, _Candidate] = {}
    for place, one in enumerate(candidates):
        if place not in dropped:
            distinct.setdefault(one.question, replace(one, words=frozenset(words_of(one.text))))
    left_out["the question was there already"] += len(candidates) - len(dropped) - len(distinct)
    pool = sorted(distinct.values(), key=lambda one: (len(one.text), one.text))
    finder = _WrongChoices(pool, options)
    drawn: list[tuple[_Candidate, list[str]]] = []
    for one in _in_turn(pool, options.seed):
        if len(drawn) == options.num:
            break
        wrong = finder.find(one, len(drawn) % options.num_choices)
        if wrong:
            drawn.append((one, wrong))
        else:
            left_out["too few other choices are about as long"] += 1
    reasons = {reason: count for reason, count in left_out.items() if count}
    if not drawn:
        listed = "; ".join(f"{reason}: {count}" for reason, count in reasons.items()) or "the text is empty"
        raise CorpusError(
            f"no question could be made: {len(pool)} {what} are not enough for {options.num_choices} choices "
            f"({listed}). Give more text, or fewer choices."
        )
    places = [number % options.num_choices for number in range(len(drawn))]
    random.Random(options.seed).shuffle(places)
    questions = tuple(_question(one, wrong, place) for (one, wrong), place in zip(drawn, places, strict=True))
    return MadeChoices(questions, len(pool), reasons)


def _in_turn(candidates: Sequence[_Candidate], seed: int) -> list[_Candidate]:
    """Return the candidates in an order drawn by chance, the first of every document before all second ones."""
    ordered = sorted(candidates, key=lambda one: _draw(seed, one))
    turns: defaultdict[str, int] = defaultdict(int)
    placed = []
    for place, one in enumerate(ordered):
        placed.append((turns[one.document], place, one))
        turns[one.document] += 1
    return [one for _, _, one in sorted(placed, key=lambda each: each[:2])]


def _draw(seed: int, one: _Candidate) -> bytes:
    plain = json.dumps([seed, one.question, one.text])
    return hashlib.blake2b(plain.encode(errors="surrogatepass"), digest_size=16, person=b"secateur-make").digest()


class _WrongChoices:
    """Finds texts of other documents about as long as a right one, as many shorter ones as is asked for if it can."""

    def __init__(self, pool: Sequence[_Candidate], options: MakeOptions) -> None:
        self.pool = pool
        self.options = options
        self.sizes = [len(one.text) for one in pool]
        self.places = {one.text: place for place, one in enumerate(pool)}
        self.counts = Counter(word for one in pool for word in one.words)

    def find(self, right: _Candidate, num_shorter: int) -> list[str]:
        """Return the wrong choices; nothing where there are too few."""
        wanted, size, place = self.options.num_choices - 1, len(right.text), self.places[right.text]
        for length_ratio in LENGTH_RATIOS:
            low = bisect.bisect_left(self.sizes, size / length_ratio)
            high = bisect.bisect_right(self.sizes, size * length_ratio)
            shorter, longer = (
                [one for one in part if one.document != right.document]
                for part in (self.pool[low:place], self.pool[place + 1 : high])
            )
            if min(len(shorter), len(longer)) >= max(_ENOUGH[self.options.distractors], wanted):
                break
        if len(shorter) + len(longer) < wanted:
            return []
        num_shorter = min(len(shorter), max(num_shorter, wanted - len(longer)))
        draw = random.Random(_draw(self.options.seed, right))
        wrong = [
            *self._drawn(right, shorter, num_shorter, draw),
            *self._drawn(right, longer, wanted - num_shorter, draw),
        ]
        draw.shuffle(wrong)
        return wrong

    def _drawn(self, right: _Candidate, others: Sequence[_Candidate], count: int, draw: random.Random) -> list[str]:
        if self.options.distractors == "near":
            meant = right.words | frozenset(words_of(right.question))
            others = sorted(others, key=lambda one: (-self._nearness(meant, one), one.text))[: max(_NEAREST, count)]
        return [one.text for one in draw.sample(others, count)]

    def _nearness(self, meant: Collection[str], other: _Candidate) -> float:
        """Return how much two texts have in common: their common words, each by how rare it is."""
        return math.fsum(math.log(len(self.pool) / self.counts[word]) for word in sorted(other.words & set(meant)))


def _question(right: _Candidate, wrong: list[str], place: int) -> MadeQuestion:
    choices = (*wrong[:place], right.text, *wrong[place:])
    return MadeQuestion(right.question, choices, place, right.source, right.subject)


def _share(made: MadeQuestion, sizes: Sequence[int]) -> float:
    """Return how likely it is right to pick the largest of these sizes."""
    best = max(sizes)
    return 1 / sizes.count(best) if sizes[made.answer] == best else 0.0
