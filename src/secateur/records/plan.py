"""The plan: which units stay, in which layer, why, and what that saves; a JSON file a person can read, edit and diff.

Imports without torch. A plan does not know weights; applying it is the business of ``shrink``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from typing import Any

from secateur.errors import PlanError
from secateur.records.units import AXES_OF, AXIS_OF, LAYER_UNIT_KINDS, WHOLE_KINDS

SCHEMA_VERSION = 3
SHAPES = ("uniform", "uneven")


def format_ranges(units: Sequence[int]) -> str:
    """Return ascending indices in short, for example ``0-4 6 9-11``."""
    runs: list[list[int]] = []
    for unit in units:
        if runs and unit == runs[-1][-1] + 1:
            runs[-1].append(unit)
        else:
            runs.append([unit])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def parse_ranges(text: str) -> tuple[int, ...]:
    """Return the indices that ``format_ranges`` wrote.

    Raises:
        PlanError: the text is not a list of indices and ranges.
    """
    units: list[int] = []
    for part in str(text).split():
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or int(last or first) < int(first):
            raise PlanError(f"cannot read {part!r} in a plan's kept units; write for example 0-4 6 9-11.")
        units.extend(range(int(first), int(last or first) + 1))
    return tuple(units)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What happens to one kind of unit in one layer.

    Attributes:
        num_units: units before the cut.
        keep: indices of the units that stay, ascending, without repeats. Where none does, the whole sub-layer goes,
            with biases and norms of its own.
        constants: input channels of the reading projection that go although they are not zero but constant on the
            calibration text, with that constant: (channel, value); folded into the projection's bias.
        lowest_kept: lowest score among the kept units (None: the method gave none).
        highest_removed: highest score among the removed units (None: nothing removed).
        merged: of experts, where those that go are merged into those that stay: for every kept one, in their order, the
            experts it is made of with their weights, itself among them: (expert, weight). Empty: those that go are
            dropped.
    """

    num_units: int
    keep: tuple[int, ...]
    constants: tuple[tuple[int, float], ...] = ()
    lowest_kept: float | None = None
    highest_removed: float | None = None
    merged: tuple[tuple[tuple[int, float], ...], ...] = ()

    def __post_init__(self) -> None:
        if self.keep:
            _require_ascending("units", self.keep, self.num_units)

    @property
    def num_removed(self) -> int:
        """Units that go."""
        return self.num_units - len(self.keep)

    @property
    def is_narrowed(self) -> bool:
        """Whether some units go and some stay."""
        return 0 < len(self.keep) < self.num_units

    @property
    def is_removed(self) -> bool:
        """Whether the whole sub-layer goes; one that the model does not have any more does not go again."""
        return self.num_units > 0 and not self.keep


def _require_ascending(what: str, keep: Sequence[int], limit: int) -> None:
    ascending = all(a < b for a, b in pairwise(keep))
    if not ascending or keep[0] < 0 or keep[-1] >= limit:
        raise PlanError(
            f"kept {what} must be ascending, without repeats, between 0 and {limit - 1}; "
            f"got {len(keep)} from {keep[0]} to {keep[-1]}. Plan the model again."
        )


