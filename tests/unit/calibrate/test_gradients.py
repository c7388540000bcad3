"""The gradient pass equals automatic differentiation of one document at a time, and leaves the model as it was."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import collect_gradients
from secateur.calibrate.gradients import block_loss
from secateur.errors import CheckpointError, ConfigError, CorpusError, FamilyError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.gradients import SUMS, GradientStatistics
from secateur.records.statistics import SiteKey
from secateur.score.run import unit_weights
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import DENSE, geometry_of, pico_model


@cache
def taken(name: str) -> tuple[Any, Geometry, list[str], GradientStatistics]:
    """Return a pico model, its geometry, the kinds it can lose, and their gradients."""
    model = pico_model(families()[name])
    geometry = geometry_of(model, families()[name])
    kinds = [kind for kind, axes in geometry.axes.items() if not axes[0].fixed]
    return model, geometry, kinds, collect_gradients(model, hand_made_blocks(), geometry, kinds)


def masks_on_readers(model: Any, geometry: Geometry, kinds: list[str], stack: ExitStack) -> dict[SiteKey, Tensor]:
    """Multiply what every reading projection receives with a mask of ones, one number per unit; return the masks."""
    masks: dict[SiteKey, Tensor] = {}
    for kind in kinds:
        for axis in geometry.axes[kind]:
            mask = torch.ones(axis.num_units, dtype=torch.float64, requires_grad=True)

            def multiply(_m: nn.Module, args: Any, mask: Tensor = mask, width: int = axis.reader_width) -> Any:
                return (args[0] * mask.repeat_interleave(width),)

            stack.callback(model.get_submodule(axis.reader).register_forward_pre_hook(multiply).remove)
            masks[axis.layer, kind] = mask
    return masks


def differentiated(name: str) -> dict[SiteKey, Tensor]:
    """Return the five sums by plain backward passes, documents unpacked, with the gradients of all weights at once."""
    model, geometry, kinds, _ = taken(name)
    model.requires_grad_(True)
    parameters = dict(model.named_parameters())
    blocks, totals = hand_made_blocks(), dict[SiteKey, Tensor]()
    for row in blocks.rows:
        model.zero_grad()
        with ExitStack() as stack:
            masks = masks_on_readers(model, geometry, kinds, stack)
            losses = []
            for document in row:
                ids = torch.tensor([list(blocks.texts[document])])
                logits = model(ids, use_cache=False).logits[0, :-1]
                losses.append(nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
            torch.cat(losses).mean().backward()
        for site, mask in masks.items():
            axis = geometry.axes[site[1]][site[0]]
            weights = unit_weights(axis, parameters.get, geometry.family.weight_layout)
            gradients = unit_weights(axis, lambda n: _gradient(parameters.get(n)), geometry.family.weight_layout)
            s = torch.cat([w.detach() * g for w, g in zip(weights, gradients, strict=True)], 1)
            assert mask.grad is not None
            parts = [mask.grad**2, s.abs().sum(1), (s**2).sum(1), (s - s**2 / 2).abs().sum(1), mask.grad.abs()]
            found = torch.stack(parts)
            totals[site] = totals[site] + found if site in totals else found
    return totals


def _gradient(parameter: nn.Parameter | None) -> Tensor | None:
    return None if parameter is None else parameter.grad


@pytest.mark.parametrize("name", DENSE)
def test_sums_equal_automatic_differentiation(name: str) -> None:
    """Mask gradients and products of weights and gradients, per block and unit, biases included."""
    *_, ours = taken(name)
    expected = differentiated(name)
    tolerance = 1e-4 if name in ("gemma2", "gemma3_text", "gpt_neox") else 1e-9  # softmax in float32
    assert ours.num_tokens == 50
    assert set(ours.units) == set(expected)
    for site, units in ours.units.items():
        assert units.count == 4
        names = ("mask_sq", "weight_abs", "weight_sq", "weight_mixed", "mask_abs")
        found = torch.stack([getattr(units, sum_) for sum_ in names])
        torch.testing.assert_close(found, expected[site], rtol=tolerance, atol=1e-12)


def llama(**changes: Any) -> tuple[Any, Geometry]:
    """Return a pico llama and its geometry."""
    model = pico_model(families()["llama"], **changes)
    return model, geometry_of(model, families()["llama"])


def assert_same(first: GradientStatistics, second: GradientStatistics, rtol: float = 1e-9) -> None:
    """Assert that two records hold the same sums."""
    assert first.units.keys() == second.units.keys()
    for site, units in first.units.items():
        for name in SUMS:
            torch.testing.assert_close(getattr(units, name), getattr(second.units[site], name), rtol=rtol, atol=1e-14)


def test_a_frozen_model_works_and_everything_is_left_as_it_was() -> None:
    """No parameter gets a gradient; flags, modules' modes and hooks are as before, whatever the caller's mode."""
    *_, expected = taken("llama")
    model, geometry = llama()
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.train()
    model.model.layers[0].eval()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    with torch.no_grad():
        found = collect_gradients(model, hand_made_blocks(), geometry, list(geometry.axes))
    assert_same(found, expected)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with torch.inference_mode():
        assert_same(collect_gradients(model, hand_made_blocks(), geometry, list(geometry.axes)), expected)


def test_whole_blocks_are_taken_up_to_the_limit() -> None:
    """As many as fit, one at least; the sums are those of these blocks."""
    model, geometry = llama()
    blocks = hand_made_blocks()  # 14, 16, 13 and 7 tokens
    for limit, rows, tokens in ((1, 1, 14), (29, 1, 14), (30, 2, 30), (45, 3, 43), (1000, 4, 50)):
        found = collect_gradients(model, blocks, geometry, ["ffn_channel"], max_tokens=limit)
        assert found.num_tokens == tokens
        assert found.units[0, "ffn_channel"].count == rows
        whole = collect_gradients(model, replace(blocks, rows=blocks.rows[:rows]), geometry, ["ffn_channel"])
        assert_same(found, whole)


def test_padding_and_documents_of_one_token_leave_no_trace() -> None:
    """Room to spare changes nothing; a block without a predicted token is no sequence; none at all is refused."""
    model, geometry = llama()
    tight = HandMadeBlocks([[5, 6, 7, 8], [9]], [[0]], 4)
    expected = collect_gradients(model, tight, geometry, ["gqa_group"])
    for blocks in (replace(tight, block_size=32), replace(tight, rows=[[1], [0]])):
        found = collect_gradients(model, blocks, geometry, ["gqa_group"])
        assert found.units[1, "gqa_group"].count == 1
        assert_same(found, expected)
    with pytest.raises(CorpusError, match="the gradient pass needs a loss, and no calibration token is predicted"):
        collect_gradients(model, replace(tight, rows=[[1]]), geometry, ["gqa_group"])


def test_bfloat16_is_near_and_summed_in_float64() -> None:
    """A bfloat16 model gives float64 sums near those of the same weights in float64."""
    model, geometry = llama(dtype=torch.bfloat16)
    narrow = collect_gradients(model, hand_made_blocks(), geometry, ["ffn_channel"])
    wide = collect_gradients(model.double(), hand_made_blocks(), geometry, ["ffn_channel"])
    for site, units in narrow.units.items():
        assert units.weight_abs.dtype == torch.float64
        assert float(units.weight_abs.sum() / wide.units[site].weight_abs.sum()) == pytest.approx(1.0, abs=0.1)


def test_what_has_no_gradients_is_refused_before_the_pass() -> None:
    """Half precision, whole numbers and weights that are not there: the parameter and the remedy are named."""
    model, geometry = llama()
    ask: Any = {"geometry": geometry, "kinds": ["ffn_channel"], "who": "method taylor"}
    with pytest.raises(ConfigError) as caught:
        collect_gradients(model.half(), hand_made_blocks(), **ask)
    assert str(caught.value) == (
        "method taylor needs gradients; model.embed_tokens.weight is float16, in which they cannot be taken. Load the "
        "model unquantised, with dtype: float32 or bfloat16."
    )
    model, _ = llama()
    down = model.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(torch.zeros(48, 64, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj\.weight is int8"):
        collect_gradients(model, hand_made_blocks(), **ask)
    del down.weight
    down.register_buffer("qweight", torch.zeros(48, 8, dtype=torch.int32))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.down_proj has no plain weight \(it is quantised"):
        collect_gradients(model, hand_made_blocks(), **ask)


def test_units_without_weights_of_their_own_are_refused() -> None:
    """A family's fixed units have no coupled weights."""
    model, geometry, *_ = taken("gpt2")
    with pytest.raises(FamilyError, match="gqa_groups of a gpt2 model cannot be cut"):
        collect_gradients(model, hand_made_blocks(), geometry, ["gqa_group"])


