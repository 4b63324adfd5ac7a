"""What is particular to models of Hugging Face: configs that are not trusted, classes, files, names of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..values import fields
from .entry import ENTRY
from .folder import Folder, foreign, reading, refuse
from .tensors import Entry

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
_REMEDY = "pass a dense model of the same class as model="
_DROPPED = {  # entries by which a config leads elsewhere: to code, other files, kernels to fetch
    "auto_map", "transformers_weights", "fusion_config", "kernel_config", "custom_pipelines", "distributed_config",
    "attn_implementation", "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset",
    "experts_implementation", "_experts_implementation", "_experts_implementation_internal", "trust_remote_code",
    "_commit_hash",
}  # fmt: skip
_DTYPES = ("dtype", "torch_dtype")
_MANY = 1 << 16  # layers or labels that a config may name
_LARGE = 1 << 25  # any other whole number


def read_config(folder: Folder) -> dict[str, Any]:
    """The mapping in ``config.json``.

    Raises:
        CheckpointError: there is none, or not a mapping.
    """
    with reading(CONFIG, _REMEDY):
        found = fields.load(folder.read(CONFIG), most=1 << 20)
        if not isinstance(found, dict):
            fields.fail("config", "a mapping", found)
        return found


def architecture(raw: Mapping[str, Any]) -> type[Any]:
    """The class of transformers that a config names.

    Raises:
        CheckpointError: it names none, or something else.
    """
    import transformers

    names = raw.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else None
    cls: Any = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if (
        not inspect.isclass(cls)
        or not issubclass(cls, transformers.PreTrainedModel)
        or not getattr(cls, "config_class", None)
    ):
        refuse(CONFIG, "an architecture of transformers", repr(names)[:60], _REMEDY)
    found: type[Any] = cls
    return found


_FLOATS = ("Infinity", "-Infinity", "NaN")


def config_of(cls: type[Any], raw: Mapping[str, Any]) -> Any:
    """A config object without what would lead elsewhere: code, other files, kernels to fetch."""
    kind, own = raw.get("model_type"), getattr(cls.config_class, "model_type", None)
    known = cls.config_class if kind in (None, own) else _shared(cls, kind)
    if known is None:
        refuse(f"{CONFIG}: model_type", f"{own!r}, as {cls.__name__} has", repr(kind)[:60], _REMEDY)
    with foreign(CONFIG, f"a config of {cls.__name__}", _REMEDY):
        return known.from_dict(_clean(raw, CONFIG, 0))


def _shared(cls: type[Any], kind: object) -> Any:
    """The class of configs of another kind, where transformers builds models of that kind by this class."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    tables = [table for name, table in vars(modeling_auto).items() if name.endswith("_MAPPING_NAMES")]
    names = [table.get(kind, ()) for table in tables] if isinstance(kind, str) else []
    built = {one for given in names for one in ((given,) if isinstance(given, str) else given)}
    return CONFIG_MAPPING[kind] if cls.__name__ in built else None


def _clean(value: Any, where: str, depth: int) -> Any:
    if depth > 16:
        refuse(CONFIG, "at most 16 mappings and lists inside one another", "more", _REMEDY)
    if isinstance(value, list):
        return [_clean(one, where, depth + 1) for one in value]
    if not isinstance(value, dict):
        if isinstance(value, int) and abs(value) > (_MANY if _counts(where) else _LARGE):
            refuse(f"{CONFIG}: {where[:60]}", f"at most {_MANY if _counts(where) else _LARGE}", str(value), _REMEDY)
        return value
    if value.keys() == {"__float__"} and str(value["__float__"]) in _FLOATS:  # as transformers writes them
        return float(value["__float__"])
    for key in value.keys() & {"quantization_config", "use_pretrained_backbone"}:
        if value[key]:
            refuse(f"{CONFIG}: {key}", "none", str(value[key])[:60], "load it with transformers")
    for key in value.keys() & set(_DTYPES):
        kind = value[key]
        if kind is not None and not (isinstance(kind, str) and isinstance(getattr(torch, kind, None), torch.dtype)):
            refuse(f"{CONFIG}: {key}", "a dtype's name", repr(kind)[:60], _REMEDY)
    kept = {key: one for key, one in value.items() if key not in _DROPPED and not (depth == 0 and key == ENTRY)}
    return {key: _clean(one, key, depth + 1) for key, one in kept.items()}


