"""Tuning what pruning left of attention: :func:`recover`, what it will cost (:func:`estimate_recovery`), and tuning as
the last step of surgery (:class:`Recovering`)."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration.batches import device_of
from ..calibration.losses import LossFn
from ..calibration.processes import across_processes, sharing
from ..calibration.quiet import evaluated, undisturbed
from ..errors import OptionError
from ..families.base import AttentionView
from ..families.registry import all_views, find_views, plain
from ..nn.attempt import MACHINE
from ..nn.kept import ordinary
from ..nn.outputs import OutputFn
from ..surgery import check_views
from ..values.choices import Choices
from ..values.plan import Plan
from ..values.recovery import Recovered, Recovery
from .blocks import find_blocks
from .costs import Estimate, estimated
from .memory import free_memory
from .objective import Layerwise, Objective, uncached
from .splitting import split
from .tuned import norms_of, updates_of
from .tuning import Tuner

if TYPE_CHECKING:
    from typing import Unpack

    from ..values.recovery import RecoveryOptions


@ordinary
def recover(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    steps: int | str | Recovery = 400,
    *,
    include: Choices | None = None,
    exclude: Choices | None = None,
    loss_fn: LossFn | None = None,
    output_fn: OutputFn | None = None,
    progress: bool = True,
    **options: Unpack[RecoveryOptions],
) -> Recovered:
    """Tunes what pruning left of attention towards what the dense model does, without labels, in place.

    Weights and biases of Q, K, V and O learn, by Adam, to bring the hidden states after every block and the outputs
    near those of the dense model (the mean over them of ``|s - t|^2 / |t|^2``). A share of the data is kept aside; the
    model ends as it was where the loss over that share was least, and so never worse on it than it began. Shapes,
    modes, ``requires_grad`` flags, gradients and the random state stay as they are, and the dense model bitwise.
    Dropout is off. Where a number of steps or epochs is asked for, the same call gives the same weights.

    Args:
        model: a pruned model.
        dense: the model before pruning, on the same device; a copy, as pruning happens in place.
        data: an iterable of batches, as :func:`attnprune.prune_attention` takes; labels are not needed. They are read
            once, no more than the steps need, and remembered.
        steps: how long: a number of steps, or a time or number of passes over the data: ``"60s"``, ``"10min"``,
            ``"2 epochs"``. A :class:`attnprune.Recovery` says this and all options.
        include: only these attention modules, as in :func:`attnprune.prune_attention`.
        exclude: what to leave alone, likewise.
        loss_fn: ``loss_fn(model, batch)``, for batches that the model does not take itself, and for ``labels``.
        output_fn: takes what the model returns, and gives the tensors to compare.
        progress: whether to show a bar, with the losses before, now, and held out.
        options: of :class:`attnprune.RecoveryOptions`, which says what each means: ``lr``, ``held_out``, ``kl``,
            ``temperature``, ``labels``, ``norms``, ``lora``, ``layerwise``, ``checkpointing``, ``keep_states``,
            ``seed``, ``resume``.

    Returns:
        The loss over what was held out, before and after, steps and seconds.

    Raises:
        AttnPruneError: one of its kinds; the model is then bitwise as it was.

    >>> import copy, attnprune
    >>> _ = torch.manual_seed(0)
    >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2).eval()
    >>> dense, data = copy.deepcopy(model), [torch.randn(8, 6, 32) for _ in range(8)]
    >>> report = attnprune.prune_attention(model, 0.5, data=data, progress=False)
    >>> found = recover(model, dense, data, steps=20)
    >>> found.after < found.before, found.steps
    (True, 20)
    """
    recovery = Recovery.parse(steps, **options)
    model, dense = _inner("model", model), _inner("dense", dense)
    views = find_views(model, include, exclude)
    with prepared(model, dense, data, views, recovery, loss_fn, output_fn, progress) as tuner:
        return tuner.run()


@ordinary
def estimate_recovery(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    steps: int | str | Recovery = 400,
    *,
    include: Choices | None = None,
    exclude: Choices | None = None,
    loss_fn: LossFn | None = None,
    output_fn: OutputFn | None = None,
    progress: bool = True,
    **options: Unpack[RecoveryOptions],
) -> Estimate:
    """Says how long :func:`recover` will take, and how much memory, from a few steps that are undone.

    Takes the same arguments; ``progress`` shows how many of these steps are over.

    >>> import copy, attnprune
    >>> model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    >>> dense, data = copy.deepcopy(model), [torch.randn(8, 6, 32) for _ in range(8)]
    >>> report = attnprune.prune_attention(model, 0.5)
    >>> print(estimate_recovery(model, dense, data, steps=20))
    about ... s (20 steps of ... ms, 11 looks at what is held out of ... ms), ... MB beside both models
    """
    recovery = Recovery.parse(steps, **options)
    model, dense = _inner("model", model), _inner("dense", dense)
    views = find_views(model, include, exclude)
    with prepared(model, dense, data, views, recovery, loss_fn, output_fn, progress) as tuner:
        return estimated(tuner)


@contextmanager
def prepared(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    views: Sequence[AttentionView],
    recovery: Recovery,
    loss_fn: LossFn | None,
    output_fn: OutputFn | None,
    progress: bool,
) -> Iterator[Tuner]:
    """A tuner, ready to run; after the block both models' modes, flags and the random state are as they were."""
    began = time.monotonic()
    check_views(model, views)
    blocks = find_blocks(model)
    _check_dense(model, dense, [block.name for block in blocks])
    updates = updates_of(model, views, blocks, recovery)
    parameters = [one.parameter for one in updates]
    _check_apart(dense, parameters)
    batches = split(data, recovery)
    device = device_of(model)
    kept = {"True": float("inf"), "False": 0.0}
    room = kept.get(str(recovery.keep_states), free_memory(device) / 4)
    kind = Layerwise if recovery.layerwise else Objective
    objective = kind(model, dense, blocks, recovery, loss_fn, output_fn, room)
    with evaluated(dense), undisturbed(model, parameters), uncached(model, dense):
        torch.manual_seed(recovery.seed)  # of what is random in evaluation mode too
        yield Tuner(updates, objective, batches, recovery, device, began, progress)


