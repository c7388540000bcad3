"""The main job: every name is resolved first, then the stages run in order; each result is kept and reused.

    check -> calibrate -> plan -> shrink -> recover -> evaluate -> export

Where token ids go as well, they are counted and chosen during the check (``vocabulary``), because that needs
no weights.

Stages do not know each other; this file hands one's record to the next and remembers what is done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from secateur.allocate import make_plan
from secateur.allocate.constants import require_biases
from secateur.calibrate.gradients import require_dtype
from secateur.corpus import (
    check_sources,
)
from secateur.errors import ConfigError
from secateur.files import held
from secateur.pipeline import processes
from secateur.pipeline.by_layer import remove_leftovers, require_by_layer, require_disk
from secateur.pipeline.card import terms_of
from secateur.pipeline.exports import check_exports, with_export_widths
from secateur.pipeline.masks import LORA_KEY, require_adaptable, require_targets
from secateur.pipeline.measuring import Measuring
from secateur.pipeline.recovery import (
    RECOVERED,
)
from secateur.pipeline.result import STAGES, RunResult, Stage, versions
from secateur.pipeline.rounds import (
    Round,
    drop_weights,
    joined,
    require_sizes,
    run_rounds,
    take_result,
)
from secateur.pipeline.search import MEASURED, require_dense_layers
from secateur.pipeline.sharding import Order, Together, connect, require_shares, share_of
from secateur.progress import Progress, silent
from secateur.recipe import Recipe
from secateur.records.scores import Scores
from secateur.records.units import EXPERT
from secateur.recover.lora import require_peft
from secateur.recover.train import check_training
from secateur.registry import unknown_name
from secateur.score import METHODS, rehearse
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    choose_device,
    choose_dtype,
)
from secateur.store.run_folder import Shared


def run(
    recipe: Recipe, *, until: Stage = "export", progress: Progress = silent, shared: Shared | None = None
) -> RunResult:
    """Do the main job and return what it made.

    Args:
        recipe: what is asked.
        until: last stage to run.
        progress: told about everything that takes time.
        shared: where results that other runs made may be found; None where the run is by itself.

    Raises:
        SecateurError: anything a user can mend; raised before the expensive work wherever that is possible.
        VerificationError: an engine does not run an export as the model it was made from; all else is done.
    """
    if until not in STAGES:
        raise ConfigError(unknown_name("stage", until, STAGES))
    if until == "recover" and recipe.recover is None:
        raise ConfigError("the recipe has no recover section, which says how to train. Add one, such as recover: {}.")
    if processes.are_several():
        return _run_together(recipe, until, progress, shared)
    job = Job(recipe, progress, shared=shared)
    with _alone_in(job.folder.path):
        job.check(until)
        job.calibrate()
        job.cut(until)
        if until in ("recover", "evaluate", "export"):
            job.recover()
        if until in ("evaluate", "export"):
            job.evaluate()
        if until == "export":
            job.export()
    return job.result


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse two commands that write into one run folder at once.

    Raises:
        ConfigError: another one does.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except BlockingIOError:
            raise ConfigError(
                f"another command is working in {folder}. Wait until it ends, or set output to another folder."
            ) from None
        yield


def _run_together(recipe: Recipe, until: Stage, progress: Progress, shared: Shared | None) -> RunResult:
    """Do the main job as one of several processes; what only process 0 makes is in its result alone."""
    if shared is not None:
        raise ConfigError(
            "several processes were started, and runs that share results with others are done by one. Start this "
            "command by itself."
        )
    ranks = connect()
    with ExitStack() as stack, ranks.telling():
        job = Job(recipe, progress if ranks.is_main else silent)
        ranks.require_alike(job.identity())
        job.join(ranks)
        if ranks.is_main:
            stack.enter_context(_alone_in(job.folder.path))
        ranks.main_first(partial(_check_in_turn, job, until))
        ranks.require_alike({"run folder": job.folder.on_disk()})
        if ranks.is_main:
            job.require_shares(until)
            job.calibrate()
            job.passes.dismiss()
            job.cut(until)
        else:
            job.passes.serve()
        ranks.wait()
        if until in ("recover", "evaluate", "export"):
            if not ranks.is_main:
                job = _caught_up(recipe, until, ranks)
            ranks.wait()  # whoever fails above is heard; in a training nobody listens
            with ranks.silent():
                job.recover()
        if until in ("evaluate", "export"):
            job.evaluate()
        if until == "export" and ranks.is_main:
            job.export()
        ranks.wait()
    return job.result


def _check_in_turn(job: Job, until: Stage) -> None:
    """Check a job; the others find what process 0 counted and wrote meanwhile."""
    if job.folder.read_only:
        job.folder.look_again()
    job.check(until)


def _caught_up(recipe: Recipe, until: Stage, ranks: Together) -> Job:
    """Return a job that has found all that process 0 made up to the pruned model."""
    job = Job(recipe, silent)
    job.check(until)
    job.calibrate()
    job.cut(until)
    job.join(ranks)
    return job


def refuse_impossible(recipe: Recipe) -> None:
    """Refuse a recipe that can never work, as far as that is known before weights and whole texts are read.

    Raises:
        SecateurError: as ``run`` would; nothing is written.
    """
    Job(recipe, silent).refuse_impossible()


def inputs_key(recipe: Recipe) -> str:
    """Return the hash of everything that a recipe's results depend on, wherever and on whatever they are computed."""
    job = Job(recipe, silent)
    asked = {name: [asdict(item) for item in items] for name, items in job.texts.questions.items()}
    apart: Any = {
        "output": True,
        "device": True,
        "memory": True,
        "calibrate": {"batch_size"},
        "evaluate": {"batch_size"},
    }
    return digest(job.model_fingerprint, job.source_keys, asked, recipe.model_dump(exclude=apart))


