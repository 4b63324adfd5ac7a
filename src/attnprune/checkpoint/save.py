"""Writing a model as a directory."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CheckpointError, OptionError
from ..families.base import AttentionView
from ..families.registry import all_views, undressed
from ..nn import host_class
from ..nn.attempt import ending_with, undoing_with
from ..nn.kept import ordinary
from ..surgery import check_views
from ..values import fields
from .card import CARD, base_of, card_of, is_free
from .entry import ENTRY, is_pretrained, marked, unmarked
from .folder import Folder
from .hf import CONFIG, GENERATION, INDEX, maker
from .manifest import BY_DIGEST, MANIFEST, WEIGHTS, Manifest, Shard, Sizes
from .record import Record
from .shapes import smaller_than
from .skeleton import class_name, items_of, places
from .tensors import Item, shards, write_tensors

if TYPE_CHECKING:
    from ..report.report import Report

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@ordinary
def save_pruned(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    report: Report | None = None,
    card: Mapping[str, Any] | None = None,
) -> Path:
    """Writes a model, pruned or not, as safetensors weights and a JSON manifest.

    The manifest names the shape of every attention, so :func:`load_pruned` needs nothing but a dense model of the same
    class, and for Hugging Face models (whose config is in it) not even that. Files have the names that they have
    everywhere (``model.safetensors``, or several and their index). If the process dies while they are written, the
    directory holds the old model or the new one.

    Args:
        model: any module; attention of known families may have any shape that pruning gives.
        directory: made if it is not there; other files in it stay.
        max_shard_size: weights are split into files of at most so many bytes; a number, or text such as ``"200MB"``.
        report: what pruning reported; its figures are then in the manifest and in the model card.
        card: entries for the YAML head of the model card (``README.md``), such as ``{"license": "apache-2.0"}``. A card
            that somebody has written stays as it is.

    Returns:
        The directory.

    Raises:
        WrappedModelError: (and its kinds) the model is wrapped, sharded or quantised.
        OptionError: a size that is none, a card that no YAML is, or a state dict that holds more than tensors.
        CheckpointError: another tool made a layer smaller in a way that tensors and config do not tell.

    >>> import tempfile
    >>> from attnprune import load_pruned, prune_attention
    >>> pruned = nn.TransformerEncoderLayer(32, 4)
    >>> report = prune_attention(pruned, 0.5)
    >>> folder = save_pruned(pruned, tempfile.mkdtemp(), report=report)
    >>> again = load_pruned(folder, nn.TransformerEncoderLayer(32, 4))
    >>> all(value.equal(again.state_dict()[key]) for key, value in pruned.state_dict().items())
    True
    """
    return save_model(model, directory, max_shard_size=max_shard_size, report=report, card=card)


@ordinary
def save_model(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str,
    report: Report | None,
    card: Mapping[str, Any] | None,
    name: str | None = None,
) -> Path:
    """:func:`save_pruned`, of a model that its card calls ``name``; None: as the directory is called."""
    model = undressed(model)
    limit = parse_size(max_shard_size)
    views = all_views(model)
    check_views(model, views, frozen=True)
    items, tied = items_of(model)
    config, said = config_json(model), None if report is None else report.to_dict()
    sizes, smaller = _against_config(model, views, config)
    manifest = Manifest(class_name(model), Record.of(views), (), config, tied, said, sizes)
    called, base = name or Path(os.path.abspath(directory)).name, base_of(getattr(model, "config", None))
    text = card_of(
        manifest, name=called, smaller=smaller, report=report, base_model="" if base == name else base, head=card
    )
    return write_model(Folder.make(directory), items, manifest, limit, text, smaller, generation_json(model))


def write_model(
    folder: Folder,
    items: Sequence[Item],
    manifest: Manifest,
    limit: int,
    card: str,
    smaller: bool,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Writes weights, then a manifest that names them, and then gives them their names; what was there before goes.

    Until then they have names that their digests give (:attr:`.manifest.Shard.fresh`), which reading tries first: so
    the directory holds the old model or the new one at every moment.

    Args:
        folder: where to.
        items: the tensors, each made when its turn comes.
        manifest: all of it but the shards.
        limit: bytes of a file of weights.
        card: the text of the model card, written where no card of somebody's lies.
        smaller: whether the model is smaller than its config says; plain transformers then refuses it.
        generation: settings for generation, of models that have any.
    """
    json.dumps(manifest.report, allow_nan=False)  # what cannot be written is refused before the weights are
    folder.alone()
    found, home, runs = [], {}, shards(items, limit)
    for number, run in enumerate(runs, 1):
        with folder.draft() as draft:
            shard = Shard.numbered(number, len(runs), write_tensors(draft, run), draft.tell())
            if not folder.has(shard.fresh):
                undoing_with(partial((folder.path / shard.fresh).unlink, missing_ok=True))
            folder.put(draft, shard.fresh)
        found.append(shard)
        home.update({item.name: shard.name for item in run})
    folder.replace(MANIFEST, replace(manifest, shards=tuple(found)).to_json().encode())
    index = {"metadata": {"total_size": sum(item.size for item in items)}, "weight_map": home}
    config = manifest.config
    for name, content in {  # for others; what reads a manifest needs none of them
        CONFIG: marked(config, manifest.record) if config is not None and smaller else config,
        GENERATION: generation,
        INDEX: index if len(found) > 1 else None,
    }.items():
        if content is not None:
            folder.replace(name, json.dumps(content, sort_keys=True, indent=2).encode())
    if is_free(folder):
        folder.replace(CARD, card.encode())
    for shard in found:
        ending_with(partial(os.replace, folder.path / shard.fresh, folder.path / shard.name))
    kept = {name for one in found for name in (one.name, one.fresh)} | ({INDEX} if len(found) > 1 else set())
    for path in folder.path.iterdir():
        stale = WEIGHTS.fullmatch(path.name) or BY_DIGEST.fullmatch(path.name) or path.name == INDEX
        if stale and path.name not in kept:
            folder.remove(path.name)
    return folder.path