@dataclass(frozen=True, slots=True)
class VocabularyPlan:
    """Which token ids stay; a kept token's new id is its place in ``keep``.

    Attributes:
        num_tokens: rows of the dense embedding, rows without a token included.
        keep: dense ids that stay, ascending, without repeats.
        rule: the keep rule as asked, for example ``{"min_count": 1}``.
        reasons: how many ids stay for which reason, each id counted with its first one.
        counted_tokens: tokens of domain text that were counted.
        covered_ratio: share of those whose id stays.
        tokenizer_fingerprint: of the dense tokenizer.
    """

    num_tokens: int
    keep: tuple[int, ...]
    rule: Mapping[str, Any] = field(default_factory=dict)
    reasons: Mapping[str, int] = field(default_factory=dict)
    counted_tokens: int = 0
    covered_ratio: float = 0.0
    tokenizer_fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.keep:
            raise PlanError(f"plan keeps 0 of {self.num_tokens} token ids; at least one must stay.")
        _require_ascending("token ids", self.keep, self.num_tokens)

    @property
    def num_removed(self) -> int:
        """Token ids that go."""
        return self.num_tokens - len(self.keep)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which units stay, per unit kind and layer, and which token ids.

    Attributes:
        family: model family the plan was made for.
        model_fingerprint: weights it was made for.
        shape: ``uniform`` (same widths in every layer) or ``uneven``.
        method: scoring method, and its ``options``.
        budget: the budget as asked, for example ``{"channels": 0.1}``.
        layers: per unit kind, one entry per layer. A layer of which neither channels (or experts) nor groups stay goes
            entirely, and later layers move up; that needs entries for both. Entries for other units may stand beside
            them.
        vocabulary: which token ids stay; None where all do.
        parameters_dense: parameters by part before, ``parameters_pruned`` after.
        calibrated_on: names of the buckets, and ``calibration_tokens`` their size.
        mix: share of each of them in every mean; empty where every token counts the same.
        notes: sentences on what was rounded or could not be met exactly.
        depth_method: scoring method of whole layers and sub-layers, and its ``depth_options``; empty where none were
            asked for.
    """

    family: str
    model_fingerprint: str
    shape: str
    method: str
    options: Mapping[str, Any]
    budget: Mapping[str, int | float]
    layers: Mapping[str, tuple[LayerPlan, ...]]
    parameters_dense: Mapping[str, int]
    parameters_pruned: Mapping[str, int]
    vocabulary: VocabularyPlan | None = None
    calibrated_on: Sequence[str] = ()
    calibration_tokens: int = 0
    mix: Mapping[str, float] = field(default_factory=dict)
    notes: Sequence[str] = field(default_factory=tuple)
    depth_method: str = ""
    depth_options: Mapping[str, Any] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        unknown = set(self.layers) - set(LAYER_UNIT_KINDS)
        if unknown:
            raise PlanError(f"plan names unknown unit kinds {sorted(unknown)}; known: {', '.join(LAYER_UNIT_KINDS)}.")
        if self.shape not in SHAPES:
            raise PlanError(f"plan has shape {self.shape!r}; known: {', '.join(SHAPES)}.")
        lengths = {len(layers) for layers in self.layers.values()}
        if len(lengths) > 1:
            raise PlanError(f"plan has entries for {' and '.join(map(str, sorted(lengths)))} layers. Plan again.")
        if lengths and len(self.removed_layers) == max(lengths):
            raise PlanError(f"plan removes all {max(lengths)} layers; at least one must stay.")
        if self.shape == "uniform":
            self._require_uniform()

    def _require_uniform(self) -> None:
        gone = set(self.removed_layers)
        for kind, layers in self.layers.items():
            stay = [layer for index, layer in enumerate(layers) if index not in gone and layer.num_units]
            widths = sorted({len(layer.keep) for layer in stay}) or [1]
            if widths[0] == 0:
                raise PlanError(
                    "plan has shape uniform but takes a sub-layer out of a layer that stays "
                    f"({kind}s: none kept); set shape to uneven, or remove whole layers only."
                )
            if len(widths) > 1:
                raise PlanError(
                    f"plan has shape uniform but keeps between {widths[0]} and {widths[-1]} {kind}s per layer; "
                    "set shape to uneven, or keep the same number everywhere."
                )

    @property
    def removed_layers(self) -> tuple[int, ...]:
        """Indices of the layers that go entirely."""
        if not set(AXIS_OF.values()) <= set(self.layers):
            return ()
        parts = zip(*(self.layers[kind] for kind in WHOLE_KINDS if kind in self.layers), strict=True)
        return tuple(index for index, entries in enumerate(parts) if not any(entry.keep for entry in entries))

    def removed_sublayers(self, kind: str) -> tuple[int, ...]:
        """Return the layers that stay but lose their whole ``attention`` or ``ffn`` sub-layer."""
        gone = set(self.removed_layers)
        entries = zip(*(self.layers[axis] for axis in AXES_OF[kind] if axis in self.layers), strict=True)
        return tuple(
            index for index, layer in enumerate(entries) if any(part.is_removed for part in layer) and index not in gone
        )

    @property
    def narrows(self) -> bool:
        """Whether a sub-layer that stays loses some of its units."""
        return any(layer.is_narrowed for layers in self.layers.values() for layer in layers)

    @property
    def total_dense(self) -> int:
        """Parameters before."""
        return sum(self.parameters_dense.values())

    @property
    def total_pruned(self) -> int:
        """Parameters after."""
        return sum(self.parameters_pruned.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        data = asdict(self)
        for per_layer in data["layers"].values():
            for layer in per_layer:
                layer["keep"] = format_ranges(layer["keep"])
                if not layer["merged"]:
                    del layer["merged"]
        if data["vocabulary"] is not None:
            data["vocabulary"]["keep"] = format_ranges(data["vocabulary"]["keep"])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Return the plan that ``to_dict`` wrote.

        Raises:
            PlanError: the data is not a plan of this schema version, or contradicts itself.
        """
        if data.get("schema_version") != SCHEMA_VERSION:
            raise PlanError(
                f"plan has schema version {data.get('schema_version')!r}; this secateur reads {SCHEMA_VERSION}. "
                "Plan again with `secateur plan`."
            )
        try:
            layers = {
                kind: tuple(
                    LayerPlan(
                        num_units=layer["num_units"],
                        keep=parse_ranges(layer["keep"]),
                        constants=tuple((int(c), float(v)) for c, v in layer["constants"]),
                        lowest_kept=layer["lowest_kept"],
                        highest_removed=layer["highest_removed"],
                        merged=tuple(tuple((int(m), float(w)) for m, w in group) for group in layer.get("merged", ())),
                    )
                    for layer in per_layer
                )
                for kind, per_layer in data["layers"].items()
            }
            rest = {key: value for key, value in data.items() if key != "layers"}
            if (vocabulary := data["vocabulary"]) is not None:
                rest["vocabulary"] = VocabularyPlan(**{**vocabulary, "keep": parse_ranges(vocabulary["keep"])})
            rest["calibrated_on"] = tuple(data["calibrated_on"])
            rest["notes"] = tuple(data["notes"])
            return cls(layers=layers, **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanError(f"this is not a plan that secateur wrote: {error!r}. Plan again.") from None


def composed(first: Plan, second: Plan) -> Plan:
    """Return two cuts one after the other as one cut of the model that the first was made for.

    Scores at the edge of the cut and constants are left out, because they are of two different models; what else is
    said of how units were chosen is the second's, the budget the first's.

    Args:
        first: of a model.
        second: of what the first leaves.

    Raises:
        PlanError: the second was not made for what the first leaves.
    """
    gone = set(first.removed_layers)
    layers = {
        kind: _composed_layers(per_layer, second.layers.get(kind), gone) for kind, per_layer in first.layers.items()
    }
    vocabulary = first.vocabulary
    if second.vocabulary is not None:
        kept = second.vocabulary.keep if vocabulary is None else [vocabulary.keep[i] for i in second.vocabulary.keep]
        vocabulary = replace(vocabulary or second.vocabulary, keep=tuple(kept))
    return replace(
        second,
        model_fingerprint=first.model_fingerprint,
        shape="uniform" if first.shape == second.shape == "uniform" else "uneven",
        budget=first.budget,
        layers=layers,
        parameters_dense=first.parameters_dense,
        vocabulary=vocabulary,
        notes=tuple(dict.fromkeys([*first.notes, *second.notes])),
    )


def _composed_layers(
    first: Sequence[LayerPlan], second: Sequence[LayerPlan] | None, gone: set[int]
) -> tuple[LayerPlan, ...]:
    left = len(first) - len(gone)
    if second is not None and len(second) != left:
        raise PlanError(f"a second plan is for {len(second)} layers, and the first one leaves {left}. Plan again.")
    later = iter(second if second is not None else ())
    found = []
    for number, layer in enumerate(first):
        keep = layer.keep
        if second is not None and number not in gone:
            after = next(later)
            if after.num_units != len(layer.keep):
                raise PlanError(
                    f"a second plan is for {after.num_units} units in layer {number}, and the first one leaves "
                    f"{len(layer.keep)}. Plan again."
                )
            keep = tuple(layer.keep[unit] for unit in after.keep)
        found.append(LayerPlan(layer.num_units, keep))
    return tuple(found)
