"""Reading a model from a directory; nothing in it is trusted or run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..calibration.batches import device_named
from ..errors import AttnPruneError, CheckpointError, OptionError
from ..families.registry import all_views, plain
from ..surgery import Surgeon
from . import hf
from .folder import Folder, refuse
from .manifest import MANIFEST, Manifest
from .record import ENTRY, ConfigEntry, Record, from_entry
from .skeleton import Filling, blank, check_buffers, unsaved
from .tensors import Weights

_ROOM = 1 << 26  # bytes of buffers that no file holds


def load_pruned(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Reads what :func:`save_pruned` wrote; nothing in the directory is trusted or run.

    A Hugging Face model is built without data, given the shapes that were saved, and filled one tensor at a time: there
    never is a dense copy. Directories that ``model.save_pretrained`` wrote load as well: of pruned models through the
    entry that pruning leaves in the config; dense ones whose tensors transformers merges or splits, by transformers.

    Args:
        directory: where the model lies.
        model: a dense model of the class that was saved, changed in place; its parameters may be on the meta device.
            None: built from the config, for models of transformers.
        device: where the model goes; None: the CPU, or where ``model`` is.
        dtype: to convert to; None: as saved, bit by bit.
        verify: whether to compare the weights' digests, which reads the files once more.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        OptionError: no such dtype, or no such device on this machine; nothing was read.
        CheckpointError: a file is missing, malformed, altered, a link, or does not fit the model, which is then as it
            was.

    >>> import tempfile
    >>> from attnprune import prune_attention, save_pruned
    >>> layer = nn.TransformerEncoderLayer(32, 4)
    >>> report = prune_attention(layer, 0.5)
    >>> folder = save_pruned(layer, tempfile.mkdtemp())
    >>> with torch.device("meta"):
    ...     skeleton = nn.TransformerEncoderLayer(32, 4)
    >>> again = load_pruned(folder, skeleton)
    >>> torch.equal(again.self_attn.q_proj.weight, layer.self_attn.q_proj.weight)
    True
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise OptionError("dtype", "a floating-point torch.dtype, or None", repr(dtype), "write torch.float16")
    place, folder = None if device is None else device_named(device), Folder.at(directory)
    if not folder.has(MANIFEST):
        return _of_transformers(folder, model, place, dtype)
    manifest = Manifest.read(folder)
    try:
        weights = Weights(folder, [one.name for one in manifest.shards])
    except CheckpointError:
        if manifest == (manifest := Manifest.read(folder)):
            raise
        weights = Weights(folder, [one.name for one in manifest.shards])  # saved anew in between
    with weights:
        if verify:
            for one in manifest.shards:
                if (digest := weights.digest(one.name)) != one.sha256:
                    refuse(one.name, f"SHA-256 {one.sha256[:12]}", digest[:12])
        names, tied = {key: key for key in weights.entries}, dict(manifest.tied or {})
        if model is not None:
            return _into(plain(model), weights, names, tied, manifest.record, place, dtype)
        raw = hf.read_config(folder) if manifest.config is None else manifest.config
        built = _built(raw, weights, names, tied, manifest.record, place, dtype)
        assert built is not None, "what we write has the model's own names"
        return built


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """A Hugging Face model, pruned or dense, from its directory alone: :func:`load_pruned` without a model.

    Args:
        directory: written by :func:`save_pruned` or by ``model.save_pretrained``.
        device: where the model goes; None: the CPU.
        dtype: to convert to; None: as saved.
        verify: whether to compare the weights' digests, where the directory has any.

    Raises:
        OptionError, CheckpointError: as in :func:`load_pruned`.

    >>> import tempfile
    >>> from transformers import ViTConfig, ViTModel
    >>> from attnprune import prune_attention
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8))
    >>> report = prune_attention(model, 0.5, heads="ragged")
    >>> folder = tempfile.mkdtemp()
    >>> model.save_pretrained(folder)  # plain transformers
    >>> from_pretrained(folder).layers[0].attention.q_proj.weight.shape
    torch.Size([16, 32])
    """
    return load_pruned(directory, device=device, dtype=dtype, verify=verify)


def _of_transformers(
    folder: Folder, model: nn.Module | None, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    """From a ``save_pretrained`` directory."""
    if not folder.has(hf.CONFIG):
        refuse(MANIFEST, f"this file, or {hf.CONFIG} of a model of transformers", "neither", "check the path")
    raw = hf.read_config(folder)
    files = hf.weight_files(folder)
    record = Record(()) if raw.get(ENTRY) is None else from_entry(raw[ENTRY], hf.CONFIG)
    with Weights(folder, files) as weights:
        if model is not None:
            return _into(plain(model), weights, None, {}, record, device, dtype)
        found = _built(raw, weights, None, {}, record, device, dtype)
    if found is None:
        return hf.dense(folder, raw, device, dtype)
    hf.set_generation(folder, found)
    return found


def _built(
    raw: Any,
    weights: Weights,
    names: dict[str, str] | None,
    tied: dict[str, str],
    record: Record,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.Module | None:
    """The model of a config; None where a dense one needs transformers itself, which merges and splits tensors."""
    make = hf.maker(raw, weights.entries)
    try:
        model = blank(make, weights.entries)
        if names is None and not record.attention:
            if hf.merges(model, weights.entries):
                hf.check_size(model, weights.entries)
                return None
            known = model.state_dict(keep_vars=True)  # dense checkpoints may hold more than their class has
            names = {key: name for key, name in hf.names_in(model, weights.entries).items() if name in known}
        filling, pruned = _fitted(model, weights, names, tied, record)
        if size := sum(b.numel() * b.element_size() for _, b in unsaved(model)):
            if size > _ROOM:
                refuse(hf.CONFIG, f"buffers of at most {_ROOM} bytes", str(size), "check the config")
            model = blank(make, weights.entries, buffers=True)
            filling, pruned = _fitted(model, weights, names, tied, record)
    except AttnPruneError:
        raise
    except Exception as error:  # numbers that the class itself can make nothing of
        raise CheckpointError(hf.CONFIG, "a config of the model", str(error)[:80], "save the model anew") from error
    return _filled(model, filling, pruned, device, dtype).eval()


def _into(
    model: nn.Module,
    weights: Weights,
    names: dict[str, str] | None,
    tied: dict[str, str],
    record: Record,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> nn.Module:
    check_buffers(model)
    return _filled(model, *_fitted(model, weights, names, tied, record), device, dtype)


def _fitted(
    model: nn.Module, weights: Weights, names: dict[str, str] | None, tied: dict[str, str], record: Record
) -> tuple[Filling, bool]:
    """Gives a dense model the shapes of a record, and checks that the weights fill it; if not, it is as it was.

    Also returns whether anything changed.
    """
    record = record.inside(model)
    views = all_views(model, {one.spec.name for one in record.attention})
    plan = record.plan(views, MANIFEST)
    surgeon = Surgeon.prepare(model, views, plan, blank=True)
    surgeon.commit()
    try:
        record.settle(model, MANIFEST)
        names = hf.names_in(model, weights.entries) if names is None else names
        return Filling(model, weights, names, tied, MANIFEST), not plan.empty
    except BaseException:
        surgeon.undo()
        raise


def _filled(
    model: nn.Module, filling: Filling, pruned: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    filling.run(device, dtype)
    if pruned:
        ConfigEntry(model).commit()
    return model if device is None and dtype is None else model.to(device=device, dtype=dtype)
