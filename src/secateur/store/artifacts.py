"""Files and folders that are whole or not there at all; and records to and from disk."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from secateur.errors import CheckpointError, ExportError
from secateur.files import replacing
from secateur.records.gradients import OPTIONAL, SUMS, GradientStatistics, UnitGradients
from secateur.records.impacts import TENSORS, ImpactStatistics, UnitImpacts
from secateur.records.masks import LowRank, MaskStatistics, MaskStep
from secateur.records.routing import EXTREMES, ROUTER_SUMS, RoutingSums
from secateur.records.routing import SUMS as ROUTING_SUMS
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Moments, SequenceSums
from secateur.records.token_counts import TokenCounts
from secateur.records.units import ATTENTION, FFN

STATISTICS_VERSION = 2
GRADIENTS_VERSION = 2
IMPACTS_VERSION = 1
MASKS_VERSION = 1
TOKEN_COUNTS_VERSION = 1
_FACTORS = ("A", "B")
_DISK_FULL = "the disk is full: {} could not be written. Free space, or choose another output."


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden place into an error that says where and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ExportError(_DISK_FULL.format(target)) from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise ExportError(f"{target} cannot be written ({error.strerror}). Choose another output.") from None
        raise
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error):
            raise ExportError(_DISK_FULL.format(target)) from None
        raise


@contextmanager
def atomic_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside ``target``; it becomes ``target`` only if the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield work
        _open_up(work)
        _put_in_place(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _put_in_place(work: Path, target: Path) -> None:
    """Rename ``work`` to ``target``; an earlier ``target`` goes after that, and comes back if it did not work."""
    old = target.with_name(f".{target.name}-old-{os.getpid()}")
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(work, target)
    finally:
        if old.exists() and not target.exists():
            os.replace(old, target)
        shutil.rmtree(old, ignore_errors=True)


def _open_up(folder: Path) -> None:
    """Give a private temporary folder the permissions that the user's umask gives ordinary ones."""
    umask = os.umask(0)
    os.umask(umask)
    folder.chmod(0o777 & ~umask)
    for file in folder.rglob("*"):
        file.chmod((0o777 if file.is_dir() else 0o666) & ~umask)


