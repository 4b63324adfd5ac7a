"""Giving a dense model the shapes that were saved: of attention, and of layers that another tool made smaller."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..errors import CheckpointError
from ..families.base import AttentionView
from ..families.linears import put, transposed
from ..families.registry import all_views
from ..nn.attempt import Snapshot
from ..surgery import Surgeon
from ..surgery.width import narrow, needs_forward
from ..values.layout import PROJECTIONS
from ..values.plan import Plan
from .folder import reading, refuse
from .manifest import Sizes
from .record import Record, told
from .skeleton import Place, groups, places

_WHOLE = "save the whole model (torch.save)"


class Shaped(NamedTuple):
    """What was done to a model."""

    plan: Plan
    """What attention lost."""
    undo: Callable[[], None]
    """Puts the model back."""


def take_shapes(model: nn.Module, record: Record, sizes: Sizes, where: str, alone: Collection[str] = ()) -> Shaped:
    """Gives a dense model, with data or without, the shapes that were saved; if that fails, it is as it was.

    Args:
        model: changed in place.
        record: the attention that was saved.
        sizes: other tensors that are smaller.
        where: the file that says so, for messages.
        alone: names of tensors that were saved by themselves; where the model has them tied, it no longer will.

    Raises:
        CheckpointError: the model is not what was saved in some other way.
    """
    before = Snapshot(model.modules())
    try:
        _untie(model, alone)
        if sizes:
            with reading(where):
                _narrow(model, record, sizes, where)
        saved = {one.spec.name: one for one in record.attention}
        views = [told(view, saved[view.name], where) for view in all_views(model, saved)]
        plan = record.plan(views, where)
        Surgeon.prepare(model, views, plan, blank=True).commit()
        record.settle(model, where)
    except BaseException:
        before.restore()
        raise
    return Shaped(plan, before.restore)


def _untie(model: nn.Module, alone: Collection[str]) -> None:
    found = places(model)
    for group in groups(found):
        for name in [name for name in group if name in alone][1:]:
            old = found[name].tensor
            new = old.detach().clone()
            found[name].put(nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)


def _narrow(model: nn.Module, record: Record, sizes: Sizes, where: str) -> None:
    """The model's width at attention as recorded, and other tensors of these sizes."""
    saved = {one.spec.name: one.spec for one in record.attention}
    views = all_views(model, saved)
    for number, view in enumerate(views):
        spec = saved[view.name]
        kept = {p: range(spec.width(p)) for p in PROJECTIONS if spec.width(p) < view.spec.width(p)}
        if kept:
            views[number] = narrow(view, kept, apart=needs_forward(view))
    found, attention = places(model), _tensors(views)
    for name in sizes.keys() - found.keys():
        refuse(f"{where}: {name[:80]}", "a tensor of the model's", "none", "pass a model of the class that was saved")
    for group in groups(found):
        wanted = {sizes[name] for name in group if name in sizes} - {tuple(found[group[0]].tensor.shape)}
        if wanted and id(found[group[0]].tensor) not in attention:
            _cut(group, [found[name] for name in group], wanted, where)


def _cut(names: list[str], together: list[Place], wanted: set[tuple[int, ...]], where: str) -> None:
    """A tensor, in all its places, gets a smaller shape; layers that hold it say so."""
    shape, old = wanted.pop(), together[0].tensor
    smaller = len(shape) == old.dim() and all(0 < new <= size for new, size in zip(shape, old.shape, strict=True))
    if wanted or not smaller or not all(can_be_smaller(place.owner) for place in together):
        expected = f"at most {tuple(old.shape)}, in a layer that can be built smaller"
        refuse(f"{where}: {names[0][:80]}", expected, str(shape)[:80], "pass a model of the class that was saved")
    values = old.detach()[tuple(slice(size) for size in shape)].clone()
    new = nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values
    for place in together:
        place.put(new)
        _tell(place.owner, place.key, new)


def can_be_smaller(owner: nn.Module) -> bool:
    """Whether the sizes of a layer follow from its tensors: no recurrent ones, no convolutions in groups."""
    if isinstance(owner, nn.modules.conv._ConvNd):
        return owner.groups == 1 or owner.groups == owner.in_channels == owner.out_channels
    return not isinstance(owner, (nn.RNNBase, nn.Bilinear))


def _tell(owner: Any, key: str, new: Tensor) -> None:
    """The attributes of a layer that say how large it is."""
    if isinstance(new, nn.Parameter) and (isinstance(owner, nn.Linear) or transposed(owner)):
        put(owner, key, new)
    elif isinstance(owner, nn.Embedding):
        owner.num_embeddings, owner.embedding_dim = new.shape
    elif hasattr(owner, "normalized_shape"):
        owner.normalized_shape = tuple(new.shape)
    elif isinstance(owner, nn.modules.batchnorm._NormBase) and new.dim():
        owner.num_features = len(new)
    elif isinstance(owner, nn.GroupNorm):
        owner.num_channels = len(new)
    elif isinstance(owner, nn.modules.conv._ConvNd) and key == "weight":
        first, second = new.shape[:2]
        if owner.groups > 1:
            owner.groups = owner.in_channels = owner.out_channels = first
        else:
            owner.in_channels, owner.out_channels = (first, second) if owner.transposed else (second, first)


def smaller_than(dense: nn.Module, model: nn.Module, views: Sequence[AttentionView]) -> dict[str, tuple[int, ...]]:
    """The tensors of a model outside its attention that are smaller than in a dense one, and their shapes.

    Raises:
        CheckpointError: a layer among them cannot be built smaller from its tensors.
    """
    theirs, found, attention = places(dense), {}, _tensors(views)
    for name, place in places(model).items():
        shape, other = tuple(place.tensor.shape), theirs.get(name)
        if id(place.tensor) in attention or other is None or shape == tuple(other.tensor.shape):
            continue
        found[name] = shape
        if not can_be_smaller(place.owner):
            kind = type(place.owner).__name__
            raise CheckpointError(name, "a layer whose tensors tell its size", f"a smaller {kind}", _WHOLE)
    if found:
        _check_bare(dense, model)
    return found


def _tensors(views: Sequence[AttentionView]) -> set[int]:
    """Ids of the tensors of attention."""
    biases = {id(view.owner("o")._parameters.get("bias")) for view in views}
    return biases | {id(slot.parameter) for view in views for slot in view.slots.values()}


def _check_bare(dense: nn.Module, model: nn.Module) -> None:
    """Raises if a norm that has no weight has another size: no tensor would say so."""
    theirs = dict(dense.named_modules())
    for name, module in model.named_modules():
        size, other = getattr(module, "normalized_shape", None), getattr(theirs.get(name), "normalized_shape", None)
        if size is not None and other is not None and size != other and module._parameters.get("weight") is None:
            found = f"a {type(module).__name__} without one, of {size}"
            raise CheckpointError(name, "a smaller norm to have a weight", found, _WHOLE)


def resized(model: nn.Module, shapes: Sizes) -> dict[str, tuple[int, ...]]:
    """Those of some shapes that differ from a model's."""
    found = places(model)
    return {name: shape for name, shape in shapes.items() if name in found and tuple(found[name].tensor.shape) != shape}
