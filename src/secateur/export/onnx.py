"""A model folder as an ONNX graph with a key/value cache, run in onnxruntime and compared before it gets its name.

PyTorch's own exporter makes the graph (``torch.onnx``, through ``torch.export``), from the stock or uneven class alike;
only models whose graph would depend on the values of its inputs are refused. Inputs and outputs have the names that
Optimum and transformers.js use: ``input_ids``, ``attention_mask``, ``position_ids``, ``past_key_values.<layer>.key``
and ``.value``, and ``logits``, ``present.<layer>.key`` and ``.value``. A first call gives pasts of length 0. Weights
are float32. It is not quantised here, and the file carries no tokenizer: that lies beside it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ExportError, UnavailableError
from secateur.families.loader import dense_model_type, family_of, is_supported
from secateur.store.artifacts import atomic_folder, disk_errors
from secateur.store.checkpoints import copy_side_files, load_model, load_tokenizer, resolve_model
from secateur.store.tokenizers import PROBES, encode, save_tokenizer

MODEL_FILE = "model.onnx"
TOLERANCE = 1e-3
"""Largest allowed difference of a logit, over the largest logit of the model (or 1)."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")
"""Others choose their frequencies by the length of the text, which a graph cannot do."""
_TRACED = (2, 3, 5)
"""Batch, new tokens and cached tokens of the example; all of them stay variable."""
_LENGTHS = (1, 2, 9, 40)
_GREEDY_TOKENS = 16

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class OnnxReport:
    """What was written.

    Attributes:
        path: the folder.
        files: in it, by name; the graph first.
        size_bytes: of the graph and its weights.
        opset: version of ONNX's operators.
        largest_difference: of any logit from transformers', over the largest logit (or 1).
        notes: what the reader of the folder should know.
        versions: of what made and ran it.
    """

    path: Path
    files: tuple[str, ...]
    size_bytes: int
    opset: int
    largest_difference: float
    notes: tuple[str, ...]
    versions: Mapping[str, str]


def require_onnx() -> None:
    """Raise UnavailableError if a package that writing or running ONNX needs is not installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UnavailableError(f"{' and '.join(missing)} are not installed. Run: pip install {' '.join(PACKAGES)}")


def plan_onnx(config: Mapping[str, Any], shapes: Shapes) -> None:
    """Refuse a model whose ONNX graph would be another model.

    Args:
        config: the plain data of its configuration, defaults included.
        shapes: the shape of every stored parameter.

    Raises:
        ExportError: its family is not known, it holds no weights, or what it computes depends on the text: its
            positions on the length, or the experts of each token.
    """
    model_type = str(config.get("model_type"))
    if not is_supported(model_type):
        raise ExportError(
            f"models of type {dense_model_type(model_type)!r} cannot be written as ONNX. Use the Hugging Face folder."
        )
    if family_of(model_type).experts is not None:
        raise ExportError(
            f"models of type {dense_model_type(model_type)!r} send each token to experts of its own, and an ONNX graph "
            "would keep the way of one text without a word. Use the Hugging Face folder."
        )
    if not shapes:
        raise ExportError("this model has no parameters to export. Export the model folder again.")
    for kind in _rope_types(config):
        if kind not in _ROPE_TYPES:
            raise ExportError(
                f"this model scales its rotary positions by {kind!r}, which depends on the length of the text; an ONNX "
                f"graph would keep those of one length without a word. Known: {', '.join(_ROPE_TYPES)}. Use the "
                "Hugging Face folder."
            )


def _rope_types(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of rotary scaling; some families have one per type of layer."""
    rope = config.get("rope_parameters") or {}
    nested = [part for part in rope.values() if isinstance(part, Mapping)]
    return [str(part.get("rope_type", "default")) for part in (nested or [rope])]


