"""The typed recipe: what a person asks for, from YAML, refused early when it cannot be right.

Keys are the public interface (``docs/recipe.md``). A recipe is frozen; unknown keys are refused with the nearest
known one. Nothing here touches models, corpora or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from secateur.errors import ConfigError
from secateur.registry import unknown_name

THRESHOLD_PRESETS: dict[str, float] = {"mild": 1e-3, "moderate": 1e-2, "aggressive": 1e-1}
"""Absolute thresholds by name; ``mild`` and ``aggressive`` are the two of the Mini-GPTs paper (2312.12682)."""

TOKEN_THRESHOLD_PRESETS: dict[str, float] = {"paper": 0.0}
"""Relative token frequencies by name; ``paper`` removes what never occurs, as in the Mini-GPTs paper (2312.12682)."""

_BYTE_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: object) -> object:
    """Return a size such as ``"400MB"`` or ``"1.5 GiB"`` as a number of bytes; other values pass through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?b?)\s*", value.lower())
    unit = match and _BYTE_UNITS.get(match[2] if match[2].endswith("b") else match[2] + "b")
    if not match or unit is None:
        raise ValueError(f"cannot read {value!r} as a size; write for example 400MB or 1.5GiB")
    return int(float(match[1]) * unit)


def parse_seconds(value: object) -> object:
    """Return a time such as ``"90s"``, ``"30m"`` or ``"1.5 h"`` as a number of seconds; other values pass through."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([smh]?)\s*", value.lower())
    if not match:
        raise ValueError(f"cannot read {value!r} as a time; write for example 90s, 30m or 1.5h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _parse_threshold(value: object) -> object:
    return THRESHOLD_PRESETS.get(value, value) if isinstance(value, str) else value


def _parse_token_threshold(value: object) -> object:
    return TOKEN_THRESHOLD_PRESETS.get(value, value) if isinstance(value, str) else value


def parse_character_range(text: str) -> tuple[int, int]:
    """Return the first and last code point of ``"U+0370-U+03FF"``, ``"U+20AC"`` or a single character.

    Raises:
        ValueError: the text is none of these, or runs backwards.
    """
    if len(text) == 1:
        return ord(text), ord(text)
    match = re.fullmatch(r"[uU]\+([0-9a-fA-F]{1,6})(?:\s*-\s*[uU]\+([0-9a-fA-F]{1,6}))?", text.strip())
    first, last = (int(match[1], 16), int(match[2] or match[1], 16)) if match else (1, 0)
    if not first <= last <= 0x10FFFF:
        raise ValueError(f"cannot read {text!r} as a range of characters; write for example U+0370-U+03FF")
    return first, last


_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"

Ratio = Annotated[float, Field(gt=0.0, lt=1.0)]
Weight = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, protected_namespaces=())


class SplitRatios(_Record):
    """Shares of the documents that go to each split, by hash of the document."""

    calibration: Ratio = 0.8
    validation: Ratio = 0.1
    test: Ratio = 0.1

    @model_validator(mode="after")
    def _sum_to_one(self) -> SplitRatios:
        total = self.calibration + self.validation + self.test
        if abs(total - 1.0) > 1e-9:
            raise ValueError(f"the three shares add up to {total:g}; they must add up to 1")
        return self


class ResponsesSpec(_Record):
    """How the dense model is asked the prompts that records make; its own answers are then learned or calibrated on."""

    prompt: str
    chat: bool = False
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    batch_size: Annotated[int, Field(ge=1)] = 8


class CorpusResponsesSpec(ResponsesSpec):
    """Calibrate on what the dense model itself answers; text that is measured on stays as ``text`` makes it."""

    seed: int = 0


class CorpusSpec(_Record):
    """One bucket of text: where it is and how a document becomes a string.

    Either ``path`` (split by document hash), or explicit ``calibration`` and ``test`` paths (and optionally
    ``validation``), or a hub data set in ``dataset``. With ``responses`` a model is calibrated on its own answers to
    the calibration split instead.
    """

    path: str | list[str] | None = None
    dataset: str | None = None
    config: str | None = None
    dataset_split: str = "train"
    calibration: str | list[str] | None = None
    validation: str | list[str] | None = None
    test: str | list[str] | None = None
    text: str | None = None
    encoding: str = "utf-8"
    errors: Literal["strict", "replace", "ignore"] = "strict"
    splits: SplitRatios = SplitRatios()
    responses: CorpusResponsesSpec | None = None

    @model_validator(mode="after")
    def _one_source(self) -> CorpusSpec:
        explicit = [name for name in ("calibration", "validation", "test") if getattr(self, name) is not None]
        if explicit and not {"calibration", "test"} <= set(explicit):
            raise ValueError(f"explicit splits need at least calibration and test paths; got {', '.join(explicit)}")
        sources = [bool(self.path), bool(self.dataset), bool(explicit)]
        if sum(sources) != 1:
            raise ValueError("give exactly one of path, dataset, or explicit calibration/test paths")
        return self


class CalibrateSpec(_Record):
    """How much text is run through the dense model, and in what portions."""

    max_tokens: Annotated[int, Field(gt=0)] | None = 65_536
    block_size: Annotated[int, Field(ge=8)] = 512
    batch_size: Annotated[int, Field(ge=1)] = 4
    gradient_tokens: Annotated[int, Field(gt=0)] = 16_384
    buckets: Annotated[list[str], Field(min_length=1)] | None = None


UNIT_BUDGETS = {
    "ffn_channel": "channels",
    "gqa_group": "groups",
    "query_head": "heads",
    "expert": "experts",
    "expert_channel": "expert_channels",
    "shared_channel": "shared_channels",
    "layer": "layers",
    "attention": "attention",
    "ffn": "ffn",
}
"""Per unit kind of layers, the budget key that is a share of these units."""
LOSS_BOUNDS = ("max_domain_loss", "max_general_loss")
"""Budget keys that bound how much a loss may rise; the smallest model within them is looked for."""
_BLOCK_KINDS = ("attention", "ffn", "layer")
_FUSED_KINDS = ("expert", "expert_channel")


class Budget(_Record):
    """How much goes. Shares are removed shares; give one key, or several that are shares of units."""

    channels: Ratio | None = None
    groups: Ratio | None = None
    heads: Ratio | None = None
    experts: Ratio | None = None
    expert_channels: Ratio | None = None
    shared_channels: Ratio | None = None
    layers: Ratio | None = None
    attention: Ratio | None = None
    ffn: Ratio | None = None
    parameters: Ratio | None = None
    bytes: Annotated[Annotated[int, Field(gt=0)] | None, BeforeValidator(parse_bytes)] = None
    threshold: Annotated[Annotated[float, Field(ge=0.0)] | None, BeforeValidator(_parse_threshold)] = None
    max_domain_loss: Annotated[float, Field(gt=0.0)] | None = None
    max_general_loss: Annotated[float, Field(gt=0.0)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Budget:
        given = {name for name in type(self).model_fields if getattr(self, name) is not None}
        together = (set(UNIT_BUDGETS.values()), set(LOSS_BOUNDS))
        if not given or (len(given) > 1 and not any(given <= names for names in together)):
            got = ", ".join(sorted(given)) or "none"
            raise ValueError(
                "give exactly one of parameters, bytes, threshold, or one or more of "
                f"{', '.join(UNIT_BUDGETS.values())}, or one or both of {', '.join(LOSS_BOUNDS)}; got {got}"
            )
        return self

    @property
    def is_bound(self) -> bool:
        """Whether it bounds losses instead of naming a size."""
        return self.max_domain_loss is not None or self.max_general_loss is not None

    def unit_kinds(self) -> list[str]:
        """Return the unit kinds of which it names the shares to remove."""
        return [kind for kind, key in UNIT_BUDGETS.items() if getattr(self, key) is not None]


class VocabularySpec(_Record):
    """Which token ids stay: one rule over how often the domain's text uses a token, and what stays in any case."""

    min_count: Annotated[int, Field(ge=1)] | None = None
    threshold: Annotated[Annotated[float, Field(ge=0.0, lt=1.0)] | None, BeforeValidator(_parse_token_threshold)] = None
    coverage: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    size: Annotated[int, Field(gt=0)] | None = None
    keep: list[str] = []
    keep_file: str | list[str] | None = None
    keep_characters: list[str] = []
    characters: Literal["all", "used"] = "all"
    multiple_of: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    max_tokens: Annotated[int, Field(gt=0)] | None = None
    buckets: Annotated[list[str], Field(min_length=1)] | None = None

    @field_validator("keep_characters")
    @classmethod
    def _readable_ranges(cls, value: list[str]) -> list[str]:
        for text in value:
            parse_character_range(text)
        return value

    @model_validator(mode="after")
    def _one_rule(self) -> VocabularySpec:
        given = [name for name in ("min_count", "threshold", "coverage", "size") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of min_count, threshold, coverage, size; got {', '.join(given)}")
        return self

    def rule(self) -> dict[str, int | float]:
        """Return the rule that was asked for by its key; nothing where none was."""
        return self.model_dump(include={"min_count", "threshold", "coverage", "size"}, exclude_none=True)


Allocation = Literal["auto", "uniform", "global", "log_increase", "block_influence", "knapsack", "search"]


class SearchSpec(_Record):
    """How much text measured allocations and depth methods use; at which cuts and for how long allocations measure."""

    tokens: Annotated[int, Field(gt=0)] = 4096
    levels: Annotated[list[Ratio], Field(min_length=1)] = [0.25, 0.5, 0.75]
    generations: Annotated[int, Field(ge=1)] = 40
    offspring: Annotated[int, Field(ge=2)] = 16
    time_limit: Annotated[Annotated[float, Field(gt=0)] | None, BeforeValidator(parse_seconds)] = None


class GuardSpec(_Record):
    """How many mixtures of the texts ``combine: guard`` tries beside the one it begins with."""

    steps: Annotated[int, Field(ge=1)] = 6


_Unit = Literal[
    "ffn_channel",
    "gqa_group",
    "query_head",
    "expert",
    "expert_channel",
    "shared_channel",
    "attention",
    "ffn",
    "layer",
    "vocabulary",
]


class PruneSpec(_Record):
    """Which units go, by which method, in which shape."""

    method: str = "contextual"
    options: dict[str, Any] = {}
    budget: Budget | None = None
    depth_method: str = "block_influence"
    depth_options: dict[str, Any] = {}
    units: list[_Unit] | None = None
    vocabulary: VocabularySpec | None = None
    shape: Literal["uniform", "uneven"] = "uniform"
    allocation: Allocation = "auto"
    search: SearchSpec = SearchSpec()
    min_keep_ratio: Ratio = 0.1
    multiple_of: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    normalize: Literal["layer", "none"] = "layer"
    reconstruct: Literal["none", "dense", "pruned"] = "none"
    bias_compensation: bool = False
    buckets: Annotated[list[str], Field(min_length=1)] | None = None
    mix: Annotated[dict[str, Weight], Field(min_length=1)] | None = None
    combine: Literal["mean", "union", "guard"] = "mean"
    guard: GuardSpec = GuardSpec()
    seed: int = 0

    @model_validator(mode="before")
    @classmethod
    def _default_budget(cls, data: object) -> object:
        """A tenth of the FFN channels goes where nothing else is asked; the vocabulary alone needs no budget."""
        if not isinstance(data, Mapping) or data.get("budget") is not None:
            return data
        units = data.get("units")
        alone = data.get("vocabulary") is not None if units is None else units == ["vocabulary"]
        blocks = [unit for unit in units or () if unit in _BLOCK_KINDS] if isinstance(units, list) else []
        if blocks:
            raise ValueError(
                f"units names {', '.join(blocks)} and there is no budget; give one, for example "
                f"{{{UNIT_BUDGETS[blocks[0]]}: 0.2}}"
            )
        return data if alone else {**data, "budget": {"channels": 0.1}}

    @model_validator(mode="after")
    def _units_fit_budget(self) -> PruneSpec:
        named = self.budget.unit_kinds() if self.budget is not None else []
        if self.units is not None and not self.units:
            raise ValueError(f"units is an empty list; name at least one of {', '.join(UNIT_BUDGETS)}, vocabulary")
        if self.units is not None and named and set(named) != set(self.units) - {"vocabulary"}:
            raise ValueError(f"the budget is in {', '.join(named)} but units names {', '.join(self.units)}")
        if self.vocabulary is not None and self.units is not None and "vocabulary" not in self.units:
            raise ValueError(f"there is a vocabulary section but units names only {', '.join(self.units)}")
        if not self.layer_kinds() and self.budget is not None:
            if self.budget.threshold is not None:
                raise ValueError("budget.threshold is for units of layers; for token ids set vocabulary.threshold")
            if self.vocabulary is not None and self.vocabulary.rule():
                raise ValueError("both the budget and the rule under vocabulary say how many token ids stay; give one")
        self._require_heads_to_fit()
        self._require_experts_to_fit()
        self._require_blocks_to_fit()
        self._require_allocation_to_fit()
        return self

    @model_validator(mode="after")
    def _buckets_or_mix(self) -> PruneSpec:
        if self.buckets is not None and self.mix is not None:
            raise ValueError(
                "both buckets and mix say which text decides; give buckets to count every token of them the same, or "
                "mix to weigh them"
            )
        if self.mix is not None and not self.layer_kinds():
            raise ValueError(
                "mix weighs the text that units of layers are chosen by, and only the vocabulary is cut; remove mix, "
                "or say under vocabulary.buckets whose text is counted"
            )
        return self

    @model_validator(mode="after")
    def _union_of_ranks(self) -> PruneSpec:
        """A union is of ranks in layers, on texts that are not weighed."""
        if self.combine != "union":
            return self
        if self.mix is not None:
            raise ValueError(
                "mix weighs texts as one, and combine: union looks at them one by one; give one of them, and name the "
                "texts under buckets"
            )
        if self.block_kinds() or not self.width_kinds():
            named = ", ".join(self.block_kinds()) or "vocabulary alone"
            raise ValueError(
                "combine: union ranks units in their layer, so it is for ffn_channel, gqa_group and query_head; units "
                f"names {named}; use combine: mean"
            )
        return self

    @model_validator(mode="after")
    def _guard_of_a_size(self) -> PruneSpec:
        """A guard moves the weights of texts at a given size, and plans many times."""
        if self.combine != "guard":
            return self
        if not self.layer_kinds() or self.budget is None:
            raise ValueError(
                "combine: guard weighs the texts that units of layers are chosen by, and only the vocabulary is cut; "
                "leave combine out"
            )
        if self.budget.is_bound or self.budget.threshold is not None:
            found = "a bound on the loss" if self.budget.is_bound else "a threshold"
            raise ValueError(
                f"combine: guard looks for the best mixture at a given size, and {found} for the size; "
                "find the size first, then give it to the guard as budget: {parameters: ...}"
            )
        if self.allocation in ("knapsack", "search"):
            raise ValueError(
                f"combine: guard plans under many mixtures, and allocation: {self.allocation} would measure all layers "
                "again for each; choose one of them"
            )
        return self

    @model_validator(mode="after")
    def _one_way_to_make_up(self) -> PruneSpec:
        if self.bias_compensation and self.reconstruct != "none":
            raise ValueError(
                f"bias_compensation and reconstruct: {self.reconstruct} make up for the same channels; give one of them"
            )
        if self.bias_compensation and not self.width_kinds():
            raise ValueError("bias_compensation makes up for channels, and units names none; leave it out")
        return self

    def _require_allocation_to_fit(self) -> None:
        """Refuse an allocation that the shape or the budget cannot have."""
        if self.shape == "uniform" and self.allocation not in ("auto", "uniform", "search"):
            raise ValueError(f"allocation: {self.allocation} gives every layer its own width; it needs shape: uneven")
        if self.allocation not in ("knapsack", "search") or self.budget is None:
            return
        if self.budget.threshold is not None:
            raise ValueError(f"allocation: {self.allocation} meets a size, and budget.threshold is none; give a share")
        if self.budget.is_bound and self.allocation == "search":
            raise ValueError(
                "a bound on the loss tries many sizes, and allocation: search takes long for each; use knapsack, whose "
                "measurements serve all sizes"
            )
        if len(self.budget.unit_kinds()) > 1 or set(self.budget.unit_kinds()) & set(_BLOCK_KINDS):
            raise ValueError(
                f"allocation: {self.allocation} decides by itself how much each kind of unit loses; give one budget, "
                "for example {parameters: 0.2}, and list what may go under units"
            )

    def _require_heads_to_fit(self) -> None:
        """Refuse query heads beside what they are parts of, where that cannot be one cut."""
        kinds = self.layer_kinds()
        if "query_head" not in kinds:
            return
        if "gqa_group" in kinds:
            raise ValueError(
                "gqa_group and query_head are parts of each other, so taking out both is two cuts; choose one, and "
                "prune the result again for the other"
            )
        whole = [kind for kind in ("attention", "layer") if kind in kinds]
        if whole and self.allocation in ("knapsack", "search"):
            raise ValueError(
                f"allocation: {self.allocation} cannot weigh query_head against {' and '.join(whole)}; choose one of "
                "them, use gqa_group, or another allocation"
            )

    def _require_experts_to_fit(self) -> None:
        """Refuse what routed experts and their channels cannot do."""
        fused = [kind for kind in self.layer_kinds() if kind in _FUSED_KINDS]
        if len(fused) > 1:
            raise ValueError(
                "expert and expert_channel are parts of each other, so taking out both is two cuts; choose one, and "
                "prune the result again for the other"
            )
        inside = [kind for kind in self.layer_kinds() if kind in (*_FUSED_KINDS, "shared_channel")]
        channels = [kind for kind in inside if kind != "expert"]
        if channels and self.reconstruct != "none":
            raise ValueError(
                f"reconstruct fits the projections of dense layers, and the scales of experts where whole ones go; "
                f"{channels[0]} is about channels of experts, whose share in the output is another for each token; "
                "leave reconstruct out"
            )
        if inside and self.allocation in ("knapsack", "search"):
            raise ValueError(
                f"allocation: {self.allocation} measures cuts of dense layers, and units names "
                f"{', '.join(self.layer_kinds())}; use another allocation"
            )

    def _require_blocks_to_fit(self) -> None:
        """Refuse what whole layers and sub-layers cannot do."""
        blocks = self.block_kinds()
        if blocks and self.budget is not None and self.budget.threshold is not None:
            raise ValueError(
                f"budget.threshold is for channels, groups and query heads, and units names {', '.join(blocks)}; give "
                f"a share, for example {{{UNIT_BUDGETS[blocks[0]]}: 0.2}}"
            )
        sublayers = [kind for kind in blocks if kind != "layer"]
        if sublayers and self.shape == "uniform":
            raise ValueError(
                f"units of kind {' and '.join(sublayers)} leave layers that differ, and shape: uniform takes only "
                "whole layers out; set shape: uneven, or units: [layer]"
            )
        if blocks and not self.width_kinds() and self.reconstruct != "none":
            raise ValueError(
                f"reconstruct fits projections that lose channels, and units names only {', '.join(blocks)}; add "
                "ffn_channel, gqa_group or query_head, or leave reconstruct out"
            )

    def layer_kinds(self) -> list[str]:
        """Return the unit kinds of layers that may be cut, in a fixed order."""
        if self.units is not None:
            return sorted(set(self.units) - {"vocabulary"})
        if self.budget is None:
            return []
        return sorted(self.budget.unit_kinds()) or ["ffn_channel"]

    def block_kinds(self) -> list[str]:
        """Return those of ``layer_kinds`` that are whole layers or sub-layers; ``depth_method`` scores them."""
        return [kind for kind in self.layer_kinds() if kind in _BLOCK_KINDS]

    def width_kinds(self) -> list[str]:
        """Return those of ``layer_kinds`` that are units inside a sub-layer; ``method`` scores them."""
        return [kind for kind in self.layer_kinds() if kind not in _BLOCK_KINDS]

    def vocabulary_spec(self) -> VocabularySpec | None:
        """Return the keep rule for token ids, or None where the vocabulary stays whole."""
        if self.vocabulary is not None:
            return self.vocabulary
        return VocabularySpec() if self.units is not None and "vocabulary" in self.units else None


class LoraSpec(_Record):
    """Low-rank adapters that are trained in the place of the weights, and merged into them at the end."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0)] = 32.0
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"


class MaskLoraSpec(_Record):
    """Low-rank adapters that are trained together with the gates of ``learned_mask`` and merged before the cut."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 32.0
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = "all-linear"
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] = 1e-3