class Job(Measuring):
    """One run from recipe to report."""

    def identity(self) -> dict[str, Any]:
        """Return what must be the same in all processes of a run, by the name a person knows it by.

        Where files are and what they are computed on may differ between machines.
        """
        asked = self._asked.model_dump(mode="json", exclude={"model", "output", "device"})
        recipe = {f"recipe ({key})": value for key, value in asked.items()}
        known = versions()
        packages = {name: known[name] for name in ("secateur", "torch", "transformers", "tokenizers")}
        computed = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, choose_device(self.recipe.device))
        return {**recipe, **packages, "dtype": str(computed), "model (fingerprint)": self.model_fingerprint}

    def join(self, ranks: Together) -> None:
        """Do from now on what several processes do together."""
        if self.is_by_layer:
            raise ConfigError(
                f"memory is by_layer, which one process does, and {ranks.world_size} were started. Start this command "
                "by itself, or leave memory out where each process has room for the model."
            )
        self.ranks = self.evaluation.ranks = ranks

    def require_shares(self, until: Stage) -> None:
        """Refuse more processes than there are blocks of a text that they would share."""
        world_size = self.ranks.world_size
        for order in self._orders_left():
            if not self.responses.has(order.bucket):  # there is no such text before the model has answered
                share_of(self._pass_text(order), 0, world_size, keep_documents=order.keeps_documents)
        if until in ("evaluate", "export") and "test" in self.texts.__dict__:
            for blocks in self.texts.test.values():
                require_shares(blocks, world_size)

    def _orders_left(self) -> Iterator[Order]:
        """Yield the passes that calibration will order."""
        for name in self.calibration_buckets:
            is_calibrated, impacts = self._is_calibrated(name), self.impacts.is_missing(name)
            if not is_calibrated:
                yield Order("statistics", name, grams=bool(self.grams.splits(name)), impacts=impacts)
            elif impacts:
                yield Order("impacts", name)
            for split in self.grams.missing(name):
                if is_calibrated or split != "calibration":
                    yield Order("grams", name, split)
            if self.gradients.is_missing(name):
                yield Order("gradients", name)

    def cut(self, until: Stage) -> None:
        """Plan and shrink, as far as the run goes."""
        if until != "calibrate":
            self.plan()
        if until not in ("calibrate", "plan"):
            self.shrink()

    def check(self, until: Stage) -> None:
        """Resolve every name and refuse what cannot work, before weights are read, text is run or files are written."""
        self.refuse_impossible()
        if self.vocabulary is not None:
            self._rehearse_plan()
        self._read_new_text(until)
        self._require_enough_text()
        if not self.folder.read_only:
            remove_leftovers(self.folder.path)
        if self.is_by_layer:
            self._require_disk()
        self.folder.describe(
            versions=versions(),
            model=self.recipe.model,
            model_fingerprint=self.model_fingerprint,
            seed=self.recipe.prune.seed,
            notes=list(self.result.notes),
        )
        self.folder.write_text("recipe.yml", self.recipe.to_yaml())
        if self.vocabulary is not None:
            self.vocabulary.save()

    def refuse_impossible(self) -> None:
        """Refuse what cannot work as far as that is known without reading whole texts; nothing is written."""
        if self.is_by_layer:
            require_by_layer(self.recipe)
        METHODS[self.recipe.prune.method].check_options(self.recipe.prune.options)
        METHODS[self.recipe.prune.depth_method].check_options(self.recipe.prune.depth_options)
        if self.recipe.export:
            check_exports(self.recipe)
            self.recipe = with_export_widths(self.recipe, self.checkpoint.geometry)
        _ = self.pruning_buckets, self.reference_buckets
        self.responses.check()
        for spec in self.recipe.buckets().values():
            check_sources(spec)
        _ = self.texts.questions
        terms = terms_of(self.checkpoint)
        self.result.notes = (f"sharing: {terms.describe()}",) if terms.duties else ()
        device = choose_device(self.recipe.device)
        if self.gradients.kinds or self.masks.is_needed:
            dtype = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, device)
            require_dtype(dtype, "the model", f"method {self.recipe.prune.method}")
        if self.masks.adapters is not None:
            require_peft(LORA_KEY)
            require_adaptable(self.recipe.prune, self.pruning_buckets)
            require_targets(self.masks.adapters, self.checkpoint.shapes, self.checkpoint.geometry.family.layers)
        if self.vocabulary is not None:
            self.vocabulary.check()
        if self.recipe.recover is not None:
            check_training(self.recipe.recover, device)
            require_sizes(self.recipe)
        if self.recovery is not None:
            self.recovery.check()
        self.speed.check()
        self.generations.check()
        self.tasks.check(self._dense_key)
        self._rehearse()
        if self.vocabulary is None:
            self._rehearse_plan()
        self.exports.check_model(lambda: self.tokenizer)
        self._require_enough_text()

    def _require_disk(self) -> None:
        """Refuse hidden states that do not fit on the disk."""
        calibrated = {name: self._num_calibration_tokens(name) or 0 for name in self.calibration_buckets}
        fitted = 0
        if self.recipe.prune.reconstruct == "pruned":
            deciding = [name for name in self.pruning_buckets if self.texts.has(name, "validation")]
            fitted = sum(calibrated[name] + self.texts.split(name, "validation").num_tokens for name in deciding)
        measured = [blocks.num_tokens for blocks in self.texts.test.values()] if "test" in vars(self.texts) else []
        dtype = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, choose_device(self.recipe.device))
        hidden_size = self.checkpoint.geometry.dimensions["hidden_size"]
        require_disk(self.folder.path, [*calibrated.values(), *measured], fitted, hidden_size * dtype.itemsize)

    def _rehearse(self) -> None:
        """Try the methods on made-up statistics, and refuse measurements that cannot be made."""
        geometry = self.checkpoint.geometry
        geometry.require_positions(self.recipe.calibrate.block_size)
        prune = self.recipe.prune
        rehearse(prune.method, geometry, prune.width_kinds(), prune.options, self.pruning_buckets)
        rehearse(prune.depth_method, geometry, prune.block_kinds(), prune.depth_options)
        self._check_measurements()
        if METHODS[prune.method].merge is not None and prune.reconstruct != "none":
            raise ConfigError(
                f"prune.reconstruct: {prune.reconstruct} scales experts that stay as they are, and method "
                f"{prune.method} merges others into them. Leave reconstruct out."
            )
        if prune.bias_compensation:
            require_biases(geometry, prune.width_kinds(), self.checkpoint.shapes)

    def _rehearse_plan(self) -> None:
        """Plan on made-up scores, so that a budget that cannot be met is refused before calibration.

        Where the vocabulary is cut too, its tokens are counted for that.
        """
        geometry, kinds = self.checkpoint.geometry, self.layer_kinds
        vocabulary = self.vocabulary_plan
        if "threshold" in self.request.budget or self._bounds or not kinds:
            return
        counts = {kind: geometry.num_units(kind) for kind in kinds}
        values = {kind: [torch.arange(n, dtype=torch.float64) for n in per_layer] for kind, per_layer in counts.items()}
        scores = Scores("rehearsal", {}, (), values)
        request = replace(self.request, influence=[0.0] * geometry.num_layers)
        make_plan(scores, geometry, self.checkpoint.shapes, request, vocabulary=vocabulary)

    def _check_measurements(self) -> None:
        """Refuse to measure on less than a block of text, or an order of removals that nothing asks for."""
        prune, block_size = self.recipe.prune, self.recipe.calibrate.block_size
        require_dense_layers(self.checkpoint.geometry, prune.allocation)
        in_order = bool(prune.block_kinds()) and bool(METHODS[prune.depth_method].measure)
        if (in_order or prune.allocation in MEASURED) and prune.search.tokens < block_size:
            raise ConfigError(
                f"prune.search.tokens is {prune.search.tokens}, less than one block of {block_size} tokens. Raise it, "
                "or lower calibrate.block_size."
            )
        if in_order and prune.combine == "guard":
            raise ConfigError(
                f"combine: guard plans under many mixtures, and depth_method: {prune.depth_method} would be measured "
                "again for each. Use depth_method: block_influence, or combine: mean."
            )
        if in_order and prune.allocation in MEASURED and prune.shape == "uneven":
            raise ConfigError(
                f"allocation: {prune.allocation} measures whole blocks itself, so depth_method: {prune.depth_method} "
                "would be measured for nothing. Leave depth_method out, or use another allocation."
            )

    def _read_new_text(self, until: Stage) -> None:
        """Read the text that is still to be calibrated on, and the test text, so that too little is said now."""
        for name in self.calibration_buckets:
            stages = self.gradients, self.impacts, self.masks
            if any(stage.is_missing(name) for stage in stages) or not self._is_calibrated(name):
                self.texts.look_at(name, "calibration")
            for split in self.grams.missing(name):
                self.texts.look_at(name, split)
            prune = self.recipe.prune
            fitted = prune.reconstruct == "pruned" or (prune.reconstruct == "dense" and EXPERT in self.layer_kinds)
            if fitted and name in self.pruning_buckets and until != "calibrate":
                _ = self.texts.split(name, "validation")
            if name in self._sized_buckets and until != "calibrate":
                _ = self.texts.sizing(name)
        if self.recovery is not None and until in ("recover", "evaluate", "export"):
            self.recovery.save_documents()
        measured = until in ("evaluate", "export")
        if measured and not self.evaluation.is_done("dense", self._evaluation_key("dense", None)):
            _ = self.texts.test

    def export(self) -> None:
        """Write the result in the forms that are asked for; the report names them, and then what failed is said."""
        if not self.recipe.export:
            return
        assert self.result.model_folder is not None and self.result.evaluation is not None, "they come first"
        self.result.exports, failures = self.exports.run(self.result.model_folder)
        self._write_reports(self._required_plan(), self.result.evaluation)
        if failures:
            raise failures[0]

    def _recover_in_rounds(self, key: str) -> None:
        assert self.recovery is not None, "only called where there is a recovery"
        started, plan = time.perf_counter(), self._required_plan()
        self.folder.forget(f"recover:{RECOVERED}")
        teacher = self.recovery.teacher
        rounds: list[Round] = []

        def run_round(recipe: Recipe) -> Round:
            seen = teacher
            for earlier in rounds:
                seen = seen.after(earlier.plan)
            reference = self.recovery if plan.vocabulary else None
            job = Job(recipe, self.progress, seen, reference, None if rounds else self.folder.shared)
            job.check("recover")
            job.calibrate()
            job.plan()
            job.shrink()
            job.recover()
            assert job.result.plan is not None and job.result.model_folder is not None
            rounds.append(Round(job.result.plan, job.result.model_folder, job.result.recoveries[RECOVERED]))
            return rounds[-1]

        run_rounds(self.recipe, plan, self.folder.path / "rounds", run_round)
        take_result(rounds, self.recovery.saved(RECOVERED), self._provenance())
        self.recovery.keep_joined(RECOVERED, key, joined(rounds, RECOVERED), started)
        drop_weights(rounds)
