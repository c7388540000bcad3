"""Running a method over a whole model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate import collect, collect_gradients, collect_impacts
from secateur.errors import CheckpointError, ConfigError, FamilyError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.gram import GramsInMemory
from secateur.records.masks import MaskStatistics
from secateur.records.statistics import BucketStatistics
from secateur.records.units import ATTENTION, BLOCK_KINDS, QUERY_HEAD, REQUIRED_UNIT_KINDS, SITE_OF
from secateur.score import METHODS, Evidence, Method, TextRecords, rehearse, score_units
from secateur.score.run import unit_weights
from tests.blocks import hand_made_blocks
from tests.conftest import DENSE, geometry_of, pico_model
from tests.unit.score.grams import grams_of
from tests.variants import variants


@cache
def calibrated(name: str) -> tuple[Any, Geometry, BucketStatistics]:
    """Return a pico model, its geometry and its statistics."""
    family = families()[name]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    return model, geometry, collect(model, hand_made_blocks(), geometry)


def refuse(name: str) -> Tensor:
    """Fail: no weights are needed here."""
    raise AssertionError(f"{name} was read")


def test_every_layer_of_every_kind_gets_its_own_scores() -> None:
    """Scores come per kind and layer, from the statistics of that place, with the record filled in."""
    _, geometry, statistics = calibrated("llama")
    scores = score_units(
        "contextual",
        statistics,
        geometry,
        ["ffn_channel", "gqa_group"],
        load_tensor=refuse,
        options={"at": "activation"},
        buckets=["medical"],
        inputs_fingerprint="abc",
    )
    assert (scores.method, dict(scores.options), tuple(scores.buckets)) == (
        "contextual",
        {"at": "activation"},
        ("medical",),
    )
    assert scores.inputs_fingerprint == "abc"
    for layer in range(2):
        moments = statistics.moments[layer, "ffn_channel"]
        torch.testing.assert_close(scores.values["ffn_channel"][layer], moments.sum_abs / 50)
        moments = statistics.moments[layer, "gqa_group"]
        torch.testing.assert_close(scores.values["gqa_group"][layer], (moments.sum_abs / 50).reshape(3, 16).mean(1))


def test_linear_statistics_reach_the_method() -> None:
    """``at: linear`` is the smaller of the gate's and the up projection's mean absolute output."""
    _, geometry, statistics = calibrated("llama")
    scores = score_units(
        "contextual", statistics, geometry, ["ffn_channel"], load_tensor=refuse, options={"at": "linear"}
    )
    gate, up = (statistics.linear_abs[1, f"ffn_channel.linear{i}"] / 50 for i in range(2))
    torch.testing.assert_close(scores.values["ffn_channel"][1], torch.minimum(gate, up))


def test_weights_come_by_name_from_the_loader() -> None:
    """Only tensors of the asked kind are read, and missing biases are asked for without harm."""
    model, geometry, statistics = calibrated("llama")
    state, asked = model.state_dict(), []

    def load(name: str) -> Tensor | None:
        asked.append(name)
        return state.get(name)

    score_units("magnitude", statistics, geometry, ["gqa_group"], load_tensor=load)
    assert "model.layers.0.self_attn.q_proj.weight" in asked
    assert "model.layers.1.self_attn.q_proj.bias" in asked
    assert not any("mlp" in name for name in asked)


def test_the_seed_reaches_methods_that_draw() -> None:
    """Random scores follow the seed."""
    _, geometry, statistics = calibrated("llama")
    runs = [
        score_units("random", statistics, geometry, ["ffn_channel"], load_tensor=refuse, seed=seed).values
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0]["ffn_channel"][0], runs[1]["ffn_channel"][0])
    assert not torch.equal(runs[0]["ffn_channel"][0], runs[2]["ffn_channel"][0])


def test_unknown_methods_and_options_are_refused_before_scoring() -> None:
    """Both name what is known."""
    _, geometry, statistics = calibrated("llama")
    with pytest.raises(ConfigError, match=r"unknown method 'contextul'. Did you mean 'contextual'"):
        score_units("contextul", statistics, geometry, ["ffn_channel"], load_tensor=refuse)
    with pytest.raises(ConfigError, match="unknown option of method contextual 'ta'"):
        score_units("contextual", statistics, geometry, ["ffn_channel"], load_tensor=refuse, options={"ta": 1})


def test_units_that_cannot_be_cut_are_not_scored() -> None:
    """A family's fixed units are refused with its reason."""
    _, geometry, statistics = calibrated("gpt2")
    with pytest.raises(FamilyError, match="gqa_groups of a gpt2 model cannot be cut: GPT-2 derives"):
        score_units("contextual", statistics, geometry, ["gqa_group"], load_tensor=refuse)


