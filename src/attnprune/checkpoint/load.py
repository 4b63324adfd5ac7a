"""Reading a model from a directory; nothing in it is trusted or run."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from ..calibration.batches import device_named
from ..errors import OptionError
from ..families.registry import undressed
from ..nn.kept import ordinary
from ..values.hub_names import is_hub_name
from . import conversions, hf
from .entry import ConfigEntry
from .folder import foreign, refuse
from .hub import fetched, name_of
from .manifest import MANIFEST
from .shapes import resized, take_shapes
from .skeleton import Filling, check_buffers, unsaved
from .source import Source
from .tensors import Weights

_ROOM = 1 << 26  # bytes of buffers that no file holds


@ordinary
def load_pruned(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    narrower: bool = False,
) -> nn.Module:
    """Reads what :func:`save_pruned` wrote; nothing in the directory is trusted or run.

    A Hugging Face model is built without data, given the shapes that were saved, and filled one tensor at a time: there
    never is a dense copy. Directories that ``model.save_pretrained`` wrote load as well: of pruned models through the
    entry that pruning leaves in the config; dense ones whose tensors transformers merges or splits, by transformers.

    Args:
        directory: where the model lies.
        model: a dense model of the class that was saved, changed in place; its parameters may be on the meta device.
            None: built from the config, for models of transformers. What it held goes once all is read, as it comes
            back where that fails. Of an ``nn.DataParallel`` the module inside counts, as in :func:`save_pruned`.
        device: where the model goes; None: the CPU, or where ``model`` is.
        dtype: to convert to; None: as saved, bit by bit.
        verify: whether to compare the weights' digests, which reads the files once more.
        narrower: whether other layers than attention may be smaller in the directory than in ``model``, as
            Torch-Pruning leaves them; what is built from a config knows by itself.

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
    place = None if device is None else device_named(device)
    with Source.at(directory).opened(verify=verify) as (source, weights):
        if model is not None:
            inner = undressed(model)
            check_buffers(inner)
            _filled(inner, *_fitted(inner, source, weights, narrower=narrower), place, dtype)
            if place is not None or dtype is not None:
                inner.to(device=place, dtype=dtype)
            return model if isinstance(model, nn.DataParallel) else inner
        return _built(source, weights, place, dtype)


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """A Hugging Face model, pruned or dense, from its directory or its name on the Hub alone.

    The same as :func:`load_pruned` without a model. From the Hub, of which ``huggingface_hub`` keeps a copy on this
    machine, come JSON files and weights in safetensors, and nothing that runs.

    Args:
        directory: written by :func:`save_pruned` or by ``model.save_pretrained``; or ``"owner/model"`` of the Hub,
            where no directory of this name is here.
        device: where the model goes; None: the CPU.
        dtype: to convert to; None: as saved.
        verify: whether to compare the weights' digests, where the directory has any.
        revision: of a model of the Hub: a branch, a tag or a commit; None: the main branch.
        token: of a user of the Hub; None: the one that is stored on this machine; False: none.
        cache_dir: where files of the Hub are kept; None: where ``huggingface_hub`` keeps them.

    Raises:
        OptionError: as in :func:`load_pruned`; or an option of the Hub, for a directory.
        CheckpointError: as in :func:`load_pruned`; or the Hub has no such model, or cannot be reached.

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
    if is_hub_name(directory):
        directory = fetched(str(directory), revision=revision, token=token, cache_dir=cache_dir)
    else:
        for name, value in (("revision", revision), ("token", token), ("cache_dir", cache_dir)):
            if value is not None:
                where = f"a name on the Hub, which {str(directory)[:80]!r} is not"
                raise OptionError(name, where, "it for a directory", f"leave {name} out")
    model: Any = load_pruned(directory, device=device, dtype=dtype, verify=verify)
    if source := name_of(directory):
        model.config._name_or_path = model.name_or_path = source
    return model  # type: ignore[no-any-return]


def _built(source: Source, weights: Weights, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """The model of a config; by transformers itself where it merges or splits the tensors of a dense one."""
    entries, names = weights.entries, None
    with foreign(hf.CONFIG, "a config of the model"):  # numbers that the class itself can make nothing of
        model = source.skeleton(entries)
        if source.renamed and not source.record.attention:
            if conversions.merges(model, entries):
                hf.check_size(model, entries)
                return hf.dense(source.folder, source.config, device, dtype)
            known = model.state_dict(keep_vars=True)  # dense checkpoints may hold more than their class has
            names = {key: name for key, name in conversions.names_in(model, entries).items() if name in known}
        filling, pruned = _fitted(model, source, weights, names)
        if size := sum(b.numel() * b.element_size() for _, b in unsaved(model)):
            if size > _ROOM:
                refuse(hf.CONFIG, f"buffers of at most {_ROOM} bytes", str(size), "check the config")
            model = source.skeleton(entries, buffers=True, dtype=dtype)
            filling, pruned = _fitted(model, source, weights, names)
    model = _filled(model, filling, pruned, device, dtype).eval()
    model = model if device is None else model.to(device)  # dtypes are as the class makes them
    hf.set_generation(source.folder, model)
    return model


def _fitted(
    model: nn.Module,
    source: Source,
    weights: Weights,
    names: dict[str, str] | None = None,
    narrower: bool = False,
) -> tuple[Filling, bool]:
    """Gives a dense model the shapes of a record, and checks that the weights fill it.

    Also returns whether anything changed.
    """
    sizes = source.sizes
    if narrower:
        sizes = {**sizes, **resized(model, {name: entry.shape for name, entry in weights.entries.items()})}
    shaped = take_shapes(model, source.record.inside(model), sizes, MANIFEST, source.alone(weights.entries))
    names = source.names(model, weights.entries) if names is None else names
    known = hf.computed(model, names.values()) if source.renamed else ()
    return Filling(model, weights, names, source.tied, MANIFEST, known), not shaped.plan.empty


def _filled(
    model: nn.Module, filling: Filling, pruned: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    filling.run(device, dtype)
    if pruned:
        ConfigEntry(model).commit()
    return model