class DistillSpec(_Record):
    """What the pruned model learns from the dense one: its probabilities, and optionally the text and its stream.

    The teacher is the dense model as it came, or the baseline that was trained on the same text.
    """

    teacher: Literal["dense", "dense_finetuned"] = "dense"
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    logits_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    text_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    hidden_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    cached_logits: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _something_to_learn(self) -> DistillSpec:
        if not (self.logits_weight or self.text_weight or self.hidden_weight):
            raise ValueError("logits_weight, text_weight and hidden_weight are all 0, so nothing would be learned")
        if self.cached_logits and self.hidden_weight:
            raise ValueError("cached_logits keeps the teacher's logits only; set hidden_weight: 0, or leave it out")
        return self


class SelectSpec(_Record):
    """Which of the domain's documents are trained on, where there are more than ``recover.max_tokens``."""

    method: Literal["random", "prototypes", "density"] = "random"
    clusters: Annotated[int, Field(ge=2)] = 16
    keep: Literal["near", "far"] = "near"
    pool: Annotated[float, Field(gt=1.0)] = 4.0
    near_duplicates: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None


class RecoverSpec(_Record):
    """Short training of the pruned model, and what it is compared with."""

    method: Literal["distill", "finetune"] = "distill"
    distill: DistillSpec = DistillSpec()
    lora: LoraSpec | None = None
    max_tokens: Annotated[int, Field(gt=0)] | None = 131_072
    epochs: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    until: Literal["end", "dense", "dense_finetuned"] = "end"
    patience: Annotated[int, Field(ge=1)] | None = 3
    learning_rate: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.05
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0.0)] = 1.0
    batch_size: Annotated[int, Field(ge=1)] = 4
    accumulation: Annotated[int, Field(ge=1)] = 1
    gradient_checkpointing: bool = False
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    replay: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    select: SelectSpec = SelectSpec()
    responses: ResponsesSpec | None = None
    buckets: Annotated[list[str], Field(min_length=1)] | None = None
    rounds: Annotated[int, Field(ge=1)] = 1
    baselines: list[Literal["dense", "random"]] = ["dense", "random"]
    evaluations: Annotated[int, Field(ge=1)] = 8
    evaluation_tokens: Annotated[int, Field(gt=0)] = 4096
    evaluation_questions: Annotated[int, Field(ge=0)] = 50
    report_to: list[str] = []
    seed: int = 0

    @property
    def is_taught_by_finetuned(self) -> bool:
        """Whether the teacher is the dense model fine-tuned on the same text."""
        return self.method == "distill" and self.distill.teacher == "dense_finetuned"

    @property
    def needs_finetuned(self) -> bool:
        """Whether the dense model has to be fine-tuned before the pruned one is trained."""
        return self.is_taught_by_finetuned or self.until == "dense_finetuned"

    @model_validator(mode="before")
    @classmethod
    def _lora_by_name(cls, data: object) -> object:
        """``lora: true`` takes the defaults, ``lora: false`` is none."""
        if isinstance(data, Mapping) and isinstance(data.get("lora"), bool):
            return {**data, "lora": {} if data["lora"] else None}
        return data

    @model_validator(mode="after")
    def _options_fit(self) -> RecoverSpec:
        if self.method == "finetune" and self.distill != DistillSpec():
            raise ValueError("there is a distill section but method is finetune; set method: distill, or remove it")
        if self.needs_finetuned and "dense" not in self.baselines:
            key = "until" if self.until == "dense_finetuned" else "distill.teacher"
            raise ValueError(f"{key}: dense_finetuned needs the dense model fine-tuned; add dense to baselines")
        if self.responses is not None and self.select != SelectSpec():
            raise ValueError("select chooses among documents and responses trains on answers; give one of them")
        if self.rounds > 1 and (self.responses is not None or self.select != SelectSpec()):
            key = "select" if self.responses is None else "responses"
            raise ValueError(f"{key} is made once with the dense model, and rounds start from others; set rounds: 1")
        if self.rounds > 1 and self.distill.teacher == "dense_finetuned":
            raise ValueError("distill.teacher: dense_finetuned is for one round; set rounds: 1, or teacher: dense")
        return self