def test_gradients_that_are_not_finite_name_the_place() -> None:
    """Kind and layer are named, and the model is as it was."""
    model, geometry = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="gradients at the ffn_channels of layer 0 are not finite"):
        collect_gradients(model, hand_made_blocks(), geometry, ["ffn_channel"])
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not m._forward_hooks for m in model.modules())


def _keep_output(outputs: dict[SiteKey, Tensor], site: SiteKey, _module: nn.Module, _args: Any, output: Tensor) -> None:
    output.retain_grad()
    outputs[site] = output


def test_output_gradients_are_those_of_plain_backward_passes() -> None:
    """Sum over blocks and tokens of g gT at the output of every reading projection."""
    model, geometry, kinds, _ = taken("llama")
    found = collect_gradients(model, hand_made_blocks(), geometry, kinds, outputs=True)
    totals: dict[SiteKey, Tensor] = {}
    model.requires_grad_(True)
    for batch in hand_made_blocks().batches(1):
        outputs: dict[SiteKey, Tensor] = {}
        with ExitStack() as stack:
            for kind in kinds:
                for axis in geometry.axes[kind]:
                    keep = partial(_keep_output, outputs, (axis.layer, kind))
                    stack.callback(model.get_submodule(axis.reader).register_forward_hook(keep).remove)
            block_loss(model, batch, geometry).backward()  # type: ignore[no-untyped-call]
        for site, output in outputs.items():
            assert output.grad is not None
            totals[site] = totals.get(site, torch.zeros(())) + output.grad[0].T @ output.grad[0]
    for site, total in totals.items():
        output = found.units[site].output
        assert output is not None
        torch.testing.assert_close(output, total)


