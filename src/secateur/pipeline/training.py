"""The trained rows of a run: the recovered model, and the dense and the random one trained alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from secateur.corpus.hashes import DocumentHashes
from secateur.evaluate.footprint import memory_bytes
from secateur.pipeline import processes
from secateur.pipeline.evaluation import Candidate, EvaluationStage
from secateur.pipeline.planning import Planning
from secateur.pipeline.recovery import (
    BASELINES,
    FINETUNED,
    RANDOM_RECOVERED,
    RECOVERED,
    RecoveryStage,
    Student,
    Teacher,
)
from secateur.records.plan import Plan
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    fingerprint,
    load_model,
    resolve_model,
)

TRAINED = (FINETUNED, RECOVERED, RANDOM_RECOVERED)


class Training(Planning, ABC):
    """Trains, or finds that it was done."""

    @abstractmethod
    def _recover_in_rounds(self, key: str) -> None:
        """Prune and train in turn, each round a run of its own, and take the last one's result."""

    @cached_property
    def recovery(self) -> RecoveryStage | None:
        """Recovery's part of the run; None where nothing is trained."""
        if self.recipe.recover is None:
            return None
        return RecoveryStage(
            self.recipe.recover,
            self.recipe.trained_domains(),
            "general" if self.recipe.general else None,
            self.texts,
            self.checkpoint.geometry.family,
            self.folder,
            digest(
                self.model_fingerprint,
                self.source_keys,
                self.recipe.calibrate.model_dump(exclude={"batch_size", "gradient_tokens"}),
            ),
            lambda: self.dense,
            self.teacher or Teacher(self._teaching_model, None, range(self.checkpoint.geometry.num_layers)),
            self.reference,
            self.recipe.evaluate.batch_size,
            self.progress,
            self.result.reused,
        )

    def recover(self) -> None:
        """Train the pruned model, and before it the dense one where that says when to stop."""
        if self.recovery is None:
            return
        if self.recovery.spec.needs_finetuned:
            self._train(FINETUNED)
        for name in self._trained_rows() if processes.are_several() else [RECOVERED]:
            self._train(name)
        self.result.model_folder = self.recovery.saved(RECOVERED)

    def _learned_documents(self, name: str) -> Collection[int]:
        """Return the hashes of the documents of a bucket that are calibrated on, or that models are trained on."""
        trained = self.recovery.training_documents() if self.recovery is not None else frozenset()
        return DocumentHashes(trained, super()._learned_documents(name))

    def _seen_documents(self) -> DocumentHashes:
        """Return the hashes of every document that is, or in this run will be, calibrated on, counted or trained on."""
        seen = super()._seen_documents()
        return DocumentHashes(seen, self.recovery.documents()) if self.recovery is not None else seen

    def _teaching_model(self) -> Any:
        """Return the dense model, or its fine-tuned copy where that is what teaches."""
        assert self.recipe.recover is not None, "only called where there is a recovery"
        if self.recipe.recover.distill.teacher == "dense":
            return self.dense
        return self._finetuned

    @cached_property
    def _finetuned(self) -> Any:
        """The dense model trained on the same text; kept on disk where it teaches."""
        assert self.recovery is not None, "only called where there is a recovery"
        if not self.recovery.saved(FINETUNED).exists():
            self.result.recoveries = {k: v for k, v in self.result.recoveries.items() if k != FINETUNED}
            self._train(FINETUNED, needed=True)
        return self._saved_candidate(self.recovery.saved(FINETUNED)).model

    def _train(self, name: str, *, needed: bool = False) -> None:
        """Train the model of a row, if that was not done; weights of a baseline that was measured may be gone."""
        assert self.recovery is not None, "only called where there is a recovery"
        if name in self.result.recoveries:
            return
        key = self._training_key(name)
        measured = not needed and name != RECOVERED and self.evaluation.is_done(name, self._evaluation_key(name, None))
        if not (self.recovery.is_done(name, key) and (measured or self.recovery.saved(name).exists())):
            if name == RECOVERED and self.recovery.spec.rounds > 1:
                self._recover_in_rounds(key)
            else:
                self.recovery.run(name, key, partial(self._student, name), self._save_trained)
        else:
            self.result.reused.append(f"recover:{name}")
        self.result.recoveries = {**self.result.recoveries, name: self.recovery.recovery(name)}
        if name == RECOVERED:
            self._write_card(())

    def _training_key(self, name: str) -> str:
        assert self.recovery is not None, "only called where there is a recovery"
        if name == FINETUNED:
            return self.recovery.training_key(name, None, self.model_fingerprint)
        cut: list[Any] = [self.folder.manifest["stages"]["shrink"]["model_fingerprint"]]
        if name == RANDOM_RECOVERED:
            cut += [self.recipe.prune.model_dump(), self._reconstruction_key()]
        return self.recovery.training_key(name, self._required_plan(), cut)

    def _student(self, name: str) -> Student:
        """Return the model of a row as it is before training, with weights of its own."""
        if name == FINETUNED:
            model = load_model(
                self.checkpoint,
                device=self.recipe.device,
                dtype="float32",
                trust_remote_code=self.recipe.trust_remote_code,
            )
            return Student(model, self.tokenizer, None)
        plan = self._required_plan()
        if name == RECOVERED:
            pruned = self._saved_candidate(self.folder.path / "model", "float32")
            return Student(pruned.model, pruned.tokenizer, plan)
        control, self._control = self._control_candidate("random", plan), None
        for parameter_ in control.model.parameters():
            parameter_.data = parameter_.data.clone()  # what was not cut is still the dense model's
        return Student(control.model, control.tokenizer, self._control_plan("random", plan))

    def _save_trained(self, model: Any, student: Student, folder: Path) -> dict[str, Any]:
        """Write a trained model and return facts for the manifest."""
        for parameter_ in model.parameters():  # and not the rotary tables, which stay as precise as they were
            parameter_.data = parameter_.data.to(self.checkpoint.dtype)
        with self.progress("save and reload", None, "") as task:
            plan = student.plan if folder == self.folder.path / RECOVERED else None
            difference = self._export(model, student.tokenizer, plan, folder)
            task.advance(1)
        facts = {"reload_difference": difference, "model_fingerprint": fingerprint(resolve_model(str(folder)))}
        if folder.name == FINETUNED and self._is_kept(FINETUNED):
            facts["files"] = [str(file.relative_to(self.folder.path)) for file in sorted(folder.iterdir())]
        return facts

    def _trained_rows(self) -> list[str]:
        if self.recovery is None:
            return []
        return [RECOVERED, *(BASELINES[name] for name in self.recovery.spec.baselines)]

    def _trained_candidate(self, name: str) -> Candidate:
        """Return the trained model of a row; a baseline is trained now, and its weights go once it is measured."""
        assert self.recovery is not None, "only rows of a recovery are trained"
        self._train(name)
        found = self._saved_candidate(self.recovery.saved(name))
        if name == FINETUNED:
            found = replace(found, tokenizer=self.tokenizer)
        return found if self._is_kept(name) else replace(found, forget=partial(self.recovery.drop, name))

    def _is_kept(self, name: str) -> bool:
        """Whether a trained model's weights stay: the result's do, and those of a baseline that teaches other sizes."""
        assert self.recovery is not None, "only rows of a recovery are trained"
        return name == RECOVERED or (name == FINETUNED and self.recovery.spec.is_taught_by_finetuned)

    def _control_candidate(self, name: str, plan: Plan) -> Candidate:
        if self._control is not None and self._control[0] == name:
            return self._control[1]
        control = self._control_plan(name, plan)
        if self.is_by_layer:
            return self._control_on_disk(control)
        model = self._pruned(control, None, self._reconstructor(control))
        size = memory_bytes(model) // model.dtype.itemsize * self.checkpoint.dtype.itemsize
        found = Candidate(model, size, self._tokenizer_of(control))
        trained = name == "random" and RANDOM_RECOVERED in self._trained_rows()
        self._control = (name, found) if trained else None
        return found

    @cached_property
    def evaluation(self) -> EvaluationStage:
        """The evaluation's part of the run."""
        return EvaluationStage(
            self.folder,
            self.texts,
            self.checkpoint.geometry.family,
            self.recipe.evaluate.batch_size,
            self.recipe.prune.seed,
            self.progress,
            self.result.reused,
            self.ranks,
        )

    def _evaluation_key(self, name: str, plan: Plan | None) -> str:
        """Return the key of a row; the dense model's does not depend on the plan."""
        options = self.recipe.evaluate.model_dump(include={"max_tokens"})
        asked = {name: [asdict(item) for item in items] for name, items in self.texts.questions.items()}
        whole = [name for name, spec in self.recipe.evaluate.choices.items() if spec.perplexity]
        calibration = self.recipe.calibrate.model_dump(exclude={"batch_size", "gradient_tokens"})
        text = [self.model_fingerprint, self.source_keys, options, calibration, self.recipe.dtype]
        cut: list[Any] = []
        if name in TRAINED:
            cut = [self._training_key(name)]
        elif name != "dense" and plan is not None:
            cut = [plan.to_dict(), self.recipe.prune.model_dump(), self._reconstruction_key()]
        return digest(text, cut, sorted(self._seen_test_documents()), *([asked] if asked else []), *whole)