def _counts(key: str) -> bool:
    return any(word in key for word in ("layer", "label", "depth", "block"))


def maker(raw: Mapping[str, Any], keys: Iterable[str] = ("pooler",)) -> Callable[[], nn.Module]:
    """A function that builds the dense model of a config; without a pooler, where ``keys`` of its weights name none."""
    cls = architecture(raw)
    config_of(cls, raw)
    bare = "add_pooling_layer" in inspect.signature(cls).parameters and not any("pooler" in key for key in keys)

    def make() -> nn.Module:
        with foreign(CONFIG, f"a config of {cls.__name__}", _REMEDY):
            built: nn.Module = cls(config_of(cls, raw))
            if bare and any("pooler" in key for key in built.state_dict()):  # a pooler may hold no weights at all
                built = cls(config_of(cls, raw), add_pooling_layer=False)
            return built

    return make


def weight_files(folder: Folder) -> tuple[str, ...]:
    """The files of weights of a ``save_pretrained`` directory.

    Raises:
        CheckpointError: there are none, or the index is malformed.
    """
    if folder.has("adapter_config.json"):
        refuse("adapter_config.json", "a model", "an adapter", "load its base model, then the adapter with peft")
    if folder.has(SINGLE) or not folder.has(INDEX):
        return (SINGLE,)
    with reading(INDEX):
        found = fields.load(folder.read(INDEX), most=1 << 20)
        if not isinstance(found, dict) or not isinstance(found.get("weight_map"), dict):
            fields.fail("weight_map", "a mapping", found)
        names = [fields.string("weight_map", one) for one in found["weight_map"].values()]
    return tuple(sorted(set(names)))


def check_size(model: nn.Module, entries: Mapping[str, Entry]) -> None:
    """Raises if a model has many more numbers than its weights hold."""
    wanted, held = sum(p.numel() for p in model.parameters()), sum(e.size // e.dtype.itemsize for e in entries.values())
    if wanted > 2 * held + (1 << 20):
        refuse(CONFIG, f"a model of about {held} numbers, as the weights hold", str(wanted), "check the config")


def computed(model: nn.Module, held: Collection[str]) -> list[str]:
    """Names of parameters that files of a class never hold, as it computes them; where they have no data, they get it.

    Args:
        model: of transformers, or any other, which has none.
        held: names of what the files hold.
    """
    names = sorted(set(getattr(model, "_keys_to_ignore_on_save", None) or ()) - set(held))
    found = []
    for name in names:
        where, _, key = name.rpartition(".")
        owner = dict(model.named_modules()).get(where)
        old = None if owner is None else owner._parameters.get(key)
        if isinstance(owner, nn.Embedding) and old is not None and key == "weight":
            if old.is_meta:
                made = type(owner)(owner.num_embeddings, owner.embedding_dim).to(old.dtype)
                model._init_weights(made)  # type: ignore[operator]
                owner.weight = nn.Parameter(made.weight.detach(), old.requires_grad)
            found.append(name)
    return found


def set_generation(folder: Folder, model: nn.Module) -> None:
    """Gives a model that generates the settings that lie beside it.

    Raises:
        CheckpointError: they are malformed.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or not folder.has(GENERATION):
        return
    with reading(GENERATION), foreign(GENERATION, "settings for generation"):
        raw = fields.load(folder.read(GENERATION), most=1 << 20)
        model.generation_config = type(settings).from_dict(_clean(raw, GENERATION, 0))


def dense(folder: Folder, raw: Mapping[str, Any], device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
    """A model that was never pruned, loaded by transformers itself from files that were checked before.

    Only where transformers merges or splits tensors; all else is filled by :class:`.skeleton.Filling`.
    """
    cls = architecture(raw)
    config, remedy = config_of(cls, raw), "load it with transformers"
    kind: Any = {"dtype" if hasattr(config, "dtype") else "torch_dtype": dtype or "auto"}
    with foreign(folder.path.name, f"a {cls.__name__}", remedy):
        loaded, told = cls.from_pretrained(
            folder.path, config=config, local_files_only=True, use_safetensors=True, output_loading_info=True, **kind
        )
    model: nn.Module = loaded
    lacking = sorted(told["missing_keys"])
    if lacking:
        refuse(folder.path.name, "a tensor for every parameter", f"none for {lacking[:3]}"[:120], remedy)
    return model if device is None else model.to(device)
