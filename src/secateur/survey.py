"""A look at a model's vocabulary before anything is cut: which ids a domain uses, and what keep rules would cost.

It reads text and tokenizers only, never weights. Rules see the calibration split; costs are measured on the test
split, whose documents the rules did not see.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from torch import Tensor

from secateur.allocate.budget import token_cost
from secateur.allocate.vocabulary import COUNTED, Vocabulary, choose_tokens, smallest_size
from secateur.corpus import count_split_tokens
from secateur.corpus.counting import SplitReading
from secateur.corpus.readers import open_source, require_documents
from secateur.corpus.split import Split
from secateur.corpus.tokenizing import tokenize
from secateur.errors import PlanError, TokenizerError
from secateur.pipeline.vocabulary import read_vocabulary
from secateur.progress import Progress, silent
from secateur.recipe import CorpusSpec, VocabularySpec
from secateur.records.plan import VocabularyPlan
from secateur.records.survey import FrequencyRow, KeepRule, SurveyedText, TextCost, VocabularySurvey
from secateur.records.token_counts import TokenCounts
from secateur.store.checkpoints import Checkpoint, read_generation_config
from secateur.store.tokenizers import check_smaller_tokenizer, smaller_tokenizer
from secateur.vocabulary import TokenGraph, renumber

DEFAULT_RULES: tuple[Mapping[str, int | float], ...] = (
    {"min_count": 1},
    {"min_count": 2},
    {"min_count": 5},
    {"min_count": 20},
    {"coverage": 0.99},
    {"coverage": 0.999},
)
_STEPS = (1, 2, 5)
_FIRST_STEP, _FEWEST_IDS = 1000, 100


def survey_vocabulary(
    checkpoint: Checkpoint,
    tokenizer: Any,
    corpus: CorpusSpec,
    *,
    spec: VocabularySpec,
    rules: Sequence[Mapping[str, int | float]] = DEFAULT_RULES,
    compare: CorpusSpec | None = None,
    progress: Progress = silent,
) -> VocabularySurvey:
    """Return where a domain's tokens lie in a vocabulary, and what each keep rule costs on held-out text.

    Args:
        checkpoint: the model; its weights are not read.
        tokenizer: of the model; it is tried on the text under every rule, with the smaller tokenizer that results.
        corpus: the domain's text. Rules count its calibration split, costs are measured on its test split.
        spec: what stays in any case, how the number of ids is rounded, and ``max_tokens``, which here limits every
            split that is read; a rule in it and ``buckets`` are not looked at.
        rules: each as ``VocabularySpec.rule`` gives it. A rule that cannot be met becomes a row that says so.
        compare: another corpus, which is counted and held out in the same way, and which no rule looks at.
        progress: told about everything that takes time.

    Raises:
        TokenizerError: the tokenizer is of a kind that cannot be cut, or the model's configuration names an id that
            the model does not have.
        ConfigError: a term of the keep list cannot be read, or the tokenizer cannot write it.
        CorpusError: the text cannot be read, or a split has none.
    """
    configs = (checkpoint.config, read_generation_config(checkpoint.folder))
    rows = checkpoint.geometry.dimensions["vocab_size"]
    vocabulary = read_vocabulary(tokenizer, spec, num_rows=rows, configs=configs)
    for config in configs:
        renumber(config, range(rows))
    survey = _Survey(tokenizer, vocabulary, spec, progress)
    corpora = [corpus] if compare is None else [corpus, compare]
    counted = [survey.count(source) for source in corpora]
    cuts = survey.cut(rules, counted[0].counts)
    heldout = [survey.hold_out(*pair, cuts) for pair in zip(corpora, counted, strict=True)]
    texts = [_surveyed(*pair) for pair in zip(corpora, counted, strict=True)]
    return VocabularySurvey(
        model=checkpoint.spec,
        family=checkpoint.geometry.family.name,
        tokenizer_kind=vocabulary.graph.kind,
        num_ids=len(vocabulary.graph.pieces),
        num_rows=rows,
        num_unreachable=_count_unreachable(vocabulary.graph),
        smallest_size=smallest_size(vocabulary),
        total_parameters=sum(math.prod(shape) for shape in checkpoint.shapes.values()),
        counted=texts[0],
        heldout=heldout[0].text,
        other_counted=None if compare is None else texts[1],
        other_heldout=None if compare is None else heldout[1].text,
        frequencies=tuple(_frequencies(counted[0], heldout[0].counts, None if compare is None else counted[1])),
        rules=tuple(_keep_rule(cut, place, checkpoint, heldout) for place, cut in enumerate(cuts)),
    )


def _name(spec: CorpusSpec, split: Split) -> str:
    """Return where a split of a corpus comes from, as it was given."""
    source = spec.path or spec.dataset or getattr(spec, split)
    return source if isinstance(source, str) else ", ".join(source)


@dataclass(slots=True, eq=False)
class _Cut:
    """A rule with what it keeps and the tokenizer that results, or why it cannot be met."""

    rule: Mapping[str, int | float]
    plan: VocabularyPlan | None = None
    tokenizer: Any = None
    problem: str = ""


@dataclass(slots=True, eq=False)
class _Tally:
    """Sums over held-out documents under one cut; nothing is summed where the rule cannot be met."""

    tokenizer: Any
    goes: Bool[np.ndarray, " ids"]
    num_lost: int = 0
    num_touched: int = 0
    num_tokens: int = 0

    @classmethod
    def of(cls, cut: _Cut, num_ids: int) -> _Tally:
        """Return an empty tally for a cut."""
        goes = np.ones(num_ids, dtype=np.bool_)
        if cut.plan is not None:
            goes[[token for token in cut.plan.keep if token < num_ids]] = False
        return cls(cut.tokenizer, goes)

    def add(
        self, texts: Sequence[str], ids: Int64[np.ndarray, " tokens"], owners: Int64[np.ndarray, " tokens"]
    ) -> None:
        """Add documents with their dense tokens, and for each token the number of its document."""
        if self.tokenizer is None:
            return
        is_lost = self.goes[ids]
        self.num_lost += int(is_lost.sum())
        self.num_touched += len(np.unique(owners[is_lost]))
        self.num_tokens += sum(map(len, tokenize(texts, self.tokenizer)))


@dataclass(frozen=True, slots=True, eq=False)
class _Heldout:
    """Held-out text, how often it has each id, and the tally of each cut in order."""

    text: SurveyedText
    counts: Int64[np.ndarray, " ids"]
    tallies: Sequence[_Tally]

    def cost(self, place: int) -> TextCost:
        """Return the cost of one cut."""
        tally, tokens = self.tallies[place], max(self.text.num_tokens, 1)
        return TextCost(
            lost_ratio=tally.num_lost / tokens,
            touched_ratio=tally.num_touched / self.text.num_documents,
            inflation=tally.num_tokens / tokens - 1,
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Survey:
    """The steps that read text or build tokenizers."""

    tokenizer: Any
    vocabulary: Vocabulary
    spec: VocabularySpec
    progress: Progress

    def count(self, corpus: CorpusSpec) -> TokenCounts:
        """Return the token counts of a corpus' calibration split."""
        return count_split_tokens(
            corpus,
            "calibration",
            self.tokenizer,
            num_ids=self.vocabulary.graph.num_ids,
            max_tokens=self.spec.max_tokens,
            name=_name(corpus, "calibration"),
            progress=self.progress,
        )

    def cut(self, rules: Sequence[Mapping[str, int | float]], counts: Int64[Tensor, " ids"]) -> list[_Cut]:
        """Return every rule with the ids that it keeps and the smaller tokenizer, or with why that cannot be."""
        cuts = []
        with self.progress("build a tokenizer for each rule", len(rules), "rules") as task:
            for rule in rules:
                cut = _Cut(rule)
                try:
                    cut.plan = choose_tokens(self.vocabulary, counts, rule, multiple_of=self.spec.multiple_of)
                    cut.tokenizer = smaller_tokenizer(self.tokenizer, cut.plan.keep)
                    check_smaller_tokenizer(self.tokenizer, cut.tokenizer, cut.plan.keep, ())
                except (PlanError, TokenizerError) as error:
                    cut = _Cut(rule, problem=str(error))
                cuts.append(cut)
                task.advance(1)
        return cuts

    def hold_out(self, corpus: CorpusSpec, counted: TokenCounts, cuts: Sequence[_Cut]) -> _Heldout:
        """Return what each cut does to a corpus' test split, in one pass over its text; counted documents are left out.

        Raises:
            CorpusError: the text cannot be read, or the split has none.
        """
        name, limit = _name(corpus, "test"), self.spec.max_tokens
        documents, ratios = open_source(corpus, "test", name)
        reading = SplitReading(documents, "test", ratios, counted.documents.tolist())
        tallies = [_Tally.of(cut, self.vocabulary.graph.num_ids) for cut in cuts]
        counts = np.zeros(self.vocabulary.graph.num_ids, dtype=np.int64)
        num_documents = num_tokens = num_bytes = 0
        with self.progress(f"try the tokenizers on held-out text of {name}", limit, "tokens") as task:
            for batch in reading.batches():
                texts = [text for _, text in batch]
                tokens = tokenize(texts, self.tokenizer)
                if limit is not None:
                    tokens = list(_until(tokens, limit - num_tokens))
                    texts = texts[: len(tokens)]
                ids = np.array([token for document in tokens for token in document], dtype=np.int64)
                owners = np.repeat(np.arange(len(tokens)), [len(document) for document in tokens])
                for tally in tallies:
                    tally.add(texts, ids, owners)
                counts += np.bincount(ids, minlength=len(counts))
                num_documents += len(texts)
                num_tokens += len(ids)
                num_bytes += sum(len(text.encode()) for text in texts)
                task.advance(len(ids))
                if limit is not None and num_tokens >= limit:
                    break
        require_documents(reading.num_seen, num_documents, len(reading.met_excluded), "test", name)
        return _Heldout(SurveyedText(name, num_documents, num_tokens, num_bytes), counts, tallies)