def test_sketches_tell_how_alike_the_gradients_of_two_texts_are() -> None:
    """Cosines of summed gradients, all slices of a unit together, to what random projections know: about an eighth."""
    model, geometry, kinds, _ = taken("llama")
    sketches, exact = [], []
    for seed in (0, 1):
        blocks = hand_made_blocks(seed=seed)
        found = collect_gradients(model, blocks, geometry, kinds, sketch=True)
        sketches.append({site: units.sketch for site, units in found.units.items()})
        exact.append(summed_gradients(model, geometry, kinds, blocks))
    errors = []
    for site in sketches[0]:
        estimated, true = (nn.functional.cosine_similarity(a[site], b[site], dim=1) for a, b in (sketches, exact))
        errors.append(estimated - true)
    assert float(torch.cat(errors).square().mean().sqrt()) < 0.2
    assert abs(float(torch.cat(errors).mean())) < 0.05
    assert collect_gradients(model, hand_made_blocks(), geometry, kinds).units[0, "ffn_channel"].sketch is None


def summed_gradients(model: Any, geometry: Geometry, kinds: list[str], blocks: HandMadeBlocks) -> dict[SiteKey, Tensor]:
    """Return the sum over blocks of the gradient of each unit's weights, without biases, by plain backward passes."""
    model.requires_grad_(True)
    model.zero_grad()
    for batch in blocks.batches(1):
        block_loss(model, batch, geometry).backward()
    weights = {name: value for name, value in model.named_parameters() if name.endswith("weight")}
    gradients = {
        (axis.layer, kind): torch.cat(
            unit_weights(axis, lambda n: _gradient(weights.get(n)), geometry.family.weight_layout), 1
        )
        for kind in kinds
        for axis in geometry.axes[kind]
    }
    model.zero_grad()
    return gradients
