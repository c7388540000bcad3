"""Mixtures of experts read from disk layer by layer: the whole model's numbers, and one layer's weights at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.files import CACHE_VARIABLE
from secateur.records.units import EXPERT
from secateur.store.checkpoints import load_model, resolve_model
from secateur.stream.forward import run_logits
from secateur.stream.hidden import HiddenStates
from secateur.stream.layers import LayerStream, LayerView, stream_through
from secateur.stream.sources import LazyLayers
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of
from tests.moe import moe_model
from tests.pruning import plan_keeping, prune


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of the test's own."""
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))


def uneven(family: Family) -> Any:
    """Return a model that has fewer experts in its last layer than before."""
    model = moe_model(family.name)
    geometry = geometry_of(model, families()[family.name])
    units = geometry.num_units(EXPERT)
    keep = [list(range(count)) for count in units]
    keep[-1] = [unit for unit in range(units[-1]) if unit % 3 != 1]
    return prune(model, plan_keeping(geometry, {EXPERT: keep}, "uneven"), geometry)


MODELS: dict[str, Callable[[Family], Any]] = {"dense": lambda family: moe_model(family.name), "uneven": uneven}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_read_layer_by_layer_is_the_loaded_model(
    moe_family: Family, make: Callable[[Family], Any], dtype: str, tmp_path: Path
) -> None:
    """Logits are equal bit for bit, buffers have the loaded model's dtypes, and only the layer at work has weights."""
    make(moe_family).save_pretrained(tmp_path / "model", max_shard_size="40KB")
    checkpoint = resolve_model(str(tmp_path / "model"))
    loaded = load_model(checkpoint, device="cpu", dtype=dtype)
    source = LazyLayers(checkpoint, device="cpu", dtype=dtype)
    handed: list[nn.Module] = []

    def on_layer(view: LayerView) -> None:
        handed.append(view.module)
        everywhere = [*handed, *source.model.get_submodule(moe_family.layers)]
        at_work = [m for m in everywhere if any(p.device.type != "meta" for p in m.parameters())]
        assert at_work == [view.module]
        expected = loaded.get_submodule(source.geometry.layer_name(view.index)).state_dict()
        assert list(view.module.state_dict()) == list(expected)
        for name, value in view.module.state_dict().items():
            assert value.dtype == expected[name].dtype
            assert torch.equal(value, expected[name])

    blocks = hand_made_blocks()
    stream = LayerStream(source, blocks, 3)
    with HiddenStates() as hidden, torch.inference_mode():
        stream_through(stream, hidden, on_layer)
        for batch, logits in stream.logits(hidden):
            assert torch.equal(logits, run_logits(loaded, batch, moe_family))
    assert len(handed) == 2
