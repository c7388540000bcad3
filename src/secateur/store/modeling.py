"""transformers classes for models whose layers differ, under our own model type (``pruned_llama`` ...).

A stock class gives every layer the same configuration. Ours builds the stock model and then each layer again from
``config.per_layer_config[layer]``, transformers' own record of per-layer sizes. Where that record says in ``skip`` that
a layer lacks its attention or feed-forward sub-layer, a module without parameters takes its place. Everything else
(caches, generation, attention back ends) is the stock model's. Classes are made from the family files and registered
with transformers' Auto classes when one is first asked for (``secateur.autoload``), so transformers is imported inside
the functions.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from secateur.families.geometry import SKIP_WORDS
from secateur.families.loader import UNEVEN_PREFIX, families, family_of


def _accept_any_sizes(config: Any) -> None:
    """Stock configurations check head counts that here belong to single layers; the shapes of the weights decide."""
    del config


@cache
def uneven_models(model_type: str) -> tuple[Any, Any]:
    """Return the (base model, causal language model) classes for a stock model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

    stock, config_class = CONFIG_MAPPING[model_type], uneven_config(model_type)
    base = _uneven_model(MODEL_MAPPING[stock], config_class, model_type)
    causal = _uneven_model(MODEL_FOR_CAUSAL_LM_MAPPING[stock], config_class, model_type)
    return base, causal


@cache
def uneven_config(model_type: str) -> Any:
    """Return the configuration class for a stock model type; loads no modelling code."""
    from huggingface_hub.dataclasses import strict
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    stock_config = CONFIG_MAPPING[model_type]
    name = stock_config.__name__.removesuffix("Config")
    return strict(
        type(
            f"Pruned{name}Config",
            (stock_config,),
            {
                "__doc__": f"{stock_config.__name__} whose layers may differ in width (``per_layer_config``).",
                "__module__": __name__,
                "model_type": UNEVEN_PREFIX + model_type,
                "validate_architecture": _accept_any_sizes,
                "validate_rope": _accept_any_sizes,
            },
        )
    )


def _uneven_model(stock_model: Any, config_class: Any, model_type: str) -> Any:
    from secateur.store.removed import remove_sublayers

    family = family_of(model_type)

    def __init__(self: Any, config: Any) -> None:
        stock_model.__init__(self, _even_copy(config, model_type))
        layers = _layer_list(self, family.layers)
        for index in range(len(layers)):
            layer_config = config.per_layer_config[index]
            layer_config._attn_implementation = self.config._attn_implementation
            layers[index] = type(layers[index])(layer_config, layer_idx=index)
            skipped = getattr(layer_config, "skip", ())
            remove_sublayers(layers[index], family, [kind for kind, word in SKIP_WORDS.items() if word in skipped])
        config._attn_implementation = self.config._attn_implementation  # the stock model chose one; masks depend on it
        self.config = config
        self.post_init()

    return type(
        f"Pruned{stock_model.__name__}",
        (stock_model,),
        {
            "__doc__": f"{stock_model.__name__} with layers that differ.",
            "__module__": __name__,
            "__init__": __init__,
            "config_class": config_class,
        },
    )


def _layer_list(model: Any, path: str) -> Any:
    """Return the module list at ``path`` in the causal model, or at its tail in the bare base model."""
    prefix = f"{model.base_model_prefix}."
    inside = path if hasattr(model, model.base_model_prefix) else path.removeprefix(prefix)
    return model.get_submodule(inside)


def _even_copy(config: Any, model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    data = copy.deepcopy(config.to_dict())
    data.pop("per_layer_config", None)
    data.pop("model_type", None)
    even = CONFIG_MAPPING[model_type].from_dict(data)
    even._attn_implementation = config._attn_implementation
    return even


@cache
def register_uneven_models() -> None:
    """Make transformers' Auto classes know every uneven model type; does nothing the second time."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    for family in families().values():
        for model_type in family.model_types:
            config_class = uneven_config(model_type)
            base, causal = uneven_models(model_type)
            AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            AutoModel.register(config_class, base, exist_ok=True)
            AutoModelForCausalLM.register(config_class, causal, exist_ok=True)
