"""The model card: what was cut, on what text, what was measured, under which licence; in Hugging Face's form.

Names come from recipes, other people's model cards and file names, so none of them is trusted to be plain text:
metadata is written by a YAML writer, and what goes into the text is stripped of what Markdown and HTML would read.
Local paths are left out.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from secateur.export.licences import Terms, licence_terms
from secateur.records.evaluation import Evaluation, TextScore, paired_difference
from secateur.records.plan import Plan
from secateur.records.recovery import Recovery
from secateur.report.markdown import describe_choice
from secateur.report.recovery import describe_recovery
from secateur.report.tables import SEGMENTATION_NOTE, cut_table, format_bytes, removed_blocks, with_error

PLACE = "path/to/this/folder"
"""Stands in the card for where the model is."""

_TOKENIZER = (
    "The tokenizer is smaller too and belongs to this model alone: use the one in this folder. It writes any text that "
    "the dense model's tokenizer could, spelling words whose token went in several pieces. Kept ids were renumbered in "
    "order; their old numbers stand in the plan under `vocabulary.keep`."
)
_FRONT_MATTER = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[A-Za-z0-9_]")
_ROOTED = re.compile(r"[/~]|[A-Za-z]:[/\\]")
_LOCAL_TEXT = "text"
"""``dataset.type`` of text that is on no hub: the name of the data sets library's builder for local text."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One bucket of text as the card tells of it; never where it lay.

    Attributes:
        name: of the bucket.
        dataset: hub id; "" for local files. ``config`` is its configuration there.
        size_bytes: of the local files; 0 where not known.
        calibration_tokens: that the dense model read to be cut; 0 for none.
        fingerprint: of the text calibrated on; "" for none.
    """

    name: str
    dataset: str = ""
    config: str = ""
    size_bytes: int = 0
    calibration_tokens: int = 0
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Origin:
    """How a model was made, for who wants to make it again.

    Attributes:
        hub_id: of the dense model; "" where it came from a folder or file.
        model_type: of the dense model's configuration.
        model_fingerprint: of the dense model's configuration and weights.
        versions: of the packages that results depend on.
        recipe: sections of the recipe as plain data.
    """

    hub_id: str = ""
    model_type: str = ""
    model_fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata at the top of a model folder's README.md, or nothing."""
    try:
        match = _FRONT_MATTER.match((folder / "README.md").read_text(encoding="utf-8"))
        data = yaml.safe_load(match[1]) if match else {}
    except (OSError, ValueError, yaml.YAMLError):
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
    evaluation: Evaluation | None = None,
    row: str = "pruned",
    corpora: Sequence[Corpus] = (),
    origin: Origin | None = None,
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
        evaluation: what was measured; None where nothing was yet.
        row: name of this model's row in ``evaluation``.
        corpora: the text of every bucket.
        origin: how the model was made; None where that is not known.
    """
    origin = origin or Origin(hub_id=base_model if is_hub_id(base_model) else "")
    name = Path(base_model).name
    terms = licence_terms(base_metadata, base_model=base_model, model_type=origin.model_type)
    title = f"{name}, pruned for {', '.join(domains)}"
    metadata = {
        **_carried_over(base_metadata, origin.hub_id),
        **_own_metadata(_base_of(base_metadata, origin.hub_id), corpora, domains),
        **_results(title, evaluation, row, corpora),
    }
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {plain(title)}",
        "",
        f"A physically smaller version of {code(name)}, made with secateur {version}. {_what_went(plan)} removed; "
        "nothing was zeroed or quantised.",
        "",
        *([_sentence(summary), ""] if summary else []),
        *([f"> **Before you share it:** {_sentence(terms.describe())}", ""] if terms.duties else []),
        *_cut_section(plan),
        "## Measured",
        "",
        *(tables or ["Not measured yet."]),
        "",
        *_use_sections(domains, corpora, evaluation, row),
        *_making_section(plan, recovery, origin, version),
        *_loading_section(plan),
        "## Licence",
        "",
        _licence_line(metadata),
        *_terms_lines(terms),
        "",
    ]
    return "\n".join(lines)


def is_hub_id(name: str) -> bool:
    """Return whether a name can be a hub id with its owner and is nothing on this machine."""
    return bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def plain(text: str) -> str:
    """Return a name as one line that Markdown and HTML show as it is."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", _sentence(text))


def code(text: str) -> str:
    """Return a name as one line of code in Markdown."""
    return f"`{' '.join(text.split()).replace('`', chr(39))}`"


