"""What an export wrote, how that was checked, and what a reader of it should know. Imports without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Exported:
    """One exported model.

    Attributes:
        target: name of the target, for example ``gguf``.
        path: the file or folder.
        quantization: type of the weights, where the target has several; else empty.
        size_bytes: of the file, or of all files in the folder.
        form: what it is, in few words, for example ``llama, F16``.
        checked: how it was compared with the model before it got its name.
        verified: how an engine that ran it agreed with transformers; empty where none did.
        not_verified: why no engine ran it; empty where one did, or where none is needed to know.
        notes: what a user of it should know.
        padding: what was padded with zeros first, in sentences.
        facts: the writer's own report and the engine's, as plain data.
    """

    target: str
    path: Path
    quantization: str
    size_bytes: int
    form: str
    checked: str
    verified: str = ""
    not_verified: str = ""
    notes: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "path": str(self.path)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Exported:
        """Return the record that ``to_dict`` gave."""
        lists = {key: tuple(data[key]) for key in ("notes", "padding")}
        return cls(**{**data, **lists, "path": Path(data["path"])})

    def sentences(self) -> list[str]:
        """Return the checks and the notes, one sentence each, as they are shown below the path."""
        engine = self.verified or (f"not verified in an engine: {self.not_verified}" if self.not_verified else "")
        return [*self.padding, *(f"note: {note}" for note in self.notes), self.checked, *([engine] if engine else [])]
