"""Models without weights, and how weights get into them one tensor at a time."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..nn import host_class
from ..nn.attempt import undone
from .folder import OTHER_SHAPE, refuse
from .tensors import Entry, Item, Weights

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that a model can be made in."""


class Place(NamedTuple):
    """Where a module holds a tensor."""

    owner: nn.Module
    key: str

    @property
    def tensor(self) -> Tensor:
        found: Tensor = self._table[self.key]
        return found

    def put(self, tensor: Tensor) -> None:
        self._table[self.key] = tensor

    @property
    def _table(self) -> dict[str, Any]:
        return self.owner._parameters if self.key in self.owner._parameters else self.owner._buffers


def places(model: nn.Module) -> dict[str, Place]:
    """Every parameter and saved buffer of a model by its name in the state dict, shared ones under each name.

    Raises:
        OptionError: the state dict holds something else besides.
    """
    found: dict[str, Place] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        saved = [key for key in module._buffers if key not in module._non_persistent_buffers_set]
        for key in (*module._parameters, *saved):
            if (module._parameters if key in module._parameters else module._buffers)[key] is not None:
                found[f"{name}.{key}" if name else key] = Place(module, key)
    others = found.keys() ^ model.state_dict(keep_vars=True).keys()
    if others:
        raise OptionError(
            "model", "a state dict of parameters and buffers alone", f"{sorted(others)[:3]} too",
            "remove hooks and extra state that change the state dict",
        )  # fmt: skip
    return found


def groups(found: Mapping[str, Place]) -> list[list[str]]:
    """Names of tensors that share their memory, together; in the order of the first."""
    by_memory: dict[Any, list[str]] = {}
    for name, place in found.items():
        tensor = place.tensor
        address = 0 if tensor.is_meta or not tensor.numel() else tensor.data_ptr()
        key = (address, tensor.shape, tensor.stride(), tensor.dtype, tensor.device) if address else id(tensor)
        by_memory.setdefault(key, []).append(name)
    return list(by_memory.values())


def items_of(model: nn.Module) -> tuple[list[Item], dict[str, str]]:
    """Every tensor of a model to write, shared ones once, and for the other names of these the first."""
    found = places(model)
    items, tied = [], {}
    for first, *others in groups(found):
        tensor = found[first].tensor
        items.append(Item(first, tensor.dtype, tuple(tensor.shape), tensor.detach))
        tied.update(dict.fromkeys(others, first))
    return items, tied


class _Counter:
    """Ends the making of a model that has more parameters than its weights can fill."""

    def __init__(self, most: int) -> None:
        self.left, self.thread = most, threading.get_ident()

    def __call__(self, module: nn.Module, name: str, parameter: Any) -> Any:
        if threading.get_ident() != self.thread or parameter is None:
            return None
        self.left -= 1
        if self.left < 0:
            refuse("config", "a model that the weights fill", "one of more parameters", "check config.json")
        return None if parameter.is_meta else nn.Parameter(parameter.to("meta"), parameter.requires_grad)


def blank(
    make: Callable[[], nn.Module],
    entries: Mapping[str, Entry],
    buffers: bool = False,
    dtype: torch.dtype | None = None,
) -> nn.Module:
    """A model whose parameters have no data, and take no memory.

    Args:
        make: builds the dense model.
        entries: what the weights hold; a model with far more parameters is refused before it is complete.
        buffers: whether buffers have data.
        dtype: of numbers that the class makes of parameters, or of what it leaves to PyTorch; None: as most weights.
    """
    usual, counter = dtype or _usual(entries), _Counter(4 * len(entries) + 64)
    place = nullcontext() if buffers else torch.device("meta")
    with nn.modules.module.register_module_parameter_registration_hook(counter), _default(usual), place:
        return make()


def _usual(entries: Mapping[str, Entry]) -> torch.dtype | None:
    """The dtype of most numbers of a checkpoint."""
    sizes: Counter[torch.dtype] = Counter()
    for entry in entries.values():
        sizes[entry.dtype] += entry.size if entry.dtype in FLOATS else 0
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes.total() else None


