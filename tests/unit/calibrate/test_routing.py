"""Sums of routed experts equal those taken token by token and expert by expert with the model's own modules."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import collect, collect_gradients, collect_grams, collect_impacts, learn_masks
from secateur.calibrate.routing import require_plain_experts, run_experts, turned
from secateur.errors import CheckpointError, FamilyError
from secateur.families.geometry import RoutedExperts
from secateur.families.loader import families
from secateur.files import CACHE_VARIABLE
from secateur.records.masks import MaskSettings
from secateur.records.routing import EXTREMES, SUMS, RoutingSums
from secateur.records.statistics import BucketStatistics, merge_buckets
from secateur.records.units import EXPERT, EXPERT_CHANNEL, FUSED_KINDS, SHARED_CHANNEL
from secateur.store.checkpoints import load_model, resolve_model
from secateur.stream.sources import LazyLayers
from secateur.stream.streamed import StreamedModel
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import WITH_EXPERTS, geometry_of, pico_model

every_family = pytest.mark.parametrize("name", WITH_EXPERTS)
SCALED = {"granitemoe": {"residual_multiplier": 0.3}}
"""What a family's layers do to the experts' output before they add it."""
FLOAT32_ROUTERS = ("deepseek_v2", "deepseek_v3")
"""Families whose routers compute in float32 whatever the model's dtype; how they round depends on the batch."""


def moe_model(name: str, dtype: torch.dtype = torch.float64) -> Any:
    """Return the pico model of a family; transformers has no other experts than eager ones in float64."""
    model = pico_model(families()[name], dtype, **SCALED.get(name, {}))
    model.set_experts_implementation("eager")
    return model


@cache
def dense(name: str) -> Any:
    """Return the same model each time; where the router corrects its scores, by random numbers."""
    model = moe_model(name)
    for buffer_name, buffer in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.2)
    return model


def statistics(name: str, blocks: HandMadeBlocks, batch_size: int = 2, dtype: Any = torch.float64) -> BucketStatistics:
    """Return the statistics of a pico model."""
    model = dense(name) if dtype == torch.float64 else copy.deepcopy(dense(name)).to(dtype)
    return collect(model, blocks, geometry_of(model, families()[name]), batch_size=batch_size)


def layers_of(name: str) -> list[RoutedExperts]:
    """Return the experts of every layer that has some."""
    return [experts for experts in geometry_of(dense(name), families()[name]).experts if experts is not None]


