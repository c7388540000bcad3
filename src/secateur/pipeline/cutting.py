"""A plan's model: cut, reconstructed, saved and described."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.allocate import with_constants
from secateur.corpus import (
    PackedBlocks,
)
from secateur.corpus.split import Split
from secateur.evaluate.footprint import memory_bytes
from secateur.export import export_huggingface
from secateur.export.model_card import read_front_matter, render_model_card
from secateur.pipeline.by_layer import CONTROL_PREFIX
from secateur.pipeline.calibration import Calibration
from secateur.pipeline.card import describe_corpora, describe_origin
from secateur.pipeline.evaluation import Candidate
from secateur.pipeline.gates import all_scales, cut_experts, fit_on_dense_stream
from secateur.pipeline.grams import ModuleReport, Reconstructor, summary
from secateur.pipeline.on_disk import shrink_checkpoint
from secateur.pipeline.recovery import (
    RECOVERED,
)
from secateur.pipeline.result import versions
from secateur.pipeline.rounds import (
    read_result_plan,
)
from secateur.pipeline.streams import FittedWeights, fit_on_pruned_stream
from secateur.records.plan import Plan
from secateur.records.statistics import BucketStatistics, normalised
from secateur.report.tables import parts_table
from secateur.shrink import shrink_config, shrink_generation_config, shrink_parameters
from secateur.shrink.apply import Reconstruct
from secateur.shrink.slicing import scale_experts
from secateur.store.artifacts import (
    digest,
)
from secateur.store.checkpoints import (
    build_model,
    choose_device,
    choose_dtype,
    fingerprint,
    generation_data,
    load_model,
    load_tokenizer,
    resolve_model,
    weight_bytes,
)
from secateur.store.weights import kept_dtype

_BEFORE_RECOVERY = "This is the model before its training; the trained one was saved as `recovered`. "


def _refitted(reconstruct: Reconstruct | None) -> Mapping[str, Tensor] | None:
    return reconstruct.refitted if isinstance(reconstruct, FittedWeights) else None


def _scales(reconstruct: Reconstruct | None, plan: Plan) -> Mapping[int, Sequence[float]]:
    if isinstance(reconstruct, (FittedWeights, Reconstructor)):
        return all_scales(plan, reconstruct.scales)
    return {}


class Cutting(Calibration):
    """Makes the model of a plan."""

    def shrink(self) -> None:
        """Cut the model by its plan, save it, reload it and compare."""
        plan = self._required_plan()
        folder = self.folder.path / "model"
        key = digest(self.model_fingerprint, plan.to_dict(), str(self.checkpoint.dtype), self._reconstruction_key())
        self.result.model_folder = folder
        if self.is_by_layer:
            self.result.checked = "opened again and run"
        if self.folder.is_done("shrink", key, folder / "config.json"):
            self.result.reused.append("shrink")
            return
        started = time.perf_counter()
        self.folder.forget("shrink")
        tokenizer = self._tokenizer_of(plan)
        reconstructor = self._reconstructor(plan)
        compared: dict[str, Any] = {}
        if self.is_by_layer:
            self._cut_on_disk(plan, folder, reconstructor)
        else:
            pruned = self._pruned(plan, self.checkpoint.dtype, reconstructor)
            with self.progress("save and reload", None, "") as task:
                compared["reload_difference"] = self._export(pruned, tokenizer, plan, folder)
                task.advance(1)
        files = [str(file.relative_to(self.folder.path)) for file in sorted(folder.iterdir())]
        saved = fingerprint(resolve_model(str(folder)))
        facts: dict[str, Any] = {**compared, "files": files, "model_fingerprint": saved}
        if reconstructor is not None:
            facts["reconstruction"] = dict(summary(reconstructor.reports))
        self.folder.finish("shrink", key, started, **facts)
        self._write_card(())

    def _export(self, model: Any, tokenizer: Any, plan: Plan | None, folder: Path) -> float:
        return export_huggingface(
            model,
            tokenizer,
            plan,
            folder,
            source=self.checkpoint.folder,
            provenance=self._provenance(),
        )

    def _reconstructor(self, plan: Plan) -> Reconstructor | FittedWeights | None:
        """Return what gives the weights of projections that lose channels; None keeps their columns as they are."""
        if self.recipe.prune.reconstruct == "none" or not plan.narrows:
            return None
        if self.recipe.prune.reconstruct == "pruned":
            return fit_on_pruned_stream(
                self.layers,
                plan,
                *self._fitting_texts(),
                batch_size=self.recipe.calibrate.batch_size,
                shares=self._shares,
                config=self.checkpoint.config,
                folder=self.folder.path if self.is_by_layer else None,
                progress=self.progress,
            )
        scales, reports = self._expert_scales(plan)
        if not self.grams.kinds:
            return FittedWeights({}, {}, reports, scales)
        found = self.grams.reconstructor()
        return Reconstructor(found.fitted, found.held_out, reports, scales)

    def _expert_scales(self, plan: Plan) -> tuple[dict[int, Tensor], list[ModuleReport]]:
        """Return the scales of experts that stay, fitted on the dense stream; none where no experts are cut."""
        if not cut_experts(plan, self.checkpoint.geometry):
            return {}, []
        fitted, held_out = self._fitting_texts()
        computed = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, choose_device(self.recipe.device))
        return fit_on_dense_stream(
            self.runnable,
            self.checkpoint.config,
            plan,
            self.checkpoint.geometry,
            fitted,
            held_out,
            dtype=computed,
            batch_size=self.recipe.calibrate.batch_size,
            shares=self._shares,
            progress=self.progress,
        )

    def _fitting_texts(self) -> tuple[list[PackedBlocks], list[PackedBlocks]]:
        """Return the texts that weights are fitted to, and those that judge the fits."""
        splits: tuple[Split, Split] = ("calibration", "validation")
        fitted, held_out = ([self.texts.split(name, split) for name in self.pruning_buckets] for split in splits)
        return fitted, held_out

    @property
    def _shares(self) -> list[float] | None:
        return list(normalised(self.mix).values()) if self.mix else None

    def _reconstruction_key(self) -> list[str]:
        """Return what identifies weights that are not the dense model's own."""
        if self.recipe.prune.reconstruct == "none":
            return self.masks.keys() if self.masks.adapters is not None else []
        keys = [self.recipe.prune.reconstruct, *(self._calibration_key(name) for name in self.pruning_buckets)]
        return [*keys, digest(normalised(self.mix))] if self.mix else keys

    def _pruned(self, plan: Plan, dtype: torch.dtype | None = None, reconstruct: Reconstruct | None = None) -> Any:
        """Return the pruned model; only parameters take ``dtype``, rotary tables stay as precise as they were."""
        geometry = self.checkpoint.geometry
        config = shrink_config(self.checkpoint.config, plan, geometry)
        with self.progress("shrink", None, "") as task:
            refitted = _refitted(reconstruct)
            dense = scale_experts(self._weights(), geometry, _scales(reconstruct, plan))
            parameters = list(shrink_parameters(dense, plan, geometry, reconstruct, refitted))
            task.advance(1)
        return build_model(
            config,
            ((name, tensor.to(kept_dtype(self.dense, name, dtype or tensor.dtype))) for name, tensor in parameters),
            self.dense,
            shrink_generation_config(generation_data(self.dense), plan),
        )

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what is cut: the dense model's parameters, with what was trained beside masks added to them."""
        learned, layout = self.masks.learned(), self.checkpoint.geometry.family.weight_layout
        for name, tensor in self.dense.state_dict().items():
            yield name, tensor if learned is None else learned.merged(name, tensor, layout)

    def _cut_on_disk(
        self, plan: Plan, folder: Path, reconstruct: Reconstruct | None, stored: torch.dtype | None = None
    ) -> None:
        """Write the pruned model's folder from the checkpoint, one parameter at a time."""
        self._close_dense()
        shrink_checkpoint(
            self.checkpoint,
            plan,
            folder,
            reconstruct,
            refitted=_refitted(reconstruct),
            scales=_scales(reconstruct, plan),
            provenance=self._provenance(),
            device=self.recipe.device,
            dtype=self.recipe.dtype,
            stored=stored,
            trust_remote_code=self.recipe.trust_remote_code,
            progress=self.progress,
        )

    def _control_on_disk(self, plan: Plan) -> Candidate:
        """Return a control's model in a folder of its own, which goes once the model is measured."""
        reconstructor, device = self._reconstructor(plan), choose_device(self.recipe.device)
        # Fitted weights are measured as they were fitted, as in memory; others are the checkpoint's own anyway.
        computed = choose_dtype(self.recipe.dtype, self.checkpoint.dtype, device)
        place = Path(tempfile.mkdtemp(prefix=CONTROL_PREFIX, dir=self.folder.path))
        self._cut_on_disk(plan, place / "model", reconstructor, computed if reconstructor else None)
        model = self._streamed(resolve_model(str(place / "model")), str(computed).removeprefix("torch."))
        size = memory_bytes(model.source.model) // computed.itemsize * self.checkpoint.dtype.itemsize
        return Candidate(model, size, self._tokenizer_of(plan), partial(shutil.rmtree, place, ignore_errors=True))

    def _with_constants(self, plan: Plan, statistics: BucketStatistics | None) -> Plan:
        if statistics is None:
            return plan
        means = self.recipe.prune.bias_compensation
        return with_constants(plan, self.checkpoint.geometry, statistics.moments, self.checkpoint.shapes, means=means)

    def _saved_candidate(self, folder: Path, dtype: str | None = None) -> Candidate:
        saved, changed = resolve_model(str(folder)), self._required_plan().vocabulary is not None
        if self.is_by_layer:
            self._close_dense()
            model: Any = self._streamed(saved, dtype)
        else:
            model = load_model(saved, device=self.recipe.device, dtype=dtype or self.recipe.dtype)
        return Candidate(model, weight_bytes(folder), load_tokenizer(saved) if changed else self.tokenizer)

    def _dense_candidate(self) -> Candidate:
        return Candidate(self.runnable, self.checkpoint.size_bytes, self.tokenizer)

    def _write_card(self, tables: Sequence[str]) -> None:
        """Write the model card into every model folder of the run that there is."""
        in_rounds = self.recipe.recover is not None and self.recipe.recover.rounds > 1
        for folder, recovery in (("model", None), (RECOVERED, self.result.recoveries.get(RECOVERED))):
            place, plan = self.folder.path / folder, self._required_plan()
            if not (place / "config.json").is_file():
                continue
            if folder == RECOVERED and in_rounds:
                plan = read_result_plan(place)
            untrained = folder != RECOVERED and RECOVERED in self.result.recoveries
            card = render_model_card(
                plan,
                base_model=self.recipe.model if self.checkpoint.name == self.recipe.model else self.checkpoint.name,
                base_metadata=read_front_matter(self.checkpoint.folder),
                domains=list(self.recipe.domain),
                tables=[*tables, parts_table(plan.parameters_dense, plan.parameters_pruned).markdown() + "\n"],
                summary=(_BEFORE_RECOVERY if untrained else "") + self.result.summary,
                version=versions()["secateur"],
                recovery=recovery,
                evaluation=self.result.evaluation,
                row=RECOVERED if folder == RECOVERED else "pruned",
                corpora=describe_corpora(self.recipe, self.result.statistics),
                origin=describe_origin(self.recipe, self.checkpoint, self.model_fingerprint, versions()),
            )
            self.folder.write_text(f"{folder}/README.md", card)
