"""Adapters: where they go, that they start as nothing, and that merging them leaves the model as it was built."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from secateur.errors import ConfigError
from secateur.families.schema import Family
from secateur.recipe import LoraSpec
from secateur.records.units import ATTENTION
from secateur.recover.lora import add_lora, lora_targets, merge_lora, require_peft
from secateur.store.removed import remove_sublayers
from tests.conftest import geometry_of, pico_model
from tests.pruning import choose_units, logits, plan_keeping, prune, relative_difference
from tests.training import LLAMA, pico_student

TOKENS = torch.arange(12)[None] % 20


def uneven_model(family: Family, dtype: torch.dtype = torch.float64) -> Any:
    """Return a model of a family with uneven layers and fewer tokens."""
    dense = pico_model(family, dtype)
    geometry = geometry_of(dense, family)
    kinds = [kind for kind in ("ffn_channel", "gqa_group") if geometry.axes[kind][0].fixed is None]
    kept = dict(choose_units(geometry, kinds, "uneven"))
    return prune(dense, plan_keeping(geometry, kept, "uneven", tokens=[*range(3), *range(3, 97, 2)]), geometry)


def disturb(model: Any) -> None:
    """Give every adapter weight a random value."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3, generator=generator)


def test_adapters_start_as_nothing_and_merge_into_the_same_model(family: Family) -> None:
    """In every family, with uneven layers and fewer tokens: same class, same names, exactly the same weights."""
    model = uneven_model(family)
    kind, before = type(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    adapted = add_lora(model, LoraSpec(rank=2), family, seed=0)
    merged = merge_lora(adapted)
    assert merged is model
    assert type(merged) is kind
    assert not hasattr(merged, "peft_config")
    assert not any("peft" in type(module).__module__ for module in merged.modules())
    after = merged.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


def test_merged_weights_do_what_the_adapters_did(family: Family) -> None:
    """The logits of both are equal, and not those of the model before."""
    model = uneven_model(family)
    plain = logits(model, TOKENS)
    adapted = add_lora(model, LoraSpec(rank=2), family, seed=0).eval()
    disturb(adapted)
    learned = logits(adapted, TOKENS)
    assert relative_difference(learned, plain) > 1e-3
    assert relative_difference(logits(merge_lora(adapted), TOKENS), learned) < 1e-9


def test_only_adapters_of_decoder_layers_are_trained() -> None:
    """Embeddings, norms and the head stay; tied ones too."""
    adapted = add_lora(pico_student(), LoraSpec(rank=3), LLAMA, seed=0)
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7
    assert all(".layers." in name and "lora_" in name for name in trained)


def test_a_missing_sub_layer_has_no_adapter() -> None:
    """The rest has."""
    model = pico_student()
    remove_sublayers(model.model.layers[1], LLAMA, [ATTENTION])
    names = lora_targets(model, LLAMA, "all-linear")
    assert [name for name in names if "layers.1" in name] == [
        f"model.layers.1.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    ]
    assert lora_targets(model, LLAMA, ["q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    adapted = add_lora(model, LoraSpec(rank=2), LLAMA, seed=0)
    disturb(adapted)
    learned = logits(adapted.eval(), TOKENS)
    assert relative_difference(logits(merge_lora(adapted), TOKENS), learned) < 1e-4


def test_targets_are_ends_of_names_and_unknown_ones_are_refused() -> None:
    """A longer end chooses fewer; the nearest name is offered."""
    model = pico_student()
    assert lora_targets(model, LLAMA, ["mlp.down_proj"]) == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    with pytest.raises(ConfigError, match=r"lora target 'qproj'. Did you mean 'q_proj'\? Known: down_proj"):
        lora_targets(model, LLAMA, ["qproj", "v_proj"])
    with pytest.raises(ConfigError, match="'lm_head'"):
        lora_targets(model, LLAMA, ["lm_head"])


def test_the_seed_decides_the_adapters_and_nothing_else_changes() -> None:
    """Same seed, same adapters; the caller's random numbers go on as they would have."""

    def first_weights(seed: int) -> torch.Tensor:
        adapted = add_lora(pico_student(), LoraSpec(), LLAMA, seed)
        return torch.cat([p.flatten() for n, p in adapted.named_parameters() if "lora_A" in n])

    torch.manual_seed(5)
    wished = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(first_weights(0), first_weights(0))
    assert torch.equal(torch.rand(3), wished)
    assert not torch.equal(first_weights(0), first_weights(1))


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With how to get it."""
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"package peft, which is not installed. pip install peft"):
        require_peft()
