"""ONNX files that take other batch sizes and lengths, tried out before they are written: :func:`export_onnx`."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..calibration.batches import called
from ..calibration.quiet import evaluated, silenced
from ..errors import DataError, ExportError, OptionError
from ..families.registry import plain, sound_views
from ..nn.attempt import MACHINE, undone
from ..nn.kept import ordinary
from ..nn.unfused import Unfused
from .folder import Folder

Axes = tuple[int | str, ...]
_LARGEST = 1_500_000_000  # bytes of weights inside an ONNX file, which may have 2 GB in all


class Exported(NamedTuple):
    """What :func:`export_onnx` wrote."""

    path: Path
    inputs: dict[str, Axes]
    """Sizes by name; those that may vary are words, equal words vary together."""
    outputs: dict[str, Axes]
    error: float | None
    """The largest difference from PyTorch's outputs, over the largest output; None where it was not checked."""


@ordinary
def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: Any,
    *,
    dynamic: Sequence[str] = ("batch", "length"),
    check: bool | str = "auto",
    tolerance: float = 1e-4,
) -> Exported:
    """Writes a model, pruned or not, as an ONNX file for batches of any size and, where possible, any length.

    ``torch.onnx.export`` wants to be told which sizes may vary; here the model is asked. The batch is the first
    dimension of the inputs that have the most samples. A length is the second one of an input, and whatever has the
    same size, if the model also runs when it is shorter by one. The file is then run in onnxruntime, on other sizes
    than it was made with, and written only if its outputs are PyTorch's. Needs ``pip install attnprune[export]``.

    Args:
        model: exported in evaluation mode, and left as found.
        path: where the file goes. Weights above 1.5 GB go to a second file beside it, ``<name>.data``.
        example_inputs: a mapping (keywords), a tuple (positional), or a tensor; a batch of one is doubled.
        dynamic: what may vary, of ``"batch"`` and ``"length"``.
        check: whether to run the file and compare; ``"auto"``: if onnxruntime is installed.
        tolerance: the largest difference allowed, over the largest output.

    Returns:
        The path, the names and sizes of inputs and outputs, and the difference found.

    Raises:
        DataError: an example input that is not a tensor with a batch dimension.
        ExportError: the exporter cannot follow the model, or the outputs differ. Nothing is written then.

    >>> import tempfile
    >>> from attnprune import prune_attention
    >>> layer = nn.TransformerEncoderLayer(16, 2, 8, batch_first=True)
    >>> report = prune_attention(layer, {"qk": 0.5})
    >>> found = export_onnx(layer, Path(tempfile.mkdtemp()) / "layer.onnx", torch.randn(2, 5, 16))
    >>> found.inputs, found.error < 1e-4
    ({'src': ('batch', 'length', 16)}, True)
    """
    model, target = plain(model), Path(path)
    batched, long = _checked(dynamic, check, target)
    with evaluated(model), Unfused():  # exporters do not know fused paths
        inputs = _named(model, example_inputs, batched)
        program, axes = _exported(model, inputs, _lengths(model, inputs) if long else {}, batched)
        program.model.metadata_props.update(_attention(model))
        folder = Folder(target.parent)
        drafts = folder.drafts()
        draft = drafts / target.name
        program.save(draft, external_data=_bytes(model) > _LARGEST)
        error = None
        if check is True or (check == "auto" and find_spec("onnxruntime") is not None):
            error = _difference(model, draft, inputs, axes)
            if not error <= tolerance:
                expected = f"outputs within {tolerance:g} of PyTorch's"
                remedy = "update onnx, onnxscript and onnxruntime, or allow more with tolerance="
                raise ExportError(target.name, expected, f"a difference of {error:.3g}", remedy)
        folder.receive(drafts, re.compile(re.escape(f"{target.name}.data")))
    graph = program.model.graph
    return Exported(target, _shapes(graph.inputs), _shapes(graph.outputs), error)


def check_installed() -> None:
    """Raises ExportError where what writes ONNX files is missing."""
    if find_spec("onnxscript") is None:
        remedy = 'install them: pip install "attnprune[export]"'
        raise ExportError("export_onnx", "onnx and onnxscript", "neither", remedy)


def _attention(model: nn.Module) -> dict[str, str]:
    """What a file says of the heads that its graph has; the config of a pruned model tells those of the dense one."""
    specs = [view.spec for view in sound_views(model)]
    layers = [
        {"name": one.name, "num_heads": one.heads, "num_key_value_heads": one.kv_heads,
         "qk_dims": list(one.qk_dims), "vo_dims": list(one.vo_dims)}
        for one in specs
    ]  # fmt: skip
    alike = {one.heads for one in specs}
    return {"attnprune.attention": json.dumps(layers)} | ({"num_heads": str(*alike)} if len(alike) == 1 else {})


def _checked(dynamic: Sequence[str], check: object, target: Path) -> tuple[bool, bool]:
    """Whether the batch and the length may vary."""
    if isinstance(dynamic, str) or not set(dynamic) <= {"batch", "length"}:
        raise OptionError("dynamic", '"batch" and "length", both, one or none', repr(dynamic), 'write ("batch",)')
    if check is not True and check is not False and check != "auto":
        raise OptionError("check", 'True, False or "auto"', repr(check), "pick one of them")
    if not target.parent.is_dir():
        raise OptionError("path", "a file in a directory that is there", str(target), "make the directory first")
    check_installed()
    return "batch" in dynamic, "length" in dynamic


