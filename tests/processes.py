"""Other processes than that of a test: forked from one that has imported what takes seconds, and nothing else."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.multiprocessing import start_processes

forked = pytest.mark.xdist_group("forked")  # so that one process to fork from serves all
_HEAVY = ["transformers.trainer", "lightning", "accelerate", "torch_pruning", "pytest", "attnprune.api"]


def in_processes(number: int, work: Callable[..., None], *args: Any) -> None:
    """Runs ``work(rank, *args)`` in processes with ranks 0, 1 ...; an error in one is an error here."""
    multiprocessing.set_forkserver_preload(_HEAVY)
    start_processes(_on_one_thread, (work, *args), nprocs=number, start_method="forkserver")


def _on_one_thread(rank: int, work: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)  # as here, for the same sums to the last bit
    work(rank, *args)
