"""How much memory is left: :func:`free_memory`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

SYSTEM = Path("/")
"""Where Linux shows its state, below ``proc`` and ``sys``."""
CONTROLLERS = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Of control groups of the second and the first version: files with the limit and with what is used, and which part of
that are files read that can be dropped."""


def free_memory(device: torch.device) -> float:
    """Bytes that are left on a device; of a CPU's no more than the container has; 0 where the system does not tell.

    What the system holds of files, and drops when memory is asked for, counts as free.

    >>> free_memory(torch.device("cpu")) >= 0
    True
    """
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(max(0, min([_of_system(), *_of_containers()]))) if device.type == "cpu" else 0.0


def _of_system() -> int:
    with suppress(OSError, ValueError):
        for line in (SYSTEM / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    with suppress(OSError, ValueError, AttributeError):  # Windows has no sysconf
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2  # macOS tells no more than what is there
    return 0


def _of_containers() -> Iterator[int]:
    """What every control group that this process is in may still take."""
    with suppress(OSError, ValueError):
        for line in (SYSTEM / "proc/self/cgroup").read_text().splitlines():
            _, kind, path = line.split(":", 2)
            if kind in CONTROLLERS:
                top = SYSTEM / "sys/fs/cgroup" / kind
                inside = Path(path.lstrip("/"))
                for part in (inside, *inside.parents):
                    yield from _left(top / part, *CONTROLLERS[kind])


def _left(group: Path, limit: str, used: str, files: str) -> Iterator[int]:
    with suppress(OSError, ValueError):  # it is not shown here, or has no limit
        most, now = (int((group / name).read_text()) for name in (limit, used))
        stated = dict(line.split(maxsplit=1) for line in (group / "memory.stat").read_text().splitlines())
        yield most - now + int(stated.get(files, 0))
