"""A checkpoint's weights by the names that its model gives them, read from safetensors one entry at a time.

Files may name tensors differently than the model, and hold in parts what the model holds in one piece (experts, each by
itself). transformers' own rules for loading say which, and its own operations put the parts together; only the parts of
the entries that are asked for are ever in memory.
"""

from __future__ import annotations

import copy
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.store.checkpoints import Checkpoint


def weightless_model(checkpoint: Checkpoint, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's model with every parameter on the meta device and every buffer in memory.

    Buffers that are not stored (rotary tables, scales of embeddings) are thus made by the model's own code, in the
    dtype that loading gives them.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped]
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    with torch.inference_mode(False), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    return model.eval()


def kept_dtype(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that an entry has in a model of ``dtype``: some models keep a few in float32 whatever is asked.

    Args:
        model: a transformers model.
        name: of an entry of its state.
        dtype: of the model.
    """
    for pattern, kept in model._get_dtype_plan(dtype).items():
        if re.search(pattern.replace("*", ".*"), name):
            found: torch.dtype = kept
            return found
    return dtype


def iter_parameters(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Return (name, tensor) pairs of everything that a checkpoint's model stores, read when they are asked for.

    They come in the order of the model's state, layer after layer. A tied tensor comes once, under the name that the
    others are tied to.

    Args:
        checkpoint: a model on disk.
        dtype: of the tensors, but for those that the model keeps in float32; None is the checkpoint's own.
        device: where to.
        trust_remote_code: lets the checkpoint's own Python code run.

    Raises:
        CheckpointError: weights are missing, which is said at once; or they are unreadable, of the wrong shape or not
            finite, which is said when they are reached.
    """
    wanted = dtype or checkpoint.dtype
    model = weightless_model(checkpoint, wanted, trust_remote_code=trust_remote_code)
    weights = StoredWeights(checkpoint, model, wanted, torch.device(device))
    weights.require_complete()
    return _one_by_one(weights, list(model.state_dict()))


def _one_by_one(weights: StoredWeights, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        if name in weights:
            yield name, weights.read([name])[name]


def stored_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation configuration that loading gives a checkpoint's model, as ``generation_data`` does."""
    from transformers import GenerationConfig

    try:
        found = GenerationConfig.from_pretrained(checkpoint.folder)
    except OSError:  # older folders have it in config.json
        found = GenerationConfig.from_pretrained(
            checkpoint.folder, config_file_name="config.json", _from_model_config=True
        )
    data: dict[str, Any] = found.to_diff_dict()
    return data


@dataclass(slots=True)
class _Place:
    """Where an entry of a model's state is stored.

    Attributes:
        first: the entry that is made of the parts; others may come out with it.
        rule: transformers' rule that puts the parts together; None where the one part is the entry.
        parts: (pattern of the rule, stored name) of each part, in the order in which the rule takes them.
    """

    first: str
    rule: Any
    parts: list[tuple[str, str]] = field(default_factory=list)


class StoredWeights:
    """The entries of a model's state, read from a checkpoint's safetensors.

    Args:
        checkpoint: a model on disk.
        model: this checkpoint's; its parameters may be on the meta device.
        dtype: to read in, but for what the model keeps in float32.
        device: to read to.

    Raises:
        CheckpointError: the files cannot be opened, or this transformers does not say how they are read.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, dtype: torch.dtype, device: torch.device) -> None:
        self._spec = checkpoint.spec
        self._model = model
        self._dtype = dtype
        self._device = device
        self._shapes = {name: value.shape for name, value in model.state_dict().items()}
        with self._reading():
            self._files = stored_names(checkpoint.folder)
            self._places = _find_places(model, self._files)

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def missing(self) -> set[str]:
        """Return the entries of the model's state that are not stored and that loading would complain about."""
        ignored = [re.compile(pattern) for pattern in self._model._keys_to_ignore_on_load_missing or ()]
        absent = self._shapes.keys() - self._places.keys()
        return {name for name in absent if not any(pattern.search(name) for pattern in ignored)}

    def require_complete(self) -> None:
        """Refuse a checkpoint that lacks entries, tied ones apart; a tied entry that is stored stands for its source.

        Raises:
            CheckpointError: entries are missing; the first are named.
        """
        for target, source in self._model.all_tied_weights_keys.items():
            if source not in self._places and target in self._places:
                self._places[source] = replace(self._places.pop(target), first=source)
        self.refuse_missing(self.missing() - self._model.all_tied_weights_keys.keys())

    def refuse_missing(self, missing: Iterable[str]) -> None:
        """Raise CheckpointError that names the first of the missing entries; does nothing where there are none."""
        names = sorted(missing)
        if names:
            raise CheckpointError(
                f"model {self._spec} lacks weights: {', '.join(names[:3])}{'...' if len(names) > 3 else ''}. The "
                "folder is incomplete or its config.json belongs to another model."
            )

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return entries of the model's state by name; those that are not stored are passed over.

        Raises:
            CheckpointError: they cannot be read, do not fit the configuration, or are not finite.
        """
        wanted = set(names)
        tensors: dict[str, Tensor] = {}
        places = {self._places[name].first: self._places[name] for name in wanted if name in self._places}
        whole: defaultdict[Path, list[tuple[str, str]]] = defaultdict(list)
        for first, place in places.items():
            if place.rule is None:
                _, stored = place.parts[0]
                whole[self._files[stored]].append((first, stored))
            else:
                tensors |= {name: value for name, value in self._assemble(place).items() if name in wanted}
        for file, entries in whole.items():
            with self._reading(), safe_open(file, framework="pt") as reader:
                for name, stored in entries:
                    tensors[name] = self._copy(reader, stored, name)
        for name, value in tensors.items():
            self._check(name, value)
        return tensors

    def _assemble(self, place: _Place) -> dict[str, Tensor]:
        """Return what transformers' rule makes of the parts of a place."""
        rule = copy.deepcopy(place.rule)
        read: dict[str, Tensor] = {}
        by_file: defaultdict[Path, list[str]] = defaultdict(list)
        for _, stored in place.parts:
            by_file[self._files[stored]].append(stored)
        with self._reading():
            for file, parts in by_file.items():
                with safe_open(file, framework="pt") as reader:
                    read |= {stored: self._copy(reader, stored, place.first) for stored in parts}
            for pattern, stored in place.parts:  # the rule drops parts as it goes, so nobody else may hold them
                rule.add_tensor(place.first, stored, pattern, read.pop(stored))
            made = rule.convert(place.first, model=self._model, config=self._model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _copy(self, reader: Any, stored: str, name: str) -> Tensor:
        """Return a stored tensor; a copy, never the mapped file itself: released memory must not hang on to it."""
        dtype = kept_dtype(self._model, name, self._dtype)
        tensor: Tensor = reader.get_tensor(stored).to(self._device, dtype, copy=True)
        return tensor

    def _check(self, name: str, value: Tensor) -> None:
        if value.shape != self._shapes[name]:
            raise CheckpointError(
                f"model {self._spec} stores {name} with shape {tuple(value.shape)}, but its config.json says "
                f"{tuple(self._shapes[name])}. They belong to different models; fetch both again."
            )
        # The extremes of all values are NaN where any is; isfinite of all values would need twice their memory.
        if value.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value)):
            raise CheckpointError(f"weights of {name} hold NaN or infinity. The checkpoint is broken; fetch it again.")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(f"model {self._spec} could not be loaded: {reason}. Fetch it again.") from None


def stored_names(folder: Path) -> dict[str, Path]:
    """Return the stored tensors' names and files; as in transformers a whole file goes before a sharded one."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file() or not index.is_file():
        with safe_open(whole, framework="pt") as reader:
            return dict.fromkeys(reader.keys(), whole)
    weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for file in {folder / name for name in weight_map.values()}:
        with safe_open(file, framework="pt"):
            pass
    return {name: folder / file for name, file in weight_map.items()}


def _find_places(model: Any, stored: Mapping[str, Path]) -> dict[str, _Place]:
    """Return for each entry of the model's state that is stored where it is.

    The names are gone through as transformers goes through them when it loads, so that parts come in its order.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        from transformers import __version__

        raise CheckpointError(
            f"transformers {__version__} does not say how stored weights become a model's ({error}), so no layer can "
            "be read by itself. Install transformers>=5.15,<6."
        ) from None
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    places: dict[str, _Place] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if target in state:
            place = places.setdefault(target, _Place(target, by_pattern[pattern] if pattern is not None else None))
            place.parts.append((pattern or "", name))
    for place in list(places.values()):
        for name in _made_with(place):
            if name in state:
                places.setdefault(name, place)
    return places


def _made_with(place: _Place) -> list[str]:
    """Return the further entries that a rule makes of the same parts."""
    if place.rule is None:
        return []
    first, *others = place.rule.target_patterns
    return [place.first.replace(first, other) for other in others]
