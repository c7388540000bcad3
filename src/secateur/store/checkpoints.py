"""Models in and out: local folders, hub ids and GGUF files become a folder; folders become models; models folders.

Only safetensors and GGUF are read: a pickle can run code. Nothing is left half-written under its final name.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.errors import CheckpointError, ExportError, PlanError, UnavailableError
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import family_of, is_supported
from secateur.files import cache_folder
from secateur.store.artifacts import atomic_folder, digest, disk_errors, write_json, write_text
from secateur.store.portable import write_older_keys

_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl")
_ROWS = 8192
"""Rows of a matrix that are compared at a time."""
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.jinja", "*.txt", "README.md"]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk that can be loaded.

    Attributes:
        spec: what the person wrote: folder, hub id or GGUF file.
        folder: a local folder with config.json and safetensors.
        config: its configuration as plain data, with every default written out.
        geometry: its family met by this configuration.
        shapes: parameters by name, tied ones once.
        dtype: of the stored weights.
        size_bytes: of the weight files.
    """

    spec: str
    folder: Path
    config: Mapping[str, Any]
    geometry: Geometry
    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype
    size_bytes: int

    @property
    def name(self) -> str:
        """A readable name: the hub id, or the last part of the path (a ``.gguf`` file's without the suffix)."""
        path = Path(os.path.abspath(Path(self.spec).expanduser()))
        if not path.exists():
            return self.spec
        return path.stem if path.is_file() else path.name


def resolve_model(spec: str, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return the checkpoint behind a folder, a ``.gguf`` file or a hub id, without loading its weights.

    A GGUF file is dequantised once, through transformers' own loader, into the user's cache folder.

    Raises:
        CheckpointError: nothing there, or only pickles, or not a causal language model we can load.
        FamilyError: the model type is not supported.
        UnavailableError: a hub id that is neither cached nor reachable.
    """
    path = Path(spec).expanduser()
    if path.suffix.lower() == ".gguf":
        folder = _dequantised(path)
    elif path.is_dir():
        folder = path
    elif path.exists():
        raise CheckpointError(f"model {spec} is a file; give its folder, a .gguf file, or a hub id.")
    elif spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise CheckpointError(f"model folder {spec} does not exist. Give a local folder, a .gguf file or a hub id.")
    else:
        folder = _from_hub(spec)
    return _describe(spec, folder, trust_remote_code)


def _describe(spec: str, folder: Path, trust_remote_code: bool) -> Checkpoint:
    raw = _read_config(folder)
    model_type = str(raw.get("model_type"))
    if raw.get("auto_map") and not is_supported(model_type) and not trust_remote_code:
        raise CheckpointError(f"model {spec} needs its own Python code. If you trust it, set trust_remote_code: true.")
    family = family_of(model_type)
    _refuse_pickles(spec, folder)
    files = sorted(folder.glob("*.safetensors"))
    stored = {name: entry for file in files for name, entry in _safetensors_header(file).items()}
    anatomy = _remembered_anatomy(folder, raw, trust_remote_code)
    shapes = {name: tuple(shape) for name, shape in anatomy["shapes"].items()}
    _require_shapes(spec, shapes, stored)
    if anatomy["config"].get("tie_word_embeddings"):
        _require_tied(spec, folder, family.vocabulary, shapes, files)
    return Checkpoint(
        spec=spec,
        folder=folder,
        config=anatomy["config"],
        geometry=build_geometry(family, anatomy["config"]),
        shapes=shapes,
        dtype=_stored_dtype(stored),
        size_bytes=sum(file.stat().st_size for file in files),
    )


def _require_shapes(spec: str, shapes: Mapping[str, tuple[int, ...]], stored: Mapping[str, Any]) -> None:
    """Refuse weights that do not fit the configuration, before they are loaded; other names are left to the loader."""
    for name, shape in shapes.items():
        found = tuple(stored[name]["shape"]) if name in stored else shape
        if found != shape:
            raise CheckpointError(
                f"model {spec} stores {name} with shape {found}, but its config.json says {shape}. They belong to "
                "different models; fetch both again."
            )


def _require_tied(
    spec: str, folder: Path, modules: Sequence[str], shapes: Mapping[str, Any], files: Sequence[Path]
) -> None:
    """Refuse an output head of its own where the configuration says that it is the embedding: it would be lost.

    Read are two matrices of those checkpoints that store the same one twice.
    """
    first, *others = (f"{module}.weight" for module in modules)
    with ExitStack() as stack:
        where = {name: file for file in files for name in _safetensors_header(file)}
        if first not in where:
            return
        for name in others:
            if name not in where or name in shapes:
                continue
            both = [stack.enter_context(safe_open(where[key], framework="pt")).get_slice(key) for key in (first, name)]
            rows = both[0].get_shape()[0]
            if both[1].get_shape() != both[0].get_shape() or not all(
                torch.equal(both[0][start : start + _ROWS], both[1][start : start + _ROWS])
                for start in range(0, rows, _ROWS)
            ):
                raise CheckpointError(
                    f"model {spec} stores {name} beside a different {first}, but its config.json says that they are "
                    f"one. Set tie_word_embeddings to false in {folder / 'config.json'}, or remove {name} from the "
                    "weights."
                )


def _remembered_anatomy(folder: Path, raw: Mapping[str, Any], trust_remote_code: bool) -> dict[str, Any]:
    """Return the full configuration and the parameters' shapes (tied ones once).

    Both come from transformers, whose configuration and modelling code takes seconds to import; the answer is
    remembered per configuration and transformers version in the user's cache folder.
    """
    key = digest(raw, importlib.metadata.version("transformers"))
    file = cache_folder() / "models" / f"{key}.json"
    remembered = _read_memory(file)
    if not remembered:
        remembered = _anatomy(folder, trust_remote_code)
        _remember(file, remembered)
    return remembered


def _anatomy(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (StrictDataclassError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"transformers refuses {folder / 'config.json'}: {error} Correct it, or fetch the model again."
        ) from None
    return {
        "config": config.to_dict(),
        "shapes": {name: list(parameter.shape) for name, parameter in empty.named_parameters()},
    }


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers from drawing its progress bars over ours."""
    from transformers.utils import logging

    active = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if active:
            logging.enable_progress_bar()


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise CheckpointError(f"{folder} is not a model folder: it has no config.json (it holds {found}).")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}. Fetch the model again.") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a configuration but a {type(data).__name__}.")
    return data


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return a model folder's generation_config.json as plain data; empty where there is none."""
    try:
        data = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _refuse_pickles(spec: str, folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _UNSAFE_SUFFIXES)
    if pickles:
        raise CheckpointError(
            f"model {spec} has its weights only as pickle ({pickles[0]}), which can run code when opened. Convert it "
            "to safetensors first (load it where you trust it and call save_pretrained)."
        )
    raise CheckpointError(f"model {spec} has no .safetensors file in {folder}. Fetch its weights first.")


