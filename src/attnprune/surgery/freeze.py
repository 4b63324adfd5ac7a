"""What inference arranges on every call, arranged once: :func:`freeze` and :func:`thaw`."""

from __future__ import annotations

from torch import nn

from ..families.base import AttentionView
from ..families.registry import find_views, plain
from ..nn import host_class
from ..nn.frozen import Frozen
from ..nn.kept import ordinary
from ..nn.projection import side_by_side
from ..values.choices import Choices
from . import check_views
from .patch import snapshot_of


@ordinary
def freeze(model: nn.Module, *, include: Choices | None = None, exclude: Choices | None = None) -> tuple[str, ...]:
    """Makes, once, what attention otherwise arranges on every call; for inference, on a CPU or a GPU.

    Q, K and V become one product. Where heads differ and tokens are few (on a GPU: where kernels want other dims),
    their weights are padded to common dims, and O's columns with them, so that all heads run in one call. The model
    computes the same, to rounding.

    Parameters, their names, ``state_dict`` and saved files stay as they are; copies, pickles and moves
    (``.to(device, dtype)``) are frozen too. Gradients in evaluation, autocast and hooks on projections are served by
    the projections themselves, as before. What would change weights raises
    :class:`~attnprune.errors.FrozenError`: a forward pass in training, pruning, loading a state dict. Memory: padded
    weights are held beside those of the model; others are shared with it.

    Args:
        model: pruned or not. Frozen is attention that has, or may have, a forward of ours, with Q, K and V as Linears
            that read the same width (:ref:`stock-and-decoupled`); the rest runs as it did.
        include: glob patterns of names, classes, or functions of name and module; None: all.
        exclude: what to leave alone.

    Returns:
        The names of what is frozen.

    Raises:
        NoAttentionError: there is no attention.
        WrappedModelError: (and its kinds) a projection is wrapped, quantised or sharded; nothing has changed then.

    >>> import torch
    >>> from attnprune import prune_attention
    >>> model, x = nn.TransformerEncoderLayer(32, 4, batch_first=True).eval(), torch.randn(2, 5, 32)
    >>> report = prune_attention(model, 0.5, heads="ragged")
    >>> with torch.no_grad():
    ...     expected = model(x)
    ...     names, found = freeze(model), model(x)
    >>> names, torch.allclose(found, expected, atol=1e-6)
    (('self_attn',), True)
    >>> prune_attention(model, 0.5)
    Traceback (most recent call last):
    attnprune.errors.FrozenError: self_attn: expected attention whose weights may change, found a frozen one. Call ...
    >>> thaw(model)
    ('self_attn',)
    """
    model = plain(model)
    views = [view for view in find_views(model, include, exclude) if _can_be_frozen(view)]
    check_views(model, views, frozen=True)
    before = snapshot_of(views)
    data = [(part, part.data) for view in views for parts in _parts(view) for part in parts]
    try:
        for view in views:
            _freeze(view)
    except BaseException:
        for part, value in data:
            part.data = value
        before.restore()
        raise
    return tuple(view.name for view in views)


@ordinary
def thaw(model: nn.Module) -> tuple[str, ...]:
    """Undoes :func:`freeze`: classes and parameters are what they were, bitwise.

    Returns:
        The names of what was frozen.
    """
    found: list[tuple[str, nn.Module, Frozen]] = [
        (name, module, module.__dict__["attnprune_frozen"])
        for name, module in plain(model).named_modules()
        if "attnprune_frozen" in module.__dict__
    ]
    own = [[part.detach().clone() for part in frozen.laid] if frozen.apart else [] for _, _, frozen in found]
    for (_, module, frozen), values in zip(found, own, strict=True):
        for part, value in zip(frozen.laid if frozen.apart else (), values, strict=True):
            part.data = value
        del module.__dict__["attnprune_frozen"]
        if frozen.recast:
            module.__class__ = host_class(module)
            del module.__dict__["attnprune_state"]
    return tuple(name.removesuffix(frozen.inside).rstrip(".") for name, _, frozen in found)


def _freeze(view: AttentionView) -> None:
    module, known = view.module, _frozen(view)
    recast = known.recast if known is not None else not view.mixin_runs
    apart = known.apart if known is not None else any(side_by_side(parts) is None for parts in _parts(view))
    if not view.mixin_runs:
        assert view.mixin is not None, "what cannot run by a forward of ours is left out"
        view.decouple(view.mixin, dense=True)
    inside = next(name for name, one in view.top.named_modules() if one is module)
    made = Frozen(module, _names(view), view.spec.layout, recast=recast, apart=apart, inside=inside)
    module.__dict__["attnprune_frozen"] = made


def _frozen(view: AttentionView) -> Frozen | None:
    found: Frozen | None = view.module.__dict__.get("attnprune_frozen")
    return found


def _names(view: AttentionView) -> tuple[str, ...]:
    """Of Q, K and V in the attention, and of O where it is there too."""
    linears = view.linears
    assert linears is not None, "what has no Linears is left out"
    names = {id(child): name for name, child in view.module._modules.items()}
    return tuple(names[id(linears[p])] for p in ("q", "k", "v", "o") if id(linears[p]) in names)


def _can_be_frozen(view: AttentionView) -> bool:
    spec, linears = view.spec, view.linears
    if view.runs_expanded or linears is None or view.mixin is None or not spec.q_in == spec.k_in == spec.v_in:
        return False
    if any(spec.left_out):
        return False
    qkv = [linears[p] for p in ("q", "k", "v")]
    inside = {id(child) for child in view.module._modules.values()}
    kinds = {(one.weight.dtype, one.weight.device, one.bias is None) for one in qkv}
    fits = all(linears[p].out_features == spec.layout.channels(p) for p in ("q", "k", "v"))
    fits = fits and all(id(one) in inside for one in qkv)
    return fits and len(kinds) == 1 and len({id(one.weight) for one in qkv}) == 3


def _parts(view: AttentionView) -> list[list[nn.Parameter]]:
    """The weights of Q, K and V, and their biases if there are any."""
    keys = ["weight", "bias"] if view.spec.bias[0] else ["weight"]
    return [[view.slots[f"{p}.{key}"].parameter for p in "qkv"] for key in keys]
