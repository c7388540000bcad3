"""What every scoring method promises; registering a method enrols it here."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate import collect, collect_gradients, collect_impacts, learn_masks
from secateur.errors import ConfigError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.gradients import SUMS, GradientStatistics, UnitGradients
from secateur.records.gram import Grams
from secateur.records.impacts import TENSORS, ImpactStatistics, UnitImpacts, judged
from secateur.records.masks import MaskSettings, MaskStatistics
from secateur.records.routing import EXTREMES, RoutingSums
from secateur.records.routing import SUMS as ROUTING_SUMS
from secateur.records.statistics import BucketStatistics, Moments, SequenceSums
from secateur.records.units import (
    BLOCK_KINDS,
    EXPERT,
    EXPERT_CHANNEL,
    FFN_CHANNEL,
    FUSED_KINDS,
    GQA_GROUP,
    LAYER_UNIT_KINDS,
    QUERY_HEAD,
    REQUIRED_UNIT_KINDS,
    SHARED_CHANNEL,
)
from secateur.score import METHODS, Evidence, TextRecords, score_units
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.pruning import logits, masked
from tests.unit.score.grams import grams_of
from tests.variants import variants

NUM_UNITS = 12


EVERY_KIND = (*LAYER_UNIT_KINDS, *BLOCK_KINDS)


def cases(kinds: Sequence[str] = EVERY_KIND, *, controls: bool = True) -> list[Any]:
    """Return (method, options, kind) for every registered method and those of the kinds that it scores."""
    return [
        pytest.param(name, options, kind, id="-".join([name, *map(str, options.values()), kind]))
        for name in METHODS
        for options in variants(name)
        for kind in kinds
        if kind in METHODS[name].kinds and (controls or not (METHODS[name].control or METHODS[name].contrast))
    ]


every_method = pytest.mark.parametrize(("method", "options"), [(name, o) for name in METHODS for o in variants(name)])
every_case = pytest.mark.parametrize(("method", "options", "kind"), cases())
every_inner_case = pytest.mark.parametrize(("method", "options", "kind"), cases(LAYER_UNIT_KINDS))
every_real_case = pytest.mark.parametrize(("method", "options", "kind"), cases(LAYER_UNIT_KINDS, controls=False))
"""Those of methods that say what a text needs; not of those that say how much more it needs it than another text."""


def evidence(kind: str, seed: int = 0) -> Evidence:
    """Return made-up evidence of one text, and by ``of_bucket`` that of any other."""
    others = {"general": text_evidence(kind, seed + 20)}
    return replace(text_evidence(kind, seed), of_bucket=others.__getitem__)


def text_evidence(kind: str, seed: int = 0) -> Evidence:
    """Return made-up evidence that could have come from a model: sums over tokens that exist, and weights.

    The last weight slice is that of the reading projection.
    """
    if kind in BLOCK_KINDS:
        return block_evidence(kind, seed)
    generator = torch.Generator().manual_seed(seed)
    width = 0 if kind == EXPERT else 3 if kind in (GQA_GROUP, QUERY_HEAD) else 1
    tokens = torch.randn(40, NUM_UNITS * width, dtype=torch.float64, generator=generator)
    tokens *= torch.rand(NUM_UNITS * width, dtype=torch.float64, generator=generator) + 0.1
    weights = [torch.randn(NUM_UNITS, 5 * width, generator=generator) for _ in range(3)]
    reader = weights[-1].reshape(NUM_UNITS * width, 5).T
    routing = made_up_routing(generator)
    router = torch.randn(NUM_UNITS, 7, dtype=torch.float64, generator=generator)
    gram = tokens.T @ tokens / 40
    slopes = torch.randn(20, 5, dtype=torch.float64, generator=generator)
    gradients = UnitGradients(
        4,
        **{name: torch.rand(NUM_UNITS, dtype=torch.float64, generator=generator) for name in SUMS},
        output=slopes.T @ slopes,
        sketch=torch.randn(NUM_UNITS, 8, dtype=torch.float64, generator=generator),
    )
    impacts = judged(torch.rand(6, NUM_UNITS, dtype=torch.float64, generator=generator))
    outputs = [torch.rand(NUM_UNITS, dtype=torch.float64, generator=generator) * 40 for _ in range(2)]
    masks = torch.rand(NUM_UNITS, dtype=torch.float64, generator=generator)
    return Evidence(
        kind=kind,
        layer=1,
        num_units=NUM_UNITS,
        width=width,
        moments=Moments(40, tokens.sum(0), tokens.abs().sum(0), tokens.pow(2).sum(0)),
        sequences=SequenceSums(4, tokens.reshape(4, 10, -1).abs().mean(1).square().sum(0)),
        linear_abs=outputs if kind in (FFN_CHANNEL, SHARED_CHANNEL) else [],
        load_weights=lambda: weights,
        load_reader=lambda: reader,
        load_gram=lambda: gram,
        load_gradients=lambda: gradients,
        seed=7,
        load_impacts=lambda: impacts,
        load_masks=lambda: masks,
        load_routing=lambda: routing,
        load_router=lambda: router,
    )


def made_up_routing(generator: torch.Generator) -> RoutingSums:
    """Return sums over 40 tokens."""
    fields = (*ROUTING_SUMS, *EXTREMES)
    values = torch.rand(len(fields), NUM_UNITS, dtype=torch.float64, generator=generator) * 40
    return RoutingSums(40, **dict(zip(fields, values, strict=True)))


def block_evidence(kind: str, seed: int) -> Evidence:
    """Return made-up evidence of a whole layer or sub-layer: one unit, its cosine and what was measured without it."""
    nothing = torch.zeros(0, dtype=torch.float64)
    return Evidence(
        kind=kind,
        layer=1,
        num_units=1,
        width=0,
        moments=Moments(0, nothing, nothing, nothing),
        sequences=SequenceSums(0, nothing),
        linear_abs=[],
        load_weights=list,
        load_reader=lambda: nothing[None],
        load_gram=lambda: nothing[None],
        load_gradients=lambda: UnitGradients(0, **dict.fromkeys(SUMS, nothing)),
        seed=7,
        cosine=float(torch.rand((), generator=torch.Generator().manual_seed(seed))),
        removal_loss=float(torch.rand((), generator=torch.Generator().manual_seed(seed + 100))),
    )


def permuted(item: Evidence, order: Tensor) -> Evidence:
    """Return the evidence of the same units in another order."""

    def channels(values: Tensor) -> Tensor:
        return values.reshape(item.num_units, item.width)[order].reshape(-1)

    sums, sequences, slopes = item.moments, item.sequences, item.load_gradients()
    sums_of_units = {name: getattr(slopes, name)[order] for name in SUMS}
    assert slopes.sketch is not None
    gradients = UnitGradients(slopes.count, **sums_of_units, output=slopes.output, sketch=slopes.sketch[order])
    seen = item.load_impacts()
    impacts = UnitImpacts(seen.count, **{name: getattr(seen, name)[order] for name in TENSORS})
    masks = item.load_masks()[order]
    weights = [matrix[order] for matrix in item.load_weights()]
    places = channels(torch.arange(item.num_units * item.width))
    routing = {name: getattr(item.load_routing(), name)[order] for name in (*ROUTING_SUMS, *EXTREMES)}
    router = item.load_router()[order]
    return replace(
        item,
        moments=Moments(sums.count, channels(sums.sum), channels(sums.sum_abs), channels(sums.sum_sq)),
        sequences=SequenceSums(sequences.count, channels(sequences.mean_abs_sq)),
        linear_abs=[values[order] for values in item.linear_abs],
        load_weights=lambda: weights,
        load_reader=lambda: item.load_reader()[:, places],
        load_gram=lambda: item.load_gram()[places][:, places],
        load_gradients=lambda: gradients,
        load_impacts=lambda: impacts,
        load_masks=lambda: masks,
        load_routing=lambda: RoutingSums(40, **routing),
        load_router=lambda: router,
        of_bucket=lambda name: permuted(item.of_bucket(name), order),
    )


def tensors(item: Evidence) -> list[Tensor]:
    """Return every tensor that evidence holds or loads."""
    sums, gradients = item.moments, item.load_gradients()
    loaded = [*item.load_weights(), item.load_reader(), item.load_gram(), *(getattr(gradients, n) for n in SUMS)]
    if item.kind not in BLOCK_KINDS:
        loaded += [item.load_masks(), *(getattr(item.load_impacts(), name) for name in TENSORS)]
        loaded += [item.load_router(), *(getattr(item.load_routing(), name) for name in (*ROUTING_SUMS, *EXTREMES))]
    return [sums.sum, sums.sum_abs, sums.sum_sq, item.sequences.mean_abs_sq, *item.linear_abs, *loaded]


def score(method: str, item: Evidence, options: dict[str, Any]) -> Tensor:
    """Return a method's scores, or skip where the method refuses this kind of unit and these options by name."""
    try:
        return METHODS[method].function(item, **options)
    except ConfigError as error:
        assert item.kind in str(error)
        pytest.skip(str(error))