@contextmanager
def _default(dtype: torch.dtype | None) -> Iterator[None]:
    """Models are made in this dtype; as they are where there is none."""
    before = torch.get_default_dtype()
    with undone() as undo:
        undo.append(lambda: torch.set_default_dtype(before))
        if dtype in FLOATS:
            torch.set_default_dtype(dtype)
        yield


def unsaved(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are not in the state dict."""
    for name, module in model.named_modules():
        for key in module._non_persistent_buffers_set:
            if module._buffers.get(key) is not None:
                yield (f"{name}.{key}" if name else key), module._buffers[key]


class Filling:
    """How the tensors of a checkpoint get into a model: everything is checked first, then they are read one by one."""

    def __init__(
        self,
        model: nn.Module,
        weights: Weights,
        names: Mapping[str, str],
        tied: Mapping[str, str],
        where: str,
        known: Collection[str] = (),
    ) -> None:
        """
        Args:
            model: dense or pruned, with or without data.
            weights: the checkpoint.
            names: for every tensor of the weights, its name in the model.
            tied: names in the model of tensors that are one with another that the weights hold.
            where: the file that says what the model is, for messages.
            known: names of parameters whose values are in the model, and in no file.

        Raises:
            CheckpointError: a tensor is missing, has another shape, or is none of the model's.
        """
        self.weights, self.found = weights, places(model)
        back = {name: key for key, name in names.items()}
        extra = sorted(back.keys() - self.found.keys())
        if extra or len(back) != len(names):
            refuse(where, "tensors of the model alone", str(extra[:3])[:120], "pass a model of the class saved")
        tied = {name: first for name, first in tied.items() if name in self.found and first in back}
        self.reads: list[tuple[str, list[str]]] = []
        """A tensor of the weights, and its names in the model."""
        together: dict[str, list[str]] = {}
        for group in groups(self.found):
            own, others = [one for one in group if one in back], [tied[one] for one in group if one in tied]
            name = next(iter(own + others), None)
            if name is None and not set(group).isdisjoint(known):
                continue
            if name is None:
                remedy = "pass a dense model of the class saved as model="
                refuse(f"{where}: {group[0][:80]}", "a tensor for it in the weights", "none", remedy)
            together.setdefault(name, []).extend(group)
        for name, group in together.items():
            for one in group:
                shape, expected = weights.entries[back[name]].shape, tuple(self.found[one].tensor.shape)
                if shape != expected:
                    refuse(f"{where}: {one[:80]}", f"shape {expected}", str(shape)[:80], OTHER_SHAPE)
            self.reads.append((back[name], group))

    def run(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        """Reads every tensor; its memory in the model is its own."""
        for key, group in self.reads:
            tensor = self.weights.read(key)
            wanted = dtype if tensor.is_floating_point() else None
            old = self.found[group[0]].tensor
            there = device or (tensor.device if old.is_meta else old.device)
            filled = _filled(old, tensor.to(device=there, dtype=wanted))
            for name in group:
                self.found[name].put(filled)


def check_buffers(model: nn.Module) -> None:
    """Raises if a buffer that no file holds has no data."""
    for name, buffer in unsaved(model):
        if buffer.is_meta:
            remedy = "build it on a real device: only parameters and buffers in the state dict may lack data"
            refuse(f"model: {name}", "a buffer with data, as no file holds it", "one on the meta device", remedy)


def _filled(old: Tensor, tensor: Tensor) -> Tensor:
    """A parameter or buffer with these values: the same object, unless it had no data or was made in inference mode."""
    if not (old.is_meta or old.is_inference()):
        old.data = tensor
        return old
    return nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor


def class_name(model: nn.Module) -> str:
    """The dotted name of the class that a model had before it was pruned."""
    cls = host_class(model)
    return f"{cls.__module__}.{cls.__qualname__}"
