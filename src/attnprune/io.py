"""A pruned model as a directory: safetensors and JSON, nothing that runs."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import nn

from . import fields
from .adapters.registry import all_views, plain
from .errors import AttnPruneError, CheckpointError, NotExpressibleError
from .nn import host_class
from .plan import Channels, LayerPlan, Plan
from .spec import KINDS, AttentionSpec
from .surgery import Surgeon, check_views
from .views import AttentionView

FORMAT, VERSION = "attnprune.model", 1
MANIFEST, CONFIG = "attnprune.json", "config.json"
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
_LONGEST = 1 << 26  # bytes of a JSON file


class _Saved(NamedTuple):
    """One attention of a saved model."""

    spec: AttentionSpec
    kept: tuple[int, ...]
    """For every head, its number before any pruning."""


def save_pruned(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes a model, pruned or not, as safetensors weights and a JSON manifest.

    The manifest names the shape of every attention, so :func:`load_pruned` needs nothing but a dense model of the same
    class, and for Hugging Face models (whose ``config.json`` is written too) not even that. The weights are written
    first, under a name that their digest gives, and the manifest is then replaced in one step: if the process dies, the
    directory holds the old model or the new one.

    Args:
        model: any module; attention of known families may have any shape that pruning gives.
        directory: made if it is not there; other files in it stay.

    Returns:
        The directory.

    Raises:
        WrappedModelError: (and its kinds) the model is wrapped, sharded or quantised.

    >>> import tempfile
    >>> from attnprune import prune_attention
    >>> dense = nn.TransformerEncoderLayer(32, 4)
    >>> pruned = copy.deepcopy(dense)
    >>> report = prune_attention(pruned, 0.5)
    >>> folder = save_pruned(pruned, tempfile.mkdtemp())
    >>> again = load_pruned(folder, dense)
    >>> all(torch.equal(value, again.state_dict()[key]) for key, value in pruned.state_dict().items())
    True
    """
    from safetensors.torch import save_model

    model = plain(model)
    views = all_views(model)
    check_views(model, views)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f".{os.getpid()}.draft"
    try:
        save_model(model, str(draft))
        digest = _digest(draft)
        name = f"model-{digest[:16]}.safetensors"
        _flush(draft)
        os.replace(draft, folder / name)
    finally:
        draft.unlink(missing_ok=True)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_string"):
        config = copy.deepcopy(config)
        config.architectures = [host_class(model).__name__]
        _write(folder / CONFIG, config.to_json_string())
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "weights": name,
        "sha256": digest,
        "attention": [{"spec": view.spec.to_dict(), "kept": list(_kept(view))} for view in views],
    }
    _write(folder / MANIFEST, json.dumps(manifest, sort_keys=True, indent=1))
    for stale in folder.glob("model-*.safetensors"):
        if stale.name != name and _WEIGHTS.fullmatch(stale.name):
            stale.unlink()
    return folder


def load_pruned(
    directory: str | os.PathLike[str],
    model: nn.Module | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    verify: bool = True,
) -> nn.Module:
    """Reads what :func:`save_pruned` wrote; nothing in the directory is trusted or run.

    Args:
        directory: where the model lies.
        model: a dense model of the class that was saved, changed in place. None: built from ``config.json``, for
            models of transformers.
        device: where the model goes.
        dtype: to convert to; None: as saved, bit by bit.
        verify: whether to compare the weights' digest, which reads the file once more.

    Returns:
        The model, in evaluation mode if it was built here.

    Raises:
        CheckpointError: a file is missing, malformed, altered, a link, or does not fit the model, which is then as it
            was.
    """
    from safetensors.torch import load_model

    folder = Path(directory)
    manifest = _manifest(folder)
    weights = folder / manifest["weights"]
    if weights.is_symlink() or not weights.is_file():
        _refuse(manifest["weights"], "a file of weights beside the manifest", "none, or a link")
    if verify and _digest(weights) != manifest["sha256"]:
        _refuse(manifest["weights"], f"SHA-256 {manifest['sha256'][:12]}", f"{_digest(weights)[:12]}")
    saved = manifest["attention"]
    built = model is None
    dense = _from_config(folder) if model is None else plain(model)
    views = {view.name: view for view in all_views(dense)}
    plan = Plan(tuple(_shrink(one, views) for one in saved))
    shapes = _shapes_in(weights)
    surgeon = Surgeon.prepare(dense, list(views.values()), plan)
    surgeon.commit()
    try:
        _check_shapes(dense, shapes)
    except BaseException:
        surgeon.undo()
        raise
    for key, tensor in dense.state_dict(keep_vars=True).items():
        if key in shapes and tensor.dtype != shapes[key][1]:
            tensor.data = tensor.data.to(shapes[key][1])
    load_model(dense, weights)
    dense.to(device=device, dtype=dtype)
    return dense.eval() if built else dense