def write_text(path: Path, text: str) -> None:
    """Write a text file under a temporary name and rename it."""
    with disk_errors(path), replacing(path) as output:
        output.write(text.encode())


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain data as readable JSON, atomically."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the plain data in a JSON file.

    Raises:
        CheckpointError: the file is missing or broken.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"it holds one {type(data).__name__}, not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Delete it; it will be made again.") from None
    return data


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors, then the JSON beside them that says they are complete."""
    with disk_errors(path), replacing(path) as output:
        output.write(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    write_json(path.with_suffix(".json"), metadata)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}. Delete it; it will be made again.") from None
    return tensors


def write_statistics(path: Path, statistics: BucketStatistics, metadata: Mapping[str, Any]) -> None:
    """Write one bucket's statistics as ``path`` (.safetensors) and a JSON file beside it.

    Args:
        path: ends in ``.safetensors``.
        statistics: the sums.
        metadata: what else to record: model fingerprint, versions, the text's description.
    """
    tensors = {
        "token_counts": statistics.token_counts,
        "cosine_sum": statistics.cosine_sum,
        "documents": statistics.documents,
    }
    counts = {}
    for (layer, tap), moments in statistics.moments.items():
        place = f"moments/{layer}/{tap}"
        tensors |= {f"{place}/sum": moments.sum, f"{place}/sum_abs": moments.sum_abs, f"{place}/sum_sq": moments.sum_sq}
        counts[place] = moments.count
    sequence_counts = {}
    for (layer, tap), sequences in statistics.sequences.items():
        place = f"sequences/{layer}/{tap}"
        tensors[f"{place}/mean_abs_sq"] = sequences.mean_abs_sq
        sequence_counts[place] = sequences.count
    tensors |= {f"sublayer_cosine_sum/{kind}": total for kind, total in statistics.sublayer_cosine_sum.items()}
    for (layer, tap), total in statistics.linear_abs.items():
        tensors[f"linear_abs/{layer}/{tap}"] = total
    routing_counts = {}
    for (layer, tap), routing in statistics.routing.items():
        place = f"routing/{layer}/{tap}"
        tensors |= {f"{place}/{name}": getattr(routing, name) for name in (*ROUTING_SUMS, *EXTREMES)}
        asked = {name: getattr(routing, name) for name in ROUTER_SUMS}
        tensors |= {f"{place}/{name}": found for name, found in asked.items() if found is not None}
        routing_counts[place] = routing.count
    plain = {
        "schema_version": STATISTICS_VERSION,
        "num_tokens": statistics.num_tokens,
        "num_blocks": statistics.num_blocks,
        "corpus_fingerprint": statistics.corpus_fingerprint,
        "tokens_per_s": statistics.tokens_per_s,
        "counts": counts,
        "sequence_counts": sequence_counts,
        "routing_counts": routing_counts,
    }
    _write_tensors(path, tensors, {**plain, **metadata})


def read_statistics(path: Path) -> tuple[BucketStatistics, dict[str, Any]]:
    """Return one bucket's statistics and the metadata written with them.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata = read_json(path.with_suffix(".json"))
    if metadata.get("schema_version") != STATISTICS_VERSION:
        raise CheckpointError(f"{path} has another version of the statistics format. Delete it and calibrate again.")
    tensors = _read_tensors(path)
    try:
        moments = {
            _site(place): Moments(
                count, tensors[f"{place}/sum"], tensors[f"{place}/sum_abs"], tensors[f"{place}/sum_sq"]
            )
            for place, count in metadata["counts"].items()
        }
        sequences = {
            _site(place): SequenceSums(count, tensors[f"{place}/mean_abs_sq"])
            for place, count in metadata["sequence_counts"].items()
        }
        routing = {
            _site(place): _routing(place, count, tensors)
            for place, count in metadata.get("routing_counts", {}).items()  # older files are of dense models
        }
        linear = {_site(name): tensor for name, tensor in tensors.items() if name.startswith("linear_abs/")}
        statistics = BucketStatistics(
            num_tokens=metadata["num_tokens"],
            num_blocks=metadata["num_blocks"],
            token_counts=tensors["token_counts"],
            moments=dict(sorted(moments.items())),
            sequences=dict(sorted(sequences.items())),
            linear_abs=dict(sorted(linear.items())),
            cosine_sum=tensors["cosine_sum"],
            sublayer_cosine_sum={kind: tensors[f"sublayer_cosine_sum/{kind}"] for kind in (ATTENTION, FFN)},
            documents=tensors["documents"],
            corpus_fingerprint=metadata["corpus_fingerprint"],
            tokens_per_s=metadata["tokens_per_s"],
            routing=dict(sorted(routing.items())),
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it and calibrate again.") from None
    return statistics, metadata


def _routing(place: str, count: int, tensors: Mapping[str, Tensor]) -> RoutingSums:
    found: dict[str, Any] = {name: tensors[f"{place}/{name}"] for name in (*ROUTING_SUMS, *EXTREMES)}
    found |= {name: tensors.get(f"{place}/{name}") for name in ROUTER_SUMS}  # older files lack them
    return RoutingSums(count, **found)


def write_gradients(path: Path, gradients: GradientStatistics, metadata: Mapping[str, Any]) -> None:
    """Write one bucket's gradient sums as ``path`` (.safetensors) and a JSON file beside it."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for (layer, kind), units in gradients.units.items():
        place = f"units/{layer}/{kind}"
        tensors |= {f"{place}/{name}": getattr(units, name) for name in SUMS}
        asked = {name: getattr(units, name) for name in OPTIONAL}
        tensors |= {f"{place}/{name}": found for name, found in asked.items() if found is not None}
        counts[place] = units.count
    plain = {"schema_version": GRADIENTS_VERSION, "num_tokens": gradients.num_tokens, "counts": counts}
    _write_tensors(path, tensors, {**plain, **metadata})


def read_gradients(path: Path) -> GradientStatistics:
    """Return the gradient sums that ``write_gradients`` wrote.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    if metadata.get("schema_version") != GRADIENTS_VERSION:
        raise CheckpointError(f"{path} has another version of the gradients. Delete it; it will be made again.")
    try:
        units = {
            _site(place): UnitGradients(
                count,
                **{name: tensors[f"{place}/{name}"] for name in SUMS},
                output=tensors.get(f"{place}/output"),
                sketch=tensors.get(f"{place}/sketch"),
            )
            for place, count in metadata["counts"].items()
        }
        return GradientStatistics(metadata["num_tokens"], units)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None


def write_impacts(path: Path, impacts: ImpactStatistics, metadata: Mapping[str, Any]) -> None:
    """Write what one bucket's documents say of the units as ``path`` (.safetensors) and a JSON file beside it."""
    tensors: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for (layer, kind), units in impacts.units.items():
        place = f"units/{layer}/{kind}"
        tensors |= {f"{place}/{name}": getattr(units, name) for name in TENSORS}
        counts[place] = units.count
    plain = {"schema_version": IMPACTS_VERSION, "num_documents": impacts.num_documents, "counts": counts}
    _write_tensors(path, tensors, {**plain, **metadata})


def read_impacts(path: Path) -> ImpactStatistics:
    """Return what ``write_impacts`` wrote.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    if metadata.get("schema_version") != IMPACTS_VERSION:
        raise CheckpointError(f"{path} has another version of the impacts. Delete it; it will be made again.")
    try:
        units = {
            _site(place): UnitImpacts(count, **{name: tensors[f"{place}/{name}"] for name in TENSORS})
            for place, count in metadata["counts"].items()
        }
        return ImpactStatistics(metadata["num_documents"], units)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None


def write_masks(path: Path, masks: MaskStatistics, metadata: Mapping[str, Any]) -> None:
    """Write one bucket's trained masks as ``path`` (.safetensors) and a JSON file beside it, which tells every step.

    Adapters that were trained with them are in the same files, so that neither is there without the other.
    """
    tensors = {f"units/{layer}/{kind}": values for (layer, kind), values in masks.units.items()}
    adapted: dict[str, Any] = {}
    if masks.adapters is not None:
        adapted["adapters"] = {"scale": masks.adapters.scale, "modules": list(masks.adapters.factors)}
        for name, factors in masks.adapters.factors.items():
            tensors |= {f"{name}/{side}": factor for side, factor in zip(_FACTORS, factors, strict=True)}
    plain = {
        "schema_version": MASKS_VERSION,
        "num_tokens": masks.num_tokens,
        "removed": masks.removed,
        "steps": [asdict(step) for step in masks.steps],
        **adapted,
    }
    _write_tensors(path, tensors, {**plain, **metadata})


def read_masks(path: Path) -> MaskStatistics:
    """Return what ``write_masks`` wrote.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    if metadata.get("schema_version") != MASKS_VERSION:
        raise CheckpointError(f"{path} has another version of the masks. Delete it; it will be made again.")
    try:
        places = [place for place in sorted(tensors) if place.startswith("units/")]
        units = {_site(place): tensors[place] for place in places}
        steps = tuple(MaskStep(**step) for step in metadata["steps"])
        adapters = _read_adapters(metadata["adapters"], tensors) if "adapters" in metadata else None
        return MaskStatistics(metadata["num_tokens"], metadata["removed"], units, steps, adapters)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None


def _read_adapters(described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> LowRank:
    first, second = _FACTORS
    factors = {name: (tensors[f"{name}/{first}"], tensors[f"{name}/{second}"]) for name in described["modules"]}
    return LowRank(described["scale"], factors)


def write_token_counts(path: Path, counts: TokenCounts, metadata: Mapping[str, Any]) -> None:
    """Write one bucket's token counts as ``path`` (.safetensors) and a JSON file beside it."""
    plain = {
        "schema_version": TOKEN_COUNTS_VERSION,
        "num_tokens": counts.num_tokens,
        "num_bytes": counts.num_bytes,
        "num_documents": counts.num_documents,
        "fingerprint": counts.fingerprint,
    }
    _write_tensors(path, {"counts": counts.counts, "documents": counts.documents}, {**plain, **metadata})


def read_token_counts(path: Path) -> TokenCounts:
    """Return the counts that ``write_token_counts`` wrote.

    Raises:
        CheckpointError: the files are missing, broken, or of another version.
    """
    metadata, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    if metadata.get("schema_version") != TOKEN_COUNTS_VERSION:
        raise CheckpointError(f"{path} has another version of the token counts. Delete it; it will be made again.")
    try:
        plain = {key: metadata[key] for key in ("num_tokens", "num_bytes", "num_documents", "fingerprint")}
        return TokenCounts(counts=tensors["counts"], documents=tensors["documents"], **plain)
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None


def _site(place: str) -> tuple[int, str]:
    _, layer, tap = place.split("/")
    return int(layer), tap


def write_scores(path: Path, scores: Scores) -> None:
    """Write scores as ``path`` (.safetensors) and a JSON file beside it."""
    tensors = {f"{kind}/{i}": layer for kind, layers in scores.values.items() for i, layer in enumerate(layers)}
    _write_tensors(
        path,
        tensors,
        {
            "method": scores.method,
            "options": dict(scores.options),
            "buckets": list(scores.buckets),
            "layers": {kind: len(layers) for kind, layers in scores.values.items()},
            "inputs_fingerprint": scores.inputs_fingerprint,
            "depth_method": scores.depth_method,
            "depth_options": dict(scores.depth_options),
            "cumulative": scores.cumulative,
        },
    )


def read_scores(path: Path) -> Scores:
    """Return the scores that ``write_scores`` wrote.

    Raises:
        CheckpointError: the files are missing or broken.
    """
    metadata, tensors = read_json(path.with_suffix(".json")), _read_tensors(path)
    try:
        values = {kind: [tensors[f"{kind}/{i}"] for i in range(count)] for kind, count in metadata["layers"].items()}
        return Scores(
            metadata["method"],
            metadata["options"],
            tuple(metadata["buckets"]),
            values,
            metadata["inputs_fingerprint"],
            metadata["depth_method"],
            metadata["depth_options"],
            metadata["cumulative"],
        )
    except KeyError as error:
        raise CheckpointError(f"{path} lacks {error}. Delete it; it will be made again.") from None


def digest(*parts: object) -> str:
    """Return a short hash of plain data, for names and cache keys."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def statistics_digest(statistics: BucketStatistics) -> str:
    """Return what identifies the sums themselves."""
    state = hashlib.blake2b(digest_size=12)
    for (layer, tap), moments in statistics.moments.items():
        state.update(f"{layer}/{tap}/{moments.count}".encode())
        state.update(moments.sum_abs.to(torch.float64).numpy().tobytes())
    for (layer, tap), routing in statistics.routing.items():
        state.update(f"{layer}/{tap}/{routing.count}".encode())
        state.update(torch.cat([getattr(routing, name) for name in (*ROUTING_SUMS, *EXTREMES)]).numpy().tobytes())
    return state.hexdigest()