def _until(tokens: Iterable[list[int]], limit: int) -> Iterator[list[int]]:
    """Yield documents until they have ``limit`` tokens; the one that reaches it is the last."""
    for document in tokens:
        yield document
        limit -= len(document)
        if limit <= 0:
            return


def _frequencies(
    counted: TokenCounts, heldout: Int64[np.ndarray, " ids"], other: TokenCounts | None
) -> Iterator[FrequencyRow]:
    counts = counted.counts.numpy()
    order = _most_used(counts)
    other_counts = None if other is None else other.counts.numpy()
    other_order = None if other_counts is None else _most_used(other_counts)
    for size in curve_sizes(len(order)):
        top = order[:size]
        row = FrequencyRow(
            num_ids=size,
            coverage=_share(counts, top),
            heldout_coverage=_share(heldout, top),
            per_million=1e6 * int(counts[top[-1]]) / int(counts.sum()),
        )
        if other_counts is not None and other_order is not None:
            # The last row compares all ids that occur here with all that occur there.
            other_top = other_order if size == len(order) else other_order[:size]
            shared = len(np.intersect1d(top, other_top, assume_unique=True))
            overlap = shared / max(len(top), len(other_top))
            row = replace(row, other_coverage=_share(other_counts, top), overlap=overlap)
        yield row


