"""What a run is predicted to take before anything runs: time, memory and disk per stage, and what would make it fit.

Imports without torch. Seconds, bytes and operations per second throughout; ``FLOP`` is one addition or multiplication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ESTIMATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Rates:
    """How fast this machine does each kind of work, on one process with the threads that it has.

    Attributes:
        forward: FLOP per second of decoder layers without gradients.
        calibrate: the same with the calibration's sums taken on the way.
        head: FLOP per second of the output head, the sum over the vocabulary included.
        gram: FLOP per second of the sums of x xT.
        gradients: FLOP per second of a gradient pass: a forward pass and twice as much backwards, with frozen weights.
        training: FLOP per second of decoder layers in training, counted the same way, in the training's precision.
        training_head: the same of the output head, the loss included.
        optimizer: parameters that an optimizer step updates per second.
        solve: FLOP per second of least squares, in float64.
        decode: bytes of weights per second that are gone through for one written token.
        read: bytes per second from the disk.
        write: bytes per second to it.
        load: bytes per second of weights on their way into a model: read, converted, checked.
        tokenize: bytes of text per second that are read, split and tokenized.
        start_s: seconds until the program's libraries are imported.
        baseline_bytes: memory that the process holds by then.
        source: ``probe``, ``stored`` (an earlier probe on this machine) or ``assumed``.
        share: the part of the processor's time that the probe got of what it could have used; below 1 other programs
            ran beside it, and a quiet machine is faster by that. 1 where it is not known.
    """

    forward: float
    calibrate: float
    head: float
    gram: float
    gradients: float
    training: float
    training_head: float
    optimizer: float
    solve: float
    decode: float
    read: float
    write: float
    load: float
    tokenize: float
    start_s: float
    baseline_bytes: int
    source: str = "assumed"
    share: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rates:
        """Return the rates that ``to_dict`` wrote."""
        return cls(**data)


@dataclass(frozen=True, slots=True)
class Machine:
    """What there is to run on.

    Attributes:
        memory_bytes: main memory, or what a container may use of it where that is less.
        memory_free_bytes: of it, what is free now.
        disk_free_bytes: where the output goes.
        gpu: name of the GPU that is computed on; empty where none is.
        gpu_bytes: its memory, and ``gpu_free_bytes`` what is free of it now.
        threads: of the processor, that are computed with.
    """

    memory_bytes: int
    memory_free_bytes: int
    disk_free_bytes: int
    gpu: str = ""
    gpu_bytes: int = 0
    gpu_free_bytes: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """One stage.

    Attributes:
        name: as in the run folder's manifest, where it is listed there.
        what: what is done, in numbers.
        seconds: wall time; None where it cannot be predicted.
        memory: bytes by what they are for, at the stage's peak, where the model is computed on.
        host: the same for what lies in main memory beside a GPU; empty without a GPU.
        disk_bytes: that stay on the disk.
        temporary_bytes: that are on the disk only while the stage runs.
        at_most: whether it may be less, because there may be less text, or a training may end early.
    """

    name: str
    what: str
    seconds: float | None
    memory: Mapping[str, int] = field(default_factory=dict)
    host: Mapping[str, int] = field(default_factory=dict)
    disk_bytes: int = 0
    temporary_bytes: int = 0
    at_most: bool = False

    @property
    def peak_bytes(self) -> int:
        """Memory at the stage's peak, where the model is computed on."""
        return sum(self.memory.values())

    @property
    def host_bytes(self) -> int:
        """Main memory beside a GPU at the stage's peak; 0 without a GPU."""
        return sum(self.host.values())


@dataclass(frozen=True, slots=True)
class Advice:
    """A change of one recipe key that makes a run smaller.

    Attributes:
        key: dotted, as ``--set`` takes it.
        value: to set it to.
        of: ``memory`` or ``disk``.
        saves_bytes: of the peak, or of the disk.
        left_bytes: the peak, or the disk, after the change alone.
        seconds: by which the run gets longer; below 0 where it gets shorter.
        costs: what is given up, in words.
    """

    key: str
    value: Any
    of: str
    saves_bytes: int
    left_bytes: int
    seconds: float
    costs: str


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a whole run is predicted to take.

    Attributes:
        model: as in the recipe.
        parameters: of the dense model, and ``parameters_pruned`` of the smaller one, at most.
        dtype: that is computed in.
        device: that is computed on.
        stages: in order.
        rates: that times rest on.
        machine: that it is held against; None where it is not.
        advice: what to change where it does not fit, or would be smaller; those that save most come first.
        together: keys with values that together make it fit; empty where it fits as it is, or where none do.
        notes: what else to know.
    """

    model: str
    parameters: int
    parameters_pruned: int
    dtype: str
    device: str
    stages: Sequence[StageEstimate]
    rates: Rates
    machine: Machine | None = None
    advice: Sequence[Advice] = ()
    together: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def seconds(self) -> float:
        """Wall time of all stages that can be predicted."""
        return sum(stage.seconds or 0.0 for stage in self.stages)

    @property
    def peak_bytes(self) -> int:
        """The most memory that any stage holds, where the model is computed on."""
        return max(stage.peak_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> int:
        """The most main memory beside a GPU."""
        return max(stage.host_bytes for stage in self.stages)

    @property
    def peak_stage(self) -> StageEstimate:
        """The stage that holds the most memory."""
        return max(self.stages, key=lambda stage: stage.peak_bytes)

    @property
    def disk_bytes(self) -> int:
        """The most that is on the disk at once: what stays of all stages up to one, and what that one needs besides."""
        stays = most = 0
        for stage in self.stages:
            stays += stage.disk_bytes
            most = max(most, stays + stage.temporary_bytes)
        return most

    @property
    def fits_memory(self) -> bool | None:
        """Whether it fits this machine's memory, the GPU's too; None where no machine is known."""
        if self.machine is None:
            return None
        if self.machine.gpu:
            on_gpu = self.peak_bytes <= self.machine.gpu_free_bytes
            return on_gpu and self.host_bytes <= self.machine.memory_free_bytes
        return self.peak_bytes <= self.machine.memory_free_bytes

    @property
    def fits_disk(self) -> bool | None:
        """Whether it fits the free disk; None where no machine is known."""
        return None if self.machine is None else self.disk_bytes <= self.machine.disk_free_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, totals and verdicts included."""
        totals = {
            name: getattr(self, name)
            for name in ("seconds", "peak_bytes", "host_bytes", "disk_bytes", "fits_memory", "fits_disk")
        }
        return {"schema_version": ESTIMATE_VERSION, **asdict(self), "total": totals}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Estimate:
        """Return the estimate that ``to_dict`` wrote; totals are made anew.

        Raises:
            ValueError: it is of another version.
        """
        if data.get("schema_version") != ESTIMATE_VERSION:
            raise ValueError(f"estimate of version {data.get('schema_version')}, and {ESTIMATE_VERSION} is read")
        own = {key: value for key, value in data.items() if key not in ("schema_version", "total")}
        return cls(
            **{
                **own,
                "stages": tuple(StageEstimate(**stage) for stage in own["stages"]),
                "rates": Rates.from_dict(own["rates"]),
                "machine": None if own["machine"] is None else Machine(**own["machine"]),
                "advice": tuple(Advice(**advice) for advice in own["advice"]),
                "notes": tuple(own["notes"]),
            }
        )
