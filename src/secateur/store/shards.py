"""Model folders written one parameter at a time, for models that do not fit in memory.

A folder is what transformers' ``save_pretrained`` writes: the names and the pieces that hubs have (one tensor per
expert, where the model holds all in one), tied tensors once, several files with an index where one would be too large.
Each tensor goes to disk when it comes, so no file is ever held in memory.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.store.artifacts import atomic_folder, disk_errors
from secateur.store.checkpoints import planned_configuration
from secateur.store.portable import write_older_keys
from secateur.store.weights import kept_dtype

MAX_SHARD_BYTES = 50_000_000_000
"""Weights beyond it go into several files; transformers' own choice."""
_ALIGNMENT = 8
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The words for them in safetensors."""


def write_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    parameters: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    dtype: torch.dtype | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write a model folder from parameters that come one at a time; it appears under its name when it is complete.

    It loads to the same bits as what ``build_model`` and ``save_model`` make of the same parameters.

    Args:
        folder: where to; replaced if it exists.
        config: plain configuration, ``model_type`` included.
        parameters: every entry of the model's state, by name; tied ones once, or each time with the same values.
        max_shard_bytes: weights beyond it go into several files; a single larger tensor has a file of its own.
        dtype: to write in, but for what the model keeps in float32; None writes each tensor as it comes.
        generation: generation configuration as plain data; None leaves it to the configuration.

    Raises:
        CheckpointError: names or shapes do not fit the configuration.
        PlanError: the model type's configuration class refuses the sizes.
        ExportError: the disk is full, or the folder cannot be written.
    """
    with disk_errors(folder), atomic_folder(folder) as work:
        fill_checkpoint(work, config, parameters, max_shard_bytes, dtype=dtype, generation=generation)


def fill_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    parameters: Iterable[tuple[str, Tensor]],
    max_shard_bytes: int = MAX_SHARD_BYTES,
    *,
    dtype: torch.dtype | None = None,
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write into an existing folder what ``write_checkpoint`` writes; half of it stays there if something fails."""
    model = _empty_model(config, generation)
    names, dtype_of_model = _StoredNames(model), dtype
    with _Shards(folder, max_shard_bytes, names.header_bytes()) as shards:
        for name, tensor in parameters:
            if tensor.is_floating_point():
                tensor = tensor.detach().to(kept_dtype(model, name, dtype) if dtype is not None else tensor.dtype)
                dtype_of_model = dtype_of_model or tensor.dtype
            for stored, part in names.parts(name, tensor):
                shards.add(stored, part)
        names.require_complete()
        shards.finish(model.num_parameters())
    _save_configuration(model, dtype_of_model, folder)


def _empty_model(config: Mapping[str, Any], generation: Mapping[str, Any] | None) -> Any:
    """Return the model of a plain configuration without weights."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    configuration = planned_configuration(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    if generation is not None:
        model.generation_config = GenerationConfig.from_dict(dict(generation))
    return model.eval()


