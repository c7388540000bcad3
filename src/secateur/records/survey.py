"""What a look at a model's vocabulary found: which ids a domain's text uses, and what keep rules would cost.

Imports without torch. Nothing in it was measured with a model: it holds no losses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class SurveyedText:
    """One split of one corpus.

    Attributes:
        name: of the corpus, as it was given.
        num_documents: different documents.
        num_tokens: their tokens under the dense tokenizer, without those that it adds by itself.
        num_bytes: UTF-8 bytes.
    """

    name: str
    num_documents: int
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class FrequencyRow:
    """What the most used ids of the counted text cover; all values but the first are shares, or counts per million.

    Attributes:
        num_ids: how many of the most used ids; of equally used ones the lower id comes first.
        coverage: share of the counted tokens.
        heldout_coverage: share of the held-out tokens.
        per_million: how often the last of these ids occurs in a million counted tokens.
        other_coverage: share of the other corpus' counted tokens; None where there is no other corpus.
        overlap: how many of these ids are also among as many most used ids of the other corpus, as a share of the
            larger of the two sets; None where there is no other corpus.
    """

    num_ids: int
    coverage: float
    heldout_coverage: float
    per_million: float
    other_coverage: float | None = None
    overlap: float | None = None


@dataclass(frozen=True, slots=True)
class TextCost:
    """What a smaller tokenizer does to a text.

    Attributes:
        lost_ratio: share of the tokens whose id goes.
        touched_ratio: share of the documents that have such a token.
        inflation: tokens under the smaller tokenizer by tokens under the dense one, minus 1.
    """

    lost_ratio: float
    touched_ratio: float
    inflation: float


@dataclass(frozen=True, slots=True)
class KeepRule:
    """What one keep rule would do; where it cannot be met, ``problem`` says why and the rest is empty.

    Attributes:
        rule: as a recipe has it, for example ``{"min_count": 5}``.
        problem: why the rule cannot be met; empty where it can.
        num_kept: ids that stay.
        num_chosen: those that the rule itself chose and that had no other reason to stay.
        reasons: how many ids stay for which reason, each id counted with its first one.
        parameters_removed: of embedding and head.
        bytes_saved: the same in bytes, at the dtype of the checkpoint.
        heldout: what it costs on held-out text of the domain; None where the rule cannot be met.
        other: what it costs on held-out text of the other corpus; None where there is none.
    """

    rule: Mapping[str, int | float]
    problem: str = ""
    num_kept: int = 0
    num_chosen: int = 0
    reasons: Mapping[str, int] = field(default_factory=dict)
    parameters_removed: int = 0
    bytes_saved: int = 0
    heldout: TextCost | None = None
    other: TextCost | None = None

    @property
    def label(self) -> str:
        """The rule in words, such as ``min_count 5``."""
        return ", ".join(f"{key} {value:,}" for key, value in self.rule.items())


@dataclass(frozen=True, slots=True)
class VocabularySurvey:
    """A model's vocabulary met by the text of a domain, and perhaps of another one.

    Attributes:
        model: as it was given.
        family: of the model.
        tokenizer_kind: for example "byte-level BPE".
        num_ids: ids that the tokenizer has a token for.
        num_rows: rows of the embedding.
        num_unreachable: tokens of several characters that merging never makes.
        smallest_size: ids that stay whatever the rule.
        total_parameters: of the dense model.
        counted: the text whose tokens the rules count.
        heldout: the text on which costs are measured.
        other_counted: counted text of the other corpus, and ``other_heldout`` its held-out text; None without one.
        frequencies: the curve of token frequencies; the last row has all ids that occur.
        rules: in the order in which they were asked for.
    """

    model: str
    family: str
    tokenizer_kind: str
    num_ids: int
    num_rows: int
    num_unreachable: int
    smallest_size: int
    total_parameters: int
    counted: SurveyedText
    heldout: SurveyedText
    other_counted: SurveyedText | None
    other_heldout: SurveyedText | None
    frequencies: Sequence[FrequencyRow]
    rules: Sequence[KeepRule]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)
