"""Whole sub-layers and layers of every family: taken out, saved, loaded, run with a cache, and pruned again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.allocate.budget import parameters_after
from secateur.calibrate import collect, collect_grams
from secateur.errors import FamilyError, PlanError
from secateur.evaluate.output_change import patched
from secateur.families.geometry import Geometry, parameters_by_part
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.units import ATTENTION, FFN, FFN_CHANNEL, GQA_GROUP, LAYER
from secateur.score import score_units
from secateur.shrink import check_plan
from secateur.shrink.stand_in_weights import StandInWeights
from secateur.store.checkpoints import compare_reloaded, save_model
from tests.blocks import hand_made_blocks
from tests.conftest import PICO_SIZES, geometry_of, pico_config, pico_model
from tests.pruning import Kept, logits, masked, plan_keeping, prune, relative_difference

NUM_LAYERS = 4
Cut = tuple[Sequence[int], Sequence[int], bool]
"""(layers without attention, layers without FFN, whether channels and groups of others go too)."""
CUTS: dict[str, Cut] = {
    "first layer": ([0], [0], False),
    "a layer": ([2], [2], False),
    "attention": ([3], [], False),
    "ffn": ([], [0], False),
    "all": ([0, 3], [0, 1], True),
}
each_cut = pytest.mark.parametrize("cut", CUTS.values(), ids=list(CUTS))


def deep_model(family: Family, dtype: torch.dtype = torch.float64, **extra: Any) -> Any:
    """Return a random model of four layers; where a family knows types of attention, they alternate."""
    depth = family.dimensions["num_layers"].config
    options: dict[str, Any] = {str(depth): NUM_LAYERS}
    if family.blocks.layer_types:
        types = ["sliding_attention", "full_attention"] * 2
        options |= {"sliding_window": 4, "use_sliding_window": True, family.blocks.layer_types: types}
    return pico_model(family, dtype, **{**options, **extra})


def kept_of(geometry: Geometry, cut: Cut) -> Kept:
    """Return the units that stay; with narrower sub-layers, a unit or two of every other one goes."""
    no_attention, no_ffn, narrow = cut
    kept: dict[str, list[list[int]]] = {}
    for kind, gone in ((FFN_CHANNEL, no_ffn), (GQA_GROUP, no_attention)):
        axes = geometry.axes[kind]
        removed = 1 if narrow and not axes[0].fixed else 0
        kept[kind] = [
            []
            if axis.layer in gone or not axis.num_units
            else list(range(removed * (1 + axis.layer % 2), axis.num_units))
            for axis in axes
        ]
    return kept


def shape_of(cut: Cut) -> str:
    """Return the shape of a plan that makes a cut."""
    return "uniform" if cut[0] == cut[1] and not cut[2] else "uneven"


def pruned_by(model: Any, geometry: Geometry, cut: Cut) -> Any:
    """Return the model without the cut."""
    return prune(model, plan_keeping(geometry, kept_of(geometry, cut), shape_of(cut)), geometry)


@contextmanager
def without(model: nn.Module, geometry: Geometry, cut: Cut) -> Iterator[None]:
    """Make the given sub-layers add nothing, and mask the channels that go elsewhere; the dense modules still run.

    The sub-layer's last module, the norm after it included, gives zeros; this shares no code with the removal.
    """
    kept = kept_of(geometry, cut)
    whole = {
        kind: [
            units if len(units) else list(range(axis.num_units))
            for units, axis in zip(per_layer, geometry.axes[kind], strict=True)
        ]
        for kind, per_layer in kept.items()
    }
    with ExitStack() as stack, masked(model, geometry, whole):
        for kind, layers in ((ATTENTION, cut[0]), (FFN, cut[1])):
            for layer in layers:
                sublayer = getattr(geometry.family.blocks, kind.lower())
                for name in (*sublayer.modules, *sublayer.norms):
                    module = model.get_submodule(f"{geometry.layer_name(layer)}.{name}")
                    stack.callback(module.register_forward_hook(_zeros).remove)
        yield


def _zeros(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)


def token_ids() -> Tensor:
    """Return random token ids, longer than the sliding windows."""
    return torch.randint(0, PICO_SIZES["vocab_size"], (2, 11), generator=torch.Generator().manual_seed(1))


@each_cut
def test_a_model_without_blocks_is_the_dense_one_with_these_silenced(family: Family, cut: Cut) -> None:
    """Logits agree in float64, parameters are those that the arithmetic promises, and none of the removed is left."""
    model = deep_model(family)
    geometry = geometry_of(model, family)
    pruned = pruned_by(model, geometry, cut)
    with without(model, geometry, cut):
        expected = logits(model, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= 1e-12
    assert relative_difference(expected, logits(model, token_ids())) > 1e-3, "the removed blocks did nothing"

    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    removed = {
        kind: [axis.num_units - len(units) for axis, units in zip(geometry.axes[kind], per_layer, strict=True)]
        for kind, per_layer in kept_of(geometry, cut).items()
    }
    left = {name: tuple(parameter.shape) for name, parameter in pruned.named_parameters()}
    assert parameters_by_part(left, geometry_of(pruned, family)) == parameters_after(shapes, geometry, removed)
    num_layers = NUM_LAYERS - len(set(cut[0]) & set(cut[1]))
    assert geometry_of(pruned, family).num_layers == num_layers == len(pruned.get_submodule(family.layers))
    assert pruned.config.model_type == ("" if shape_of(cut) == "uniform" else "pruned_") + family.model_types[0]


@each_cut
def test_stand_in_weights_predict_what_the_model_without_blocks_predicts(family: Family, cut: Cut) -> None:
    """Searches measure candidates by them; sub-layers that go whole and narrower ones, in one patch."""
    model = deep_model(family)
    geometry = geometry_of(model, family)
    kept = kept_of(geometry, cut)
    load = dict(model.named_parameters()).get
    stand_ins = StandInWeights(geometry, load, lambda kind, layer, count: kept[kind][layer])
    expected = logits(pruned_by(model, geometry, cut), token_ids())
    with patched(model, stand_ins.patch({kind: [len(units) for units in layers] for kind, layers in kept.items()})):
        assert relative_difference(logits(model, token_ids()), expected) <= 1e-12


@each_cut
def test_it_reloads_and_generates_with_and_without_a_cache(family: Family, cut: Cut, tmp_path: Path) -> None:
    """Key by key the same after a reload; with the last cut also beam search and static caches say the same text."""
    from transformers import AutoModelForCausalLM

    model = deep_model(family, torch.float32)
    pruned = pruned_by(model, geometry_of(model, family), cut)
    save_model(pruned, tmp_path)
    prompt = token_ids()
    assert compare_reloaded(pruned, tmp_path, {"input_ids": prompt}, tolerance=0.0) == 0.0
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert (reloaded.config.get_text_config().to_dict().get("per_layer_config") is None) == (shape_of(cut) == "uniform")
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
    }
    with torch.inference_mode():
        plain = reloaded.generate(prompt, use_cache=False, **options)
        assert torch.equal(reloaded.generate(prompt, **options), plain)
        if cut is not CUTS["all"]:
            return
        beams = reloaded.generate(prompt, use_cache=False, num_beams=3, **options)
        assert torch.equal(reloaded.generate(prompt, num_beams=3, **options), beams)
        static = reloaded.generate(prompt, cache_implementation="static", disable_compile=True, **options)
        assert torch.equal(static, plain)


def test_a_model_without_blocks_can_be_profiled_and_pruned_again(family: Family) -> None:
    """Geometry, statistics and Gram matrices pass over what is gone; a second cut equals silencing the first model."""
    model = deep_model(family)
    once = pruned_by(model, geometry_of(model, family), ([3], [1], False))
    geometry = geometry_of(once, family)
    assert [bool(n) for n in geometry.num_units(GQA_GROUP)] == [True, True, True, False]
    assert [bool(n) for n in geometry.num_units(FFN_CHANNEL)] == [True, False, True, True]
    blocks = hand_made_blocks()
    statistics = collect(once, blocks, geometry)
    assert (3, GQA_GROUP) not in statistics.moments
    assert len(collect_grams(once, blocks, geometry, [FFN_CHANNEL]).sums) == 3
    scores = score_units(
        "random", statistics, geometry, [FFN_CHANNEL, ATTENTION, LAYER], load_tensor=once.state_dict().get
    )
    assert [len(layer) for layer in scores.values[ATTENTION]] == [1, 1, 1, 0]
    assert [len(layer) for layer in scores.values[FFN_CHANNEL]] == [64, 0, 64, 64]

    second: Cut = ([3], [1, 3], False)  # layer 3 loses what it has left, and goes
    kept = {kind: list(units) for kind, units in kept_of(geometry, second).items()}
    kept[FFN_CHANNEL][0] = list(range(3, 40))
    twice = prune(once, plan_keeping(geometry, kept, "uneven"), geometry)
    whole = {FFN_CHANNEL: [kept[FFN_CHANNEL][0], *([range(64)] * 3)]}
    last = once.get_submodule(geometry.layer_name(3))
    present = {FFN_CHANNEL: [units for layer, units in enumerate(whole[FFN_CHANNEL]) if layer != 1]}
    handle = last.register_forward_hook(lambda _module, args, _output: args[0])
    with masked(once, _without_layer(geometry, 1), present):
        expected = logits(once, token_ids())
    handle.remove()
    assert relative_difference(logits(twice, token_ids()), expected) <= 1e-12
    again = geometry_of(twice, family)
    assert (again.num_layers, again.num_units(FFN_CHANNEL)) == (3, [37, 0, 64])


def _without_layer(geometry: Geometry, layer: int) -> Geometry:
    """Return a geometry whose axes leave a layer out, for masking."""
    from dataclasses import replace

    axes = {kind: tuple(axis for axis in axes if axis.layer != layer) for kind, axes in geometry.axes.items()}
    return replace(geometry, axes=axes)


def test_the_first_layer_of_each_type_keeps_its_attention(family: Family) -> None:
    """A plan that takes it is refused, with what to do; so is the second layer's where the first goes entirely."""
    model = deep_model(family)
    geometry = geometry_of(model, family)
    words = (
        r"leaves layer {} without attention, and it would be the first layer.*Keep its attention, or remove the whole"
    )
    for cut, layer in ((([0], [], False), 0), (([0, 1], [0], False), 1)):
        with pytest.raises(PlanError, match=words.format(layer)):
            check_plan(plan_keeping(geometry, kept_of(geometry, cut), "uneven"), geometry)
    if family.blocks.layer_types:
        with pytest.raises(PlanError, match="first layer of type full_attention"):
            check_plan(plan_keeping(geometry, kept_of(geometry, ([1], [], False)), "uneven"), geometry)
    else:
        check_plan(plan_keeping(geometry, kept_of(geometry, ([1], [], False)), "uneven"), geometry)


