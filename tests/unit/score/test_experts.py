"""Scores of routed experts, their channels and shared experts equal what is worked out by hand from the sums."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import ConfigError
from secateur.families.loader import families
from secateur.records.routing import EXTREMES, SUMS, RoutingSums
from secateur.records.scores import Scores, ranked_experts
from secateur.records.statistics import BucketStatistics, mix_buckets
from secateur.records.units import EXPERT, EXPERT_CHANNEL, FUSED_KINDS, LAYER_UNIT_KINDS, SHARED_CHANNEL
from secateur.score import METHODS, TextRecords, rehearse, score_units
from secateur.score.routed import guarded
from secateur.score.stun import merge_heights
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import WITH_EXPERTS, geometry_of
from tests.unit.calibrate.test_routing import dense, layers_of, reference, statistics

CHANNEL_METHODS = ("activation_norm", "contextual", "fluctuation", "magnitude", "minitron", "wanda")
EXPERT_METHODS = ("easy_ep", "expert_norm", "frequency", "gate_mass", "reap", "stun")


def score(method: str, name: str, found: BucketStatistics, kind: str = EXPERT, **options: Any) -> list[Tensor]:
    """Return a method's scores of every layer of a pico model."""
    model = dense(name)
    geometry = geometry_of(model, families()[name])
    load = model.state_dict().get
    return list(score_units(method, found, geometry, [kind], load_tensor=load, options=options).values[kind])


def by_hand(sums: Mapping[str, Tensor], method: str) -> Tensor:
    """Return a score of experts from sums over 50 tokens."""
    if method == "reap":
        return torch.where(sums["routed"] > 0, sums["gate_norm"] / sums["routed"], 0.0)
    field = {"easy_ep": "gate_norm_change", "expert_norm": "norm", "frequency": "routed", "gate_mass": "gate"}[method]
    return sums[field] / 50


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "olmoe"])
def test_expert_scores_are_those_worked_out_token_by_token(name: str) -> None:
    """From router weights, single experts' outputs and the residual stream; layers without experts have none."""
    texts = hand_made_blocks().texts
    found, theirs = statistics(name, HandMadeBlocks(texts, [[i] for i in range(7)], 16)), reference(name, texts)
    for method in ("easy_ep", "expert_norm", "frequency", "gate_mass", "reap"):
        scores = score(method, name, found)
        assert [len(layer) for layer in scores] == [8 if layer in theirs else 0 for layer in range(2)]
        for layer, sums in theirs.items():
            torch.testing.assert_close(scores[layer], by_hand(sums, method), rtol=1e-9, atol=1e-13)


def clusters_by_hand(rows: Tensor) -> list[float]:
    """Return merge heights with lists of members, looking at every pair of clusters each time."""
    clusters = {i: [i] for i in range(len(rows))}
    heights = [0.0] * len(rows)
    height = 0.0
    while len(clusters) > 1:
        height, a, b = min(
            (max(float((rows[i] - rows[j]).norm()) for i in clusters[a] for j in clusters[b]), a, b)
            for a in clusters
            for b in clusters
            if a < b
        )
        merged = clusters[a] + clusters[b]
        mean = rows[merged].mean(0)
        nearer = (rows[a] - mean).norm() <= (rows[b] - mean).norm()
        if len(merged) == 2:
            nearer = rows[a].norm() >= rows[b].norm()
        stays, goes = (a, b) if nearer else (b, a)
        heights[goes] = height
        clusters[stays] = merged
        del clusters[goes]
    heights[next(iter(clusters))] = 2 * height
    return heights


@pytest.mark.parametrize("num", [1, 2, 7, 12])
def test_merging_agrees_with_clusters_kept_as_lists(num: int) -> None:
    """Heights of complete linkage, and who stands for whom; heights never fall as clusters grow."""
    rows = torch.randn(num, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(num))
    found = merge_heights(rows)
    assert found.tolist() == pytest.approx(clusters_by_hand(rows), rel=1e-12)


