"""A Hugging Face folder: model, tokenizer, generation configuration, plan and licence; reloaded before it is named.

Uniform plans load with stock transformers. Uneven plans load after ``import secateur``, or by the code in the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ExportError
from secateur.records.plan import Plan
from secateur.store.artifacts import atomic_folder, disk_errors, write_json
from secateur.store.checkpoints import compare_reloaded, copy_side_files, save_model
from secateur.store.tokenizers import PROBES, compare_reloaded_tokenizer, encode, save_tokenizer

_SAMPLE_TOKENS = 64
PLAN_FILE = "secateur_plan.json"
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}


def export_huggingface(
    model: Any,
    tokenizer: Any,
    plan: Plan | None,
    folder: Path,
    *,
    source: Path,
    provenance: Mapping[str, Any],
) -> float:
    """Write the pruned model and return the largest logit difference seen after reloading it from disk.

    The folder appears under its name only after the reloaded model agreed with the one in memory.

    Args:
        model: the pruned model, in the dtype to be saved.
        tokenizer: saved beside it, reloaded and compared too.
        plan: what was cut, saved beside it; None where nothing was.
        folder: where the artefact goes; replaced if it exists.
        source: folder of the dense model; its licence texts are carried over.
        provenance: fingerprints and versions, saved with the plan.

    Raises:
        ExportError: the disk is full, or the folder does not reload to the same logits.
    """
    with disk_errors(folder), atomic_folder(folder) as work:
        save_model(model, work)
        save_tokenizer(tokenizer, work)
        copy_side_files(source, work)
        if plan is not None:
            write_json(work / PLAN_FILE, {**plan.to_dict(), "provenance": dict(provenance)})
        if not any(work.glob("*.safetensors")):
            raise ExportError(f"no weights were written into {folder}.")
        compare_reloaded_tokenizer(tokenizer, work, ())
        return compare_reloaded(model, work, _sample(model, tokenizer), tolerance=_TOLERANCE[model.dtype])


def _sample(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Return model inputs that use the tokenizer on text of every kind."""
    ids = encode(tokenizer, "\n".join(PROBES), add_special_tokens=True)[:_SAMPLE_TOKENS]
    return {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
