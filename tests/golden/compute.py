"""The golden numbers: scores and a plan of every method on two seeded pico models and hand-made blocks, in float64."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.allocate import Request, make_plan
from secateur.calibrate import collect, collect_gradients, collect_impacts, learn_masks
from secateur.errors import ConfigError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.masks import MaskSettings, MaskStatistics
from secateur.records.statistics import BucketStatistics
from secateur.records.units import FUSED_KINDS, MOE_UNIT_KINDS, REQUIRED_UNIT_KINDS
from secateur.score import METHODS, TextRecords, score_units
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.score.grams import grams_of
from tests.variants import variants

FILE = Path(__file__).parent / "methods.json"
RELATIVE_TOLERANCE = 1e-9
"""Float64 sums differ in their last bits between machines; anything above this is a change of meaning."""


BUDGETS = {
    "ffn_channel": "channels",
    "gqa_group": "groups",
    "query_head": "heads",
    "expert": "experts",
    "expert_channel": "expert_channels",
    "shared_channel": "shared_channels",
}
"""Per unit kind, the budget by which a third of its units goes."""


def golden_model(name: str = "llama") -> Any:
    """Return the pico model whose every parameter is drawn by its name, so that no release of a library moves it."""
    model = pico_model(families()[name])
    for parameter_name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(parameter_name.encode()))
        parameter.data = torch.rand(parameter.shape, dtype=torch.float64, generator=generator) - 0.5
    return model


@dataclass(frozen=True)
class Case:
    """A model, and what is known of it on one text and on another."""

    model: Any
    geometry: Geometry
    statistics: BucketStatistics
    evidence: Mapping[str, Any]
    masks: Mapping[str, MaskStatistics]


def case(name: str, kinds: Sequence[str]) -> Case:
    """Return a golden model with all that methods ask of ``kinds``."""
    model = golden_model(name)
    if families()[name].experts is not None:
        model.set_experts_implementation("eager")  # the other implementations know no float64
    geometry = geometry_of(model, families()[name])
    linear = [kind for kind in kinds if kind not in FUSED_KINDS]
    blocks, other = hand_made_blocks(), hand_made_blocks(seed=1)
    every = {"outputs": True, "sketch": True}
    short = MaskSettings(target=0.34, steps=4, learning_rate=0.3, objective="loss")
    statistics = collect(model, blocks, geometry)
    general = TextRecords(
        collect(model, other, geometry),
        ("general",),
        grams_of(model, other, geometry),
        collect_gradients(model, other, geometry, linear, **every),
    )
    evidence = {
        "grams": grams_of(model, blocks, geometry),
        "gradients": collect_gradients(model, blocks, geometry, linear, **every),
        "impacts": collect_impacts(model, blocks, geometry, linear),
        "by_bucket": {"general": general},
    }
    masks = {kind: learn_masks(model, blocks, geometry, [kind], short) for kind in linear}
    return Case(model, geometry, statistics, evidence, masks)


def compute() -> dict[str, Any]:
    """Return scores and plans of every method, as plain data."""
    dense, experts = case("llama", REQUIRED_UNIT_KINDS), case("qwen2_moe", MOE_UNIT_KINDS)
    methods: dict[str, Any] = {}
    for method in METHODS:
        for options in variants(method):
            name = " ".join([method, *(f"{key}={value}" for key, value in options.items())])
            methods[name] = {
                kind: _entry(experts if kind in MOE_UNIT_KINDS else dense, method, options, kind)
                for kind in METHODS[method].kinds
            }
    return {
        "what": "scores of a seeded pico llama, and of a pico qwen2_moe for units of experts; kept units of a third "
        "removed, ranked over the whole model",
        "written_by": "make golden",
        "relative_tolerance": RELATIVE_TOLERANCE,
        "cosine_sum": dense.statistics.cosine_sum.tolist(),
        "sublayer_cosine_sum": {kind: total.tolist() for kind, total in dense.statistics.sublayer_cosine_sum.items()},
        "methods": methods,
    }


def _entry(of: Case, method: str, options: Mapping[str, Any], kind: str) -> dict[str, Any]:
    try:
        scores = score_units(
            method,
            of.statistics,
            of.geometry,
            [kind],
            load_tensor=of.model.state_dict().get,
            options=options,
            removal_losses={kind: [0.25, 0.5]},
            masks=of.masks.get(kind),
            **of.evidence,
        )
    except ConfigError as error:
        return {"refused": str(error)}
    entry: dict[str, Any] = {"scores": [layer.tolist() for layer in scores.values[kind]]}
    if kind in BUDGETS:
        shapes = {name: tuple(parameter.shape) for name, parameter in of.model.named_parameters()}
        plan = make_plan(scores, of.geometry, shapes, Request({BUDGETS[kind]: 0.34}, shape="uneven"))
        entry["keep"] = [layer["keep"] for layer in plan.to_dict()["layers"][kind]]
    return entry