def test_scores_that_are_not_finite_are_refused() -> None:
    """Method, kind and layer are named."""
    model, geometry, statistics = calibrated("llama")
    state = {**model.state_dict()}
    broken = state["model.layers.1.mlp.up_proj.weight"].clone()
    broken[3, 4] = torch.nan
    state["model.layers.1.mlp.up_proj.weight"] = broken
    with pytest.raises(
        CheckpointError, match=r"method magnitude gave scores that are not finite.*ffn_channels of layer 1"
    ):
        score_units("magnitude", statistics, geometry, ["ffn_channel"], load_tensor=state.get)
    moments = statistics.moments[0, "ffn_channel"]
    empty = replace(statistics, moments={**statistics.moments, (0, "ffn_channel"): replace(moments, count=0)})
    with pytest.raises(CheckpointError, match="layer 0"):
        score_units("contextual", empty, geometry, ["ffn_channel"], load_tensor=refuse)


@pytest.mark.parametrize("name", DENSE)
def test_unit_weights_are_all_the_weights_of_the_cut_layers(name: str) -> None:
    """Over all units the slices of an axis hold every element of the layers they cut, once, and no reader bias.

    Query heads share a fused weight with keys and values, which are not theirs.
    """
    model, geometry, _ = calibrated(name)
    state = model.state_dict()
    for axes in geometry.axes.values():
        axis = axes[1]
        slices = unit_weights(axis, state.get, geometry.family.weight_layout)
        assert all(matrix.shape[0] == axis.num_units for matrix in slices)
        cut = {(segment.module, segment.side) for segment in axis.segments}
        rows = {m: 48 if axis.kind == QUERY_HEAD and side == "out" else None for m, side in cut}
        expected = [state[f"{module}.weight"][: rows[module]].reshape(-1) for module, _ in sorted(cut)]
        expected += [state[f"{m}.bias"] for m, side in sorted(cut) if side == "out" and f"{m}.bias" in state]
        if not expected:
            assert axis.fixed and not slices
            continue
        held = torch.cat([matrix.reshape(-1) for matrix in slices])
        assert torch.equal(held.sort().values, torch.cat(expected).sort().values)


def test_a_unit_holds_its_own_rows_and_columns() -> None:
    """Group 1 of a pico phi3 in numbers: its query, key and value rows of the fused weight, its output columns."""
    model, geometry, _ = calibrated("phi3")
    attention = model.model.layers[0].self_attn
    fused, output = attention.qkv_proj.weight.detach(), attention.o_proj.weight.detach()
    queries, keys, values, columns = unit_weights(geometry.axes["gqa_group"][0], model.state_dict().get, "out_in")
    assert torch.equal(queries[1], fused[16:32].reshape(-1))
    assert torch.equal(keys[1], fused[48 + 8 : 48 + 16].reshape(-1))
    assert torch.equal(values[1], fused[48 + 24 + 8 : 48 + 24 + 16].reshape(-1))
    assert torch.equal(columns[1], output.T[16:32].reshape(-1))


WIDTH_METHODS = [name for name in METHODS if set(REQUIRED_UNIT_KINDS) <= set(METHODS[name].kinds)]
PLAIN_METHODS = "activation_norm, contextual, fluctuation, magnitude, minitron, wanda"
"""What needs neither Gram matrices nor gradients."""
GRAM_METHODS = [name for name in METHODS if METHODS[name].gram]


@cache
def grams(name: str) -> GramsInMemory:
    """Return the Gram matrices of a pico model on the same blocks as its statistics."""
    model, geometry, _ = calibrated(name)
    return grams_of(model, hand_made_blocks(), geometry)


@pytest.fixture
def seen() -> Iterator[list[Evidence]]:
    """What a method that looks at everything was shown, site by site; it is called ``a looking method``."""
    shown: list[Evidence] = []

    def look(evidence: Evidence, /) -> Tensor:
        """Return nothing useful."""
        shown.append(evidence)
        return torch.zeros(evidence.num_units).double()

    words = {name: "words" for name in ("measures", "formula", "needs", "cost", "caveat", "source")}
    METHODS.add("a looking method", Method("a looking method", look, **words, gram=True))
    yield shown
    del METHODS._items["a looking method"]


