"""Two processes beside that of a test: forked from one that has imported what takes seconds."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
from torch.multiprocessing import start_processes

together = pytest.mark.xdist_group("two processes")  # so that one process to fork from serves all
_HEAVY = ["transformers.trainer", "lightning", "accelerate", "torch_pruning", "pytest", "attnprune.api"]


def in_two_processes(work: Callable[..., None], *args: Any) -> None:
    """Runs ``work(rank, *args)`` with ranks 0 and 1; an error in one is an error here."""
    multiprocessing.set_forkserver_preload(_HEAVY)
    start_processes(work, args, nprocs=2, start_method="forkserver")