@pytest.mark.parametrize(
    ("name", "option", "cut", "words"),
    [
        (
            "opt",
            {"do_layer_norm_before": False},
            ([1], [], False),
            "kind attention cannot be taken out of this opt model",
        ),
        ("opt", {"do_layer_norm_before": False}, ([], [1], False), "kind ffn cannot be taken out of this opt model"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, ([1], [1], False), "a layer's index scales its attention"),
    ],
)
def test_blocks_that_cannot_be_taken_out_say_why(name: str, option: dict[str, Any], cut: Cut, words: str) -> None:
    """Where a configuration key changes what a layer does; the other blocks of such a model still can be."""
    family = families()[name]
    model = deep_model(family, **option)
    geometry = geometry_of(model, family)
    with pytest.raises(FamilyError, match=words):
        check_plan(plan_keeping(geometry, kept_of(geometry, cut), shape_of(cut)), geometry)
    other: Cut = ([1], [1], False) if name == "opt" else ([2], [1], False)
    pruned = pruned_by(model, geometry, other)
    if name == "gpt2":
        with without(model, geometry, other):
            assert relative_difference(logits(pruned, token_ids()), logits(model, token_ids())) <= 1e-12


def test_every_list_with_an_entry_per_layer_is_declared(family: Family) -> None:
    """A configuration's lists that are as long as the model is deep are among those that are cut with the layers."""
    depth = str(family.dimensions["num_layers"].config)
    long, longer = (pico_config(family, **{depth: n}).to_dict() for n in (7, 11))
    grown = {
        key for key, value in long.items() if isinstance(value, list) and (len(value), len(longer[key])) == (7, 11)
    }
    assert grown <= set(family.blocks.per_layer)
