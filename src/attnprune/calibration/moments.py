"""Second moments of what runs through attention: :class:`Moments`, :class:`LayerMoments`, :class:`Calibration`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..values.layout import PROJECTIONS, Kind, Projection
from ..values.spec import AttentionSpec
from .processes import add_up, pooled, sharing

FORMAT = "attnprune.calibration"
FACTS = ("across_heads", "relative", "reads")
"""What is stored of a layer's moments beside numbers."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Count, mean and scatter of vectors, for several groups at once; float64. Merging is exact and in any order.

    Half of a symmetric matrix is kept, as a model has many of them while gates take their gradients.

    >>> x = torch.arange(12, dtype=torch.float64).reshape(6, 1, 2)  # 6 vectors of 2 channels, one group
    >>> whole, parts = Moments.of(x), Moments.of(x[:1]).merge(Moments.of(x[1:]))
    >>> torch.equal(whole.mean, parts.mean), torch.allclose(whole.covariance, parts.covariance)
    (True, True)
    """

    count: float
    """Number of vectors."""
    mean: Tensor
    """``(groups, channels)``."""
    packed: Tensor
    """``(groups, channels * (channels + 1) / 2)``: the lower triangles of :attr:`scatter`, row by row."""

    @classmethod
    def zero(cls, groups: int, channels: int) -> Moments:
        """Moments of nothing."""
        zeros = torch.zeros(groups, channels, channels, device="cpu", dtype=torch.float64)
        return cls.full(0.0, zeros[..., 0].clone(), zeros)

    @classmethod
    def full(cls, count: float, mean: Tensor, scatter: Tensor) -> Moments:
        """From whole scatter matrices; their upper triangles are not read."""
        rows, columns = torch.tril_indices(*scatter.shape[1:], device="cpu")
        return cls(count, mean, scatter[:, rows, columns])

    @property
    def scatter(self) -> Tensor:
        """``(groups, channels, channels)``: the sum of outer products of deviations from the mean; made when asked."""
        groups, channels = self.mean.shape
        rows, columns = torch.tril_indices(channels, channels, device="cpu")
        whole = self.packed.new_empty(groups, channels, channels)
        whole[:, rows, columns] = self.packed
        whole[:, columns, rows] = self.packed
        return whole

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Of vectors ``(count, groups, channels)``."""
        running = Running(*x.shape[1:])
        running.add(x)
        return running.moments()

    def merge(self, other: Moments) -> Moments:
        """Moments of both samples together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        rows, columns = torch.tril_indices(apart.shape[1], apart.shape[1], device="cpu")
        between = apart[:, rows] * apart[:, columns] * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), self.packed + other.packed + between)

    @property
    def covariance(self) -> Tensor:
        """``(groups, channels, channels)``; zero where nothing was seen."""
        return self.scatter / max(self.count, 1.0)

    @property
    def second(self) -> Tensor:
        """``(groups, channels, channels)``: the mean outer product, of values and not of deviations."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


