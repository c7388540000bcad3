"""Recovery's part of a run: the text that is trained on, the pruned model's training, and those it is compared with.

Every training keeps its curve in ``recovery/<row>.json``. The recovered model stays; the baselines' weights are kept
only until they have been measured.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from secateur.calibrate.embeddings import embed_documents
from secateur.corpus import PackedBlocks
from secateur.corpus.near_duplicates import distinct_documents
from secateur.corpus.packing import restrict
from secateur.corpus.prompts import Prompts, load_prompts
from secateur.corpus.readers import check_prompts
from secateur.corpus.responses import renumber_responses, response_blocks
from secateur.corpus.selection import needs_embeddings, require_clusters, select_documents_for_training
from secateur.errors import CheckpointError
from secateur.evaluate import evaluate_choices, evaluate_text
from secateur.families.schema import Family
from secateur.pipeline import processes
from secateur.pipeline.texts import Texts
from secateur.progress import Progress, silent
from secateur.recipe import RecoverSpec
from secateur.records.evaluation import TextScore, paired_difference
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.recover.batch import Objective
from secateur.recover.checkpoints import forget
from secateur.recover.curve import Probe, domain_loss
from secateur.recover.examples import TrainingExamples
from secateur.recover.self_generated import generate_responses, require_chat_template
from secateur.recover.teacher import CachedDistillation, Distillation, NextToken, cache_teacher
from secateur.recover.train import train
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.run_folder import RunFolder

RECOVERED = "recovered"
FINETUNED = "dense_finetuned"
RANDOM_RECOVERED = "random_recovered"
BASELINES = {"dense": FINETUNED, "random": RANDOM_RECOVERED}
"""Row of each of ``recover.baselines``."""


@dataclass(frozen=True, slots=True)
class Student:
    """A model to be trained, in memory and on its device.

    Attributes:
        model: that is trained, in place.
        tokenizer: reads the text for it.
        plan: how it was cut; None for the dense model.
    """

    model: Any
    tokenizer: Any
    plan: Plan | None


@dataclass(frozen=True, slots=True)
class Teacher:
    """The dense model, as the model that a run starts from sees it.

    Attributes:
        model: returns it.
        keep: its id of each of the run's token ids; None where both number tokens alike.
        layers: its number of each of the run's layers.
    """

    model: Callable[[], Any]
    keep: Sequence[int] | None
    layers: Sequence[int]

    def after(self, plan: Plan) -> Teacher:
        """Return the same teacher as the model that a plan leaves sees it."""
        keep = self.keep
        if plan.vocabulary is not None:
            kept = plan.vocabulary.keep
            keep = kept if keep is None else [keep[token] for token in kept]
        gone = set(plan.removed_layers)
        return Teacher(self.model, keep, [dense for layer, dense in enumerate(self.layers) if layer not in gone])


@dataclass
class RecoveryStage:
    """Trains models on the domain's text and keeps what came of it.

    Attributes:
        spec: the recipe's ``recover``.
        domains: names of the domain's buckets, which are trained on.
        general: name of the general bucket, from which text is replayed; None where there is none.
        texts: gives the text.
        family: of the models.
        folder: the run's folder.
        key: hash of the dense model and of all text.
        dense: returns the model that the run starts from, beside which curves are read.
        teacher: what it is distilled from.
        reference: the stage of the first round, where token ids went in it: all rounds are measured on its text, per
            token of its dense model.
        batch_size: blocks per forward pass of evaluations.
        progress: told about everything that takes time.
        reused: gets the names of trainings that were still valid.
    """

    spec: RecoverSpec
    domains: Sequence[str]
    general: str | None
    texts: Texts
    family: Family
    folder: RunFolder
    key: str
    dense: Callable[[], Any]
    teacher: Teacher
    reference: RecoveryStage | None = None
    batch_size: int = 4
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)

    # -- text ----------------------------------------------------------------------------------------------------

    @property
    def _documents_file(self) -> Path:
        return self.folder.path / "recovery" / "documents.json"

    @property
    def _text_key(self) -> str:
        used = {"max_tokens", "replay", "select", "responses", "seed", "evaluation_tokens"}
        spec = self.spec.model_dump(include=used)
        return digest(self.key, spec, list(self.domains))

    def check(self) -> None:
        """Refuse prompts that cannot be made, and a chat that the tokenizer has no template for, reading no text."""
        if self.spec.responses is None:
            return
        for name in self.domains:
            check_prompts(self.texts.recipe.domain[name], self.spec.responses.prompt)
        require_chat_template(self.texts.tokenizer, self.spec.responses)

    def training_documents(self) -> frozenset[int]:
        """Return the hashes of all documents that are trained on."""
        read = (blocks.documents.tolist() for blocks in (*self.text.values(), *self.replayed))
        asked = (prompts.documents for prompts in self.prompts.values())
        return frozenset().union(*read, *asked)

    def documents(self) -> frozenset[int]:
        """Return the hashes of all documents that are trained on, or by whose loss weights are chosen."""
        if self.folder.is_done("recover:text", self._text_key, self._documents_file):
            return frozenset(read_json(self._documents_file)["documents"])
        chosen_by = (blocks.documents.tolist() for blocks in self._validation.values())
        return self.training_documents().union(*chosen_by)

    def save_documents(self) -> None:
        """Keep which documents are used, so that a later run need not read the text to know."""
        done = self.folder.is_done("recover:text", self._text_key, self._documents_file)
        if not done and processes.is_main():
            started = time.perf_counter()
            found = sorted(self.documents())
            chosen = {name: blocks.documents.tolist() for name, blocks in self.text.items()}
            write_json(self._documents_file, {"documents": found, "chosen": chosen})
            self.folder.finish("recover:text", self._text_key, started, documents=len(found))

    @property
    def _share(self) -> int | None:
        """Tokens of each domain that are trained on, at most."""
        return None if self.spec.max_tokens is None else max(1, self.spec.max_tokens // len(self.domains))

    @cached_property
    def text(self) -> dict[str, PackedBlocks]:
        """Each domain's text that is trained on, as the dense model's tokenizer cuts it; none where it answers."""
        return {} if self.spec.responses else {name: self._chosen(name, self._share) for name in self.domains}

    @cached_property
    def prompts(self) -> dict[str, Prompts]:
        """Each domain's prompts that the dense model answers; none where its text is trained on."""
        spec = self.spec.responses
        if spec is None:
            return {}
        limit = None if self._share is None else max(1, self._share // spec.max_new_tokens)
        corpora = self.texts.recipe.domain
        return {
            name: load_prompts(corpora[name], spec.prompt, "calibration", max_documents=limit, name=name)
            for name in self.domains
        }

    @cached_property
    def replayed(self) -> list[PackedBlocks]:
        """The general text that is trained on too; beside answers, the most of it that may be."""
        if not self.spec.replay or self.general is None:
            return []
        if self.spec.responses and self.spec.max_tokens is None:
            return [self._read(self.general, None)]
        taken = sum(blocks.num_tokens for blocks in self.text.values()) or self.spec.max_tokens or 0
        return [self._read(self.general, self._beside(taken))]

    def _beside(self, num_tokens: int) -> int:
        """Return how many tokens are replayed beside so many of the domains, a block at least."""
        wanted = round(num_tokens * self.spec.replay / (1 - self.spec.replay))
        return max(wanted, self.texts.recipe.calibrate.block_size)

    def _lessons(self, student: Student) -> list[PackedBlocks]:
        """Return all that a model is trained on, as its own tokenizer cuts it."""
        own = [self._answers(name, prompts, student) for name, prompts in self.prompts.items()]
        replayed = self.replayed
        if own and replayed:  # only answers are learned of what was asked
            learned = sum(int(batch.predicted.sum()) for blocks in own for batch in blocks.batches(64))
            replayed = [restrict(blocks, range(blocks.num_documents), self._beside(learned)) for blocks in replayed]
        texts = (*self.text.values(), *replayed)
        return [*own, *(self.texts.resegmented(blocks, student.tokenizer) for blocks in texts)]

    def _answers(self, name: str, prompts: Prompts, student: Student) -> PackedBlocks:
        """Return the dense model's answers to a domain's prompts, in the student's token ids."""
        spec, block_size = self.spec.responses, self.texts.recipe.calibrate.block_size
        assert spec is not None, "only called where there are prompts"
        positions = self.texts.checkpoint.geometry.dimensions.get("num_positions")
        longest = block_size - 1 if positions is None else min(block_size - 1, positions - spec.max_new_tokens)
        started, key = time.perf_counter(), digest(self.key, prompts.documents)
        file = self.folder.path / "recovery" / "responses" / f"{name}.jsonl"
        stage_key = digest(key, spec.model_dump(), self.spec.seed)
        with processes.main_first():
            self.folder.is_done(f"answer:{name}", stage_key, file)  # takes what another run of a sweep has
            found = generate_responses(
                self.dense(),
                self.texts.tokenizer,
                prompts.texts,
                spec,
                seed=self.spec.seed,
                file=file,
                key=key,
                max_prompt_tokens=longest,
                progress=self.progress,
            )
        self.folder.finish(
            f"answer:{name}",
            stage_key,
            started,
            **found.counts(),
        )
        responses = list(found.responses)
        if student.plan is not None and student.plan.vocabulary is not None:
            responses = renumber_responses(responses, student.plan.vocabulary.keep, student.tokenizer)
        blocks, _ = response_blocks(responses, prompts.documents, block_size=block_size, name=name)
        return restrict(blocks, range(blocks.num_documents), self._share)

    def _read(self, name: str, max_tokens: int | None) -> PackedBlocks:
        how = {"whole": max_tokens is None, "keep_text": True, "as_written": True}
        return self.texts.read(name, "calibration", max_tokens, **how)

    def _chosen(self, name: str, max_tokens: int | None) -> PackedBlocks:
        """Return a domain's training text: the first documents in order of hash, or those that ``select`` chooses."""
        select = self.spec.select
        if select.near_duplicates is None and (max_tokens is None or not needs_embeddings(select)):
            return self._read(name, max_tokens)
        pool = self._read(name, None if max_tokens is None else round(max_tokens * select.pool))
        if self.folder.is_done("recover:text", self._text_key, self._documents_file):
            place = {document: index for index, document in enumerate(pool.documents.tolist())}
            chosen = [place[document] for document in read_json(self._documents_file)["chosen"][name]]
            return restrict(pool, chosen, max_tokens)
        places, distinct = list(range(pool.num_documents)), pool
        if select.near_duplicates is not None:
            places = distinct_documents(pool.texts, select.near_duplicates, progress=self.progress)
            distinct = restrict(pool, places)
        vectors = None
        if max_tokens is not None and needs_embeddings(select):
            require_clusters(select, distinct.num_documents)
            vectors = embed_documents(
                self.dense(), distinct, self.family, batch_size=self.batch_size, progress=self.progress
            )
        lengths = distinct.document_lengths()
        chosen = select_documents_for_training(vectors, lengths, max_tokens, select, self.spec.seed)
        return restrict(pool, [places[place] for place in chosen], max_tokens)

    @cached_property
    def _validation(self) -> dict[str, PackedBlocks]:
        if self.reference is not None:
            return self.reference._validation
        names = [*self.domains, *([self.general] if self.general else [])]
        return {name: self.texts.read(name, "validation", self.spec.evaluation_tokens) for name in names}

    @cached_property
    def dense_scores(self) -> Mapping[str, TextScore]:
        """The dense model's loss on the validation text, against which all curves are read."""
        if self.reference is not None:
            return self.reference.dense_scores
        return self._scores(self.dense(), self.texts.tokenizer, "dense")

    def _scores(self, model: Any, tokenizer: Any, name: str) -> dict[str, TextScore]:
        texts = (self.reference or self).texts
        return {
            bucket: evaluate_text(
                model,
                texts.resegmented(blocks, tokenizer),
                self.family,
                batch_size=self.batch_size,
                progress=self.progress,
                label=f"evaluate {name} on {bucket} (validation)",
            )
            for bucket, blocks in self._validation.items()
        }

    def _probe(self, name: str, tokenizer: Any) -> Callable[[Any], Probe]:
        """Return what measures a model in training, in nats per token of the dense model's segmentation."""
        asked = list(self.texts.questions) if self.spec.evaluation_questions else []

        def probe(model: Any) -> Probe:
            scores = self._scores(model, tokenizer, name)
            losses = {}
            for bucket, score in scores.items():
                dense = self.dense_scores[bucket]
                losses[bucket] = dense.nll_per_token + paired_difference(score, dense).mean
            return Probe(losses, {questions: self._accuracy(model, tokenizer, questions) for questions in asked})

        return probe

    def _accuracy(self, model: Any, tokenizer: Any, questions: str) -> float:
        """Return the share of the first questions of a set that a model answers right."""
        blocks = self.texts.packed_questions(questions, tokenizer, self.spec.evaluation_questions)
        score = evaluate_choices(
            model, blocks, self.family, batch_size=self.batch_size, progress=self.progress, label=f"ask {questions}"
        )
        return score.acc

    # -- trainings -----------------------------------------------------------------------------------------------

    def file(self, name: str) -> Path:
        """Return where a training's curve is kept."""
        return self.folder.path / "recovery" / f"{name}.json"

    def saved(self, name: str) -> Path:
        """Return where a trained model is kept."""
        return self.folder.path / (RECOVERED if name == RECOVERED else f"recovery/{name}")

    def is_done(self, name: str, key: str) -> bool:
        """Return whether a training was finished for what is asked now."""
        return self.folder.is_done(f"recover:{name}", key, self.file(name))

    def training_key(self, name: str, plan: Plan | None, model_key: object) -> str:
        """Return the hash of everything that a training depends on.

        Args:
            name: of its row.
            plan: how the trained model was cut; None for the dense model.
            model_key: what identifies the weights that it starts from.
        """
        unused = {"baselines", "report_to"}
        if name == FINETUNED:
            unused |= {"method", "distill", "rounds", "until"}
        cut = plan.to_dict() if plan else None
        return digest(self._text_key, self.spec.model_dump(exclude=unused), name, cut, model_key)

    def recovery(self, name: str) -> Recovery:
        """Return the record of a finished training."""
        try:
            return Recovery.from_dict(read_json(self.file(name)))
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.file(name)} is not a recovery that secateur wrote: {error!r}. Delete it; it will be made again."
            ) from None

    def run(
        self,
        name: str,
        key: str,
        load: Callable[[], Student],
        save: Callable[[Any, Student, Path], Mapping[str, Any]],
    ) -> None:
        """Train a model and keep it with its curve; a training that was stopped goes on where it was.

        Args:
            name: of its row.
            key: hash of everything that it depends on.
            load: returns the model as it is before training.
            save: writes the trained model to a folder; returns facts for the manifest.
        """
        self.folder.forget(f"recover:{name}")
        started = time.perf_counter()
        student = load()
        work = self.folder.path / "recovery" / "checkpoints" / name
        examples = TrainingExamples(self._lessons(student))
        model, recovery = train(
            student.model,
            examples,
            self._objective(name, student, examples),
            self.spec,
            family=self.family,
            name=name,
            folder=work,
            probe=self._probe(name, student.tokenizer),
            domains=list(self.domains),
            target=self._target(name),
            key=key,
            progress=self.progress,
        )
        if processes.is_main():
            facts = save(model, student, self.saved(name))
            write_json(self.file(name), recovery.to_dict())
            self.folder.finish(f"recover:{name}", key, started, tokens=recovery.tokens, **facts)
        processes.wait()
        if processes.is_main():
            forget(work)

    def drop(self, name: str) -> None:
        """Delete the weights of a baseline, once it has been measured."""
        shutil.rmtree(self.saved(name), ignore_errors=True)

    def _target(self, name: str) -> float | None:
        """Return the mean domain loss at which a training has done enough; None where it goes on to its end."""
        if self.spec.until == "end" or name == FINETUNED:
            return None
        if self.spec.until == FINETUNED:
            return domain_loss(self.recovery(FINETUNED).best.losses, self.domains)
        return domain_loss({name: score.nll_per_token for name, score in self.dense_scores.items()}, self.domains)

    def _objective(self, name: str, student: Student, examples: TrainingExamples) -> Objective:
        """Return what a training lowers; the dense model has nothing to learn from itself, so it learns the text."""
        if self.spec.method == "finetune" or student.plan is None:
            return NextToken(self.family)
        spec, teacher = self.spec.distill, self.teacher.after(student.plan)
        keep = None if teacher.keep is None else torch.tensor(teacher.keep)
        if spec.cached_logits is None:
            return Distillation(teacher.model(), self.family, spec, keep, list(teacher.layers))
        trained = self.training_key(FINETUNED, None, "") if spec.teacher == FINETUNED else ""
        key = digest(self._text_key, teacher.keep, spec.cached_logits, spec.temperature, trained)
        folder = self.folder.path / "recovery" / "teacher" / key[:16]
        with processes.main_first():
            cache = cache_teacher(teacher.model(), self.family, examples, keep, spec, folder, key, self.progress)
        return CachedDistillation(self.family, spec, cache)

    def keep_joined(self, name: str, key: str, recovery: Recovery, started: float) -> None:
        """Keep what the rounds of a training came to, once its model is in place."""
        write_json(self.file(name), recovery.to_dict())
        self.folder.finish(f"recover:{name}", key, started, tokens=recovery.tokens)
