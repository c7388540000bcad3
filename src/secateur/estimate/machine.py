"""What this machine has: memory (a container's limit counts), GPU, free disk. Linux tells all; elsewhere the total."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

import torch

from secateur.records.estimate import Machine


def look(output: Path, device: torch.device) -> Machine:
    """Return what there is to run on.

    Args:
        output: the run folder, which need not exist.
        device: that is computed on.
    """
    total, free = _memory()
    limit, used = _container()
    if limit is not None:
        total, free = min(total, limit), min(free, limit, max(limit - used, 0) + resident_bytes())
    name, gpu_total, gpu_free = "", 0, 0
    if device.type == "cuda":
        gpu_free, gpu_total = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
    return Machine(
        total, free, shutil.disk_usage(existing(output)).free, name, gpu_total, gpu_free, torch.get_num_threads()
    )


def existing(path: Path) -> Path:
    """Return a path's nearest folder that exists."""
    path = path.expanduser().absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def _memory() -> tuple[int, int]:
    """Return main memory, and what of it could be had now; what this process holds counts, the run takes its place."""
    with suppress(OSError, KeyError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        found = {line.partition(":")[0]: 1024 * int(line.split()[1]) for line in lines}
        return found["MemTotal"], min(found["MemTotal"], found["MemAvailable"] + resident_bytes())
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return total, total


def resident_bytes() -> int:
    """Return the memory that this process holds, or 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def _container() -> tuple[int | None, int]:
    """Return the limit of this process's control group and what it uses; None where there is no limit.

    Files that the system keeps in memory as long as nobody wants the room are not used.
    """
    for folder, limit, used, cached in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", ("active_file", "inactive_file")),
        (
            "/sys/fs/cgroup/memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            ("total_active_file", "total_inactive_file"),
        ),
    ):
        with suppress(OSError, ValueError):
            most, now = (int(Path(folder, name).read_text(encoding="utf-8")) for name in (limit, used))
            fields = dict(line.split() for line in Path(folder, "memory.stat").read_text("utf-8").splitlines())
            return most, max(now - sum(int(fields.get(name, 0)) for name in cached), 0)
    return None, 0
