"""Size and speed as a part of a run: the dense model and the result in turn on this machine, kept in ``speed.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.corpus.tokenizing import tokenize
from secateur.errors import CheckpointError, ConfigError
from secateur.evaluate.speed import Subject, describe_machine, measure_speed, random_ids
from secateur.export.given import given_folder
from secateur.progress import Progress, silent
from secateur.recipe import SpeedSpec
from secateur.records.speed import Setting, SpeedComparison
from secateur.store.artifacts import digest, read_json, write_json
from secateur.store.checkpoints import Checkpoint, choose_device, choose_dtype, load_model, resolve_model
from secateur.store.run_folder import RunFolder

SPEED = "speed.json"
STAGE = "evaluate:speed"

_IN_A_RUN = ("model", "recovered")
"""Folder names that do not tell one model from another."""


@dataclass(frozen=True, slots=True)
class Timed:
    """A model of a run that is timed.

    Attributes:
        name: of its row.
        fingerprint: of its weights.
        folder: where it lies.
        disk_bytes: of its weight files.
        load: returns the model and its tokenizer; called only where nothing is there yet.
    """

    name: str
    fingerprint: str
    folder: Path
    disk_bytes: int
    load: Callable[[], tuple[Any, Any]]


def settings_of(spec: SpeedSpec) -> list[Setting]:
    """Return what is measured, prompt length by prompt length."""
    return [Setting(length, batch, spec.new_tokens) for length in spec.prompt_lengths for batch in spec.batch_sizes]


def require_positions(spec: SpeedSpec, checkpoint: Checkpoint) -> None:
    """Refuse prompts that, with what follows them, are longer than a model can read.

    Raises:
        ConfigError: see above; the longest prompt that fits is said.
    """
    limit = checkpoint.geometry.dimensions.get("num_positions") or checkpoint.config.get("max_position_embeddings")
    longest = max(spec.prompt_lengths)
    if limit is None or longest + spec.new_tokens <= limit:
        return
    room = limit - spec.new_tokens
    advice = f"Give prompt lengths of {room:,} or less" if room > 0 else f"Set new_tokens below {limit:,}"
    raise ConfigError(
        f"speed is to be measured on prompts of {longest:,} tokens with {spec.new_tokens:,} new ones, and model "
        f"{checkpoint.name} knows {limit:,} positions. {advice} (evaluate.speed in a recipe)."
    )


@dataclass
class SpeedStage:
    """Measures the dense model and the result of a run.

    Attributes:
        spec: the recipe's ``evaluate.speed``; None where nothing is asked.
        checkpoint: the dense model.
        read_texts: returns test text of a bucket, of about so many tokens.
        domains: buckets whose text prompts are taken from.
        text_key: hash of these texts.
        device: the recipe's.
        dtype: the recipe's.
        trust_remote_code: the recipe's.
        folder: the run's folder.
        progress: told about every run of a model.
        reused: gets the stage's name where its result was still valid.
    """

    spec: SpeedSpec | None
    checkpoint: Checkpoint
    read_texts: Callable[[str, int], Sequence[str]]
    domains: Sequence[str]
    text_key: str
    device: str
    dtype: str
    trust_remote_code: bool
    folder: RunFolder
    progress: Progress = silent
    reused: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Refuse settings that the model cannot do, before anything is run."""
        if self.spec is not None:
            require_positions(self.spec, self.checkpoint)

    def measure(self, models: Sequence[Timed]) -> SpeedComparison | None:
        """Return the sizes and speeds of models, the dense one first; None where nothing is asked."""
        if self.spec is None:
            return None
        file, key = self.folder.path / SPEED, self._key(models)
        if self.folder.is_done(STAGE, key, file):
            self.reused.append(STAGE)
            return read_speed(file)
        started = time.perf_counter()
        self.folder.forget(STAGE)
        settings = settings_of(self.spec)
        texts = self._read_texts(max(setting.batch_size * setting.prompt_length for setting in settings))
        comparison = measure_speed(
            [self._subject(model, texts) for model in models],
            settings,
            rounds=self.spec.rounds,
            progress=self.progress,
        )
        write_json(file, comparison.to_dict())
        self.folder.finish(STAGE, key, started)
        return comparison

    def _key(self, models: Sequence[Timed]) -> str:
        assert self.spec is not None, "only asked for where something is measured"
        device = choose_device(self.device)
        machine = describe_machine(device, choose_dtype(self.dtype, self.checkpoint.dtype, device))
        measured = [[model.name, model.fingerprint] for model in models]
        return digest(measured, self.spec.model_dump(), self.text_key, asdict(machine))

    def _read_texts(self, num_tokens: int) -> list[str]:
        share = -(-num_tokens // len(self.domains))
        return [text for name in self.domains for text in self.read_texts(name, share) if text]

    def _subject(self, timed: Timed, texts: Sequence[str]) -> Subject:
        model, tokenizer = timed.load()
        ids, bytes_per_token = prompt_ids(texts, tokenizer)
        return Subject(timed.name, model, ids, timed.folder, timed.disk_bytes, bytes_per_token, self.trust_remote_code)


def prompt_ids(texts: Sequence[str], tokenizer: Any) -> tuple[Int64[Tensor, " ids"], float]:
    """Return the token ids of texts, one text after another, and the UTF-8 bytes of text per id."""
    ids = [token for document in tokenize(texts, tokenizer) for token in document]
    return torch.tensor(ids), sum(len(text.encode()) for text in texts) / len(ids)


def read_speed(file: Path) -> SpeedComparison:
    """Return what an earlier run measured.

    Raises:
        CheckpointError: the file is broken.
    """
    try:
        return SpeedComparison.from_dict(read_json(file))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{file} holds no speeds that secateur wrote: {error!r}. Delete it; they will be measured again."
        ) from None


