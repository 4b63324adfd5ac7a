"""How much each unit of an attention matters: :class:`Scores`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, ScorerError
from .layout import KINDS, Kind
from .spec import AttentionSpec
from .tables import html_table

LARGEST = 1e290  # sums of more would overflow


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Importance of the units of one attention module; the lowest is removed first.

    Kept as float64 on the CPU. Where heads are ragged, places beyond a head's own dim are ignored. Notebooks show a
    table of it.

    >>> scores = Scores(qk=torch.ones(2, 4), vo=torch.ones(2, 4), head=torch.ones(2))
    >>> scores.qk.shape, scores.head.dtype
    (torch.Size([2, 4]), torch.float64)
    >>> scores
    Scores(qk: 2 x 4 from 1 to 1; vo: 2 x 4 from 1 to 1; head: 2 from 1 to 1)
    """

    qk: Tensor
    """``(key heads, qk_dim)``: channels of the dot product."""
    vo: Tensor
    """``(key heads, vo_dim)``: channels that the head carries out."""
    head: Tensor
    """``(heads,)``: whole query heads."""

    def __post_init__(self) -> None:
        for key in ("qk", "vo", "head"):
            value = getattr(self, key)
            tensor = value.detach().cpu() if isinstance(value, Tensor) else torch.as_tensor(value, device="cpu")
            object.__setattr__(self, key, tensor.to(torch.float64))

    def of(self, kind: Kind) -> Tensor:
        """The channel scores of ``"qk"`` or ``"vo"``."""
        return self.qk if kind == "qk" else self.vo

    def plus(self, other: Scores) -> Scores:
        """The sum of both, unit by unit."""
        return Scores(self.qk + other.qk, self.vo + other.vo, self.head + other.head)

    def plot(self, path: str | os.PathLike[str] | None = None, *, name: str = "") -> Any:
        """A picture of every channel, a row per head. Needs matplotlib.

        :func:`attnprune.plots.scores` draws those of a whole model.

        Args:
            path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).
            name: the attention's, for the title.

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        plots = import_module(__name__.partition(".")[0]).plots  # by its public name: values import nothing above them
        return plots.channels(self, name=name, path=path)

    def check(self, spec: AttentionSpec) -> None:
        """Shapes as the spec has them, every score finite.

        Raises:
            ScorerError: a shape is not the spec's.
            NonFiniteError: a score of a unit that exists is NaN or infinite.
        """
        expected = {"qk": (spec.kv_heads, spec.qk_dim), "vo": (spec.kv_heads, spec.vo_dim), "head": (spec.heads,)}
        for key, shape in expected.items():
            found = tuple(getattr(self, key).shape)
            if found != shape:
                raise ScorerError(
                    f"{spec.name}: scores.{key}", f"shape {shape}", f"{found}", "Return one score per unit of the spec"
                )
        for kind in KINDS:
            real = exists(spec, kind)
            self._check_finite(spec, kind, self.of(kind)[real])
        self._check_finite(spec, "head", self.head)

    def __repr__(self) -> str:
        told = ((key, getattr(self, key)) for key in (*KINDS, "head"))
        return f"Scores({'; '.join(f'{key}: {_size(values)}{_range(values)}' for key, values in told)})"

    def _repr_html_(self) -> str:
        keys, heads = len(self.qk), len(self.head)
        shared = heads // keys if keys and heads % keys == 0 else 0  # query heads of a key head
        rows = []
        for key in range(keys):
            wholes = self.head[key * shared : (key + 1) * shared].tolist()
            middle = [text for kind in KINDS for text in _middle(self.of(kind)[key])]
            rows.append([str(key), *middle, ", ".join(f"{value:.3g}" for value in wholes)])
        columns = [f"{kind} channels, {what}" for kind in KINDS for what in ("least", "mean", "most")]
        first, last = ("head", "whole head") if shared == 1 else ("key head", "its heads")
        return html_table([first, *columns, last], rows, ["the lowest go first"])

    @staticmethod
    def _check_finite(spec: AttentionSpec, key: str, values: Tensor) -> None:
        bad = int((~(values.abs() < LARGEST)).sum())
        if bad:
            raise NonFiniteError(
                f"{spec.name}: scores.{key}",
                "finite scores",
                f"{bad} of {values.numel()} NaN, infinite or above {LARGEST:g}",
                "Look for overflow in the loss or in the scorer; bf16 or float32 gradients overflow less than float16",
            )


def exists(spec: AttentionSpec, kind: Kind) -> Tensor:
    """``(key heads, dim)`` bool: which places of a score matrix are channels of the module (all, unless ragged)."""
    dims = torch.tensor(spec.dims(kind), device="cpu")
    return torch.arange(int(dims.max()), device="cpu") < dims[:, None]


def _finite(values: Tensor) -> Tensor:
    """Places beyond a ragged head's own dim may hold anything."""
    return values[values.isfinite()]


def _middle(values: Tensor) -> list[str]:
    """The least, the mean and the most."""
    real = _finite(values)
    if not real.numel():
        return ["-"] * 3
    return [f"{float(value):.3g}" for value in (real.min(), real.mean(), real.max())]


def _size(values: Tensor) -> str:
    return " x ".join(map(str, values.shape))


def _range(values: Tensor) -> str:
    least, _, most = _middle(values)
    return "" if least == "-" else f" from {least} to {most}"