def _stored_dtype(stored: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype that most stored numbers have."""
    names = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    sizes: dict[str, int] = {}
    for entry in stored.values():
        start, stop = entry["data_offsets"]
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + stop - start
    main = max(sizes, key=lambda name: sizes[name], default="F32")
    if main not in names:
        raise CheckpointError(
            f"weights are stored as {main}, which cannot be pruned. Give an unquantised checkpoint (F32, BF16 or F16)."
        )
    return names[main]


def _safetensors_header(file: Path) -> dict[str, Any]:
    """Return dtype, shape and place of every tensor in a file, after checking that the file is as long as they say."""
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                raise ValueError("its header is longer than the file")
            header: dict[str, Any] = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            needed = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if needed != size:
            raise ValueError(f"it has {size:,} bytes where its header says {needed:,}")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}. Fetch it again.") from None
    return header


def _from_hub(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(spec, allow_patterns=_HUB_FILES))
    except HFValidationError:
        raise CheckpointError(f"{spec!r} is neither an existing folder nor a hub id such as org/name.") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnavailableError(
            f"model {spec} is not a local folder, not in the hub cache, and could not be fetched ({reason}). Check "
            "the name and the connection, log in with `hf auth login` if it is gated, or give a local folder."
        ) from None


def _dequantised(path: Path) -> Path:
    """Return a cached folder with the GGUF file's weights in float32."""
    if not path.is_file():
        raise CheckpointError(f"model file {path} does not exist.")
    folder = cache_folder() / "gguf" / f"{path.stem}-{_file_hash(path)[:16]}"
    if (folder / "config.json").is_file():
        return folder
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        with disk_errors(folder), atomic_folder(folder) as work, _without_bars():
            loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
            data = loaded.config.to_dict()
            data.pop("quantization_config", None)
            data.pop("_name_or_path", None)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(data.pop("model_type"), **data))
            model.load_state_dict(loaded.state_dict())
            model.generation_config = loaded.generation_config
            save_model(model, work)
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(work)
            write_text(work / "README.md", _gguf_card(path))
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"{path} could not be read as a GGUF language model: {error}. Check the file, or give the model's folder."
        ) from None
    return folder