def measure_folders(
    models: Sequence[str],
    spec: SpeedSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    with_peaks: bool = True,
    trust_remote_code: bool = False,
    progress: Progress = silent,
) -> SpeedComparison:
    """Return the sizes and speeds of any models of supported families, measured in turn on this machine.

    Prompts are ids drawn at random, the same number for every model: which they are makes no difference to speed.

    Args:
        models: model folders, folders of runs, hub ids or GGUF files; the first is what the others are compared with.
        spec: what is measured.
        device: to run on; ``auto`` is the first GPU, else the CPU.
        dtype: that all of them compute in; ``auto`` is the first one's stored dtype on a GPU and float32 on a CPU.
        with_peaks: measure the peak of memory as well.
        trust_remote_code: let a model bring its own Python code.
        progress: told about every run of a model.

    Raises:
        ConfigError: no models, or prompts longer than a model can read; said before weights are read.
        CheckpointError: a model cannot be loaded.
    """
    if not models:
        raise ConfigError(
            "no models are given, so there is nothing to measure. Name the dense model and a smaller one."
        )
    places = [str(given_folder(Path(model))) if Path(model).is_dir() else model for model in models]
    found = [resolve_model(place, trust_remote_code=trust_remote_code) for place in places]
    for checkpoint in found:
        require_positions(spec, checkpoint)
    chosen = choose_device(device)
    common = str(choose_dtype(dtype, found[0].dtype, chosen)).removeprefix("torch.")
    settings = settings_of(spec)
    most = max(setting.batch_size * setting.prompt_length for setting in settings)
    subjects = []
    for name, checkpoint in zip(_names(models, found), found, strict=True):
        with progress(f"load {name}", None, "") as task:
            model = load_model(checkpoint, device=device, dtype=common, trust_remote_code=trust_remote_code)
            task.advance(1)
        ids = random_ids(checkpoint.geometry.dimensions["vocab_size"], most)
        subjects.append(Subject(name, model, ids, checkpoint.folder, checkpoint.size_bytes, None, trust_remote_code))
    return measure_speed(subjects, settings, rounds=spec.rounds, with_peaks=with_peaks, progress=progress)


def _names(given: Sequence[str], found: Sequence[Checkpoint]) -> list[str]:
    """Return a name of its own for every model, after what was given."""
    names: list[str] = []
    for spec, checkpoint in zip(given, found, strict=True):
        place = Path(spec).expanduser().resolve()
        name = checkpoint.name if not place.is_dir() else place.name
        if name in _IN_A_RUN and place.is_dir():
            name = f"{place.parent.name}/{name}"
        same = sum(other.partition(" (")[0] == name for other in names)
        names.append(f"{name} ({same + 1})" if same else name)
    return names
