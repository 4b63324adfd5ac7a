"""The record of a model as an entry of its Hugging Face config."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from ..families.registry import sound_views
from ..values import fields
from .conversions import apart
from .folder import reading, refuse
from .record import Record

ENTRY = "attnprune"
"""The entry of a Hugging Face config that holds a record."""
LOADER = "attnprune.from_pretrained"
"""What configs of pruned models name as the implementation of their attention. Transformers has none of this name, and
says so, where it would otherwise build the dense model."""
MARKS = {"attn_implementation": LOADER, "_attn_implementation_internal": LOADER}
"""That, as transformers 5 and 4 read it from ``config.json``."""


def to_entry(record: Record) -> dict[str, Any]:
    """A JSON-ready mapping that detects changes to itself."""
    attention = record.to_list()
    return {"version": 1, "attention": attention, "sha256": digest_of(attention)}


def from_entry(raw: object, where: str) -> Record:
    """Reads :func:`to_entry`'s mapping, trusting nothing."""
    with reading(where):
        found = fields.mapping("attnprune", raw, {"version", "attention", "sha256"})
        fields.integer("attnprune.version", found["version"], low=1, high=1)
    record = Record.from_list(found["attention"], where)
    if found["sha256"] != digest_of(record.to_list()):
        refuse(where, "an entry as it was written", "one that was changed")
    return record


def in_config(config: Mapping[str, Any], where: str = "config.json") -> Record:
    """The record in a config; an empty one where it has none, as dense models do."""
    return Record(()) if config.get(ENTRY) is None else from_entry(config[ENTRY], where)


def unmarked(value: Any) -> Any:
    """A config as JSON without what pruning left in it."""
    if isinstance(value, list):
        return [unmarked(one) for one in value]
    if not isinstance(value, dict):
        return value
    return {key: unmarked(one) for key, one in value.items() if key not in (ENTRY, *MARKS)}


def marked(config: Mapping[str, Any], record: Record | None = None) -> dict[str, Any]:
    """A dense model's config as JSON, with what plain transformers must not pass over in it, and in those inside it."""
    inner = {key: marked(one) for key, one in config.items() if isinstance(one, Mapping) and "model_type" in one}
    return {**config, **inner, **MARKS, **({} if record is None else {ENTRY: to_entry(record)})}


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ConfigEntry:
    """Writes the record of a Hugging Face model into its config, so that ``model.save_pretrained`` saves it too, and
    has every projection saved under a name of its own.

    Configs are often shared between models, so the model gets a copy of its own, in every module that holds it. A step
    of :func:`attnprune.surgery.commit_all`; models of other kinds stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._undo: list[Callable[[], None]] = []

    def commit(self) -> None:
        tops: dict[int, tuple[str, Any]] = {}  # by config, the outermost model that has it
        for name, module in self.model.named_modules():
            if is_pretrained(module) and hasattr(module.__dict__.get("config"), "to_json_string"):
                tops.setdefault(id(module.config), (name, module.config))
        if not tops:
            return
        memo: dict[int, Any] = {}
        own = {key: copy.deepcopy(config, memo) for key, (_, config) in tops.items()}
        views = sound_views(self.model)
        for key, (name, _) in tops.items():
            prefix = f"{name}." if name else ""
            inside = Record.of(views).below(prefix)
            if inside.attention:
                setattr(own[key], ENTRY, to_entry(inside))
                own[key].attn_implementation = LOADER  # for the file; how it runs here is another attribute
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if id(config) in own:
                self._set(module, "config", own[id(config)])
        for name, module in self.model.named_modules():
            prefix = f"{name}." if name else ""
            inner = [view.name[len(prefix) :] for view in views if view.name.startswith(prefix)]
            if is_pretrained(module) and inner and (conversions := apart(module, inner)) is not None:
                self._set(module, "_weight_conversions", conversions)

    def _set(self, module: nn.Module, key: str, value: Any) -> None:
        had, before = key in module.__dict__, module.__dict__.get(key)

        def back() -> None:
            if had:
                module.__dict__[key] = before
            else:
                module.__dict__.pop(key, None)

        self._undo.append(back)
        module.__dict__[key] = value

    def undo(self) -> None:
        for each in self._undo:
            each()
        self._undo = []


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which need not be imported to tell."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)