def _most_used(counts: Int64[np.ndarray, " ids"]) -> Int64[np.ndarray, " used"]:
    """Return the ids that occur, the most used first, lower ids first among equals."""
    order = np.argsort(-counts, kind="stable")
    return order[: np.count_nonzero(counts)]


def curve_sizes(limit: int) -> list[int]:
    """Return how many ids the rows of the curve have: 100, 1,000, 2,000, 5,000, 10,000 ... up to the limit, and it."""
    sizes, scale = [_FEWEST_IDS], _FIRST_STEP
    while sizes[-1] < limit:
        sizes += [step * scale for step in _STEPS]
        scale *= 10
    return [size for size in sizes if size < limit] + [limit] * (limit > 0)


def _share(counts: Int64[np.ndarray, " ids"], top: Int64[np.ndarray, " top"]) -> float:
    """Return which share of all counts the given ids have."""
    return int(counts[top].sum()) / max(int(counts.sum()), 1)


def _keep_rule(cut: _Cut, place: int, checkpoint: Checkpoint, heldout: Sequence[_Heldout]) -> KeepRule:
    if cut.plan is None:
        return KeepRule(cut.rule, cut.problem)
    removed = cut.plan.num_removed * token_cost(checkpoint.geometry, checkpoint.shapes)
    costs = [text.cost(place) for text in heldout]
    return KeepRule(
        rule=cut.rule,
        num_kept=len(cut.plan.keep),
        num_chosen=cut.plan.reasons.get(COUNTED, 0),
        reasons=cut.plan.reasons,
        parameters_removed=removed,
        bytes_saved=removed * checkpoint.dtype.itemsize,
        heldout=costs[0],
        other=costs[1] if len(costs) > 1 else None,
    )


def _surveyed(corpus: CorpusSpec, counted: TokenCounts) -> SurveyedText:
    return SurveyedText(_name(corpus, "calibration"), counted.num_documents, counted.num_tokens, counted.num_bytes)


def _count_unreachable(graph: TokenGraph) -> int:
    """Return how many of the model's own tokens of several characters merging never makes; bytes are not among them."""
    own = set(graph.symbols.values()) - graph.added - graph.alphabet
    return sum(not graph.is_reachable(token) for token in own)
