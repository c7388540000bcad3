"""What every family promises: a shrunk model is the masked dense model, on disk too; a new TOML joins by existing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from secateur.allocate.budget import parameters_after, parameters_by_part
from secateur.errors import FamilyError
from secateur.families.geometry import build_geometry
from secateur.families.loader import UNEVEN_PREFIX, family_of
from secateur.families.schema import Family
from secateur.records.units import FFN_CHANNEL, GQA_GROUP, QUERY_HEAD, REQUIRED_UNIT_KINDS, SITE_KINDS
from secateur.stream.forward import run_logits
from tests.blocks import lay_blocks, random_documents
from tests.conftest import PICO_SIZES, geometry_of, pico_config, pico_model
from tests.pruning import choose_units, logits, masked, plan_keeping, prune, relative_difference

KINDS = {
    "ffn": (FFN_CHANNEL,),
    "groups": (GQA_GROUP,),
    "heads": (QUERY_HEAD,),
    "both": (FFN_CHANNEL, GQA_GROUP),
    "ffn-heads": (FFN_CHANNEL, QUERY_HEAD),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest difference of logits, relative to the largest logit."""

kinds_and_shapes = pytest.mark.parametrize(
    ("kinds", "shape"),
    [(kinds, shape) for kinds in KINDS.values() for shape in ("uniform", "uneven")],
    ids=[f"{name}-{shape}" for name in KINDS for shape in ("uniform", "uneven")],
)


