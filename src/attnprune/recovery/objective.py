"""How far a model is from the dense one, and which way leads nearer: of the whole model (:class:`Objective`), or of
each block by itself (:class:`Layerwise`)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..calibration.batches import answers, forward
from ..calibration.losses import LossFn, scalar_of, token_mask
from ..errors import DataError
from ..families.calls import CACHES
from ..nn.attempt import undone
from ..nn.outputs import OutputFn, outputs_of
from ..values.recovery import Recovery
from .blocks import Block
from .distillation import capture, distillation_loss, first_tensor, hidden_loss

Grads = Sequence[Tensor | None]


@dataclass(frozen=True)
class Told:
    """What a model says of a batch."""

    states: Mapping[str, Tensor]
    """By name: what blocks hand on, and outputs."""
    output: Mapping[str, Tensor] | Tensor | None
    """The outputs again, as the divergence takes them; None where the model was not called as a whole."""
    loss: Tensor | None = None
    """By labels, where that was asked for."""

    @property
    def size(self) -> int:
        """Bytes of the states."""
        return sum(tensor.nbytes for tensor in self.states.values())


class Objective:
    """The distance of hidden states after every block, and of outputs; beside it the divergence and a loss by labels.

    Args:
        model: what is tuned.
        dense: what it is tuned towards.
        blocks: whose outputs are compared.
        recovery: says what counts.
        loss_fn: how models are called with a batch, where they do not take it themselves; the loss by labels.
        output_fn: takes what the model returns and gives the tensors to compare.
        room: how many bytes of what the dense model says may be kept.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        blocks: Sequence[Block],
        recovery: Recovery,
        loss_fn: LossFn | None,
        output_fn: OutputFn | None,
        room: float,
    ) -> None:
        self.model, self.dense, self.recovery, self.room = model, dense, recovery, room
        self.names = [block.name for block in blocks]
        self.loss_fn, self.output_fn = loss_fn, output_fn
        self.kept: dict[Hashable, Told] = {}

    def told(self, model: nn.Module, batch: Any, labels: bool = False) -> Told:
        """What a model says of a batch."""
        loss: Any = None
        with answers(model) as said, capture(model, self.names) as seen:
            if labels:
                loss = scalar_of(model, batch, self.loss_fn, self.output_fn)
            elif self.loss_fn is not None:
                self.loss_fn(model, batch)
            else:
                forward(model, batch)
        try:
            outputs = outputs_of(said[-1], self.output_fn) if said else ()
        except DataError:
            if self.loss_fn is None:  # else it picks what counts
                raise
            outputs = ()
        named = {f"output {one.name}": one.tensor for one in outputs}
        bare = len(outputs) == 1 and not outputs[0].name
        output = (outputs[0].tensor if bare else {one.name: one.tensor for one in outputs}) if outputs else None
        return Told({**seen, **named}, output, loss)

    def wanted(self, key: Hashable, batch: Any, again: bool) -> Told:
        """What the dense model says of a batch, kept by the key if it is to be asked for again and there is room."""
        if key in self.kept:
            return self.kept[key]
        with torch.no_grad():
            found = self.told(self.dense, batch)
        if again and found.size <= self.room:
            self.room -= found.size
            self.kept[key] = found
        return found

    def loss(self, batch: Any, wanted: Told) -> Tensor:
        """How far the model is from what the dense one says, a scalar."""
        mine, mask = self.told(self.model, batch, labels=self.recovery.labels > 0), token_mask(batch)
        total = hidden_loss(mine.states, wanted.states, mask=mask)
        if self.recovery.kl:
            if mine.output is None or wanted.output is None:
                remedy = "leave out kl, or let loss_fn call the model itself"
                raise DataError("kl", "outputs of the model", "none, as loss_fn calls parts of it", remedy)
            apart = distillation_loss(
                mine.output, wanted.output, temperature=self.recovery.temperature, mask=mask, output_fn=_itself
            )
            total = total + self.recovery.kl * apart
        return total if mine.loss is None else total + self.recovery.labels * mine.loss

    def gradients(
        self, key: Hashable, batch: Any, again: bool, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Grads]:
        """The loss of a batch, and its gradients; None for a parameter that it does not depend on."""
        wanted = self.wanted(key, batch, again)
        with recomputed(self.model, self.names) if self.recovery.checkpointing else ExitStack():
            loss = self.loss(batch, wanted)
            if not loss.requires_grad:
                remedy = "let loss_fn run the model with gradients, without detach"
                raise DataError("data", "a loss that depends on attention", "no gradient", remedy)
            return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)


class Layerwise(Objective):
    """The same distances, but each block learns from what the dense block before it hands on."""

    def gradients(
        self, key: Hashable, batch: Any, again: bool, parameters: Sequence[nn.Parameter]
    ) -> tuple[Tensor, Grads]:
        places = {id(parameter): place for place, parameter in enumerate(parameters)}
        grads: list[Tensor | None] = [None] * len(parameters)
        losses: list[Tensor] = []
        mask = token_mask(batch)

        def learn(name: str, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
            block = self.model.get_submodule(name)
            own = [parameter for parameter in block.parameters() if id(parameter) in places]
            with torch.enable_grad():
                mine = first_tensor(block(*args, **kwargs))
                loss = hidden_loss({name: mine}, {name: first_tensor(output)}, mask=mask)
                found = torch.autograd.grad(loss, own, allow_unused=True)
            losses.append(loss.detach())
            for parameter, grad in zip(own, found, strict=True):
                if grad is not None:
                    place = places[id(parameter)]
                    before = grads[place]
                    grads[place] = grad if before is None else before + grad

        with torch.no_grad(), _heard(self.dense, self.names, learn):
            self.told(self.dense, batch)
        if not losses:
            remedy = "call the model itself; a compiled model runs no hooks"
            raise DataError("data", "blocks that run", "none", remedy)
        return torch.stack(losses).mean(), grads


@contextmanager
def _heard(
    model: nn.Module, names: Sequence[str], learn: Callable[[str, Any, Mapping[str, Any], Any], None]
) -> Iterator[None]:
    """Calls ``learn(name, args, kwargs, output)`` after each run of these modules; caches are left out."""
    given: list[tuple[Any, dict[str, Any]]] = []

    def before(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.append((_copied(args), {key: None if key in CACHES else _copied(one) for key, one in kwargs.items()}))

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        learn(name, *given.pop(), output)

    with ExitStack() as stack:
        for name in names:
            block = model.get_submodule(name)
            stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(block.register_forward_hook(partial(after, name), with_kwargs=True).remove)
        yield


def _copied(value: Any) -> Any:
    """The same values in tensors of their own, as blocks may write into their inputs."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_copied(one) for one in value)
    return {key: _copied(one) for key, one in value.items()} if type(value) is dict else value


@contextmanager
def recomputed(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Inside, what these modules keep for the pass back is computed anew there."""
    blocks = [model.get_submodule(name) for name in names]
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.__dict__["forward"] = forward


@contextmanager
def uncached(*models: nn.Module) -> Iterator[None]:
    """Inside, models of transformers keep no keys and values for tokens to come."""
    every: list[Any] = [getattr(module, "config", None) for model in models for module in model.modules()]
    configs = {id(config): config for config in every if getattr(config, "use_cache", None) is True}
    with undone() as undo:
        for config in configs.values():
            undo.append(partial(setattr, config, "use_cache", True))
            config.use_cache = False
        yield


def _itself(output: Any) -> Any:
    return output