def _shrink(saved: _Saved, views: Mapping[str, AttentionView]) -> LayerPlan:
    """The plan that gives a dense attention the shape that was saved; which numbers go is of no matter."""
    view = views.get(saved.spec.name)
    where = f"{MANIFEST}: {saved.spec.name}"
    if view is None:
        _refuse(where, f"an attention module of this name (the model has {list(views)[:4]})", "none")
    spec = view.spec
    present = _kept(view)
    if spec.qk_dims == saved.spec.qk_dims and spec.vo_dims == saved.spec.vo_dims:
        return LayerPlan(spec)
    if not set(saved.kept) <= set(present) or list(saved.kept) != sorted(set(saved.kept)):
        _refuse(where, f"heads of {list(present)}", str(list(saved.kept)))
    places = [present.index(number) for number in saved.kept]
    channels: dict[str, Channels] = {}
    for kind in KINDS:
        removed: list[tuple[int, ...]] = [()] * spec.heads
        for place, dim in zip(places, saved.spec.dims(kind), strict=True):
            if dim > spec.dims(kind)[place]:
                _refuse(where, f"at most {spec.dims(kind)[place]} {kind} channels", str(dim))
            removed[place] = tuple(range(dim, spec.dims(kind)[place]))
        channels[kind] = tuple(removed)
    gone = tuple(head for head in range(spec.heads) if head not in places)
    return LayerPlan(spec, gone, channels["qk"], channels["vo"])


def _kept(view: AttentionView) -> tuple[int, ...]:
    """For every head of a module, its number before any pruning, as far as the module knows."""
    state = getattr(view.module, "attnprune_state", None)
    return tuple(state.kept) if state is not None else tuple(range(view.spec.heads))


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, every field checked."""
    path = folder / MANIFEST
    try:
        text = _read(path)
        keys = {"format", "version", "weights", "sha256", "attention"}
        found = fields.mapping("manifest", fields.load(text), keys)
        if found["format"] != FORMAT or fields.integer("version", found["version"], low=1) != VERSION:
            _refuse(MANIFEST, f"{FORMAT} of version {VERSION}", f"{found['format']!r} of {found['version']!r}")
        name, digest = (fields.string(key, found[key]) for key in ("weights", "sha256"))
        if not _WEIGHTS.fullmatch(name) or not re.fullmatch(r"[0-9a-f]{64}", digest):
            _refuse(MANIFEST, "a name of weights in this directory and their SHA-256", f"{name[:40]!r}")
        saved = []
        for i, raw in enumerate(fields.array("attention", found["attention"])):
            one = fields.mapping(f"attention[{i}]", raw, {"spec", "kept"})
            spec = AttentionSpec.from_dict(one["spec"], f"attention[{i}].spec")
            kept = fields.integers(f"attention[{i}].kept", one["kept"])
            if len(kept) != spec.heads:
                _refuse(f"{MANIFEST}: attention[{i}].kept", f"{spec.heads} numbers", f"{len(kept)}")
            saved.append(_Saved(spec, kept))
        if len({one.spec.name for one in saved}) != len(saved):
            _refuse(MANIFEST, "each attention once", "one twice")
    except CheckpointError:
        raise
    except AttnPruneError as error:
        raise CheckpointError(
            f"{MANIFEST}: {error.where}", error.expected, error.found, "save the model anew"
        ) from error
    return {"weights": name, "sha256": digest, "attention": saved}


def _from_config(folder: Path) -> nn.Module:
    """A dense model of the architecture that ``config.json`` names, one of transformers' own."""
    import transformers

    remedy = "pass a dense model of the same class as model="
    try:
        loaded = fields.load(_read(folder / CONFIG))
    except AttnPruneError as error:
        raise CheckpointError(CONFIG, error.expected, error.found, remedy) from error
    raw: dict[str, Any] = loaded if isinstance(loaded, dict) else {}
    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not inspect.isclass(cls) or not issubclass(cls, transformers.PreTrainedModel):
        _refuse(CONFIG, "an architecture of transformers", repr(names)[:60])
    try:
        architecture: Any = cls
        config = architecture.config_class.from_dict({k: v for k, v in raw.items() if k != "auto_map"})
        built: nn.Module = architecture(config)
    except Exception as error:
        raise CheckpointError(CONFIG, f"a config of {name}", str(error)[:80], remedy) from error
    return built


