"""Pruning inside Lightning's Trainer: :class:`PruningCallback`. Needs ``lightning`` or ``pytorch_lightning``, 2.x."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from ..api import apply_plan
from ..errors import CheckpointError, OptionError, WrappedModelError
from ..families.registry import all_views, find_views, plain
from ..training.ddp import rewrap
from ..training.pruner import AttentionPruner
from ..values.plan import Plan
from .checks import check_when

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    from pytorch_lightning.callbacks import Callback

HOOK = "on_load_checkpoint"
AVERAGING = ("WeightAveraging", "StochasticWeightAveraging")


class PruningCallback(Callback):  # type: ignore[misc]
    """Lets an :class:`~attnprune.AttentionPruner` watch the gradients of a Lightning Trainer and take its steps.

    Gradients are read once an optimizer step: of all accumulated batches, unscaled, before they are clipped. A step of
    the pruner comes at the end of a batch, before validation and checkpoints, which thus see the pruned model; all of
    the Trainer's optimizers are cut along, and moving averages: those of Lightning's averaging callbacks, and every
    ``torch.optim.swa_utils.AveragedModel`` that a callback or the LightningModule holds. In several processes
    (``strategy="ddp"``) scores are of the averaged gradients, and the wrapper is made anew in place after a step.

    The pruner's state is a part of every checkpoint. To resume, make module, pruner, callback and Trainer as in the
    beginning and call ``trainer.fit(module, ckpt_path=...)``: the module gets the shapes of the checkpoint before its
    weights are loaded, and the run ends bitwise where the uninterrupted one does (where Lightning's does: it resumes
    between epochs, or within one if the data loader can). :func:`restore_shapes` serves ``load_from_checkpoint``.

    Args:
        pruner: made for the LightningModule, or for a module inside it.
        every: a step of the pruner after so many whole epochs or optimizer steps, until it is done. With several
            optimizers, steps are those of the first one that has attention weights.
        unit: ``"epochs"`` or ``"steps"``.

    Raises:
        OptionError: not a pruner, ``every`` below 1, an unknown unit; when the Trainer begins: a pruner of another
            model.
        WrappedModelError: when training begins, before anything changes: a strategy that shards the module, or starts
            processes inside ``fit`` (``"ddp"`` does not, ``"ddp_spawn"`` does); a communication hook; an averaging
            callback whose average cannot be reached.
        CheckpointError: a checkpoint has other shapes than the module, and no state of the callback that explains them
            (``save_weights_only=True``, say); or it is from another step of a module that was pruned since: make module
            and pruner anew.
    """

    def __init__(self, pruner: AttentionPruner, *, every: int = 1, unit: str = "epochs") -> None:
        check_when(pruner, every, unit)
        self.pruner, self.every, self.unit = pruner, every, unit
        self._path = ""  # of the pruned module in the LightningModule
        self._away = False  # whether the Trainer only evaluates another module
        self._steps = self._settled = 0  # optimizer steps, and how many of them have led to pruning, or not
        self._loss = False  # whether the batch had one
        self._hook: Any = None

    # the beginning

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        path = _path_of(self.pruner.model, pl_module)
        self._away = path is None
        self._path = path or ""
        if stage == "fit" and self._away:
            remedy = "make it for the LightningModule, or for a module inside it"
            raise OptionError("pruner", "a pruner of the module that the Trainer fits", "one of another", remedy)
        if stage == "fit":
            _check_strategy(trainer.strategy)
        self._unhook(pl_module)
        theirs = getattr(pl_module, HOOK)

        def before_weights(checkpoint: Mapping[str, Any]) -> None:  # no hook of a callback comes as early
            self._unhook(pl_module)
            self._take_shapes(trainer, pl_module, checkpoint)
            theirs(checkpoint)

        self._hook = before_weights
        setattr(pl_module, HOOK, before_weights)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        self._unhook(pl_module)
        if getattr(trainer.strategy.model, "_comm_hooks", None):
            remedy = "train without: the wrapper is made anew after pruning, and loses it"
            raise WrappedModelError("Trainer.strategy", "no communication hook", "one", remedy)
        for callback in trainer.callbacks:
            if _averages(callback) and not _held(callback, pl_module):
                raise WrappedModelError(
                    type(callback).__name__, "a moving average to prune along", "none that can be reached",
                    "average by torch.optim.swa_utils.AveragedModel, or begin to average when the pruner is done",
                )  # fmt: skip
        self._copies(trainer, pl_module)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._unhook(pl_module)

    def _unhook(self, pl_module: Any) -> None:
        if self._hook is not None and pl_module.__dict__.get(HOOK) is self._hook:
            delattr(pl_module, HOOK)
        self._hook = None

    # training

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._loss = False

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        self._loss = True

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        skipped = pl_module.automatic_optimization and not self._loss  # training_step gave None
        if skipped or not self._has_attention(trainer.optimizers, optimizer):
            return
        self._steps += 1
        if self.pruner.done or not self.pruner.observes:
            return
        scaler = trainer.scaler
        if scaler is not None and not getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler = SimpleNamespace(get_scale=lambda: 1.0)  # unscaled already; an overflow is still left out
        self.pruner.observe(scaler=scaler)

    def _has_attention(self, optimizers: list[Any], optimizer: Any) -> bool:
        """Whether this optimizer is the first of several that has a weight of the attention."""
        if len(optimizers) == 1:
            return True
        views = find_views(self.pruner.model, self.pruner.request.include, self.pruner.request.exclude)
        ours = {id(slot.parameter) for view in views for key, slot in view.slots.items() if key.endswith(".weight")}
        first = (one for one in optimizers if any(id(p) in ours for group in one.param_groups for p in group["params"]))
        return next(first, None) is optimizer

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.unit == "steps":
            due = self._steps // self.every > self._settled // self.every
        elif trainer.is_last_batch and (trainer.current_epoch + 1) % self.every == 0:
            due = self._steps > self._settled
        else:
            return
        self._settled = self._steps
        if due and not self.pruner.done:
            self.pruner.step(trainer.optimizers, averages=self._copies(trainer, pl_module))
            if isinstance(trainer.strategy.model, DistributedDataParallel):
                rewrap(trainer.strategy.model)

    def _copies(self, trainer: Any, pl_module: Any) -> list[nn.Module]:
        """The pruner's model as it is in every moving average of it, or of a module around it."""
        held = [one.module for one in pl_module.modules() if isinstance(one, AveragedModel)]
        for callback in trainer.callbacks:
            held += _held(callback, pl_module)
        model, found = self.pruner.model, []
        inside = {part for average in held for part in average.modules()}
        for average in dict.fromkeys(held):
            like = [one for one in pl_module.modules() if one not in inside and _alike(one, average)]
            paths = {_path_of(model, one) for one in like}
            if not paths or (paths == {None} and not set(like) & set(model.modules())):
                continue  # of something else
            if len(paths) > 1 or None in paths:
                kind = type(average).__name__
                raise WrappedModelError(
                    f"the moving average of a {kind}", "one of the pruner's model or of a module around it",
                    "one of a part of it" if len(like) == 1 else f"one of any of {len(like)}",
                    "make the pruner for the module that is averaged",
                )  # fmt: skip
            found.append(plain(average.get_submodule(paths.pop() or "")))
        return found

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The pruner's state, and where its model lies in the LightningModule: plain values and tensors."""
        return {
            "path": self._path,
            "optimizer_steps": self._steps,
            "settled": self._settled,
            "pruner": self.pruner.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken; gives the pruner's model the shapes that it had then."""
        if self._away:
            return
        self.pruner.load_state_dict(state_dict["pruner"])
        self._steps, self._settled = state_dict["optimizer_steps"], state_dict["settled"]

    def _take_shapes(self, trainer: Any, pl_module: Any, checkpoint: Mapping[str, Any]) -> None:
        """Gives the module and its averages the shapes of a checkpoint that is about to be loaded."""
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        if state is not None and self._away:
            restore_shapes(pl_module, checkpoint)
        elif state is not None:
            now, then = self.pruner.steps_done, state["pruner"]["steps_done"]
            if now not in (0, then):
                remedy = "make module and pruner anew (to evaluate: trainer.test(Net(), ckpt_path=...))"
                raise CheckpointError("ckpt_path", f"one of a module that was pruned {now} times", str(then), remedy)
            copies = self._copies(trainer, pl_module)  # known by their shapes
            self.load_state_dict(state)
            for average in copies:
                _shape(average, self.pruner.plan)
        if state is not None:
            return
        own, theirs = pl_module.state_dict(), checkpoint["state_dict"]
        other = [key for key, value in own.items() if key in theirs and theirs[key].shape != value.shape]
        if other:
            raise CheckpointError(
                other[0], f"a checkpoint with the state of a PruningCallback, or of shape {tuple(own[other[0]].shape)}",
                f"no such state, and shape {tuple(theirs[other[0]].shape)}",
                "save whole checkpoints (save_weights_only=False)",
            )  # fmt: skip


def restore_shapes(module: nn.Module, checkpoint: Mapping[str, Any]) -> None:
    """Gives a dense LightningModule the shapes of a checkpoint that a :class:`PruningCallback` took part in.

    Call it in ``on_load_checkpoint``, which Lightning calls before it loads weights: ``load_from_checkpoint`` then
    gives the pruned module back, and so does a Trainer without the callback.

    Args:
        module: as it was before pruning; one that has the shapes already is left as it is.
        checkpoint: what ``on_load_checkpoint`` is given. Without state of a PruningCallback nothing is done.

    Raises:
        PlanMismatchError: the module is neither.

    >>> import lightning
    >>> class Net(lightning.LightningModule):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.net = nn.TransformerEncoderLayer(16, 4)
    ...     def on_load_checkpoint(self, checkpoint):
    ...         restore_shapes(self, checkpoint)
    """
    for state in checkpoint.get("callbacks", {}).values():
        if isinstance(state, Mapping) and {"path", "pruner"} <= state.keys():
            _shape(plain(module.get_submodule(state["path"])), Plan.from_json(state["pruner"]["plan"]))


def _shape(model: nn.Module, plan: Plan) -> None:
    """Gives a model the shapes that a plan leaves, unless it has them."""
    now = [(view.name, view.spec.shape) for view in all_views(model, {s.name for s in plan.specs})]
    if now != [(spec.name, spec.shape) for spec in plan.after]:
        apply_plan(model, plan)


def _check_strategy(strategy: Any) -> None:
    """Refuses strategies that hold on to parameters and cannot be told of new ones."""
    kinds = {kind.__name__ for kind in type(strategy).__mro__}
    if not kinds & {"SingleDeviceStrategy", "DDPStrategy"} or "DeepSpeedStrategy" in kinds:
        found = f"{type(strategy).__name__}, which shards or wraps parameters"
        remedy = "prune before training: attnprune.prune_attention"
        raise WrappedModelError("Trainer.strategy", "one device, or DDPStrategy", found, remedy)
    if "MultiProcessing" in type(strategy.launcher).__name__:  # the Trainer loads their weights into the dense model
        found = "processes that are forked or spawned inside fit()"
        raise WrappedModelError("Trainer.strategy", "processes of their own", found, 'use strategy="ddp"')


def _path_of(model: nn.Module, root: nn.Module) -> str | None:
    """Where a module lies in another: a name for ``get_submodule``."""
    return next((name for name, module in root.named_modules() if plain(module) is model), None)


def _averages(callback: Any) -> bool:
    """Whether a callback is one of Lightning's that average weights."""
    return any(kind.__name__ in AVERAGING for kind in type(callback).__mro__)


def _held(callback: Any, pl_module: nn.Module) -> list[nn.Module]:
    """The moving averages that a callback holds."""
    values = vars(callback).values()
    plainly = [one for one in values if _averages(callback) and type(one) is type(pl_module)]
    return [one.module for one in values if isinstance(one, AveragedModel)] + plainly


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class, with parameters of the same names and shapes."""
    mine, theirs = ([(name, p.shape) for name, p in each.named_parameters()] for each in (one, other))
    return type(one) is type(other) and mine == theirs
