"""Runs one method over every unit of a model; refuses scores that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import CheckpointError, ConfigError
from secateur.families.geometry import Geometry, Segment, TensorSlice, UnitAxis
from secateur.records.gradients import GradientStatistics, UnitGradients
from secateur.records.gram import Grams
from secateur.records.impacts import ImpactStatistics, UnitImpacts, judged_alike
from secateur.records.masks import MaskStatistics
from secateur.records.plan import LayerPlan, Plan
from secateur.records.routing import EXTREMES, SUMS, RoutingSums
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Moments, SequenceSums
from secateur.records.units import BLOCK_KINDS, EXPERT, FUSED_KINDS, LAYER
from secateur.score.combine import most_needed, require_union
from secateur.score.method import METHODS, Evidence, Method, Outcome

Combine = Literal["mean", "union"]
"""How several texts that decide are one."""

LoadTensor = Callable[[str], Tensor | None]
"""Returns a parameter by name, or None where the model has no such parameter (an absent bias)."""


@dataclass(frozen=True, slots=True)
class TextRecords:
    """What is known of one text.

    Attributes:
        statistics: its calibration sums.
        buckets: names of the buckets it is made of.
        grams: Gram matrices, where the calibration took them; read one site at a time.
        gradients: where a gradient pass was made.
        impacts: what its documents say of the units, where that was collected.
        masks: where some were trained.
    """

    statistics: BucketStatistics
    buckets: tuple[str, ...] = ()
    grams: Grams | None = None
    gradients: GradientStatistics | None = None
    impacts: ImpactStatistics | None = None
    masks: MaskStatistics | None = None


def unit_weights(axis: UnitAxis, load: LoadTensor, weight_layout: str) -> list[Tensor]:
    """Return the weight slices of an axis, one (units, elements) matrix per slice, biases as their own matrices."""
    slices: list[Tensor] = []
    for segment in axis.segments:
        weight = load(f"{segment.module}.weight")
        assert weight is not None, f"{segment.module} has no weight"
        rows_first = (segment.side == "out") == (weight_layout == "out_in")
        slices.append(_cut(weight if rows_first else weight.T, segment, axis.num_units))
        bias = load(f"{segment.module}.bias") if segment.side == "out" else None
        if bias is not None:
            slices.append(_cut(bias[:, None], segment, axis.num_units))
    for part in axis.tensors:
        tensor = None if part.is_buffer else load(part.name)
        if tensor is not None:
            slices.append(_cut_tensor(tensor, part, axis))
    return slices


def _cut_tensor(tensor: Tensor, part: TensorSlice, axis: UnitAxis) -> Tensor:
    """Return the slices of a parameter that is no linear layer's, a row per unit."""
    groups = axis.num_groups if part.stacked else 1
    held = tensor.movedim(part.dim, 1) if part.stacked else tensor.movedim(part.dim, 0)[None]
    return held[:, part.offset : part.offset + axis.num_units // groups * part.width].reshape(axis.num_units, -1)


def _cut(matrix: Tensor, segment: Segment, num_units: int) -> Tensor:
    return matrix[segment.offset : segment.offset + num_units * segment.width].reshape(num_units, -1)


def score_units(
    method: str,
    statistics: BucketStatistics,
    geometry: Geometry,
    kinds: Sequence[str],
    *,
    load_tensor: LoadTensor,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    buckets: Sequence[str] = (),
    inputs_fingerprint: str = "",
    grams: Grams | None = None,
    gradients: GradientStatistics | None = None,
    depth_method: str = "",
    depth_options: Mapping[str, Any] | None = None,
    removal_losses: Mapping[str, Sequence[float]] | None = None,
    impacts: ImpactStatistics | None = None,
    by_bucket: Mapping[str, TextRecords] | None = None,
    masks: MaskStatistics | None = None,
    combine: Combine = "mean",
) -> Scores:
    """Return the importance of every unit of the given kinds.

    Args:
        method: registered method name; it scores units inside a sub-layer, and blocks too unless ``depth_method`` does.
        statistics: the (merged) calibration sums to judge by.
        geometry: of the model the statistics were taken on.
        kinds: unit kinds to score; whole layers and sub-layers have one unit per layer.
        load_tensor: parameter by name; called only by methods that need weights.
        options: the method's options.
        seed: for methods that draw.
        buckets: names of the buckets behind ``statistics``, for the record.
        inputs_fingerprint: identifies statistics and weights, for the record.
        grams: Gram matrices of the same text, where the calibration took them; read one site at a time.
        gradients: of the same text, where a gradient pass was made.
        depth_method: registered name of the method that scores whole layers and sub-layers.
        depth_options: its options.
        removal_losses: per block kind, for every layer what was measured without its block, for methods with a
            ``measure``; anything where there is no such block.
        impacts: what the same text's documents say of the units, where that was collected.
        by_bucket: what is known of each bucket alone that the method's options name.
        masks: trained on the same text.
        combine: ``mean``: units are scored on all text together. ``union``: on each of ``buckets`` alone, which must
            be in ``by_bucket``; the score is the largest rank in the layer. Controls and blocks are as with ``mean``.

    Raises:
        ConfigError: unknown method or option, one that cannot score a kind, or Gram matrices, gradients, masks or
            measurements that the method needs are missing, or the matrices singular.
        FamilyError: this family cannot cut a kind that was asked for.
        CheckpointError: Gram matrices or scores are not finite; layer named.
    """
    blocks, axis_kinds = split_kinds(kinds)
    options = dict(options or {})
    if blocks:
        depth_method, depth_options = depth_method or method, dict((depth_options or {}) if depth_method else options)
        if not axis_kinds:
            method, options = depth_method, depth_options
    else:
        depth_method, depth_options = "", {}
    chosen = METHODS[method]
    chosen.check_options(options)
    chosen.require_kinds(axis_kinds)
    geometry.require_cuttable(axis_kinds)
    if combine == "union" and axis_kinds and not chosen.control:
        require_union(method, options, buckets)
    texts = TextRecords(statistics, tuple(buckets), grams, gradients, impacts, masks)
    values: dict[str, list[Tensor]] = {}
    for kind in blocks:
        measured = _measured(METHODS[depth_method], kind, geometry, removal_losses)
        values[kind] = _score_blocks(METHODS[depth_method], kind, statistics, geometry, depth_options, seed, measured)
    for kind in axis_kinds:
        values[kind] = []
        for axis in geometry.axes[kind]:
            if axis.num_units == 0:
                values[kind].append(torch.zeros(0, dtype=torch.float64))
                continue
            evidence = _evidence(chosen, axis, texts, by_bucket or {}, geometry, load_tensor, seed)
            try:
                score = _score_axis(chosen, evidence, options, buckets if combine == "union" else ())
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"method {method} with options {options} cannot invert the Gram matrix of the {kind}s of layer "
                    f"{axis.layer}: {_channels(axis)} channels were seen on too little text, or copy each other. "
                    "Raise option ridge, or calibrate on more text."
                ) from None
            if not bool(torch.isfinite(score).all()):
                raise CheckpointError(
                    f"method {method} gave scores that are not finite for the {kind}s of layer {axis.layer}; "
                    "weights or statistics hold NaN or infinity there. Check the checkpoint."
                )
            values[kind].append(score)
    return Scores(
        method,
        options,
        tuple(buckets),
        values,
        inputs_fingerprint,
        depth_method,
        depth_options,
        cumulative=bool(blocks) and bool(METHODS[depth_method].measure),
    )


