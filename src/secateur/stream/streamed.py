"""A model that is run one decoder layer at a time, and where what lies between two layers is kept meanwhile.

It stands where a model in memory would: ``calibrate.collect`` and the evaluation take either.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.families.geometry import Geometry
from secateur.stream.hidden import HiddenStates
from secateur.stream.sources import LayerSource
from secateur.stream.spill import SpilledTensors


@dataclass(frozen=True, slots=True, eq=False)
class StreamedModel:
    """Layers, and a place for hidden states and for what is summed over them.

    Attributes:
        source: gives the layers.
        folder: where files are put while they are needed; None keeps all of it in memory.
    """

    source: LayerSource
    folder: Path | None = None

    @property
    def geometry(self) -> Geometry:
        """Of the model."""
        return self.source.geometry

    def hidden(self) -> HiddenStates:
        """Return a place for the hidden states of one text."""
        return HiddenStates(self.folder)

    def tensors(self) -> MutableMapping[Any, Tensor]:
        """Return a place for tensors by key that all layers together make many of."""
        return {} if self.folder is None else SpilledTensors(self.folder)