def token_ids(rows: int = 2, length: int = 11) -> torch.Tensor:
    """Return random token ids of the pico vocabulary."""
    return torch.randint(0, PICO_SIZES["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def cuttable(family: Family, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Return ``kinds``, or skip where this family cannot cut one of them."""
    fixed = {axis.name: axis.fixed for axis in family.axes}
    for kind in kinds:
        if fixed[kind]:
            pytest.skip(f"{family.name}: {fixed[kind]}")
    return kinds


def all_cuttable(family: Family) -> tuple[str, ...]:
    """Return every kind that this family can cut, of kinds that are not parts of each other."""
    return tuple(axis.name for axis in family.axes if not axis.fixed and axis.name in SITE_KINDS)


def test_a_kind_that_cannot_be_cut_says_why_in_a_sentence(family: Family) -> None:
    """FFN channels can be cut in every family; where groups or query heads cannot, the reason is a readable clause."""
    reasons = {axis.name: axis.fixed for axis in family.axes}
    assert reasons[FFN_CHANNEL] is None
    for reason in filter(None, reasons.values()):
        assert len(reason.split()) >= 8
        assert not reason.endswith(".")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@kinds_and_shapes
def test_shrunk_logits_equal_masked_logits(
    family: Family, kinds: tuple[str, ...], shape: str, dtype: torch.dtype
) -> None:
    """Removing units is the same as silencing them at the input of the projection that reads them."""
    model = pico_model(family, dtype)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, cuttable(family, kinds), shape)
    pruned = prune(model, plan_keeping(geometry, kept, shape), geometry)
    dense = logits(model, token_ids())
    with masked(model, geometry, kept):
        expected = logits(model, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= TOLERANCE[dtype]
    assert relative_difference(expected, dense) > 1e-3, "the removed units did nothing; the test would prove nothing"


def test_a_configuration_without_optional_sizes_can_be_cut(family: Family) -> None:
    """A size with a default in the family file need not be said when a configuration is made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = {"num_key_value_heads"}  # class defaults of this one do not divide the pico head count
    given |= {name for name, dimension in family.dimensions.items() if not dimension.default}
    sizes = {d.config: PICO_SIZES[name] for name, d in family.dimensions.items() if d.config and name in given}
    config = AutoConfig.for_model(family.model_types[0], pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, all_cuttable(family), "uneven")
    pruned = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    with masked(model, geometry, kept):
        expected = logits(model, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_head_and_embedding_stay_as_tied_as_they_were(family: Family, tied: bool) -> None:
    """Pruning neither ties nor unties the output head, and both kinds of model can be pruned."""
    model = pico_model(family, tie_word_embeddings=tied)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, (FFN_CHANNEL,), "uneven")
    pruned = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    head, embedding = pruned.get_output_embeddings().weight, pruned.get_input_embeddings().weight
    assert (head is embedding) is tied
    with masked(model, geometry, kept):
        expected = logits(model, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", REQUIRED_UNIT_KINDS)
def test_removed_constants_live_on_in_the_bias(family: Family, kind: str) -> None:
    """Where the reader has a bias, a removed channel held at a constant is folded into it exactly."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    axes = geometry.axes[kind]
    names = dict(model.named_parameters())
    if axes[0].fixed or f"{axes[0].reader}.bias" not in names:
        pytest.skip("this reader has no bias, or these units cannot be cut")
    kept = choose_units(geometry, (kind,), "uneven")
    constants = {}
    for axis, units in zip(axes, kept[kind], strict=True):
        gone = [unit * axis.reader_width for unit in range(axis.num_units) if unit not in units]
        constants[axis.layer, kind] = {channel: 0.5 - 0.1 * i for i, channel in enumerate(gone[::2])}
    pruned = prune(model, plan_keeping(geometry, kept, "uneven", constants), geometry)
    with masked(model, geometry, kept):
        zeroed = logits(model, token_ids())
    with masked(model, geometry, kept, constants):
        expected = logits(model, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= TOLERANCE[torch.float64]
    assert relative_difference(expected, zeroed) > 1e-3


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_the_saved_model_loads_again_and_says_the_same(family: Family, shape: str, tmp_path: Path) -> None:
    """A folder reloads with the Auto class to equal logits; a uniform one needs none of our classes."""
    from transformers import AutoModelForCausalLM

    model = pico_model(family, torch.float32)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, all_cuttable(family), shape)
    pruned = prune(model, plan_keeping(geometry, kept, shape), geometry)
    pruned.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(logits(reloaded, token_ids()), logits(pruned, token_ids()))

    config = json.loads((tmp_path / "config.json").read_text())
    counts = {kind: [len(units) for units in per_layer] for kind, per_layer in kept.items()}
    if shape == "uniform":
        assert config["model_type"] == family.model_types[0]
        assert "per_layer_config" not in config
        assert type(reloaded).__module__.startswith("transformers.")
        for kind, per_layer in counts.items():
            expected = geometry.config_updates(kind, per_layer[0])
            assert {key: config[key] for key in expected} == expected
    else:
        assert config["model_type"] == UNEVEN_PREFIX + family.model_types[0]
        assert set(config["per_layer_config"]) <= {"0", "1"}
        assert family_of(config["model_type"]) == family
    for data in (config, reloaded.config.to_dict()):
        again = build_geometry(family, data)
        assert {kind: [axis.num_units for axis in again.axes[kind]] for kind in counts} == counts


def test_an_uneven_model_generates_the_same_with_and_without_a_cache(family: Family, tmp_path: Path) -> None:
    """Keys and values of layers with different head counts are cached right."""
    from transformers import AutoModelForCausalLM

    model = pico_model(family, torch.float32)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, all_cuttable(family), "uneven")
    prune(model, plan_keeping(geometry, kept, "uneven"), geometry).save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    prompt = token_ids()
    greedy: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "do_sample": False,
        "max_new_tokens": 6,
        "min_new_tokens": 6,
    }
    with torch.inference_mode():
        cached = reloaded.generate(prompt, use_cache=True, **greedy)
        plain = reloaded.generate(prompt, use_cache=False, **greedy)
    assert cached.shape == (2, 17)
    assert torch.equal(cached, plain)