def _named(model: nn.Module, given: Any, batched: bool) -> dict[str, Tensor]:
    """Example inputs by name, at least two samples of each."""
    if isinstance(given, Mapping):
        found = dict(given)
    else:
        names = list(inspect.signature(model.forward).parameters)
        values = list(given) if isinstance(given, (tuple, list)) else [given]
        found = dict(zip(names, values, strict=False))
        if len(values) > len(names):
            raise DataError("example_inputs", f"at most {len(names)} inputs", str(len(values)), "pass a mapping")
    for name, value in found.items():
        if not isinstance(value, Tensor) or not value.dim():
            kind = "a tensor of no dimension" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise DataError(
                f"example_inputs[{name}]", "a tensor (batch, ...)", kind, "bind the rest in a wrapper module"
            )
    if batched and all(len(value) == 1 for value in found.values()):
        found = {name: torch.cat([value, value]) for name, value in found.items()}
    return found


def _batched(inputs: Mapping[str, Tensor]) -> set[str]:
    """Inputs with a batch dimension: those with as many samples as any."""
    most = max((len(value) for value in inputs.values()), default=0)
    return {name for name, value in inputs.items() if len(value) == most}


def _lengths(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, set[int]]:
    """By input, the dimensions whose size may be another, together."""
    for name, value in inputs.items():
        if value.dim() < 2 or value.shape[1] < 3:
            continue
        size = value.shape[1]
        everywhere = {key: {i for i in range(1, one.dim()) if one.shape[i] == size} for key, one in inputs.items()}
        second = {key: {1} if one.dim() > 1 and one.shape[1] == size else set() for key, one in inputs.items()}
        for places in (everywhere, second, {key: {1} if key == name else set() for key in inputs}):
            try:
                model(**_shorter(inputs, places))
            except MACHINE:
                raise
            except Exception:
                continue  # a trial: models refuse a size by any error; one on the inputs themselves is raised later
            return places
    return {}


def _shorter(inputs: Mapping[str, Tensor], places: Mapping[str, set[int]]) -> dict[str, Tensor]:
    """The inputs without the last entry along these dimensions."""
    found = dict(inputs)
    for name, dims in places.items():
        for dim in dims:
            found[name] = found[name].narrow(dim, 0, found[name].shape[dim] - 1)
    return {name: value.contiguous() for name, value in found.items()}


def _exported(
    model: nn.Module, inputs: dict[str, Tensor], lengths: Mapping[str, set[int]], batched: bool
) -> tuple[Any, dict[str, dict[int, str]]]:
    """The ONNX program, and by input what its dimensions are called; without lengths if the exporter cannot do them."""
    failed: Exception | None = None
    samples = _batched(inputs) if batched else set()
    outputs = _output_names(called(model, (), inputs, "example_inputs"))
    for places in [lengths, {}] if lengths else [{}]:
        axes = {
            name: {**({0: "batch"} if name in samples else {}), **dict.fromkeys(places.get(name, ()), "length")}
            for name in inputs
        }
        try:
            with _silent():
                program = torch.onnx.export(
                    model, (), kwargs=inputs, dynamic_shapes=axes, dynamo=True, verbose=False,
                    input_names=list(inputs), output_names=outputs,
                )  # fmt: skip
            return program, axes
        except MACHINE:
            raise
        except Exception as error:
            failed = error
    cause = getattr(failed, "__cause__", None) or failed
    reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0][:160]
    remedy = "torch.export.export(model, ...) shows the line; dynamic=() asks for fixed sizes"
    raise ExportError("torch.onnx.export", "a model that it can follow", reason, remedy) from failed


def _output_names(output: Any) -> list[str] | None:
    """The keys of a mapping of tensors, ``output`` for one tensor; None for what the exporter has to name."""
    if isinstance(output, Tensor):
        return ["output"]
    if isinstance(output, Mapping) and all(isinstance(value, Tensor) for value in output.values()):
        return [str(key) for key in output]
    return None


@contextmanager
def _silent() -> Iterator[None]:
    """The exporter's advice to its own developers would stand between the caller's output."""
    logger = logging.getLogger("torch.onnx")
    with undone() as undo:
        undo.append(partial(logger.setLevel, logger.level))
        logger.setLevel(logging.ERROR)
        with silenced(Warning):
            yield


def _difference(
    model: nn.Module, file: Path, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]]
) -> float:
    """The largest difference of the file's outputs from the model's, over the model's largest; at other sizes too."""
    import onnxruntime  # type: ignore[import-untyped]

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    lengths = {name: {dim for dim, what in dims.items() if what == "length"} for name, dims in axes.items()}
    other = _shorter(inputs, lengths)
    other = {name: torch.cat([x, x[:1]]) if axes[name].get(0) == "batch" else x for name, x in other.items()}
    worst = 0.0
    for given in (dict(inputs), other):
        expected = [one for one in pytree.tree_leaves(model(**given)) if isinstance(one, Tensor)]
        names = [one.name for one in session.get_inputs()]
        try:
            found = session.run(None, {name: given[name].cpu().numpy() for name in names})
        except MACHINE:
            raise
        except Exception as error:
            sizes = {name: tuple(value.shape) for name, value in given.items()}
            raise ExportError(
                file.name, f"a file that runs with inputs {sizes}", str(error)[:120], "pass dynamic=()"
            ) from error
        for ours, theirs in zip(expected, found, strict=True):
            if ours.numel():
                gap = (ours.cpu().double() - torch.as_tensor(theirs, device="cpu").double()).abs().max()
                worst = max(worst, float(gap / ours.double().abs().max().clamp_min(1e-12)))
    return worst


def _bytes(model: nn.Module) -> int:
    return sum(one.numel() * one.element_size() for one in model.parameters())


def _shapes(values: Any) -> dict[str, Axes]:
    return {
        value.name: tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
        for value in values
    }
