"""What a directory holds, without reading a weight."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

from torch import nn

from ..cost.counting import count_parameters
from ..errors import AttnPruneError, CheckpointError
from ..families.looks import Skipped
from ..families.registry import Survey, all_views
from ..nn.kept import ordinary
from ..report.report import Report
from ..surgery import Verified
from ..values import fields
from ..values.asked import Asked
from ..values.layer_plan import LayerPlan
from ..values.layout import KINDS
from ..values.plan import Plan
from ..values.recovery import Recovered
from ..values.spec import AttentionSpec
from .folder import refuse
from .manifest import MANIFEST, Manifest, Sizes
from .record import Record, layer_between
from .shapes import take_shapes
from .source import Source


@ordinary
def load_skeleton(directory: str | os.PathLike[str], *, dense: bool = False) -> nn.Module:
    """A Hugging Face model of a directory, its parameters on the meta device: shapes and classes, but no numbers.

    For looking at models that would not fit into memory; reads JSON and the headers of the files of weights.

    Args:
        directory: written by :func:`save_pruned` or by ``model.save_pretrained``.
        dense: the model as it was before any pruning.

    Raises:
        CheckpointError: as in :func:`load_pruned`.

    >>> import tempfile
    >>> from attnprune import prune_attention, save_pruned
    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8))
    >>> report = prune_attention(model, 0.5)
    >>> load_skeleton(save_pruned(model, tempfile.mkdtemp())).layers[0].attention.q_proj
    Linear(in_features=32, out_features=16, bias=True)
    """
    model, source = _skeleton(directory)
    if not dense:
        shrunk(model, source.record, MANIFEST, source.sizes)
    return model


class Overview(NamedTuple):
    """A model in a directory, in short."""

    model_class: str
    attention: tuple[AttentionSpec, ...]
    parameters: int
    """Of models that are not of transformers: all numbers in the files of weights, buffers too."""
    skipped: tuple[Skipped, ...] = ()
    """What looks like attention and cannot be pruned; of models of transformers."""


@ordinary
def overview(directory: str | os.PathLike[str]) -> Overview:
    """The class, attention and size of a model in a directory, of any kind; reads JSON and headers of weights.

    Raises:
        CheckpointError: as in :func:`load_pruned`.
    """
    source = Source.at(directory)
    manifest = without_config(source)
    if manifest is None:
        model = load_skeleton(directory)
        survey = Survey(model)
        specs = tuple(view.spec for view in survey.views)
        return Overview(type(model).__name__, specs, count_parameters(model), survey.skipped())
    with source.opened() as (_, weights):
        size = sum(prod(entry.shape) for entry in weights.entries.values())
    return Overview(manifest.model_class, tuple(one.spec for one in manifest.record.attention), size)


@ordinary
def read_report(directory: str | os.PathLike[str]) -> Report:
    """What was pruned from the model of a directory; for Hugging Face models, against the dense model of its config.

    There shapes alone tell; what was asked for, multiply-adds and notes are there if the model was saved with
    ``report=``, and pruned once. For any other model such a report is all there is. The report's plan counts how many
    channels went from every head, but does not know which.

    Raises:
        CheckpointError: as in :func:`load_pruned`; no report of a model that is not of transformers.

    >>> import tempfile
    >>> from attnprune import prune_attention, save_pruned
    >>> from transformers import ViTConfig, ViTModel
    >>> model = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8))
    >>> report = prune_attention(model, 0.5)
    >>> str(read_report(save_pruned(model, tempfile.mkdtemp(), report=report))) == str(report)
    True
    """
    source = Source.at(directory)
    manifest = without_config(source)
    if manifest is not None:
        return _as_saved(manifest)
    model, source = _skeleton(source)
    before = count_parameters(model)
    plan = shrunk(model, source.record, MANIFEST, source.sizes)
    whole = Report(plan, (before, count_parameters(model)))
    saved = {} if source.manifest is None else source.manifest.report or {}
    return _remembered(whole, saved) or whole


def without_config(source: Source) -> Manifest | None:
    """The manifest of a model that is not of transformers; None where there is a config."""
    return None if source.described else source.manifest


def _as_saved(manifest: Manifest) -> Report:
    """The report in a manifest, if it is about the shapes there."""
    where, remedy = f"{MANIFEST}: report", "save the model with save_pruned(..., report=report) after one pruning"
    if manifest.report is None:
        refuse(where, "one, as no config tells what the dense model was", "none", remedy)
    try:
        by_name = {one.spec.name: one for one in manifest.record.attention}
        layers, count = [], 0
        for raw in fields.array(where, manifest.report["layers"]):
            saved = by_name[raw["name"]]
            facts = ("qk_dims", "vo_dims", "groups", "rotary_dims")
            dims = {fact: raw[fact][0] for fact in facts if fact in raw}
            spec = AttentionSpec.from_dict({**saved.spec.to_dict(), **dims}, where)
            count = fields.integer(f"{where}: channels of all layers", count + sum(spec.qk_dims) + sum(spec.vo_dims))
            layers.append(layer_between(spec, range(spec.heads), saved, MANIFEST))
        before, after = (
            fields.integer(f"{where}.model_parameters", one)
            for one in fields.array(where, manifest.report["model_parameters"], 2)
        )
        found = _remembered(Report(Plan(tuple(layers)), (before, after)), manifest.report)
    except (AttnPruneError, LookupError, TypeError) as error:
        raise CheckpointError(where, "one of this model", str(error)[:80], remedy) from error
    if found is None:
        refuse(where, "one of this model", "one of other shapes", remedy)
    return found


def _skeleton(directory: str | os.PathLike[str] | Source) -> tuple[nn.Module, Source]:
    """The dense model without data, and where it lies."""
    with (directory if isinstance(directory, Source) else Source.at(directory)).opened() as (source, weights):
        return source.skeleton(weights.entries), source


def shrunk(model: nn.Module, record: Record, where: str, sizes: Sizes | None = None) -> Plan:
    """Gives a model without data the shapes of a record; the plan that did it, with the modules that it left alone.

    Raises:
        CheckpointError: the model is not the one that ``where`` says.
    """
    plan = take_shapes(model, record.inside(model), sizes or {}, where).plan
    named = {layer.spec.name: layer for layer in plan}
    return Plan(tuple(named.get(view.name, LayerPlan(view.spec)) for view in all_views(model)))


def _remembered(whole: Report, saved: Mapping[str, Any]) -> Report | None:
    """The report with what a saved one adds, if that is about the same shapes; of the layers that it was about."""
    try:
        shapes = {one["name"]: [*one["qk_dims"], *one["vo_dims"]] for one in saved["layers"]}
        layers = [layer for layer in whole.layers if layer.spec.name in shapes]
        mine = {
            layer.spec.name: [list(spec.dims(kind)) for kind in KINDS for spec in (layer.spec, layer.after)]
            for layer in layers
        }
        others = [layer for layer in whole.layers if layer.spec.name not in shapes]
        if shapes != mine or not all(layer.empty for layer in others):
            return None
        asked = None if saved["asked"] is None else Asked.from_dict({"ratios": saved["asked"], **saved["how"]})
        macs = None if saved["macs"] is None else (int(saved["macs"][0]), int(saved["macs"][1]))
        notes = tuple(str(note) for note in saved["notes"])
        skipped = tuple(Skipped(*(str(one[key]) for key in Skipped._fields)) for one in saved.get("skipped", ()))
        ways = {str(name): str(way) for name, way in saved.get("ways", {}).items()}
        cache, seen = saved.get("cache_bytes"), saved.get("verified")
        verified = None if seen is None else Verified(float(seen["error"]), int(seen["samples"]))
        tuned = saved.get("recovered")
        recovered = None if tuned is None else Recovered(
            float(tuned["before"]), float(tuned["after"]), int(tuned["steps"]), float(tuned["seconds"])
        )  # fmt: skip
        found = Report(
            Plan(tuple(layers), asked), whole.model_parameters, macs, notes, None, skipped, ways,
            None if cache is None else (int(cache[0]), int(cache[1])), verified, recovered,
        )  # fmt: skip
        told = asked is None or "ratios" not in saved["how"] or found.asked == saved["asked"]  # earlier: ratios alone
        return found if told else None
    except (AttnPruneError, LookupError, TypeError, ValueError, AttributeError):  # a report of another version
        return None