@kinds_and_shapes
def test_the_promised_parameter_count_is_the_real_one(family: Family, kinds: tuple[str, ...], shape: str) -> None:
    """The allocator's arithmetic agrees with the tensors of the pruned model, part by part."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, cuttable(family, kinds), shape)
    pruned = prune(model, plan_keeping(geometry, kept, shape), geometry)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    real: dict[str, int] = dict.fromkeys(parameters_by_part(shapes, geometry), 0)
    for name, parameter in pruned.named_parameters():
        real[geometry.part_of(name)] += parameter.numel()
    removed = {
        kind: [axis.num_units - len(units) for axis, units in zip(geometry.axes[kind], per_layer, strict=True)]
        for kind, per_layer in kept.items()
    }
    assert parameters_after(shapes, geometry, removed) == real
    assert sum(real.values()) < model.num_parameters()


def test_every_part_of_a_model_is_found(family: Family) -> None:
    """Embedding, attention and feed-forward parameters are told apart; what is left over are norms."""
    model = pico_model(family, tie_word_embeddings=False)
    geometry = geometry_of(model, family)
    parts: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        parts.setdefault(geometry.part_of(name), []).append(name)
    assert set(parts) == {"embedding", "attention", "ffn", "head", "other"}
    assert all("norm" in name or "ln_" in name for name in parts["other"]), parts["other"]


@pytest.mark.parametrize("first", [QUERY_HEAD, GQA_GROUP])
@pytest.mark.parametrize("again", ["uneven", "uniform"])
def test_query_heads_and_groups_go_one_after_the_other(family: Family, first: str, again: str) -> None:
    """In a model that lost some of one kind, unevenly, the other kind is cut right, with as many left as were asked."""
    cuttable(family, (QUERY_HEAD, GQA_GROUP))
    model = pico_model(family, num_attention_heads=12, head_dim=4)
    geometry = geometry_of(model, family)
    kept = {QUERY_HEAD: [[0, 1, 3, 5, 6, 9, 4, 8, 10], [0, 4, 8]], GQA_GROUP: [[0, 2], [1]]}
    start = {first: [sorted(units) for units in kept[first]]}
    once = prune(model, plan_keeping(geometry, start, "uneven"), geometry)
    uneven = geometry_of(once, family)
    second = GQA_GROUP if first == QUERY_HEAD else QUERY_HEAD
    then: dict[str, list[list[int]]]
    if second == GQA_GROUP:
        then = {GQA_GROUP: [[0, 2], [0, 1]] if again == "uniform" else [[0, 2], [1]]}
    else:
        then = {QUERY_HEAD: [[1, 6], [0, 3]] if again == "uniform" else [[0, 1, 4, 7], [2]]}
    if again == "uniform" and not uneven.is_allowed(second, len(then[second][0])):
        pytest.skip("this family's configuration refuses that count")
    twice = prune(once, plan_keeping(uneven, then, again), uneven)
    with masked(once, uneven, then):
        expected = logits(once, token_ids())
    assert relative_difference(logits(twice, token_ids()), expected) <= TOLERANCE[torch.float64]
    assert relative_difference(expected, logits(once, token_ids())) > 1e-3


def test_query_heads_go_beside_whole_layers_and_sub_layers(family: Family) -> None:
    """One layer goes, one loses its attention, the others lose heads; the model says what the masked one says."""
    cuttable(family, (QUERY_HEAD,))
    key = str(family.dimensions["num_layers"].config)
    model = pico_model(family, **{key: 4})
    geometry = geometry_of(model, family)
    heads, groups, channels = (geometry.num_units(kind)[0] for kind in (QUERY_HEAD, GQA_GROUP, FFN_CHANNEL))
    half = list(range(1, heads, 2))
    whole = list(range(groups))
    kept: dict[str, list[list[int]]] = {
        QUERY_HEAD: [half, [], [], list(range(heads))],
        GQA_GROUP: [whole, [], [], whole],
        FFN_CHANNEL: [list(range(channels)), [], list(range(channels)), list(range(channels))],
    }
    try:
        geometry.require_removable(("attention",))
    except FamilyError as error:
        pytest.skip(str(error))
    pruned = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    once = prune(model, plan_keeping(geometry, {k: v for k, v in kept.items() if k != QUERY_HEAD}, "uneven"), geometry)
    between = geometry_of(once, family)
    left = {QUERY_HEAD: [half, [], list(range(heads))]}
    mask = replace(between, axes={**between.axes, QUERY_HEAD: between.axes[QUERY_HEAD][:1]})
    with masked(once, mask, {QUERY_HEAD: [half]}):
        expected = logits(once, token_ids())
    assert relative_difference(logits(pruned, token_ids()), expected) <= TOLERANCE[torch.float64]
    twice = prune(once, plan_keeping(between, left, "uneven"), between)
    assert torch.equal(logits(twice, token_ids()), logits(pruned, token_ids()))


def test_every_unit_owns_a_channel_of_its_reader(family: Family) -> None:
    """The units of an axis fill the input of the projection that reads them, no more and no less."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    in_dim = 1 if family.weight_layout == "out_in" else 0
    for axes in geometry.axes.values():
        assert [axis.layer for axis in axes] == list(range(PICO_SIZES["num_layers"]))
        for axis in axes:
            weight = model.get_submodule(axis.reader).weight
            assert weight.shape[in_dim] == axis.num_units * axis.reader_width


