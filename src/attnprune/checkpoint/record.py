"""What shape every attention of a saved model has, and the plan that gives it to a dense one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import nn

from ..errors import AttnPruneError, CheckpointError
from ..families.base import AttentionView
from ..families.expansion import rescale
from ..families.registry import all_views, sound_views
from ..values import fields
from ..values.layer_plan import Channels, LayerPlan
from ..values.layout import KINDS
from ..values.plan import Plan
from ..values.spec import AttentionSpec
from .folder import refuse

ENTRY = "attnprune"
"""The entry of a Hugging Face config that holds a record."""
_OTHER = "pass a dense model of the class that was saved"


class Saved(NamedTuple):
    """One attention of a saved model."""

    spec: AttentionSpec
    kept: tuple[int, ...]
    """For every head, its number before any pruning."""


@dataclass(frozen=True)
class Record:
    """The attention modules of a model as they are, in model order: all that loading needs beside a dense model.

    >>> model = nn.MultiheadAttention(16, 4)
    >>> record = Record.of(all_views(model))
    >>> Record.from_list(record.to_list(), "here") == record
    True
    """

    attention: tuple[Saved, ...]

    @classmethod
    def of(cls, views: Sequence[AttentionView]) -> Record:
        return cls(tuple(Saved(view.spec, _kept(view)) for view in views))

    def to_list(self) -> list[dict[str, Any]]:
        """A JSON-ready list."""
        return [{"spec": one.spec.to_dict(), "kept": list(one.kept)} for one in self.attention]

    @classmethod
    def from_list(cls, raw: object, where: str) -> Record:
        """Reads :meth:`to_list`'s list, trusting nothing.

        Raises:
            CheckpointError: a missing, unknown or malformed field.
        """
        saved = []
        try:
            for i, each in enumerate(fields.array("attention", raw)):
                one = fields.mapping(f"attention[{i}]", each, {"spec", "kept"})
                spec = AttentionSpec.from_dict(one["spec"], f"attention[{i}].spec")
                kept = fields.integers(f"attention[{i}].kept", one["kept"])
                if len(kept) != spec.heads or list(kept) != sorted(set(kept)):
                    fields.fail(f"attention[{i}].kept", f"{spec.heads} ascending numbers", one["kept"])
                saved.append(Saved(spec, kept))
        except CheckpointError:
            raise
        except AttnPruneError as error:
            raise malformed(where, error) from error
        if len({one.spec.name for one in saved}) != len(saved):
            refuse(where, "each attention once", "one twice")
        return cls(tuple(saved))

    def inside(self, model: nn.Module) -> Record:
        """The same for a base model of transformers without the head that it was saved with, or with a head on top."""
        prefix = f"{getattr(model, 'base_model_prefix', '') or ' '}."
        inner = [one for one in self.attention if one.spec.name.startswith(prefix)]
        if bool(inner) == hasattr(model, prefix[:-1]):
            return self
        if inner:
            return Record(tuple(Saved(replace(one.spec, name=one.spec.name[len(prefix) :]), one.kept) for one in inner))
        return Record(tuple(Saved(replace(one.spec, name=prefix + one.spec.name), one.kept) for one in self.attention))

    def plan(self, views: Sequence[AttentionView], where: str) -> Plan:
        """What gives attention modules the shapes of the record; which channels go is of no matter.

        Raises:
            CheckpointError: the modules are others, or have fewer heads or channels than the record.
        """
        by_name = {view.name: view for view in views}
        return Plan(tuple(_shrink(one, by_name, where) for one in self.attention))

    def settle(self, model: nn.Module, where: str) -> None:
        """Checks modules that have taken the shapes, and gives them their softmax scales.

        Raises:
            CheckpointError: a module is not what the record says in some other way (widths, biases, scale).
        """
        by_name = {one.spec.name: one for one in self.attention}
        for view in all_views(model, by_name):
            state, scale = view.state, by_name[view.name].spec.scale
            if state is not None and state.expanded is not None:
                rescale(view, scale)
            elif state is not None:
                view.module.attnprune_state = state._replace(scale=scale)  # type: ignore[assignment]
        for view in all_views(model, by_name):
            saved = by_name[view.name]
            if view.spec != saved.spec:
                found, expected = view.spec.to_dict(), saved.spec.to_dict()
                differ = [key for key in expected if expected[key] != found[key]]
                shown = [str({key: one[key] for key in differ})[:120] for one in (expected, found)]
                refuse(f"{where}: {view.name}", shown[0], shown[1], "pass a model of the class that was saved")


def malformed(where: str, error: AttnPruneError) -> CheckpointError:
    """An error of a strict reader as one of this file."""
    return CheckpointError(f"{where}: {error.where[:80]}", error.expected, error.found, "save the model anew")


def _kept(view: AttentionView) -> tuple[int, ...]:
    """For every head of a module, its number before any pruning, as far as the module knows."""
    state = getattr(view.module, "attnprune_state", None)
    return tuple(state.kept) if state is not None else tuple(range(view.spec.heads))


def _shrink(saved: Saved, views: Mapping[str, AttentionView], where: str) -> LayerPlan:
    view = views.get(saved.spec.name)
    if view is None:
        found = f"an attention module of this name (the model has {list(views)[:4]})"
        refuse(f"{where}: {saved.spec.name[:80]}", found, "none", _OTHER)
    return layer_between(view.spec, _kept(view), saved, where)


def layer_between(spec: AttentionSpec, present: Sequence[int], saved: Saved, where: str) -> LayerPlan:
    """What gives an attention module the shape of a saved one.

    Args:
        spec: the module before.
        present: for every head of it, its number before any pruning.
        saved: what it becomes.
        where: the file that says so, for messages.

    Raises:
        CheckpointError: it has fewer heads or channels than that.
    """
    where = f"{where}: {saved.spec.name[:80]}"
    if spec.qk_dims == saved.spec.qk_dims and spec.vo_dims == saved.spec.vo_dims:
        return LayerPlan(spec)
    if not set(saved.kept) <= set(present):
        refuse(where, f"heads of {list(present)[:16]}", str(list(saved.kept))[:80], _OTHER)
    places = [present.index(number) for number in saved.kept]
    channels: dict[str, Channels] = {}
    for kind in KINDS:
        removed: list[tuple[int, ...]] = [()] * spec.heads
        for place, dim in zip(places, saved.spec.dims(kind), strict=True):
            if dim > spec.dims(kind)[place]:
                refuse(where, f"at most {spec.dims(kind)[place]} {kind} channels", str(dim), _OTHER)
            removed[place] = tuple(range(dim, spec.dims(kind)[place]))
        channels[kind] = tuple(removed)
    gone = tuple(sorted(set(range(spec.heads)) - set(places)))
    return LayerPlan(spec, gone, channels["qk"], channels["vo"])


# the same record as an entry of a Hugging Face config


def to_entry(record: Record) -> dict[str, Any]:
    """A JSON-ready mapping that detects changes to itself."""
    attention = record.to_list()
    return {"version": 1, "attention": attention, "sha256": digest_of(attention)}


def from_entry(raw: object, where: str) -> Record:
    """Reads :func:`to_entry`'s mapping, trusting nothing."""
    try:
        found = fields.mapping("attnprune", raw, {"version", "attention", "sha256"})
        fields.integer("attnprune.version", found["version"], low=1, high=1)
    except AttnPruneError as error:
        raise malformed(where, error) from error
    record = Record.from_list(found["attention"], where)
    if found["sha256"] != digest_of(record.to_list()):
        refuse(where, "an entry as it was written", "one that was changed")
    return record


def digest_of(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class ConfigEntry:
    """Writes the record of a Hugging Face model into its config, so that ``model.save_pretrained`` saves it too.

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
            inside = Record(
                tuple(
                    Saved(replace(one.spec, name=one.spec.name[len(prefix) :]), one.kept)
                    for one in Record.of(views).attention
                    if one.spec.name.startswith(prefix)
                )
            )
            if inside.attention:
                setattr(own[key], ENTRY, to_entry(inside))
        for module in self.model.modules():
            config = module.__dict__.get("config")
            if id(config) in own:
                self._undo.append(_setter(module, config))
                module.__dict__["config"] = own[id(config)]

    def undo(self) -> None:
        for each in self._undo:
            each()
        self._undo = []


def _setter(module: nn.Module, config: Any) -> Callable[[], None]:
    return lambda: module.__dict__.__setitem__("config", config)


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is a model of transformers, which need not be imported to tell."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)
