"""What a saved model needs to load where secateur is not installed, or transformers is older.

A model of uneven shape has a Python file in its folder, made from one template and the family file; ``auto_map`` in
config.json names its classes. secateur itself runs the same text (``modeling``), so that both are the same model.
"""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from secateur.families.geometry import family_sublayer
from secateur.families.loader import UNEVEN_PREFIX, family_of, is_supported
from secateur.families.older_keys import older_keys
from secateur.records.units import ATTENTION, FFN
from secateur.store.artifacts import write_text

_HEAD = "lm_head"


def code_file(model_type: str) -> str:
    """Return the name of the file for a stock model type; one each, because a process may load several."""
    return f"modeling_{UNEVEN_PREFIX}{model_type}.py"


def class_names(model_type: str) -> dict[str, str]:
    """Return the names of the classes in the file, by the Auto class that makes them."""
    return {auto: f"Pruned{stock}" for auto, stock in _stock_names(model_type).items()}


def auto_map(model_type: str) -> dict[str, str]:
    """Return what config.json says under ``auto_map``: where each Auto class finds its class."""
    module = code_file(model_type).removesuffix(".py")
    return {auto: f"{module}.{name}" for auto, name in class_names(model_type).items()}


def portable_code(model_type: str) -> str:
    """Return the text of the file for a stock model type."""
    family, stock, ours = family_of(model_type), _stock_names(model_type), class_names(model_type)
    attention, ffn = family_sublayer(family, ATTENTION), family_sublayer(family, FFN)
    template = resources.files("secateur.store") / "templates" / "modeling_pruned.py.template"
    return Template(template.read_text(encoding="utf-8")).substitute(
        model_type=UNEVEN_PREFIX + model_type,
        layers=family.layers,
        head=_HEAD,
        imports=", ".join(sorted(stock.values())),
        stock_config=stock["AutoConfig"],
        stock_base=stock["AutoModel"],
        stock_causal=stock["AutoModelForCausalLM"],
        config=ours["AutoConfig"],
        base=ours["AutoModel"],
        causal=ours["AutoModelForCausalLM"],
        attention_modules=_listed(attention.modules),
        attention_norms=_listed(attention.norms),
        ffn_modules=_listed(ffn.modules),
        ffn_norms=_listed(ffn.norms),
    )


def write_portable_code(folder: Path, model_type: str) -> None:
    """Write the file for a stock model type into a model folder."""
    write_text(folder / code_file(model_type), portable_code(model_type))


def write_older_keys(folder: Path) -> None:
    """Add to a model folder's config.json what readers older than transformers 5 look for elsewhere."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    model_type = str(config.get("model_type"))
    added = older_keys(config, family_of(model_type)) if is_supported(model_type) else {}
    if added:
        write_text(file, json.dumps({**config, **added}, indent=2, ensure_ascii=False) + "\n")


def _listed(names: tuple[str, ...]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


def _stock_names(model_type: str) -> dict[str, Any]:
    """Return the names of transformers' own classes for a model type, by Auto class; loads no modelling code."""
    from transformers.models.auto import configuration_auto, modeling_auto

    return {
        "AutoConfig": configuration_auto.CONFIG_MAPPING_NAMES[model_type],
        "AutoModel": modeling_auto.MODEL_MAPPING_NAMES[model_type],
        "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type],
    }