def test_of_experts_with_one_router_row_one_stays() -> None:
    """Whatever else the layer holds, twins are merged first, so one of them scores 0."""
    rows = torch.eye(6, dtype=torch.float64)
    rows[4] = rows[1]
    found = merge_heights(rows)
    assert sorted([float(found[1]), float(found[4])])[0] == 0.0
    assert int((found == 0.0).sum()) == 1


def test_stun_reads_the_router_alone() -> None:
    """Nothing else of the model is asked for, and no text matters."""
    model = dense("mixtral")
    geometry = geometry_of(model, families()["mixtral"])
    asked = []

    def load(name: str) -> Tensor | None:
        asked.append(name)
        return model.state_dict().get(name)

    found = statistics("mixtral", hand_made_blocks())
    scores = score_units("stun", found, geometry, [EXPERT], load_tensor=load).values[EXPERT]
    assert asked == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]
    assert torch.equal(scores[1], merge_heights(model.model.layers[1].mlp.gate.weight.detach()))


def made_up(**values: Sequence[float]) -> RoutingSums:
    """Return sums of three experts; those that are not given are 1."""
    ones = {name: [1.0, 1.0, 1.0] for name in (*SUMS, *EXTREMES)}
    return RoutingSums(10, **{name: torch.tensor(v).double() for name, v in {**ones, **values}.items()})


def test_the_guard_puts_super_experts_on_top_in_their_order() -> None:
    """Only what is beyond the multiple of the median counts, and scores stay finite and in the range of the others."""
    scores = torch.tensor([3.0, 1.0, 2.0]).double()
    routing = made_up(max_activation=[1.0, 50.0, 2.0])
    assert guarded(scores, routing, 0.0) is scores
    assert guarded(scores, routing, 10.0).argsort(descending=True).tolist() == [1, 0, 2]
    assert guarded(scores, routing, 30.0).tolist() == scores.tolist()
    both = guarded(scores, made_up(max_activation=[1.0, 50.0, 90.0]), 0.5)
    assert both.argsort(descending=True).tolist() == [2, 1, 0]
    assert float(guarded(scores * 0, routing, 10.0)[1]) > 0.0


def test_the_guard_compares_with_experts_that_got_a_token() -> None:
    """Where most got none, those that got some are not all extreme."""
    scores = torch.tensor([0.0, 1.0, 2.0]).double()
    assert guarded(scores, made_up(routed=[0, 1, 1], max_activation=[0.0, 1.0, 2.0]), 20.0).tolist() == [0.0, 1.0, 2.0]
    assert guarded(scores, made_up(routed=[0, 0, 0], max_activation=[0.0, 0.0, 0.0]), 20.0) is scores


@pytest.mark.parametrize("method", [name for name in EXPERT_METHODS if name != "stun"])
def test_the_guard_is_an_option_of_methods_that_look_at_text(method: str) -> None:
    """It is off by default, and refuses what is no multiple."""
    found = statistics("qwen3_moe", hand_made_blocks())
    largest = found.routing[1, EXPERT].max_activation
    factor = 0.999 * float(largest.max() / largest.median())
    assert int(score(method, "qwen3_moe", found, guard=factor)[1].argmax()) == int(largest.argmax())
    assert torch.equal(score(method, "qwen3_moe", found, guard=0.0)[1], score(method, "qwen3_moe", found)[1])
    with pytest.raises(ConfigError, match="guard"):
        score(method, "qwen3_moe", found, guard=-1.0)


def shards() -> dict[str, BucketStatistics]:
    """Return the statistics of a long and a short text."""
    blocks = hand_made_blocks()
    rows = {"long": [[1, 0], [2], [6]], "short": [[3, 4]]}
    return {
        name: statistics("qwen3_moe", HandMadeBlocks(blocks.texts, lines, 16, name)) for name, lines in rows.items()
    }


