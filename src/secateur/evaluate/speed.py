"""How fast models read prompts and write on, and how much memory that takes, on the machine that this runs on.

A run is one forward pass over the prompts, whose last position gives the first new token of each, and then one forward
pass per further token with the keys and values that were kept: greedy decoding, without what ``generate`` does around
it. Models run in turn within every round, in the opposite order every other round, so that a machine that becomes
slower while it is measured slows all of them down alike. Which ids a prompt has makes no difference to the speed.
"""

from __future__ import annotations

import inspect
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Int64
from torch import Tensor

from secateur.evaluate.footprint import kv_cache, memory_by_dtype, memory_bytes, model_parameters
from secateur.families.geometry import build_geometry
from secateur.families.loader import family_of
from secateur.progress import Progress, silent
from secateur.records.speed import Machine, ModelSpeed, Setting, SpeedComparison, Timing

_WARM_UP_TOKENS = 2
_CHILD = "secateur.evaluate.peak_memory_child"
_ON_CUDA = "allocated on the accelerator, weights included, without the other models"
_IN_A_PROCESS = (
    "resident memory of a process that loads the model by itself and does the largest setting once, beside what its "
    "imports take"
)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that is measured.

    Attributes:
        name: of its row.
        model: a transformers causal language model in evaluation mode.
        prompt_ids: token ids that prompts are taken from, one after another, and again from the start when used up.
        folder: where it can be loaded from; None where it is only in memory.
        disk_bytes: of its weight files; None where there are none.
        text_bytes_per_token: UTF-8 bytes of the prompts' text per token; None where the ids are no text.
        trust_remote_code: whether loading it may run its own Python code.
    """

    name: str
    model: Any
    prompt_ids: Int64[Tensor, " ids"]
    folder: Path | None = None
    disk_bytes: int | None = None
    text_bytes_per_token: float | None = None
    trust_remote_code: bool = False

    def prompts(self, setting: Setting) -> Int64[Tensor, "batch tokens"]:
        """Return the prompts of a setting, on the model's device."""
        return lay_prompts(self.prompt_ids, setting).to(self.model.device)


@dataclass(frozen=True, slots=True)
class Run:
    """One run.

    Attributes:
        first_token_s: seconds until the first new token of every prompt is known.
        decode_s: seconds for the others.
        tokens: all new tokens.
    """

    first_token_s: float
    decode_s: float
    tokens: Int64[Tensor, "batch new"]


def lay_prompts(ids: Int64[Tensor, " ids"], setting: Setting) -> Int64[Tensor, "batch tokens"]:
    """Return as many prompts as the batch has, one after another from ``ids``, from its start again when used up."""
    needed = setting.batch_size * setting.prompt_length
    repeats = -(-needed // len(ids))
    return ids.repeat(repeats)[:needed].view(setting.batch_size, setting.prompt_length)


def random_ids(num_ids: int, count: int, seed: int = 0) -> Int64[Tensor, " ids"]:
    """Return ``count`` token ids drawn from a vocabulary of ``num_ids``."""
    return torch.randint(num_ids, (count,), generator=torch.Generator().manual_seed(seed))


def in_turn(count: int, round_number: int) -> list[int]:
    """Return the order in which ``count`` models run: as given, and the other way round every other round.

    With an even number of rounds a slowdown that is steady in time takes as much from each.
    """
    order = list(range(count))
    return order if round_number % 2 == 0 else order[::-1]


@torch.inference_mode()
def run_once(model: Any, prompts: Int64[Tensor, "batch tokens"], new_tokens: int) -> Run:
    """Return how long a model takes to read prompts and to write ``new_tokens`` after each, the likeliest every time.

    Nothing ends early: a token that ends a text is written like any other.
    """
    device, last_only = prompts.device, _last_position(model)
    _synchronize(device)
    started = time.perf_counter()
    output = model(input_ids=prompts, use_cache=True, **last_only)
    tokens = [output.logits[:, -1:].argmax(-1)]
    _synchronize(device)
    first = time.perf_counter()
    for _ in range(new_tokens - 1):
        output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True, **last_only)
        tokens.append(output.logits[:, -1:].argmax(-1))
    _synchronize(device)
    return Run(first - started, time.perf_counter() - first, torch.cat(tokens, dim=1))


