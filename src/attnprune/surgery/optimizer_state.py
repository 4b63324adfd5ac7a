"""What an optimizer knows about a parameter, for what comes in the parameter's place: :func:`carried`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OptimizerStateError
from ..nn.nested import tensors_in
from .changes import ParamChange
from .maps import Pick

SQUARES = ("sum", "acc_delta")  # beside names that contain "sq" (exp_avg_sq, max_exp_avg_sq, square_avg)
GRADIENTS = ("avg", "momentum", "grad", "prev")  # parts of names: exp_avg, momentum_buffer, grad_avg, Rprop's prev
WEIGHTS = ("ax", "old_p", "slow_param", "slow_buffer")  # averages and copies of it: ASGD's, SAM's, Lookahead's
_ANEW = "make the optimizer anew after pruning"


def carried(change: ParamChange, state: Mapping[str, Any]) -> dict[str, Any]:
    """The state of an old parameter, for the new one.

    Running means of gradients follow by the chain rule, those of squares by the squares of that map, averages of the
    parameter as the parameter itself, and step sizes are averaged.

    Raises:
        OptimizerStateError: state whose meaning or form is not known.
    """
    return {key: _value(change, key, value) for key, value in state.items()}


def _value(change: ParamChange, key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        return type(value)({name: _value(change, key, one) for name, one in value.items()})  # type: ignore[call-arg]
    if type(value) in (list, tuple):
        return type(value)(_value(change, key, one) for one in value)
    if not isinstance(value, Tensor):
        if any(True for _ in _attributes(value)):
            raise _refused(key, "numbers, or tensors of the parameter's shape", f"a {type(value).__name__} of tensors")
        return value
    if type(value) not in (Tensor, nn.Parameter) or value.layout != torch.strided or value.is_quantized:
        raise _refused(key, "plain tensors", f"a {type(value).__module__}.{type(value).__qualname__}, or a sparse one")
    if value.shape == change.old.shape:
        return _moved(change, key, value)
    if value.dim() == 0 or value.numel() == 1:
        return value.clone()
    expected = f"state of the parameter's shape {tuple(change.old.shape)}, or a single number"
    raise _refused(key, expected, f"shape {tuple(value.shape)}")


def _moved(change: ParamChange, key: str, value: Tensor) -> Tensor:
    mixed = change.map is not None and not isinstance(change.map, Pick)
    if not value.is_floating_point():
        if mixed or change.gain != 1:
            raise _refused(key, "floating-point state, as channels are mixed", f"{value.dtype}", mixed=True)
        return change.carry(value)
    exact = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if key == "exp_inf":  # Adamax: a maximum of absolute values
        found = change.carry(exact.square(), squared=True).sqrt()
    elif key == "step_size":  # Rprop: as large as the weight that it moves
        found = change.average(exact)
    elif key in WEIGHTS:
        found = change.move(exact)
    elif "sq" in key or key in SQUARES:
        found = change.carry(exact, squared=True)
    elif mixed and not any(part in key for part in GRADIENTS):
        raise _refused(
            key, "state whose meaning is known, as channels are mixed", "a name of no known kind", mixed=True
        )
    else:
        found = change.carry(exact)
    return found.to(value.dtype)


def _refused(key: str, expected: str, found: str, *, mixed: bool = False) -> OptimizerStateError:
    remedy = f'{_ANEW}, or keep channels as they stand (basis="channels", compensate=False)' if mixed else _ANEW
    return OptimizerStateError(f"optimizer.state[...][{key!r}]", expected, found, remedy)


def _attributes(value: Any) -> Iterator[Tensor]:
    for one in getattr(value, "__dict__", {}).values():
        yield from tensors_in(one)