def export_onnx(folder: Path, target: Path) -> OnnxReport:
    """Write the model in a Hugging Face folder as an ONNX graph in a folder, run it, and return what was written.

    The folder appears under its name only after onnxruntime gave transformers' logits: for texts of several lengths,
    padded batches, and a text continued token by token from its cache.

    Args:
        folder: model, configuration and tokenizer, as ``export_huggingface`` writes them.
        target: the new folder; replaced if it exists.

    Raises:
        UnavailableError: onnx, onnxscript or onnxruntime is not installed.
        ExportError: the model cannot be expressed, PyTorch cannot export it, the disk is full, or onnxruntime answers
            differently.
    """
    from secateur.store.modeling import register_uneven_models

    require_onnx()
    register_uneven_models()
    checkpoint = resolve_model(str(folder))
    plan_onnx(checkpoint.config, checkpoint.shapes)
    model = load_model(checkpoint, device="cpu", dtype="float32")
    tokenizer = load_tokenizer(checkpoint)
    graph = _Graph(model)
    with disk_errors(target), atomic_folder(target) as work:
        opset = _write(graph, work / MODEL_FILE)
        save_tokenizer(tokenizer, work)
        _copy_beside(folder, work)
        ids = encode(tokenizer, "\n".join(PROBES), add_special_tokens=True)
        difference = _compare(graph, work / MODEL_FILE, ids)
        names = sorted((file.name for file in work.iterdir()), key=lambda name: (not name.startswith(MODEL_FILE), name))
        size = sum((work / name).stat().st_size for name in names if name.startswith(MODEL_FILE))
    return OnnxReport(
        path=target,
        files=tuple(names),
        size_bytes=size,
        opset=opset,
        largest_difference=difference,
        notes=tuple(_notes(graph, model)),
        versions={name: importlib.metadata.version(name) for name in ("torch", "transformers", *PACKAGES)},
    )