@every_case
def test_one_finite_number_per_unit(method: str, options: dict[str, Any], kind: str) -> None:
    """A method gives one finite float64 score per unit."""
    values = score(method, evidence(kind), options)
    assert values.shape == (evidence(kind).num_units,)
    assert values.dtype == torch.float64
    assert bool(torch.isfinite(values).all())


@every_case
def test_scores_are_deterministic_and_leave_the_evidence_alone(method: str, options: dict[str, Any], kind: str) -> None:
    """The same evidence gives the same scores twice, whatever the global random state, and is not changed."""
    item, untouched = evidence(kind), evidence(kind)
    first = score(method, item, options)
    torch.manual_seed(99)
    torch.rand(3)
    assert torch.equal(first, score(method, item, options))
    for mine, other in zip(tensors(item), tensors(untouched), strict=True):
        assert torch.equal(mine, other)


@every_inner_case
def test_permuting_units_permutes_scores(method: str, options: dict[str, Any], kind: str) -> None:
    """A unit's score does not depend on its place; methods that look at nothing are excepted.

    A matrix of permuted units is factored in another order, so its inverse is equal to fewer digits.
    """
    if METHODS[method].needs == "nothing":
        pytest.skip("draws by place on purpose")
    item = evidence(kind)
    order = torch.randperm(item.num_units, generator=torch.Generator().manual_seed(3))
    expected = score(method, item, options)[order]
    tolerance = 1e-9 if METHODS[method].gram else 1e-12
    torch.testing.assert_close(score(method, permuted(item, order), options), expected, rtol=tolerance, atol=0)


