"""The evaluation's part of a run: rows are measured on the same test text, one by one, and each is kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.corpus import PackedBlocks, segmentation_change
from secateur.errors import CheckpointError
from secateur.evaluate import evaluate_choices, evaluate_resegmented, evaluate_text, model_parameters
from secateur.evaluate.by_layer import evaluate_resegmented_by_layer, evaluate_text_by_layer
from secateur.families.geometry import build_geometry
from secateur.families.schema import Family
from secateur.pipeline.texts import Texts
from secateur.progress import Progress, silent
from secateur.records.evaluation import Evaluation, ModelScore, TextScore, VocabularyEffect
from secateur.records.ranks import ALONE, Ranks
from secateur.store.artifacts import read_json, write_json
from secateur.store.run_folder import RunFolder
from secateur.stream.streamed import StreamedModel

VOCABULARY = "vocabulary"
"""Name of what is measured of the vocabulary alone, among the rows that are kept."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is measured, in memory or layer by layer.

    Attributes:
        model: a transformers causal language model, or a ``StreamedModel``.
        size_bytes: of its weights, on disk.
        tokenizer: reads the text for it.
        forget: called once it has been measured and the result is kept.
    """

    model: Any
    size_bytes: int
    tokenizer: Any
    forget: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True)
class Row:
    """One row to be measured.

    Attributes:
        key: hash of everything its numbers depend on.
        load: returns the model; called only where the row is not there yet.
    """

    key: str
    load: Callable[[], Candidate]


@dataclass(frozen=True, slots=True)
class SmallerVocabulary:
    """The vocabulary's row.

    Attributes:
        key: hash of everything its numbers depend on.
        keep: token ids that stay.
        tokenizer: returns the smaller tokenizer.
        dense: returns the dense model, in memory or streamed.
    """

    key: str
    keep: Sequence[int]
    tokenizer: Callable[[], Any]
    dense: Callable[[], Any]


@dataclass
class EvaluationStage:
    """Measures rows and keeps them in ``evaluation.json``.

    Attributes:
        folder: the run's folder.
        texts: gives the test text.
        family: of the models.
        batch_size: blocks per forward pass.
        seed: of the random control, for the record.
        progress: told about everything that takes time.
        reused: gets the names of rows that were still valid.
        ranks: the processes that measure together; all of them return the same, and process 0 decides and writes.
    """

    folder: RunFolder
    texts: Texts
    family: Family
    batch_size: int
    seed: int
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)
    ranks: Ranks = ALONE

    @property
    def _file(self) -> Path:
        return self.folder.path / "evaluation.json"

    @cached_property
    def _before(self) -> Evaluation | None:
        """What an earlier run measured."""
        return _read_evaluation(self._file) if self._file.is_file() else None

    def is_done(self, name: str, key: str) -> bool:
        """Return whether a row is there and was measured for what is asked now."""
        return self.folder.is_done(f"evaluate:{name}", key, self._file)

    def measure(self, rows: Mapping[str, Row], vocabulary: SmallerVocabulary | None) -> Evaluation:
        """Return all rows, measuring those that are not there yet.

        Args:
            rows: by name, in the order of the table.
            vocabulary: what is measured of a smaller vocabulary; None where it stayed whole.
        """
        done = {name for name, row in rows.items() if self.is_done(name, row.key)}  # may put rows into the file
        earlier = self._before.models if self._before else {}
        earlier_effect = self._before.vocabulary if self._before else {}
        done = self._decided(done & set(earlier))
        found: dict[str, ModelScore] = {}
        for name, row in rows.items():
            if name in done:
                self.reused.append(f"evaluate:{name}")
                found[name] = earlier[name]
                continue
            started = time.perf_counter()
            self.folder.forget(f"evaluate:{name}")
            candidate = row.load()
            found[name] = self._score(name, candidate)
            self._write(Evaluation({**earlier, **found}, self.seed, earlier_effect))
            self.folder.finish(f"evaluate:{name}", row.key, started)
            candidate.forget()
            del candidate  # or it would be held while the next one is loaded
        effect = self._vocabulary_effect(vocabulary, found, earlier_effect) if vocabulary else {}
        evaluation = Evaluation(found, self.seed, effect)
        self._write(evaluation)
        return evaluation

    def _decided(self, value: Any) -> Any:
        """Return what process 0 has found, so that all of them do the same."""
        return self.ranks.exchange(value)[0]

    def _write(self, evaluation: Evaluation) -> None:
        if self.folder.read_only:
            return
        write_json(self._file, evaluation.to_dict())

    def _score(self, name: str, candidate: Candidate) -> ModelScore:
        text: dict[str, TextScore] = {}
        for bucket, blocks in self.texts.test.items():
            text[bucket] = self._text_score(
                candidate.model,
                self.texts.resegmented(blocks, candidate.tokenizer),
                batch_size=self.batch_size,
                num_excluded=blocks.num_excluded,
                progress=self.progress,
                label=f"evaluate {name} on {bucket}",
            )
        choices = {
            questions: evaluate_choices(
                candidate.model,
                self.texts.packed_questions(
                    questions,
                    candidate.tokenizer,
                    scores_whole=self.texts.recipe.evaluate.choices[questions].perplexity,
                ),
                self.family,
                batch_size=self.batch_size,
                progress=self.progress,
                label=f"ask {name} {questions}",
                ranks=self.ranks,
            )
            for questions in self.texts.questions
        }
        model = candidate.model.source.model if isinstance(candidate.model, StreamedModel) else candidate.model
        geometry = build_geometry(self.family, model.config.to_dict())
        return ModelScore(name, model_parameters(model, geometry), candidate.size_bytes, text, choices)

    def _text_score(self, model: Any, blocks: PackedBlocks, **options: Any) -> TextScore:
        if isinstance(model, StreamedModel):
            return evaluate_text_by_layer(model, blocks, **options)
        return evaluate_text(model, blocks, self.family, **options, ranks=self.ranks)

    def _vocabulary_effect(
        self,
        vocabulary: SmallerVocabulary,
        rows: Mapping[str, ModelScore],
        earlier: Mapping[str, VocabularyEffect],
    ) -> Mapping[str, VocabularyEffect]:
        """Measure what the smaller vocabulary alone does to the dense model, or take it from an earlier run."""
        if self._decided(set(earlier) == set(rows["dense"].text) and self.is_done(VOCABULARY, vocabulary.key)):
            self.reused.append(f"evaluate:{VOCABULARY}")
            return earlier
        started = time.perf_counter()
        self.folder.forget(f"evaluate:{VOCABULARY}")
        keep, tokenizer, dense = torch.tensor(vocabulary.keep), vocabulary.tokenizer(), vocabulary.dense()
        effect = {
            name: self._effect_on(name, blocks, keep, tokenizer, dense) for name, blocks in self.texts.test.items()
        }
        self._write(Evaluation(rows, self.seed, effect))
        self.folder.finish(f"evaluate:{VOCABULARY}", vocabulary.key, started)
        return effect

    def _effect_on(
        self, name: str, before: PackedBlocks, keep: torch.Tensor, tokenizer: Any, dense: Any
    ) -> VocabularyEffect:
        after = self.texts.resegmented(before, tokenizer)
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "num_excluded": before.num_excluded,
            "progress": self.progress,
            "label": f"evaluate the vocabulary on {name}",
        }
        if isinstance(dense, StreamedModel):
            resegmented, restricted = evaluate_resegmented_by_layer(dense, after, keep, **options)
        else:
            resegmented, restricted = evaluate_resegmented(dense, after, self.family, keep, **options, ranks=self.ranks)
        return VocabularyEffect(resegmented, restricted, **asdict(segmentation_change(before, after, keep)))


def _read_evaluation(file: Path) -> Evaluation:
    try:
        return Evaluation.from_dict(read_json(file))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not an evaluation that secateur wrote: {error!r}. Delete it; it will be made again."
        ) from None
