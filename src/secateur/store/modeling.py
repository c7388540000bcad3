"""transformers classes for models whose layers differ, under our own model type (``pruned_llama`` ...).

A stock class gives every layer the same configuration. Ours builds the stock model and then each special layer again
from ``config.per_layer_config``, transformers' own record of per-layer sizes. Where that record says in ``skip`` that a
layer lacks its attention or feed-forward sub-layer, a module without parameters takes its place. Everything else
(caches, generation, attention back ends) is the stock model's. The classes are those of the file that lies in every
such model's folder (``portable``), compiled here and registered with transformers' Auto classes when one is first asked
for (``secateur.autoload``), so transformers is imported inside the functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from secateur.families.loader import families
from secateur.store.portable import (
    auto_map,
    class_names,
    code_file,
    portable_code,
    write_older_keys,
    write_portable_code,
)


@cache
def uneven_classes(model_type: str) -> dict[str, Any]:
    """Return the configuration, base model and causal language model for a stock model type, by Auto class."""
    place: dict[str, Any] = {"__name__": __name__}
    exec(compile(portable_code(model_type), f"<{code_file(model_type)} of secateur>", "exec"), place)
    classes = {auto: place[name] for auto, name in class_names(model_type).items()}
    config_class = classes["AutoConfig"]
    config_class.save_pretrained = _saving_code(model_type, config_class.save_pretrained)
    return classes


def _saving_code(model_type: str, save: Callable[..., None]) -> Callable[..., None]:
    """Return a ``save_pretrained`` for configurations that leaves the code beside config.json; models call it too."""

    def save_pretrained(self: Any, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        self.auto_map = auto_map(model_type)
        save(self, save_directory, *args, **kwargs)
        write_portable_code(Path(save_directory), model_type)
        write_older_keys(Path(save_directory))

    return save_pretrained


@cache
def register_uneven_models() -> None:
    """Make transformers' Auto classes know every uneven model type; does nothing the second time."""
    import transformers

    for family in families().values():
        for model_type in family.model_types:
            classes = uneven_classes(model_type)
            config_class = classes["AutoConfig"]
            transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
            for auto in ("AutoModel", "AutoModelForCausalLM"):
                getattr(transformers, auto).register(config_class, classes[auto], exist_ok=True)
