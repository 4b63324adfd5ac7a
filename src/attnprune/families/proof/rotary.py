"""Whether channels of a head may be mixed, and which a rotary embedding rotates together: found by doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...values.layout import Kind
from ...values.spec import Rotary
from ..calls import ANGLES, Arguments, Call
from .stand_in import StandIn

STYLES: tuple[Rotary, ...] = ("half", "interleaved")


def rotary_of(stand_in: StandIn, call: Call, same: Callable[[Call, Sequence[Callable[[], None]]], bool]) -> Any:
    """The style of a host's rotary embedding and how many channels of a head it rotates; ("none", 0) if it has none.

    Where two channels of a head are rotated by one angle, rotating them further by any angle, in queries and keys
    alike, changes no product; any other two it tells apart. Norms between projection and product run without weights
    meanwhile, so that they see only lengths.

    Args:
        stand_in: the host, as it was found afterwards.
        call: a plain call.
        same: ``same(call, changes)``: whether the output stays where every change of the weights is made.
    """
    spec = stand_in.view.spec
    dim = spec.qk_dim
    saved = [(p, p.detach().clone()) for p in stand_in.host.parameters()]
    try:
        with torch.no_grad():
            _plain_norms(stand_in)
            for style in STYLES:
                structured, width = _structured(call, style)
                if same(structured, [lambda: _rotate(stand_in, "none", 0)]):
                    return "none", 0
                for turned in dict.fromkeys([width or dim, 2 * width, dim, dim // 2, dim // 4, 3 * dim // 4]):
                    rotate = lambda style=style, turned=turned: _rotate(stand_in, style, turned)  # noqa: E731
                    if turned and turned % 2 == 0 and turned <= dim and same(structured, [rotate]):
                        return style, turned
    finally:
        with torch.no_grad():
            for parameter, values in saved:
                parameter.copy_(values)
    return "none", 0


def _plain_norms(stand_in: StandIn) -> None:
    """Weights of norms are 1 and their biases 0."""
    slots = {id(slot.parameter) for slot in stand_in.view.slots.values()}
    for name, parameter in stand_in.host.named_parameters():
        if parameter.dim() == 1 and id(parameter) not in slots and parameter.is_floating_point():
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def _structured(call: Call, style: Rotary) -> tuple[Call, int]:
    """The call with one angle for each pair, and the width of its tables; 0 if it has none."""
    widths: list[int] = []

    def paired(x: Tensor) -> Tensor:
        half = x[..., : x.shape[-1] // 2]
        return torch.cat([half, half], -1) if style == "half" else half.repeat_interleave(2, -1)

    def arguments(generator: torch.Generator, dtype: torch.dtype) -> list[Arguments]:
        found = call.arguments(generator, dtype)
        for step in found:
            for name, value in step.items():
                if name in ANGLES and isinstance(value, tuple) and value[0].shape[-1] % 2 == 0:
                    widths.append(int(value[0].shape[-1]))
                    step[name] = tuple(paired(x) for x in value)
        return found

    arguments(torch.Generator("cpu").manual_seed(0), torch.float64)
    return replace(call, arguments=arguments), widths[0] if widths else 0


def _rotate(stand_in: StandIn, style: Rotary, turned: int) -> None:
    """Rotates every pair of a head by an angle of its own, and the rest of it by any rotation."""
    view, layout = stand_in.view, stand_in.view.spec.layout
    generator = torch.Generator("cpu").manual_seed(11)
    for key in range(view.spec.kv_heads):
        dim = layout.qk[key]
        matrix = torch.zeros(dim, dim, dtype=torch.float64)
        angles = torch.rand(turned // 2, generator=generator, dtype=torch.float64) * 6
        for (i, j), angle in zip(_pairs(style, turned), angles, strict=True):
            matrix[i, i] = matrix[j, j] = angle.cos()
            matrix[i, j], matrix[j, i] = -angle.sin(), angle.sin()
        rest = torch.randn(dim - turned, dim - turned, generator=generator, dtype=torch.float64)
        if rest.numel():
            matrix[turned:, turned:] = torch.linalg.qr(rest)[0]
        for name, slot in view.slots.items():
            side = name.split(".")[0]
            if side not in ("q", "k"):
                continue
            for head in [key] if side == "k" else layout.queries(key):
                start, stop = layout.span(view.side(name), head)
                channels = slot.cut(slot.parameter.detach())[start:stop]
                flat = channels.reshape(dim, prod(channels.shape[1:]))
                slot.write((matrix.to(flat.dtype) @ flat).view_as(channels), start)


def mix(stand_in: StandIn, kind: Kind) -> None:
    """Mixes the channels of a key head, and of its query heads, by a random invertible map that changes no product."""
    view, layout = stand_in.view, stand_in.view.spec.layout
    key = min(1, view.spec.kv_heads - 1)
    dim = layout.dims(kind)[key]
    dtype = next(iter(view.slots.values())).parameter.dtype
    noise = torch.randn(dim, dim, generator=torch.Generator("cpu").manual_seed(9), dtype=dtype)
    matrix = 0.3 * noise + torch.eye(dim, dtype=dtype)
    dual = torch.linalg.inv(matrix).mT
    for name, slot in view.slots.items():
        side = name.split(".")[0]
        if side not in tuple(kind):
            continue
        for head in [key] if side in ("k", "v") else layout.queries(key):
            start, stop = layout.span(view.side(name), head)
            channels = slot.cut(slot.parameter.detach())[start:stop]
            mixed = (matrix if side == kind[0] else dual) @ channels.reshape(dim, -1)
            slot.write(mixed.view_as(channels), start)


def _pairs(style: Rotary, turned: int) -> Iterator[tuple[int, int]]:
    half = turned // 2
    yield from ((i, i + half) if style == "half" else (2 * i, 2 * i + 1) for i in range(half))