class Running:
    """Moments while they grow: products in float32 (float64 stays), sums in float64, about the first batch's mean.

    Args:
        groups: number of groups.
        channels: channels of each.
        centred: the vectors are deviations already: their mean is taken to be zero.
    """

    def __init__(self, groups: int, channels: int, centred: bool = False) -> None:
        self.count, self.centred = 0, centred
        self.shift: Tensor | None = None
        self.sum = torch.zeros(groups, channels, device="cpu", dtype=torch.float64)
        self.products = torch.zeros(groups, channels, channels, device="cpu", dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Adds vectors ``(count, groups, channels)``."""
        if not len(x):
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.centred:
            if self.shift is None:
                self.shift = x.mean(0)
            x = x - self.shift.to(x)
            self.sum += x.sum(0, dtype=torch.float64).cpu()
        self.count += len(x)
        x = x.transpose(0, 1)
        self.products += (x.transpose(1, 2) @ x).cpu()

    def moments(self) -> Moments:
        """Of all vectors so far; uses up what was summed."""
        mean, scatter = torch.zeros_like(self.sum), self.products
        self.products = scatter[:0]
        if self.count and self.shift is not None:
            apart = self.sum / self.count
            mean = self.shift.cpu().double() + apart
            scatter.baddbmm_(apart[:, :, None], apart[:, None, :], alpha=-self.count)
        return Moments.full(float(self.count), mean, scatter)


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """What calibration knows of one attention. Channels are in stored order; per head, lists are in logical order."""

    spec: AttentionSpec
    q: tuple[Moments, ...]
    """Queries: one for every bucket of like heads, groups are query heads."""
    k: tuple[Moments, ...]
    """Keys, groups are key heads: as deviations from the mean of their own sequence, as a constant added to all keys
    changes no softmax."""
    c: tuple[Moments, ...]
    """Contexts (what O reads): for every bucket, or one for all heads together."""
    relative: bool = False
    """Whether keys were counted as queries see them, rotated by the difference of their places (rotary embeddings)."""
    x: tuple[Moments, ...] = ()
    """Of what Q, K and V read, in this order, one group each; empty unless asked for."""

    @classmethod
    def zero(cls, spec: AttentionSpec, across_heads: bool, relative: bool = False, reads: bool = False) -> LayerMoments:
        """Of nothing."""
        buckets = spec.layout.buckets
        q, k, c = (
            tuple(Moments.zero(len(heads), dim) for heads, dim in sizes)
            for sizes in (
                [(b.heads, b.qk_dim) for b in buckets],
                [(b.keys, b.qk_dim) for b in buckets],
                [(b.heads, b.vo_dim) for b in buckets],
            )
        )
        x = tuple(Moments.zero(1, spec.width(p)) for p in PROJECTIONS[:3]) if reads else ()
        return cls(spec, q, k, (Moments.zero(1, spec.layout.channels("o")),) if across_heads else c, relative, x)

    @property
    def reads(self) -> bool:
        """Whether it knows what Q, K and V read, as their refit needs where they leave features out."""
        return bool(self.x)

    @property
    def across_heads(self) -> bool:
        """Whether contexts of different heads were compared, as a refit of O across heads needs."""
        return len(self.c) == 1 and self.c[0].mean.shape[1] == self.spec.layout.channels("o")

    def merge(self, other: LayerMoments) -> LayerMoments:
        """Of both samples together."""
        same = self.relative == other.relative or not self.tokens["qk"] or not other.tokens["qk"]
        alike = self.across_heads == other.across_heads and self.reads == other.reads
        if self.spec != other.spec or not alike or not same:
            raise CalibrationError(
                f"{self.spec.name}: calibration", self._describe(), other._describe(), "merge what one model gave"
            )
        pairs = zip(self.parts(), other.parts(), strict=True)
        q, k, c, x = (tuple(a.merge(b) for a, b in zip(*pair, strict=True)) for pair in pairs)
        return LayerMoments(self.spec, q, k, c, self.relative or other.relative, x)

    def renamed(self, name: str) -> LayerMoments:
        """The same for an attention of another name."""
        return replace(self, spec=replace(self.spec, name=name))

    def parts(self) -> tuple[tuple[Moments, ...], ...]:
        """Those of queries, keys, contexts, and of what Q, K and V read."""
        return self.q, self.k, self.c, self.x

    def _describe(self) -> str:
        keys = (", keys rotated" if self.relative else "") + (", inputs" if self.reads else "")
        return f"{self.spec.describe()}, contexts {'across' if self.across_heads else 'by'} heads{keys}"

    def queries(self) -> list[Tensor]:
        """Per query head ``(qk_dim, qk_dim)``: mean outer products of its queries."""
        return self._by_head([one.second for one in self.q], "q")

    def keys(self) -> list[Tensor]:
        """Per key head ``(qk_dim, qk_dim)``: covariance of its keys within a sequence."""
        return self._by_head([one.covariance for one in self.k], "k")

    def contexts(self, centred: bool) -> list[Tensor]:
        """Per query head ``(vo_dim, vo_dim)``: covariance of its context, or (not centred) mean outer products."""
        if not self.across_heads:
            return self._by_head([one.covariance if centred else one.second for one in self.c], "o")
        whole = (self.c[0].covariance if centred else self.c[0].second)[0]
        return [whole[start:stop, start:stop] for start, stop in self.spec.layout.spans("o")]

    def context_means(self) -> list[Tensor]:
        """Per query head ``(vo_dim,)``."""
        if not self.across_heads:
            return self._by_head([one.mean for one in self.c], "o")
        return [self.c[0].mean[0, start:stop] for start, stop in self.spec.layout.spans("o")]

    def context(self, centred: bool) -> Tensor:
        """``(channels, channels)`` over all heads, in logical order; zero between heads if they were not compared."""
        if not self.across_heads:
            apart: Tensor = torch.block_diag(*self.contexts(centred))  # type: ignore[no-untyped-call]
            return apart
        order = [channel for span in self.spec.layout.spans("o") for channel in range(*span)]
        whole = (self.c[0].covariance if centred else self.c[0].second)[0]
        return whole[order][:, order]

    def _by_head(self, parts: list[Tensor], projection: Projection) -> list[Tensor]:
        found = [row for part in parts for row in part]
        stored = self.spec.layout.stored(projection)
        return [row for _, row in sorted(zip(stored, found, strict=True), key=lambda pair: pair[0])]

    def map(self, change: Callable[[Moments], Moments]) -> LayerMoments:
        """With every part changed."""
        q, k, c, x = (tuple(change(one) for one in part) for part in self.parts())
        return LayerMoments(self.spec, q, k, c, self.relative, x)

    @property
    def tokens(self) -> dict[Kind, float]:
        """How many queries (qk) and contexts (vo) were counted."""
        return {"qk": self.q[0].count, "vo": self.c[0].count}


class Calibration(Mapping[str, LayerMoments]):
    """Second moments of queries, keys and contexts of a model's attention modules, by name.

    Made by :func:`attnprune.calibrate`; may be kept, resumed, merged, and used for any number of plans.
    """

    def __init__(self, layers: Mapping[str, LayerMoments]) -> None:
        self._layers = dict(layers)

    def __getitem__(self, name: str) -> LayerMoments:
        return self._layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def __repr__(self) -> str:
        tokens = max((layer.tokens["qk"] for layer in self.values()), default=0.0)
        return f"Calibration({len(self)} attention modules, {tokens:,.0f} queries each at most)"

    def merge(self, other: Calibration) -> Calibration:
        """Of both samples together; layers that only one of them knows are kept.

        Raises:
            CalibrationError: the two are of different models.
        """
        both = {name: layer.merge(other[name]) if name in other else layer for name, layer in self.items()}
        return Calibration({**both, **{name: layer for name, layer in other.items() if name not in both}})

    def reduce(self, group: Any = None) -> Calibration:
        """The calibration of all processes of a ``torch.distributed`` group together; all of them must call it."""
        return self._total(partial(add_up, group=group))

    def pooled(self) -> Calibration:
        """:meth:`reduce` inside :func:`attnprune.across_processes`; itself elsewhere."""
        return self._total(pooled) if sharing() else self

    def _total(self, add: Callable[[list[Tensor]], list[Tensor]]) -> Calibration:
        def total(one: Moments) -> Moments:
            number = torch.tensor(one.count, device="cpu", dtype=torch.float64)
            count, sums, products = add([number, one.mean * one.count, one.second * one.count])
            n = max(float(count), 1.0)
            mean = sums / n
            return Moments.full(float(count), mean, products - n * mean[:, :, None] * mean[:, None, :])

        return Calibration({name: layer.map(total) for name, layer in self.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors alone, ready for ``torch.save`` or safetensors; the specs are bytes of JSON under one key."""
        specs = [
            {"spec": layer.spec.to_dict(), **{key: getattr(layer, key) for key in FACTS}} for layer in self.values()
        ]
        head = json.dumps({"format": FORMAT, "version": 1, "layers": specs}).encode()
        found = {"header": torch.frombuffer(bytearray(head), dtype=torch.uint8)}
        for name, layer in self.items():
            for key, part in zip("qkcx", layer.parts(), strict=True):
                for i, one in enumerate(part):
                    place = f"{name}/{key}{i}"
                    found[f"{place}/count"] = torch.tensor(one.count, device="cpu", dtype=torch.float64)
                    found[f"{place}/mean"], found[f"{place}/scatter"] = one.mean, one.scatter
        return found

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Calibration:
        """Reads :meth:`state_dict`.

        Raises:
            CalibrationError: tensors are missing, of another shape, or not finite.
        """
        try:
            header = json.loads(bytes(state["header"].tolist()))
            if header["format"] != FORMAT or header["version"] != 1:
                raise ValueError(f"format {header['format']!r}, version {header['version']!r}")
            layers = [
                LayerMoments.zero(AttentionSpec.from_dict(one["spec"]), *(one.get(key) is True for key in FACTS))
                for one in header["layers"]
            ]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CalibrationError(
                "calibration", "a state written by Calibration.state_dict", repr(error)[:80], "write it anew"
            ) from error
        found = {}
        for layer in layers:
            name = layer.spec.name
            q, k, c, x = (
                tuple(_read(state, f"{name}/{key}{i}", zero) for i, zero in enumerate(part))
                for key, part in zip("qkcx", layer.parts(), strict=True)
            )
            found[name] = LayerMoments(layer.spec, q, k, c, layer.relative, x)
        return cls(found)


def _read(state: Mapping[str, Tensor], place: str, like: Moments) -> Moments:
    expected = {"count": torch.Size([]), "mean": like.mean.shape, "scatter": like.scatter.shape}
    found = {}
    for key, shape in expected.items():
        value = state.get(f"{place}/{key}")
        if not isinstance(value, Tensor) or value.shape != shape or not bool(value.isfinite().all()):
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise CalibrationError(
                f"calibration: {place}/{key}", f"finite numbers of shape {tuple(shape)}", got, "write it anew"
            )
        found[key] = value.double().cpu()
    return Moments.full(float(found["count"]), found["mean"], found["scatter"])
