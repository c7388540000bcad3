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
        total, free = min(total, limit), min(free, max(limit - used, 0))
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
    """Return the limit of this process's control group and what is used of it; None where there is no limit."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):
            return int(Path(limit).read_text(encoding="utf-8")), int(Path(used).read_text(encoding="utf-8"))
    return None, 0