def alone(module: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return what one expert makes of every token, by the module's own forward: sent there with weight 1."""
    index = torch.full((len(hidden), 1), expert)
    output: Tensor = module(hidden, index, torch.ones(len(hidden), 1, dtype=hidden.dtype))
    return output


def activation_of(module: Any, hidden: Tensor, expert: int) -> Tensor:
    """Return what enters an expert's down projection."""
    weight = module.gate_up_proj[expert] if module.is_transposed else module.gate_up_proj[expert].T
    inner = hidden @ weight + (module.gate_up_proj_bias[expert] if module.has_bias else 0.0)
    activation: Tensor = module._apply_gate(inner)
    return activation


def reference(name: str, texts: Sequence[Sequence[int]]) -> dict[int, dict[str, Tensor]]:
    """Return all sums by layer, one document, token and expert after the other, through plain hooks."""
    model, heard = dense(name), {}
    totals: dict[int, dict[str, Any]] = {experts.layer: defaultdict(float) for experts in layers_of(name)}
    scale = SCALED.get(name, {}).get("residual_multiplier", 1.0)
    for experts in layers_of(name):

        def on_experts(_m: Any, args: Any, output: Any, layer: int = experts.layer) -> None:
            heard[layer, "experts"] = (*args, output)

        def on_norm(_m: Any, args: Any, layer: int = experts.layer) -> None:
            heard[layer, "stream"] = args[0][0]

        model.get_submodule(experts.module).register_forward_hook(on_experts)
        norm = model.get_submodule(f"model.layers.{experts.layer}.post_attention_layernorm")
        norm.register_forward_pre_hook(on_norm)
    try:
        with torch.inference_mode():
            for ids in texts:
                model(torch.tensor([list(ids)]), use_cache=False)
                caught = dict(heard)  # asking single experts below is heard too
                for experts in layers_of(name):
                    add_document(totals[experts.layer], model, experts, caught, scale)
    finally:
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
    return {layer: {key: torch.as_tensor(value) for key, value in found.items()} for layer, found in totals.items()}


def add_document(total: Any, model: Any, experts: RoutedExperts, heard: Any, scale: float) -> None:
    """Add what one document did in one layer."""
    hidden, index, gates, added = heard[experts.layer, "experts"]
    stream = heard[experts.layer, "stream"]
    module = model.get_submodule(experts.module)
    channels = torch.zeros(len(hidden), experts.num_experts, experts.width, dtype=hidden.dtype)
    for expert in range(experts.num_experts):
        output, activation = alone(module, hidden, expert), activation_of(module, hidden, expert)
        one = torch.zeros(experts.num_experts).double()
        one[expert] = 1.0
        for token, slot in (index == expert).nonzero().tolist():
            gate, norm = float(gates[token, slot]), float(output[token].norm())
            before, after = stream[token], stream[token] + scale * added[token]
            change = max(0.0, 1.0 - float(before @ after / (before.norm() * after.norm())))
            for key, value in zip(SUMS, (1.0, gate, norm, gate * norm, gate * norm * change), strict=True):
                total[key] = total[key] + one * value
            for key, value in zip(EXTREMES, (norm, float(activation[token].abs().max())), strict=True):
                total[key] = torch.maximum(torch.as_tensor(total[key]).expand(len(one)), one * value)
            channels[token, expert] = gate * activation[token]
    flat = channels.flatten(1)
    total["sum"] += flat.sum(0)
    total["sum_abs"] += flat.abs().sum(0)
    total["sum_sq"] += flat.square().sum(0)
    total["mean_abs_sq"] += flat.abs().mean(0).square()


@every_family
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)], ids=str)
def test_what_runs_instead_gives_what_the_module_gives(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Whatever the tensors' layout, biases and gates; also where an expert gets no token, or all of them."""
    experts = layers_of(name)[-1]
    module = moe_model(name, dtype).get_submodule(experts.module)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 48, dtype=dtype, generator=generator)
    spread = torch.rand(20, experts.num_experts, generator=generator).topk(experts.per_token).indices
    gates = torch.rand(20, experts.per_token, dtype=dtype, generator=generator)
    for index in (spread, torch.tensor([[5, 2]]).expand(20, 2)):
        with torch.inference_mode():
            expected = module(hidden, index, gates)
            found, pairs = run_experts(module, hidden, index, gates)
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            assert pairs.expert.tolist() == sorted(index.flatten().tolist())
            for row in (0, 13, 39):
                lone = alone(module, hidden, int(pairs.expert[row]))[pairs.token[row]]
                torch.testing.assert_close(pairs.output[row], lone, rtol=tolerance, atol=tolerance)


@every_family
def test_sums_are_those_of_every_token_and_expert_alone(name: str) -> None:
    """Of documents in padded blocks: every sum per expert, and over tokens and blocks per channel of every expert."""
    texts = hand_made_blocks().texts
    ours = statistics(name, HandMadeBlocks(texts, [[i] for i in range(7)], 16), batch_size=3)
    theirs = reference(name, texts)
    close = {"rtol": 1e-6 if name in FLOAT32_ROUTERS else 1e-10, "atol": 1e-9 if name in FLOAT32_ROUTERS else 1e-12}
    assert set(ours.routing) == {(layer, EXPERT) for layer in theirs}
    for (layer, _), routing in ours.routing.items():
        moments, sequences = ours.moments[layer, EXPERT_CHANNEL], ours.sequences[layer, EXPERT_CHANNEL]
        assert (routing.count, moments.count, sequences.count) == (50, 50, 7)
        assert float(routing.routed.sum()) == 50 * layers_of(name)[0].per_token
        for key in (*SUMS, *EXTREMES):
            torch.testing.assert_close(getattr(routing, key), theirs[layer][key].double(), **close)
        for key in ("sum", "sum_abs", "sum_sq"):
            torch.testing.assert_close(getattr(moments, key), theirs[layer][key], **close)
        torch.testing.assert_close(sequences.mean_abs_sq, theirs[layer]["mean_abs_sq"], **close)


