"""The vocabulary's part of a run: count tokens, choose those that stay, build the smaller tokenizer, say what it cost.

Counting needs the tokenizer and all of the calibration text, but not the model, so it reads far more text than the
calibration pass does.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.allocate.vocabulary import Vocabulary, choose_tokens, same_size_tokens, smallest_size
from secateur.corpus import count_split_tokens
from secateur.errors import ConfigError, PlanError, TokenizerError
from secateur.progress import Progress, silent
from secateur.recipe import CorpusSpec, VocabularySpec, parse_character_range
from secateur.records.plan import VocabularyPlan
from secateur.records.token_counts import TokenCounts, merge_token_counts
from secateur.store.artifacts import digest, read_token_counts, write_token_counts
from secateur.store.checkpoints import Checkpoint, read_generation_config
from secateur.store.run_folder import RunFolder
from secateur.store.tokenizers import (
    check_smaller_tokenizer,
    smaller_tokenizer,
    template_texts,
    term_ids,
    token_ids,
    tokenizer_data,
    tokenizer_fingerprint,
)
from secateur.vocabulary import TokenGraph, read_tokenizer, referenced_ids, renumber

SPECIAL, TEMPLATE, ALPHABET, KEEP_LIST = (
    "special and added tokens",
    "chat template",
    "bytes and single characters",
    "keep list",
)


def read_vocabulary(
    tokenizer: Any, spec: VocabularySpec, *, num_rows: int, configs: Iterable[Mapping[str, Any]]
) -> Vocabulary:
    """Return what is known of a model's vocabulary: what each token needs, and which must stay.

    Args:
        tokenizer: of the model.
        spec: whose keep lists count.
        num_rows: rows of the model's embedding.
        configs: the model's configuration and generation configuration; ids that they name stay.

    Raises:
        TokenizerError: the tokenizer is of a kind that cannot be rebuilt.
        ConfigError: a term of the keep list cannot be read, or the tokenizer cannot write it; each is listed.
    """
    data = tokenizer_data(tokenizer)
    graph = read_tokenizer(data)
    if graph.num_ids > num_rows:
        raise TokenizerError(
            f"the tokenizer has {graph.num_ids:,} ids, but the model's embedding only {num_rows:,} rows. They belong "
            "to different models; fetch both again."
        )
    named = {token for config in configs for token in referenced_ids(config)}
    alphabet = graph.alphabet - (graph.characters if spec.characters == "used" else frozenset())
    required = {
        SPECIAL: sorted(graph.added | {token for token in named if token < num_rows}),
        TEMPLATE: sorted(token_ids(tokenizer, template_texts(tokenizer))),
        ALPHABET: sorted(alphabet),
        KEEP_LIST: sorted(_listed_ids(graph, tokenizer, spec)),
    }
    return Vocabulary(graph, num_rows, required, tokenizer_fingerprint(data))


def _listed_ids(graph: TokenGraph, tokenizer: Any, spec: VocabularySpec) -> set[int]:
    ids, lost = term_ids(tokenizer, [*spec.keep, *_terms_in_files(spec.keep_file)])
    if lost:
        shown = ", ".join(repr(term) for term in lost[:10]) + (f" and {len(lost) - 10} more" if len(lost) > 10 else "")
        raise ConfigError(
            f"vocabulary.keep lists {len(lost)} terms that this tokenizer cannot write and read back: {shown}. Correct "
            "or remove them."
        )
    ranges = [parse_character_range(text) for text in spec.keep_characters]
    if ranges:
        ids |= {token for token in range(graph.num_ids) if _is_within(graph.text(token), ranges)}
    return ids


def _terms_in_files(files: str | Sequence[str] | None) -> list[str]:
    terms: list[str] = []
    for name in [files] if isinstance(files, str) else files or ():
        try:
            lines = Path(name).expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"vocabulary.keep_file {name} cannot be read: {error}. Give a UTF-8 text file.") from None
        terms += [line.strip() for line in lines if line.strip()]
    return terms


def _is_within(text: str | None, ranges: Iterable[tuple[int, int]]) -> bool:
    """Return whether all that is not white space lies in the ranges, and there is some."""
    letters = (text or "").replace(" ", "")
    return bool(letters) and all(any(a <= ord(letter) <= b for a, b in ranges) for letter in letters)


@dataclass(slots=True)
class _Source:
    """Where one bucket's counts come from and where they are kept."""

    name: str
    spec: CorpusSpec
    file: Path
    key: str