def _gguf_card(path: Path) -> str:
    """Return a minimal model card with the licence and language that the GGUF file states."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    stated = {"license": "general.license", "language": "general.languages"}
    metadata = {key: fields[name].contents() for key, name in stated.items() if name in fields}
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) if metadata else ""
    return f"---\n{front}---\n\nDequantised from {path.name}.\n"


def _file_hash(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            state.update(chunk)
    return state.hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """Return what identifies the exact weights and configuration: a hash over the bytes of the files.

    Hashing is remembered per file, size and modification time in the user's cache folder.
    """
    memory_file = cache_folder() / "fingerprints.json"
    memory = _read_memory(memory_file)
    state = hashlib.blake2b(digest_size=16)
    known = dict(memory)
    for file in sorted([checkpoint.folder / "config.json", *checkpoint.folder.glob("*.safetensors")]):
        stat = file.stat()
        key = f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in known:
            known[key] = _file_hash(file)
        state.update(f"{file.name}:{known[key]};".encode())
    if known != memory:
        _remember(memory_file, known)
    return state.hexdigest()


def _read_memory(file: Path) -> dict[str, Any]:
    try:
        memory = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return memory if isinstance(memory, dict) else {}


def _remember(file: Path, memory: Mapping[str, Any]) -> None:
    """Write to the cache folder where that is possible; a cache that cannot be written stops nobody's work."""
    with suppress(ExportError, OSError):
        write_json(file, memory)


def fingerprint_loaded(model: nn.Module) -> str:
    """Return what identifies the weights of a model in memory: a hash over names, dtypes and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        tensor = parameter.detach().cpu().contiguous()
        state.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)};".encode())
        state.update(tensor.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


def choose_device(device: str) -> torch.device:
    """Return the device to compute on; ``auto`` is the first GPU, else the CPU.

    Where one of several processes was started for each GPU, each has its own (``LOCAL_RANK``).

    Raises:
        CheckpointError: the device does not exist here.
    """
    if device == "auto":
        rank = os.environ.get("LOCAL_RANK")
        own = "cuda" if rank is None else f"cuda:{rank}"
        return torch.device(own if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.zeros(1, device=chosen).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition(". ")[0].rstrip(".")
        raise CheckpointError(f"device {device!r} cannot be used here: {reason}. Try device: auto or cpu.") from None
    return chosen


def choose_dtype(dtype: str, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in; ``auto`` is the stored one on a GPU and float32 on a CPU."""
    if dtype != "auto":
        return _DTYPES[dtype]
    return stored if device.type != "cpu" else torch.float32


def load_model(
    checkpoint: Checkpoint, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False
) -> Any:
    """Return the causal language model, in evaluation mode, after checking that its weights are finite.

    Raises:
        CheckpointError: weights are missing, of the wrong shape, or not finite; the tensor is named.
    """
    from transformers import AutoModelForCausalLM

    place = choose_device(device)
    try:
        with _without_bars():
            model, report = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=choose_dtype(dtype, checkpoint.dtype, place),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"model {checkpoint.spec} could not be loaded: {error} Fetch it again.") from None
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"model {checkpoint.spec} lacks weights: {', '.join(missing[:3])}{'...' if len(missing) > 3 else ''}. The "
            "folder is incomplete or its config.json belongs to another model."
        )
    require_finite(model)
    return model.to(place).eval()


def parameter(model: nn.Module, name: str) -> Tensor | None:
    """Return a model's parameter by name, or None where it has none of that name (an absent bias)."""
    try:
        return model.get_parameter(name).detach()
    except AttributeError:
        return None


def require_finite(model: nn.Module) -> None:
    """Raise CheckpointError naming the first parameter that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise CheckpointError(f"weights of {name} hold NaN or infinity. The checkpoint is broken; fetch it again.")


def load_tokenizer(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """Return the checkpoint's tokenizer.

    Raises:
        CheckpointError: there is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise CheckpointError(
            f"the tokenizer of {checkpoint.spec} could not be loaded: {error}. Put tokenizer.json into its folder."
        ) from None


def generation_data(model: Any) -> dict[str, Any]:
    """Return a model's generation configuration as plain data: what differs from transformers' defaults."""
    data: dict[str, Any] = model.generation_config.to_diff_dict()
    return data