def test_a_mixture_is_the_published_rule_for_several_domains() -> None:
    """The score is the sum over texts of their share times each expert's part of the layer's total there."""
    texts = shards()
    alone = {name: score("easy_ep", "qwen3_moe", found)[1] for name, found in texts.items()}
    expected = alone["long"] / alone["long"].sum() + alone["short"] / alone["short"].sum()
    mixed = score("easy_ep", "qwen3_moe", mix_buckets(texts, {"long": 1, "short": 1}))[1]
    torch.testing.assert_close(mixed / mixed.sum(), expected / 2, rtol=1e-12, atol=0)
    uneven = score("easy_ep", "qwen3_moe", mix_buckets(texts, {"long": 3, "short": 1}))[1]
    expected = 0.75 * alone["long"] / alone["long"].sum() + 0.25 * alone["short"] / alone["short"].sum()
    torch.testing.assert_close(uneven / uneven.sum(), expected, rtol=1e-12, atol=0)


def test_mixing_scales_sums_and_keeps_counts_and_largest_values() -> None:
    """Totals per token are the weighted means of the texts'; largest values are those of any text."""
    texts = shards()
    mixed = mix_buckets(texts, {"long": 0.9, "short": 0.1}).routing[1, EXPERT]
    parts = [found.routing[1, EXPERT] for found in texts.values()]
    merged = parts[0] + parts[1]
    assert mixed.count == merged.count
    for name in EXTREMES:
        assert torch.equal(getattr(mixed, name), getattr(merged, name))
    for name in SUMS:
        means = [getattr(part, name).sum() / part.count for part in parts]
        torch.testing.assert_close(getattr(mixed, name).sum() / mixed.count, 0.9 * means[0] + 0.1 * means[1])
    expected = 0.9 * parts[0].routed / parts[0].count + 0.1 * parts[1].routed / parts[1].count
    torch.testing.assert_close(mixed.routed / mixed.count, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_a_union_is_the_largest_rank_on_any_text(method: str) -> None:
    """Experts are units like others there."""
    model, texts = dense("qwen3_moe"), shards()
    geometry = geometry_of(model, families()["qwen3_moe"])
    together = mix_buckets(texts, {"long": 1, "short": 1})
    found = score_units(
        method,
        together,
        geometry,
        [EXPERT],
        load_tensor=model.state_dict().get,
        buckets=["long", "short"],
        by_bucket={name: TextRecords(text, (name,)) for name, text in texts.items()},
        combine="union",
    ).values[EXPERT][1]
    ranks = [
        torch.tensor([float((alone <= value).sum() - (alone == value).sum() + 1) / 8 for value in alone])
        for alone in (score(method, "qwen3_moe", text)[1] for text in texts.values())
    ]
    assert found.tolist() == pytest.approx(torch.stack(ranks).amax(0).tolist())


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_channel_methods_read_an_expert_channel_as_a_channel_of_one_wide_projection(name: str) -> None:
    """Whatever the layout of the fused tensors: by hand from every expert's own columns of the down projection."""
    model, layer = dense(name), layers_of(name)[-1].layer
    found = statistics(name, hand_made_blocks())
    module = model.get_submodule(layers_of(name)[-1].module)
    down = module.down_proj.detach()
    columns = [down[e].T if module.is_transposed else down[e] for e in range(8)]  # hidden x width
    reader = torch.cat(columns, dim=1)
    moments = found.moments[layer, EXPERT_CHANNEL]
    scores = {m: score(m, name, found, EXPERT_CHANNEL)[layer] for m in CHANNEL_METHODS}
    torch.testing.assert_close(scores["contextual"], moments.sum_abs / 50, rtol=1e-12, atol=0)
    torch.testing.assert_close(scores["wanda"], reader.abs().mean(0) * (moments.sum_sq / 50).sqrt(), rtol=1e-12, atol=0)
    own = own_weights(module)
    torch.testing.assert_close(scores["magnitude"], own.square().sum(1).sqrt(), rtol=1e-12, atol=0)
    with pytest.raises(ConfigError, match=r"at: linear is defined for.*got expert_channel"):
        score("contextual", name, found, EXPERT_CHANNEL, at="linear")


def own_weights(module: Any) -> Tensor:
    """Return every weight of every channel of every expert, a row per channel."""
    rows = []
    for expert in range(module.num_experts):
        up, down = module.gate_up_proj[expert].detach(), module.down_proj[expert].detach()
        up, down = (up.T, down.T) if module.is_transposed else (up, down)
        gates = (up[::2], up[1::2]) if module.has_bias else up.chunk(2)
        parts = [*gates, down.T]
        if module.has_bias:
            bias = module.gate_up_proj_bias[expert].detach()
            parts += [bias[::2, None], bias[1::2, None]]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def test_shared_channels_are_scored_as_channels_of_any_linear_layer() -> None:
    """With all that a linear layer has: its own weights, and what it says before the activation function."""
    model, found = dense("qwen2_moe"), statistics("qwen2_moe", hand_made_blocks())
    shared = model.model.layers[1].mlp.shared_expert
    moments = found.moments[1, SHARED_CHANNEL]
    wanda = shared.down_proj.weight.detach().abs().mean(0) * (moments.sum_sq / 50).sqrt()
    torch.testing.assert_close(score("wanda", "qwen2_moe", found, SHARED_CHANNEL)[1], wanda, rtol=1e-12, atol=0)
    assert len(score("contextual", "qwen2_moe", found, SHARED_CHANNEL, at="linear")[1]) == 24
    assert len(score("magnitude", "qwen2_moe", found, SHARED_CHANNEL)[0]) == 0


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.gram or m.gradient or m.impact or m.mask])
def test_methods_that_need_a_linear_layer_refuse_what_is_fused(name: str) -> None:
    """Before any text is read, with the methods that can."""
    geometry = geometry_of(dense("qwen3_moe"), families()["qwen3_moe"])
    for kind in FUSED_KINDS:
        with pytest.raises(ConfigError, match=rf"{name} scores .* cannot score units of kind {kind}.*Set prune.method"):
            rehearse(name, geometry, [kind], {})


