"""Scales of experts are fitted to what the dense and the pruned model's own modules give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate.one_pass import run_pass
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.pipeline import streams
from secateur.pipeline.gates import GateListener, SlicedRouters, all_scales, fit_on_dense_stream
from secateur.pipeline.streams import fit_on_pruned_stream
from secateur.progress import silent
from secateur.records.plan import Plan
from secateur.shrink.gates import GateSums
from secateur.shrink.slicing import scale_experts
from secateur.store.checkpoints import load_model, resolve_model
from secateur.stream.sources import LazyLayers, LoadedLayers
from secateur.stream.streamed import StreamedModel
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import WITH_EXPERTS, geometry_of
from tests.moe import moe_model
from tests.pruning import logits, plan_keeping, prune

BLOCKS = hand_made_blocks()
OTHERS = hand_made_blocks(seed=1)
KEEP = (0, 1, 2, 6, 7, 8)
"""Half of twelve experts, as many of either of two groups."""


def dense(name: str, dtype: torch.dtype = torch.float64, **extra: Any) -> tuple[Any, Geometry]:
    """Return a tiny model and its geometry; transformers has only eager experts in float64."""
    model = moe_model(name, dtype, **extra)
    model.set_experts_implementation("eager")
    return model, geometry_of(model, families()[name])


def half(geometry: Geometry) -> Plan:
    """Return the plan that keeps ``KEEP`` in every layer with experts."""
    kept = {"expert": [KEEP if axis.num_units else () for axis in geometry.axes["expert"]]}
    return plan_keeping(geometry, kept, "uniform")


def fit(model: Any, plan: Plan, geometry: Geometry, config: Any = None, **options: Any) -> Any:
    """Return scales and reports of the dense stream."""
    config = model.config.to_dict() if config is None else config
    texts: Sequence[Sequence[HandMadeBlocks]] = ([BLOCKS], [OTHERS])
    return fit_on_dense_stream(model, config, plan, geometry, *texts, dtype=torch.float64, batch_size=2, **options)


def heard(module: Any, call: Any) -> list[tuple[Tensor, ...]]:
    """Return arguments and output of a module for every time it runs while ``call`` does."""
    found: list[tuple[Tensor, ...]] = []
    hook = module.register_forward_hook(lambda _module, args, output: found.append((*args, output)))
    with torch.no_grad():
        call()
    hook.remove()
    return found


@torch.no_grad()
def by_hand(model: Any, pruned: Any, name: str) -> GateSums:
    """Return the sums of one layer, token by token and expert by expert, text by text."""
    module, block = model.get_submodule(name), pruned.get_submodule(name.rpartition(".")[0])
    total = GateSums.empty(len(KEEP))
    for ids in BLOCKS.texts:
        ((hidden, _, _, wanted),) = heard(module, lambda ids=ids: model(torch.tensor([list(ids)]), use_cache=False))
        inner = block.get_submodule(name.rpartition(".")[2])
        ((_, index, gates, _),) = heard(inner, lambda hidden=hidden: block(hidden[None]))
        for token, row in enumerate(hidden):
            given = torch.zeros(len(row), len(KEEP), dtype=torch.float64)
            for expert, gate in zip(index[token].tolist(), gates[token].tolist(), strict=True):
                alone = inner(row[None], torch.tensor([[expert]]), torch.ones(1, 1).double())
                given[:, expert] += gate * alone[0]
            total += GateSums(given.T @ given, given.T @ wanted[token], float(wanted[token].square().sum()))
    return total


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_sums_are_those_of_the_pruned_models_own_experts(name: str) -> None:
    """Whatever the family's way to choose experts, and its biases; padding counts for nothing."""
    model, geometry = dense(name)
    plan = half(geometry)
    pruned = prune(model, plan, geometry)
    pruned.set_experts_implementation("eager")
    listener = GateListener(SlicedRouters(model.config.to_dict(), plan, geometry, torch.float64))
    with_experts = [experts for experts in geometry.experts if experts is not None]
    run_pass(model, BLOCKS, geometry, [listener], batch_size=2, progress=silent, label="")
    assert list(listener.sums) == [experts.layer for experts in with_experts]
    tolerance = 1e-6 if name.startswith("deepseek") else 1e-9  # their routers compute in float32
    for experts in with_experts:
        found, expected = listener.sums[experts.layer], by_hand(model, pruned, experts.module)
        torch.testing.assert_close(found.products, expected.products, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(found.wanted, expected.wanted, rtol=tolerance, atol=tolerance)
        assert found.power == pytest.approx(expected.power, rel=tolerance)


@pytest.mark.parametrize("name", ["olmoe", "qwen3_moe"])
def test_experts_that_are_all_alike_lose_nothing_but_their_gates(name: str) -> None:
    """Weights that add up to 1 stay as they are; others are scaled back to what they were, per layer."""
    model, geometry = dense(name)
    with torch.no_grad():
        for experts in geometry.experts:
            if experts is not None:
                module = model.get_submodule(experts.module)
                module.gate_up_proj.copy_(module.gate_up_proj[:1].expand_as(module.gate_up_proj))
                module.down_proj.copy_(module.down_proj[:1].expand_as(module.down_proj))
    scales, reports = fit(model, half(geometry), geometry)
    if name == "qwen3_moe":
        assert scales == {} and all(report.ridge is None for report in reports)
        assert all(report.error_before < 1e-12 for report in reports)
        return
    for report in reports:
        assert report.error_after < 0.3 * report.error_before
    assert all(float(values.max()) < 0.95 for values in scales.values())


def test_scales_make_the_pruned_model_what_was_fitted() -> None:
    """Folded into the model that is cut, the experts' output is what the report says of it, biases included."""
    model, geometry = dense("gpt_oss")
    plan = half(geometry)
    scales, _ = fit(model, plan, geometry)
    factors = all_scales(plan, scales)
    assert [factors[0][expert] for expert in KEEP] == scales[0].tolist()
    assert all(factors[0][expert] == 1.0 for expert in range(12) if expert not in KEEP)
    scaled = dict(scale_experts(model.state_dict().items(), geometry, factors))
    module = geometry.experts[0].module  # type: ignore[union-attr]
    for leaf in ("down_proj", "down_proj_bias"):
        before, after = model.state_dict()[f"{module}.{leaf}"], scaled[f"{module}.{leaf}"]
        for expert, factor in enumerate(factors[0]):
            torch.testing.assert_close(after[expert], factor * before[expert])


def test_layer_by_layer_gives_the_same(tmp_path: Path) -> None:
    """Where only one layer is in memory, router and shared experts are taken while they are there."""
    model, _ = dense("qwen2_moe", torch.float32)
    model.save_pretrained(tmp_path)
    checkpoint = resolve_model(str(tmp_path))
    whole = load_model(checkpoint, device="cpu")
    plan = half(checkpoint.geometry)
    expected, _ = fit(whole, plan, checkpoint.geometry)
    streamed = StreamedModel(LazyLayers(checkpoint, device="cpu"))
    found, _ = fit(streamed, plan, checkpoint.geometry, checkpoint.config)
    assert found.keys() == expected.keys() and expected
    for layer, values in found.items():
        torch.testing.assert_close(values, expected[layer], rtol=1e-5, atol=1e-6)


def test_texts_count_by_their_shares() -> None:
    """A text that hardly counts hardly changes the scales."""
    model, geometry = dense("olmoe")
    plan, config = half(geometry), model.config.to_dict()

    def scales(texts: list[HandMadeBlocks], shares: list[float] | None) -> Tensor:
        given = {"dtype": torch.float64, "batch_size": 4, "shares": shares}
        return fit_on_dense_stream(model, config, plan, geometry, texts, texts, **given)[0][0]  # type: ignore[arg-type]

    alone = scales([BLOCKS], None)
    torch.testing.assert_close(scales([BLOCKS, OTHERS], [1 - 1e-9, 1e-9]), alone, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(scales([BLOCKS, OTHERS], [0.5, 0.5]), alone, rtol=1e-3)


@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe", "gpt_oss"])
def test_the_pruned_stream_is_that_of_the_pruned_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cut layer is fitted as on the dense stream; what leaves the last layer is what the model gives."""
    model, geometry = dense(name)
    plan = half(geometry)
    outputs: list[Tensor] = []
    plain = streams.run_layer

    def listening(*args: Any) -> Tensor:
        outputs.append(plain(*args))
        return outputs[-1]

    monkeypatch.setattr(streams, "run_layer", listening)
    config = model.config.to_dict()
    source = LoadedLayers(model, geometry)
    found = fit_on_pruned_stream(source, plan, [BLOCKS], [BLOCKS], batch_size=1, config=config)
    _, reports = fit_on_dense_stream(
        model, config, plan, geometry, [BLOCKS], [BLOCKS], dtype=torch.float64, batch_size=1
    )
    experts = [report for report in found.reports if report.module.endswith("experts")]
    assert len(experts) == len(reports)
    assert experts[0].error_before == pytest.approx(reports[0].error_before, rel=1e-9)
    assert math.isfinite(experts[-1].error_after) and experts[-1].error_after <= experts[-1].error_before
    scaled = scale_experts(model.state_dict().items(), geometry, all_scales(plan, found.scales))
    state = dict(scaled)
    state |= {f"{module}.weight": weight for module, weight in found.refitted.items()}
    twin, _ = dense(name)
    twin.load_state_dict(state)
    pruned = prune(twin, plan, geometry)
    pruned.set_experts_implementation("eager")
    batch = list(BLOCKS.batches(1))[-1]
    length = int((batch.document[0] == batch.document[0, 0]).sum())
    layer = pruned.get_submodule(geometry.layer_name(geometry.num_layers - 1))
    hidden: list[Any] = []
    hook = layer.register_forward_hook(lambda _module, _args, output: hidden.append(output))
    logits(pruned, batch.input_ids[:, :length])
    hook.remove()
    last = hidden[0][0] if isinstance(hidden[0], tuple) else hidden[0]
    torch.testing.assert_close(outputs[-1][0, :length], last.reshape(length, -1), rtol=1e-9, atol=1e-9)
