"""``attnprune.json``: what lies beside the weights of a saved model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, NamedTuple

from ..errors import CheckpointError
from ..values import fields
from .entry import digest_of
from .folder import Folder, reading, refuse
from .record import Record

FORMAT, VERSION = "attnprune.model", 4
MANIFEST = "attnprune.json"
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
"""Names of files of weights, as everybody has them."""
BY_DIGEST = re.compile(r"model-[0-9a-f]{16}\.safetensors")
"""Names that they had up to version 3, and that they have until the manifest that names them is in place."""
Bytes = Annotated[int, partial(fields.integer, high=1 << 60)]
Sizes = Mapping[str, tuple[int, ...]]
"""Shapes of tensors by name."""
_HEX = re.compile(r"[0-9a-f]{64}")
_VALUES = 1 << 20
_KEYS = {"format", "version", "class", "config", "attention", "weights", "tied", "report", "sha256"}


class Shard(NamedTuple):
    """A file of weights."""

    name: str
    sha256: str
    size: Bytes | None
    """Bytes; None in version 1, which did not say."""

    @classmethod
    def numbered(cls, number: int, count: int, sha256: str, size: int) -> Shard:
        """The file of this number, from 1, of so many."""
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        return cls(name, sha256, size)

    @property
    def fresh(self) -> str:
        """The name that it has until the manifest that names it is in place."""
        return f"model-{self.sha256[:16]}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """Everything about a saved model but its numbers.

    >>> import tempfile
    >>> from torch import nn
    >>> from attnprune import save_pruned
    >>> folder = save_pruned(nn.MultiheadAttention(16, 4), tempfile.mkdtemp())
    >>> manifest = Manifest.read(folder)
    >>> manifest.model_class, manifest.record.attention[0].spec.qk_dims, len(manifest.shards)
    ('torch.nn.modules.activation.MultiheadAttention', (4, 4, 4, 4), 1)
    """

    model_class: str
    """The class's dotted name, for people; never imported."""
    record: Record
    """The shape of every attention."""
    shards: tuple[Shard, ...]
    """The files of weights."""
    config: Mapping[str, Any] | None = None
    """The config of a Hugging Face model, as it would be without pruning."""
    tied: Mapping[str, str] | None = None
    """Names of tensors that are one with another that the weights hold."""
    report: Mapping[str, Any] | None = None
    """What :meth:`attnprune.Report.to_dict` gave, if a report was saved along."""
    sizes: Sizes = field(default_factory=dict)
    """Shapes of tensors outside attention that are smaller than the config says, by name."""

    def to_json(self) -> str:
        """JSON text that detects changes to itself."""
        whole: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "class": self.model_class,
            "config": self.config,
            "attention": self.record.to_list(),
            "weights": [one._asdict() for one in self.shards],
            "tied": dict(self.tied or {}),
            "report": self.report,
            "sizes": {name: list(shape) for name, shape in self.sizes.items()},
        }
        whole["sha256"] = digest_of(whole)
        return json.dumps(whole, sort_keys=True, indent=1, allow_nan=False)

    @classmethod
    def read(cls, directory: Any) -> Manifest:
        """Reads a directory's manifest, checking every field; nothing is trusted.

        Raises:
            CheckpointError: there is none, or a field is missing, unknown, malformed or changed.
        """
        folder = directory if isinstance(directory, Folder) else Folder.at(directory)
        try:
            with reading(MANIFEST):
                found = fields.load(folder.read(MANIFEST), most=_VALUES)
                if not isinstance(found, dict) or found.get("format") != FORMAT:
                    fields.fail("format", repr(FORMAT), found.get("format") if isinstance(found, dict) else found)
                version = fields.integer("version", found.get("version"), low=1)
                if version > VERSION:
                    remedy = "update attnprune"
                    raise CheckpointError(f"{MANIFEST}: version", f"at most {VERSION}", str(version), remedy)
                return cls._of_1(found) if version == 1 else cls._of_2(found, version)
        except RecursionError as error:
            raise CheckpointError(MANIFEST, "JSON of usual depth", "much more", "save the model anew") from error

    @classmethod
    def _of_1(cls, found: dict[str, Any]) -> Manifest:
        fields.mapping("manifest", found, {"format", "version", "weights", "sha256", "attention"})
        shard = _shard("weights", {"name": found["weights"], "sha256": found["sha256"], "size": None}, BY_DIGEST)
        return cls("", Record.from_list(found["attention"], MANIFEST), (shard,))

    @classmethod
    def _of_2(cls, found: dict[str, Any], version: int) -> Manifest:
        fields.mapping("manifest", found, _KEYS | ({"sizes"} if version > 2 else set()))
        said = found.pop("sha256")
        if said != digest_of(found):
            refuse(MANIFEST, "a manifest as it was written", "one that was changed")
        named = WEIGHTS if version > 3 else BY_DIGEST
        weights = fields.array("weights", found["weights"])
        shards = tuple(_shard(f"weights[{i}]", one, named) for i, one in enumerate(weights))
        if len({one.name for one in shards}) != len(shards):
            fields.fail("weights", "each file once", [one.name for one in shards])
        tied = found["tied"]
        if not isinstance(tied, dict) or not all(isinstance(one, str) for one in tied.values()):
            fields.fail("tied", "a mapping from name to name", tied)
        for key in ("config", "report"):
            if not isinstance(found[key], dict | None):
                fields.fail(key, "a mapping or null", found[key])
        return cls(
            fields.string("class", found["class"]),
            Record.from_list(found["attention"], MANIFEST),
            shards,
            found["config"],
            tied,
            found["report"],
            _sizes(found["sizes"]) if version > 2 else {},
        )


def _sizes(raw: object) -> dict[str, tuple[int, ...]]:
    if not isinstance(raw, dict):
        fields.fail("sizes", "a mapping from names to shapes", raw)
    return {name: fields.integers(f"sizes[{name[:80]!r}]", shape) for name, shape in raw.items()}


def _shard(where: str, raw: object, named: re.Pattern[str]) -> Shard:
    shard = fields.read(Shard, raw, where)
    told = named is WEIGHTS or shard.name == shard.fresh
    if not named.fullmatch(shard.name) or not _HEX.fullmatch(shard.sha256) or not told:
        fields.fail(where, "a name of weights in this directory, and their SHA-256", shard.name)
    return shard