@pytest.mark.parametrize("name", DENSE)
def test_the_reader_maps_what_was_summed_to_the_layers_output(name: str, seen: list[Evidence]) -> None:
    """Whatever the layout on disk: the weight times a channel vector (plus bias) is the reading module's output."""
    model, geometry, statistics = calibrated(name)
    kinds = [kind for kind in REQUIRED_UNIT_KINDS if not geometry.axes[kind][0].fixed]
    score_units("a looking method", statistics, geometry, kinds, load_tensor=model.state_dict().get)
    axes = [axis for kind in kinds for axis in geometry.axes[kind]]
    for axis, evidence in zip(axes, seen, strict=True):
        module = model.get_submodule(axis.reader)
        mean = (evidence.moments.sum / evidence.moments.count)[None]
        expected = module(mean) - module(torch.zeros_like(mean))
        torch.testing.assert_close(mean @ evidence.load_reader().T, expected.detach(), rtol=1e-10, atol=1e-12)


def test_the_gram_matrix_is_the_symmetric_mean_of_its_own_site(seen: list[Evidence]) -> None:
    """Float64 whatever the sums were kept in, equal to its transpose, with the second moments on its diagonal."""
    model, geometry, statistics = calibrated("llama")
    exact = grams("llama")
    tilted = {key: (value + value.triu(1) * 1e-6).float() for key, value in exact.sums.items()}
    load = model.state_dict().get
    for sums in (exact, GramsInMemory(exact.count, tilted)):
        seen.clear()
        score_units("a looking method", statistics, geometry, REQUIRED_UNIT_KINDS, load_tensor=load, grams=sums)
        assert [(item.layer, item.kind) for item in seen] == [
            (i, kind) for kind in REQUIRED_UNIT_KINDS for i in range(2)
        ]
        for item in seen:
            gram = item.load_gram()
            assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
            torch.testing.assert_close(gram, exact.sums[item.layer, SITE_OF[item.kind]] / 50, rtol=2e-6, atol=1e-8)
            torch.testing.assert_close(gram.diagonal(), item.moments.sum_sq / 50, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", GRAM_METHODS)
def test_methods_that_need_gram_matrices_say_so_where_there_are_none(method: str) -> None:
    """The message says what to do, and which methods do without."""
    model, geometry, statistics = calibrated("llama")
    load = model.state_dict().get
    for name, options in ((method, {}), ("reversed", {"of": method})):
        with pytest.raises(ConfigError) as caught:
            score_units(name, statistics, geometry, ["ffn_channel"], load_tensor=load, options=options)
        assert str(caught.value) == (
            f"method {name} needs Gram matrices, and the calibration took none; calibrate with them, or use a method "
            f"that does without: {PLAIN_METHODS}."
        )


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].gradient])
def test_methods_that_need_gradients_say_so_where_there_are_none(method: str) -> None:
    """The message says what to do, and which methods do without; rehearsing is not refused."""
    _, geometry, statistics = calibrated("llama")
    for name, options in ((method, {}), ("reversed", {"of": method})):
        with pytest.raises(ConfigError) as caught:
            how: dict[str, Any] = {"options": options, "grams": grams("llama")}
            score_units(name, statistics, geometry, ["gqa_group"], load_tensor=refuse, **how)
        assert str(caught.value) == (
            f"method {name} needs gradients, and these statistics hold none; take them with the calibration "
            f"(gradients=True), or use a method that does without: {PLAIN_METHODS}."
        )
        rehearse(name, geometry, REQUIRED_UNIT_KINDS, options)


def test_gradients_reach_the_method_site_by_site() -> None:
    """Each place gets its own sums."""
    model, geometry, statistics = calibrated("llama")
    gradients = collect_gradients(model, hand_made_blocks(), geometry, REQUIRED_UNIT_KINDS, outputs=True)
    scores = score_units(
        "fisher", statistics, geometry, REQUIRED_UNIT_KINDS, load_tensor=refuse, gradients=gradients
    ).values
    for (layer, kind), units in gradients.units.items():
        torch.testing.assert_close(scores[kind][layer], units.mask_sq / 4)