def config_json(model: nn.Module) -> Mapping[str, Any] | None:
    """The config of a Hugging Face model as it would be without pruning; None for other models."""
    config: Any = getattr(model, "config", None)
    if not is_pretrained(model) or not hasattr(config, "to_json_string"):
        return None
    found: Any = unmarked(fields.load(config.to_json_string()))
    return {**found, "architectures": [host_class(model).__name__]}


def generation_json(model: nn.Module) -> Mapping[str, Any] | None:
    """A Hugging Face model's settings for generation; None for models that have none."""
    settings: Any = getattr(model, "generation_config", None)
    if not is_pretrained(model) or not hasattr(settings, "to_json_string"):
        return None
    found: Any = fields.load(settings.to_json_string())
    assert isinstance(found, Mapping)
    return found


def _against_config(
    model: nn.Module, views: Sequence[AttentionView], config: Mapping[str, Any] | None
) -> tuple[Sizes, bool]:
    """Which tensors outside attention are smaller than in the model of its config, and whether any tensor is.

    No sizes where no config tells; smaller is then what pruning left its entry in.
    """
    if config is None:
        return {}, True
    found = places(model)
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            dense = maker(config, found)()
    except CheckpointError:  # a class that transformers does not have
        return {}, hasattr(model.config, ENTRY)
    return smaller_than(dense, model, views), shapes_of(dense) != shapes_of(model)


def shapes_of(model: nn.Module) -> Sizes:
    """The shape of every tensor that is saved, by name."""
    return {name: tuple(place.tensor.shape) for name, place in places(model).items()}


def parse_size(size: object) -> int:
    """Bytes from a number, or from text with a unit.

    >>> parse_size("5GB"), parse_size("1.5 MiB"), parse_size(7)
    (5000000000, 1572864, 7)
    """
    text = str(size).strip().upper()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Z]*)", text)
    if isinstance(size, (int, str)) and not isinstance(size, bool) and match and match[2] in _UNITS:
        found = int(float(match[1]) * _UNITS[match[2]])
        if found > 0:
            return found
    raise OptionError("max_shard_size", 'a number of bytes, or text such as "5GB"', repr(size), 'write "200MB"')
