"""What a model folder can be exported to: each target with what it needs, its check before any work, and its writer.

A target's check looks at configuration, shapes and tokenizer only, so a run can ask it before it calibrates and again
before it cuts. A writer gives a file or folder its name only after it was read back, and where an engine is at hand,
after that engine agreed with transformers.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ConfigError, ExportError, FamilyError, UnavailableError, VerificationError
from secateur.export import ggml, gguf, gguf_types, llama_cpp, nemotron_nas, onnx
from secateur.export.padding import PaddingReport, padded_folder, plan_padding
from secateur.export.stored import load_description, open_parameters
from secateur.records.exported import Exported
from secateur.records.plan import format_ranges
from secateur.records.units import UNIT_NAMES
from secateur.registry import Registry, unknown_name
from secateur.report.tables import format_bytes
from secateur.store.artifacts import disk_errors
from secateur.store.checkpoints import read_generation_config

ROUND_TO_FIT = "Or set round_to_fit: true (--round-to-fit), which fills up with zeros: the same answers, a larger file."
_LISTED = 8
"""Kinds of layers that are listed one by one."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model without its weights, before it is cut or before it is written.

    Attributes:
        config: the plain data of its configuration, defaults included.
        shapes: the shape of every stored parameter; tied ones once.
        tokenizer: its transformers tokenizer; None leaves it out of checks.
        generation: the plain data of its generation configuration.
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    tokenizer: Any = None
    generation: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Options:
    """How a model is exported.

    Attributes:
        quantize: type of the weights, where the target has several; else empty.
        round_to_fit: fill sizes that the target cannot hold up with zeros, instead of refusing them.
        name: of the model, for those who read the file.
    """

    quantize: str = ""
    round_to_fit: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """What a writer wrote; fields as in ``Exported``."""

    form: str
    checked: str
    notes: tuple[str, ...]
    facts: Mapping[str, Any]
    padding: tuple[str, ...] = ()


Check = Callable[[Path], None]
"""Called with what was written before it gets its name; where it raises, nothing gets it."""


@dataclass(frozen=True, slots=True)
class Target:
    """One form that a model can be exported to.

    Attributes:
        name: what recipes and the command line call it.
        description: what it is and who reads it, one sentence.
        needs: what must be installed, for messages; empty for nothing.
        plan: raises ExportError where the target cannot hold a model; layers and nearest sizes that fit are named.
        write: (folder, target, options, check) -> what was written.
        verify: (file, folder, prompts) -> how an engine agreed, as a dataclass whose text is a sentence; None where no
            engine is asked. Raises VerificationError where it disagrees, UnavailableError where it is not there.
        can_verify: whether the engine is there.
        types: types of the weights that it takes, the first one by default; empty where there is nothing to choose.
        suffix: of the file; empty where it is a folder.
        require_installed: (type) raises UnavailableError where something is not installed that the writer needs.
        needed_multiple: (type) -> what feed-forward widths must be multiples of.
        advised_multiple: (type, uneven, dense width) -> what they should be multiples of, because the engine is slow
            or the file large otherwise.
    """

    name: str
    description: str
    needs: str
    plan: Callable[[ModelFacts, Options], object]
    write: Callable[[Path, Path, Options, Check], Written]
    verify: Callable[[Path, Path, Sequence[str]], Any] | None = None
    can_verify: Callable[[], bool] = lambda: False
    types: tuple[str, ...] = ()
    suffix: str = ""
    require_installed: Callable[[str], object] = lambda quantize: None
    needed_multiple: Callable[[str], int] = lambda quantize: 1
    advised_multiple: Callable[[str, bool, int], int] = lambda quantize, uneven, width: 1

    def quantization(self, asked: str | None) -> str:
        """Return the type that is asked for by its own spelling, or the default one; empty where there are none.

        Raises:
            ConfigError: the target does not have it.
        """
        if not self.types:
            if asked is not None:
                raise ConfigError(f"export target {self.name} has no types; got quantize: {asked}. Leave quantize out.")
            return ""
        if asked is None:
            return self.types[0]
        if asked.upper() not in self.types:
            raise ConfigError(unknown_name(f"type of export target {self.name}", asked, self.types))
        return asked.upper()

    def file_name(self, stem: str, quantize: str) -> str:
        """Return what an exported model is called by default."""
        if not self.suffix:
            return f"{stem}-{self.name}"
        return f"{stem}.{quantize}{self.suffix}" if quantize else f"{stem}{self.suffix}"

    def require_fit(self, facts: ModelFacts, options: Options) -> None:
        """Raise ExportError where the target cannot hold a model; where zeros would help, that is said.

        Raises:
            ExportError: see above.
        """
        try:
            self.plan(facts, options)
        except ExportError as error:
            said = options.round_to_fit or "round_to_fit" in str(error)
            if not said and self._fits(facts, replace(options, round_to_fit=True)):
                raise ExportError(f"{error} {ROUND_TO_FIT}") from None
            raise

    def _fits(self, facts: ModelFacts, options: Options) -> bool:
        try:
            self.plan(facts, options)
        except ExportError:
            return False
        return True


