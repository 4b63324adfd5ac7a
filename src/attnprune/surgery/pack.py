"""Q, K and V of an attention in one matrix product, for inference: :func:`pack_qkv` and :func:`unpack_qkv`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ..families.base import AttentionView
from ..families.registry import all_views, find_views, plain
from ..nn import Decoupled
from ..nn.kept import ordinary
from ..values.choices import Choices
from . import check_views
from .check import check_thawed


@ordinary
def pack_qkv(model: nn.Module, *, include: Choices | None = None, exclude: Choices | None = None) -> tuple[str, ...]:
    """Lays the weights of Q, K and V of every self-attention side by side, so that one matrix product serves all three.

    Worth it where a call costs as much as its work: few tokens, narrow models, GPUs at small batches. Names, values and
    shapes of parameters stay, and so do ``state_dict`` and optimizers. In training, under hooks on a projection, and in
    compiled models the three Linears are called as before. Moving or casting the model takes the weights apart again:
    pack last.

    Args:
        model: pruned or not; attention of known families. ``nn.MultiheadAttention`` that was never pruned is packed
            already, and attention whose queries and keys read different widths never is.
        include: glob patterns of names, classes, or functions of name and module; None: all.
        exclude: what to leave alone.

    Returns:
        The names of what is packed.

    Raises:
        WrappedModelError: (and its kinds) a projection is wrapped, quantised or sharded; nothing has changed then.

    >>> model = nn.TransformerEncoderLayer(32, 4, batch_first=True)
    >>> from attnprune import prune_attention
    >>> report = prune_attention(model, 0.5)
    >>> pack_qkv(model)
    ('self_attn',)
    >>> unpack_qkv(model)
    ('self_attn',)
    """
    model = plain(model)
    views = [view for view in find_views(model, include, exclude) if _can_be_packed(view)]
    check_views(model, views)
    laid = [(parts, _laid(parts)) for view in views for parts in _parts(view)]
    for parts, values in laid:
        for part, value in zip(parts, values, strict=True):
            part.data = value
    for view in views:
        assert view.mixin is not None, "what cannot run by a forward of ours is left out"
        view.decouple(view.mixin, packed=True, dense=view.state is None or view.state.dense)
    return tuple(view.name for view in views)


@ordinary
def unpack_qkv(model: nn.Module) -> tuple[str, ...]:
    """Undoes :func:`pack_qkv`: every weight has storage of its own again, bitwise the same.

    Returns:
        The names of what was packed.

    Raises:
        FrozenError: the model is frozen (:func:`attnprune.freeze`).
    """
    views = [view for view in all_views(plain(model)) if _packed(view)]
    for view in views:
        check_thawed(view)
    for view in views:
        for parts in _parts(view):
            for part in parts:
                part.data = part.detach().clone()
        if (view.state is not None and view.state.dense) or view.way(view.spec) == "stock":
            view.recast()
        else:
            assert view.mixin is not None
            view.decouple(view.mixin)
    return tuple(view.name for view in views)


def lay_again(view: AttentionView) -> None:
    """Lays weights of Q, K and V side by side anew, where they were before each of them changed."""
    for parts in _parts(view) if _packed(view) else ():
        for part, value in zip(parts, _laid(parts), strict=True):
            part.data = value


def _packed(view: AttentionView) -> bool:
    return isinstance(view.module, Decoupled) and view.module.attnprune_state.packed


def _can_be_packed(view: AttentionView) -> bool:
    spec, linears = view.spec, view.linears
    alike = spec.q_in == spec.k_in == spec.v_in and not any(spec.left_out)
    if view.runs_expanded or linears is None or not alike or view.mixin is None:
        return False
    q, k, v = linears["q"], linears["k"], linears["v"]
    kinds = {(one.weight.dtype, one.weight.device, one.bias is None) for one in (q, k, v)}
    return len(kinds) == 1 and len({id(one.weight) for one in (q, k, v)}) == 3


def _parts(view: AttentionView) -> list[list[nn.Parameter]]:
    """The weights of Q, K and V, and their biases if there are any."""
    keys = ["weight", "bias"] if view.spec.bias[0] else ["weight"]
    return [[view.slots[f"{p}.{key}"].parameter for p in "qkv"] for key in keys]


def _laid(parts: Sequence[nn.Parameter]) -> tuple[torch.Tensor, ...]:
    """The same values, one after the other in one storage."""
    return torch.split(torch.cat([part.detach() for part in parts]), [len(part) for part in parts])
