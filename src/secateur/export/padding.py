"""A pruned model padded with zeros to shapes that more engines load; it computes the same and is larger.

FFN channels whose weights are zero, query heads whose output nobody reads, and whole sub-layers of zeros add nothing to
the residual stream, so the padded model equals the one that was padded, up to the order of summation. With ``uniform``
every layer has the same sizes again and the model is of its family's stock type: no code, no secateur, every engine.
Widths that are multiples of 32 or 256 are what quantised files want.
"""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import ExportError
from secateur.families.geometry import Geometry, Segment, build_geometry, family_axis, family_sublayer, is_inside
from secateur.families.loader import dense_model_type, family_of
from secateur.families.schema import evaluate
from secateur.records.units import ATTENTION, FFN, FFN_CHANNEL, GQA_GROUP, QUERY_HEAD
from secateur.store.artifacts import atomic_folder, disk_errors, write_text
from secateur.store.checkpoints import (
    Checkpoint,
    build_model,
    compare_reloaded,
    copy_side_files,
    load_model,
    load_tokenizer,
    resolve_model,
    save_model,
)
from secateur.store.tokenizers import PROBES, encode

_KINDS = (FFN_CHANNEL, GQA_GROUP, QUERY_HEAD)
_ABOUT_SINGLE_LAYERS = ("per_layer_config", "auto_map", "architectures")
_CARRIED = (".json", ".jinja", ".txt", ".model")
_WRITTEN_ANEW = ("config.json", "model.safetensors.index.json")
_TEMPLATES = "additional_chat_templates"
_SAMPLE_TOKENS = 64
_TOLERANCE = 1e-4
"""Largest difference of a logit, over the largest logit (or over 1)."""
_FRONT_MATTER = re.compile(r"\A(---\r?\n.*?\r?\n---\r?\n)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class PaddedLayer:
    """The sizes of one layer, by unit kind (``ffn_channel``, ``gqa_group``, ``query_head``); 0 where there is none.

    Attributes:
        before: as it was.
        after: with the zeros.
    """

    before: Mapping[str, int]
    after: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class PaddingReport:
    """What was written.

    Attributes:
        path: the padded model's folder.
        layers: sizes before and after.
        parameters_before: of the model, tied ones once.
        parameters_after: the zeros included.
        notes: what a user of the folder should know.
    """

    path: Path
    layers: tuple[PaddedLayer, ...]
    parameters_before: int
    parameters_after: int
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Padding:
    """What is to be written.

    Attributes:
        config: of the padded model, as plain data.
        layers: sizes before and after.
        before: the model's geometry.
        after: the padded model's.
        notes: what a user of the folder should know.
    """

    config: Mapping[str, Any]
    layers: tuple[PaddedLayer, ...]
    before: Geometry
    after: Geometry
    notes: tuple[str, ...]


def padded_folder(folder: Path, target: Path, *, multiple: int = 1, uniform: bool = False) -> PaddingReport:
    """Write the model in a folder with zeros added, compare it with the original, and return what was written.

    ``target`` appears under its name only after the reloaded model agreed with the one in ``folder``. Tokenizer,
    generation configuration, plan and licence come along; the README says that the model was padded.

    Args:
        folder: model, configuration and tokenizer, as ``export_huggingface`` writes them.
        target: the padded model's folder; replaced if it exists.
        multiple: FFN widths are rounded up to a multiple of it.
        uniform: all layers get the same sizes, and sub-layers that were removed come back as zeros.

    Raises:
        ExportError: nothing was asked for, the family's stock configuration has no such shape, the disk is full, or
            the padded model does not say what the original does.
        CheckpointError: the folder holds no model.
    """
    if target.resolve() == folder.resolve():
        raise ExportError(f"{target} is the model to be padded. Give another folder.")
    checkpoint = resolve_model(str(folder))
    padding = plan_padding(checkpoint.config, multiple=multiple, uniform=uniform)
    wide = "float64" if checkpoint.dtype == torch.float64 else "float32"
    with disk_errors(target), atomic_folder(target) as work:
        model = load_model(checkpoint, device="cpu", dtype=str(checkpoint.dtype).removeprefix("torch."))
        padded = _padded_model(model, padding)
        num_parameters = sum(parameter.numel() for parameter in padded.parameters())
        save_model(padded, work)
        del padded
        _carry_over(folder, work, padding.notes)
        model = model.to(getattr(torch, wide))
        inputs = _sample(checkpoint, model)
        with torch.inference_mode():
            scale = max(1.0, float(model(**inputs).logits.abs().max()))
        compare_reloaded(model, work, inputs, tolerance=_TOLERANCE * scale)
    return PaddingReport(
        path=target,
        layers=padding.layers,
        parameters_before=sum(torch.Size(shape).numel() for shape in checkpoint.shapes.values()),
        parameters_after=num_parameters,
        notes=padding.notes,
    )


def plan_padding(config: Mapping[str, Any], *, multiple: int = 1, uniform: bool = False) -> Padding:
    """Return the sizes and the configuration of a padded model; nothing is read or written.

    Args:
        config: the model's configuration as plain data, stock or of uneven shape.
        multiple: FFN widths are rounded up to a multiple of it.
        uniform: all layers get the same sizes, the smallest that hold every layer and that the stock type allows.

    Raises:
        ExportError: nothing was asked for, or the stock configuration has no such shape.
        FamilyError: the model type is not supported.
    """
    if multiple < 1 or (multiple == 1 and not uniform):
        raise ExportError(
            f"padding to a multiple of {multiple} changes nothing. Give multiple=2 or more, or uniform=True."
        )
    geometry = build_geometry(family_of(str(config["model_type"])), config)
    if geometry.experts:
        raise ExportError(
            f"layers of a {geometry.family.name} model have experts, and these cannot be filled up with zeros: a "
            "router would choose empty ones. Use shape: uniform, which keeps as many in every layer."
        )
    before = [{kind: geometry.axes[kind][layer].num_units for kind in _KINDS} for layer in range(geometry.num_layers)]
    notes: list[str] = []
    if uniform:
        groups, heads = _common_heads(geometry, before, notes)
        width = _rounded(max(1, *(sizes[FFN_CHANNEL] for sizes in before)), multiple)
        after = [{FFN_CHANNEL: width, GQA_GROUP: groups, QUERY_HEAD: heads}] * geometry.num_layers
    else:
        after = [{**sizes, FFN_CHANNEL: _rounded(sizes[FFN_CHANNEL], multiple)} for sizes in before]
    padded = _uniform_config(config, geometry, after[0]) if uniform else _wider_config(config, geometry, after)
    layers = tuple(PaddedLayer(first, second) for first, second in zip(before, after, strict=True))
    notes.insert(0, _describe(layers, padded, uniform, multiple))
    return Padding(padded, layers, geometry, build_geometry(geometry.family, padded), tuple(notes))


def _rounded(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _common_heads(geometry: Geometry, sizes: list[dict[str, int]], notes: list[str]) -> tuple[int, int]:
    """Return the fewest key/value heads and query heads that hold those of every layer and that the family allows."""
    family, attended = geometry.family, [layer for layer in sizes if layer[GQA_GROUP]]
    if family_axis(family, GQA_GROUP).fixed:
        return geometry.dimensions[family_axis(family, GQA_GROUP).count], geometry.dimensions["num_attention_heads"]
    groups = max((layer[GQA_GROUP] for layer in attended), default=1)
    each = max((layer[QUERY_HEAD] // layer[GQA_GROUP] for layer in attended), default=1)
    most = max(groups * each, geometry.dimensions["hidden_size"])
    allowed = [
        (groups_now * each_now + groups_now, groups_now, groups_now * each_now)
        for groups_now in range(groups, most + 1)
        for each_now in range(each, most // groups_now + 1)
        if _divides(geometry, groups_now * each_now)
    ]
    if not allowed:
        raise ExportError(
            f"no head count of {groups} or more groups of {each} or more query heads divides the hidden_size of this "
            f"{family.name} model ({geometry.dimensions['hidden_size']}), as its stock configuration demands. Keep "
            "the uneven model, which needs no such number."
        )
    _, chosen, heads = min(allowed)
    if heads != groups * each:
        notes.append(
            f"The widest layers need {groups} key/value heads and {groups * each} query heads; {chosen} and {heads} "
            "are the next that the stock configuration accepts."
        )
    return chosen, heads


def _divides(geometry: Geometry, heads: int) -> bool:
    divisor = family_axis(geometry.family, QUERY_HEAD).divisor
    if divisor is None:
        return True
    names = {**geometry.dimensions, "units": heads}
    return evaluate(divisor.of, names) % evaluate(divisor.number, names) == 0


def _uniform_config(config: Mapping[str, Any], geometry: Geometry, sizes: Mapping[str, int]) -> dict[str, Any]:
    """Return the stock configuration of a model all of whose layers have the given sizes."""
    data = {key: copy.deepcopy(value) for key, value in config.items() if key not in _ABOUT_SINGLE_LAYERS}
    data["model_type"] = dense_model_type(str(config["model_type"]))
    for kind in _KINDS:  # query heads after their groups, which write a number of them too
        data |= geometry.config_updates(kind, sizes[kind])
    return data


def _wider_config(config: Mapping[str, Any], geometry: Geometry, after: list[dict[str, int]]) -> dict[str, Any]:
    """Return the configuration with other FFN widths; a model of uneven shape stays one."""
    data = copy.deepcopy(dict(config))
    if not config.get("per_layer_config"):
        return data | geometry.config_updates(FFN_CHANNEL, after[0][FFN_CHANNEL])
    overrides = {int(layer): dict(values) for layer, values in data["per_layer_config"].items()}
    for layer, sizes in enumerate(after):
        if sizes[FFN_CHANNEL]:
            own = overrides.setdefault(layer, {})
            own.update(geometry.config_updates(FFN_CHANNEL, sizes[FFN_CHANNEL], layer))
    data["per_layer_config"] = {str(layer): values for layer, values in sorted(overrides.items())}
    return data


def _describe(layers: tuple[PaddedLayer, ...], config: Mapping[str, Any], uniform: bool, multiple: int) -> str:
    if all(layer.before == layer.after for layer in layers):
        already = "All layers were of the same size" if uniform else f"All FFN widths were multiples of {multiple}"
        return f"{already} already; nothing was added."
    if not uniform:
        return f"FFN widths were rounded up to multiples of {multiple} with zeros; the model computes what it did."
    sizes = layers[0].after
    return (
        f"All layers were given the same sizes with zeros ({sizes[FFN_CHANNEL]} FFN channels, {sizes[GQA_GROUP]} "
        f"key/value heads, {sizes[QUERY_HEAD]} query heads), so that it is an ordinary {config['model_type']} model, "
        "which needs neither secateur nor trust_remote_code. It computes what it did, and is larger and slower."
    )


def _padded_model(model: Any, padding: Padding) -> Any:
    """Return the padded model, in the dtype of ``model``."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    data = {key: value for key, value in padding.config.items() if key not in ("model_type", "transformers_version")}
    model_type = padding.config["model_type"]
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **data))
        shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
        return build_model(padding.config, _padded_tensors(model.state_dict(), shapes, padding), model)
    except (StrictDataclassError, ValueError) as error:
        raise ExportError(
            f"the configuration of {model_type} refuses the padded sizes: {error} Keep the uneven model, or round FFN "
            "widths alone (multiple without uniform)."
        ) from None


def _padded_tensors(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], padding: Padding
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the padded model: the model's own numbers in their places, and zeros."""
    places = _places(padding)
    neutral = _brought_back_norms(padding)
    rows_first = padding.before.family.weight_layout == "out_in"
    like = next(iter(state.values()))
    for name, shape in shapes.items():
        module, _, leaf = name.rpartition(".")
        if name not in state:
            fill = 1.0 if leaf == "weight" and is_inside(name, neutral) else 0.0
            yield name, torch.full(shape, fill, dtype=like.dtype, device=like.device)
            continue
        tensor = state[name]
        for side in ("out", "in"):
            found = places.get((module, side))
            if found and (leaf == "weight" or side == "out"):
                dim = 0 if leaf != "weight" or (side == "out") == rows_first else 1
                tensor = _spread(tensor, dim, shape[dim], torch.tensor(found))
        yield name, tensor


def _spread(tensor: Tensor, dim: int, size: int, places: Tensor) -> Tensor:
    """Return a tensor of ``size`` rows (``dim`` 0) or columns (1), zeros but for the given ones at their places."""
    shape = list(tensor.shape)
    shape[dim] = size
    return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device).index_copy_(dim, places, tensor)


def _places(padding: Padding) -> dict[tuple[str, str], list[int]]:
    """Return for each side of a linear layer that grows where its rows or columns go, in their old order."""
    pairs: dict[tuple[str, str], list[tuple[Segment, Segment, int]]] = {}
    for kind in (FFN_CHANNEL, GQA_GROUP):  # a group's segments hold its query heads
        for before, after in zip(padding.before.axes[kind], padding.after.axes[kind], strict=True):
            if before.num_units:
                for old, new in zip(before.segments, after.segments, strict=True):
                    pairs.setdefault((old.module, old.side), []).append((old, new, before.num_units))
    places: dict[tuple[str, str], list[int]] = {}
    for key, segments in pairs.items():
        found = {
            old.offset + unit * old.width + row: new.offset + unit * new.width + row
            for old, new, units in segments
            for unit in range(units)
            for row in range(old.width)
        }
        places[key] = [found[row] for row in range(len(found))]
    return places


def _brought_back_norms(padding: Padding) -> frozenset[str]:
    """Return the norms of sub-layers that come back as zeros; they pass on what they get."""
    return frozenset(
        f"{padding.before.layer_name(layer)}.{norm}"
        for kind in (ATTENTION, FFN)
        for layer in range(padding.before.num_layers)
        if not padding.before.has_sublayer(kind, layer)
        for norm in family_sublayer(padding.before.family, kind).norms
    )


def _carry_over(folder: Path, work: Path, notes: tuple[str, ...]) -> None:
    """Copy tokenizer, generation configuration, plan and licence, and the README with a word on the padding."""
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in _CARRIED and file.name not in _WRITTEN_ANEW:
            shutil.copy2(file, work / file.name)
    if (folder / _TEMPLATES).is_dir():
        shutil.copytree(folder / _TEMPLATES, work / _TEMPLATES)
    copy_side_files(folder, work)
    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    write_text(work / "README.md", _padded_card(text, notes))


def _padded_card(text: str, notes: tuple[str, ...]) -> str:
    """Return a model card with a paragraph on the padding after its front matter."""
    match = _FRONT_MATTER.match(text)
    end = match.end() if match else 0
    words = f"**Padded with zeros.** {' '.join(notes)}"
    rest = " What follows describes the model before that." if text[end:].strip() else ""
    return f"{text[:end]}\n{words}{rest}\n\n{text[end:].lstrip()}"


def _sample(checkpoint: Checkpoint, model: Any) -> dict[str, Any]:
    """Return model inputs: text of every kind where there is a tokenizer, else one token id after another."""
    if (checkpoint.folder / "tokenizer_config.json").is_file():
        ids = encode(load_tokenizer(checkpoint), "\n".join(PROBES), add_special_tokens=True)[:_SAMPLE_TOKENS]
    else:
        ids = list(range(min(_SAMPLE_TOKENS, checkpoint.geometry.dimensions["vocab_size"])))
    ids = ids[: checkpoint.geometry.dimensions.get("num_positions", len(ids))]
    return {"input_ids": torch.tensor([ids], device=model.device), "use_cache": False}