TARGETS: Registry[Target] = Registry("export target")


def read_facts(folder: Path) -> ModelFacts:
    """Return what is known of the model in a Hugging Face folder without reading its weights.

    Raises:
        ExportError: it is no folder of a model that transformers loads.
    """
    with open_parameters(folder) as parameters:
        config, tokenizer = load_description(folder)
        return ModelFacts(config, parameters.shapes, tokenizer, read_generation_config(folder))


def export_folder(
    folder: Path,
    path: Path | None = None,
    to: str = "gguf",
    *,
    quantize: str | None = None,
    round_to_fit: bool = False,
    name: str = "",
    verify: bool = True,
    prompts: Sequence[str] = (),
) -> Exported:
    """Write the model in a Hugging Face folder in another form, check it, and return what was written.

    It appears under its name only after it was read back and, where the target has an engine that is installed, after
    the engine agreed with transformers.

    Args:
        folder: model, configuration and tokenizer, as a run writes them.
        path: of the file or folder; replaced if it exists. By default beside ``folder``, named after it.
        to: one of ``TARGETS``.
        quantize: type of the weights; by default the target's first.
        round_to_fit: fill sizes that the target cannot hold up with zeros, instead of refusing them.
        name: of the model, for those who read the file; by default the folder's.
        verify: ask the engine.
        prompts: text for the engine; by default some sentences on different matters.

    Raises:
        ConfigError: the target or the type is unknown.
        ExportError: the target cannot hold the model, the disk is full, or what was written does not read back.
        VerificationError: the engine does not run it, or runs it as another model; a file is then kept as
            ``*.failed-verification.*``.
    """
    target = TARGETS[to]
    options = Options(target.quantization(quantize), round_to_fit, name or folder.resolve().name)
    path = path or folder.resolve().with_name(target.file_name(folder.resolve().name, options.quantize))
    if path.resolve() == folder.resolve():
        raise ConfigError(f"{path} is the folder that is exported. Choose another output.")
    target.require_fit(read_facts(folder), options)
    engine = _Engine(target, path, folder, [text for text in prompts if text.strip()] or llama_cpp.PROMPTS, verify)
    written = target.write(folder, path, options, engine)
    return Exported(
        target=target.name,
        path=path,
        quantization=options.quantize,
        size_bytes=size_of(path),
        form=written.form,
        checked=written.checked,
        verified=str(engine.result) if engine.result is not None else "",
        not_verified=engine.skipped,
        notes=written.notes,
        padding=written.padding,
        facts={**written.facts, "verified": None if engine.result is None else asdict(engine.result)},
    )


class _Engine:
    """Asks a target's engine about what was written, and keeps a file that fails under a name that says so."""

    def __init__(self, target: Target, path: Path, folder: Path, prompts: Sequence[str], asked: bool) -> None:
        self.target, self.path, self.folder, self.prompts = target, path, folder, prompts
        self.result: Any = None
        self.skipped = "" if asked or target.verify is None else "that was not asked for"

    def __call__(self, work: Path) -> None:
        if self.target.verify is None or self.skipped:
            return
        failed = self.path.with_name(f"{self.path.stem}.failed-verification{self.path.suffix}")
        try:
            self.result = self.target.verify(work, self.folder, self.prompts)
        except UnavailableError as error:
            self.skipped = str(error)
        except VerificationError as error:
            os.replace(work, failed)
            raise VerificationError(f"{error} The file is kept as {failed}.") from None
        else:
            failed.unlink(missing_ok=True)


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


