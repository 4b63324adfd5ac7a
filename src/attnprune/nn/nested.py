"""Tensors inside mappings, lists and tuples: :func:`tensors_in`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in a value, at any depth of mappings, lists and tuples, in their order.

    >>> import torch
    >>> [x.item() for x in tensors_in({"a": torch.tensor(1), "b": [torch.tensor(2), (3, torch.tensor(4))]})]
    [1, 2, 4]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from tensors_in(one)