@pytest.mark.parametrize("uneven", [False, True], ids=["dense", "uneven"])
def test_a_packed_document_reads_as_if_it_were_alone(family: Family, uneven: bool) -> None:
    """Neighbours and padding in a block change nothing about a document's logits.

    Within 1e-6 even in float64: some attention functions take their softmax in float32. A leak would be near 1.
    """
    model = pico_model(family)
    if uneven:
        geometry = geometry_of(model, family)
        kept = choose_units(geometry, all_cuttable(family), "uneven")
        model = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    texts = random_documents([7, 5, 9])
    batch = lay_blocks(texts, [[0, 1], [2]], 16)
    with torch.inference_mode():
        packed = run_logits(model, batch, family)
    for document, ids in enumerate(texts):
        alone = logits(model, torch.tensor([ids]))[0]
        assert relative_difference(packed[batch.document == document], alone) <= 1e-6


def test_sliding_windows_survive_pruning_and_packing(family: Family) -> None:
    """Where attention is limited to a window, it still is in an uneven model and in a packed block."""
    if not hasattr(pico_config(family), "sliding_window"):
        pytest.skip("this family has no sliding windows")
    window = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    model = pico_model(family, **window)
    geometry = geometry_of(model, family)
    kept = choose_units(geometry, all_cuttable(family), "uneven")
    pruned = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    texts = random_documents([12, 7])
    alone = logits(pruned, torch.tensor(texts[:1]))
    with masked(model, geometry, kept):
        assert relative_difference(alone, logits(model, torch.tensor(texts[:1]))) <= TOLERANCE[torch.float64]
    with masked(wide := pico_model(family), geometry, kept):
        assert relative_difference(alone, logits(wide, torch.tensor(texts[:1]))) > 1e-3, "the window did nothing"
    batch = lay_blocks(texts, [[1, 0]], 20)
    with torch.inference_mode():
        packed = run_logits(pruned, batch, family)
    assert relative_difference(packed[batch.document == 0], alone[0]) <= 1e-6


@pytest.mark.parametrize("shape", ["uneven", "uniform"])
def test_an_uneven_model_can_be_pruned_again(family: Family, shape: str) -> None:
    """A second plan on an uneven model's own geometry equals masking that model, whatever the second plan's shape."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    kinds = all_cuttable(family)
    first = {kind: [units[:] for units in choose_units(geometry, kinds, "uneven")[kind]] for kind in kinds}
    if shape == "uniform":  # the first cut is uneven in name but takes as many groups everywhere
        first = {kind: [[0, 2], [1, 2]] if kind == GQA_GROUP else first[kind] for kind in kinds}
    once = prune(model, plan_keeping(geometry, first, "uneven"), geometry)
    uneven = geometry_of(once, family)
    if shape == "uniform":
        second: Any = {GQA_GROUP: [[1], [0]]} if GQA_GROUP in kinds else {FFN_CHANNEL: [range(3, 13), range(10)]}
    else:
        second = choose_units(uneven, (FFN_CHANNEL,), "uneven", seed=5)
    twice = prune(once, plan_keeping(uneven, second, shape), uneven)
    with masked(once, uneven, second):
        expected = logits(once, token_ids())
    assert relative_difference(logits(twice, token_ids()), expected) <= TOLERANCE[torch.float64]
    again = geometry_of(twice, family)
    for kind, per_layer in {**first, **second}.items():
        assert [axis.num_units for axis in again.axes[kind]] == [len(units) for units in per_layer]


def test_pico_configurations_say_what_the_family_reads(family: Family) -> None:
    """The geometry gives back the sizes that the configuration was made from."""
    geometry = build_geometry(family, pico_config(family).to_dict())
    for name in set(PICO_SIZES) & set(geometry.dimensions):
        assert geometry.dimensions[name] == PICO_SIZES[name]