@every_case
def test_methods_read_what_they_say_they_need(method: str, options: dict[str, Any], kind: str) -> None:
    """Weights, Gram matrices and gradients are read, and sums and measurements matter, exactly where a method says."""
    item, read = evidence(kind), set()
    needs = METHODS[method].needs

    def watched(word: str, load: Callable[[], Any]) -> Callable[[], Any]:
        def watch() -> Any:
            read.add(word)
            return load()

        return watch

    def watching(text: Evidence) -> Evidence:
        return replace(
            text,
            load_weights=watched("weights", text.load_weights),
            load_reader=watched("weights", text.load_reader),
            load_router=watched("weights", text.load_router),
            load_gram=watched("Gram matrices", text.load_gram),
            load_gradients=watched("gradients", text.load_gradients),
            load_impacts=watched("impacts", text.load_impacts),
            load_masks=watched("masks", text.load_masks),
            of_bucket=lambda name: watching(text.of_bucket(name)),
        )

    expected = score(method, watching(item), options)
    other = evidence(kind, seed=5)

    def with_other_sums(text: Evidence) -> Evidence:
        sums = {name: getattr(other, name) for name in ("moments", "sequences", "linear_abs", "cosine", "load_routing")}
        return replace(text, **sums, of_bucket=lambda name: with_other_sums(text.of_bucket(name)))

    if not torch.equal(score(method, with_other_sums(item), options), expected):
        read.add("statistics")
    if not torch.equal(score(method, replace(item, removal_loss=other.removal_loss), options), expected):
        read.add("measured removals")
    if needs == "as the other method":
        return
    assert set(needs.split(" and ")) == (read or {"nothing"})
    assert ("Gram matrices" in read) == METHODS[method].gram
    assert ("gradients" in read) == METHODS[method].gradient
    assert ("impacts" in read) == METHODS[method].impact
    assert ("masks" in read) == METHODS[method].mask
    assert ("measured removals" in read) == bool(METHODS[method].measure)
    if needs == "nothing":
        assert torch.equal(score(method, other, options), expected)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_is_described(method: str) -> None:
    """The fields that the documentation and ``secateur methods`` print are filled in."""
    entry = METHODS[method]
    assert entry.name == method
    for field in ("measures", "formula", "needs", "cost", "caveat", "source"):
        assert getattr(entry, field).strip(), f"{method} has no {field}"
    first_line = inspect.getdoc(entry.function)
    assert first_line and first_line.startswith("Return")
    if not entry.control:
        assert "arXiv" in entry.source or "http" in entry.source


