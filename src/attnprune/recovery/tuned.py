"""What is tuned, and how a step changes it: weights (:class:`Whole`), or updates of low rank (:class:`LowRank`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..families.base import AttentionView
from ..families.slots import Slot
from ..values.recovery import Recovery
from .blocks import Block

FLOOR = 1e-3
"""The size that a tensor of zeros is taken to have, as in Adafactor (Shazeer and Stern 2018, arXiv 1804.04235)."""


class Update(ABC):
    """One parameter, and what the optimizer holds of it: float32, where the parameter is of half precision.

    Args:
        parameter: what is tuned.
    """

    tensors: list[Tensor]
    """What the optimizer steps on."""
    sizes: list[float]
    """Of each the size that a learning rate is a share of."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    @abstractmethod
    def take(self, grad: Tensor | None) -> None:
        """Gives the optimizer's tensors the gradient that the parameter has."""

    @abstractmethod
    def write(self) -> None:
        """Gives the parameter the values that the optimizer's tensors say."""


class Whole(Update):
    """All values of a parameter, or some of its channels.

    Args:
        parameter: what is tuned.
        mask: shaped to be multiplied with its gradient, 0 where it is no attention's; None: all of it is.
    """

    def __init__(self, parameter: nn.Parameter, mask: Tensor | None = None) -> None:
        super().__init__(parameter)
        values = parameter.detach()
        self.mask, self.tensors = mask, [values.to(torch.promote_types(values.dtype, torch.float32))]
        self.sizes = [_size(self.tensors[0])]

    def take(self, grad: Tensor | None) -> None:
        (master,) = self.tensors
        master.grad = None if grad is None else (grad if self.mask is None else grad * self.mask).to(master.dtype)

    def write(self) -> None:
        (master,) = self.tensors
        if master.dtype != self.parameter.dtype:  # else they share memory
            self.parameter.detach().copy_(master)


class LowRank(Update):
    """``W + B A`` of a weight ``(m, n)``: B ``(m, rank)`` begins at zero, A ``(rank, n)`` random.

    The gradients of both follow from that of W, so that the model needs no other layers.
    """

    def __init__(self, weight: nn.Parameter, rank: int, chance: torch.Generator) -> None:
        super().__init__(weight)
        self.base = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).clone()
        m, n = weight.shape
        a = torch.randn(rank, n, generator=chance, device="cpu").to(self.base) / rank**0.5
        self.tensors = [a, torch.zeros(m, rank, dtype=a.dtype, device=a.device)]
        self.sizes = [_size(a), _size(self.base)]

    def take(self, grad: Tensor | None) -> None:
        a, b = self.tensors
        if grad is None:
            a.grad = b.grad = None
        else:
            grad = grad.to(a.dtype)
            a.grad, b.grad = b.T @ grad, grad @ a.T

    def write(self) -> None:
        a, b = self.tensors
        # adding zeros would turn -0 into 0
        self.parameter.detach().copy_(torch.addmm(self.base, b, a) if bool(b.any()) else self.base)


def updates_of(
    model: nn.Module, views: Sequence[AttentionView], blocks: Sequence[Block], recovery: Recovery
) -> list[Update]:
    """What is tuned of a model: Q, K, V and O of these attentions and their biases, each parameter once.

    Args:
        model: the whole model.
        views: the attention modules.
        blocks: the blocks, whose norms are tuned as well where that is asked for.
        recovery: says that, and the rank of updates of weights; biases and norms are tuned themselves.
    """
    lora, chance = recovery.lora, torch.Generator("cpu").manual_seed(recovery.seed)
    slots: dict[int, list[Slot]] = {}
    for view in views:
        owner = view.owner("o")
        bias = owner._parameters.get("bias")
        beside = [] if bias is None else [Slot(owner, "bias", len(bias))]
        for slot in (*view.slots.values(), *beside):
            slots.setdefault(id(slot.parameter), []).append(slot)
    found: list[Update] = []
    for users in slots.values():
        parameter, mask = users[0].parameter, _mask(users)
        low = lora is not None and mask is None and parameter.dim() == 2 and min(parameter.shape) > lora
        found.append(LowRank(parameter, lora or 0, chance) if low else Whole(parameter, mask))
    if recovery.norms:
        found += [Whole(one) for one in norms_of(model, blocks) if id(one) not in slots]
    return found


def _mask(users: Sequence[Slot]) -> Tensor | None:
    """1 for the channels of these slots of one parameter, 0 for others; None where they are all of it."""
    parameter, axis = users[0].parameter, users[0].axis
    taken = {place for slot in users for place in slot.places}
    if any(slot.axis != axis for slot in users) or len(taken) == parameter.shape[axis]:
        return None
    mask = torch.zeros(parameter.shape[axis], dtype=parameter.dtype, device=parameter.device)
    mask[torch.tensor(sorted(taken), dtype=torch.long, device=mask.device)] = 1
    return mask.reshape([-1 if dim == axis else 1 for dim in range(parameter.dim())])


def norms_of(model: nn.Module, blocks: Sequence[Block]) -> list[nn.Parameter]:
    """Weights and biases of the norms in some blocks, each once."""
    found: dict[int, nn.Parameter] = {}
    for block in blocks:
        for module in model.get_submodule(block.name).modules():
            if "norm" in type(module).__name__.lower():
                own = (one for one in module._parameters.values() if one is not None and one.is_floating_point())
                found.update((id(one), one) for one in own)
    return list(found.values())


def _size(tensor: Tensor) -> float:
    """The root mean square of a tensor, at least :data:`FLOOR`."""
    return max(float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0, FLOOR)