def assert_same_routing(first: BucketStatistics, second: BucketStatistics, tolerance: float = 1e-6) -> None:
    """Assert that two statistics say the same of experts and their channels, up to float rounding."""
    assert first.routing.keys() == second.routing.keys() != set()
    for key, routing in first.routing.items():
        assert routing.count == second.routing[key].count
        for field in (*SUMS, *EXTREMES):
            mine, other = getattr(routing, field), getattr(second.routing[key], field)
            torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    assert first.moments.keys() == second.moments.keys()
    for key, moments in first.moments.items():
        torch.testing.assert_close(moments.sum_sq, second.moments[key].sum_sq, rtol=tolerance, atol=tolerance)


@every_family
def test_neither_batches_nor_padding_nor_shards_matter(name: str) -> None:
    """Blocks may be wider, batches larger, and the sums of two shards add up to those of all text."""
    blocks = hand_made_blocks()
    whole = statistics(name, blocks)
    assert_same_routing(whole, statistics(name, blocks, batch_size=4))
    assert_same_routing(whole, statistics(name, replace(blocks, block_size=24)))
    shards = [statistics(name, replace(blocks, rows=rows)) for rows in (blocks.rows[:1], blocks.rows[1:])]
    assert_same_routing(whole, merge_buckets(*shards))


@every_family
def test_float32_gives_the_same_sums_to_its_own_precision(name: str) -> None:
    """Nothing is lost in the pass; a token whose experts tie within rounding would be an exception."""
    blocks = hand_made_blocks()
    exact, single = (statistics(name, blocks, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for key, routing in exact.routing.items():
        assert torch.equal(routing.routed, single.routing[key].routed)
        torch.testing.assert_close(routing.gate_norm, single.routing[key].gate_norm, rtol=1e-4, atol=1e-6)


@every_family
def test_a_model_read_layer_by_layer_gives_the_same_sums(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole or from disk, with the weights of one layer at a time."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    copy.deepcopy(dense(name)).to(torch.float32).save_pretrained(tmp_path / "model")
    checkpoint = resolve_model(str(tmp_path / "model"))
    whole = collect(load_model(checkpoint, device="cpu"), hand_made_blocks(), checkpoint.geometry, batch_size=2)
    streamed = StreamedModel(LazyLayers(checkpoint, device="cpu"))
    assert_same_routing(whole, collect(streamed, hand_made_blocks(), checkpoint.geometry, batch_size=2))


@every_family
def test_the_pass_leaves_the_model_as_it_was(name: str) -> None:
    """No hook and no forward of ours stays behind, also after an error."""
    model = dense(name)
    statistics(name, hand_made_blocks())
    with pytest.raises(IndexError):
        statistics(name, replace(hand_made_blocks(), texts=[[10**6] * 5] * 7))
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_shared_experts_are_heard_as_any_linear_layer() -> None:
    """Where the family describes the shared expert's channels, in layers that have one."""
    found = statistics("qwen2_moe", hand_made_blocks())
    assert {layer for layer, kind in found.moments if kind == SHARED_CHANNEL} == {1}
    assert found.moments[1, SHARED_CHANNEL].count == 50
    assert (1, f"{SHARED_CHANNEL}.linear0") in found.linear_abs
    assert {kind for layer, kind in found.moments if layer == 0} == {"ffn_channel", "gqa_group"}


def test_experts_that_no_token_reaches_have_zero_everywhere() -> None:
    """So scores can tell that nothing is known of them."""
    model = pico_model(families()["gpt_oss"])
    with torch.no_grad():
        model.model.layers[1].mlp.router.bias[3] = -1e4
    found = collect(model, hand_made_blocks(), geometry_of(model, families()["gpt_oss"])).routing[1, EXPERT]
    assert [float(getattr(found, key)[3]) for key in (*SUMS, *EXTREMES)] == [0.0] * 7
    assert float(found.routed.sum()) == 100


def test_turning_is_never_negative_and_counts_the_layers_own_scale() -> None:
    """Parallel additions turn nothing, orthogonal ones of the same length by 1 - 1/sqrt(2)."""
    stream = torch.eye(3, dtype=torch.float64)
    found = turned(stream, torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0, 0, -4.0]]).double(), 0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 1 - 0.5**0.5, 2.0], dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_small_turn_keeps_its_digits() -> None:
    """Also where one channel of the stream is far larger than all others, as in real models."""
    generator = torch.Generator().manual_seed(0)
    stream, added = torch.randn(2, 64, 512, generator=generator, dtype=torch.float64)
    stream[:, 3] *= 300
    added *= 1e-4
    exact = 1 - torch.cosine_similarity(stream, stream + added, dim=1)
    torch.testing.assert_close(turned(stream.float(), added.float()).double(), exact, rtol=1e-3, atol=0)