def _sentence(text: str) -> str:
    """Return text of our own that may hold names: one line without HTML and links; code stays code."""
    return html.escape(" ".join(text.split()), quote=False).replace("](", "] (")


# -- metadata ----------------------------------------------------------------------------------------------------------


def _carried_over(base: Mapping[str, Any], hub_id: str) -> dict[str, Any]:
    """Return licence and language of the dense model's card, as far as they are what the hub reads."""
    kept: dict[str, Any] = {}
    for key in ("license", "license_name", "license_link"):
        if isinstance(base.get(key), str):
            kept[key] = " ".join(base[key].split())
    languages = base["language"] if isinstance(base.get("language"), list) else [base.get("language")]
    languages = ["no" if item is False else item for item in languages]  # YAML reads a bare "no", Norwegian, as false
    found = [" ".join(item.split()) for item in languages if isinstance(item, str) and item.strip()]
    if found:
        kept["language"] = found
    link = kept.get("license_link", "")
    if hub_id and link and not re.match(r"https?://", link):
        kept["license_link"] = f"https://huggingface.co/{hub_id}/blob/main/{link.lstrip('./')}"
    return kept


def _base_of(base: Mapping[str, Any], hub_id: str) -> str:
    """Return the hub id of the dense model; of a local one, that which it was made from itself."""
    earlier = base.get("base_model")
    return hub_id or (earlier if isinstance(earlier, str) and _HUB_ID.fullmatch(earlier) else "")


def _own_metadata(base_model: str, corpora: Sequence[Corpus], domains: Sequence[str]) -> dict[str, Any]:
    own: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "secateur"],
    }
    if base_model:
        # The hub knows adapter, merge, quantized and finetune; changed weights without an adapter are the last.
        own |= {"base_model": base_model, "base_model_relation": "finetune"}
    datasets = [corpus.dataset for corpus in corpora if corpus.dataset and corpus.name in domains]
    return own | ({"datasets": list(dict.fromkeys(datasets))} if datasets else {})


def _results(title: str, evaluation: Evaluation | None, row: str, corpora: Sequence[Corpus]) -> dict[str, Any]:
    """Return the measurements in the form that the hub shows beside the model."""
    if evaluation is None or row not in evaluation.models:
        return {}
    known = {corpus.name: corpus for corpus in corpora}
    results = [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": _dataset(known.get(bucket, Corpus(bucket))),
            "metrics": metrics,
        }
        for bucket, score in evaluation.models[row].text.items()
        if (metrics := _metrics(score))
    ]
    return {"model-index": [{"name": " ".join(title.split()), "results": results}]} if results else {}


def _dataset(corpus: Corpus) -> dict[str, str]:
    """Return what text was measured on; readers take results of one type, configuration and split for one."""
    name = " ".join(corpus.name.split())
    config = corpus.config if corpus.dataset else name
    data = {"type": corpus.dataset or _LOCAL_TEXT, "name": name, "config": config, "split": "test"}
    return {key: value for key, value in data.items() if value}