class Recovering:
    """A step of :func:`attnprune.surgery.commit_all`: tunes the pruned model towards what it was before.

    Args:
        model: the model, not pruned yet.
        plan: what is about to be done to it; only its attention modules are tuned.
        recovery: how long, and how.
        data: batches that can be read again.
        loss_fn, output_fn, progress: as in :func:`recover`.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        recovery: Recovery,
        data: Iterable[Any],
        loss_fn: LossFn | None = None,
        output_fn: OutputFn | None = None,
        progress: bool = True,
    ) -> None:
        self.model, self.recovery, self.data = model, recovery, data
        self.loss_fn, self.output_fn, self.progress = loss_fn, output_fn, progress
        self.names = {spec.name for spec in plan.specs}
        self.shared = sharing()
        self.found: Recovered | None = None
        self.dense, self.own = dense_beside(model, all_views(model, self.names), recovery.norms)

    def commit(self) -> None:
        """Tunes."""
        views = all_views(self.model, self.names)
        arguments = self.model, self.dense, self.data, views, self.recovery, self.loss_fn, self.output_fn, self.progress
        with across_processes() if self.shared else nullcontext(), prepared(*arguments) as tuner:
            self.found = tuner.run()

    @torch.no_grad()
    def undo(self) -> None:
        """Parameters that pruning left as they were have their values again."""
        for parameter, before in self.own:
            parameter.detach().copy_(before)


Pairs = list[tuple[nn.Parameter, nn.Parameter]]


def dense_beside(model: nn.Module, views: Sequence[AttentionView], norms: bool) -> tuple[nn.Module, Pairs]:
    """A copy of a model that shares with it every parameter that is not tuned; and those that are, with their copies.

    Raises:
        OptionError: the model cannot be copied.
    """
    tuned = [slot.parameter for view in views for slot in view.slots.values()]
    tuned += [bias for view in views if (bias := view.owner("o")._parameters.get("bias")) is not None]
    if norms:
        tuned += norms_of(model, find_blocks(model, views))
    own = {id(parameter): parameter for parameter in tuned}
    memo: dict[int, Any] = {id(one): one for one in model.parameters() if id(one) not in own}
    try:
        dense = copy.deepcopy(model, memo)
    except MACHINE:
        raise
    except Exception as error:  # whatever a module raises that cannot be copied
        found = f"{type(error).__name__}: {str(error)[:80]}"
        remedy = "prune without recover=, then call attnprune.recover with a dense model of your own"
        raise OptionError("recover", "a model that copy.deepcopy copies", found, remedy) from error
    return dense, [(parameter, memo[key]) for key, parameter in own.items()]


def _inner(where: str, model: nn.Module) -> nn.Module:
    """The model inside wrappers that compile or distribute it."""
    if not isinstance(model, nn.Module):
        raise OptionError(where, "a torch.nn.Module", f"a {type(model).__name__}", "recover(model, dense, data)")
    inner = plain(model)
    return plain(inner.module) if type(inner).__name__ == "DistributedDataParallel" else inner  # type: ignore[arg-type]


def _check_dense(model: nn.Module, dense: nn.Module, names: Sequence[str]) -> None:
    """Raises unless the dense model has these blocks, and is where the model is."""
    if dense is model:
        remedy = "copy the model before it is pruned: dense = copy.deepcopy(model)"
        raise OptionError("dense", "the model before pruning", "the pruned model itself", remedy)
    there = dict(dense.named_modules())
    missing = [name for name in names if name not in there]
    if missing:
        remedy = "pass the model that was pruned, as it was before"
        raise OptionError("dense", f"a block {missing[0]}", f"a {type(dense).__name__} without it", remedy)
    here, place = device_of(model), device_of(dense)
    if here != place:
        raise OptionError("dense", f"a model on {here}", f"one on {place}", f"move it: dense.to({str(here)!r})")


def _check_apart(dense: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Raises if the dense model uses values that are tuned."""
    theirs = {one.data_ptr(): name for name, one in dense.named_parameters() if one.numel()}
    for parameter in parameters:
        name = theirs.get(parameter.data_ptr()) if parameter.numel() else None
        if name is not None:
            remedy = "copy the model before it is pruned: dense = copy.deepcopy(model)"
            raise OptionError("dense", "weights of its own", f"{name}, which the pruned model uses too", remedy)
