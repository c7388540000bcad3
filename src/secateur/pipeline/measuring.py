"""What is measured of the models of a run, and the reports that say it."""

from __future__ import annotations

from abc import ABC
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from secateur.pipeline.evaluation import VOCABULARY, Row, SmallerVocabulary
from secateur.pipeline.generations import GenerationsStage
from secateur.pipeline.page import try_page
from secateur.pipeline.recovery import (
    FINETUNED,
    RANDOM_RECOVERED,
    RECOVERED,
)
from secateur.pipeline.speed import SpeedStage, Timed
from secateur.pipeline.tasks import TasksStage
from secateur.pipeline.training import Training
from secateur.records.evaluation import (
    Evaluation,
)
from secateur.records.plan import Plan
from secateur.records.speed import SpeedComparison
from secateur.report.choices import choices_table
from secateur.report.markdown import render_report
from secateur.report.tables import evidence_table, result_table, verdict
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    fingerprint,
    resolve_model,
    weight_bytes,
)

ROWS = ("dense", FINETUNED, "pruned", RECOVERED, "random", RANDOM_RECOVERED, "reversed")
"""Rows of the evaluation, in the order of the table."""


class Measuring(Training, ABC):
    """Measures, or finds that it was done."""

    def evaluate(self) -> None:
        """Measure every row, and what else the recipe asks for, and write the reports."""
        plan, vocabulary = self._required_plan(), None
        folder = self.folder.path / "model"
        rows = {
            "dense": Row(self._evaluation_key("dense", None), self._dense_candidate),
            "pruned": Row(self._evaluation_key("pruned", plan), partial(self._saved_candidate, folder)),
        }
        for control in self.recipe.evaluate.controls:
            rows[control] = Row(self._evaluation_key(control, plan), partial(self._control_candidate, control, plan))
        trained = self._trained_rows()
        for name in trained:
            rows[name] = Row(self._evaluation_key(name, None), partial(self._trained_candidate, name))
        if plan.vocabulary is not None:
            key = self._evaluation_key(VOCABULARY, plan)
            vocabulary = SmallerVocabulary(
                key, plan.vocabulary.keep, lambda: self._tokenizer_of(plan), lambda: self.runnable
            )
        evaluation = self.evaluation.measure({name: rows[name] for name in ROWS if name in rows}, vocabulary)
        if self.folder.read_only:  # the rest is process 0's
            return
        for name in trained:
            self._train(name)
            if self.recovery is not None and not self._is_kept(name):
                self.recovery.drop(name)
        self.result.evaluation = evaluation
        self.result.summary = verdict(evaluation, list(self.recipe.domain), self._bounds)
        assert self.result.model_folder is not None, "shrink() comes first"
        self.result.exports = self.exports.found(self.result.model_folder)
        self.result.speed = self._measure_speed(self.result.model_folder)
        self._ask(plan, self.result.model_folder)
        self._write_reports(plan, evaluation)

    @cached_property
    def speed(self) -> SpeedStage:
        """The speed's part of the evaluation; it does nothing where the recipe does not ask for it."""
        recipe = self.recipe
        return SpeedStage(
            recipe.evaluate.speed,
            self.checkpoint,
            self._read_test_text,
            list(recipe.domain),
            digest([self.source_keys[name] for name in recipe.domain]),
            recipe.device,
            recipe.dtype,
            recipe.trust_remote_code,
            self.folder,
            self.progress,
            self.result.reused,
        )

    def _read_test_text(self, name: str, num_tokens: int) -> Sequence[str]:
        """Return documents of a bucket's test text with about so many tokens, and a block of them at least."""
        return self.texts.read(name, "test", max(num_tokens, self.recipe.calibrate.block_size), keep_text=True).texts

    def _measure_speed(self, result: Path) -> SpeedComparison | None:
        """Return the speeds of the dense model and of the result in a folder; None where they are not asked for."""
        if self.speed.spec is None:
            return None

        def load_result() -> tuple[Any, Any]:
            found = self._saved_candidate(result)
            return found.model, found.tokenizer

        def load_dense() -> tuple[Any, Any]:
            return self.dense, self.tokenizer

        name = "pruned" if self.recovery is None else RECOVERED
        return self.speed.measure(
            [
                Timed("dense", self.model_fingerprint, self.checkpoint.folder, self.checkpoint.size_bytes, load_dense),
                Timed(name, fingerprint(resolve_model(str(result))), result, weight_bytes(result), load_result),
            ]
        )

    @cached_property
    def generations(self) -> GenerationsStage:
        """The generations' part of the evaluation; it does nothing where the recipe does not ask for it."""
        spec = self.recipe.evaluate.generations
        return GenerationsStage(spec, self.texts, self.folder, self.progress, self.result.reused)

    @cached_property
    def tasks(self) -> TasksStage:
        """The tasks' part of the evaluation; it does nothing where the recipe names none."""
        return TasksStage(self.recipe.evaluate.tasks, self.folder, self.progress, self.result.reused)

    @property
    def _dense_key(self) -> str:
        return digest(self.model_fingerprint, self.recipe.dtype)

    def _ask(self, plan: Plan, folder: Path) -> None:
        """Let the dense model and the result in a folder answer prompts and do tasks, as far as the recipe asks."""
        name = "pruned" if self.recovery is None else RECOVERED
        key = digest(self._evaluation_key("dense", None), self._evaluation_key(name, plan))
        loaded: list[tuple[Any, Any]] = []

        def result() -> tuple[Any, Any]:
            if not loaded:
                found = self._saved_candidate(folder)
                loaded.append((found.model, found.tokenizer))
            return loaded[0]

        def dense() -> tuple[Any, Any]:
            return self.dense, self.tokenizer

        self.result.generations = self.generations.run(key, plan, name, dense, result)
        self.result.tasks = self.tasks.run(self._dense_key, key, name, dense, result)

    def _write_reports(self, plan: Plan, evaluation: Evaluation) -> None:
        speeds = {name: statistics.tokens_per_s for name, statistics in self.result.statistics.items()}
        report = render_report(
            plan,
            evaluation,
            model_name=self.checkpoint.name,
            domains=list(self.recipe.domain),
            manifest=self.folder.manifest,
            calibration_tokens_per_s=speeds,
            recipe_yaml=self.recipe.to_yaml(),
            bounds=self._bounds,
            recoveries=self.result.recoveries,
            notes=self.result.notes,
            exports=self.result.exports,
            speed=self.result.speed,
            generations=self.result.generations,
            tasks=self.result.tasks,
        )
        self.folder.write_text("report.md", report)
        tables = [result_table(evaluation), choices_table(evaluation), evidence_table(evaluation)]
        self._write_card([table.markdown() + "\n" for table in tables if table.rows])
        self.result.page, self.result.no_page = try_page(self.folder.path)
