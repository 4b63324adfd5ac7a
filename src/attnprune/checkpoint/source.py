"""A directory that a model lies in: who wrote it, what it says of the model, and its weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import CheckpointError
from . import conversions, hf
from .entry import in_config
from .folder import Folder, refuse
from .manifest import MANIFEST, Manifest, Sizes
from .record import Record
from .skeleton import blank
from .tensors import Entry, Weights


@dataclass(frozen=True)
class Source:
    """A model on the disk. ``save_pruned`` or ``save_pretrained`` wrote it, or there are weights alone.

    >>> import tempfile
    >>> from attnprune import save_pruned
    >>> source = Source.at(save_pruned(nn.MultiheadAttention(16, 4), tempfile.mkdtemp()))
    >>> source.described, source.renamed
    (False, False)
    >>> with source.opened() as (_, weights):
    ...     weights.read("out_proj.weight").shape
    torch.Size([16, 16])
    """

    folder: Folder
    files: tuple[str, ...]
    """Of weights."""
    record: Record
    """The shape of every attention; empty where nothing was pruned."""
    manifest: Manifest | None = None
    """What ``save_pruned`` wrote beside the weights."""
    own_config: Mapping[str, Any] | None = None
    """The config of a model of transformers, if it was read: ``save_pruned`` writes it into its manifest."""

    @classmethod
    def at(cls, path: str | os.PathLike[str], *, weights_alone: bool = False) -> Source:
        """Reads what JSON files in a directory say, and no weights.

        Args:
            path: the directory.
            weights_alone: whether weights that nothing describes will do; the path may then be one file of them.

        Raises:
            CheckpointError: no such directory, or a file in it is missing, malformed, altered or a link.
        """
        where = Path(path)
        if weights_alone and where.suffix == ".safetensors" and not where.is_dir():
            return cls(Folder.at(where.parent), (where.name,), Record(()))
        folder = Folder.at(path)
        if folder.has(MANIFEST):
            return cls._ours(folder)
        if not folder.has(hf.CONFIG):
            if weights_alone:
                return cls(folder, hf.weight_files(folder), Record(()))
            refuse(MANIFEST, f"this file, or {hf.CONFIG} of a model of transformers", "neither", "check the path")
        config = hf.read_config(folder)
        return cls(folder, hf.weight_files(folder), in_config(config), None, config)

    @classmethod
    def _ours(cls, folder: Folder) -> Source:
        manifest = Manifest.read(folder)
        files = tuple(one.fresh if folder.has(one.fresh) else one.name for one in manifest.shards)
        return cls(folder, files, manifest.record, manifest, manifest.config)

    @property
    def described(self) -> bool:
        """Whether a config says how to build the model."""
        beside = self.manifest is not None and self.folder.has(hf.CONFIG)
        return beside or self.own_config is not None

    @property
    def renamed(self) -> bool:
        """Whether tensors may have the names that their class had earlier, as transformers writes them."""
        return self.manifest is None and self.own_config is not None

    @property
    def tied(self) -> Mapping[str, str]:
        """Names of tensors that are one with another that the weights hold."""
        return {} if self.manifest is None else self.manifest.tied or {}

    def alone(self, entries: Mapping[str, Entry]) -> Mapping[str, Entry]:
        """The tensors that the weights hold for one place each; none where nobody says what is tied."""
        return {} if self.manifest is None or self.manifest.tied is None else entries

    @property
    def sizes(self) -> Sizes:
        """Shapes of tensors outside attention that are smaller than the config says."""
        return {} if self.manifest is None else self.manifest.sizes

    @property
    def config(self) -> Mapping[str, Any]:
        """The config.

        Raises:
            CheckpointError: there is none, or a malformed one.
        """
        if not self.described:
            where, remedy = self.folder.path.name, "pass a dense model of the class, best on the meta device, as model="
            refuse(where, "a config to build the model from", "none", remedy)
        return hf.read_config(self.folder) if self.own_config is None else self.own_config

    @contextmanager
    def opened(self, *, verify: bool = False) -> Iterator[tuple[Source, Weights]]:
        """The weights, and what is said of them by then, as the model may be saved anew in between.

        Args:
            verify: whether to compare digests, where there are any; that reads the files once more.
        """
        source, weights = self._now()
        with weights:
            shards = source.manifest.shards if verify and source.manifest is not None else ()
            for file, shard in zip(source.files, shards, strict=bool(shards)):
                if (digest := weights.digest(file)) != shard.sha256:
                    remedy = "save it anew with save_pruned; if save_pretrained wrote it since, remove attnprune.json"
                    refuse(file, f"SHA-256 {shard.sha256[:12]}", digest[:12], remedy)
            yield source, weights

    def _now(self) -> tuple[Source, Weights]:
        """The weights, opened, and what the manifest said of them while that was done."""
        source = self
        while True:
            try:
                weights = Weights(source.folder, source.files)
            except CheckpointError:
                if self.manifest is None or source == (now := Source._ours(self.folder)):
                    raise
                source = now
                continue
            with ExitStack() as failing:
                failing.callback(weights.close)
                now = source if self.manifest is None else Source._ours(self.folder)
                if now.manifest == source.manifest:
                    failing.pop_all()
                    return source, weights
                source = now

    def skeleton(
        self, entries: Mapping[str, Entry], *, buffers: bool = False, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The dense model of the config, for weights of these entries; arguments as for :func:`.skeleton.blank`."""
        return blank(hf.maker(self.config, entries), entries, buffers, dtype)

    def names(self, model: nn.Module, entries: Mapping[str, Entry]) -> dict[str, str]:
        """For every tensor of the weights, its name in the model."""
        return conversions.names_in(model, entries) if self.renamed else {key: key for key in entries}
