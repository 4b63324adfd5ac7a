"""Pruning in a loop of ``accelerate``: :class:`AcceleratedPruner`. Needs ``accelerate``."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import CheckpointError, OptionError, ShardedError
from ..families.registry import plain
from ..report.report import Report
from ..training.ddp import rewrap
from ..training.pruner import AttentionPruner

FILE = "attnprune.pt"
_SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


class AcceleratedPruner:
    """An :class:`~attnprune.AttentionPruner` beside what ``accelerator.prepare`` returned.

    ``save_state`` and ``load_state`` of the Accelerator carry the pruner's state from now on: a model made as in the
    beginning, its optimizers and averages get the shapes that they had before their values are loaded.
    ``DistributedDataParallel`` is made anew in place after a step, so all variables stay valid.

    Args:
        accelerator: the Accelerator.
        pruner: made for the model, before or after ``prepare``.
        model: what ``prepare`` returned for the pruner's model.
        optimizer: what it returned for the optimizer, or several in a list.
        averages: moving averages of the model to prune by the same plans.

    Raises:
        OptionError: not an Accelerator or pruner, or a model of another pruner.
        ShardedError: the Accelerator shards parameters (FSDP, DeepSpeed, Megatron); see :doc:`/how_to/training`.

    >>> import torch, attnprune
    >>> from accelerate import Accelerator
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    >>> pruner = AcceleratedPruner(accelerator, attnprune.AttentionPruner(model, 0.5, steps=1), model, optimizer)
    >>> accelerator.backward(model(torch.randn(4, 5, 32)).square().mean())
    >>> pruner.observe()
    >>> optimizer.step()
    >>> pruner.step().achieved["q"]
    0.5
    """

    def __init__(
        self, accelerator: Any, pruner: AttentionPruner, model: nn.Module, optimizer: Any,
        averages: Iterable[nn.Module] = (),
    ) -> None:  # fmt: skip
        for name, value, kind in (("accelerator", accelerator, Accelerator), ("pruner", pruner, AttentionPruner)):
            if not isinstance(value, kind):
                raise OptionError(name, f"an instance of {kind.__name__}", f"a {type(value).__name__}", "pass one")
        if accelerator.distributed_type.value in _SHARDING:
            remedy = "plan on shards (AttentionPruner.next_plan), and apply the plan before prepare"
            raise ShardedError("accelerator", "whole parameters", accelerator.distributed_type.value, remedy)
        wrapper = plain(model)
        inner = plain(wrapper.module) if isinstance(wrapper, DistributedDataParallel) else wrapper
        if inner is not pruner.model:
            remedy = "pass what accelerator.prepare returned for the pruner's model"
            raise OptionError("model", "the pruner's model, prepared", f"another {type(inner).__name__}", remedy)
        self.accelerator, self.pruner, self.model = accelerator, pruner, model
        self.optimizers: Sequence[Any] = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
        self.averages = list(averages)
        self._wrapped = isinstance(wrapper, DistributedDataParallel)
        accelerator.register_save_state_pre_hook(self._save)
        accelerator.register_load_state_pre_hook(self._load)

    @property
    def done(self) -> bool:
        """Whether all steps have been taken."""
        return self.pruner.done

    @property
    def report(self) -> Report:
        """What was achieved so far, against the model as it was in the beginning."""
        return self.pruner.report

    def observe(self) -> None:
        """Adds the gradients to the scores, once those of all accumulated batches are there; call it after every
        ``accelerator.backward`` and before ``accelerator.clip_grad_norm_``. Once the pruner is done it does nothing.

        Raises:
            DataError, OptionError: as :meth:`attnprune.AttentionPruner.observe`.
        """
        if self.accelerator.sync_gradients and not self.done:
            self.pruner.observe(scaler=self.accelerator.scaler)

    def step(self, *, example_inputs: Any = None) -> Report:
        """Removes what is due, in all processes; takes and returns what :meth:`attnprune.AttentionPruner.step` does."""
        report = self.pruner.step(list(self.optimizers), averages=self.averages, example_inputs=example_inputs)
        self._rewrap()
        return report

    def _rewrap(self) -> None:
        if self._wrapped:
            rewrap(self.model)

    def _save(self, models: Any, weights: Any, folder: str) -> None:
        every_node = self.accelerator.project_configuration.save_on_each_node
        if self.accelerator.is_local_main_process if every_node else self.accelerator.is_main_process:
            draft = Path(folder) / f".{FILE}.draft"
            torch.save(self.pruner.state_dict(), draft)
            os.replace(draft, Path(folder) / FILE)

    def _load(self, models: Any, folder: str) -> None:
        file = Path(folder) / FILE
        if not file.is_file():
            remedy = "load one that was written with the AcceleratedPruner in place"
            raise CheckpointError(str(folder), f"a checkpoint with {FILE}", "none", remedy)
        state = torch.load(file, weights_only=True)
        self.pruner.load_state_dict(state, optimizer=list(self.optimizers), averages=self.averages)
        self._rewrap()
