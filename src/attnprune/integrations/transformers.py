"""Pruning inside ``transformers.Trainer``: :class:`PruningCallback`. Needs ``transformers`` and ``accelerate``."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..errors import CheckpointError, OptionError, WrappedModelError
from ..families.registry import plain
from ..training.ddp import rewrap
from ..training.pruner import AttentionPruner
from .checks import check_when

FILE = "attnprune.pt"


class PruningCallback(TrainerCallback):  # type: ignore[misc]
    """Lets an :class:`~attnprune.AttentionPruner` watch a Trainer's gradients and take its steps.

    Gradients are read once an optimizer step, after those of all accumulated batches are there. The Trainer has clipped
    them by then (``max_grad_norm``), which multiplies all gradients of a step by one number; ``max_grad_norm=0`` gives
    them as they are. Optimizer state is cut along; the pruner's own state is written into every checkpoint, and
    :func:`resume` goes on from one. With ``load_best_model_at_end`` the best checkpoint is looked for anew after every
    step of the pruner: in the end it is the best one of the final shape.

    Args:
        pruner: made for the model that the Trainer trains.
        every: a step of the pruner after so many epochs or optimizer steps, until it is done.
        unit: ``"epochs"`` or ``"steps"``.

    Raises:
        OptionError: not a pruner, ``every`` below 1, an unknown unit; when training begins: another model.
        WrappedModelError: when training begins in several processes without :meth:`attach`, or with a wrapper that
            shards parameters.
    """

    def __init__(self, pruner: AttentionPruner, *, every: int = 1, unit: str = "epochs") -> None:
        check_when(pruner, every, unit)
        self.pruner, self.every, self.unit = pruner, every, unit
        self._weights: dict[str, Any] | None = None  # to load once the Trainer has loaded its own
        self._trainer: Any = None

    def attach(self, trainer: Any) -> PruningCallback:
        """Tells the callback its Trainer, as training in several processes needs: DistributedDataParallel, which no
        event of a Trainer shows, is made anew after every step of the pruner. :func:`resume` calls it.

        Args:
            trainer: the Trainer that the callback was given to.

        Returns:
            The callback.
        """
        self._trainer = trainer
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if plain(model) is not self.pruner.model:
            raise OptionError(
                "pruner", "a pruner of the Trainer's model", "one of another", "make it for trainer.model"
            )
        if args.world_size > 1 and not isinstance(self._wrapper, DistributedDataParallel):
            wrapper = "not known to the callback" if self._trainer is None else f"a {type(self._wrapper).__name__}"
            remedy = (
                "call callback.attach(trainer) before trainer.train(); shards are planned on, see the documentation"
            )
            raise WrappedModelError("Trainer", "a DistributedDataParallel of several processes", wrapper, remedy)
        if self._weights is not None:
            self.pruner.model.load_state_dict(self._weights)
            self._weights = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.pruner.done or not self.pruner.observes:
            return
        scaler = getattr(optimizer, "scaler", None)
        if scaler is not None and args.max_grad_norm:  # clipping has unscaled them already
            scaler = SimpleNamespace(get_scale=lambda: 1.0)
        self.pruner.observe(scaler=scaler)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.unit == "steps" and state.global_step % self.every == 0:
            self._step(state, optimizer)

    def on_epoch_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if self.unit == "epochs" and round(state.epoch) % self.every == 0:
            self._step(state, optimizer)

    def _step(self, state: Any, optimizer: Any) -> None:
        if not self.pruner.done:
            self.pruner.step(optimizer)
            if isinstance(self._wrapper, DistributedDataParallel):
                rewrap(self._wrapper)
            state.best_metric = state.best_model_checkpoint = state.best_global_step = None  # of another shape

    @property
    def _wrapper(self) -> Any:
        """What the Trainer runs in place of the model, if the callback knows it."""
        return None if self._trainer is None else plain(self._trainer.model_wrapped)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            weights = torch.load(Path(state.best_model_checkpoint) / FILE, weights_only=True)["model"]
            if weights is not None:  # the Trainer knew none of the names
                self.pruner.model.load_state_dict(weights)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not args.should_save:  # another process does
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        draft = folder / f".{FILE}.draft"
        model = self.pruner.model.state_dict() if _renamed(folder, self.pruner.model) else None
        torch.save({"pruner": self.pruner.state_dict(), "model": model}, draft)
        os.replace(draft, folder / FILE)


def _renamed(folder: Path, model: nn.Module) -> bool:
    """Whether a checkpoint's weights have other names than the model's (transformers 5 writes those of version 4 for
    some models): a Trainer that resumes would then load none of them."""
    file = folder / "model.safetensors"
    if not file.is_file():
        return True
    with safe_open(file, framework="pt") as weights:
        return not set(weights.keys()) <= model.state_dict().keys()


def resume(trainer: Any, checkpoint: str | os.PathLike[str] | bool = True, **options: Any) -> Any:
    """``trainer.train(resume_from_checkpoint=...)`` for a Trainer with a :class:`PruningCallback`.

    The Trainer, its dense model, the pruner and the callback are made as in the beginning; the model gets the shapes
    that it had before the Trainer loads its weights. The run ends bitwise where the uninterrupted one does.

    Args:
        trainer: with a PruningCallback among its callbacks.
        checkpoint: a checkpoint directory of the Trainer, or True for the last one in ``output_dir``.
        options: everything else that ``train`` takes.

    Raises:
        OptionError: the Trainer has no PruningCallback.
        CheckpointError: there is no checkpoint, or it was not finished.
    """
    found = [one for one in trainer.callback_handler.callbacks if isinstance(one, PruningCallback)]
    if len(found) != 1:
        raise OptionError("trainer", "one PruningCallback", str(len(found)), "pass callbacks=[PruningCallback(pruner)]")
    folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
    file = None if not folder else Path(folder) / FILE
    if file is None or not file.is_file():
        remedy = "resume from an earlier one: this one was not finished, or was written without the callback"
        raise CheckpointError(str(folder), f"a checkpoint with {FILE}", "none", remedy)
    state = torch.load(file, weights_only=True)
    found[0].attach(trainer).pruner.load_state_dict(state["pruner"])
    found[0]._weights = state["model"]
    return trainer.train(resume_from_checkpoint=str(folder), **options)
