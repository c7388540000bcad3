"""The golden numbers: scores and a plan of every method on one seeded pico model and hand-made blocks, in float64."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch

from secateur.allocate import Request, make_plan
from secateur.calibrate import collect, collect_gradients, collect_impacts, learn_masks
from secateur.errors import ConfigError
from secateur.families.loader import families
from secateur.records.masks import MaskSettings
from secateur.records.units import LAYER_UNIT_KINDS
from secateur.score import METHODS, TextRecords, score_units
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.score.grams import grams_of
from tests.variants import variants

FILE = Path(__file__).parent / "methods.json"
RELATIVE_TOLERANCE = 1e-9
"""Float64 sums differ in their last bits between machines; anything above this is a change of meaning."""


def golden_model() -> Any:
    """Return the pico llama whose every parameter is drawn by its name, so that no release of a library moves it."""
    model = pico_model(families()["llama"])
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        parameter.data = torch.rand(parameter.shape, dtype=torch.float64, generator=generator) - 0.5
    return model


def compute() -> dict[str, Any]:
    """Return scores and plans of every method, as plain data."""
    model = golden_model()
    geometry = geometry_of(model, families()["llama"])
    statistics = collect(model, hand_made_blocks(), geometry)
    grams = grams_of(model, hand_made_blocks(), geometry)
    every = {"outputs": True, "sketch": True}
    gradients = collect_gradients(model, hand_made_blocks(), geometry, LAYER_UNIT_KINDS, **every)
    impacts = collect_impacts(model, hand_made_blocks(), geometry, LAYER_UNIT_KINDS)
    short = MaskSettings(target=0.34, steps=4, learning_rate=0.3, objective="loss")
    masks = {kind: learn_masks(model, hand_made_blocks(), geometry, [kind], short) for kind in LAYER_UNIT_KINDS}
    other = hand_made_blocks(seed=1)
    general = TextRecords(
        collect(model, other, geometry),
        ("general",),
        grams_of(model, other, geometry),
        collect_gradients(model, other, geometry, LAYER_UNIT_KINDS, **every),
    )
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    budgets = {kind: {key: 0.34} for kind, key in zip(LAYER_UNIT_KINDS, ("channels", "groups", "heads"), strict=True)}
    methods: dict[str, Any] = {}
    for method in METHODS:
        for options in variants(method):
            entry: dict[str, Any] = {}
            for kind in METHODS[method].kinds:
                try:
                    scores = score_units(
                        method,
                        statistics,
                        geometry,
                        [kind],
                        load_tensor=model.state_dict().get,
                        options=options,
                        grams=grams,
                        gradients=gradients,
                        removal_losses={kind: [0.25, 0.5]},
                        impacts=impacts,
                        by_bucket={"general": general},
                        masks=masks.get(kind),
                    )
                except ConfigError as error:
                    entry[kind] = {"refused": str(error)}
                    continue
                entry[kind] = {"scores": [layer.tolist() for layer in scores.values[kind]]}
                if kind in budgets:
                    plan = make_plan(scores, geometry, shapes, Request(budgets[kind], shape="uneven"))
                    entry[kind]["keep"] = [layer["keep"] for layer in plan.to_dict()["layers"][kind]]
            methods[" ".join([method, *(f"{key}={value}" for key, value in options.items())])] = entry
    return {
        "what": "scores of a seeded pico llama; kept units of a third removed, ranked over the whole model",
        "written_by": "make golden",
        "relative_tolerance": RELATIVE_TOLERANCE,
        "cosine_sum": statistics.cosine_sum.tolist(),
        "sublayer_cosine_sum": {kind: total.tolist() for kind, total in statistics.sublayer_cosine_sum.items()},
        "methods": methods,
    }
