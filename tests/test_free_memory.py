"""How much memory is said to be left, by what Linux shows of itself and of containers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from attnprune.recovery import memory
from attnprune.recovery.memory import free_memory

CPU = torch.device("cpu")
SHOWN = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:  4000 kB\n"
SECOND = {"memory.max": "3000000", "memory.current": "2500000", "memory.stat": "anon 7\ninactive_file 1000000\n"}
FIRST = {
    "memory.limit_in_bytes": "3000000", "memory.usage_in_bytes": "2500000",
    "memory.stat": "inactive_file 5\ntotal_inactive_file 1000000\n",
}  # fmt: skip


def shown(root: Path, folder: str, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        path = root / folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    shown(tmp_path, "proc", {"meminfo": SHOWN})
    return tmp_path


def test_files_that_the_system_holds_count_as_free(system: Path) -> None:
    assert free_memory(CPU) == 4000 * 1024


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/", "", SECOND),
        ("0::/a/b", "a/b", SECOND),
        ("0::/a/b", "a", SECOND),  # the limit of a group is that of those inside
        ("4:memory:/a", "memory/a", FIRST),
        ("4:memory:/a/b", "memory", FIRST),  # a container sees its own group as the top
    ],
)
def test_a_container_has_no_more_than_its_limit(system: Path, line: str, folder: str, files: dict[str, str]) -> None:
    shown(system, "proc/self", {"cgroup": f"7:cpuset:/a\n{line}\n"})
    shown(system, f"sys/fs/cgroup/{folder}", files)
    assert free_memory(CPU) == 3000000 - 2500000 + 1000000
    shown(system, "proc", {"meminfo": "MemAvailable: 5 kB\n"})
    assert free_memory(CPU) == 5 * 1024  # the machine itself has less


@pytest.mark.parametrize("limit", ["max", "", "9223372036854771712"])
def test_no_limit_is_none(system: Path, limit: str) -> None:
    shown(system, "proc/self", {"cgroup": "0::/a\n"})
    shown(system, "sys/fs/cgroup/a", {**SECOND, "memory.max": limit})
    assert free_memory(CPU) == 4000 * 1024


def test_a_container_that_is_full_leaves_nothing(system: Path) -> None:
    shown(system, "proc/self", {"cgroup": "0::/\n"})
    shown(system, "sys/fs/cgroup", {**SECOND, "memory.current": "4100000"})
    assert free_memory(CPU) == 0


def test_where_the_system_shows_nothing_half_of_what_is_there_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SYSTEM", tmp_path)
    assert free_memory(CPU) == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    monkeypatch.delattr(os, "sysconf")
    assert free_memory(CPU) == 0
    assert free_memory(torch.device("meta")) == 0


def test_this_machine_says_something() -> None:
    assert 0 <= free_memory(CPU) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
