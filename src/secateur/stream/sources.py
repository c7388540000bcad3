"""Where decoder layers come from: a loaded model, or a checkpoint read one layer at a time.

Both give the model around the layers as ``model``, and each layer as a real module with its weights.
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.errors import CheckpointError
from secateur.families.geometry import Geometry
from secateur.store.checkpoints import Checkpoint, choose_device, choose_dtype
from secateur.stream.stand_ins import plain_tensors


@runtime_checkable
class LayerSource(Protocol):
    """A model whose decoder layers can be had one at a time."""

    model: Any
    """A causal language model in evaluation mode; everything outside its decoder layers has its weights."""
    geometry: Geometry
    """Of the model."""

    def layer(self, index: int) -> AbstractContextManager[nn.Module]:
        """Give a decoder layer with its weights on the device, for as long as the context lasts."""


class LoadedLayers:
    """The layers of a model in memory: its own modules, so that changes to them stay.

    Args:
        model: a transformers causal language model, on its device; it is put into evaluation mode.
        geometry: of the model.
    """

    def __init__(self, model: Any, geometry: Geometry) -> None:
        self.model = model.eval()
        self.geometry = geometry

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Give the model's own decoder layer."""
        yield self.model.get_submodule(self.geometry.layer_name(index))


class LazyLayers:
    """The layers of a checkpoint, each read from its safetensors when it is asked for and released after use.

    Embeddings, final norm and head are read at once and stay. The layers inside ``model`` never have weights: ``layer``
    gives a new module with the checkpoint's weights each time, whatever became of earlier ones.

    Args:
        checkpoint: a model on disk.
        device: where to compute, as for ``load_model``.
        dtype: what to compute in, as for ``load_model``.
        trust_remote_code: lets the checkpoint's own Python code run.

    Raises:
        CheckpointError: weights are missing, unreadable or not finite. What a layer's weights are like is seen only
            when the layer is asked for; that they are there is checked at once.
    """

    def __init__(
        self, checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
    ) -> None:
        self.geometry = checkpoint.geometry
        self._spec = checkpoint.spec
        self._device = choose_device(device)
        self.model = _weightless(checkpoint, choose_dtype(dtype, checkpoint.dtype, self._device), trust_remote_code)
        with self._reading():
            stored = _stored_names(checkpoint.folder)
        self._places = _find_places(self.model, stored)
        self._fill_surroundings()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder layer with the checkpoint's weights; when the context ends the module loses them.

        Copy what is to be kept: tensors of the module's state dict stay as they are, the module itself does not.

        Raises:
            CheckpointError: its weights cannot be read, do not fit the configuration, or are not finite.
        """
        name = self.geometry.layer_name(index)
        module: nn.Module = copy.deepcopy(self.model.get_submodule(name))
        try:
            with plain_tensors():
                module.load_state_dict(self._read(name + ".", module.state_dict()), strict=False, assign=True)
                module.to(self._device)
            yield module
        finally:
            module.to("meta")  # or the caller's variable would hold them while the next layer is read

    def _fill_surroundings(self) -> None:
        """Give weights to everything outside the layers, and check that the layers' can be had later."""
        model, inside = self.model, self.geometry.family.layers + "."
        missing = {name for name, _ in model.named_parameters(remove_duplicate=False)} - self._places.keys()
        outside = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
        with plain_tensors():
            model.load_state_dict(self._read("", outside), strict=False, assign=True)
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
            for name, buffer in list(model.named_buffers()):
                if not name.startswith(inside):
                    owner, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(owner), leaf, buffer.to(self._device))
        if missing:
            names = sorted(missing)
            raise CheckpointError(
                f"model {self._spec} lacks weights: {', '.join(names[:3])}{'...' if len(names) > 3 else ''}. The "
                "folder is incomplete or its config.json belongs to another model."
            )

    def _read(self, prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the stored values of the given entries of a module's state, in their dtype, on the device.

        Args:
            prefix: of the module's names within the model.
            state: the entries as they are now, on the meta device or not; those that are not stored are passed over.
        """
        wanted: defaultdict[Path, list[tuple[str, str]]] = defaultdict(list)
        for name in state:
            if prefix + name in self._places:
                file, stored = self._places[prefix + name]
                wanted[file].append((name, stored))
        tensors = {}
        for file, entries in wanted.items():
            with self._reading(), safe_open(file, framework="pt") as reader:
                for name, stored in entries:
                    # A copy, never the mapped file itself: released memory must not hang on to it.
                    tensors[name] = reader.get_tensor(stored).to(self._device, state[name].dtype, copy=True)
                    self._check(prefix + name, tensors[name], state[name])
        return tensors

    def _check(self, name: str, value: Tensor, expected: Tensor) -> None:
        if value.shape != expected.shape:
            raise CheckpointError(
                f"model {self._spec} stores {name} with shape {tuple(value.shape)}, but its config.json says "
                f"{tuple(expected.shape)}. They belong to different models; fetch both again."
            )
        # The extremes of all values are NaN where any is; isfinite of all values would need twice their memory.
        if value.numel() and not all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(value)):
            raise CheckpointError(f"weights of {name} hold NaN or infinity. The checkpoint is broken; fetch it again.")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = str(error).rstrip(".")
            raise CheckpointError(f"model {self._spec} could not be loaded: {reason}. Fetch it again.") from None


def _weightless(checkpoint: Checkpoint, dtype: torch.dtype, trust_remote_code: bool) -> Any:
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


def _stored_names(folder: Path) -> dict[str, Path]:
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


def _find_places(model: Any, stored: Mapping[str, Path]) -> dict[str, tuple[Path, str]]:
    """Return for each entry of the model's state that is stored its file and its name there.

    Names may differ (GPT-NeoX's head, files made from a bare base model); transformers' own rules for loading say how.
    Entries that loading would compute from several stored tensors are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()
    places = {}
    for name, file in stored.items():
        target, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if converter is None:
            places[target] = (file, name)
    return places