# -- gguf ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Padding:
    """What ``padded_folder`` is asked for."""

    multiple: int = 1
    uniform: bool = False


def _plan_gguf(facts: ModelFacts, options: Options) -> _Padding | None:
    """Return what must be filled up with zeros first, None for nothing; raise ExportError where that does not help."""
    try:
        _require_gguf(facts, options)
    except ExportError:
        paddings = _gguf_paddings(options) if options.round_to_fit else []
        for padding in paddings:
            try:
                _require_gguf(_padded_facts(facts, padding), options)
            except (ExportError, FamilyError):
                continue
            return padding
        raise
    return None


def _require_gguf(facts: ModelFacts, options: Options) -> None:
    gguf.plan_gguf(
        facts.config,
        facts.shapes,
        quantize=options.quantize,
        tokenizer=facts.tokenizer,
        generation=facts.generation,
    )


def _gguf_paddings(options: Options) -> list[_Padding]:
    """Return what may help, the smallest first: widths in whole blocks, then the same sizes in every layer."""
    block = gguf_types.needed_multiple(options.quantize)
    widths = [_Padding(block)] if block > 1 else []
    return [*widths, _Padding(block, uniform=True)]


def _write_gguf(folder: Path, path: Path, options: Options, check: Check) -> Written:
    padding = _plan_gguf(read_facts(folder), options)
    with _padded(folder, path, padding, options.quantize) as (source, padded):
        report = gguf.export_gguf(source, path, quantize=options.quantize, name=options.name, check=check)
    return Written(
        form=f"{report.architecture}, {report.quantization}",
        checked="read back and compared: every tensor and key agrees with the model",
        notes=report.notes,
        facts={
            "architecture": report.architecture,
            "num_tensors": report.num_tensors,
            "largest_error": report.largest_error,
        },
        padding=padded,
    )


def _verify_gguf(file: Path, folder: Path, prompts: Sequence[str]) -> llama_cpp.Verification:
    return llama_cpp.verify_in_llama_cpp(file, folder, prompts)


def _require_gguf_writer(quantize: str) -> None:
    if gguf_types.quantization(quantize).is_mixture:
        ggml.require_ggml()


TARGETS.add(
    "gguf",
    Target(
        name="gguf",
        description="One file for llama.cpp and what is built on it, in eight types of weights and seven k-quants.",
        needs="pip install xllamacpp for k-quants",
        plan=_plan_gguf,
        write=_write_gguf,
        verify=_verify_gguf,
        can_verify=lambda: llama_cpp.is_installed(),
        types=("F16", *(name for name in gguf_types.QUANTIZATIONS if name != "F16")),
        suffix=".gguf",
        require_installed=_require_gguf_writer,
        needed_multiple=gguf_types.needed_multiple,
        advised_multiple=gguf_types.advised_multiple,
    ),
)


# -- Hugging Face and Nemotron-NAS folders, ONNX -----------------------------------------------------------------------


def _plan_uniform(facts: ModelFacts, options: Options) -> None:
    plan_padding(facts.config, uniform=True)


def _write_uniform(folder: Path, path: Path, options: Options, check: Check) -> Written:
    report = padded_folder(folder, path, uniform=True)
    return Written(
        form="every layer of the same size",
        checked="reloaded with transformers and compared: its logits are those of the model",
        notes=report.notes[:1],
        facts={"parameters_before": report.parameters_before, "parameters_after": report.parameters_after},
        padding=tuple(_padding_sentences(report, None)),
    )


TARGETS.add(
    "uniform",
    Target(
        name="uniform",
        description="A Hugging Face folder of the family's stock type, filled up with zeros, for engines that take no "
        "layers that differ.",
        needs="",
        plan=_plan_uniform,
        write=_write_uniform,
    ),
)


def _plan_nemotron_nas(facts: ModelFacts, options: Options) -> None:
    nemotron_nas.plan_nemotron_nas(facts.config, facts.shapes, round_to_fit=options.round_to_fit)