class _Graph(nn.Module):
    """A causal model as a function of plain tensors: ids, mask, positions and cache in, logits and cache out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        self.layers = _cached_layers(model)

    @property
    def past_names(self) -> list[str]:
        """Names of the cache's tensors, keys and values in turn."""
        return [f"past_key_values.{layer}.{part}" for layer in self.layers for part in ("key", "value")]

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits and the cache with the new tokens."""
        from transformers import DynamicCache

        cache = DynamicCache()  # not told of windows: it keeps every token, and the masks forget
        for place, layer in enumerate(self.layers):
            cache.update(past[2 * place], past[2 * place + 1], layer)
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **positions
        )
        kept = [output.past_key_values.layers[layer] for layer in self.layers]
        return (output.logits, *(tensor for entry in kept for tensor in (entry.keys, entry.values)))

    def empty_past(self, batch: int, length: int = 0) -> list[Tensor]:
        """Return a cache of zeros for ``length`` tokens."""
        return [
            torch.zeros(batch, heads, length, size) for heads, size in self.layers.values() for _ in ("key", "value")
        ]


def _cached_layers(model: Any) -> dict[int, tuple[int, int]]:
    """Return, for each layer with attention, its key/value heads and their size, as its cache has them."""
    with torch.inference_mode():
        ids = torch.zeros(1, 2, dtype=torch.int64)
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return {
        number: (layer.keys.shape[1], layer.keys.shape[3])
        for number, layer in enumerate(cache.layers)
        if layer.is_initialized
    }


def _write(graph: _Graph, file: Path) -> int:
    """Write the graph with its weights beside it and return the version of its operators."""
    batch, new, cached = _TRACED
    example = (
        torch.ones(batch, new, dtype=torch.int64),
        torch.ones(batch, cached + new, dtype=torch.int64),
        torch.arange(cached, cached + new).expand(batch, new),
        graph.empty_past(batch, cached),
    )
    names = graph.past_names
    rows = {0: "batch", 1: "sequence"}
    try:
        with _quiet():
            program = torch.onnx.export(
                graph.eval(),
                example,
                dynamo=True,
                verbose=False,
                input_names=["input_ids", "attention_mask", "position_ids", *names],
                output_names=["logits", *(name.replace("past_key_values", "present") for name in names)],
                dynamic_shapes=(rows, {0: "batch", 1: "total"}, rows, [{0: "batch", 2: "past"}] * len(names)),
            )
            assert program is not None
            program.save(str(file), external_data=True)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(
            f"PyTorch cannot export this {graph.model.config.model_type} model as ONNX: {reason:.300} Use the Hugging "
            "Face folder."
        ) from None
    return int(program.model.opset_imports[""])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings and advice to developers from the reader."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _copy_beside(folder: Path, work: Path) -> None:
    """Copy the configurations, the code that config.json may name, and licence texts."""
    copy_side_files(folder, work)
    for file in (folder / "config.json", folder / "generation_config.json", *folder.glob("*.py")):
        if file.is_file():
            shutil.copyfile(file, work / file.name)


class _Session:
    """A graph in onnxruntime, called with tensors."""

    def __init__(self, file: Path, names: Sequence[str]) -> None:
        onnxruntime: Any = importlib.import_module("onnxruntime")
        self._names = list(names)
        try:
            self._session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
        except Exception as error:  # it has many exception types, and no common one
            raise ExportError(f"onnxruntime does not load the graph: {error!s:.300}; the folder is not kept.") from None
        self._inputs = {entry.name for entry in self._session.get_inputs()}

    def __call__(self, ids: Tensor, mask: Tensor, positions: Tensor, past: Sequence[Tensor]) -> list[Tensor]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        given |= dict(zip(self._names, past, strict=True))
        feed = {name: tensor.numpy() for name, tensor in given.items() if name in self._inputs}
        return [torch.from_numpy(array) for array in self._session.run(None, feed)]


def _compare(graph: _Graph, file: Path, ids: Sequence[int]) -> float:
    """Run the graph in onnxruntime and return the largest difference of its logits from transformers'.

    Raises:
        ExportError: it differs by more than the tolerance.
    """
    session = _Session(file, graph.past_names)
    limit = int(getattr(graph.model.config, "max_position_embeddings", None) or max(_LENGTHS) + _GREEDY_TOKENS)
    lengths = [length for length in _LENGTHS if length + _GREEDY_TOKENS <= limit] or [1]
    text = torch.tensor([*ids] * (2 * max(lengths) // len(ids) + 1))
    worst = 0.0
    for length in lengths:
        rows = text[: 2 * length].reshape(2, length)
        mask = torch.ones_like(rows)
        mask[0, : length // 3] = 0
        expected = _expected(graph, rows, mask)
        found = session(rows, mask, _positions(mask), graph.empty_past(2))[0]
        worst = max(worst, _difference(found, expected, mask, f"a padded batch of length {length}"))
    return max(worst, _compare_cached(graph, session, text[: max(lengths)][None]))


def _compare_cached(graph: _Graph, session: _Session, ids: Tensor) -> float:
    """Continue a text greedily from its cache, and compare every step with transformers on the whole text."""
    past = graph.empty_past(1)
    steps: list[Tensor] = []
    new = ids
    for _ in range(_GREEDY_TOKENS):
        done = past[0].shape[2]
        mask = torch.ones(1, done + new.shape[1], dtype=torch.int64)
        logits, *past = session(new, mask, _positions(mask)[:, done:], past)
        steps.append(logits)
        new = logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, new], dim=1)
    whole = ids[:, :-1]
    expected = _expected(graph, whole, torch.ones_like(whole))
    return _difference(torch.cat(steps, dim=1), expected, torch.ones_like(whole), "a text continued from its cache")


def _expected(graph: _Graph, ids: Tensor, mask: Tensor) -> Tensor:
    positions = {"position_ids": _positions(mask)} if graph.takes_positions else {}
    with torch.inference_mode():
        logits: Tensor = graph.model(input_ids=ids, attention_mask=mask, use_cache=False, **positions).logits
    return logits


def _positions(mask: Tensor) -> Tensor:
    """Return each token's place in its text, padding not counted."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _difference(found: Tensor, expected: Tensor, mask: Tensor, what: str) -> float:
    """Return the largest difference where the mask is one, over the largest logit (or 1)."""
    real = mask.bool()
    difference = float((found[real] - expected[real]).abs().max() / expected[real].abs().max().clamp(min=1.0))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"onnxruntime's logits for {what} differ from transformers' by {difference:.3g} of the largest (allowed: "
            f"{TOLERANCE}); the folder is not kept. Report this."
        )
    return difference


def _notes(graph: _Graph, model: Any) -> list[str]:
    notes = []
    heads = {number for number, _ in graph.layers.values()}
    bare = sorted(set(range(model.config.num_hidden_layers)) - set(graph.layers))
    if len(heads) > 1:
        counts = ", ".join(str(number) for number in sorted(heads))
        notes.append(f"Layers have {counts} key/value heads; programs that give every layer's cache one shape fail.")
    if bare:
        notes.append(f"Layers {', '.join(map(str, bare))} have no attention, so there is no cache for them.")
    return notes
