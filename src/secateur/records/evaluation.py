"""What was measured: loss, answers, size and speed, with standard errors; plain numbers, imports without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from secateur.records.choices import ChoicesScore, Measure

SCHEMA_VERSION = 4


@dataclass(frozen=True, slots=True)
class TextScore:
    """How well one model predicts one bucket's test split.

    Attributes:
        nll_per_token: mean negative log-likelihood in nats per predicted token.
        nll_stderr: its standard error, with documents as the independent units.
        bits_per_byte: the same loss in bits per UTF-8 byte of the predicted text; comparable across tokenizers.
        bits_per_byte_stderr: its standard error.
        num_tokens: predicted tokens; ``num_bytes`` their UTF-8 length; ``num_documents`` documents.
        num_excluded: test documents left out because they had been calibrated on.
        corpus_fingerprint: identifies the test text.
        tokens_per_s: speed of this measurement.
        document_nll: per document, summed nats (kept for paired comparisons); ``document_tokens`` its predicted tokens
            and ``document_bytes`` their UTF-8 length, which is the same under every tokenizer.
    """

    nll_per_token: float
    nll_stderr: float
    bits_per_byte: float
    bits_per_byte_stderr: float
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_excluded: int
    corpus_fingerprint: str
    tokens_per_s: float
    document_nll: tuple[float, ...] = field(repr=False, default=())
    document_tokens: tuple[int, ...] = field(repr=False, default=())
    document_bytes: tuple[int, ...] = field(repr=False, default=())

    @property
    def perplexity(self) -> float:
        """exp(mean NLL per token)."""
        return math.exp(min(self.nll_per_token, 700.0))

    @property
    def perplexity_stderr(self) -> float:
        """Standard error of the perplexity, to first order."""
        return self.perplexity * self.nll_stderr


@dataclass(frozen=True, slots=True)
class ModelScore:
    """One row of the result table.

    Attributes:
        name: "dense", "pruned", "random" or "reversed".
        parameters: by part; a tied head counts once.
        size_bytes: bytes of the weight files on disk (or of the weights in memory for a control never saved).
        text: per bucket, the text score.
        choices: per set of multiple-choice questions, how they were answered; empty where none were asked.
    """

    name: str
    parameters: Mapping[str, int]
    size_bytes: int
    text: Mapping[str, TextScore]
    choices: Mapping[str, ChoicesScore] = field(default_factory=dict)

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


CONFIDENCE_95 = 1.645
"""Standard errors above a mean that a normal variable exceeds once in twenty times."""

TWO_SIDED_95 = 1.96
"""Standard errors on either side of a mean that hold a normal variable nineteen times out of twenty."""


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two models on the same documents or questions, first minus second; its maker says in what unit."""

    mean: float
    stderr: float


@dataclass(frozen=True, slots=True)
class McNemar:
    """Exact McNemar test of two models on the same questions.

    Source: Q. McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12, 1947; the exact form is a sign test on the questions that only one of the two answers right.

    Attributes:
        only_first: questions that only the first model answers right.
        only_second: those that only the second one does.
        p_value: chance, if both are equally good, of a split of these questions that is at least as uneven, to either
            side; 1 where there are none.
    """

    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True, slots=True)
