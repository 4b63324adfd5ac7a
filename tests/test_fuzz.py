"""Two hundred of the cases that ``make fuzz`` runs by the thousand, in a process of their own."""

from __future__ import annotations

from .fuzz_files import kill, run
from .processes import forked, in_processes


def _fuzz(rank: int) -> None:
    there, wrong = kill(10, seed=1)
    assert sum(there.values()) == 10
    ends, more, _, _ = run(200, seed=1)
    assert sum(ends.values()) == 200
    assert not wrong + more


@forked
def test_broken_directories_and_killed_saves() -> None:
    in_processes(1, _fuzz)