@pytest.mark.parametrize("method", list(METHODS))
def test_every_option_has_a_default(method: str) -> None:
    """A recipe that names only the method is complete."""
    parameters = list(inspect.signature(METHODS[method].function).parameters.values())
    assert parameters[0].kind is inspect.Parameter.POSITIONAL_ONLY
    for parameter in parameters[1:]:
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default is not inspect.Parameter.empty


@pytest.mark.parametrize("method", list(METHODS))
def test_unknown_options_are_refused_by_name(method: str) -> None:
    """A misspelt option is an error that names the method, not a silent default."""
    with pytest.raises(ConfigError, match=rf"{method}.*'threshhold'"):
        METHODS[method].check_options({"threshhold": 1})


@every_method
def test_listed_option_values_are_accepted_and_others_refused(method: str, options: dict[str, Any]) -> None:
    """Every listed value passes the check; a value that is not listed is refused with the listed ones."""
    entry = METHODS[method]
    entry.check_options(options)
    for key, value in options.items():
        with pytest.raises(ConfigError, match=str(value)):
            entry.check_options({**options, key: "no such value"})


@dataclass(frozen=True)
class Planted:
    """A pico model with useless units, what calibration says of it, and its useful units per kind and layer."""

    model: Any
    geometry: Geometry
    statistics: BucketStatistics
    grams: Grams
    gradients: GradientStatistics | None
    impacts: ImpactStatistics | None
    masks: MaskStatistics | None
    useful: dict[str, list[list[int]]]


