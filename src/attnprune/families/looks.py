"""What looks like attention, or is seen to attend, and is not of a known family: :class:`Skipped`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .names import K, Q, V, output_of, part_of, parts_of, tells_heads

_CHILDREN = {"q_proj", "query", "q_lin", "to_q", "wq", "qkv", "to_qkv", "in_proj_qkv", "Wqkv", "qkv_proj",
             "query_key_value", "c_attn", "q_a_proj", "linear_q", "q_attn"}  # fmt: skip


class Skipped(NamedTuple):
    """A module that looks like attention and cannot be pruned."""

    name: str
    """Fully qualified."""
    kind: str
    """Its class."""
    why: str
    """The reason."""


def looks_like(model: nn.Module, known: Collection[nn.Module], why: Mapping[str, str]) -> Iterator[Skipped]:
    """Modules with the class name or the children of attention, outside of known ones.

    Args:
        model: any module.
        known: attention modules that can be pruned.
        why: by name, reasons that are known already.
    """
    inside = {id(part) for module in known for part in module.modules()}
    tops = {id(module) for module in known}
    for name, module in model.named_modules():
        if id(module) in inside:
            continue
        if name not in why:
            if not looks(module) or any(id(part) in tops for part in module.modules()):
                continue
            if any(other.startswith(f"{name}." if name else "") for other in why):
                continue  # a container of one whose reason is known
            below = [part for part in module.modules() if part is not module and looks(part)]
            if sum(not any(one in other.modules() for other in below if other is not one) for one in below) > 1:
                continue  # a container of several
        inside.update(id(part) for part in module.modules())
        yield Skipped(name, type(module).__name__, why.get(name) or _unknown(module))


def looks(module: nn.Module) -> bool:
    """Whether a module has the class name or the children of attention."""
    children = {child for child, _ in module.named_children()}
    word = type(module).__name__.lower()
    named = "attention" in word or word.endswith("attn") or isinstance(module, nn.MultiheadAttention)
    return bool(children & _CHILDREN) or (named and any(map(_projects, module.modules())))


def _projects(module: nn.Module) -> int:
    """How many of a module's own parameters may be projections; a table of biases is none."""
    own = [parameter for parameter in module._parameters.values() if parameter is not None and parameter.dim() > 1]
    return 0 if isinstance(module, nn.Embedding) else len(own)


DEFORMABLE = "its parts are those of deformable attention, which has no keys"
RECURRENT = "its parts are those of a linear recurrence, which takes no softmax over keys"
CONVOLVED = "its projections are convolutions"
GATE = "it has one projection alone, as a gate has"
LEARNED = "it has projections of keys and values, and none of queries"
VALUELESS = "it has projections of queries and keys, and none of values"
OTHER_KINDS: Mapping[str, Collection[str]] = {
    DEFORMABLE: {"sampling_offsets"},
    RECURRENT: {"A_log", "dt_bias", "time_decay", "conv1d", "q_conv1d", "linear_attn"},
}
"""Attention without four projections around a softmax, and what parts of it are called."""


def _unknown(module: nn.Module) -> str:
    children = [child for child, _ in module.named_children()]
    inside = {name for part in module.modules() for name in (*part._modules, *part._parameters)}
    for reason, names in OTHER_KINDS.items():
        if inside & {*names}:
            return reason
    convolutions = [part for part in module.children() if any(map(_convolves, part.modules()))]
    if len(convolutions) > 1 or (convolutions and not any(isinstance(part, nn.Linear) for part in module.modules())):
        return CONVOLVED
    if sum(map(_projects, module.modules())) == 1:
        return GATE
    found = {p for p, names in (("q", Q), ("k", K), ("v", V)) if part_of(module, names) is not None}
    if found == {"q", "k"} or (found == {"k", "v"} and output_of(module) is not None):
        return VALUELESS if "q" in found else LEARNED
    shown = ", ".join(children[:6]) or "none"
    if parts_of(module) and output_of(module) is not None and not tells_heads(module):
        return f"its projections are found ({shown}), and a number of heads is not among its attributes"
    return f"four projections and a number of heads are not found among its parts ({shown})"


def _convolves(module: nn.Module) -> bool:
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))


class _Watch(TorchFunctionMode):
    """Notes in which modules a softmax over keys runs."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.seen: dict[str, str] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        fused = name in ("scaled_dot_product_attention", "flex_attention", "multi_head_attention_forward")
        if name == "softmax" and first is not None and first.dim() >= 4:  # over keys, which lie last
            fused = kwargs.get("dim", args[1] if len(args) > 1 else -1) in (-1, first.dim() - 1)
        if self.stack and fused:
            self.seen.setdefault(self.stack[-1], name)
        return func(*args, **kwargs)


def attending(model: nn.Module, known: Collection[nn.Module], run: Callable[[], object]) -> Iterator[Skipped]:
    """Modules outside of known ones in which a softmax over keys runs when the model does."""
    inside = {id(part) for module in known for part in module.modules()}
    watch, by_name = _Watch(), dict(model.named_modules())
    with ExitStack() as hooks:
        for name, module in by_name.items():

            def enter(*_: Any, name: str = name) -> None:
                watch.stack.append(name)

            def leave(*_: Any) -> None:
                watch.stack.pop()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        with watch:
            run()
    for name, what in watch.seen.items():
        if id(by_name[name]) not in inside:
            kind = type(by_name[name]).__name__
            yield Skipped(name, kind, f"{what} was seen to run in it, and its projections are not known")
