"""Models calibrated on each of several domains, measured on all of them; plain numbers, imports without torch.

A row is a model, named by the text it was calibrated on; a column is a test text. What is compared is compared on the
same documents.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from secateur.records.comparison import Judgement, interval, judge, per_dense_token
from secateur.records.evaluation import ModelScore, PairedDifference, paired_difference

SCHEMA_VERSION = 1

GENERAL, CONTROL, OTHERS = "general", "random cut", "other domains"
"""Names of the rows that are no domain's, and of the mean of all other domains' models; the last two, with a blank in
them, cannot be names of buckets."""

_NO_SHARES = ("bytes", "threshold")
"""Budget keys that are no removed share."""

RowKind = Literal["domain", "general", "control"]


@dataclass(frozen=True, slots=True)
class MeasuredText:
    """A column: one bucket's test text, and the dense model on it.

    Attributes:
        nll_per_token: of the dense model, in nats; ``nll_stderr`` its standard error.
        bits_per_byte: of the dense model.
        num_documents: documents; ``num_tokens`` tokens that the dense model predicted.
        corpus_fingerprint: identifies the text.
    """

    nll_per_token: float
    nll_stderr: float
    bits_per_byte: float
    num_documents: int
    num_tokens: int
    corpus_fingerprint: str

    @property
    def perplexity(self) -> float:
        """exp(mean NLL per token) of the dense model."""
        return math.exp(min(self.nll_per_token, 700.0))


@dataclass(frozen=True, slots=True)
class MatrixRow:
    """One model on all texts.

    Attributes:
        name: the text that it was calibrated on, or ``CONTROL``.
        kind: whether that is a domain, general text, or no text.
        parameters: of the model.
        folder: of its run.
        to_dense: per bucket, its loss less the dense model's, in nats per token of the dense model; exp of it is the
            ratio of two perplexities.
        bits_per_byte: per bucket.
    """

    name: str
    kind: RowKind
    parameters: int
    folder: str
    to_dense: Mapping[str, PairedDifference]
    bits_per_byte: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class OwnDifference:
    """How a domain's own model differs from another row's on the domain's text; own minus other, lower is better.

    Attributes:
        domain: of text and own model.
        other: name of the other row, or ``OTHERS``.
        nll: in nats per token of the dense model.
        judgement: of the own model.
    """

    domain: str
    other: str
    nll: PairedDifference
    judgement: Judgement


@dataclass(frozen=True, slots=True)
class SizeMatrix:
    """The matrix at one size.

    Attributes:
        budget: as asked; empty where only the vocabulary is cut.
        rows: the models, domains first.
        differences: of each domain's own model from every other row, on its text.
    """

    budget: Mapping[str, Any]
    rows: tuple[MatrixRow, ...]
    differences: tuple[OwnDifference, ...]

    @property
    def label(self) -> str:
        """The budget in short, such as ``20 % of channels removed``."""
        shares = [f"{100 * value:g} % of {key}" for key, value in self.budget.items() if key not in _NO_SHARES]
        if shares:
            return f"{' and '.join(shares)} removed"
        return " and ".join(f"{key} {value:g}" for key, value in self.budget.items()) or "the smaller vocabulary"

    def row(self, name: str) -> MatrixRow | None:
        """Return the row of a name; None where there is none."""
        return next((row for row in self.rows if row.name == name), None)

    def best(self, domain: str) -> str:
        """Return the name of the row with the lowest loss on a domain's text, the control left out."""
        rows = [row for row in self.rows if row.kind != "control"]
        return min(rows, key=lambda row: row.to_dense[domain].mean).name

    def own_domains(self, domains: Sequence[str]) -> list[str]:
        """Return those domains whose own model is there."""
        return [name for name in domains if (row := self.row(name)) is not None and row.kind == "domain"]

    def against(self, other: str) -> list[OwnDifference]:
        """Return each domain's difference from one other row."""
        return [one for one in self.differences if one.other == other]

    def mean_against(self, other: str) -> PairedDifference | None:
        """Return the mean over domains of own minus other, every domain counted the same; None where none is there.

        Domains' texts are different documents, so their errors are independent.
        """
        found = [one.nll for one in self.against(other)]
        if not found:
            return None
        mean = math.fsum(one.mean for one in found) / len(found)
        return PairedDifference(mean, math.sqrt(math.fsum(one.stderr**2 for one in found)) / len(found))