def _metrics(score: TextScore) -> list[dict[str, Any]]:
    values = {"perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte}
    names = {"perplexity": "Perplexity", "bits_per_byte": "Bits per byte"}
    return [
        {"type": kind, "value": float(f"{value:.5g}"), "name": names[kind]}
        for kind, value in values.items()
        if math.isfinite(value)
    ]


# -- text --------------------------------------------------------------------------------------------------------------


def _cut_section(plan: Plan) -> list[str]:
    return [
        "## What was cut",
        "",
        cut_table(plan).markdown(),
        "",
        f"{plan.total_dense:,} parameters became {plan.total_pruned:,}. {_sentence(describe_choice(plan))} The full "
        "plan is in `secateur_plan.json`.",
        "",
        *([_TOKENIZER, "", SEGMENTATION_NOTE, ""] if plan.vocabulary else []),
    ]


def _use_sections(
    domains: Sequence[str], corpora: Sequence[Corpus], evaluation: Evaluation | None, row: str
) -> list[str]:
    known = {corpus.name: corpus for corpus in corpora}
    texts = [f"- {_describe_corpus(known.get(name, Corpus(name)))}" for name in domains]
    return [
        "## Intended use",
        "",
        "Text like that which it was cut for:",
        "",
        *texts,
        "",
        "Units that this text uses little went. Test it on text of your own before you rely on it, as you would the "
        "dense model; it has that model's faults too.",
        "",
        "## What was forgotten",
        "",
        *_forgotten(domains, evaluation, row),
        "",
    ]


def _describe_corpus(corpus: Corpus) -> str:
    facts = []
    if corpus.dataset:
        facts.append(f"hub data set {code(corpus.dataset)}")
    elif corpus.size_bytes:
        facts.append(f"{format_bytes(corpus.size_bytes)} of local files")
    if corpus.calibration_tokens:
        facts.append(f"{corpus.calibration_tokens:,} tokens calibrated on")
    if corpus.fingerprint:
        facts.append(f"fingerprint {code(corpus.fingerprint[:12])}")
    return plain(corpus.name) + (f": {', '.join(facts)}" if facts else "")


def _forgotten(domains: Sequence[str], evaluation: Evaluation | None, row: str) -> list[str]:
    models = evaluation.models if evaluation is not None else {}
    if row not in models or "dense" not in models:
        return ["Not measured yet. On other text than the above expect it to have lost more."]
    lines = [
        _lost(bucket, score, models["dense"].text[bucket])
        for bucket, score in models[row].text.items()
        if bucket not in domains
    ]
    if not lines:
        return ["Text outside its domains was not measured; expect it to have lost more there."]
    return [*lines, "Text of kinds that were not measured may have suffered more than that."]


def _lost(bucket: str, score: TextScore, dense: TextScore) -> str:
    change = paired_difference(score, dense)
    ratio = math.exp(min(change.mean, 700.0))
    return (
        f"On {plain(bucket)} text its loss is {with_error(score.bits_per_byte, score.bits_per_byte_stderr)} bits per "
        f"byte, where the dense model's is {with_error(dense.bits_per_byte, dense.bits_per_byte_stderr)}: the "
        f"perplexity there is {with_error(ratio, ratio * change.stderr)} times the dense model's, paired by document."
    )


def _making_section(plan: Plan, recovery: Recovery | None, origin: Origin, version: str) -> list[str]:
    trained = "No recovery training was done." if recovery is None else describe_recovery(recovery)
    if recovery is not None and recovery.text_fingerprint:
        trained += f" Fingerprint of its text: {code(recovery.text_fingerprint[:12])}."
    lines = ["## How it was made", "", trained, ""]
    if plan.notes:
        lines += [*(f"- {_sentence(note)}" for note in plan.notes), ""]
    if origin.model_fingerprint:
        lines += [f"Fingerprint of the dense model's configuration and weights: {code(origin.model_fingerprint)}.", ""]
    if origin.versions:
        lines += [", ".join(f"{name} {value}" for name, value in origin.versions.items()) + ".", ""]
    if origin.recipe:
        text = yaml.safe_dump(_without_paths(origin.recipe), sort_keys=False, allow_unicode=True)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
        lines += [f"From the recipe (secateur {version}):", "", f"{fence}yaml", text.rstrip(), fence, ""]
    return lines


def _without_paths(value: Any) -> Any:
    """Return plain data in which a path is only its last part."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(item) for item in value]
    if isinstance(value, str) and (re.match(_ROOTED, value) or re.fullmatch(r"\S*[/\\]\S*", value)):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _loading_section(plan: Plan) -> list[str]:
    uneven = ["import secateur  # it has the class for layers that differ; or pass trust_remote_code=True below"]
    imports = uneven if plan.shape == "uneven" else []
    return [
        "## Use",
        "",
        "In transformers:",
        "",
        "```python",
        *imports,
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{PLACE}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACE}")',
        "```",
        "",
        "In llama.cpp, from a GGUF file:",
        "",
        "```bash",
        "pip install secateur",
        f"secateur export {PLACE} --to gguf --output model.F16.gguf",
        "llama-cli -m model.F16.gguf",
        "```",
        "",
    ]


def _what_went(plan: Plan) -> str:
    parts = ["whole layers or sub-layers"] if removed_blocks(plan) else []
    if plan.narrows or plan.vocabulary is not None or not parts:
        parts.append("rows and columns of the weights")
    text = " and ".join(parts)
    return f"{text[:1].upper()}{text[1:]} were"


def _licence_line(metadata: Mapping[str, Any]) -> str:
    licence = metadata.get("license")
    if licence is None:
        return "Licence: that of the base model, which did not state it in its model card; check before you share this."
    name = f" ({plain(metadata['license_name'])})" if "license_name" in metadata else ""
    return f"Licence: {plain(licence)}{name}, as the base model."


def _terms_lines(terms: Terms) -> list[str]:
    lines = [f"- {plain(duty[:1].upper() + duty[1:])}." for duty in terms.duties]
    lines = ["", "Who shares this model must:" if terms.name else "Before sharing:", "", *lines] if lines else []
    if terms.credit:
        lines += ["", f"**{terms.credit}**"]
    if terms.notice:
        lines += ["", terms.notice]
    return lines