def _write_nemotron_nas(folder: Path, path: Path, options: Options, check: Check) -> Written:
    report = nemotron_nas.export_nemotron_nas(folder, path, round_to_fit=options.round_to_fit)
    zeros = f"filled up with zeros: {report.added_parameters:,} more parameters"
    return Written(
        form=f"{report.num_layers} layers",
        checked="read back and compared: every tensor agrees with the model",
        notes=report.notes,
        facts={"num_tensors": report.num_tensors, "added_parameters": report.added_parameters},
        padding=(zeros,) if report.added_parameters else (),
    )


TARGETS.add(
    "nemotron-nas",
    Target(
        name="nemotron-nas",
        description="A folder in the form of NVIDIA's Nemotron-NAS models, whose layers may differ, for vLLM, SGLang "
        "and others with a class for them.",
        needs="",
        plan=_plan_nemotron_nas,
        write=_write_nemotron_nas,
        needed_multiple=lambda quantize: nemotron_nas.WIDTH_MULTIPLE,
    ),
)


def _plan_onnx(facts: ModelFacts, options: Options) -> None:
    onnx.plan_onnx(facts.config, facts.shapes)


def _write_onnx(folder: Path, path: Path, options: Options, check: Check) -> Written:
    report = onnx.export_onnx(folder, path)
    return Written(
        form=f"opset {report.opset}",
        checked=f"run in onnxruntime and compared: logits differ by {report.largest_difference:.1e} of the largest",
        notes=report.notes,
        facts={"files": list(report.files), "versions": dict(report.versions)},
    )


TARGETS.add(
    "onnx",
    Target(
        name="onnx",
        description="A folder with an ONNX graph in float32 with a key/value cache, for onnxruntime and what reads it.",
        needs="pip install onnx onnxscript onnxruntime",
        plan=_plan_onnx,
        write=_write_onnx,
        require_installed=lambda quantize: onnx.require_onnx(),
    ),
)


# -- filling up with zeros -------------------------------------------------------------------------------------------


@contextmanager
def _padded(
    folder: Path, path: Path, padding: _Padding | None, quantize: str
) -> Iterator[tuple[Path, tuple[str, ...]]]:
    """Give a copy of a model folder that is filled up, with what was done in sentences; the folder itself for None."""
    if padding is None:
        yield folder, ()
        return
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}-padded-", dir=path.parent))
    try:
        report = padded_folder(folder, work / "model", multiple=padding.multiple, uniform=padding.uniform)
        yield report.path, tuple(_padding_sentences(report, quantize))
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _padded_facts(facts: ModelFacts, padding: _Padding) -> ModelFacts:
    """Return what is known of the model once it is filled up.

    Raises:
        ExportError: it cannot be.
    """
    planned = plan_padding(facts.config, multiple=padding.multiple, uniform=padding.uniform)
    return replace(facts, config=planned.config, shapes=_shapes_of(planned.config))


def _shapes_of(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    from secateur.store.modeling import register_uneven_models

    register_uneven_models()
    data = {key: value for key, value in config.items() if key not in ("model_type", "transformers_version")}
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **data))
    except (StrictDataclassError, ValueError) as error:
        raise ExportError(f"the configuration of {config['model_type']} refuses the padded sizes: {error}") from None
    return {name: tuple(parameter.shape) for name, parameter in empty.named_parameters()}


def _padding_sentences(report: PaddingReport, quantize: str | None) -> list[str]:
    """Return which layers got how many zeros, and what that costs."""
    changes: dict[str, list[int]] = {}
    for layer, sizes in enumerate(report.layers):
        words = [
            f"{sizes.before[kind]} to {after} {UNIT_NAMES[kind]}"
            for kind, after in sizes.after.items()
            if after != sizes.before[kind]
        ]
        if words:
            changes.setdefault(", ".join(words), []).append(layer)
    added = report.parameters_after - report.parameters_before
    if not changes:
        return []
    parts = [f"layers {format_ranges(layers)} from {words}" for words, layers in changes.items()]
    shown = "; ".join(parts[:_LISTED]) + (f"; and {len(parts) - _LISTED} more kinds of layers" * (len(parts) > _LISTED))
    size = "" if quantize is None else f", {format_bytes(added * gguf_types.bytes_per_weight(quantize))}"
    share = added / report.parameters_before
    return [f"filled up with zeros: {shown}: {added:,} more parameters ({share:.1%}{size})", *report.notes[1:]]
