"""What two models answer to the same prompts, side by side: plain text and counts, imports without torch."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from secateur.records.evaluation import ratio_estimate

SCHEMA_VERSION = 1

Decoding = Literal["greedy", "sampled"]
"""How a token is chosen: the likeliest, or drawn."""

DECODINGS: tuple[Decoding, ...] = ("greedy", "sampled")


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model wrote after a prompt.

    Attributes:
        text: without special tokens.
        token_ends: per token, the characters of ``text`` up to and with it.
        ended: whether the model ended it; otherwise it was cut at the most tokens allowed.
    """

    text: str
    token_ends: tuple[int, ...]
    ended: bool

    @property
    def num_tokens(self) -> int:
        """Tokens that write the text, without the one that ends it."""
        return len(self.token_ends)

    def parts(self, common: int) -> tuple[str, str, str]:
        """Return the text before the token in which character ``common`` lies, that token, and what follows it.

        Args:
            common: characters that the text has in common with another one.
        """
        whole = bisect_right(self.token_ends, common)
        start = self.token_ends[whole - 1] if whole else 0
        stop = self.token_ends[whole] if whole < len(self.token_ends) else len(self.text)
        return self.text[:start], self.text[start:stop], self.text[stop:]


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """One prompt, answered by the dense model and by the result.

    Attributes:
        domain: the bucket whose test text the prompt is from.
        prompt: as the models read it, with its chat template where there is one.
        decoding: how tokens were chosen.
        dense: the dense model's answer.
        result: that of the model which the run made.
    """

    domain: str
    prompt: str
    decoding: Decoding
    dense: Answer
    result: Answer

    @property
    def common_characters(self) -> int:
        """Characters from the start in which the answers agree."""
        return common_length(self.dense.text, self.result.text)

    @property
    def common_tokens(self) -> int:
        """Tokens of the dense answer that lie wholly within the common start."""
        return bisect_right(self.dense.token_ends, self.common_characters)

    @property
    def common_ratio(self) -> float:
        """Share of the dense answer, in characters, that the common start is; 1 where they are equal."""
        return 1.0 if self.is_equal else self.common_characters / max(len(self.dense.text), 1)

    @property
    def is_equal(self) -> bool:
        """Whether the answers are the same text, as far as one that was cut goes."""
        shorter, longer = sorted((self.dense, self.result), key=lambda answer: len(answer.text))
        same_length = len(shorter.text) == len(longer.text)
        return longer.text.startswith(shorter.text) and (same_length or not shorter.ended)


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far the answers to several prompts agree; errors are standard errors, infinite for a single prompt.

    Attributes:
        decoding: how tokens were chosen.
        num_prompts: prompts.
        num_equal: of them, those with equal answers; ``equal_ratio`` their share.
        equal_stderr: its error, sqrt(p (1 - p) / (n - 1)).
        common_tokens: mean tokens of the dense answer before the first difference; ``common_tokens_stderr`` its error.
        common_ratio: mean share of the dense answer's characters before it; ``common_ratio_stderr`` its error.
    """

    decoding: Decoding
    num_prompts: int
    num_equal: int
    equal_ratio: float
    equal_stderr: float
    common_tokens: float
    common_tokens_stderr: float
    common_ratio: float
    common_ratio_stderr: float


@dataclass(frozen=True, slots=True)
class Generations:
    """All answers of one run.

    Attributes:
        result: name of the row that stands for the run's model: ``recovered`` or ``pruned``.
        pairs: by domain, then by prompt; the greedy answers to a prompt come before the sampled ones.
        temperature: of the sampled answers.
        seed: of the random numbers that both models' sampled answers are drawn with.
        max_new_tokens: most tokens of an answer.
        num_too_long: prompts left out because they leave no room for an answer.
        schema_version: version of this record's JSON form.
    """

    result: str
    pairs: tuple[AnswerPair, ...]
    temperature: float
    seed: int
    max_new_tokens: int
    num_too_long: int = 0
    schema_version: int = SCHEMA_VERSION

    def agreements(self) -> list[Agreement]:
        """Return how far the answers agree, for every way of choosing tokens that there is."""
        chosen = {decoding: [pair for pair in self.pairs if pair.decoding == decoding] for decoding in DECODINGS}
        return [_agreement(decoding, pairs) for decoding, pairs in chosen.items() if pairs]

    def by_prompt(self) -> list[tuple[AnswerPair, ...]]:
        """Return the pairs of each prompt together."""
        found: dict[tuple[str, str], list[AnswerPair]] = {}
        for pair in self.pairs:
            found.setdefault((pair.domain, pair.prompt), []).append(pair)
        return [tuple(pairs) for pairs in found.values()]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the agreement written out for readers."""
        return {**asdict(self), "agreement": [_finite(asdict(one)) for one in self.agreements()]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Generations:
        """Return the record that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        pairs = tuple(
            AnswerPair(**{**pair, **{who: _answer(pair[who]) for who in ("dense", "result")}}) for pair in data["pairs"]
        )
        return cls(**{**{key: value for key, value in data.items() if key != "agreement"}, "pairs": pairs})


def common_length(first: str, second: str) -> int:
    """Return how many characters two texts have in common from their start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _answer(data: Mapping[str, Any]) -> Answer:
    return Answer(**{**data, "token_ends": tuple(int(end) for end in data["token_ends"])})


def _agreement(decoding: Decoding, pairs: Sequence[AnswerPair]) -> Agreement:
    number, equal = len(pairs), sum(pair.is_equal for pair in pairs)
    tokens = ratio_estimate([float(pair.common_tokens) for pair in pairs], [1] * number)
    ratios = ratio_estimate([pair.common_ratio for pair in pairs], [1] * number)
    share = equal / number
    stderr = math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else math.inf
    return Agreement(decoding, number, equal, share, stderr, *tokens, *ratios)


def _finite(data: dict[str, Any]) -> dict[str, Any]:
    """Return the data with null where a number is not known."""
    unknown = {key for key, value in data.items() if isinstance(value, float) and not math.isfinite(value)}
    return {key: None if key in unknown else value for key, value in data.items()}