class ChoicesSpec(_Record):
    """A set of multiple-choice questions: where it is, and how a record becomes a prompt and its choices."""

    path: str | list[str]
    question: str = "{question}"
    choices: str | Annotated[list[str], Field(min_length=2)] = "choices"
    answer: str = "answer"
    subject: str | None = None
    style: Literal["text", "letter"] = "text"
    prompt: str | None = None
    perplexity: bool = False
    max_items: Annotated[int, Field(gt=0)] | None = 1000
    seed: int = 0
    encoding: str = "utf-8"
    errors: Literal["strict", "replace", "ignore"] = "strict"

    @model_validator(mode="after")
    def _letters_are_explained(self) -> ChoicesSpec:
        if self.style == "letter" and self.prompt is not None and "{choices}" not in self.prompt:
            raise ValueError("style letter scores A, B, C ..., but the prompt does not list them; put {choices} in it")
        return self


class SpeedSpec(_Record):
    """At which prompt lengths and batch sizes the dense model and the result are timed, in turn and how often."""

    prompt_lengths: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [128, 512]
    new_tokens: Annotated[int, Field(ge=2)] = 32
    batch_sizes: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)] = [1, 4]
    rounds: Annotated[int, Field(ge=1)] = 5

    @field_validator("prompt_lengths", "batch_sizes", mode="before")
    @classmethod
    def _one_number(cls, value: object) -> object:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("prompt_lengths", "batch_sizes")
    @classmethod
    def _numbers_differ(cls, value: list[int]) -> list[int]:
        if twice := sorted({number for number in value if value.count(number) > 1}):
            raise ValueError(f"{twice[0]} is given twice")
        return value


