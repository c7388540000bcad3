"""Gram matrices to and from disk, one site at a time: those of a whole model may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from jaxtyping import Float32
from safetensors import SafetensorError, safe_open
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.files import replacing
from secateur.records.gram import Grams
from secateur.records.statistics import SiteKey
from secateur.store.artifacts import disk_errors, read_json, write_json

GRAMS_VERSION = 1
_ENTRY_BYTES = 160
"""More than one tensor's entry in the header can need, besides its name."""


@dataclass(frozen=True, slots=True)
class StoredGrams:
    """Gram matrices in a file; each is read when it is asked for, and none is kept.

    Attributes:
        path: the .safetensors file.
        count: tokens behind the sums.
        sites: the sites there are.
    """

    path: Path
    count: int
    sites: frozenset[SiteKey]

    def load(self, site: SiteKey) -> Float32[Tensor, "channels channels"]:
        """Return the sum of x xT over the tokens at a site.

        Raises:
            CheckpointError: the file is missing or broken, or lacks the site.
        """
        name = _name(site)
        try:
            with safe_open(self.path, framework="pt") as file:
                if name not in file.keys():
                    raise CheckpointError(f"{self.path} lacks {name!r}. Delete it; it will be made again.")
                matrix: Tensor = file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.path, error) from None
        return matrix


def write_grams(path: Path, grams: Grams, sites: Collection[SiteKey], metadata: Mapping[str, Any]) -> None:
    """Write Gram matrices as ``path`` (.safetensors, float32) and a JSON file beside it.

    One matrix is loaded and written at a time.

    Args:
        path: ends in ``.safetensors``.
        grams: the sums.
        sites: which of them to write.
        metadata: what else to record: model fingerprint, versions, the text's description.
    """
    ordered = sorted(set(sites))
    with disk_errors(path), replacing(path) as output:
        _write_matrices(output, grams, ordered)
    plain = {"schema_version": GRAMS_VERSION, "count": grams.count, "sites": [_name(site) for site in ordered]}
    write_json(path.with_suffix(".json"), {**plain, **metadata})


def _write_matrices(output: IO[bytes], grams: Grams, sites: Collection[SiteKey]) -> None:
    """Write the safetensors format: header length, header (JSON, padded with spaces), then the numbers.

    The header says how large everything is, which is known only afterwards, so its place is kept free at first.
    """
    room = sum(_ENTRY_BYTES + len(_name(site)) for site in sites) + 2
    room += -room % 8  # the format wants the numbers to begin at a multiple of eight
    header: dict[str, Any] = {}
    output.seek(8 + room)
    offset = 0
    for site in sites:
        matrix = grams.load(site).detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False)
        output.write(matrix.data)
        end = offset + matrix.nbytes
        header[_name(site)] = {"dtype": "F32", "shape": list(matrix.shape), "data_offsets": [offset, end]}
        offset = end
    output.seek(0)
    output.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))


def read_grams(path: Path) -> tuple[StoredGrams, dict[str, Any]]:
    """Return the Gram matrices that ``write_grams`` wrote, still on disk, and the metadata written with them.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata = read_json(path.with_suffix(".json"))
    if metadata.get("schema_version") != GRAMS_VERSION:
        raise CheckpointError(f"{path} has another version of the Gram matrices. Delete it; it will be made again.")
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None
    try:
        count, names = metadata["count"], metadata["sites"]
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None
    missing = sorted(set(names) - there)
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]!r}. Delete it; it will be made again.")
    return StoredGrams(path, count, frozenset(map(_site, names))), metadata


def _name(site: SiteKey) -> str:
    layer, kind = site
    return f"gram/{layer}/{kind}"


def _site(name: str) -> SiteKey:
    _, layer, kind = name.split("/")
    return int(layer), kind


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}. Delete it; it will be made again.")