@dataclass(frozen=True, slots=True)
class DomainMatrix:
    """Matrices of one recipe at one or several sizes.

    Attributes:
        model: the dense model, as the recipe names it; ``model_fingerprint`` its weights.
        method: that scored units.
        domains: names of the domains.
        texts: the columns by bucket, domains first.
        parameters_dense: of the dense model.
        sizes: the matrices, in the order of the budgets.
        seed: of cuts and control.
        failures: by trial, why it is not there.
        notes: what was left out of the recipe.
        recipe_yaml: the recipe, every default written out.
        versions: that results depend on.
    """

    model: str
    model_fingerprint: str
    method: str
    domains: tuple[str, ...]
    texts: Mapping[str, MeasuredText]
    parameters_dense: int
    sizes: tuple[SizeMatrix, ...]
    seed: int = 0
    failures: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe_yaml: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; an error that is not known is null. Intervals are written out for readers."""
        data = asdict(self)
        for size in data["sizes"]:
            for row in size["rows"]:
                row["to_dense"] = {name: plain_difference(one) for name, one in row["to_dense"].items()}
            for difference in size["differences"]:
                difference["nll"] = plain_difference(difference["nll"])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DomainMatrix:
        """Return the matrix that ``to_dict`` wrote.

        Raises:
            KeyError: something is missing.
            TypeError: something is there that does not belong, or another version of secateur wrote it.
        """
        if data["schema_version"] != SCHEMA_VERSION:
            raise TypeError(f"schema version {data['schema_version']!r}, and this secateur reads {SCHEMA_VERSION}")
        texts = {name: MeasuredText(**text) for name, text in data["texts"].items()}
        sizes = tuple(_size(size) for size in data["sizes"])
        tuples = {name: tuple(data[name]) for name in ("domains", "notes")}
        return cls(**{**data, **tuples, "texts": texts, "sizes": sizes})


def plain_difference(difference: Mapping[str, float]) -> dict[str, float | None]:
    """Return a difference's plain data for JSON, its 95 % interval written out; an error that is not known is null."""
    ends = interval(PairedDifference(**difference))
    low, high = ends if ends else (None, None)
    return {"mean": difference["mean"], "stderr": difference["stderr"] if ends else None, "low": low, "high": high}


def difference_from_plain(data: Mapping[str, float | None]) -> PairedDifference:
    """Return the difference that ``plain_difference`` wrote; TypeError where there is no mean."""
    mean, stderr = data["mean"], data["stderr"]
    if mean is None:
        raise TypeError("a difference has no mean")
    return PairedDifference(mean, math.inf if stderr is None else stderr)


def _size(data: Mapping[str, Any]) -> SizeMatrix:
    rows = [
        MatrixRow(**{**row, "to_dense": {name: difference_from_plain(one) for name, one in row["to_dense"].items()}})
        for row in data["rows"]
    ]
    differences = [OwnDifference(**{**one, "nll": difference_from_plain(one["nll"])}) for one in data["differences"]]
    return SizeMatrix(data["budget"], tuple(rows), tuple(differences))


def measured_texts(dense: ModelScore, domains: Sequence[str]) -> dict[str, MeasuredText]:
    """Return the columns of a matrix, domains first."""
    names = [*domains, *(name for name in dense.text if name not in domains)]
    return {
        name: MeasuredText(
            score.nll_per_token,
            score.nll_stderr,
            score.bits_per_byte,
            score.num_documents,
            score.num_tokens,
            score.corpus_fingerprint,
        )
        for name in names
        for score in [dense.text[name]]
    }


def size_matrix(
    budget: Mapping[str, Any],
    models: Mapping[str, tuple[RowKind, ModelScore, str]],
    dense: ModelScore,
    domains: Sequence[str],
) -> SizeMatrix:
    """Return the matrix at one size.

    Args:
        budget: as asked.
        models: by row, what kind it is of, what was measured, and where its run lies.
        dense: the dense model on the same text.
        domains: names of the domains; a row of the same name and kind ``domain`` is the domain's own.

    Raises:
        ValueError: the models were measured on different text.
    """
    rows = tuple(
        MatrixRow(
            name,
            kind,
            score.total_parameters,
            folder,
            {bucket: paired_difference(text, dense.text[bucket]) for bucket, text in score.text.items()},
            {bucket: text.bits_per_byte for bucket, text in score.text.items()},
        )
        for name, (kind, score, folder) in models.items()
    )
    own = [name for name in domains if name in models and models[name][0] == "domain"]
    return SizeMatrix(dict(budget), rows, tuple(one for name in own for one in _own(name, models, dense)))


def _own(domain: str, models: Mapping[str, tuple[RowKind, ModelScore, str]], dense: ModelScore) -> list[OwnDifference]:
    """Return how a domain's own model differs from every other row, and from the mean of the other domains'."""
    texts = {name: score.text[domain] for name, (_, score, _) in models.items()}
    others = [name for name in models if name != domain]
    found = {name: per_dense_token(texts[domain], texts[name], dense.text[domain]) for name in others}
    siblings = [texts[name].document_nll for name in others if models[name][0] == "domain"]
    if len(siblings) > 1:
        means = tuple(math.fsum(losses) / len(siblings) for losses in zip(*siblings, strict=True))
        found[OTHERS] = per_dense_token(texts[domain], replace(texts[domain], document_nll=means), dense.text[domain])
    elif siblings:
        found[OTHERS] = next(found[name] for name in others if models[name][0] == "domain")
    return [OwnDifference(domain, name, nll, judge(nll)) for name, nll in found.items()]