class GenerationsSpec(_Record):
    """Which prompts the dense model and the result answer side by side, and how their answers are written.

    Prompts are made by a template from the records of the test text, or are the first tokens of its documents.
    """

    prompt: str | None = None
    num: Annotated[int, Field(ge=1)] = 8
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.8
    seed: Annotated[int, Field(ge=0)] = 0
    prompt_tokens: Annotated[int, Field(ge=1)] = 32
    chat: bool = False

    @model_validator(mode="after")
    def _one_kind_of_prompt(self) -> GenerationsSpec:
        if self.prompt is not None and self.prompt_tokens != type(self).model_fields["prompt_tokens"].default:
            raise ValueError("prompt_tokens cuts prompts from documents and prompt makes them; give one of them")
        return self


class TasksSpec(_Record):
    """Which tasks of the lm-evaluation-harness are run, and how."""

    names: Annotated[list[str], Field(min_length=1)]
    include_path: str | None = None
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    limit: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4

    @field_validator("names", mode="before")
    @classmethod
    def _one_name(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value

    @field_validator("names")
    @classmethod
    def _names_differ(cls, value: list[str]) -> list[str]:
        if twice := sorted({name for name in value if value.count(name) > 1}):
            raise ValueError(f"task {twice[0]!r} is named twice")
        return value

    @field_validator("limit")
    @classmethod
    def _share_or_count(cls, value: float | None) -> float | None:
        if value is not None and value > 1 and not value.is_integer():
            raise ValueError("limit is a number of documents, or a share of them below 1")
        return value


class EvaluateSpec(_Record):
    """On how much held-out text the models are compared, on which questions, and against which controls."""

    max_tokens: Annotated[int, Field(gt=0)] | None = 16_384
    batch_size: Annotated[int, Field(ge=1)] = 4
    controls: list[Literal["random", "reversed"]] = ["random"]
    choices: dict[str, ChoicesSpec] = {}
    speed: SpeedSpec | None = None
    generations: GenerationsSpec | None = None
    tasks: TasksSpec | None = None

    @field_validator("speed", "generations", mode="before")
    @classmethod
    def _by_default(cls, value: object) -> object:
        """``speed: true`` takes the defaults, ``speed: false`` is none; so with ``generations``."""
        return ({} if value else None) if isinstance(value, bool) else value

    @field_validator("tasks", mode="before")
    @classmethod
    def _names_alone(cls, value: object) -> object:
        return {"names": value} if isinstance(value, str | list) else value

    @field_validator("choices", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {name: _corpus_short_form(spec) for name, spec in value.items()}
        return value

    @field_validator("choices")
    @classmethod
    def _set_names(cls, value: dict[str, ChoicesSpec]) -> dict[str, ChoicesSpec]:
        for name in value:
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"name {name!r} of a set of questions must be letters, digits, '_', '-' or '.'")
        return value


class ExportSpec(_Record):
    """One form that the result is exported to; ``to`` alone may stand for it."""

    to: str
    quantize: str | None = None
    round_to_fit: bool = False

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, data: object) -> object:
        if not isinstance(data, str | Mapping | ExportSpec):
            raise ValueError("name a target, such as gguf, or give a mapping such as {to: gguf, quantize: Q8_0}")
        return {"to": data} if isinstance(data, str) else data