def test_gram_matrices_are_read_only_by_methods_that_need_them() -> None:
    """Their source may be a file per site."""
    model, geometry, statistics = calibrated("llama")

    class Closed:
        count = 50

        def load(self, site: tuple[int, str]) -> Tensor:
            raise AssertionError(f"{site} was read")

    load = model.state_dict().get
    gradients = collect_gradients(model, hand_made_blocks(), geometry, ["ffn_channel"], sketch=True)
    impacts = collect_impacts(model, hand_made_blocks(), geometry, ["ffn_channel"])
    text = TextRecords(statistics, ("general",), Closed(), gradients, impacts)
    trained = MaskStatistics(
        50, 0.0, {axis.site: torch.ones(axis.num_units, dtype=torch.float64) for axis in geometry.axes["ffn_channel"]}
    )
    have: dict[str, Any] = {"grams": Closed(), "gradients": gradients, "impacts": impacts, "masks": trained}
    for method in set(WIDTH_METHODS) - set(GRAM_METHODS):
        score_units(
            method, statistics, geometry, ["ffn_channel"], load_tensor=load, by_bucket={"general": text}, **have
        )


def test_what_is_known_of_a_bucket_alone_reaches_the_method() -> None:
    """Everything that is known of a text, under its name; a bucket that nothing is known of is refused by name."""
    model, geometry, statistics = calibrated("llama")
    other = collect(model, hand_made_blocks(seed=3), geometry)
    texts = {"general": TextRecords(other, ("general",))}
    load, how = model.state_dict().get, {"options": {"by": "ratio"}}
    scores = score_units("contrast", statistics, geometry, ["ffn_channel"], load_tensor=load, by_bucket=texts, **how)
    here, there = (
        score_units("activation_norm", text, geometry, ["ffn_channel"], load_tensor=load).values["ffn_channel"][1]
        for text in (statistics, other)
    )
    expected = (here / here.mean() + 1e-3) / (there / there.mean() + 1e-3)
    torch.testing.assert_close(scores.values["ffn_channel"][1], expected)
    with pytest.raises(ConfigError, match=r"contrast looks at bucket 'general' alone, .*\(there are law\)"):
        texts = {"law": texts["general"]}
        score_units("contrast", statistics, geometry, ["ffn_channel"], load_tensor=load, by_bucket=texts)


def test_impacts_that_were_not_taken_are_asked_for() -> None:
    """The message says what to do, and which methods do without."""
    _, geometry, statistics = calibrated("llama")
    with pytest.raises(ConfigError, match=f"cus_prun needs to know .*impacts=True.* without: {PLAIN_METHODS}"):
        score_units("cus_prun", statistics, geometry, ["ffn_channel"], load_tensor=refuse)


def test_rehearsing_knows_the_buckets() -> None:
    """What does not fit them is refused before any text is run."""
    geometry = calibrated("llama")[1]
    options = {"dimensions": {"language": ["zh"]}}
    rehearse("cus_prun", geometry, REQUIRED_UNIT_KINDS, options, ["zh"])
    with pytest.raises(ConfigError, match="leaves out law, whose text decides"):
        rehearse("cus_prun", geometry, REQUIRED_UNIT_KINDS, options, ["zh", "law"])
    with pytest.raises(ConfigError, match="no text for domain"):
        rehearse("cus_prun", geometry, REQUIRED_UNIT_KINDS, {"dimensions": {"language": ["zh"], "domain": []}}, ["zh"])
    with pytest.raises(ConfigError, match="bucket 'general' against itself"):
        rehearse("contrast", geometry, REQUIRED_UNIT_KINDS, {}, ["general"])


@pytest.mark.parametrize("method", GRAM_METHODS)
def test_a_gram_matrix_without_an_inverse_is_refused_in_words(method: str) -> None:
    """64 channels on 50 tokens have no inverse without a ridge; the message names the place and the option."""
    model, geometry, statistics = calibrated("llama")
    load, sums = model.state_dict().get, grams("llama")
    silent = {key: torch.diag(torch.arange(len(value))).double() for key, value in sums.sums.items()}
    for source in (GramsInMemory(50, silent), GramsInMemory(50, {key: v.float() for key, v in silent.items()})):
        with pytest.raises(ConfigError) as caught:
            options = {"ridge": 0.0}
            score_units(method, statistics, geometry, ["ffn_channel"], load_tensor=load, options=options, grams=source)
        assert str(caught.value) == (
            f"method {method} with options {{'ridge': 0.0}} cannot invert the Gram matrix of the ffn_channels of layer "
            "0: 64 channels were seen on too little text, or copy each other. Raise option ridge, or calibrate on more "
            "text."
        )


