"""The model card: what was cut, on what text, what was measured, under which licence; in Hugging Face's form."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.report.markdown import describe_choice
from secateur.report.recovery import describe_recovery
from secateur.report.tables import SEGMENTATION_NOTE, cut_table, removed_blocks

_TOKENIZER = (
    "The tokenizer is smaller too and belongs to this model alone: use the one in this folder. It writes any text that "
    "the dense model's tokenizer could, spelling words whose token went in several pieces. Kept ids were renumbered in "
    "order; their old numbers stand in the plan under `vocabulary.keep`."
)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata at the top of a model folder's README.md, or nothing."""
    try:
        match = _FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        data = yaml.safe_load(match[1]) if match else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}
    return data if isinstance(data, dict) else {}


def render_model_card(
    plan: Plan,
    *,
    base_model: str,
    base_metadata: Mapping[str, Any],
    domains: Sequence[str],
    tables: Sequence[str],
    summary: str,
    version: str,
    recovery: Recovery | None = None,
) -> str:
    """Return README.md for the pruned model.

    Args:
        plan: what was cut.
        base_model: the dense model, as the recipe names it.
        base_metadata: front matter of the dense model's card; licence and language are carried over.
        domains: names of the domain buckets.
        tables: Markdown tables of the measurements.
        summary: one sentence on the result.
        version: of secateur.
        recovery: the training after the cut; None where there was none.
    """
    metadata: dict[str, Any] = {
        key: base_metadata[key]
        for key in ("license", "license_name", "license_link", "language")
        if key in base_metadata
    }
    metadata |= {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["pruning", "secateur"]}
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) and not Path(base_model).exists():
        metadata |= {"base_model": base_model}
    imports = ["import secateur  # registers the class for layers that differ"] if plan.shape == "uneven" else []
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {Path(base_model).name}, pruned for {', '.join(domains)}",
        "",
        f"A physically smaller version of `{Path(base_model).name}`, made with secateur {version}. "
        f"{_what_went(plan)} removed; nothing was zeroed or quantised.",
        "",
        summary,
        "",
        "## What was cut",
        "",
        cut_table(plan).markdown(),
        "",
        f"{plan.total_dense:,} parameters became {plan.total_pruned:,}. {describe_choice(plan)} The full plan is in "
        "`secateur_plan.json`.",
        "",
        *([_TOKENIZER, "", SEGMENTATION_NOTE, ""] if plan.vocabulary else []),
        "## Measured",
        "",
        *(tables or ["Not measured yet."]),
        "",
        "## Use",
        "",
        "```python",
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")',
        "```",
        "",
        "## Limits",
        "",
        "The model was cut for the text named above. On other text it has lost more; the general column, where there "
        "is one, says how much. "
        + ("No recovery training was done." if recovery is None else describe_recovery(recovery)),
        "",
        _licence_line(base_metadata),
        "",
    ]
    return "\n".join(lines)


def _what_went(plan: Plan) -> str:
    parts = ["whole layers or sub-layers"] if removed_blocks(plan) else []
    if plan.narrows or plan.vocabulary is not None or not parts:
        parts.append("rows and columns of the weights")
    text = " and ".join(parts)
    return f"{text[:1].upper()}{text[1:]} were"


def _licence_line(base_metadata: Mapping[str, Any]) -> str:
    licence = base_metadata.get("license")
    if licence is None:
        return "Licence: that of the base model, which did not state it in its model card; check before you share this."
    return f"Licence: {licence}, as the base model."
