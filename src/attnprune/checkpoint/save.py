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
from ..nn.attempt import undoing_with
from ..nn.kept import ordinary
from ..surgery import check_views
from ..values import fields
from .folder import Folder
from .hf import CONFIG, GENERATION, maker
from .manifest import MANIFEST, WEIGHTS, Manifest, Shard, Sizes
from .record import ENTRY, Record, is_pretrained
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
) -> Path:
    """Writes a model, pruned or not, as safetensors weights and a JSON manifest.

    The manifest names the shape of every attention, so :func:`load_pruned` needs nothing but a dense model of the same
    class, and for Hugging Face models (whose config is in it) not even that. The weights are written first, under names
    that their digests give, and the manifest is then replaced in one step: if the process dies, the directory holds the
    old model or the new one.

    Args:
        model: any module; attention of known families may have any shape that pruning gives.
        directory: made if it is not there; other files in it stay.
        max_shard_size: weights are split into files of at most so many bytes; a number, or text such as ``"200MB"``.
        report: what pruning reported; its figures are then in the manifest.

    Returns:
        The directory.

    Raises:
        WrappedModelError: (and its kinds) the model is wrapped, sharded or quantised.
        OptionError: a size that is none, or a state dict that holds more than tensors.
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
    model = undressed(model)
    limit = parse_size(max_shard_size)
    views = all_views(model)
    check_views(model, views, frozen=True)
    items, tied = items_of(model)
    config, said = config_json(model), None if report is None else report.to_dict()
    sizes = _sizes(model, views, config)
    manifest = Manifest(class_name(model), Record.of(views), (), config, tied, said, sizes)
    return write_model(Folder.make(directory), items, manifest, limit, generation_json(model))


def write_model(
    folder: Folder,
    items: Sequence[Item],
    manifest: Manifest,
    limit: int,
    generation: Mapping[str, Any] | None = None,
) -> Path:
    """Writes weights and then a manifest that names them; what the one before it named is removed.

    Args:
        folder: where to.
        items: the tensors, each made when its turn comes.
        manifest: all of it but the shards.
        limit: bytes of a file of weights.
        generation: settings for generation, of models that have any.
    """
    json.dumps(manifest.report, allow_nan=False)  # what cannot be written is refused before the weights are
    folder.alone()
    found = []
    for run in shards(items, limit):
        with folder.draft() as draft:
            digest = write_tensors(draft, run)
            name, size = f"model-{digest[:16]}.safetensors", draft.tell()
            if not folder.has(name):
                undoing_with(partial((folder.path / name).unlink, missing_ok=True))
            folder.put(draft, name)
        found.append(Shard(name, digest, size))
    folder.replace(MANIFEST, replace(manifest, shards=tuple(found)).to_json().encode())
    if manifest.config is not None:  # for tokenizers, processors and people; loading reads the manifest
        folder.replace(CONFIG, json.dumps(manifest.config, sort_keys=True, indent=2).encode())
    if generation is not None:
        folder.replace(GENERATION, json.dumps(generation, sort_keys=True, indent=2).encode())
    for path in folder.path.iterdir():
        if WEIGHTS.fullmatch(path.name) and path.name not in {one.name for one in found}:
            folder.remove(path.name)
    return folder.path


def config_json(model: nn.Module) -> Mapping[str, Any] | None:
    """The config of a Hugging Face model as it would be without pruning; None for other models."""
    config: Any = getattr(model, "config", None)
    if not is_pretrained(model) or not hasattr(config, "to_json_string"):
        return None
    found: Any = fields.load(config.to_json_string())
    found.pop(ENTRY, None)
    return {**found, "architectures": [host_class(model).__name__]}


def generation_json(model: nn.Module) -> Mapping[str, Any] | None:
    """A Hugging Face model's settings for generation; None for models that have none."""
    settings: Any = getattr(model, "generation_config", None)
    if not is_pretrained(model) or not hasattr(settings, "to_json_string"):
        return None
    found: Any = fields.load(settings.to_json_string())
    assert isinstance(found, Mapping)
    return found


def _sizes(model: nn.Module, views: Sequence[AttentionView], config: Mapping[str, Any] | None) -> Sizes:
    """Which tensors outside attention are smaller than in the model of its config; none where no config tells."""
    if config is None:
        return {}
    found = places(model)
    try:
        with torch.random.fork_rng(devices=()), torch.device("meta"):
            dense = maker(config, found)()
    except CheckpointError:  # a class that transformers does not have
        return {}
    return smaller_than(dense, model, views)


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
