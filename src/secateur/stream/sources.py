"""Where decoder layers come from: a loaded model, or a checkpoint read one layer at a time.

Both give the model around the layers as ``model``, and each layer as a real module with its weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from secateur.families.geometry import Geometry
from secateur.store.checkpoints import Checkpoint, choose_device, choose_dtype, parameter
from secateur.store.weights import StoredWeights, weightless_model
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
        self._device = choose_device(device)
        computed = choose_dtype(dtype, checkpoint.dtype, self._device)
        self.model = weightless_model(checkpoint, computed, trust_remote_code=trust_remote_code)
        self._weights = StoredWeights(checkpoint, self.model, computed, self._device)
        self._fill_surroundings()

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder layer with the checkpoint's weights; when the context ends the module loses them.

        Copy what is to be kept: tensors of the module's state dict stay as they are, the module itself does not.

        Raises:
            CheckpointError: its weights cannot be read, do not fit the configuration, or are not finite.
        """
        prefix = self.geometry.layer_name(index) + "."
        module: nn.Module = copy.deepcopy(self.model.get_submodule(prefix[:-1]))
        try:
            with plain_tensors():
                found = self._weights.read(prefix + name for name in module.state_dict())
                state = {name.removeprefix(prefix): value for name, value in found.items()}
                del found
                module.load_state_dict(state, strict=False, assign=True)
                del state
                module.to(self._device)
            yield module
        finally:
            module.to("meta")  # or the caller's variable would hold them while the next layer is read

    def parameter(self, name: str) -> Tensor | None:
        """Return a parameter by name, read now if it is a layer's, or None where the model has none of that name.

        Raises:
            CheckpointError: it cannot be read, does not fit the configuration, or is not finite.
        """
        if not name.startswith(self.geometry.family.layers + "."):
            return parameter(self.model, name)
        with plain_tensors():
            return self._weights.read([name]).get(name)

    def _fill_surroundings(self) -> None:
        """Give weights to everything outside the layers, and check that the layers' can be had later."""
        model, inside = self.model, self.geometry.family.layers + "."
        missing = self._weights.missing()
        outside = [name for name in model.state_dict() if not name.startswith(inside)]
        with plain_tensors():
            model.load_state_dict(self._weights.read(outside), strict=False, assign=True)
            model.tie_weights(missing_keys=missing, recompute_mapping=False)
            for name, buffer in list(model.named_buffers()):
                if not name.startswith(inside):
                    owner, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(owner), leaf, buffer.to(self._device))
        self._weights.refuse_missing(missing)
