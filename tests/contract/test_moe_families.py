"""What every family with experts promises: a shrunk model is the model whose router never chose what went."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from secateur.allocate.budget import parameters_after, parameters_by_part
from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.families.loader import UNEVEN_PREFIX, families
from secateur.families.schema import Family
from secateur.records.units import (
    ATTENTION,
    EXPERT,
    EXPERT_CHANNEL,
    FFN,
    FFN_CHANNEL,
    GQA_GROUP,
    LAYER,
    QUERY_HEAD,
    SHARED_CHANNEL,
    WHOLE_KINDS,
)
from secateur.shrink import shrink_config
from secateur.shrink.slicing import scale_experts
from secateur.shrink.stand_in_weights import StandInWeights
from tests.conftest import WITH_EXPERTS, geometry_of, pico_model
from tests.pruning import logits, masked, plan_keeping, prune, relative_difference

NUM_LAYERS = 3
TOLERANCE = 1e-6
GROUPED = ("deepseek_v2", "deepseek_v3")
HUB_NAMES = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.3.w1.weight",
    "olmoe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "qwen2_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "qwen3_moe": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "deepseek_v2": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "deepseek_v3": "model.layers.1.mlp.experts.3.gate_proj.weight",
    "gpt_oss": "model.layers.1.mlp.experts.gate_up_proj",
    "granitemoe": "model.layers.1.block_sparse_moe.input_linear.weight",
}
"""Where the hub keeps the weights of an expert of layer 1 once four are left."""
Kept = dict[str, list[list[int]]]


def tokens() -> Tensor:
    """Two rows of eleven tokens."""
    return torch.randint(1, 97, (2, 11), generator=torch.Generator().manual_seed(1))


def small(family: Family, dtype: torch.dtype = torch.float32, **extra: Any) -> tuple[Any, Geometry]:
    """Return a model of three layers, with biases and correction biases that are not zero, and its geometry."""
    model = pico_model(family, dtype, **{str(family.dimensions["num_layers"].config): NUM_LAYERS, **extra})
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            nn.init.normal_(buffer, std=0.5)
    return model, geometry_of(model, family)


def every_unit(geometry: Geometry, kind: str) -> list[list[int]]:
    """Return all units of a kind, per layer."""
    return [list(range(axis.num_units)) for axis in geometry.axes[kind]]


def some_experts(geometry: Geometry, count: int = 4, seed: int = 3) -> list[list[int]]:
    """Return as many experts of every group, others in each layer."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for axis in geometry.axes[EXPERT]:
        each = axis.num_units // max(1, axis.num_groups)
        drawn = [
            group * each + unit
            for group in range(axis.num_groups if axis.num_units else 0)
            for unit in torch.randperm(each, generator=generator)[: count // axis.num_groups].tolist()
        ]
        kept.append(sorted(drawn))
    return kept


@contextmanager
def never_chosen(model: Any, geometry: Geometry, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Give every router a selection score of minus infinity for the experts that are not kept.

    The logits of the others are what they were, and a softmax over all of them leaves the masked ones out.
    """
    routers = {}
    for experts, units in zip(geometry.experts, kept, strict=True):
        if experts is not None:
            gone = [unit for unit in range(experts.num_experts) if unit not in units]
            routers[model.get_submodule(experts.router)] = gone
    linear = torch.nn.functional.linear
    current: list[list[int]] = []

    def masked_linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        scores = linear(inputs, weight, bias)
        if current:
            scores[..., current[-1]] = -math.inf
        return scores

    def enter(router: nn.Module, _args: object) -> None:
        current.append(routers[router])

    def leave(_router: nn.Module, _args: object, _output: object) -> None:
        current.pop()

    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", masked_linear)
        for router, gone in routers.items():
            stack.callback(router.register_forward_pre_hook(enter).remove)
            stack.callback(router.register_forward_hook(leave).remove)
            if hasattr(router, "e_score_correction_bias"):
                before = router.e_score_correction_bias.clone()
                router.e_score_correction_bias[gone] = -math.inf
                stack.callback(router.e_score_correction_bias.copy_, before)
        yield


@contextmanager
def silent_channels(model: Any, geometry: Geometry, kept: Sequence[Sequence[int]]) -> Iterator[None]:
    """Put zeros into the last projection of every expert where it reads channels that are not kept."""
    with ExitStack() as stack, torch.no_grad():
        for experts, units in zip(geometry.experts, kept, strict=True):
            if experts is None:
                continue
            weight = model.get_submodule(experts.module).down_proj
            mask = torch.zeros(experts.num_experts * experts.width)
            mask[list(units)] = 1.0
            mask = mask.reshape(experts.num_experts, experts.width)
            before = weight.clone()
            weight.mul_(mask[..., None] if model.config.model_type == "gpt_oss" else mask[:, None, :])
            stack.callback(weight.data.copy_, before)
        yield


def channels_of(geometry: Geometry, count: int, seed: int = 4) -> list[list[int]]:
    """Return ``count`` channels of every expert, others in each."""
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for experts in geometry.experts:
        units: list[int] = []
        for expert in range(experts.num_experts if experts is not None else 0):
            assert experts is not None
            drawn = torch.randperm(experts.width, generator=generator)[:count].sort().values
            units += (drawn + expert * experts.width).tolist()
        kept.append(units)
    return kept


def require_promised(model: Any, geometry: Geometry, kept: Kept, pruned: Any) -> None:
    """Fail unless the pruned model has as many parameters in every part as the allocator's arithmetic says."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    removed = {
        kind: [axis.num_units - len(units) for axis, units in zip(geometry.axes[kind], per_layer, strict=True)]
        for kind, per_layer in kept.items()
    }
    real = dict.fromkeys(parameters_by_part(shapes, geometry), 0)
    for name, parameter in pruned.named_parameters():
        real[geometry.part_of(name)] += parameter.numel()
    assert parameters_after(shapes, geometry, removed) == real
    assert sum(real.values()) < model.num_parameters()


def require_reloads(pruned: Any, folder: Path) -> Any:
    """Fail unless the folder loads with the Auto class, complete, and says exactly the same; return that model."""
    pruned.save_pretrained(folder)
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=pruned.dtype, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert torch.equal(logits(again.eval(), tokens()), logits(pruned, tokens()))
    return again


def test_removed_experts_are_experts_that_the_router_never_chooses(moe_family: Family, tmp_path: Path) -> None:
    """Equal logits, the promised size, a stock folder with the hub's names, and one number changed in config.json."""
    model, geometry = small(moe_family)
    kept: Kept = {EXPERT: some_experts(geometry)}
    pruned = prune(model, plan_keeping(geometry, kept, "uniform"), geometry)
    with never_chosen(model, geometry, kept[EXPERT]):
        expected = logits(model, tokens())
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    assert relative_difference(expected, logits(model, tokens())) > 1e-3
    require_promised(model, geometry, kept, pruned)

    again = require_reloads(pruned, tmp_path)
    assert type(again).__module__.startswith("transformers.")
    config = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" not in config
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert HUB_NAMES[moe_family.name] in names
        assert not any(".experts.4." in name for name in names)
    dense = {**model.config.to_dict(), "architectures": None}
    changed = {key for key, value in pruned.config.to_dict().items() if dense.get(key) != value}
    assert changed - {"architectures", "dtype"} <= {*geometry.config_updates(EXPERT, 4)}


def test_experts_go_beside_heads_groups_and_token_ids(moe_family: Family) -> None:
    """Several kinds in one plan are each cut right."""
    model, geometry = small(moe_family)
    kept: Kept = {EXPERT: some_experts(geometry)}
    if geometry.why_fixed(GQA_GROUP) is None:
        kept[GQA_GROUP] = [[0, 2], [1, 2], [0, 1]]
    if geometry.why_fixed(FFN_CHANNEL) is None:
        kept[FFN_CHANNEL] = [list(range(3, 40)) if axis.num_units else [] for axis in geometry.axes[FFN_CHANNEL]]
    if geometry.why_fixed(SHARED_CHANNEL) is None:
        kept[SHARED_CHANNEL] = [list(range(2, 13)) if axis.num_units else [] for axis in geometry.axes[SHARED_CHANNEL]]
    ids = [*range(20), *range(30, 97)]
    pruned = prune(model, plan_keeping(geometry, kept, "uniform", tokens=ids), geometry)
    linear = {kind: units for kind, units in kept.items() if kind != EXPERT}
    with never_chosen(model, geometry, kept[EXPERT]), masked(model, geometry, linear):
        expected = logits(model, torch.tensor([[1, 5, 40, 96, 31, 7]]))[..., ids]
    assert relative_difference(logits(pruned, torch.tensor([[1, 5, 30, 86, 21, 7]])), expected) <= TOLERANCE


def test_query_heads_of_a_model_with_experts(moe_family: Family) -> None:
    """Where heads can go, they go right: parameters with one entry per head with them."""
    model, geometry = small(moe_family)
    if geometry.why_fixed(QUERY_HEAD):
        pytest.skip("this family's heads cannot go")
    kept: Kept = {QUERY_HEAD: [[0, 3, 5], [1, 2, 4], [0, 2, 4]]}
    pruned = prune(model, plan_keeping(geometry, kept, "uniform"), geometry)
    with masked(model, geometry, kept):
        expected = logits(model, tokens())
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    require_promised(model, geometry, kept, pruned)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_removed_expert_channels_are_channels_that_say_nothing(moe_family: Family, shape: str, tmp_path: Path) -> None:
    """Every expert loses as many, others each; the model is the one in which they are zero."""
    model, geometry = small(moe_family)
    kept: Kept = {EXPERT_CHANNEL: channels_of(geometry, 8)}
    if shape == "uneven":
        kept[EXPERT_CHANNEL][2] = every_unit(geometry, EXPERT_CHANNEL)[2]
    pruned = prune(model, plan_keeping(geometry, kept, shape), geometry)
    with silent_channels(model, geometry, kept[EXPERT_CHANNEL]):
        expected = logits(model, tokens())
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    assert relative_difference(expected, logits(model, tokens())) > 1e-3
    require_promised(model, geometry, kept, pruned)
    require_reloads(pruned, tmp_path)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_removed_channels_of_a_shared_expert_are_zero_channels(moe_family: Family, shape: str, tmp_path: Path) -> None:
    """The shared expert is an ordinary FFN."""
    model, geometry = small(moe_family)
    if geometry.why_fixed(SHARED_CHANNEL):
        with pytest.raises(Exception, match="shared"):
            geometry.require_cuttable([SHARED_CHANNEL])
        return
    kept: Kept = {
        SHARED_CHANNEL: [list(range(2, 13)) if axis.num_units else [] for axis in geometry.axes[SHARED_CHANNEL]]
    }
    if shape == "uneven":
        kept[SHARED_CHANNEL][1] = [4, 5, 9]
    pruned = prune(model, plan_keeping(geometry, kept, shape), geometry)
    with masked(model, geometry, kept):
        expected = logits(model, tokens())
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    require_promised(model, geometry, kept, pruned)
    require_reloads(pruned, tmp_path)


def test_layers_may_keep_different_numbers_of_experts(moe_family: Family, tmp_path: Path) -> None:
    """Our own model type holds a number per layer, reloads, generates, and can be pruned again."""
    model, geometry = small(moe_family)
    kept: Kept = {EXPERT: some_experts(geometry)}
    kept[EXPERT][2] = [0, 1, 2, 4, 5, 6]
    pruned = prune(model, plan_keeping(geometry, kept, "uneven"), geometry)
    with never_chosen(model, geometry, kept[EXPERT]):
        expected = logits(model, tokens())
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    require_promised(model, geometry, kept, pruned)
    again = require_reloads(pruned, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == UNEVEN_PREFIX + moe_family.model_types[0]
    uneven = geometry_of(again, moe_family)
    assert uneven.num_units(EXPERT) == [len(units) for units in kept[EXPERT]]
    with torch.inference_mode():
        greedy = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "attention_mask": torch.ones(2, 11)}
        cached = again.generate(tokens(), use_cache=True, **greedy)
        assert torch.equal(cached, again.generate(tokens(), use_cache=False, **greedy))

    then: Kept = {EXPERT: some_experts(uneven)}
    twice = prune(again, plan_keeping(uneven, then, "uneven"), uneven)
    with never_chosen(again, uneven, then[EXPERT]):
        expected = logits(again, tokens())
    assert relative_difference(logits(twice, tokens()), expected) <= TOLERANCE


@pytest.mark.parametrize("gone", [0, 1])
def test_whole_layers_go_and_the_others_keep_their_kind(moe_family: Family, gone: int, tmp_path: Path) -> None:
    """With or without experts, each layer that stays is what it was, and the folder is a stock one."""
    model, geometry = small(moe_family)
    kept: Kept = {kind: every_unit(geometry, kind) for kind in WHOLE_KINDS if kind in geometry.axes}
    for per_layer in kept.values():
        per_layer[gone] = []
    pruned = prune(model, plan_keeping(geometry, kept, "uniform"), geometry)
    require_promised(model, geometry, kept, pruned)
    again = geometry_of(pruned, moe_family)
    left = [layer for layer in range(NUM_LAYERS) if layer != gone]
    assert [experts is None for experts in again.experts] == [geometry.experts[layer] is None for layer in left]

    def pass_on(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> Any:
        return args[0] if args else kwargs["hidden_states"]

    hook = model.get_submodule(geometry.layer_name(gone)).register_forward_hook(pass_on, with_kwargs=True)
    expected = logits(model, tokens())
    hook.remove()
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    assert type(require_reloads(pruned, tmp_path)).__module__.startswith("transformers.")


@pytest.mark.parametrize("sublayer", [ATTENTION, FFN])
def test_sub_layers_go_where_the_family_lets_them(moe_family: Family, sublayer: str, tmp_path: Path) -> None:
    """Attention, or all experts with their router and shared expert, go from a layer; or the reason is said."""
    model, geometry = small(moe_family)
    kinds = (
        (GQA_GROUP,)
        if sublayer == ATTENTION
        else (EXPERT, *((SHARED_CHANNEL,) if SHARED_CHANNEL in geometry.axes else ()))
    )
    kept: Kept = {kind: every_unit(geometry, kind) for kind in kinds}
    for per_layer in kept.values():
        per_layer[2] = []
    plan = plan_keeping(geometry, kept, "uneven")
    if sublayer in geometry.fixed_blocks:
        with pytest.raises(Exception, match="expect the router's scores"):
            prune(model, plan, geometry)
        return
    pruned = prune(model, plan, geometry)
    module = model.get_submodule(geometry.layer_name(2) + "." + getattr(geometry.family.blocks, sublayer).modules[0])

    def zeros(_module: nn.Module, _args: object, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    hook = module.register_forward_hook(zeros)
    expected = logits(model, tokens())
    hook.remove()
    assert relative_difference(logits(pruned, tokens()), expected) <= TOLERANCE
    require_promised(model, geometry, kept, pruned)
    require_reloads(pruned, tmp_path)


def test_the_zeros_that_stand_for_experts_are_what_is_left_without_them(moe_family: Family) -> None:
    """Measuring the removal of an FFN sub-layer silences routed and shared experts, biases included."""
    model, geometry = small(moe_family)
    load = dict(model.named_parameters())
    stand_ins = StandInWeights(geometry, load.get, lambda kind, layer, count: ())
    patch = stand_ins.site(geometry.sublayer_axis(FFN, 2), 0)
    ffn = model.get_submodule(geometry.layer_name(2) + "." + geometry.family.blocks.ffn.modules[0])
    seen: list[Any] = []
    hook = ffn.register_forward_hook(lambda _module, _args, output: seen.append(output))
    with torch.inference_mode():
        torch.func.functional_call(model, patch, kwargs={"input_ids": tokens(), "use_cache": False})
    hook.remove()
    output = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(output, torch.zeros_like(output))


def test_scaled_experts_say_as_much_more_or_less(moe_family: Family) -> None:
    """A factor multiplies what the routed experts of one layer add, biases included, and nothing else."""
    model, geometry = small(moe_family)
    experts = geometry.experts[1]
    assert experts is not None
    seen: list[Tensor] = []
    hook = model.get_submodule(experts.module).register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
    before = logits(model, tokens())
    model.load_state_dict(dict(scale_experts(model.state_dict().items(), geometry, {1: 0.5})))
    after = logits(model, tokens())
    hook.remove()
    assert relative_difference(seen[1], 0.5 * seen[0]) <= TOLERANCE
    assert relative_difference(after, before) > 1e-3


@pytest.mark.parametrize("factors", [{7: 0.5}, {1: 0.0}, {1: math.nan}])
def test_a_factor_that_fits_no_experts_is_refused(factors: dict[int, float]) -> None:
    """Neither a layer without experts nor a factor that is no positive number is passed over."""
    _, geometry = small(families()["mixtral"])
    with pytest.raises(PlanError, match="Give a number above 0 for a layer that has experts"):
        dict(scale_experts([], geometry, factors))


def test_fewer_experts_than_a_token_is_sent_to_are_refused(moe_family: Family) -> None:
    """In either shape, with the numbers that work."""
    model, geometry = small(moe_family)
    for shape in ("uniform", "uneven"):
        kept: Kept = {EXPERT: [units[:1] for units in every_unit(geometry, EXPERT)]}
        with pytest.raises(PlanError, match=r"keeps? (1|1, 0) (of 8 )?experts .*(Keep one of|Every group)"):
            shrink_config(model.config.to_dict(), plan_keeping(geometry, kept, shape), geometry)
            prune(model, plan_keeping(geometry, kept, shape), geometry)


@pytest.mark.parametrize(
    ("name", "keep", "words"),
    [
        ("deepseek_v3", [0, 1, 2, 4], "keeps 3, 1 experts in the 2 groups of layer 1. Every group must keep as many"),
        (
            "deepseek_v3",
            [0, 1, 2, 4, 5],
            "keeps 3, 2 experts in the 2 groups of layer 1. Every group must keep as many",
        ),
        ("deepseek_v3", [0, 4], "the router scores each of its 2 groups by its best 2 experts. Keep one of 4, 6, 8."),
        ("deepseek_v2", [0, 4], "each token is sent to 2 experts of 1 of the router's groups. Keep one of 4, 6, 8."),
        ("mixtral", [3], "each token is sent to 2 experts. Keep one of 2, 3, 4, 5, 6, 7, 8."),
    ],
)
@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_what_a_router_would_get_wrong_without_a_word_is_refused(
    name: str, keep: list[int], words: str, shape: str
) -> None:
    """Unequal groups, too few experts per group, too few groups for a token: models that would run, and be wrong."""
    model, geometry = small(families()[name])
    kept: Kept = {EXPERT: [keep if units else [] for units in every_unit(geometry, EXPERT)]}
    with pytest.raises(PlanError) as caught:
        prune(model, plan_keeping(geometry, kept, shape), geometry)
    assert words in str(caught.value)


def test_the_channels_of_shared_experts_bind_those_of_routed_ones() -> None:
    """DeepSeek's shared experts are a whole number of routed ones wide, so some widths of these are impossible."""
    model, geometry = small(families()["deepseek_v3"])
    assert geometry.allowed_counts(EXPERT_CHANNEL) == [192, 128, 64]
    for shape in ("uniform", "uneven"):
        kept: Kept = {EXPERT_CHANNEL: channels_of(geometry, 9)}
        with pytest.raises(PlanError, match="units / num_experts must divide shared_width"):
            prune(model, plan_keeping(geometry, kept, shape), geometry)


def test_experts_of_one_layer_keep_the_same_width() -> None:
    """Fused tensors have one width."""
    model, geometry = small(families()["mixtral"])
    kept: Kept = {EXPERT_CHANNEL: every_unit(geometry, EXPERT_CHANNEL)}
    kept[EXPERT_CHANNEL][0] = kept[EXPERT_CHANNEL][0][1:]
    with pytest.raises(PlanError, match="or the experts of a layer would differ in width"):
        prune(model, plan_keeping(geometry, kept, "uneven"), geometry)


def test_experts_and_their_channels_are_two_cuts() -> None:
    """One plan removes one of them."""
    model, geometry = small(families()["mixtral"])
    kept: Kept = {EXPERT: some_experts(geometry), EXPERT_CHANNEL: channels_of(geometry, 8)}
    with pytest.raises(PlanError, match="removes both experts and expert_channels, which are parts of each other"):
        prune(model, plan_keeping(geometry, kept, "uniform"), geometry)


def test_a_plan_without_layers_experts_cannot_remove_layers() -> None:
    """What is not listed would be left behind."""
    model, geometry = small(families()["qwen2_moe"])
    kept: Kept = {kind: every_unit(geometry, kind) for kind in (GQA_GROUP, FFN_CHANNEL)}
    kept[GQA_GROUP][1] = []
    with pytest.raises(PlanError, match="lacks entries for their experts"):
        prune(model, plan_keeping(geometry, kept, "uneven"), geometry)


def test_dense_families_have_no_experts(family: Family) -> None:
    """Nothing about experts is said of a model without them, and asking for them is refused."""
    geometry = geometry_of(pico_model(family), family)
    assert geometry.experts == ()
    with pytest.raises(Exception, match="no model of this family has any"):
        geometry.require_cuttable([EXPERT])


def test_the_grouped_families_are_known() -> None:
    """Routing groups are read from the configuration, and experts of them are shared out evenly."""
    for name in WITH_EXPERTS:
        _, geometry = small(families()[name])
        there = [experts for experts in geometry.experts if experts is not None]
        assert {experts.num_groups for experts in there} == {2 if name in GROUPED else 1}
        assert {axis.per_group for axis in geometry.axes[EXPERT]} == {4 if name in GROUPED else None}
        assert geometry.step(EXPERT) == (2 if name in GROUPED else 1)
        assert LAYER not in geometry.fixed_blocks
