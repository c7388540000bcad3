"""Low-rank adapters through PEFT: put into a model's linear layers, and merged into its weights at the end.

Source: Hu et al. 2021 (arXiv 2106.09685): a weight W becomes W + (alpha / rank) B A, of which only A and B are trained.
B starts at zero, so an untrained adapter changes nothing.

Beside masks (``beside``) adapters are in the model only while they are trained. What they learned is handed over as its
factors, and the model's own weights are never touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ConfigError
from secateur.families.schema import Family
from secateur.recipe import LoraSpec
from secateur.records.masks import AdapterSettings, LowRank
from secateur.registry import unknown_name


def require_peft(key: str = "recover.lora") -> None:
    """Raise ConfigError where PEFT is not installed; ``key`` is what asks for it."""
    try:
        import peft  # noqa: F401
    except ImportError:
        raise ConfigError(
            f"{key} needs the package peft, which is not installed. pip install peft, or remove lora."
        ) from None


def lora_targets(
    model: nn.Module, family: Family, targets: Sequence[str] | str, key: str = "recover.lora"
) -> list[str]:
    """Return the names of the linear layers that get an adapter; all are inside decoder layers.

    Embeddings, norms and the head are never among them.

    Args:
        model: whose layers may differ, or lack sub-layers.
        family: of the model.
        targets: "all-linear", or ends of module names such as "q_proj" or "mlp.down_proj".
        key: what asks for them, for the message.

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
            raise ConfigError(unknown_name(f"{key} target", target, known))
        chosen |= dict.fromkeys(found)
    return list(chosen)


def _linear_layers(layers: nn.Module) -> list[str]:
    from transformers.pytorch_utils import Conv1D

    return [name for name, module in layers.named_modules() if isinstance(module, nn.Linear | Conv1D)]


def add_lora(model: Any, spec: LoraSpec, family: Family, seed: int, key: str = "recover.lora") -> Any:
    """Return the model with adapters in it, all else frozen; the given model is changed.

    Raises:
        ConfigError: PEFT is not installed, or a target is unknown; the message names ``key``, which asks for it.
    """
    require_peft(key)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # any number will do
        lora_dropout=spec.dropout,
        target_modules=lora_targets(model, family, spec.targets, key),
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


@dataclass(frozen=True, slots=True)
class Beside:
    """Adapters that are in a model for now.

    Attributes:
        adapted: the model around the given one, as PEFT made it.
        scale: alpha over rank.
    """

    adapted: Any
    scale: float

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights to train."""
        return [parameter for name, parameter in self.adapted.named_parameters() if "lora_" in name]

    def without(self) -> AbstractContextManager[None]:
        """Let the model run as if they were not there, for as long as the context lasts."""
        return self.adapted.disable_adapter()  # type: ignore[no-any-return]

    def learned(self) -> LowRank:
        """Return what they add to which weights, on the CPU."""
        from peft.tuners.lora import LoraLayer

        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in self.adapted.get_base_model().named_modules():
            if isinstance(module, LoraLayer):
                sides: tuple[Any, Any] = module.lora_A["default"], module.lora_B["default"]
                first, second = (side.weight.detach().cpu().clone() for side in sides)
                factors[name] = first, second
        return LowRank(self.scale, factors)


@contextmanager
def beside(model: Any, settings: AdapterSettings, family: Family, seed: int, key: str) -> Iterator[Beside]:
    """Put adapters into a model's linear layers for as long as the context lasts.

    Args:
        model: afterwards it is as it was, whatever the adapters learned.
        settings: rank, scale and places of the adapters.
        family: of the model.
        seed: of their first values.
        key: what asks for them, for messages.

    Raises:
        ConfigError: PEFT is not installed, or a target is unknown.
    """
    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    spec = LoraSpec(rank=settings.rank, alpha=settings.alpha, targets=targets)
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted = add_lora(model, spec, family, seed, key)
    try:
        yield Beside(adapted, settings.alpha / settings.rank)
    finally:
        adapted.unload()
        if hasattr(model, "peft_config"):
            del model.peft_config
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