def test_magnitude_of_experts_is_refused_with_what_can_score_them() -> None:
    """Methods of channels are no methods of experts, and the other way round."""
    geometry = geometry_of(dense("qwen3_moe"), families()["qwen3_moe"])
    with pytest.raises(ConfigError, match=r"contextual .*cannot score units of kind expert\. .*easy_ep"):
        rehearse("contextual", geometry, [EXPERT], {})
    with pytest.raises(ConfigError, match=r"easy_ep scores expert and cannot score units of kind gqa_group"):
        rehearse("easy_ep", geometry, ["gqa_group"], {})
    for method in (*EXPERT_METHODS, "random", "reversed", "contrast"):
        rehearse(method, geometry, [EXPERT], {}, ["law"])


def test_controls_and_contrast_value_experts_by_easy_ep_unless_told_otherwise() -> None:
    """Their usual method cannot; one that is named and cannot is refused."""
    found = statistics("qwen3_moe", hand_made_blocks())
    easy, reap = (score(method, "qwen3_moe", found)[1] for method in ("easy_ep", "reap"))
    assert torch.equal(score("reversed", "qwen3_moe", found)[1], -easy)
    assert torch.equal(score("reversed", "qwen3_moe", found, of="reap")[1], -reap)
    with pytest.raises(ConfigError, match=r"wanda .*cannot score units of kind expert"):
        score("reversed", "qwen3_moe", found, of="wanda")
    drawn = score("random", "qwen3_moe", found)
    assert [len(layer) for layer in drawn] == [0, 8]
    assert set(METHODS["random"].kinds) >= set(LAYER_UNIT_KINDS)


def test_ranked_experts_are_lists_that_a_server_can_cut() -> None:
    """One plain object per layer with experts, best first, ties by index."""
    values = [torch.zeros(0).double(), torch.tensor([0.5, 2.0, 0.5, 1.0]).double()]
    lines = list(ranked_experts(Scores("easy_ep", {}, (), {EXPERT: values})))
    assert lines == [{"layer": 1, "experts": [1, 3, 0, 2], "scores": [2.0, 1.0, 0.5, 0.5]}]
    assert json.loads(json.dumps(lines)) == lines
    assert list(ranked_experts(Scores("wanda", {}, (), {"ffn_channel": values}))) == []
