"""A tiny model of random weights in float64, and what it computes: :class:`Host`, :func:`outputs`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

NOT_OUTPUTS = ("past_key_values", "cache", "mems", "attentions", "attn_weights")
"""Parts of the names of outputs that are not compared: caches, and weights of heads that are gone."""
MOST = 50_000_000
"""Parameters of a tiny model."""
HUGE = 1e30
Model = Callable[[], nn.Module]


@dataclass(frozen=True)
class Host:
    """One model family."""

    name: str
    """As the page has it."""
    source: str
    """The package that it is from."""
    build: Model
    """Makes a tiny model."""
    inputs: Callable[[nn.Module], dict[str, Any] | tuple[Any, ...]]
    """What it is called with: keywords, or positional arguments."""
    about: Mapping[str, str] = field(default_factory=dict)
    """More to say in its row."""

    def make(self) -> nn.Module:
        """The model in double precision with random weights that matter, the same at each call."""
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = self.build()
        numbers = sum(one.numel() for one in model.parameters())
        if numbers > MOST:
            raise ValueError(f"{numbers:,} parameters, which is not tiny")
        return randomised(model.double().eval())


def randomised(model: nn.Module) -> nn.Module:
    """Gives matrices normal values by their fan-in, and moves vectors by a tenth, so that nothing starts at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(0.1 * noise)
            else:
                parameter.copy_(noise / math.sqrt(parameter.numel() / parameter.shape[0]))
    return model


def run(model: nn.Module, given: Any) -> Any:
    """The model's output, without gradients."""
    torch.manual_seed(0)  # some sample inside
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**given) if isinstance(given, Mapping) else model(*given)


def outputs(model: nn.Module, given: Any) -> list[Tensor]:
    """The tensors of real numbers that a model returns, in order."""
    found: list[Tensor] = []
    _collect(run(model, given), found)
    return found


def usable(model: nn.Module, given: Any) -> list[Tensor]:
    """The same, where they are numbers.

    Raises:
        ValueError: they are none, or there are no outputs.
    """
    found = [one for one in outputs(model, given) if one.numel()]
    if not found or not all(bool(one.isfinite().any()) for one in found):
        raise ValueError("outputs that are no numbers" if found else "no outputs")
    return found


def _collect(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point() and not value.is_nested:
            found.append(value.detach().clone())
    elif isinstance(value, Mapping):
        for key, one in value.items():
            if not any(part in str(key) for part in NOT_OUTPUTS):
                _collect(one, found)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _collect(one, found)


def gap(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference as a share of the largest number of its tensor; infinite where shapes differ, or where one
    alone is not finite (or at the limit of its dtype, which stands for that)."""
    if [one.shape for one in found] != [one.shape for one in expected]:
        return math.inf
    worst = 0.0
    for mine, theirs in zip(found, expected, strict=True):
        real = theirs.abs() < HUGE
        if not torch.equal(real, mine.abs() < HUGE):
            return math.inf
        if bool(real.any()):
            size = float(theirs[real].abs().max())
            worst = max(worst, float((mine[real] - theirs[real]).abs().max()) / (size or 1.0))
    return worst
