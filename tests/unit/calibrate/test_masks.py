"""Gates are hard-concrete, masks meet their budget and find useless units, and a masked model is the cut one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import learn_masks
from secateur.calibrate.masks import BETA, GAMMA, ZETA, draw_gates, gated, open_probability, unit_parameters
from secateur.errors import CheckpointError, ConfigError, CorpusError, FamilyError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.masks import AdapterSettings, MaskObjective, MaskSettings, MaskStatistics
from secateur.records.units import FFN_CHANNEL, GQA_GROUP, QUERY_HEAD
from secateur.recover.lora import Beside, beside
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import DENSE, geometry_of, pico_model
from tests.pruning import choose_units, logits, plan_keeping, prune, relative_difference

LORA = AdapterSettings(rank=2, alpha=4.0, targets="all-linear", learning_rate=0.01)
USUAL = MaskSettings(target=0.4, steps=120, learning_rate=0.3, objective="kl")


def llama(name: str = "llama", **changes: Any) -> tuple[Any, Geometry]:
    """Return a pico model and its geometry."""
    model = pico_model(families()[name], **changes)
    return model, geometry_of(model, families()[name])


def short(objective: MaskObjective = "loss", steps: int = 5) -> MaskSettings:
    """Return settings that are quickly done."""
    return MaskSettings(target=0.25, steps=steps, learning_rate=0.3, objective=objective)


@cache
def with_useless_half() -> tuple[Any, Geometry, list[list[int]], MaskStatistics]:
    """Return a model whose down projections ignore half of the channels, these channels, and its masks."""
    model, geometry = llama()
    useless = []
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(layer))
            block.mlp.down_proj.weight[:, order[:32]] = 0.0
            useless.append(sorted(order[:32].tolist()))
    return model, geometry, useless, learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], USUAL)


def test_masks_close_first_on_the_units_that_do_nothing() -> None:
    """Every channel that nothing reads is likelier closed than any other, without being told."""
    *_, useless, masks = with_useless_half()
    for layer, units in enumerate(useless):
        values = masks.units[layer, FFN_CHANNEL]
        others = [unit for unit in range(64) if unit not in units]
        assert float(values[units].max()) < 0.5 < float(values[others].min())
        assert values.dtype == torch.float64


def test_the_budget_is_met_at_the_end_and_the_target_rises_to_it() -> None:
    """The share of the parameters is expected to go; the target rises over the first half of the steps and stays."""
    *_, masks = with_useless_half()
    assert masks.removed == pytest.approx(0.4, abs=0.01)
    assert [step.target for step in masks.steps[:2]] == [pytest.approx(0.4 / 60), pytest.approx(0.8 / 60)]
    assert all(step.target == 0.4 for step in masks.steps[59:]) and len(masks.steps) == 120


@pytest.mark.parametrize("target", [0.1, 0.3])
def test_the_budget_is_met_over_kinds_of_different_size(target: float) -> None:
    """A group has many more parameters than a channel; what is held is the share of parameters, not of units."""
    model, geometry = llama()
    settings = replace(USUAL, target=target, steps=80, objective="loss")
    masks = learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL, GQA_GROUP], settings)
    costs = {kind: unit_parameters(model, geometry.axes[kind][0], "out_in") for kind in (FFN_CHANNEL, GQA_GROUP)}
    assert costs == {FFN_CHANNEL: 3 * 48, GQA_GROUP: (16 + 8 + 8 + 16) * 48}
    gone = sum(float((1 - values).sum()) * costs[kind] for (_, kind), values in masks.units.items())
    total = sum(len(values) * costs[kind] for (_, kind), values in masks.units.items())
    assert gone / total == pytest.approx(masks.removed, abs=1e-12) == pytest.approx(target, abs=0.03)


@pytest.mark.parametrize("name", DENSE)
def test_a_masked_model_is_the_cut_one(name: str) -> None:
    """Gates of 0 and 1 at the readers and the model without the units have the same logits, in float64."""
    model, geometry = llama(name)
    kinds = [kind for kind in (FFN_CHANNEL, GQA_GROUP) if not geometry.why_fixed(kind)]
    kept = choose_units(geometry, kinds, "uniform")
    gates = {
        (axis.layer, kind): torch.tensor([float(unit in units) for unit in range(axis.num_units)], dtype=torch.float64)
        for kind in kinds
        for axis, units in zip(geometry.axes[kind], kept[kind], strict=True)
    }
    tokens = torch.arange(30).reshape(2, 15)
    with gated(model, geometry, gates):
        masked = logits(model, tokens)
    cut = prune(model, plan_keeping(geometry, kept, "uniform"), geometry)
    tolerance = 1e-5 if name in ("gemma2", "gemma3_text", "gpt_neox") else 1e-12  # softmax in float32
    torch.testing.assert_close(masked, logits(cut, tokens), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", DENSE)
def test_unit_parameters_are_what_a_cut_saves(name: str) -> None:
    """The cost of one unit in every layer is the difference of two models' sizes, biases included."""
    model, geometry = llama(name)
    for kind in (FFN_CHANNEL, GQA_GROUP):
        if geometry.why_fixed(kind):
            continue
        axes = geometry.axes[kind]
        fewer = geometry.allowed_counts(kind)[1]
        kept = {kind: [list(range(fewer)) for _ in axes]}
        cut = prune(model, plan_keeping(geometry, kept, "uniform"), geometry)
        saved = model.num_parameters() - cut.num_parameters()
        per_unit = [unit_parameters(model, axis, geometry.family.weight_layout) for axis in axes]
        assert saved == sum(per_unit) * (axes[0].num_units - fewer)


