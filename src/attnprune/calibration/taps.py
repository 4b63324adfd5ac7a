"""One pass over unlabelled data that keeps second moments alone: :func:`calibrate`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, DataError, NonFiniteError, OptionError
from ..families.base import AttentionView
from ..families.registry import find_views, plain
from ..nn.kept import ordinary
from ..nn.rotary import Turning, rotated_keys
from ..surgery import as_called, check_views
from ..values.choices import Choices
from .batches import batches, device_of, forward, of_one_dtype
from .inputs import Inputs, batch_first, same, sequences, tokens_of
from .losses import LossFn
from .moments import Calibration, LayerMoments, Running
from .processes import agree
from .quiet import undisturbed
from .sample import Sample

QUERIES = 4
"""How many queries of a sequence, evenly spread, look at its rotated keys."""


@ordinary
def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    *,
    include: Choices | None = None,
    exclude: Choices | None = None,
    loss_fn: LossFn | None = None,
    across_heads: bool = True,
    reads: bool = False,
    resume: Calibration | None = None,
    progress: bool = True,
) -> Calibration:
    """Runs a model over data and keeps the second moments of queries, keys and contexts, per attention and head.

    Nothing of the data is stored. Tokens that no query attends to (padding) do not count, nor do queries that may
    attend to nothing. Dropout is off, gradients are off, and the model is left exactly as found.

    Args:
        model: any module with attention of a known family; may have been pruned before.
        data: an iterable of batches, as :func:`attnprune.prune_attention` takes; labels are not needed.
        include: glob patterns of names, classes, or functions of name and module; only these are calibrated.
        exclude: what to leave out.
        loss_fn: ``loss_fn(model, batch)``, for batches that the model cannot be called with; its result is not used.
        across_heads: also compare contexts of different heads, which a refit of O across heads needs. It takes
            ``(heads * vo_dim)^2`` numbers for an attention module instead of ``heads * vo_dim^2``.
        reads: also keep moments of what Q, K and V read, ``d_model^2`` numbers each, which ratios need that differ
            inside a pair.
        resume: an earlier calibration of the same model to add to.
        progress: whether to show a progress bar.

    Raises:
        DataError: no batch, or one that the model cannot be called with.
        NonFiniteError: queries, keys or contexts are NaN or infinite.
        CalibrationError: ``resume`` is of another model.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> calibration = calibrate(model, [torch.randn(8, 5, 32) for _ in range(3)])
    >>> calibration["self_attn"].tokens
    {'qk': 120.0, 'vo': 120.0}
    """
    model = plain(model)
    sample = Sample(None, data, loss_fn)

    def seen() -> Calibration:
        views = find_views(model, include, exclude, run=lambda: sample.quietly(model))
        check_views(model, views)
        return moments_of(model, views, sample.data, loss_fn, across_heads, progress, reads)

    found = agree(seen)
    if resume is None:
        return found
    if not isinstance(resume, Calibration):
        raise OptionError(
            "resume", "an attnprune.Calibration", f"a {type(resume).__name__}", "pass what calibrate gave"
        )
    return resume.merge(found)


def moments_of(
    model: nn.Module,
    views: Sequence[AttentionView],
    data: Iterable[Any] | None,
    loss_fn: LossFn | None = None,
    across_heads: bool = True,
    progress: bool = True,
    reads: bool = False,
) -> Calibration:
    """The moments of these attention modules over data."""
    with as_called(views) as tapped, undisturbed(model, ()), torch.no_grad(), ExitStack() as hooks:
        taps = [_Tap(view, across_heads, reads) for view in tapped]
        for tap in taps:
            tap.listen(hooks)
        for number, batch in enumerate(batches(data, device_of(model), progress, "calibration")):
            with of_one_dtype(model, batch):
                _ = forward(model, batch) if loss_fn is None else loss_fn(model, batch)
            for tap in taps:
                tap.check(number)
    return Calibration({tap.view.name: tap.moments() for tap in taps}).pooled()


def check_calibration(
    calibration: Calibration, views: Sequence[AttentionView], across_heads: bool, reads: bool = False
) -> None:
    """Raises CalibrationError unless a calibration is of these modules and knows what is needed."""
    for view in views:
        layer = calibration.get(view.name)
        where = f"{view.name or 'the model itself'}: calibration"
        if layer is None:
            raise CalibrationError(where, "moments of this attention module", "none", "calibrate it too")
        if layer.spec.layout != view.spec.layout:
            raise CalibrationError(
                where, f"moments of {view.spec.describe()}", layer.spec.describe(), "calibrate the model as it is now"
            )
        if across_heads and not layer.across_heads:
            raise CalibrationError(
                where, "contexts compared across heads", "contexts by heads", "calibrate with across_heads=True"
            )
        if reads and not layer.reads:
            raise CalibrationError(
                where, "moments of what Q, K and V read, as ratios differ inside a pair", "none",
                "calibrate with reads=True",
            )  # fmt: skip


class _Tap:
    """Listens to one attention: queries, keys and mask are kept until its context is there."""

    def __init__(self, view: AttentionView, across_heads: bool, reads: bool = False) -> None:
        self.view, self.across_heads = view, across_heads
        self.inputs = Inputs(view) if reads else None
        self.extra = view.constant_keys
        self.mask: Tensor | None = None
        self.turning: Turning | None = None
        self.relative = False
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}
        buckets = view.spec.layout.buckets
        self.q = [Running(len(b.heads), b.qk_dim) for b in buckets]
        self.k = [Running(len(b.keys), b.qk_dim, centred=True) for b in buckets]
        self.c = [Running(len(b.heads), b.vo_dim) for b in buckets]
        if across_heads:
            self.c = [Running(1, view.spec.layout.channels("o"))]

    def moments(self) -> LayerMoments:
        """What was heard."""
        q, k, c = (tuple(one.moments() for one in parts) for parts in (self.q, self.k, self.c))
        x = () if self.inputs is None else self.inputs.moments()
        return LayerMoments(self.view.spec, q, k, c, self.relative, x)

    def listen(self, hooks: ExitStack) -> None:
        handles = [
            self.view.module.register_forward_pre_hook(self._begin, with_kwargs=True),
            self.view.port("q").listen(self._keep("q")),
            self.view.port("k").listen(self._keep("k")),
            self.view.port("o").listen(self._end),
        ]
        if self.inputs is not None:
            handles.append(self.view.port("v").listen(self._keep("v")))
        for handle in handles:
            hooks.callback(handle.remove)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.clear()
        self.mask, self.turning = self.view.attended(args, kwargs), self.view.turning(args, kwargs)

    def _keep(self, projection: str) -> Any:
        def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self.seen.setdefault(projection, []).append((inputs[0], output))

        return keep

    def _end(self, module: nn.Module, inputs: tuple[Tensor, ...], context: Tensor) -> None:
        with torch.autocast(context.device.type, enabled=False):  # sums stay exact where the model runs in less
            self._add(context)

    def _add(self, context: Tensor) -> None:
        contexts = sequences(context)
        seen = self._of_these(contexts)
        if "q" not in seen:  # O runs once more in the same call, as for tokens that all attend to
            self._add_contexts(contexts, None)
            return
        q_input, q = seen["q"]
        queries, keys = sequences(q), None
        if "k" in seen:  # a cache may stand in for K
            keys = sequences(seen["k"][1])
        real_queries = real_keys = None
        if self.mask is not None:
            queries, contexts = (batch_first(x, self.mask) for x in (queries, contexts))
            keys = None if keys is None else batch_first(keys, self.mask)
            mask = self._fitted(self.mask, queries.shape[:2], None if keys is None else keys.shape[1])
            real_queries = mask.any(-1).any(1).expand(queries.shape[:2])
            if keys is not None:
                real_keys = mask.any(1).any(1).expand(keys.shape[:2])
                if same(q_input, seen["k"][0]):  # of a padded token, the query is padding too
                    real_queries = real_queries & real_keys
        if self.inputs is not None:
            self.inputs.add({p: sequences(x) for p, (x, _) in seen.items()}, self.mask, real_queries, real_keys)
        self.seen.clear()
        if self.turning is not None and keys is not None and len(self.turning.cos[0]) == keys.shape[1]:
            self._add_rotated(keys, self.turning)
            keys = None
        for i, b in enumerate(self.view.spec.layout.buckets):
            self.q[i].add(tokens_of(queries[..., b.qk_start : b.qk_stop], len(b.heads), real_queries))
            if keys is not None:
                own = keys[..., b.k_start : b.k_start + len(b.keys) * b.qk_dim]
                self._add_keys(self.k[i], own, b.k_start, len(b.keys), real_keys)
        self._add_contexts(contexts, real_queries)

    def _of_these(self, contexts: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """What projections read and wrote of the tokens of some contexts: they may run for other tokens too, or for
        relative positions."""
        calls, shape = self.seen.get("q", []), contexts.shape[:2]
        number = next((i for i, (_, q) in enumerate(calls) if sequences(q).shape[:2] == shape), len(calls) - 1)
        return {p: own[min(number, len(own) - 1)] for p, own in self.seen.items()}

    def _add_contexts(self, contexts: Tensor, real: Tensor | None) -> None:
        if self.across_heads:
            self.c[0].add(tokens_of(contexts, 1, real))
            return
        for moments, b in zip(self.c, self.view.spec.layout.buckets, strict=True):
            moments.add(tokens_of(contexts[..., b.vo_start : b.vo_stop], len(b.heads), real))

    def _fitted(self, mask: Tensor, queries: Sequence[int], keys: int | None) -> Tensor:
        """A mask for as many sequences and keys as there are; windows of a sample lie one after another, and masks of
        windows are those of every sample."""
        batch, _, rows, columns = mask.shape
        if keys is not None and columns > keys:  # the others lie in a cache
            mask, columns = mask[..., -keys:], keys
        if batch > 1 and queries[0] % batch == 0:
            mask = mask.repeat(queries[0] // batch, 1, 1, 1)
        fits = len(mask) in (1, queries[0]) and rows in (1, queries[1]) and (keys is None or columns in (1, keys))
        if fits:
            return mask
        if bool(mask.all()):  # it hides nothing
            return mask.new_ones(1, 1, 1, 1)
        raise DataError(
            f"{self.view.name}: attention_mask",
            f"a mask for {queries[0]} sequences of {queries[1]} queries{'' if keys is None else f' and {keys} keys'}",
            f"one of shape {tuple(self.mask.shape) if self.mask is not None else ()}",
            "calibrate on batches without padding, or exclude= this layer",
        )

    def _add_keys(self, running: Running, keys: Tensor, start: int, heads: int, real: Tensor | None) -> None:
        """Deviations of keys ``(batch, tokens, channels)`` from the mean of their own sequence."""
        if self.extra is not None:
            more = self.extra[:, start : start + keys.shape[-1]].to(keys)
            keys = torch.cat([keys, more.expand(len(keys), *more.shape)], dim=1)
            real = None if real is None else torch.cat([real, real.new_ones(len(keys), len(more))], dim=1)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        if real is None:
            running.add(tokens_of(keys - keys.mean(1, keepdim=True), heads, None))
            return
        keys = keys.masked_fill(~real[..., None], 0)
        mean = keys.sum(1, keepdim=True) / real.sum(1)[:, None, None].clamp_min(1)
        running.add(tokens_of(keys - mean, heads, real))

    def _add_rotated(self, keys: Tensor, turning: Turning) -> None:
        """Keys ``(batch, tokens, channels)`` as some queries see them, rotated by the difference of the two places:
        deviations from the mean of the keys that a query may attend to, near ones counting for more."""
        self.relative, layout = True, self.view.spec.layout
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        cos, sin = turning.cos.to(keys), turning.sin.to(keys)
        tokens = keys.shape[1]
        turned = rotated_keys(keys, cos, sin, layout, turning.pairs)
        causal = self.mask is None and getattr(self.view.module, "is_causal", False)
        for place in dict.fromkeys((i + 1) * tokens // QUERIES - 1 for i in range(QUERIES)):
            if place < 0:
                continue
            here = slice(place, place + 1)
            seen = rotated_keys(turned, cos[:, here], -sin[:, here], layout, turning.pairs)
            real = torch.ones(keys.shape[:2], dtype=torch.bool, device=keys.device)
            if causal:
                real[:, place + 1 :] = False
            elif self.mask is not None:
                rows = self.mask.any(1)[..., -tokens:]
                real &= rows[:, min(place, rows.shape[1] - 1)]
            weights = real / (1.0 + (torch.arange(tokens, device=keys.device) - place).abs())
            weights *= (real.sum(1) / weights.sum(1).clamp_min(1e-9))[:, None]  # they count as many as they are
            mean = (weights[..., None] * seen).sum(1, keepdim=True) / weights.sum(1).clamp_min(1)[:, None, None]
            apart = (seen - mean) * weights.sqrt()[..., None]
            for running, b in zip(self.k, layout.buckets, strict=True):
                own = apart[..., b.k_start : b.k_start + len(b.keys) * b.qk_dim]
                running.add(tokens_of(own, len(b.keys), real))

    def check(self, number: int) -> None:
        """Raises if a batch brought NaN or infinity."""
        for kind, parts in (("queries", self.q), ("keys", self.k), ("contexts", self.c)):
            if not all(bool(one.products.diagonal(dim1=1, dim2=2).sum().isfinite()) for one in parts):
                raise NonFiniteError(
                    f"{self.view.name}: {kind}, batch {number}",
                    "finite values",
                    "NaN or infinite ones",
                    "calibrate in float32 or bfloat16, and check the batch",
                )
