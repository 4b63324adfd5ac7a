"""Surgery on files: a plan applied to a checkpoint tensor by tensor, without the model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, OptionError
from ..families.registry import all_views, plain
from ..nn.kept import ordinary
from ..surgery import ParamChange, Surgeon
from ..values.plan import Plan
from .card import card_of
from .folder import Folder
from .hf import set_generation
from .manifest import MANIFEST, Manifest
from .record import Record
from .save import config_json, generation_json, parse_size, shapes_of, write_model
from .shapes import take_shapes
from .skeleton import Filling, class_name, groups, places
from .source import Source
from .tensors import Item, Weights


@ordinary
def apply_to_checkpoint(
    source: str | os.PathLike[str],
    plan: Plan,
    directory: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
) -> Path:
    """Applies a plan to a checkpoint on the disk; needs memory for a few tensors, not for the model.

    The result is, byte for byte in the weights, what loading the model, :func:`attnprune.apply_plan` and
    :func:`attnprune.save_pruned` would write, and loads by :func:`attnprune.load_pruned` and
    :func:`attnprune.from_pretrained`.

    Args:
        source: a directory that ``save_pretrained`` or :func:`attnprune.save_pruned` wrote (one file or several), or a
            safetensors file; left as it is.
        plan: made for the model that lies there; plans that rotate and refit too.
        directory: where the result goes, replaced in one step at the end.
        model: a dense model of the class, best on the meta device; left as it is. None: built from the config, for
            models of transformers.
        max_shard_size: weights are split into files of at most so many bytes.
        verify: whether to compare digests of the source, where it has any.

    Raises:
        CheckpointError: the source is malformed, altered, or does not fit the model.
        PlanMismatchError: the plan was made for another model.

    >>> import tempfile
    >>> from attnprune import load_pruned, make_plan, save_pruned
    >>> dense = nn.TransformerEncoderLayer(32, 4)
    >>> source = save_pruned(dense, tempfile.mkdtemp())
    >>> with torch.device("meta"):
    ...     skeleton = nn.TransformerEncoderLayer(32, 4)
    >>> result = apply_to_checkpoint(source, make_plan(dense, 0.5), tempfile.mkdtemp(), model=skeleton)
    >>> load_pruned(result, skeleton).self_attn.q_proj.weight.shape
    torch.Size([16, 32])
    """
    if not isinstance(plan, Plan):
        remedy = "make one with make_plan, or read one with Plan.from_json"
        raise OptionError("plan", "an attnprune.Plan", f"a {type(plan).__name__}", remedy)
    limit = parse_size(max_shard_size)
    with Source.at(source, weights_alone=True).opened(verify=verify) as (found, weights):
        skeleton = plain(model) if model is not None else found.skeleton(weights.entries)
        dense = shapes_of(skeleton)
        with _pruned(skeleton, found, weights, plan) as (items, tied):
            record, config = Record.of(all_views(skeleton)), config_json(skeleton)
            if model is None:
                set_generation(found.folder, skeleton)
            manifest = Manifest(class_name(skeleton), record, (), config, tied, sizes=found.sizes)
            smaller = dense != shapes_of(skeleton)
            card = card_of(manifest, name=Path(os.path.abspath(directory)).name, smaller=smaller)
            return write_model(Folder.make(directory), items, manifest, limit, card, smaller, generation_json(skeleton))


@contextmanager
def _pruned(
    skeleton: nn.Module, source: Source, weights: Weights, plan: Plan
) -> Iterator[tuple[list[Item], dict[str, str]]]:
    """Inside the block the skeleton has the shapes that the plan leaves; gives what its tensors are made of."""
    before = take_shapes(
        skeleton, source.record.inside(skeleton), source.sizes, MANIFEST, source.alone(weights.entries)
    )
    try:
        filling = Filling(skeleton, weights, source.names(skeleton, weights.entries), source.tied, "weights")
        origin = {id(filling.found[name].tensor): key for key, group in filling.reads for name in group}
        views = all_views(skeleton, {spec.name for spec in plan.specs})
        surgeon = Surgeon.prepare(skeleton, views, plan, blank=True)
        surgeon.commit()
        try:
            yield _items(skeleton, weights, origin, {id(one.new): one for one in surgeon.changes})
        finally:
            surgeon.undo()
    finally:
        before.undo()


def _items(
    skeleton: nn.Module,
    weights: Weights,
    origin: Mapping[int, str],
    changes: Mapping[int, ParamChange],
) -> tuple[list[Item], dict[str, str]]:
    """Every tensor of the pruned model, and names of those that are one with another."""
    found = places(skeleton)
    items: list[Item] = []
    tied: dict[str, str] = {}
    copied: dict[str, str] = {}  # what is taken over as it is, by its name in the source
    for first, *others in groups(found):
        tensor = found[first].tensor
        change = changes.get(id(tensor))
        key = origin[id(tensor if change is None else change.old)]
        if change is None and key in copied:
            tied.update(dict.fromkeys((first, *others), copied[key]))
            continue
        if change is None:
            copied[key] = first
        make = _maker(weights, key, change, origin)
        items.append(Item(first, weights.entries[key].dtype, tuple(tensor.shape), make))
        tied.update(dict.fromkeys(others, first))
    return items, tied


def _maker(weights: Weights, key: str, change: ParamChange | None, origin: Mapping[int, str]) -> Callable[[], Tensor]:
    if change is None:
        return lambda: weights.read(key)

    def make() -> Tensor:
        new = change.values(_finite(weights, key), lambda weight: _finite(weights, origin[id(weight)]))
        return new.mul_(change.gain) if change.gain != 1.0 else new

    return make


def _finite(weights: Weights, key: str) -> Tensor:
    tensor = weights.read(key)
    if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
        raise NonFiniteError(key, "finite weights", "NaN or infinite ones", "load a checkpoint from before")
    return tensor