class SegmentationChange:
    """What another tokenizer did to a measured text.

    Attributes:
        tokens_before: tokens of the text as the dense model reads it; what a tokenizer puts before a text by itself is
            not counted, here and below.
        tokens_after: tokens of the same text under the other tokenizer.
        tokens_lost: tokens before whose id is no longer in the vocabulary.
        documents_touched: documents with at least one of those.
        num_documents: documents of the text.
    """

    tokens_before: int
    tokens_after: int
    tokens_lost: int
    documents_touched: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class VocabularyEffect:
    """What a smaller vocabulary alone does to one bucket's test text, measured with the dense model.

    Attributes:
        resegmented: the dense model reading the text as the smaller tokenizer cuts it; it still gives every token of
            the full vocabulary a probability.
        restricted: the same, with the probabilities shared out among the kept tokens only.
        tokens_before: as in ``SegmentationChange``, and so are the other counts.
    """

    resegmented: TextScore
    restricted: TextScore
    tokens_before: int
    tokens_after: int
    tokens_lost: int
    documents_touched: int
    num_documents: int


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rows of one run, on the same test text.

    Attributes:
        models: rows by name, in the order measured.
        seed: seed of the random control.
        vocabulary: per bucket, what the smaller vocabulary alone does; empty where the vocabulary stayed whole.
        schema_version: version of this record's JSON form.
    """

    models: Mapping[str, ModelScore]
    seed: int
    vocabulary: Mapping[str, VocabularyEffect] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the derived perplexities written out for readers."""
        data = asdict(self)
        for name, model in self.models.items():
            for bucket, score in model.text.items():
                data["models"][name]["text"][bucket].update(
                    perplexity=score.perplexity, perplexity_stderr=score.perplexity_stderr
                )
            data["models"][name]["choices"] = {asked: score.to_dict() for asked, score in model.choices.items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        models = {}
        for name, model in data["models"].items():
            text = {bucket: _text_score(score) for bucket, score in model["text"].items()}
            choices = {asked: ChoicesScore.from_dict(score) for asked, score in model["choices"].items()}
            models[name] = ModelScore(**{**model, "text": text, "choices": choices})
        vocabulary = {}
        for bucket, effect in data["vocabulary"].items():
            scores = {name: _text_score(effect[name]) for name in ("resegmented", "restricted")}
            vocabulary[bucket] = VocabularyEffect(**{**effect, **scores})
        return cls(models=models, seed=data["seed"], vocabulary=vocabulary)


def _text_score(data: Mapping[str, Any]) -> TextScore:
    plain = {key: value for key, value in data.items() if key not in ("perplexity", "perplexity_stderr")}
    for key in ("document_nll", "document_tokens", "document_bytes"):
        plain[key] = tuple(plain[key])
    return TextScore(**plain)


def paired_difference(first: TextScore, second: TextScore) -> PairedDifference:
    """Return the NLL difference of two models on the same documents, with the standard error of that difference.

    Much tighter than comparing two error bars, because a hard document is hard for both models. The models may read
    the same text under different tokenizers.

    Args:
        first: one model's score.
        second: the reference's, usually the dense model's.

    Returns:
        The difference in nats per predicted token of the second model's segmentation.

    Raises:
        ValueError: the scores come from different text.
    """
    return _paired(_nll_differences(first, second), second.document_tokens)


def paired_bits_per_byte(first: TextScore, second: TextScore) -> PairedDifference:
    """Return the difference of two models in bits per UTF-8 byte on the same documents, with its standard error.

    Raises:
        ValueError: the scores come from different text, or do not know the bytes of each document.
    """
    if not second.document_bytes:
        raise ValueError("a difference per byte needs the bytes of each document; measure both models again")
    return _paired([delta / math.log(2) for delta in _nll_differences(first, second)], second.document_bytes)


def relative_rise(first: TextScore, second: TextScore) -> PairedDifference:
    """Return by what part of the second model's loss the first one's is higher, on the same documents.

    The loss is that of whole documents, so models with other tokenizers compare as they should.

    Raises:
        ValueError: the scores come from different text.
    """
    return _paired(_nll_differences(first, second), second.document_nll)


def paired_accuracy(first: ChoicesScore, second: ChoicesScore, *, norm: bool = False) -> PairedDifference:
    """Return the difference of two models' shares of right answers, with the standard error of that difference.

    Only questions that one model answers and the other does not count for it, so it is much smaller than the two
    scores' own errors suggest.

    Args:
        first: one model's score.
        second: the reference's, usually the dense model's.
        norm: compares ``acc_norm`` in the place of ``acc``.

    Raises:
        ValueError: the scores come from different questions.
    """
    return paired_answers(first, second, "acc_norm" if norm else "acc")


def paired_answers(first: ChoicesScore, second: ChoicesScore, measure: Measure) -> PairedDifference:
    """Return ``paired_accuracy`` of any measure.

    Raises:
        ValueError: the scores come from different questions.
    """
    return _paired_items(first, second, first.correct(measure), second.correct(measure))


def mcnemar(first: ChoicesScore, second: ChoicesScore, measure: Measure = "acc") -> McNemar:
    """Return the exact test of whether two models answer the same questions equally well.

    Raises:
        ValueError: the scores come from different questions.
    """
    left, right = first.correct(measure), second.correct(measure)
    _require_same_questions(first, second, left, right)
    only_first = sum(a and not b for a, b in zip(left, right, strict=True))
    only_second = sum(b and not a for a, b in zip(left, right, strict=True))
    return McNemar(only_first, only_second, sign_test(only_first, only_second))


def sign_test(num_first: int, num_second: int) -> float:
    """Return the two-sided p-value of such a split of independent cases that fall to either side with equal chance."""
    total, fewer = num_first + num_second, min(num_first, num_second)
    tail = term = 1
    for place in range(fewer):
        term = term * (total - place) // (place + 1)
        tail += term
    outcomes: int = 2**total
    return min(1.0, 2 * tail / outcomes)


def paired_margin(first: ChoicesScore, second: ChoicesScore) -> PairedDifference:
    """Return the difference of two models' mean margins in nats, with its standard error, on the same questions.

    Raises:
        ValueError: the scores come from different questions.
    """
    return _paired_items(first, second, first.item_margin, second.item_margin)


def _paired_items(
    first: ChoicesScore,
    second: ChoicesScore,
    left: Sequence[bool] | Sequence[float],
    right: Sequence[bool] | Sequence[float],
) -> PairedDifference:
    _require_same_questions(first, second, left, right)
    return _paired([float(a) - float(b) for a, b in zip(left, right, strict=True)], [1] * len(left))


def _require_same_questions(
    first: ChoicesScore, second: ChoicesScore, left: Sequence[Any], right: Sequence[Any]
) -> None:
    if first.fingerprint != second.fingerprint or len(left) != len(right):
        raise ValueError("paired comparison needs the same questions for both models")


def _nll_differences(first: TextScore, second: TextScore) -> list[float]:
    """Return the difference in summed nats per document; both scores must be of the same documents."""
    known = bool(first.document_bytes and second.document_bytes)  # not in records from before there were bytes
    same = (
        first.document_bytes == second.document_bytes if known else first.document_tokens == second.document_tokens
    ) and len(first.document_nll) == len(second.document_nll)
    if first.corpus_fingerprint != second.corpus_fingerprint or not same:
        raise ValueError("paired comparison needs the same test documents for both models")
    return [a - b for a, b in zip(first.document_nll, second.document_nll, strict=True)]


def _paired(deltas: list[float], sizes: Sequence[int] | Sequence[float]) -> PairedDifference:
    mean, stderr = ratio_estimate(deltas, sizes)
    return PairedDifference(mean, stderr)


def ratio_estimate(totals: Sequence[float], sizes: Sequence[int] | Sequence[float]) -> tuple[float, float]:
    """Return sum(totals) / sum(sizes) and its standard error, with the pairs as independent draws.

    Linearised (delta-method) variance of a ratio: sum of (t - r s)^2 times n / (n - 1), over (sum s)^2. With a single
    pair the error is not known and is infinite.
    """
    n, size = len(sizes), sum(sizes)
    if size == 0:
        raise ValueError("nothing was measured")
    ratio = math.fsum(totals) / size
    if n < 2:
        return ratio, math.inf
    spread = math.fsum((t - ratio * s) ** 2 for t, s in zip(totals, sizes, strict=True))
    return ratio, math.sqrt(spread * n / (n - 1)) / size
