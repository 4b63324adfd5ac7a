"""Which multiples of channels devices of a kind like: what ``round_to="auto"`` means where nothing is measured."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..calibration.batches import device_named
from ..families.base import AttentionView
from ..values.spec import AttentionSpec

LEVELS = 4
"""Multiples that a head's dim holds at least, so that there is something to choose from."""


def liked_multiple(device: str | torch.device, dtype: torch.dtype) -> int:
    """Channels per head in whose multiples a device's kernels run best.

    On a CPU the floats of one vector register (16 with AVX-512, else 8). On CUDA 8 for half precision, which is what
    tensor cores and the flash kernel want, and 4 for float32 (16 bytes, the alignment of the memory-efficient kernel).

    Raises:
        OptionError: no kind of device; it need not be here.

    >>> liked_multiple("cuda", torch.bfloat16)
    8
    """
    device = device_named(device, here=False)
    if device.type == "cuda":
        return 8 if dtype.itemsize <= 2 else 4
    if device.type == "cpu":
        return 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return 8


def rounding(specs: Sequence[AttentionSpec], device: str | torch.device, dtype: torch.dtype) -> int:
    """The device's multiple, or the largest half, quarter ... of it of which the smallest head holds four.

    >>> specs = [AttentionSpec.of("attention", heads=12, head_dim=64, d_model=768)]
    >>> rounding(specs, "cuda", torch.float16)
    8
    """
    return min(liked_multiple(device, dtype), most_levels(specs))


def most_levels(specs: Sequence[AttentionSpec]) -> int:
    """The largest power of two of which the smallest head holds four.

    >>> most_levels([AttentionSpec.of("attention", heads=12, head_dim=80, d_model=960)])
    16
    """
    smallest = min(min(*spec.qk_dims, *spec.vo_dims) for spec in specs)
    return int(2 ** (max(smallest // LEVELS, 1).bit_length() - 1))


def auto_rounding(views: Sequence[AttentionView], granularity: str) -> int:
    """What ``round_to="auto"`` means for these modules where they are and nothing is measured; whole heads are not
    rounded."""
    weight = views[0].weight("q")
    return 1 if granularity == "head" else rounding([view.spec for view in views], weight.device, weight.dtype)
