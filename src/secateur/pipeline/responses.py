"""The dense model's own answers to a corpus's prompts as its calibration text, made once and kept in the run folder.

Only the calibration split is answered. What is measured on stays the text that ``text`` makes of the records: a model
finds its own answers likely, so that a loss on them would flatter the dense model.

Source: EASY-EP (Dong et al. 2025, arXiv 2504.06792) calibrates on a few domain prompts with the model's own complete
answers. Where we differ: every method can be calibrated on them, and answers have a fixed most of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.corpus import PackedBlocks
from secateur.corpus.prompts import Prompts, load_prompts
from secateur.corpus.readers import check_prompts, check_sources
from secateur.corpus.responses import require_block, responses_split
from secateur.errors import ConfigError, CorpusError
from secateur.families.geometry import Geometry
from secateur.progress import Progress, silent
from secateur.recipe import CorpusResponsesSpec, CorpusSpec, Recipe
from secateur.records.responses import Responses
from secateur.recover.self_generated import generate_responses, require_chat_template
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.checkpoints import Checkpoint
from secateur.store.run_folder import RunFolder

MOST_PROMPTS = 4096
"""Prompts that may be asked, unless more tokens are wanted than so many make. One number for all usual amounts of text,
so that wanting more of it later goes on with the answers that are there."""

TOKENS_PER_ANSWER = 16
"""Fewer than a prompt and its answer have on average."""


@dataclass(frozen=True, slots=True)
class Asking:
    """How corpora with ``responses`` are asked, for one model and one amount of text.

    Attributes:
        geometry: of the model.
        config: of the model.
        load_tokenizer: returns the model's tokenizer; called where it is needed.
        block_size: tokens per block.
        max_tokens: most tokens of a corpus to calibrate on; None for all.
        section: how the recipe's keys of a corpus begin, for messages; in Python there are none.
    """

    geometry: Geometry
    config: Mapping[str, Any]
    load_tokenizer: Callable[[], Any]
    block_size: int
    max_tokens: int | None
    section: Callable[[str], str] = lambda name: ""

    def where(self, name: str) -> str:
        """Return the recipe's key for the responses of a corpus."""
        return f"{self.section(name)}responses"

    def check(self, name: str, spec: CorpusSpec) -> None:
        """Refuse prompts that cannot be made or asked, and records that give nothing to measure on; reads the first.

        Raises:
            CorpusError: a record lacks a field, or less than a block is asked for.
            ConfigError: there is no chat template, or no room for a prompt beside its answer.
            UnavailableError: a hub data set could not be had.
        """
        asked = _asked_of(spec)
        self._require_measured_text(name, spec)
        check_prompts(spec, asked.prompt, f"{self.where(name)}.prompt")
        require_block(self.max_tokens, self.block_size)
        _ = self.longest_prompt(name, asked)
        if asked.chat:
            require_chat_template(self.load_tokenizer(), asked, self.where(name))

    def _require_measured_text(self, name: str, spec: CorpusSpec) -> None:
        """Refuse records that give prompts and no text, which would have to be measured on."""
        try:
            check_sources(spec)
        except CorpusError as error:
            try:
                check_sources(spec.model_copy(update={"text": _asked_of(spec).prompt}))
            except CorpusError:
                raise error from None
            raise CorpusError(
                f"{error} The prompts of {self.where(name)} can be made, but corpus {name!r} is never measured on the "
                "model's own answers: text: must make a text of every record. Give records with reference answers, or "
                "set text: to fields that all of them have."
            ) from None

    def longest_prompt(self, name: str, asked: CorpusResponsesSpec) -> int:
        """Return how many tokens a prompt may have, so that a block and the context hold it with a whole answer.

        Raises:
            ConfigError: an answer alone fills that.
        """
        known = self.geometry.dimensions.get("num_positions") or self.config.get("max_position_embeddings")
        room = self.block_size if known is None else min(self.block_size, int(known))
        if asked.max_new_tokens >= room:
            raise ConfigError(
                f"{self.where(name)}.max_new_tokens is {asked.max_new_tokens}, and a prompt with its answer may have "
                f"{room} tokens: calibrate.block_size is {self.block_size}, and the model's context "
                f"{'is not limited' if known is None else known}. Lower it, or raise calibrate.block_size if the "
                "context is longer."
            )
        return room - asked.max_new_tokens

    def prompts(self, name: str, spec: CorpusSpec) -> Prompts:
        """Return the prompts of the calibration split, as many as may be needed."""
        return load_prompts(
            spec,
            _asked_of(spec).prompt,
            "calibration",
            max_documents=self.most_prompts,
            name=name,
            key=f"{self.where(name)}.prompt",
        )

    @property
    def most_prompts(self) -> int | None:
        """Prompts of a corpus that may be asked; None for all."""
        return None if self.max_tokens is None else max(MOST_PROMPTS, self.max_tokens // TOKENS_PER_ANSWER)

    def answer(
        self,
        model: Any,
        name: str,
        spec: CorpusSpec,
        prompts: Prompts,
        *,
        file: Path,
        key: str = "",
        progress: Progress = silent,
    ) -> tuple[PackedBlocks, Responses]:
        """Return the calibration split as the model answers its prompts, and the answers.

        Args:
            model: a transformers causal language model.
            name: of the corpus.
            spec: the corpus.
            prompts: those of its calibration split.
            file: where answers are kept.
            key: identifies the model.
            progress: told about tokens.

        Raises:
            ConfigError: a chat template is asked for and the tokenizer has none.
            CorpusError: no prompt is short enough, or there is too little answered.
        """
        asked, where = _asked_of(spec), self.where(name)
        found = generate_responses(
            model,
            self.load_tokenizer(),
            prompts.texts,
            asked,
            seed=asked.seed,
            file=file,
            key=key,
            max_prompt_tokens=self.longest_prompt(name, asked),
            enough=self.max_tokens,
            where=where,
            progress=progress,
        )
        blocks = responses_split(
            found.responses,
            prompts.documents,
            block_size=self.block_size,
            max_tokens=self.max_tokens,
            name=name,
            where=where,
        )
        return blocks, found

    def doubts(self, name: str, counts: Mapping[str, Any]) -> list[str]:
        """Return what is to be said where at least half of the prompts got no answer.

        Args:
            name: of the corpus.
            counts: of its prompts and answers, as ``Responses.counts`` gives them.
        """
        said, prompt = [], f"{self.where(name)}.prompt"
        asked = counts["answers"] + counts["empty"]
        if 2 * counts["empty"] >= asked:
            said.append(
                f"{name}: the dense model answered nothing to {counts['empty']} of {asked} prompts; {prompt} should "
                "end where an answer begins, and a chat model needs chat: true"
            )
        if 2 * counts["prompts_too_long"] >= counts["prompts"]:
            said.append(
                f"{name}: {counts['prompts_too_long']} of {counts['prompts']} prompts were too long to be asked; raise "
                f"calibrate.block_size, or shorten {prompt}"
            )
        return said


@dataclass
class ResponsesStage:
    """The answers' part of a run; it does nothing for buckets without ``responses``.

    Attributes:
        recipe: says which buckets are answered.
        checkpoint: the dense model.
        load_tokenizer: returns its tokenizer.
        load_model: returns the model itself.
        model_key: identifies it, and what it computes in.
        source_keys: by bucket, a hash of its files and of how they are read.
        folder: the run's folder.
        progress: told about everything that takes time.
        reused: gets the names of stages whose answers were there.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    load_tokenizer: Callable[[], Any]
    load_model: Callable[[], Any]
    model_key: str
    source_keys: Mapping[str, str]
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)
    _prompts: dict[str, Prompts] = field(default_factory=dict)
    _documents: dict[str, frozenset[int]] = field(default_factory=dict)

    @property
    def _asking(self) -> Asking:
        size = self.recipe.calibrate
        return Asking(
            self.checkpoint.geometry,
            self.checkpoint.config,
            self.load_tokenizer,
            size.block_size,
            size.max_tokens,
            lambda name: "general." if name == "general" else f"domain.{name}.",
        )

    def has(self, name: str) -> bool:
        """Return whether a bucket is calibrated on answers."""
        return self.recipe.buckets()[name].responses is not None

    def check(self) -> None:
        """Refuse what cannot be asked or measured on, before weights are loaded; see ``Asking.check``."""
        for name, spec in self.recipe.buckets().items():
            if spec.responses is not None:
                self._asking.check(name, spec)

    def prompts(self, name: str) -> Prompts:
        """Return a bucket's prompts."""
        if name not in self._prompts:
            with self.progress(f"read {name} prompts", None, "") as task:
                self._prompts[name] = self._asking.prompts(name, self.recipe.buckets()[name])
                task.advance(1)
        return self._prompts[name]

    def documents(self, name: str) -> frozenset[int]:
        """Return the hashes of all documents that may be asked about; none of them is measured on.

        They are kept, so that a later run need not read the text to know.
        """
        if name not in self._documents:
            stage, file = f"prompts:{name}", self.folder.path / "responses" / f"{name}.documents.json"
            prompt = _asked_of(self.recipe.buckets()[name]).prompt
            key = digest(self.source_keys[name], prompt, self._asking.most_prompts)
            if not self.folder.is_done(stage, key, file):
                started = time.perf_counter()
                write_json(file, {"documents": list(self.prompts(name).documents)})
                self.folder.finish(stage, key, started)
            self._documents[name] = frozenset(read_json(file)["documents"])
        return self._documents[name]

    def blocks(self, name: str, max_tokens: int | None) -> PackedBlocks:
        """Return a bucket's calibration text, at most so many tokens; answers that are there are not made again."""
        started, stage, is_known = time.perf_counter(), _stage(name), self._is_done(name)
        blocks, found = replace(self._asking, max_tokens=max_tokens).answer(
            self.load_model(),
            name,
            self.recipe.buckets()[name],
            self.prompts(name),
            file=self._file(name),
            key=self.model_key,
            progress=self.progress,
        )
        if is_known and stage not in self.reused:
            self.reused.append(stage)
        if not is_known and max_tokens == self.recipe.calibrate.max_tokens:
            taken = {"tokens": blocks.num_tokens, "documents": blocks.num_documents}
            self.folder.finish(stage, self._key(name), started, **taken, **found.counts())
        return blocks

    def notes(self, names: Sequence[str]) -> list[str]:
        """Return what a plan says of those of some buckets that were calibrated on answers."""
        said = []
        for name in names:
            if not self.has(name):
                continue
            counts = self.folder.manifest["stages"][_stage(name)] if self._is_done(name) else None
            number = "" if counts is None else f" to {counts['documents']} prompts"
            said.append(
                f"{name}: calibrated on the dense model's own answers{number}, measured on the text of the records"
            )
            said += [] if counts is None else self._asking.doubts(name, counts)
        return said

    def _file(self, name: str) -> Path:
        return self.folder.path / "responses" / f"{name}.jsonl"

    def _key(self, name: str) -> str:
        asked, size = _asked_of(self.recipe.buckets()[name]).model_dump(), self.recipe.calibrate
        return digest(self.model_key, self.source_keys[name], asked, size.block_size, size.max_tokens)

    def _is_done(self, name: str) -> bool:
        return self.folder.is_done(_stage(name), self._key(name), self._file(name))


def _asked_of(spec: CorpusSpec) -> CorpusResponsesSpec:
    assert spec.responses is not None, "only corpora with responses are asked"
    return spec.responses


def _stage(name: str) -> str:
    return f"answer:calibrate:{name}"