@cache
def planted_dense() -> Planted:
    """Return a model with useless units.

    Half of the FFN channels have tiny gate and up rows; one group of three has tiny query, key and value rows.
    """
    family = families()["llama"]
    model = pico_model(family)
    generator = torch.Generator().manual_seed(11)
    useful: dict[str, list[list[int]]] = {FFN_CHANNEL: [], GQA_GROUP: [], QUERY_HEAD: []}
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            order = torch.randperm(64, generator=generator)
            block.mlp.gate_proj.weight[order[32:]] *= 1e-3
            block.mlp.up_proj.weight[order[32:]] *= 1e-3
            useful[FFN_CHANNEL].append(sorted(order[:32].tolist()))
            block.self_attn.q_proj.weight.view(3, 16, 48)[layer] *= 1e-3
            block.self_attn.k_proj.weight.view(3, 8, 48)[layer] *= 1e-3
            block.self_attn.v_proj.weight.view(3, 8, 48)[layer] *= 1e-3
            useful[GQA_GROUP].append([group for group in range(3) if group != layer])
            useful[QUERY_HEAD].append([head for head in range(6) if head // 2 != layer])
    return seen(model, geometry_of(model, family), useful)


@cache
def planted_experts(kind: str) -> Planted:
    """Return a model whose second layer has eight experts and a shared one, half the units of one kind useless.

    Useless experts have tiny down projections and router rows, so that few tokens find them; useless channels have tiny
    gate and up rows. Where channels of experts are judged, every token is sent to all experts.
    """
    family = families()["qwen2_moe"]
    model = pico_model(family, **({"num_experts_per_tok": 8} if kind == EXPERT_CHANNEL else {}))
    model.set_experts_implementation("eager")  # the other implementations know no float64
    geometry, moe = geometry_of(model, family), model.model.layers[1].mlp
    num = geometry.axes[kind][1].num_units
    order = torch.randperm(num, generator=torch.Generator().manual_seed(11))
    useless = torch.zeros(num, dtype=torch.bool)
    useless[order[num // 2 :]] = True
    with torch.no_grad():
        if kind == EXPERT:
            moe.gate.weight[useless] *= 1e-3
            moe.experts.down_proj[useless] *= 1e-3
        elif kind == EXPERT_CHANNEL:
            rows = useless.reshape(8, 1, -1).expand(8, 2, -1).reshape(8, -1)
            moe.experts.gate_up_proj[rows] *= 1e-3
        else:
            moe.shared_expert.gate_proj.weight[useless] *= 1e-3
            moe.shared_expert.up_proj.weight[useless] *= 1e-3
    return seen(model, geometry, {kind: [[], (~useless).nonzero()[:, 0].tolist()]})


def planted(kind: str) -> Planted:
    """Return the model with useless units of a kind."""
    return planted_dense() if kind in REQUIRED_UNIT_KINDS else planted_experts(kind)


def seen(model: Any, geometry: Geometry, useful: dict[str, list[list[int]]]) -> Planted:
    """Return a model with all that a pass, or several, says of it."""
    blocks = hand_made_blocks()
    kinds = [kind for kind in useful if kind not in FUSED_KINDS]
    gradients = collect_gradients(model, blocks, geometry, kinds, outputs=True, sketch=True) if kinds else None
    impacts = collect_impacts(model, blocks, geometry, kinds) if kinds else None
    sums, grams = collect(model, blocks, geometry), grams_of(model, blocks, geometry)
    return Planted(model, geometry, sums, grams, gradients, impacts, masks_of(model, geometry, kinds), useful)


def masks_of(model: Any, geometry: Geometry, kinds: Sequence[str]) -> MaskStatistics | None:
    """Return masks that were trained for half the units of every kind, each kind by itself."""
    settings = MaskSettings(target=0.5, steps=100, learning_rate=0.3, objective="kl")
    trained = [learn_masks(model, hand_made_blocks(), geometry, [kind], settings) for kind in kinds]
    if not trained:
        return None
    return replace(trained[0], units={site: values for masks in trained for site, values in masks.units.items()})


@contextmanager
def silenced(case: Planted, kind: str, kept: list[list[int]]) -> Iterator[None]:
    """Make units that are not kept say nothing."""
    if kind not in FUSED_KINDS:
        with masked(case.model, case.geometry, {kind: kept}):
            yield
        return
    down = case.model.model.layers[1].mlp.experts.down_proj  # experts, hidden, width
    before = down.detach().clone()
    stays = torch.zeros(case.geometry.axes[kind][1].num_units, dtype=torch.bool)
    stays[kept[1]] = True
    with torch.no_grad():
        down *= stays.reshape(8, 1, -1)
        yield
        down.copy_(before)


def best_units(method: str, kind: str, options: dict[str, Any], seed: int = 0) -> list[list[int]]:
    """Return, per layer, as many best-scored units of the planted model as it has useful ones."""
    if kind == EXPERT and METHODS[method].needs == "weights":
        pytest.skip("says which experts can stand for each other, not which are useless")
    case = planted(kind)
    try:
        values = score_units(
            method,
            case.statistics,
            case.geometry,
            [kind],
            load_tensor=case.model.state_dict().get,
            options=options,
            seed=seed,
            grams=case.grams,
            gradients=case.gradients,
            impacts=case.impacts,
            by_bucket={"general": TextRecords(case.statistics, (), case.grams, case.gradients, case.impacts)},
            masks=case.masks,
        ).values[kind]
    except ConfigError as error:
        assert kind in str(error)
        pytest.skip(str(error))
    return [
        sorted(layer.argsort(descending=True)[: len(units)].tolist())
        for layer, units in zip(values, case.useful[kind], strict=True)
    ]


@every_real_case
def test_useless_units_score_lowest(method: str, options: dict[str, Any], kind: str) -> None:
    """Real methods put every planted useless unit below every useful one."""
    assert best_units(method, kind, options) == planted(kind).useful[kind]


@every_real_case
def test_real_methods_beat_the_random_control(method: str, options: dict[str, Any], kind: str) -> None:
    """Keeping the units a method prefers changes the logits less than keeping as many random ones, for every seed."""
    case = planted(kind)
    token_ids = torch.arange(90).reshape(2, 45)
    dense = logits(case.model, token_ids)

    def damage(kept: list[list[int]]) -> float:
        with silenced(case, kind, kept):
            return float((logits(case.model, token_ids) - dense).norm())

    chosen = damage(best_units(method, kind, options))
    randoms = [damage(best_units("random", kind, {}, seed)) for seed in range(5)]
    assert chosen <= min(randoms)
    assert chosen < 0.1 * max(randoms)