def _shapes_in(weights: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(weights, framework="pt") as file:
            found = {}
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                part = file.get_slice(key)
                found[key] = (tuple(part.get_shape()), _DTYPES.get(part.get_dtype(), torch.float32))
            return found
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(weights.name, "a safetensors file", str(error)[:80], "save the model anew") from error


_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def _check_shapes(model: nn.Module, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
    """Raises unless the file has every tensor of the model, in its shape, and no other; tied ones may come once."""
    state = model.state_dict(keep_vars=True)
    tied: dict[tuple[int, ...], list[str]] = {}
    for key, tensor in state.items():
        place = (tensor.data_ptr(), *tensor.shape) if tensor.numel() else (id(tensor),)
        tied.setdefault(place, []).append(key)
        if key in shapes and shapes[key][0] != tuple(tensor.shape):
            _refuse(f"weights: {key}", f"shape {tuple(tensor.shape)}", f"{shapes[key][0]}")
    unknown = sorted(shapes.keys() - state.keys())
    if unknown:
        _refuse("weights", "tensors of the model alone", f"{unknown[:3]}")
    for keys in tied.values():
        if not any(key in shapes for key in keys):
            _refuse("weights", f"a tensor for {keys[0]}", "none")


def export_stock(model: nn.Module, directory: str | os.PathLike[str]) -> Path:
    """Writes a checkpoint that plain transformers loads, without attnprune installed.

    Possible where every attention has the same heads and dims, qk equals vo, and the model's class reads the head dim
    from its config (AST, ViT, DeiT, DINOv2 and others in transformers 5): ``config.num_attention_heads`` and
    ``config.head_dim`` are set, and the softmax scale's ratio is folded into Q.

    Args:
        model: a pruned model of transformers; left as it is.
        directory: where ``config.json`` and the weights go, by ``save_pretrained``.

    Raises:
        NotExpressibleError: no stock config gives this shape; says which layer stands in the way, and which options
            give plans that can be exported.
    """
    model = plain(model)
    views = all_views(model)
    config: Any = getattr(model, "config", None)
    remedy = 'use scope="local", heads="uniform" and equal ratios, or save_pruned'
    if config is None or not hasattr(model, "save_pretrained"):
        raise NotExpressibleError("model", "a model of transformers", f"a {type(model).__name__}", "use save_pruned")
    first = views[0].spec if views else None
    for view in views:
        spec = view.spec
        assert first is not None
        if spec.ragged or spec.qk_dim != spec.vo_dim or (spec.heads, spec.qk_dim) != (first.heads, first.qk_dim):
            expected = f"{first.heads} heads of {first.qk_dim} (qk) and as many (vo), as every layer"
            raise NotExpressibleError(view.name, expected, spec.describe(), remedy)
    config = copy.deepcopy(config)
    if first is not None:
        config.num_attention_heads, config.head_dim = first.heads, first.qk_dim
    config.architectures = [host_class(model).__name__]
    try:
        stock: Any = host_class(model)(config)
    except Exception as error:
        raise NotExpressibleError("config", "head_dim to be free", str(error)[:80], remedy) from error
    state, theirs = model.state_dict(), {view.name: view for view in all_views(stock)}
    for key, tensor in stock.state_dict().items():
        if key not in state or state[key].shape != tensor.shape:
            found = "none" if key not in state else str(tuple(state[key].shape))
            raise NotExpressibleError(key, f"shape {tuple(tensor.shape)}, all that the class can have", found, remedy)
    stock.to(next(model.parameters()).dtype)
    stock.load_state_dict(state)
    with torch.no_grad():
        for view in views:
            gain = view.spec.scale / theirs[view.name].spec.scale
            for key, slot in theirs[view.name].slots.items():
                if key.startswith("q."):
                    slot.cut(slot.parameter.detach()).mul_(gain)
    stock.save_pretrained(directory)
    return Path(directory)


# files


def _refuse(where: str, expected: str, found: str) -> NoReturn:
    raise CheckpointError(where, expected, found, "save the model anew with save_pruned")


def _read(path: Path) -> bytes:
    if path.is_symlink() or not path.is_file():
        _refuse(path.name, "a file", "none, or a link")
    if path.stat().st_size > _LONGEST:
        _refuse(path.name, f"at most {_LONGEST} bytes", str(path.stat().st_size))
    return path.read_bytes()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        found = hashlib.sha256()
        for block in iter(lambda: file.read(1 << 20), b""):
            found.update(block)
    return found.hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _write(path: Path, text: str) -> None:
    """Replaces a file in one step."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
