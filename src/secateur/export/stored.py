"""The weights of a model folder, opened but not read: writers take one parameter at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import ExportError


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