class Recipe(_Record):
    """Everything one run needs; see the module docstring."""

    model: str
    domain: dict[str, CorpusSpec] = Field(min_length=1)
    general: CorpusSpec | None = None
    calibrate: CalibrateSpec = CalibrateSpec()
    prune: PruneSpec = PruneSpec()
    recover: RecoverSpec | None = None
    evaluate: EvaluateSpec = EvaluateSpec()
    export: list[ExportSpec] = []
    output: str = "runs/run"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    memory: Literal["whole", "by_layer"] = "whole"
    trust_remote_code: bool = False

    @field_validator("domain", mode="before")
    @classmethod
    def _short_form(cls, value: object) -> object:
        if isinstance(value, Mapping):
            return {name: _corpus_short_form(spec) for name, spec in value.items()}
        return value

    @field_validator("general", mode="before")
    @classmethod
    def _short_general(cls, value: object) -> object:
        return _corpus_short_form(value)

    @field_validator("domain")
    @classmethod
    def _bucket_names(cls, value: dict[str, CorpusSpec]) -> dict[str, CorpusSpec]:
        for name in value:
            if name == "general":
                raise ValueError("a domain bucket cannot be called 'general'; that is the name of the general bucket")
            if not re.fullmatch(_NAME, name):
                raise ValueError(f"bucket name {name!r} must be letters, digits, '_', '-' or '.'")
        return value

    @model_validator(mode="after")
    def _replay_has_text(self) -> Recipe:
        if self.recover is not None and self.recover.replay and self.general is None:
            raise ValueError("recover.replay trains on general text too; add general, which is missing")
        return self

    @model_validator(mode="after")
    def _answered_by_the_dense_model(self) -> Recipe:
        asked = [name for name, spec in self.buckets().items() if spec.responses is not None]
        if asked and self.recover is not None and self.recover.rounds > 1:
            raise ValueError(
                f"{asked[0]} is calibrated on the dense model's responses, and later rounds start from pruned models; "
                "set recover.rounds: 1, or leave its responses out"
            )
        return self

    @model_validator(mode="after")
    def _union_of_texts(self) -> Recipe:
        deciding = list(self.prune.mix or self.prune.buckets or self.domain)
        if self.prune.combine != "mean" and len(set(deciding)) < 2:
            raise ValueError(
                f"prune.combine: {self.prune.combine} needs two texts that decide, and there is {deciding[0]} alone; "
                "name more under prune.buckets, or use combine: mean"
            )
        return self

    @model_validator(mode="after")
    def _trained_on_domains(self) -> Recipe:
        for name in (self.recover and self.recover.buckets) or ():
            if name not in self.domain:
                known = ", ".join(self.domain)
                raise ValueError(f"recover.buckets names {name!r}, which is no domain; there are {known}")
        return self

    @model_validator(mode="after")
    def _general_bound_has_text(self) -> Recipe:
        budget = self.prune.budget
        if budget is not None and budget.max_general_loss is not None and self.general is None:
            raise ValueError("budget.max_general_loss bounds the loss on general text; add general, which is missing")
        return self

    def loss_bounds(self) -> dict[str, float]:
        """Return by how much the loss on each bucket may rise, relative; empty where the budget is a size."""
        budget = self.prune.budget
        if budget is None:
            return {}
        bounds = dict.fromkeys(self.domain, budget.max_domain_loss) | {"general": budget.max_general_loss}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def trained_domains(self) -> list[str]:
        """Return the domains whose text a recovery trains on, in the recipe's order."""
        chosen = self.recover.buckets if self.recover is not None else None
        return [name for name in self.domain if chosen is None or name in chosen]

    def buckets(self) -> dict[str, CorpusSpec]:
        """Return all buckets by name, the domains first, the general one (if any) last."""
        return {**self.domain, **({"general": self.general} if self.general else {})}

    def to_yaml(self) -> str:
        """Return the recipe as YAML with every default written out."""
        return yaml.safe_dump(_without_absent(self, self.model_dump(mode="json")), sort_keys=False, allow_unicode=True)