def planned_configuration(config: Mapping[str, Any]) -> Any:
    """Return transformers' configuration of a pruned model.

    Args:
        config: plain configuration, ``model_type`` included.

    Raises:
        PlanError: the model type's configuration class refuses the sizes.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    data = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    try:
        return AutoConfig.for_model(config["model_type"], **data)
    except (StrictDataclassError, ValueError) as error:
        raise PlanError(
            f"the configuration of {config['model_type']} refuses the planned sizes: {error} Keep another number of "
            "units, or use shape: uneven."
        ) from None


def meta_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a model with the given plain configuration, in evaluation mode, whose tensors are on the meta device.

    Raises:
        PlanError: the model type's configuration class refuses the sizes.
    """
    from transformers import AutoModelForCausalLM

    configuration = planned_configuration(config)
    with torch.inference_mode(False), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    return model.eval().requires_grad_(False)


def build_model(
    config: Mapping[str, Any],
    parameters: Iterable[tuple[str, Tensor]],
    dense: Any,
    generation: Mapping[str, Any] | None = None,
) -> Any:
    """Return a model with the given configuration and parameters, in the dtype and on the device of ``dense``.

    Args:
        config: plain configuration, ``model_type`` included.
        parameters: every entry of the new model's state, by name.
        dense: the model it comes from.
        generation: its generation configuration as plain data; None carries the dense model's over.

    Raises:
        CheckpointError: names or shapes do not fit the configuration.
        PlanError: the model type's configuration class refuses the sizes.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    configuration = planned_configuration(config)
    configuration._attn_implementation = dense.config._attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration, dtype=dense.dtype)
    try:
        model.load_state_dict(dict(parameters), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the pruned weights do not fit their configuration: {error}") from None
    model.tie_weights()
    _restore_buffers(model, dense)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.generation_config = (
        copy.deepcopy(dense.generation_config) if generation is None else GenerationConfig.from_dict(dict(generation))
    )
    return model.eval()


def _restore_buffers(model: Any, dense: Any) -> None:
    """Fill in the buffers that are not saved (rotary tables); pruning whole heads leaves them as they were."""
    originals = dict(dense.named_buffers())
    for name, buffer in list(model.named_buffers()):
        if buffer.device.type == "meta":
            owner = model.get_submodule(name.rpartition(".")[0])
            owner.register_buffer(name.rpartition(".")[2], originals[name].clone(), persistent=False)


def save_model(model: Any, folder: Path, *, max_shard_size: str = "50GB") -> None:
    """Write a model's configuration, generation configuration and safetensors into an existing folder.

    The configuration is written so that older transformers read it right too, and a model of uneven shape brings the
    code with it that others need.

    Args:
        model: a transformers model.
        folder: where to.
        max_shard_size: weights beyond it are spread over several files with an index.
    """
    with _without_bars():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    write_older_keys(folder)


def copy_side_files(source: Path, target: Path) -> None:
    """Copy what belongs to a model but is neither weights nor configuration: licence texts."""
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")):
            shutil.copy2(file, target / file.name)


def weight_bytes(folder: Path) -> int:
    """Return the bytes of a model folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def compare_reloaded(model: Any, folder: Path, inputs: Mapping[str, Any], *, tolerance: float) -> float:
    """Reload a saved folder with transformers and return the largest difference of its logits from ``model``'s.

    Raises:
        ExportError: the folder does not load, or its logits differ by more than ``tolerance``.
    """
    from transformers import AutoModelForCausalLM

    try:
        with _without_bars():
            reloaded, report = AutoModelForCausalLM.from_pretrained(
                folder, dtype=model.dtype, use_safetensors=True, output_loading_info=True
            )
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ExportError(f"the saved model does not load again: {error}") from None
    if report["missing_keys"] or report["unexpected_keys"]:
        raise ExportError(
            f"the saved model reloads with missing {sorted(report['missing_keys'])[:3]} and unexpected "
            f"{sorted(report['unexpected_keys'])[:3]} weights."
        )
    with torch.inference_mode():
        ours = model(**inputs).logits
        theirs = reloaded.to(model.device).eval()(**inputs).logits
    if not bool(torch.isfinite(ours).all()):
        raise ExportError("the pruned model's logits are not finite (NaN or infinite). Check the checkpoint's weights.")
    difference = float((ours - theirs).abs().max())
    if not difference <= tolerance:
        raise ExportError(
            f"the reloaded model's logits differ by {difference:.3g} (allowed {tolerance:.3g}); the folder is not kept."
        )
    return difference
