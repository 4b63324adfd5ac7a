"""What one launch of our kernel has to know of heads that may differ: :class:`Table`."""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ...values.layout import HeadLayout
from ..kept import kept

LEAST = 16
"""Channels that a product of a GPU's matrix units takes at least."""


class Table(NamedTuple):
    """Heads in the order in which programs take them, the large ones first."""

    entries: tuple[tuple[int, int, int, int, int, int, int], ...]
    """Per head: qk and vo dim; first channel in Q, K, V and O; its row in masks."""
    large: int
    """How many heads are large."""
    blocks: tuple[int, ...]
    """Channels of the first and second block of qk, and of vo, of large heads; then of small ones, zeros if none."""
    even: tuple[int, int]
    """The qk and vo dim, where all heads have the same; else zeros."""
    align: int
    """A power of two, up to 16, of which dims and first channels are multiples."""

    @property
    def heads(self) -> int:
        """How many query heads there are."""
        return len(self.entries)

    def rows(self, device: torch.device) -> Tensor:
        """The entries as int32, made once."""
        return _rows(self.entries, device)


@kept
def _rows(entries: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32, device=device)


def blocks(dim: int) -> tuple[int, int]:
    """The one or two blocks of channels, powers of two, that cover a dim with the least beyond it.

    >>> [blocks(dim) for dim in (5, 16, 24, 33, 48, 64, 72, 100)]
    [(16, 0), (16, 0), (32, 0), (32, 16), (32, 16), (64, 0), (64, 16), (128, 0)]
    """
    whole = max(LEAST, 1 << (dim - 1).bit_length())
    first = whole // 2
    rest = max(LEAST, 1 << max(dim - first - 1, 0).bit_length())
    return (first, rest) if first >= LEAST and first + rest < whole else (whole, 0)


def _cost(dims: list[tuple[int, int]]) -> int:
    """Channels that heads of these qk and vo dims work on, all in blocks of the largest."""
    return len(dims) * sum(sum(blocks(max(some))) for some in zip(*dims, strict=True)) if dims else 0


@lru_cache(maxsize=4096)
def table_of(layout: HeadLayout) -> Table:
    """The heads of a layout, in two sizes where that leaves less padding than one.

    >>> table = table_of(HeadLayout(qk=(8, 48, 16), vo=(16, 40, 9)))
    >>> [entry[:2] for entry in table.entries], table.large, table.blocks
    ([(48, 40), (8, 16), (16, 9)], 1, (32, 16, 32, 16, 16, 0, 16, 0))
    """
    key_of, spans = layout.key_of, {p: layout.spans(p) for p in ("q", "k", "v", "o")}
    dims = [(layout.qk[key], layout.vo[key]) for key in key_of]
    order = sorted(range(layout.heads), key=lambda head: (-sum(sum(blocks(dim)) for dim in dims[head]), head))
    ordered = [dims[head] for head in order]
    large = min(range(1, len(order) + 1), key=lambda count: (_cost(ordered[:count]) + _cost(ordered[count:]), -count))
    found: list[int] = []
    for some in (ordered[:large], ordered[large:]):
        found += [size for sides in zip(*some, strict=True) for size in blocks(max(sides))] if some else [0] * 4
    entries = tuple(
        (*dims[head], spans["q"][head][0], spans["k"][key_of[head]][0], spans["v"][key_of[head]][0],
         spans["o"][head][0], head)
        for head in order
    )  # fmt: skip
    align = gcd(16, *(number for entry in entries for number in entry[:6]))
    return Table(entries, large, tuple(found), dims[0] if layout.uniform else (0, 0), align)


def sizes(table: Table, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps and stages of the pipeline.

    64, 64, 4 and 3 are what a plain kernel of this kind was measured with on an H100 for dims up to 64, in half
    precision; the rest follows from what fits its shared memory, and was not measured.
    """
    widest = max(table.blocks[0] + table.blocks[1], table.blocks[2] + table.blocks[3])
    if dtype == torch.float32:
        return (32, 32, 4, 2) if widest <= 64 else (16, 32, 4, 1)
    if widest <= 64:
        return 64, 64, 4, 3
    return (64, 64, 4, 2) if widest <= 128 else (64, 32, 4, 1)