def _score_axis(
    method: Method, evidence: Evidence, options: Mapping[str, Any], one_by_one: Sequence[str]
) -> Float64[Tensor, " _units"]:
    """Return the scores of one kind of unit in one layer; on each of some texts alone, the most that one needs."""
    if not one_by_one or method.control:
        score: Tensor = method.function(evidence, **options)
        return score
    alone = [method.function(evidence.of_bucket(name), **options) for name in one_by_one]
    finite = all(bool(torch.isfinite(score).all()) for score in alone)
    return most_needed(alone) if finite else torch.stack(alone).sum(0)


def _measured(
    method: Method, kind: str, geometry: Geometry, removal_losses: Mapping[str, Sequence[float]] | None
) -> Sequence[float | None]:
    """Return what was measured without each layer's block; None for methods that need no measurement."""
    if not method.measure:
        return [None] * geometry.num_layers
    if removal_losses is None:
        able = [name for name, other in METHODS.items() if kind in other.kinds and not (other.measure or other.control)]
        raise ConfigError(
            f"method {method.name} takes blocks out one after another and runs text each time, and statistics hold no "
            f"text. Use a recipe (secateur run, or secateur.run), or depth_method: {' or '.join(able)}."
        )
    return removal_losses[kind]


def notes_on(method: str, outcome: Outcome) -> list[str]:
    """Return what a method says of a plan that was made with its scores."""
    notes = METHODS[method].notes
    return [] if notes is None else list(notes(outcome))