def test_gates_follow_the_hard_concrete_distribution() -> None:
    """One by one as in its paper; and as often open as the closed form says."""
    alphas = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0], dtype=torch.float64)
    uniform = torch.tensor([0.9, 0.3, 0.5, 0.1, 0.999], dtype=torch.float64)
    for alpha, u, gate in zip(alphas.tolist(), uniform.tolist(), draw_gates(alphas, uniform).tolist(), strict=True):
        s = 1.0 / (1.0 + math.exp(-(math.log(u) - math.log(1.0 - u) + alpha) / BETA))
        assert gate == pytest.approx(min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA)), abs=1e-12)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    for alpha in alphas:
        often = float((draw_gates(alpha.expand(len(grid)), grid) > 0).double().mean())
        assert often == pytest.approx(float(open_probability(alpha[None])), abs=2e-5)


@pytest.mark.parametrize("objective", ["loss", "kl"])
def test_the_seed_decides(objective: MaskObjective) -> None:
    """The same seed gives the same masks whatever the global random state, another seed others."""
    model, geometry = llama()
    first, again, other = (
        _with_global_seed(
            17 + i,
            lambda seed=seed: learn_masks(  # type: ignore[misc]
                model, hand_made_blocks(), geometry, [FFN_CHANNEL], short(objective), seed=seed
            ),
        )
        for i, seed in enumerate((0, 0, 1))
    )
    assert first.steps == again.steps and first.steps != other.steps
    for site, values in first.units.items():
        assert torch.equal(values, again.units[site]) and not torch.equal(values, other.units[site])


def _with_global_seed(seed: int, make: Any) -> MaskStatistics:
    torch.manual_seed(seed)
    made: MaskStatistics = make()
    return made


def test_the_scale_of_the_objective_makes_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand times the loss gives the same masks, so the multipliers fit every model and text."""
    model, geometry = llama()

    def learn() -> Tensor:
        masks = learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], short(steps=12))
        return torch.cat(list(masks.units.values()))

    plain = learn()
    from secateur.calibrate import masks as module

    unscaled = module.block_loss
    monkeypatch.setattr(module, "block_loss", lambda *args: unscaled(*args) * 1000.0)
    torch.testing.assert_close(learn(), plain, rtol=1e-3, atol=1e-3)


def test_open_gates_do_not_diverge_from_the_dense_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """With gates at 1 the divergence is 0 and the loss is the dense model's."""
    from secateur.calibrate import masks as module

    model, geometry = llama()
    monkeypatch.setattr(module, "FIRST_LOG_ALPHA", 60.0)
    kl, loss = (
        learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], short(objective, 1)).steps[0].objective
        for objective in ("kl", "loss")
    )
    assert abs(kl) < 1e-12
    assert loss == pytest.approx(math.log(97), abs=0.5)


def test_the_model_is_left_as_it_was() -> None:
    """Weights, flags, modes and hooks; no parameter gets a gradient."""
    model, geometry = llama()
    model.train()
    model.lm_head.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.inference_mode():
        learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], short())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.training and not _hooks(model)


def _hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


def test_hooks_go_when_a_step_fails() -> None:
    """The objective that is not finite is named with its step, and nothing stays behind."""
    model, geometry = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    with pytest.raises(CheckpointError, match="objective of the masks is not finite at step 1"):
        learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL, GQA_GROUP], short())
    assert not _hooks(model)
    gates = {(0, FFN_CHANNEL): torch.ones(64)}
    with pytest.raises(RuntimeError, match="stop"), gated(model, geometry, gates):
        assert _hooks(model) == 1
        raise RuntimeError("stop")
    assert not _hooks(model)


def test_whole_blocks_are_taken_up_to_a_limit() -> None:
    """One at least; the number of tokens is that of the blocks that are trained on."""
    model, geometry = llama()
    taken = [
        learn_masks(model, hand_made_blocks(), geometry, [GQA_GROUP], short(steps=1), max_tokens=limit).num_tokens
        for limit in (1, 30, None)
    ]
    assert taken == [14, 30, 50]