def _without_absent(record: object, data: Any) -> Any:
    """Return a record's plain data without its optional keys that were not given; a null that was asked for stays."""
    if isinstance(record, _Record):
        return {
            name: _without_absent(getattr(record, name), data[name])
            for name, field in type(record).model_fields.items()
            if data[name] is not None or field.default is not None
        }
    if isinstance(record, Mapping):
        return {key: _without_absent(value, data[key]) for key, value in record.items()}
    if isinstance(record, list):
        return [_without_absent(value, item) for value, item in zip(record, data, strict=True)]
    return data


def _corpus_short_form(value: object) -> object:
    return {"path": value} if isinstance(value, str | list) else value


def parse_prune(data: Mapping[str, Any]) -> PruneSpec:
    """Return the ``prune`` section that plain data describes.

    Raises:
        ConfigError: a key is unknown or has an impossible value; every such place is named.
    """
    return _parse_section(PruneSpec, data, "prune", "pruning")


def parse_speed(data: Mapping[str, Any]) -> SpeedSpec:
    """Return the section ``evaluate.speed`` that plain data describes.

    Raises:
        ConfigError: a key is unknown or has an impossible value; every such place is named.
    """
    return _parse_section(SpeedSpec, data, "speed", "timing")


def parse_recover(data: Mapping[str, Any]) -> RecoverSpec:
    """Return the ``recover`` section that plain data describes.

    Raises:
        ConfigError: a key is unknown or has an impossible value; every such place is named.
    """
    return _parse_section(RecoverSpec, data, "recover", "training")


