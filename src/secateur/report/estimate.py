"""An estimate as tables and sentences: what each stage takes, whether it fits, and what to change where it does not."""

from __future__ import annotations

import json
from collections.abc import Iterator

from secateur.records.estimate import Advice, Estimate, StageEstimate
from secateur.report.tables import Table, format_bytes, format_count

_MOST_ADVICE = 6
_ROOM = 0.9
"""Share of what is free up to which a need is surely met."""


def format_seconds(seconds: float | None) -> str:
    """Return a time such as ``42 s``, ``3.5 min``, ``2.1 h`` or ``5.0 days``; a question mark where there is none."""
    if seconds is None:
        return "?"
    for unit, size in (("days", 172_800), ("h", 7200), ("min", 120)):
        if seconds >= size:
            return f"{seconds / {'days': 86_400, 'h': 3600, 'min': 60}[unit]:,.1f} {unit}"
    return f"{seconds:,.1f} s" if seconds < 10 else f"{seconds:,.0f} s"


def stages_table(estimate: Estimate) -> Table:
    """Return one row per stage, and one for all of them."""
    on_gpu = estimate.device != "cpu"
    columns = ["stage", "seconds", "peak memory, GB", *(["main memory, GB"] if on_gpu else []), "disk, GB", "what"]
    rows = [_row(stage, on_gpu=on_gpu) for stage in estimate.stages]
    total = ["in all", _seconds(estimate.seconds), _gigabytes(estimate.peak_bytes)]
    total += [_gigabytes(estimate.host_bytes)] if on_gpu else []
    rows.append([*total, _gigabytes(estimate.disk_bytes), f"the most at once; peak in {estimate.peak_stage.name}"])
    return Table("what the run is predicted to take", columns, rows)


def _row(stage: StageEstimate, *, on_gpu: bool) -> list[str]:
    most = "at most " if stage.at_most else ""
    row = [stage.name, most + _seconds(stage.seconds), _gigabytes(stage.peak_bytes)]
    row += [_gigabytes(stage.host_bytes)] if on_gpu else []
    return [*row, _gigabytes(stage.disk_bytes + stage.temporary_bytes), stage.what]


def _seconds(seconds: float | None) -> str:
    return "?" if seconds is None else f"{seconds:,.1f}" if seconds < 10 else f"{seconds:,.0f}"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f}"


def memory_table(estimate: Estimate) -> Table:
    """Return what the memory of the stage with the highest peak is for, the largest first."""
    stage = estimate.peak_stage
    terms = sorted(stage.memory.items(), key=lambda item: -item[1])
    rows = [[name, format_bytes(size), f"{size / max(stage.peak_bytes, 1):.0%}"] for name, size in terms if size]
    return Table(f"memory at the peak, in {stage.name}", ["what", "size", "share"], rows)


def advice_table(estimate: Estimate) -> Table:
    """Return the changes that save most, those of the memory first."""
    chosen = [*_of(estimate, "memory"), *_of(estimate, "disk")]
    rows = [
        [
            f"{advice.key}={_plain(advice.value)}",
            advice.of,
            format_bytes(advice.saves_bytes),
            format_bytes(advice.left_bytes),
            ("+" if advice.seconds >= 0 else "-") + format_seconds(abs(advice.seconds)),
            advice.costs,
        ]
        for advice in chosen
    ]
    return Table(
        "what would make it smaller, each alone", ["--set", "of", "saves", "leaves", "time", "what it costs"], rows
    )


def _of(estimate: Estimate, of: str) -> list[Advice]:
    return [advice for advice in estimate.advice if advice.of == of][:_MOST_ADVICE]


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def sentences(estimate: Estimate) -> Iterator[str]:
    """Yield what to know: sizes, the verdict about this machine, what to change, and how sure times are."""
    yield (
        f"{estimate.model}: {format_count(estimate.parameters)} parameters, {format_count(estimate.parameters_pruned)} "
        f"left at most; computed in {estimate.dtype} on {estimate.device}; about {format_seconds(estimate.seconds)}"
    )
    yield from _verdict(estimate)
    if estimate.together:
        settings = " ".join(f"--set {key}={_plain(value)}" for key, value in estimate.together.items())
        yield f"it would fit with: {settings}"
    elif estimate.fits_memory is False or estimate.fits_disk is False:
        yield "no setting of this recipe makes it fit here; use a smaller model or a larger machine"
    for note in estimate.notes:
        yield f"note: {note}"


def _verdict(estimate: Estimate) -> Iterator[str]:
    machine = estimate.machine
    if machine is None:
        return
    if machine.gpu:
        yield _fits(f"memory of {machine.gpu}", estimate.peak_bytes, machine.gpu_free_bytes, machine.gpu_bytes)
        yield _fits("main memory", estimate.host_bytes, machine.memory_free_bytes, machine.memory_bytes)
    else:
        yield _fits("memory", estimate.peak_bytes, machine.memory_free_bytes, machine.memory_bytes)
    yield _fits("disk", estimate.disk_bytes, machine.disk_free_bytes, None)


def _fits(what: str, needed: int, free: int, total: int | None) -> str:
    of = "" if total is None else f" of {format_bytes(total)}"
    verdict = "DOES NOT FIT" if needed > free else "fits" if needed <= _ROOM * free else "fits, but hardly"
    return f"{what}: {verdict}: {format_bytes(needed)} needed, {format_bytes(free)}{of} free"