@pytest.mark.parametrize("method", GRAM_METHODS)
def test_a_gram_matrix_that_is_not_finite_is_refused(method: str) -> None:
    """Kind and layer are named."""
    model, geometry, statistics = calibrated("llama")
    sums = {key: value.clone() for key, value in grams("llama").sums.items()}
    sums[1, "gqa_group"][2, 3] = torch.inf
    broken, load = GramsInMemory(50, sums), model.state_dict().get
    gradients = collect_gradients(model, hand_made_blocks(), geometry, ["gqa_group"], outputs=True)
    with pytest.raises(CheckpointError, match=r"Gram matrix of the gqa_groups of layer 1 holds NaN or infinity"):
        score_units(method, statistics, geometry, ["gqa_group"], load_tensor=load, grams=broken, gradients=gradients)


@pytest.mark.parametrize("method", list(METHODS))
def test_every_method_can_be_rehearsed(method: str) -> None:
    """Nothing is read, and the only refusal is one that the method makes of itself."""
    for name in ("llama", "phi", "qwen2_moe"):
        geometry = calibrated(name)[1] if name in DENSE else geometry_of(pico_model(families()[name]), families()[name])
        kinds = [kind for kind in METHODS[method].kinds if kind in (*geometry.axes, *BLOCK_KINDS)]
        for options in variants(method):
            try:
                rehearse(method, geometry, kinds, options)
            except ConfigError as error:
                assert options == {"at": "linear"} and "gqa_group" in str(error)


def test_a_rehearsal_of_a_large_model_takes_no_time() -> None:
    """Made-up evidence is small, whatever the size of the layer: a matrix of the real size would not fit here."""
    _, geometry, _ = calibrated("llama")
    huge = {
        kind: tuple(replace(axis, num_units=10**7, reader_width=axis.reader_width * 10**5) for axis in axes)
        for kind, axes in geometry.axes.items()
    }
    for method in WIDTH_METHODS:
        rehearse(method, replace(geometry, axes=huge), REQUIRED_UNIT_KINDS, {})


def test_a_rehearsal_refuses_what_the_run_would_refuse() -> None:
    """Options are checked, alone and together."""
    _, geometry, _ = calibrated("llama")
    with pytest.raises(ConfigError, match="option ridge of method obs should be"):
        rehearse("obs", geometry, ["ffn_channel"], {"ridge": -1})
    with pytest.raises(ConfigError, match="got step 4 without greedy: true"):
        rehearse("obs", geometry, ["ffn_channel"], {"step": 4})


def test_second_order_scores_are_those_of_the_sums_at_hand() -> None:
    """The one-shot OBS score of a group, by hand from the model's own weight and the Gram matrix of that layer."""
    model, geometry, statistics = calibrated("llama")
    load = model.state_dict().get
    scores = score_units("obs", statistics, geometry, ["gqa_group"], load_tensor=load, grams=grams("llama"))
    gram = grams("llama").sums[1, "gqa_group"] / 50
    inverse = torch.linalg.inv(gram + 0.01 * gram.diagonal().mean() * torch.eye(48).double())
    weight = model.model.layers[1].self_attn.o_proj.weight.detach()[:, 16:32]
    expected = torch.trace(weight @ torch.linalg.inv(inverse[16:32, 16:32]) @ weight.T)
    torch.testing.assert_close(scores.values["gqa_group"][1][1], expected)


MEASURED_METHODS = [name for name in METHODS if METHODS[name].measure]


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_measured_methods_pass_on_what_was_measured(method: str) -> None:
    """Of each block its own number; the scores say that they are an order already."""
    _, geometry, statistics = calibrated("llama")
    measured = {kind: [3.5 + number, 2.5 - number] for number, kind in enumerate(BLOCK_KINDS)}
    scores = score_units(
        method, statistics, geometry, BLOCK_KINDS, load_tensor=refuse, depth_method=method, removal_losses=measured
    )
    assert {kind: [layer.item() for layer in layers] for kind, layers in scores.values.items()} == measured
    assert scores.cumulative
    plain = score_units("block_influence", statistics, geometry, BLOCK_KINDS, load_tensor=refuse)
    mixed = score_units("contextual", statistics, geometry, ["ffn_channel"], load_tensor=refuse, depth_method=method)
    assert not plain.cumulative and not mixed.cumulative


@pytest.mark.parametrize("method", MEASURED_METHODS)
def test_without_text_blocks_cannot_be_measured(method: str) -> None:
    """The message names the way that has text, and the methods that need none."""
    _, geometry, statistics = calibrated("llama")
    words = r"runs text each time.*Use a recipe \(secateur run, or secateur\.run\), or depth_method: block_influence\."
    with pytest.raises(ConfigError, match=words):
        score_units(method, statistics, geometry, [ATTENTION], load_tensor=refuse)