def _last_position(model: Any) -> dict[str, int]:
    """Return what asks for the logits of the last position alone, which is all that a reader of the prompt needs."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def _synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def measure_speed(
    subjects: Sequence[Subject],
    settings: Sequence[Setting],
    *,
    rounds: int,
    with_peaks: bool = True,
    progress: Progress = silent,
) -> SpeedComparison:
    """Return how large and how fast models are, measured in turn on this machine after a short warm-up.

    Args:
        subjects: models on one device, with names of their own; the first is what the others are compared with.
        settings: what each of them does in every round.
        rounds: how often; at least 1.
        with_peaks: measure the peak of memory as well. On a CPU that loads every model again, in a process of its own.
        progress: told about finished runs.
    """
    runs, load = _Runs(subjects, settings), _load()
    with progress("measure speed", (rounds + 1) * len(settings) * len(subjects), "runs") as task:
        for setting in settings:
            for subject in subjects:
                run_once(subject.model, subject.prompts(setting), min(_WARM_UP_TOKENS, setting.new_tokens))
                task.advance(1)
        for number in range(rounds):
            for place in range(len(settings)):
                for which in in_turn(len(subjects), number):
                    runs.add(which, place)
                    task.advance(1)
    device = subjects[0].model.device
    meaning = runs.peak_meaning
    if with_peaks and device.type == "cpu":
        meaning = runs.measure_in_processes(progress)
    return SpeedComparison(
        {subject.name: runs.row(which) for which, subject in enumerate(subjects)},
        describe_machine(device, subjects[0].model.dtype),
        rounds,
        meaning,
        load,
    )


class _Runs:
    """Collects what single runs give."""

    def __init__(self, subjects: Sequence[Subject], settings: Sequence[Setting]) -> None:
        self._subjects, self._settings = subjects, settings
        cells = [(which, place) for which in range(len(subjects)) for place in range(len(settings))]
        self._runs: dict[tuple[int, int], list[Run]] = {cell: [] for cell in cells}
        self._peaks: dict[tuple[int, int], int] = {}

    @property
    def peak_meaning(self) -> str:
        """What the peaks that were met are."""
        return _ON_CUDA if self._peaks else ""

    def add(self, which: int, place: int) -> None:
        """Do one run of one model."""
        subject, setting = self._subjects[which], self._settings[place]
        prompts, device = subject.prompts(setting), subject.model.device
        if device.type != "cuda":
            self._runs[which, place].append(run_once(subject.model, prompts, setting.new_tokens))
            return
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._runs[which, place].append(run_once(subject.model, prompts, setting.new_tokens))
        taken = torch.cuda.max_memory_allocated(device) - before + memory_bytes(subject.model)
        self._peaks[which, place] = max(taken, self._peaks.get((which, place), 0))

    def measure_in_processes(self, progress: Progress) -> str:
        """Measure the largest setting of every model that lies in a folder, and return what was measured or why not."""
        largest = max(range(len(self._settings)), key=lambda place: self._settings[place].num_tokens)
        on_disk = [(which, subject) for which, subject in enumerate(self._subjects) if subject.folder is not None]
        failures = []
        with progress("measure memory", len(on_disk), "models") as task:
            for which, subject in on_disk:
                peak, failure = peak_in_process(subject, self._settings[largest])
                if peak is not None:
                    self._peaks[which, largest] = peak
                if failure:
                    failures.append(f"{subject.name}: {failure}")
                task.advance(1)
        told = [_IN_A_PROCESS] if self._peaks else []
        return "; ".join([*told, *(f"not measured for {failure}" for failure in failures)])

    def row(self, which: int) -> ModelSpeed:
        """Return what is known of one model."""
        subject = self._subjects[which]
        config = subject.model.config.to_dict()
        geometry = build_geometry(family_of(subject.model.config.model_type), config)
        return ModelSpeed(
            name=subject.name,
            parameters=model_parameters(subject.model, geometry),
            disk_bytes=subject.disk_bytes,
            memory_bytes=memory_by_dtype(subject.model),
            kv_cache=kv_cache(geometry, config, subject.model.dtype.itemsize),
            timings=tuple(
                Timing(
                    setting,
                    tuple(run.first_token_s for run in self._runs[which, place]),
                    tuple(run.decode_s for run in self._runs[which, place]),
                    self._peaks.get((which, place)),
                )
                for place, setting in enumerate(self._settings)
            ),
            text_bytes_per_token=subject.text_bytes_per_token,
        )


def peak_in_process(subject: Subject, setting: Setting) -> tuple[int | None, str]:
    """Return the most memory that a fresh process holds for a model, and nothing; or None, and why not.

    Args:
        subject: a model that lies in a folder.
        setting: what the process does with it.
    """
    assert subject.folder is not None, "only a model on disk can be loaded by another process"
    request = {
        "folder": str(subject.folder),
        "dtype": str(subject.model.dtype).removeprefix("torch."),
        "trust_remote_code": subject.trust_remote_code,
        "threads": torch.get_num_threads(),
        "prompt_length": setting.prompt_length,
        "batch_size": setting.batch_size,
        "new_tokens": setting.new_tokens,
    }
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-m", _CHILD],
        input=json.dumps(request),
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"the process ended with code {done.returncode}"])[-1]
        return None, last
    answer: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer["peak_bytes"], answer["problem"]


def describe_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """Return what models on a device run on here."""
    affinity = getattr(os, "sched_getaffinity", None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Machine(
        processor=_processor(),
        cores=len(affinity(0)) if affinity is not None else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        device=name,
        torch=torch.__version__,
        transformers=transformers.__version__,
        dtype=str(dtype).removeprefix("torch."),
    )


def _load() -> float | None:
    """Return the load average of the last minute; None where the system does not tell."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def _processor() -> str:
    """Return the CPU's name, as Linux tells it or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((name for name in named if name), "") or platform.processor() or platform.machine() or "unknown CPU"
