"""What writers read of a model folder: its description, and its weights one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import ExportError

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class LayerSizes:
    """One layer's place in the checkpoint and its sizes; a size of 0 says that the sub-layer was removed."""

    place: int
    heads: int
    kv_heads: int
    width: int


def stored_shape(shapes: Shapes, name: str) -> tuple[int, ...]:
    """Return a parameter's shape.

    Raises:
        ExportError: there is none of that name.
    """
    if name not in shapes:
        raise ExportError(f"the model folder has no parameter {name}. Export the model again.")
    return shapes[name]


def load_config(folder: Path) -> dict[str, Any]:
    """Return a folder's configuration as plain data, defaults included.

    Raises:
        ExportError: transformers does not load it.
    """
    from transformers import AutoConfig

    from secateur.store.modeling import register_uneven_models

    register_uneven_models()
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"{folder} is not a model folder that transformers loads: {error}.") from None
    return config


def load_description(folder: Path) -> tuple[dict[str, Any], Any]:
    """Return a folder's configuration as plain data, and its tokenizer.

    Raises:
        ExportError: transformers does not load them.
    """
    from transformers import AutoTokenizer

    config = load_config(folder)
    try:
        return config, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ExportError(f"the tokenizer in {folder} does not load: {error}. Export the model again.") from None


class StoredParameters:
    """The parameters of a model folder.

    Attributes:
        shapes: by name.
    """

    def __init__(self, handles: Mapping[str, Any]) -> None:
        self._handles = dict(handles)
        self.shapes = {name: tuple(handle.get_slice(name).get_shape()) for name, handle in handles.items()}

    def read(self, name: str) -> Tensor:
        """Return one parameter as it is stored."""
        tensor: Tensor = self._handles[name].get_tensor(name)
        return tensor


@contextmanager
def open_parameters(folder: Path) -> Iterator[StoredParameters]:
    """Give the stored parameters of a model folder, opened but not read.

    Raises:
        ExportError: there are none, or they cannot be read.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ExportError(f"{folder} has no safetensors files. Give the folder of a model saved by save_pretrained.")
    with ExitStack() as stack:
        handles: dict[str, Any] = {}
        try:
            for file in files:
                handle = stack.enter_context(safe_open(file, framework="pt"))
                handles |= dict.fromkeys(handle.keys(), handle)
        except (OSError, SafetensorError) as error:
            raise ExportError(f"weights in {folder} cannot be read: {error}. Export the model again.") from None
        yield StoredParameters(handles)