def _save_configuration(model: Any, dtype: torch.dtype | None, folder: Path) -> None:
    """Write what is not weights, as ``save_pretrained`` does."""
    if dtype is not None:
        model.config.dtype = str(dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    write_older_keys(folder)


class _StoredNames:
    """What the entries of a model's state are called in its files, and what has come of them so far."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tied: Mapping[str, str] = dict(model.all_tied_weights_keys)
        ignored = set(model._keys_to_ignore_on_save or ())
        self._state = {name: value for name, value in model.state_dict().items() if name not in ignored}
        self._sources = {source: b"" for source in self._tied.values()}
        self._stored = {name: tuple(value.shape) for name, value in self._reverted(self._state).items()}
        self._came: set[str] = set()

    def header_bytes(self) -> int:
        """Return an upper bound of the size of a file's header."""
        widest = {"dtype": "BF16", "data_offsets": [10**15, 10**15]}
        entries = {name: {**widest, "shape": shape} for name, shape in self._stored.items()}
        return len(_header(entries))

    def parts(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """Return what is to be stored of an entry, by stored name; nothing of one that is tied to one that came.

        Raises:
            CheckpointError: the model has no such entry, it came before, or its shape is another.
        """
        if name not in self._state:
            raise CheckpointError(f"the model has no parameter {name}. Its configuration belongs to another model.")
        if name in self._came:
            raise CheckpointError(f"parameter {name} came twice. Give every parameter once.")
        if tensor.shape != self._state[name].shape:
            raise CheckpointError(
                f"the pruned weights do not fit their configuration: {name} has shape {tuple(tensor.shape)}, the "
                f"configuration says {tuple(self._state[name].shape)}."
            )
        self._came.add(name)
        if name in self._sources:
            self._sources[name] = _digest(tensor)
        elif name in self._tied and self._sources[self._tied[name]] == _digest(tensor):
            return []
        parts = self._reverted({name: tensor})
        for stored, part in parts.items():
            if self._stored.get(stored) != tuple(part.shape):
                raise CheckpointError(
                    f"{name} is stored together with other parameters as {stored}, so it cannot be written by itself. "
                    "Load the model whole and save it."
                )
        return list(parts.items())

    def require_complete(self) -> None:
        """Raise CheckpointError where entries did not come that are not tied to one that came."""
        missing = sorted(self._state.keys() - self._came - self._tied.keys())
        if missing:
            more = "..." if len(missing) > 3 else ""
            raise CheckpointError(
                f"the pruned weights do not fit their configuration: {', '.join(missing[:3])}{more} did not come."
            )

    def _reverted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self._model, dict(state))
        return found


def _digest(tensor: Tensor) -> bytes:
    """Return what identifies the values of a tensor."""
    return hashlib.blake2b(_bytes(tensor), digest_size=16).digest()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, without a copy where it lies on the CPU in one piece."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()


@dataclass(slots=True)
class _Shard:
    """One file that is being written.

    Attributes:
        file: open for writing.
        entries: what its header says so far.
        size: bytes of tensors so far, those that wait included.
        waiting: tensors whose size would leave what follows unaligned; they come last, wide numbers first.
    """

    file: IO[bytes]
    entries: dict[str, Any] = field(default_factory=dict)
    size: int = 0
    waiting: list[tuple[str, Tensor]] = field(default_factory=list)


class _Shards:
    """Writes tensors into safetensors files as they come.

    A header comes first in such a file and is known last, so as much as it can need at most is left free for it.
    """

    def __init__(self, folder: Path, max_bytes: int, header_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._header_bytes = math.ceil(header_bytes / _ALIGNMENT) * _ALIGNMENT
        self._files: list[Path] = []
        self._shard: _Shard | None = None
        self._contents: list[list[str]] = []
        self._total = 0

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, *error: object) -> None:
        if self._shard is not None:
            self._shard.file.close()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write a tensor into the present file, or into a new one where it does not fit."""
        if self._shard is not None and self._shard.size + tensor.nbytes > self._max_bytes:
            self._close()
        if self._shard is None:
            self._open()
        shard = self._shard
        assert shard is not None
        shard.size += tensor.nbytes
        if tensor.nbytes % _ALIGNMENT:
            shard.waiting.append((name, tensor.clone()))  # a clone: it may be a view of something large
        else:
            _append(shard, name, tensor, self._header_bytes)

    def finish(self, num_parameters: int) -> None:
        """Close the last file, name all of them as transformers does, and write the index where they are several."""
        if self._shard is not None:
            self._close()
        if len(self._files) == 1:
            self._files[0].rename(self._folder / "model.safetensors")
            return
        weight_map = {}
        for index, (file, names) in enumerate(zip(self._files, self._contents, strict=True), start=1):
            final = f"model-{index:05d}-of-{len(self._files):05d}.safetensors"
            file.rename(self._folder / final)
            weight_map.update(dict.fromkeys(names, final))
        index_data = {
            "metadata": {"total_parameters": num_parameters, "total_size": self._total},
            "weight_map": weight_map,
        }
        text = json.dumps(index_data, indent=2, sort_keys=True) + "\n"
        (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def _open(self) -> None:
        self._files.append(self._folder / f"{len(self._files)}.part")
        file = self._files[-1].open("xb")
        file.seek(8 + self._header_bytes)
        self._shard = _Shard(file)

    def _close(self) -> None:
        shard = self._shard
        assert shard is not None
        for name, tensor in sorted(shard.waiting, key=lambda item: -item[1].element_size()):
            _append(shard, name, tensor, self._header_bytes)
        with shard.file as file:
            file.seek(0)
            file.write(self._header_bytes.to_bytes(8, "little"))
            file.write(_header(shard.entries).ljust(self._header_bytes))
        self._contents.append(list(shard.entries))
        self._total += shard.size
        self._shard = None


def _append(shard: _Shard, name: str, tensor: Tensor, header_bytes: int) -> None:
    start = shard.file.tell() - 8 - header_bytes
    shard.file.write(_bytes(tensor))
    offsets = [start, start + tensor.nbytes]
    shard.entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
