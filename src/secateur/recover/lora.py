"""Low-rank adapters through PEFT: put into a model's linear layers, and merged into its weights at the end.

Source: Hu et al. 2021 (arXiv 2106.09685): a weight W becomes W + (alpha / rank) B A, of which only A and B are trained.
B starts at zero, so an untrained adapter changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from secateur.errors import ConfigError
from secateur.families.schema import Family
from secateur.recipe import LoraSpec
from secateur.registry import unknown_name


def require_peft() -> None:
    """Raise ConfigError where PEFT is not installed."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError(
            "recover.lora needs the package peft, which is not installed. pip install peft, or remove lora."
        ) from None


def lora_targets(model: nn.Module, family: Family, targets: Sequence[str] | str) -> list[str]:
    """Return the names of the linear layers that get an adapter; all are inside decoder layers.

    Embeddings, norms and the head are never among them.

    Args:
        model: whose layers may differ, or lack sub-layers.
        family: of the model.
        targets: "all-linear", or ends of module names such as "q_proj" or "mlp.down_proj".

    Raises:
        ConfigError: an end that no linear layer has.
    """
    inside = {name: f"{family.layers}.{name}" for name in _linear_layers(model.get_submodule(family.layers))}
    if targets == "all-linear":
        return list(inside.values())
    chosen: dict[str, None] = {}
    for target in targets:
        found = [full for name, full in inside.items() if f".{name}".endswith(f".{target}")]
        if not found:
            known = {name.rpartition(".")[2] for name in inside}
            raise ConfigError(unknown_name("recover.lora target", target, known))
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _linear_layers(layers: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def add_lora(model: Any, spec: LoraSpec, family: Family, seed: int) -> Any:
    """Return the model with adapters in it, all else frozen; the given model is changed.

    Raises:
        ConfigError: PEFT is not installed, or a target is unknown.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=spec.dropout,
        target_modules=lora_targets(model, family, spec.targets),
        fan_in_fan_out=family.weight_layout == "in_out",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config)


def merge_lora(model: Any) -> Any:
    """Return the model that ``add_lora`` was given, with its adapters added to its weights and nothing else left."""
    merged = model.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config
    return merged
