"""The loop: steps, looks at what was held out, and the best of them (:class:`Tuner`)."""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import partial
from math import ceil, cos, pi
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from ..bars import bar
from ..calibration.batches import to_device
from ..calibration.processes import add_up, agree, exchange, pooled, sharing
from ..calibration.sample import samples_in
from ..errors import DataError
from ..nn.attempt import undoing_with
from ..values.recovery import Recovered, Recovery
from .objective import Grads, Objective
from .progress import Progress, Saved, fingerprint, load, save
from .splitting import Split
from .tuned import Update

CHECKS = 10
"""How often what was held out is looked at."""
MOST, PART = 0.01, 0.08
"""The learning rate that is found: at most, and of the root of the loss, as noise makes a loss of its square."""
RISE = 0.05
"""The part of all steps in which the learning rate rises."""
WORSE = 1.1
"""A loss this many times that of the beginning says that the learning rate is too large."""
CUT = 4.0
"""By what such a rate is divided; and how far the loss of a batch must rise to look at once."""
BETAS = (0.9, 0.99)
"""Adam's: of moments that forget in a hundred steps, as there are a few hundred."""


class Tuner:
    """Tunes a model, and leaves it with the best of what was seen, the beginning among it.

    Args:
        updates: what is tuned.
        objective: what it is tuned towards.
        data: what it is tuned on, and what decides.
        recovery: how long, and how.
        device: where batches go.
        began: when, by ``time.monotonic``.
        progress: whether to show a bar.
    """

    def __init__(
        self,
        updates: Sequence[Update],
        objective: Objective,
        data: Split,
        recovery: Recovery,
        device: torch.device,
        began: float,
        progress: bool = False,
    ) -> None:
        self.updates, self.objective, self.data, self.recovery = updates, objective, data, recovery
        self.device, self.progress = device, progress
        self.parameters: list[nn.Parameter] = [one.parameter for one in updates]
        self.tensors = [tensor for one in updates for tensor in one.tensors]
        sizes = [size for one in updates for size in one.sizes]
        self.first = self.saved()
        self.optimizer = torch.optim.Adam(
            [{"params": [tensor], "size": size} for tensor, size in zip(self.tensors, sizes, strict=True)], betas=BETAS
        )
        length = recovery.length
        steps = length.amount * (len(data.train) if length.unit == "epochs" else 1)
        self.total = None if length.unit == "seconds" else _agreed(max(1, ceil(steps)))
        self.began, self.longest, self.look = began, 0.0, 0.0
        self.now, self.best = Progress(next_check=1 / CHECKS), self.first
        self.mark = fingerprint(recovery, self.first, [len(part) for part in data])

    # what is tuned

    def saved(self) -> list[Tensor]:
        """Copies of what the optimizer steps on."""
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def write(self, values: Sequence[Tensor] | None = None) -> None:
        """Puts values in place; None: those that the optimizer holds."""
        for tensor, value in zip(self.tensors, values or (), strict=values is not None):
            tensor.copy_(value)
        for one in self.updates:
            one.write()

    # time

    @property
    def seconds(self) -> float:
        """Since the beginning, with what was before an interruption."""
        return self.now.seconds + (time.monotonic() - self.began)

    @property
    def share(self) -> float:
        """How much of the time, or of the steps, is over: of time also what one more step and look would take."""
        if self.total is not None:
            return self.now.steps / self.total
        over = self.seconds + self.longest + self.look
        return _agreed(over / self.recovery.length.amount)

    @property
    def again(self) -> bool:
        """Whether batches are met more than once."""
        return self.total is None or self.total > len(self.data.train)

    # the loop

    def run(self) -> Recovered:
        """Tunes.

        Raises:
            DataError: the loss is not finite before anything is tuned.
        """
        return agree(self._run, digest=lambda found: repr(found[:3]))

    def _run(self) -> Recovered:
        self._resume()
        if self.now.before is None:
            before = self.held_loss()
            if not before < float("inf"):
                remedy = "check the batches and both models' weights; nothing was changed"
                raise DataError("data", "a finite loss over what was held out", str(before), remedy)
            self.now.before = self.now.after = before
        undoing_with(partial(self.write, self.first))
        self._loop()
        self.write(self.best)
        return Recovered(self.now.before, self.now.after, self.now.steps, self.seconds)

    def _loop(self) -> None:
        with bar(what="recovery", shown=self.progress, total=self.total, initial=self.now.steps) as shown:
            while not self.now.over:
                began = time.monotonic()
                loss = self.step(self.share)
                self.longest = max(self.longest, time.monotonic() - began)
                losses = f"{self.now.before:.4g} before, {loss:.4g} now, {self.now.after:.4g} held out"
                shown.set_postfix_str(losses, refresh=False)
                shown.update()
                share = self.share
                alarm = not loss <= CUT * (self.now.before or 0.0) and self.now.alarms < CHECKS
                self.now.alarms += alarm
                if share >= self.now.next_check or alarm:
                    self.now.next_check = (int(share * CHECKS) + 1) / CHECKS
                    self.now.over = share >= 1
                    self.check()

    def rate(self, share: float) -> float:
        """The learning rate when a share of the steps is over."""
        asked = self.recovery.lr
        rate = min(MOST, PART * (self.now.before or 0.0) ** 0.5) if asked == "auto" else asked
        return rate * self.now.factor * min(1.0, (share + 1e-3) / RISE) * (1 + cos(pi * min(share, 1))) / 2

    def step(self, share: float) -> float:
        """One step; one whose gradients are not finite changes nothing. Returns the loss."""
        number, batch = self._batch(self.now.steps)
        loss, grads = self.objective.gradients(("train", number), batch, self.again, self.parameters)
        grads, value = self._shared(grads, loss)
        finite = [grad.isfinite().all() for grad in grads if grad is not None]
        if finite and bool(torch.stack(finite).all()):
            for one, grad in zip(self.updates, grads, strict=True):
                one.take(grad)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(share) * group["size"]
            self.optimizer.step()
            self.write()
            self.optimizer.zero_grad(set_to_none=True)
        self.now.steps += 1
        return value

    def check(self) -> None:
        """Looks at what was held out, and keeps the best; far above the beginning is undone, and goes on slower."""
        began = time.monotonic()
        loss = self.held_loss()
        assert self.now.before is not None
        if loss < self.now.after:
            self.now.after = loss
            self.best = self.saved()
        elif not loss <= WORSE * self.now.before:
            self.write(self.best)
            self.now.factor /= CUT
            self.optimizer.state.clear()
        self.look = max(self.look, time.monotonic() - began)
        self._save()

    def _save(self) -> None:
        if self.recovery.resume is None or (sharing() and distributed.get_rank()):
            return
        now = replace(self.now, seconds=self.seconds)
        save(self.recovery.resume, self.mark, Saved(now, self.tensors, self.best, self.optimizer.state_dict()))

    def _resume(self) -> None:
        """Goes on from the file, where there is one."""
        found = None if self.recovery.resume is None else load(self.recovery.resume, self.mark)
        if found is not None:
            self.write(found.values)
            self.best = [value.to(tensor) for value, tensor in zip(found.best, self.tensors, strict=True)]
            self.optimizer.load_state_dict(dict(found.moments))
            self.now = found.progress

    @torch.no_grad()
    def held_loss(self) -> float:
        """The mean loss over the samples that were held out."""
        total, count = 0.0, 0
        for number, batch in enumerate(self.data.held):
            batch = to_device(batch, self.device)
            wanted = self.objective.wanted(("held", number), batch, True)
            samples = samples_in(batch)
            total += float(self.objective.loss(batch, wanted)) * samples
            count += samples
        total, count = pooled((total, count))
        return total / count

    def order(self, epoch: int) -> list[int]:
        """The numbers of all batches, as an epoch takes them."""
        chance = torch.Generator("cpu").manual_seed((self.recovery.seed + 1_000_003 * epoch) % 2**63)
        numbers: list[int] = torch.randperm(len(self.data.train), generator=chance, device="cpu").tolist()
        return numbers

    def _batch(self, step: int) -> tuple[Hashable, Any]:
        """The batch of a step: each once an epoch, in an order of that epoch."""
        epoch, place = divmod(step, len(self.data.train))
        number = self.order(epoch)[place]
        return number, to_device(self.data.train[number], self.device)

    def _shared(self, grads: Grads, loss: Tensor) -> tuple[Grads, float]:
        """Gradients and loss, means over processes where they share data."""
        if not sharing():
            return grads, float(loss)
        count = distributed.get_world_size()
        exchange(None)  # of a process that failed the others hear here
        filled = [torch.zeros_like(p) if g is None else g for p, g in zip(self.parameters, grads, strict=True)]
        *summed, whole = add_up([*filled, loss.reshape(())])
        return [grad / count for grad in summed], float(whole) / count


Number = TypeVar("Number", int, float)


def _agreed(value: Number) -> Number:
    """The largest of all processes, where they share data."""
    return max(exchange(value)) if sharing() else value
