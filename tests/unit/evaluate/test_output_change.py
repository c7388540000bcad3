"""Candidates are measured exactly as running the changed model whole would, and leave the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.evaluate.output_change import Measure, OutputChange, js_divergence, kl_divergence, patched
from secateur.families.loader import family_of
from secateur.families.schema import Family
from secateur.stream.forward import run_logits
from secateur.stream.sources import LoadedLayers
from tests.blocks import HandMadeBlocks, hand_made_blocks
from tests.conftest import geometry_of, pico_model


@pytest.fixture
def llama() -> Family:
    """The family of the model under test."""
    return family_of("llama")


@pytest.fixture
def model(llama: Family) -> Any:
    """A tiny float64 model."""
    return pico_model(llama)


def _halved(model: Any, layer: int) -> dict[str, Tensor]:
    name = f"model.layers.{layer}.mlp.down_proj.weight"
    weight = model.get_parameter(name).detach().clone()
    weight[:, ::2] = 0
    return {name: weight}


def _whole(model: Any, blocks: HandMadeBlocks, family: Family, patch: dict[str, Tensor], measure: Measure) -> float:
    """Measure with whole forward passes and explicit probabilities."""
    total, tokens = 0.0, 0
    for batch in blocks.batches(2):
        dense = run_logits(model, batch, family)
        with patched(model, patch):
            changed = run_logits(model, batch, family)
        p, q = dense.softmax(-1), changed.softmax(-1)
        m = (p + q) / 2
        for row, column in batch.predicted.nonzero().tolist():
            at = row, column - 1
            if measure == "kl":
                total += float((p[at] * (p[at] / q[at]).log()).sum())
            elif measure == "js":
                total += float((p[at] * (p[at] / m[at]).log() + q[at] * (q[at] / m[at]).log()).sum() / 2)
            else:
                total -= float(q[at][batch.input_ids[row, column]].log())
            tokens += 1
    return total / tokens


@pytest.mark.parametrize("measure", ["kl", "js", "loss"])
def test_a_candidate_is_measured_as_by_running_the_changed_model_whole(
    model: Any, llama: Family, measure: Measure
) -> None:
    """Over any layers, and however the text is batched."""
    blocks, patch = hand_made_blocks(), {}
    for layer in range(2):
        patch |= _halved(model, layer)
    with torch.no_grad():
        expected = _whole(model, blocks, llama, patch, measure)
    meter = OutputChange(LoadedLayers(model, geometry_of(model, llama)), blocks, batch_size=3, measure=measure)
    unchanged, changed = meter.together([dict, lambda: patch])
    assert changed == pytest.approx(expected, rel=1e-9)
    if measure != "loss":
        assert unchanged == pytest.approx(0, abs=1e-12)


def test_cuts_of_single_layers_measured_alone_equal_those_measured_whole(model: Any, llama: Family) -> None:
    """Skipping the layers before the cut changes nothing, and the sums can be taken up after any batch."""
    meter = OutputChange(LoadedLayers(model, geometry_of(model, llama)), hand_made_blocks(), batch_size=1)
    patches = [_halved(model, 0), _halved(model, 1)]
    expected = meter.together([lambda: patches[0], lambda: patches[1]])
    candidates = [[lambda: patches[0]], [lambda: patches[1]]]
    first, *_ = (sums for sums in meter.alone(candidates))
    *_, last = meter.alone(candidates)
    assert last.means() == pytest.approx(expected, rel=1e-12)
    begun = next(iter(meter.alone(candidates)))
    assert begun.num_batches == 1
    *_, resumed = meter.alone(candidates, begun)
    assert resumed.means() == pytest.approx(expected, rel=1e-12)
    assert resumed.num_batches == meter.num_batches
    del first


@pytest.mark.parametrize("measure", ["kl", "js", "loss"])
def test_cuts_on_top_of_a_base_equal_patching_both_whole(model: Any, llama: Family, measure: Measure) -> None:
    """What outputs are compared with stays the dense model; an empty cut measures the base alone."""
    blocks, base = hand_made_blocks(), _halved(model, 1)
    gone = {name: torch.zeros(()).expand_as(values) for name, values in _halved(model, 0).items()}
    with torch.no_grad():
        expected = [_whole(model, blocks, llama, base | patch, measure) for patch in (gone, _halved(model, 0), {})]
    meter = OutputChange(LoadedLayers(model, geometry_of(model, llama)), blocks, batch_size=3, measure=measure)
    *_, sums = meter.alone([[lambda: gone, lambda: _halved(model, 0)], [dict]], base=base)
    assert sums.means() == pytest.approx(expected, rel=1e-9)


def test_the_model_keeps_its_weights_whatever_happens(model: Any, llama: Family) -> None:
    """Also after an error inside the measurement."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    meter = OutputChange(LoadedLayers(model, geometry_of(model, llama)), hand_made_blocks())
    broken = {name: torch.full_like(value, torch.nan) for name, value in _halved(model, 0).items()}
    with pytest.raises(CheckpointError, match=r"not finite \(changed: model.layers.0.mlp.down_proj.weight\)"):
        meter.together([lambda: broken])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_divergences_of_known_distributions() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4), and JS of certain opposites, which is log 2."""
    half, quarter = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.25, 0.75]]).double().log()
    assert kl_divergence(half, quarter).item() == pytest.approx(0.5 * torch.log(torch.tensor(4 / 3)).item())
    opposite = torch.tensor([[0.0, -1000.0]]).double()
    assert js_divergence(opposite, opposite.flip(1)).item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
