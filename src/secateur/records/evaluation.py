"""What was measured: perplexity with its standard error, size and speed; plain numbers, imports without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1


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
        document_nll: per document, summed nats (kept for paired comparisons); ``document_tokens`` its tokens.
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
    """

    name: str
    parameters: Mapping[str, int]
    size_bytes: int
    text: Mapping[str, TextScore]

    @property
    def total_parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Difference of two models' NLL on the same documents, in nats per token, first minus second."""

    mean: float
    stderr: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All rows of one run, on the same test text.

    Attributes:
        models: rows by name, in the order measured.
        seed: seed of the random control.
        schema_version: version of this record's JSON form.
    """

    models: Mapping[str, ModelScore]
    seed: int
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, with the derived perplexities written out for readers."""
        data = asdict(self)
        for name, model in self.models.items():
            for bucket, score in model.text.items():
                data["models"][name]["text"][bucket].update(
                    perplexity=score.perplexity, perplexity_stderr=score.perplexity_stderr
                )
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that ``to_dict`` wrote."""
        models = {}
        for name, model in data["models"].items():
            text = {}
            for bucket, score in model["text"].items():
                plain = {k: v for k, v in score.items() if k not in ("perplexity", "perplexity_stderr")}
                plain["document_nll"] = tuple(plain["document_nll"])
                plain["document_tokens"] = tuple(plain["document_tokens"])
                text[bucket] = TextScore(**plain)
            models[name] = ModelScore(**{**model, "text": text})
        return cls(models=models, seed=data["seed"], schema_version=data["schema_version"])


def paired_difference(first: TextScore, second: TextScore) -> PairedDifference:
    """Return the NLL difference of two models on the same documents, with the standard error of that difference.

    Much tighter than comparing two error bars, because a hard document is hard for both models.

    Raises:
        ValueError: the scores come from different text.
    """
    if (first.corpus_fingerprint, first.document_tokens) != (second.corpus_fingerprint, second.document_tokens):
        raise ValueError("paired comparison needs the same test documents for both models")
    deltas = [a - b for a, b in zip(first.document_nll, second.document_nll, strict=True)]
    mean, stderr = ratio_estimate(deltas, first.document_tokens)
    return PairedDifference(mean, stderr)


def ratio_estimate(totals: list[float] | tuple[float, ...], sizes: tuple[int, ...] | list[int]) -> tuple[float, float]:
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