def test_what_cannot_be_trained_is_refused() -> None:
    """Half precision, kinds that are parts of each other, kinds that cannot be cut, and text without a loss."""
    model, geometry = llama()
    single = HandMadeBlocks([[5], [6]], [[0, 1]], 16)
    with pytest.raises(CorpusError, match="no calibration token is predicted"):
        learn_masks(model, single, geometry, [FFN_CHANNEL], short())
    with pytest.raises(ConfigError, match="gqa_group and query_head are parts of each other"):
        learn_masks(model, hand_made_blocks(), geometry, [GQA_GROUP, QUERY_HEAD], short())
    with pytest.raises(ConfigError, match=r"method learned_mask needs gradients; .* is float16"):
        learn_masks(model.half(), hand_made_blocks(), geometry, [FFN_CHANNEL], short(), who="method learned_mask")
    plain, heads = llama("gpt2")
    with pytest.raises(FamilyError, match="query_heads of a gpt2 model cannot be cut"):
        learn_masks(plain, hand_made_blocks(), heads, [QUERY_HEAD], short())


def adapting(geometry: Geometry, settings: AdapterSettings = LORA, seed: int = 0) -> Any:
    """Return what puts adapters into a model of a family."""
    return partial(beside, settings=settings, family=geometry.family, seed=seed, key="lora")


def disturb(adapters: Beside) -> None:
    """Give every adapter weight a random value."""
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.parameters:
        parameter.data.normal_(std=0.3, generator=generator)


@pytest.mark.parametrize("name", DENSE)
def test_a_masked_model_with_adapters_is_the_merged_and_cut_one(name: str) -> None:
    """With gates of 0 and 1 and adapters beside the weights, as in training, and merged and without the units."""
    model, geometry = llama(name)
    kinds = [kind for kind in (FFN_CHANNEL, GQA_GROUP) if not geometry.why_fixed(kind)]
    kept = choose_units(geometry, kinds, "uniform")
    gates = {
        (axis.layer, kind): torch.tensor([float(unit in units) for unit in range(axis.num_units)], dtype=torch.float64)
        for kind in kinds
        for axis, units in zip(geometry.axes[kind], kept[kind], strict=True)
    }
    tokens = torch.arange(30).reshape(2, 15)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with adapting(geometry)(model) as adapters:
        disturb(adapters)
        with gated(model, geometry, gates):
            masked = logits(model, tokens)
        learned = adapters.learned()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert list(before) == list(model.state_dict())
    plain = logits(prune(model, plan_keeping(geometry, kept, "uniform"), geometry), tokens)
    layout = geometry.family.weight_layout
    model.load_state_dict({key: learned.merged(key, value, layout) for key, value in before.items()})
    cut = logits(prune(model, plan_keeping(geometry, kept, "uniform"), geometry), tokens)
    assert relative_difference(cut, plain) > 1e-3
    tolerance = 1e-5 if name in ("gemma2", "gemma3_text", "gpt_neox") else 1e-10
    torch.testing.assert_close(masked, cut, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", ["loss", "kl"])
def test_adapters_learn_beside_the_gates(objective: MaskObjective) -> None:
    """The objective ends lower than with frozen weights at the same size, and the dense model is untouched."""
    model, geometry = llama()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    settings = MaskSettings(0.4, 60, 0.3, objective, replace(LORA, learning_rate=0.02))
    learn = partial(learn_masks, model, hand_made_blocks(), geometry, [FFN_CHANNEL])
    frozen, adapted, again = (
        learn(replace(settings, lora=None)),
        *(learn(settings, adapt=adapting(geometry, settings.lora or LORA)) for _ in range(2)),
    )
    assert adapted.adapters is not None and frozen.adapters is None
    assert len(adapted.adapters.factors) == 2 * 7 and adapted.adapters.scale == 2.0
    assert all(bool(second.any()) for _, second in adapted.adapters.factors.values())
    assert adapted.removed == pytest.approx(0.4, abs=0.03)
    last = [sum(step.objective for step in masks.steps[-10:]) for masks in (frozen, adapted)]
    assert last[1] < last[0]
    assert adapted.steps == again.steps
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert list(before) == list(model.state_dict()) and not hasattr(model, "peft_config")
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules()) and not _hooks(model)


def test_the_divergence_is_from_the_model_without_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    """With open gates and adapters that change the model it is not 0."""
    from secateur.calibrate import masks as module

    model, geometry = llama()
    monkeypatch.setattr(module, "FIRST_LOG_ALPHA", 60.0)

    @contextmanager
    def changed(given: Any) -> Iterator[Beside]:
        with adapting(geometry)(given) as adapters:
            disturb(adapters)
            yield adapters

    settings = replace(short("kl", 1), lora=LORA)
    found = learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], settings, adapt=changed)
    assert found.steps[0].objective > 1e-3


def test_adapters_go_when_a_step_fails() -> None:
    """Nothing stays in the model, and every parameter can be trained as before."""
    model, geometry = llama()
    with torch.no_grad():
        model.lm_head.weight[3] = math.nan
    settings = replace(short(), lora=LORA)
    with pytest.raises(CheckpointError, match="not finite at step 1"):
        learn_masks(model, hand_made_blocks(), geometry, [FFN_CHANNEL], settings, adapt=adapting(geometry))
    assert not any("lora" in name for name, _ in model.named_modules()) and not _hooks(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