def with_merged_experts(
    plan: Plan, scores: Scores, statistics: BucketStatistics, geometry: Geometry, *, load_tensor: LoadTensor, seed: int
) -> Plan:
    """Return the plan with the experts that go merged into others, where the method that scored them says so.

    As many experts stay in each layer, though perhaps others.

    Args:
        plan: made with the scores.
        scores: of all experts.
        statistics: the calibration sums behind them.
        geometry: of the model.
        load_tensor: parameter by name.
        seed: for methods that draw.

    Raises:
        ConfigError: the statistics lack what the method needs.
    """
    method = METHODS[scores.method]
    if method.merge is None or EXPERT not in plan.layers:
        return plan
    texts, layers = TextRecords(statistics, tuple(scores.buckets)), list(plan.layers[EXPERT])
    for index, entry in enumerate(layers):
        if not entry.is_narrowed:
            continue
        axis, values = geometry.axes[EXPERT][index], scores.values[EXPERT][index]
        evidence = _evidence(method, axis, texts, {}, geometry, load_tensor, seed)
        merged = sorted(method.merge(evidence, len(entry.keep), axis.num_groups, **scores.options))
        keep = tuple(members[0][0] for members in merged)
        gone = sorted(set(range(entry.num_units)) - set(keep))
        layers[index] = LayerPlan(
            entry.num_units,
            keep,
            lowest_kept=float(values[list(keep)].min()),
            highest_removed=float(values[gone].max()),
            merged=tuple(merged),
        )
    return replace(plan, layers={**plan.layers, EXPERT: tuple(layers)})


def rehearse(
    method: str, geometry: Geometry, kinds: Sequence[str], options: Mapping[str, Any], buckets: Sequence[str] = ()
) -> None:
    """Run a method on made-up evidence, so that what it refuses is refused before any text is run.

    Args:
        method: registered name.
        geometry: of the model.
        kinds: unit kinds that are to be scored.
        options: the method's.
        buckets: names of the buckets that decide.

    Raises:
        ConfigError: unknown method or option, or one that does not fit a unit kind or the buckets.
        FamilyError: this family cannot cut a kind that was asked for.
    """
    chosen = METHODS[method]
    chosen.check_options(options)
    chosen.require_kinds(kinds)
    blocks, axis_kinds = split_kinds(kinds)
    geometry.require_removable(blocks)
    geometry.require_cuttable(axis_kinds)
    for kind in blocks:
        chosen.function(_block_evidence(kind, 0, 0.5, 0, 1.0), **options)
    for kind in axis_kinds:
        axis = next(axis for axis in geometry.axes[kind] if axis.num_units)
        width = 0 if kind == EXPERT else min(axis.reader_width, 2)
        made_up = _made_up(kind, tuple(buckets), width=width, linear=len(axis.linear))
        chosen.function(made_up, **options)


def _made_up(kind: str, buckets: tuple[str, ...], *, width: int, linear: int) -> Evidence:
    """Return evidence of two units that are all alike: enough for a method to refuse, and nothing to wait for."""
    units = 2
    ones, channels = torch.ones(units).double(), torch.ones(units * width).double()
    gradients = UnitGradients(1, ones, ones, ones, ones, ones, torch.ones(1, 1), ones[:, None])
    evidence = Evidence(
        kind=kind,
        layer=0,
        num_units=units,
        width=width,
        moments=Moments(1, channels, channels, channels),
        sequences=SequenceSums(1, channels),
        linear_abs=[ones] * linear,
        load_weights=lambda: [ones[:, None]],
        load_reader=lambda: channels[None],
        load_gram=lambda: torch.diag(channels),
        load_gradients=lambda: gradients,
        seed=0,
        load_impacts=lambda: judged_alike(units),
        load_masks=lambda: ones,
        buckets=buckets,
        load_routing=lambda: RoutingSums(1, **dict.fromkeys((*SUMS, *EXTREMES), ones)),
        load_router=lambda: torch.eye(units).double(),
    )
    return replace(evidence, of_bucket=lambda name: replace(evidence, buckets=(name,)))