_Section = TypeVar("_Section", bound=_Record)


def _parse_section(section: type[_Section], data: Mapping[str, Any], name: str, what: str) -> _Section:
    try:
        return section.model_validate(dict(data))
    except ValidationError as error:
        lines = [_explain({**item, "loc": (name, *item["loc"])}) for item in error.errors()]
        listed = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(f"these {what} options cannot be used:\n{listed}") from None


def parse_recipe(data: object, *, source: str = "recipe") -> Recipe:
    """Return the recipe that ``data`` describes.

    Args:
        data: what YAML gave: a mapping of recipe keys.
        source: where it came from, for messages.

    Raises:
        ConfigError: a key is unknown, missing or has an impossible value; every such place is named.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source} must be a mapping of keys (model, domain, prune ...); got {type(data).__name__}.")
    try:
        return Recipe.model_validate(dict(data))
    except ValidationError as error:
        lines = [_explain(item) for item in error.errors()]
        raise ConfigError(f"{source} cannot be used:\n" + "\n".join(f"  {line}" for line in lines)) from None


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Return the recipe in a YAML file, with dotted ``overrides`` applied on top.

    Args:
        path: the YAML file.
        overrides: for example ``{"prune.budget": {"channels": 0.2}, "output": "runs/a"}``.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a recipe.
    """
    data = read_recipe_data(path, overrides)
    if isinstance(data, dict) and "sweep" in data:
        raise ConfigError(f"recipe {path} has a section sweep: it is many runs. Use `secateur sweep {path}`.")
    return parse_recipe(data, source=f"recipe {path}")


