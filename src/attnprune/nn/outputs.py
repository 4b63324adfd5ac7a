"""Which tensors of what a model returns are its outputs: :func:`outputs_of`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import DataError

OutputFn = Callable[[Any], Any]
"""``output_fn(output)`` takes what a model returns and gives the tensor or tensors of it to compare."""

BY_THE_WAY = re.compile(
    r"past|cache|mems|loss|attentions|(?<!last_)hidden_states|kv_states|router|auxiliary|intermediate|denoising"
    r"|^(init|initial|enc)_|^states?$"
)
"""Names of what models return beside their outputs: caches, losses, what layers gave on the way."""
ANSWERS = re.compile(r"logits|pred|embed|scores?$|probs|reconstruction")
"""Names of what heads give."""
STATES = re.compile(r"last_hidden_state|pooler_output|token_embeddings|_outputs?$|^encoder_")
"""Names of what heads read: outputs where no head is."""
ENCODED = re.compile(r"^(last_hidden_state|pooler_output)$")
"""Of these, what an encoder is asked for. Some poolers have an attention of their own."""


class Output(NamedTuple):
    """One tensor of what a model returns."""

    name: str
    """Its key; empty where it has none."""
    tensor: Tensor

    @property
    def classes(self) -> int | None:
        """The dimension whose softmax is what the model says; None where there is none.

        Logits of pixels have classes in dimension 1, others in the last one.

        >>> import torch
        >>> [Output("logits", torch.zeros(2, *shape)).classes for shape in ((5,), (7, 5), (5, 8, 8), (1,))]
        [1, 2, 1, None]
        """
        x = self.tensor
        if "logits" not in self.name or "mask" in self.name or x.dim() < 2:
            return None
        dim = 1 if x.dim() == 4 else x.dim() - 1
        return dim if x.shape[dim] > 1 else None


def outputs_of(output: Any, output_fn: OutputFn | None = None) -> tuple[Output, ...]:
    """The tensors of real numbers that a model's output consists of, in order.

    A tensor is itself. Of tuples, lists, mappings and objects all tensors count, but numbers, caches (by name, or
    tuples inside tuples), losses, and the states and attention weights of single layers. Where names tell heads'
    answers (``logits``, ``pred_boxes``, ``text_embeds`` …), what these are computed from does not count
    (``last_hidden_state``); where they tell embeddings, neither do products between samples (``logits_per_image``).

    Args:
        output: what the model returns.
        output_fn: takes it and gives the tensors to take instead.

    Raises:
        DataError: there are none.

    >>> import torch
    >>> x = torch.zeros(2, 3)
    >>> [name for name, _ in outputs_of({"loss": x.sum(), "logits": x, "last_hidden_state": x, "past_key_values": x})]
    ['logits']
    >>> [name for name, _ in outputs_of((x, x.sum(), ((x, x), (x, x))))]
    ['0']
    """
    if output_fn is None:
        found = tuple(_tensors(output, "", 0))
        if found:
            return found
        remedy = "pass output_fn=, which takes it and gives the tensors to compare, or loss_fn="
        raise DataError("data", "a model that returns tensors of real numbers", _shape(output), remedy)
    picked = output_fn(output)
    found = tuple(_every(picked, ""))
    if not found:
        remedy = "return a tensor of the model's output, or several in a tuple or a mapping"
        raise DataError("output_fn", "tensors of real numbers", _shape(picked), remedy)
    return found


def _tensors(value: Any, name: str, depth: int) -> Iterator[Output]:
    if isinstance(value, Tensor):
        if _real(value) and (value.dim() or not depth):
            yield Output(name, value)
        return
    named = _named(value, depth)
    if named is not None:
        for key in _chosen([key for key, one in named.items() if _holds(one)]):
            yield from _tensors(named[key], key, depth + 1)
    elif isinstance(value, (list, tuple)):
        for number, one in enumerate(value):
            if not _is_cache(one):
                yield from _tensors(one, name or str(number), depth + 1)


def _chosen(keys: list[str]) -> list[str]:
    """Of the keys of what holds tensors, those of outputs."""
    kept = [key for key in keys if not BY_THE_WAY.search(key)]
    heads = [key for key in kept if not STATES.search(key)]
    if any(ANSWERS.search(key) for key in heads):
        across = any("embed" in key for key in heads)
        return [key for key in heads if not (across and "logits_per_" in key)]
    return [key for key in kept if ENCODED.search(key)] or kept


def _every(value: Any, name: str) -> Iterator[Output]:
    """All tensors of real numbers, at any depth."""
    if isinstance(value, Tensor):
        if _real(value):
            yield Output(name, value)
    elif (named := _named(value, 0)) is not None:
        for key, one in named.items():
            yield from _every(one, key)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _every(one, name)


def _named(value: Any, depth: int) -> Mapping[str, Any] | None:
    """What has names: a mapping, a named tuple, a dataclass; of the output itself, also any other object."""
    if isinstance(value, Mapping):
        return {str(key): one for key, one in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: getattr(value, one.name) for one in fields(value)}
    if depth or isinstance(value, (list, tuple)) or not hasattr(value, "__dict__"):
        return None
    return {key: one for key, one in vars(value).items() if not key.startswith("_")}


def _real(x: Tensor) -> bool:
    return x.is_floating_point() and not x.is_nested


def _holds(value: Any) -> bool:
    """Whether a value is, or may hold, tensors of real numbers with a dimension."""
    if isinstance(value, Tensor):
        return _real(value) and bool(value.dim())
    return next(_tensors(value, "", 1), None) is not None


def _is_cache(value: Any) -> bool:
    """Whether a member of a tuple is a tuple of tuples: keys and values of every layer."""
    return isinstance(value, (list, tuple)) and any(isinstance(one, (list, tuple)) for one in value)


def _shape(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {output.dtype}"
    keys = f" with {', '.join(map(str, list(output)[:6]))}" if isinstance(output, Mapping) else ""
    return f"a {type(output).__name__}{keys}"