def test_experts_that_overflow_are_named() -> None:
    """Activations that are not finite say whose they are."""
    model = pico_model(families()["mixtral"], torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.fill_(float("inf"))
    with pytest.raises(CheckpointError, match=r"output of model\.layers\.1\.mlp\.experts are not finite.*float32"):
        collect(model, hand_made_blocks(), geometry_of(model, families()["mixtral"]))


def test_modules_whose_experts_cannot_be_told_apart_are_refused() -> None:
    """Quantised weights, and modules without the interface, before anything runs."""
    module = pico_model(families()["mixtral"]).model.layers[0].mlp.experts
    with pytest.raises(FamilyError, match=r"a\.b is a Linear without num_experts.*5\.15"):
        require_plain_experts(nn.Linear(2, 2), "a.b")
    module.down_proj = nn.Parameter(module.down_proj.data.to(torch.int8), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"a\.b are quantised \(torch\.int8\).*bfloat16"):
        require_plain_experts(module, "a.b")


def test_sums_add_up_and_largest_values_do_not() -> None:
    """Adding two shards adds sums and counts, and takes the larger of the largest values."""
    values = {name: torch.tensor([1.0, 4.0]).double() for name in (*SUMS, *EXTREMES)}
    other = {name: torch.tensor([3.0, 2.0]).double() for name in (*SUMS, *EXTREMES)}
    found = RoutingSums(5, **values) + RoutingSums(7, **other)
    assert found.count == 12
    assert all(getattr(found, name).tolist() == [4.0, 6.0] for name in SUMS)
    assert all(getattr(found, name).tolist() == [3.0, 4.0] for name in EXTREMES)


@pytest.mark.parametrize("kind", FUSED_KINDS)
def test_what_is_taken_at_linear_layers_is_refused_for_experts(kind: str) -> None:
    """Gram matrices, gradients, impacts and masks, before anything runs and with what to do."""
    model, geometry = dense("qwen3_moe"), geometry_of(dense("qwen3_moe"), families()["qwen3_moe"])
    settings = MaskSettings(0.5, steps=1, learning_rate=0.1, objective="kl")
    takes: dict[str, Any] = {
        "Gram matrices": lambda: collect_grams(model, hand_made_blocks(), geometry, [kind]),
        "gradients": lambda: collect_gradients(model, hand_made_blocks(), geometry, [kind]),
        "impacts": lambda: collect_impacts(model, hand_made_blocks(), geometry, [kind]),
        "masks": lambda: learn_masks(model, hand_made_blocks(), geometry, [kind], settings),
    }
    for what, take in takes.items():
        with pytest.raises(FamilyError, match=rf"{what} are taken at .* {kind}s have none.*Leave them"):
            take()


def test_half_precision_gives_what_the_module_gives_to_its_own_precision() -> None:
    """In bfloat16 the sums over an expert's output are still taken in float32."""
    experts = layers_of("mixtral")[-1]
    module = copy.deepcopy(dense("mixtral")).to(torch.bfloat16).get_submodule(experts.module)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 48, generator=generator).bfloat16()
    index = torch.rand(20, 8, generator=generator).topk(2).indices
    gates = torch.rand(20, 2, generator=generator)
    with torch.inference_mode():
        found, pairs = run_experts(module, hidden, index, gates)
        torch.testing.assert_close(found, module(hidden, index, gates), rtol=2e-2, atol=2e-2)
    assert found.dtype == pairs.output.dtype == torch.bfloat16
