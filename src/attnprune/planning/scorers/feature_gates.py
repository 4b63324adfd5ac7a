"""Gates on features: what closing one does to the model's output, at the projection that reads or writes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration.processes import pooled
from ...families.base import AttentionView
from ...values.layout import Projection
from .gradient import check_finite, listen, sequences

_SUMS = ("products", "crossed", "plain", "total", "tokens")


class FeatureGates:
    """The gates on the features of one projection.

    Per sample ``a = sum of x g`` and ``b = sum of g`` over tokens, for every feature x and the gradient g that reaches
    it through this projection alone: the gate on ``x - m`` has the derivative ``a - m b``.
    """

    def __init__(self, view: AttentionView, projection: Projection, switch: Tensor) -> None:
        self.view, self.projection, self.switch, self.rows = view, projection, switch, set[int]()
        spec = view.spec
        self.present = torch.tensor(spec.present(projection), device=switch.device)
        self.weight = view.weight(projection).to(torch.promote_types(view.weight(projection).dtype, torch.float32))
        size = spec.width(projection)
        self.products, self.crossed, self.plain, self.total = (
            torch.zeros(size, device="cpu", dtype=torch.float64) for _ in range(4)
        )
        self.tokens = 0
        self.seen: list[tuple[Tensor, Tensor]] = []

    def begin(self, counts: Sequence[int]) -> None:
        self.rows, self.seen = set(), []

    def listen(self, hooks: ExitStack) -> None:
        side, port = Side(self._receive), self.view.port(self.projection)

        def after(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            if self.projection == "o":
                bias = module._parameters.get("bias")
                features = output.detach() if bias is None else output.detach() - bias.detach()
            else:
                features = inputs[0].detach()
            features = features.index_select(-1, self.present)
            self.total += features.flatten(0, -2).sum(0, dtype=torch.float64).cpu()
            self.tokens += features[..., 0].numel()
            return listen(output, self.switch, features, side)

        handle = port.owner.register_forward_hook(after) if self.projection == "o" else port.listen(after)
        hooks.callback(handle.remove)

    def _receive(self, x: Tensor, grad: Tensor) -> None:
        exact = torch.promote_types(x.dtype, torch.float32)
        x, grad = x.to(exact), grad.to(exact)
        grad = grad.index_select(-1, self.present) if self.projection == "o" else grad @ self.weight.to(exact)
        self.rows.add(sequences(x))
        x, grad = (part.reshape(sequences(part), -1, part.shape[-1]) for part in (x, grad))
        self.seen.append(((x * grad).sum(1).double().cpu(), grad.sum(1).double().cpu()))

    def finish(self, number: int, groups: Mapping[int, int], samples: int) -> None:
        if not self.seen:
            return
        runs = [[by_sample(one, groups, samples) for one in pair] for pair in self.seen]
        a, b = (added(parts) for parts in zip(*runs, strict=True))
        self.seen = []
        check_finite(f"{self.view.name}: {self.projection}", a.sum() + b.sum(), number)
        self.products += a.square().sum(0)
        self.crossed += (a * b).sum(0)
        self.plain += b.square().sum(0)

    def share(self) -> None:
        """Adds what other processes saw."""
        self.__dict__.update(pooled({name: getattr(self, name) for name in _SUMS}))

    def scores(self, count: int, centred: bool) -> Tensor:
        """``(features,)``; where the projection has a bias, that can keep the mean."""
        kept = centred and self.view.spec.bias["qkvo".index(self.projection)]
        m = self.total / max(self.tokens, 1) if kept else torch.zeros_like(self.total)
        return (self.products - 2 * m * self.crossed + m.square() * self.plain).clamp_min(0) / count


def by_sample(x: Tensor, groups: Mapping[int, int], samples: int) -> Tensor:
    """``(samples, channels)`` from a number for every sequence, as large as a sample's own derivative is.

    The loss is a mean over samples, so that is so many times larger; where a tower has other samples than the batch
    counts, its mean square counts as often as theirs.
    """
    own = groups[len(x)]
    return x.reshape(own, -1, x.shape[-1]).sum(1) * sqrt((own if own > 1 else samples) * samples)


def added(parts: Sequence[Tensor]) -> Tensor:
    """The sum over runs; where they are of other samples each, over these too."""
    if len({len(one) for one in parts}) > 1:
        parts = [one.sum(0, keepdim=True) for one in parts]
    return torch.stack([*parts]).sum(0)


class Side:
    """Passes on what :func:`listen` tells."""

    def __init__(self, take: Any) -> None:
        self.receive = take