def split_kinds(kinds: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return those of the kinds that are whole blocks, and those that are units inside a sub-layer."""
    return [kind for kind in kinds if kind in BLOCK_KINDS], [kind for kind in kinds if kind not in BLOCK_KINDS]


def _score_blocks(
    method: Method,
    kind: str,
    statistics: BucketStatistics,
    geometry: Geometry,
    options: Mapping[str, Any],
    seed: int,
    measured: Sequence[float | None],
) -> list[Tensor]:
    """Return one vector per layer: of length 1, or 0 where the layer lacks the sub-layer."""
    method.check_options(options)
    method.require_kinds([kind])
    geometry.require_removable([kind])
    sums = statistics.cosine_sum if kind == LAYER else statistics.sublayer_cosine_sum[kind]
    scores: list[Tensor] = []
    for layer, total in enumerate(sums.tolist()):
        if not geometry.has_block(kind, layer):
            scores.append(torch.zeros(0, dtype=torch.float64))
            continue
        evidence = _block_evidence(kind, layer, total / statistics.num_tokens, seed, measured[layer])
        score = method.function(evidence, **options)
        if not bool(torch.isfinite(score).all()):
            raise CheckpointError(
                f"method {method.name} gave a score that is not finite for the {kind} of layer {layer}; statistics "
                "hold NaN or infinity there. Calibrate again."
            )
        scores.append(score)
    return scores


def _block_evidence(kind: str, layer: int, cosine: float, seed: int, removal_loss: float | None) -> Evidence:
    """Return what is known of a whole block: how much the residual stream turns there, and what its removal costs."""
    nothing = torch.zeros(0, dtype=torch.float64)
    return Evidence(
        kind=kind,
        layer=layer,
        num_units=1,
        width=0,
        moments=Moments(0, nothing, nothing, nothing),
        sequences=SequenceSums(0, nothing),
        linear_abs=[],
        load_weights=list,
        load_reader=lambda: nothing[None],
        load_gram=lambda: nothing[None],
        load_gradients=lambda: UnitGradients(0, nothing, nothing, nothing, nothing, nothing),
        seed=seed,
        cosine=cosine,
        removal_loss=removal_loss,
    )


def _channels(axis: UnitAxis) -> int:
    return axis.num_units * axis.reader_width


def _reader_weight(axis: UnitAxis, load: LoadTensor, weight_layout: str) -> Tensor:
    if axis.kind in FUSED_KINDS:
        return _fused_reader(axis, load)
    weight = load(f"{axis.reader}.weight")
    assert weight is not None, f"{axis.reader} has no weight"
    return weight if weight_layout == "out_in" else weight.T


def _fused_reader(axis: UnitAxis, load: LoadTensor) -> Tensor:
    """Return the down projections of all experts side by side, one column per channel of each in turn."""
    name = f"{axis.reader}.down_proj"
    weight = load(name)
    assert weight is not None, f"{axis.reader} has no down_proj"
    channels = next(part.dim for part in axis.tensors if part.name == name)
    return weight.movedim(channels, 1).flatten(0, 1).T


def _mean_gram(method: Method, axis: UnitAxis, grams: Grams | None) -> Tensor:
    """Return the mean of x xT at the reader of an axis, float64 and symmetric to the last bit.

    Raises:
        ConfigError: there are no Gram matrices.
        CheckpointError: the matrix holds NaN or infinity.
    """
    if grams is None:
        raise ConfigError(
            f"method {method.name} needs Gram matrices, and the calibration took none; calibrate with them, or use a "
            f"method that does without: {_plain_methods(axis.kind)}."
        )
    mean = grams.load(axis.site).double() / grams.count
    if not bool(torch.isfinite(mean).all()):
        raise CheckpointError(
            f"the Gram matrix of the {axis.kind}s of layer {axis.layer} holds NaN or infinity. Calibrate again, with "
            "dtype: float32 if the model overflows in half precision."
        )
    return (mean + mean.T) / 2


def _plain_methods(kind: str) -> str:
    """Return the names of the methods for a unit kind that read the calibration sums and weights of one text alone."""
    able = {name: method for name, method in METHODS.items() if kind in method.kinds and not method.control}
    return ", ".join(name for name, m in able.items() if not (m.gram or m.gradient or m.impact or m.contrast or m.mask))


def _unit_gradients(method: Method, axis: UnitAxis, gradients: GradientStatistics | None) -> UnitGradients:
    if gradients is None:
        raise ConfigError(
            f"method {method.name} needs gradients, and these statistics hold none; take them with the calibration "
            f"(gradients=True), or use a method that does without: {_plain_methods(axis.kind)}."
        )
    return gradients.units[axis.layer, axis.kind]


def _unit_impacts(method: Method, axis: UnitAxis, impacts: ImpactStatistics | None) -> UnitImpacts:
    if impacts is None:
        raise ConfigError(
            f"method {method.name} needs to know what single documents need, and these statistics do not say; take it "
            f"with the calibration (impacts=True), or use a method that does without: {_plain_methods(axis.kind)}."
        )
    return impacts.units[axis.layer, axis.kind]


def _unit_masks(method: Method, axis: UnitAxis, masks: MaskStatistics | None) -> Tensor:
    if masks is None:
        raise ConfigError(
            f"method {method.name} needs trained masks, and these statistics hold none; use a recipe (secateur run, or "
            f"secateur.run), which trains them, or a method that does without: {_plain_methods(axis.kind)}."
        )
    return masks.units[axis.layer, axis.kind].double()


def _evidence(
    method: Method,
    axis: UnitAxis,
    text: TextRecords,
    by_bucket: Mapping[str, TextRecords],
    geometry: Geometry,
    load: LoadTensor,
    seed: int,
) -> Evidence:
    statistics, site, layout = text.statistics, axis.site, geometry.family.weight_layout
    moments, sequences = _channel_sums(statistics, axis)
    device = moments.sum.device

    def of_bucket(name: str) -> Evidence:
        if name not in by_bucket:
            known = f"there are {', '.join(by_bucket)}" if by_bucket else "there are none"
            raise ConfigError(
                f"method {method.name} looks at bucket {name!r} alone, and no statistics of it were given ({known}). "
                "Calibrate on it, or name another bucket in the method's options."
            )
        return _evidence(method, axis, by_bucket[name], by_bucket, geometry, load, seed)

    return Evidence(
        kind=axis.kind,
        layer=axis.layer,
        num_units=axis.num_units,
        width=axis.reader_width,
        moments=moments,
        sequences=sequences,
        linear_abs=[statistics.linear_abs[axis.layer, f"{axis.kind}.linear{i}"] for i in range(len(axis.linear))],
        load_weights=lambda: unit_weights(axis, load, layout),
        load_reader=lambda: _reader_weight(axis, load, layout).to(device),
        load_gram=lambda: _mean_gram(method, axis, text.grams).to(device),
        load_gradients=partial(_unit_gradients, method, axis, text.gradients),
        seed=seed,
        load_impacts=partial(_unit_impacts, method, axis, text.impacts),
        load_masks=partial(_unit_masks, method, axis, text.masks),
        of_bucket=of_bucket,
        buckets=text.buckets,
        load_routing=lambda: statistics.routing[site],
        load_router=lambda: _router_weight(axis, geometry, load).to(device),
    )


def _channel_sums(statistics: BucketStatistics, axis: UnitAxis) -> tuple[Moments, SequenceSums]:
    """Return sums over the channels of an axis; experts have none."""
    if axis.kind != EXPERT:
        return statistics.moments[axis.site], statistics.sequences[axis.site]
    nothing = statistics.routing[axis.site].routed[:0]
    return Moments(0, nothing, nothing, nothing), SequenceSums(0, nothing)


def _router_weight(axis: UnitAxis, geometry: Geometry, load: LoadTensor) -> Tensor:
    experts = geometry.experts[axis.layer]
    assert experts is not None, f"layer {axis.layer} has no experts"
    weight = load(f"{experts.router}.weight")
    assert weight is not None, f"{experts.router} has no weight"
    return weight