@dataclass
class VocabularyStage:
    """Counts, chooses and rebuilds for one run; nothing is done before it is asked for, and nothing twice.

    Attributes:
        spec: the recipe's ``prune.vocabulary``.
        buckets: the corpora whose tokens are counted, by name, with the digest of their text.
        checkpoint: the dense model.
        tokenizer: its tokenizer.
        folder: the run's folder.
        progress: told about everything that takes time.
        reused: gets the names of counts that were still valid.
    """

    spec: VocabularySpec
    buckets: Mapping[str, tuple[CorpusSpec, str]]
    checkpoint: Checkpoint
    tokenizer: Any
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What is known of the vocabulary; reading it refuses what cannot work."""
        return read_vocabulary(
            self.tokenizer,
            self.spec,
            num_rows=self.checkpoint.geometry.dimensions["vocab_size"],
            configs=(self.checkpoint.config, read_generation_config(self.checkpoint.folder)),
        )

    def check(self) -> None:
        """Refuse an unsupported tokenizer, an unreachable keep list and a size that is too small, reading no text."""
        size = self.spec.size
        if size is not None and size < (least := smallest_size(self.vocabulary)):
            raise PlanError(
                f"vocabulary.size is {size:,}, but {least:,} ids must stay (special tokens, bytes, chat template, keep "
                "list and what they need). Ask for at least that many."
            )
        _ = self.vocabulary

    @cached_property
    def counts(self) -> Mapping[str, TokenCounts]:
        """How often each bucket's calibration text uses each token; read where it was counted already."""
        return {name: self._count(source) for name, source in self._sources().items()}

    def _sources(self) -> dict[str, _Source]:
        fingerprint = self.vocabulary.fingerprint
        return {
            name: _Source(
                name,
                spec,
                self.folder.path / "tokens" / f"{name}.safetensors",
                digest(fingerprint, text, self.spec.max_tokens),
            )
            for name, (spec, text) in self.buckets.items()
        }

    def _count(self, source: _Source) -> TokenCounts:
        if self.folder.is_done(f"count:{source.name}", source.key, source.file):
            self.reused.append(f"count:{source.name}")
            return read_token_counts(source.file)
        return count_split_tokens(
            source.spec,
            "calibration",
            self.tokenizer,
            num_ids=self.vocabulary.graph.num_ids,
            max_tokens=self.spec.max_tokens,
            name=source.name,
            progress=self.progress,
        )

    def save(self) -> None:
        """Keep the counts in the run folder."""
        for name, source in self._sources().items():
            if not self.folder.is_done(f"count:{name}", source.key, source.file):
                started = time.perf_counter()
                counts = self.counts[name]
                self.folder.forget(f"count:{name}")
                write_token_counts(source.file, counts, {"bucket": name, "tokenizer": self.vocabulary.fingerprint})
                self.folder.finish(f"count:{name}", source.key, started, tokens=counts.num_tokens)

    @cached_property
    def merged(self) -> TokenCounts:
        """The counts of all buckets together."""
        first, *rest = self.counts.values()
        for counts in rest:
            first = merge_token_counts(first, counts)
        return first

    def plan(self, size: int | None = None) -> VocabularyPlan:
        """Return which ids stay by the recipe's rule, or the given number of them where the budget decides.

        Raises:
            PlanError: the rule cannot be met, or removes nothing.
            TokenizerError: the model's configuration names an id that does not stay.
        """
        rule = self.spec.rule() if size is None else {"size": size}
        plan = choose_tokens(self.vocabulary, self.merged.counts, rule, multiple_of=self.spec.multiple_of)
        renumber(self.checkpoint.config, plan.keep)
        return plan

    def control(self, name: str, plan: VocabularyPlan, seed: int) -> VocabularyPlan:
        """Return as many ids as the plan keeps, drawn at random or (``reversed``) the least used."""
        counts = self.merged.counts.double()
        random = torch.rand(len(counts), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return same_size_tokens(plan, self.vocabulary, -counts if name == "reversed" else random)

    def smaller(self, plan: VocabularyPlan, texts: Iterable[str] = ()) -> Any:
        """Return the tokenizer of a plan, after comparing it with the dense one on ``texts`` and text of every kind.

        Raises:
            PlanError: the plan was made for another tokenizer.
            TokenizerError: the plan drops what others need, or the tokenizers disagree.
        """
        if plan.tokenizer_fingerprint != self.vocabulary.fingerprint:
            raise PlanError("the plan's vocabulary was chosen for another tokenizer. Plan again for this model.")
        tokenizer = smaller_tokenizer(self.tokenizer, plan.keep)
        check_smaller_tokenizer(self.tokenizer, tokenizer, plan.keep, texts)
        return tokenizer