def read_recipe_data(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Any:
    """Return what is in a recipe's YAML file, with dotted ``overrides`` applied on top, not looked at any further.

    Raises:
        ConfigError: the file is missing, or is not YAML.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"recipe {path} does not exist. Write one (see examples/), or run `secateur demo`.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {path} is not valid YAML: {error}") from None
    if isinstance(data, dict):
        for key, value in (overrides or {}).items():
            _set_dotted(data, key, value)
    return data


def with_overrides(recipe: Recipe, overrides: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Return a recipe with dotted ``overrides`` applied on top of what was asked for in it.

    Raises:
        ConfigError: the result is not a recipe; the message names ``source``.
    """
    data = recipe.model_dump(mode="json", exclude_unset=True)
    for key, value in overrides.items():
        _set_dotted(data, key, value)
    return parse_recipe(data, source=source)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as a string; everybody who writes a threshold means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _set_dotted(data: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = data.setdefault(parent, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"cannot set {key}: {parent} is not a mapping in this recipe, but {inner!r}.")
        data = inner
    data[last] = value


def parse_override(text: str) -> tuple[str, Any]:
    """Return ``("prune.seed", 3)`` for ``"prune.seed=3"``; the value is read as YAML.

    Raises:
        ConfigError: there is no ``=`` in the text, or the value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"cannot read {text!r}; write key=value, for example prune.budget.channels=0.2")
    try:
        return key.strip(), yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value in {text!r}: {error}") from None


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1])
        return unknown_name(f"key at {where}:", item["loc"][-1], known) if known else f"{where}: unknown key"
    received = item.get("input")
    shown = "" if isinstance(received, Mapping | BaseModel) or item["type"] == "missing" else f" (got {received!r})"
    message = str(item["msg"]).removeprefix("Value error, ")
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


_SECTIONS: dict[str, type[BaseModel]] = {
    "general": CorpusSpec,
    "calibrate": CalibrateSpec,
    "prune": PruneSpec,
    "budget": Budget,
    "vocabulary": VocabularySpec,
    "recover": RecoverSpec,
    "lora": LoraSpec,
    "distill": DistillSpec,
    "select": SelectSpec,
    "responses": ResponsesSpec,
    "evaluate": EvaluateSpec,
    "choices": ChoicesSpec,
    "speed": SpeedSpec,
    "generations": GenerationsSpec,
    "tasks": TasksSpec,
    "splits": SplitRatios,
    "export": ExportSpec,
}


def _known_keys(location: tuple[Any, ...]) -> list[str]:
    model: type[BaseModel] = Recipe
    if location[:1] == ("domain",):
        model, location = CorpusSpec, location[2:]
    for part in location:
        if not isinstance(part, str) or part not in model.model_fields:
            continue
        inner = CorpusResponsesSpec if (model, part) == (CorpusSpec, "responses") else _SECTIONS.get(part)
        if inner is not None:
            model = inner
    return list(model.model_fields)
