"""Classes that pruned modules get: a forward of ours in front of the host's own class."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from types import FunctionType
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..errors import AdapterError, ExportError, FrozenError, StateDictError
from ..values.layout import Bucket, HeadLayout


class State(NamedTuple):
    """What a decoupled module knows beyond its host's attributes."""

    layout: HeadLayout
    """Channels per head, and where they are stored."""
    scale: float
    """The dense model's softmax scale."""
    dense_heads: int
    """Number of heads before any pruning."""
    kept: tuple[int, ...]
    """For every head, its number before any pruning: picks the rows of masks made for the dense model."""
    packed: bool = False
    """Whether the weights of Q, K and V were laid side by side, to run as one product."""
    expanded: Any = None
    """Where the host's own forward runs on dense dims (:mod:`attnprune.nn.expanded`): the spec, and compact slots."""
    stock: bool = True
    """Whether the host's own forward may run shapes that its attributes can say."""
    fixed: Any = {}  # noqa: RUF012  # never changed
    """Kinds whose channels may not be mixed, and why."""
    heads: tuple[str, ...] = ("decoupled", "expanded", "stock")
    """Ways to run in which whole heads may go."""
    groups: int = 1
    """Query heads per key head before any pruning."""
    numbers: Any = None
    """Of every kind, per key head, the dense numbers of its channels, where a forward of ours tells them apart."""
    pairs: Any = None
    """What a rotary embedding rotates (``attnprune.nn.rotary.Pairs``)."""
    dense: bool = False
    """Whether it was never pruned, so that its host's own forward runs it too."""
    recorded: bool = False
    """Whether calls of the user's own model had to show how it may run."""
    order: str = ""
    """The order in which several projections lay in one, where calls of the user's own model had to show it."""
    rotary_dim: int = 0
    """How many channels of a dense head a rotary embedding rotates, where such calls showed it."""
    dense_qk: int = 0
    """Channels of the dot product in a head before any pruning, where a forward of ours needs to know."""


_METADATA = "attnprune"  # the entry in a state dict's metadata


class Decoupled(nn.Module):
    """Base of the classes that pruned modules get: a forward of ours in front of the host's own class.

    The module object stays the same; ``isinstance`` with the host class stays true; copies and pickles work. State
    dicts say in their metadata how channels lie, as weights of the same shapes may belong to other heads.
    """

    attnprune_state: State
    attnprune_frozen: Any = None
    """What :func:`attnprune.freeze` arranged (:class:`attnprune.nn.frozen.Frozen`)."""
    attnprune_replaces: ClassVar[frozenset[str]] = frozenset({"forward"})
    """Methods that take the place of the host's on purpose."""

    @classmethod
    def tells_channels(cls, host: type[Any]) -> bool:
        """Whether the forward needs to know which of the dense model's channels are left."""
        return False

    @classmethod
    def facts(cls, host: type[Any]) -> dict[str, Any]:
        """Class attributes that the forward needs to know about the host class."""
        return {}

    def laid_out(self) -> dict[str, Any]:
        """What weights of these shapes mean: plain values, equal where state dicts may be exchanged."""
        state = self.attnprune_state
        return {
            "qk": state.layout.qk, "vo": state.layout.vo, "groups": state.layout.groups, "heads": state.kept,
            "channels": None if state.numbers is None else dict(state.numbers),
        }  # fmt: skip

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        metadata = getattr(destination, "_metadata", {})
        if prefix[:-1] in metadata:
            metadata[prefix[:-1]][_METADATA] = self.laid_out()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        found = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.attnprune_frozen is not None:
            self.attnprune_frozen.make(self)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if self.attnprune_frozen is not None:
            raise FrozenError(
                prefix.rstrip(".") or "the model itself", "a model whose weights may change", "a frozen one",
                "call attnprune.thaw(model) before you load, and attnprune.freeze(model) after",
            )  # fmt: skip
        found, own = local_metadata.get(_METADATA), self.laid_out()
        if found is not None and found != own:
            differing = [key for key in own if own[key] != found.get(key)]
            raise StateDictError(
                prefix.rstrip(".") or "state dict",
                f"weights of channels that lie as here ({', '.join(f'{key} {own[key]}' for key in differing)})",
                ", ".join(f"{key} {found.get(key)}" for key in differing),
                "give the model the same shape first: apply the plan that the other one was pruned by to a dense model",
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __prepare_scriptable__(self) -> Any:
        raise ExportError(
            f"torch.jit.script: {type(self).__name__}",
            "a forward in the part of Python that TorchScript knows",
            "one of attnprune, whose heads may have any dims",
            "use torch.jit.trace(model.eval(), inputs), torch.export or torch.compile",
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if made_class(self) is not type(self):  # a class that something else made of ours
            return super().__reduce_ex__(protocol)
        mixin, host = type(self).__bases__
        return _blank, (mixin, host), self.__dict__

    def head_rows(self, mask: Tensor, bucket: Bucket) -> Tensor:
        """The rows of a mask ``(batch, heads, queries, keys)`` that belong to a bucket's heads.

        One row serves all heads; a mask may have a row for every present head or for every head of the dense model.
        """
        state = self.attnprune_state
        rows = mask.shape[1]
        if rows == 1:
            return mask
        if rows == len(state.kept):
            heads = bucket.heads
        elif rows == state.dense_heads:
            heads = tuple(state.kept[head] for head in bucket.heads)
        else:
            raise RuntimeError(
                f"The mask has rows for {rows} heads, but should have 1, {len(state.kept)} (the heads that are left) "
                f"or {state.dense_heads} (the heads before pruning)."
            )
        return mask if heads == tuple(range(rows)) else mask[:, list(heads)]


def _blank(mixin: type[Decoupled], host: type[nn.Module]) -> Any:
    cls: Any = decoupled_class(mixin, host)
    return cls.__new__(cls)


_CLASSES: dict[tuple[type[Any], type[Any]], type[Any]] = {}


def decoupled_class(mixin: type[Decoupled], host: type[nn.Module]) -> type[Any]:
    """The host class with the mixin's forward in front of its own; one and the same for the same two."""
    key = (mixin, host)
    if key not in _CLASSES:
        space = {"__module__": host.__module__, "__doc__": host.__doc__, **mixin.facts(host)}
        _CLASSES[key] = type(f"Pruned{host.__name__}", (mixin, host), space)
    return _CLASSES[key]


def recast(module: nn.Module, mixin: type[Decoupled]) -> None:
    """Gives a module the class with the mixin's forward in front of its host's.

    Raises:
        AdapterError: the module has something of a name that the mixin uses.
    """
    host = host_class(module)
    ours = {key for kind in _above(mixin) for key, value in vars(kind).items() if not _stands_in(value)}
    ours = {key for key in ours | {*mixin.facts(host)} if not key.startswith(("__", "attnprune"))}
    inside = {*module._modules, *module._parameters, *module._buffers}
    theirs = {key for kind in _above(host) for key in vars(kind)} | {*module.__dict__} | inside
    hidden = sorted((ours & theirs) - vars(nn.Module).keys() - mixin.attnprune_replaces)
    if hidden:
        expected = f"nothing called {hidden[0]}, a name that a forward of ours uses"
        raise AdapterError(type(module).__name__, expected, "something", "rename it, for a faster forward")
    module.__class__ = decoupled_class(mixin, host)


def _stands_in(value: Any) -> bool:
    """Whether a class attribute is a descriptor, which takes the place of what the host has on purpose."""
    return hasattr(value, "__get__") and not isinstance(value, (FunctionType, staticmethod, classmethod))


def _above(kind: type[Any]) -> Sequence[type[Any]]:
    """A class and its bases, up to nn.Module."""
    return kind.__mro__[: kind.__mro__.index(nn.Module)]


def made_class(module: nn.Module) -> type[Any] | None:
    """The class that :func:`decoupled_class` made, also where parametrisations or FSDP2 made another one of it."""
    return next((kind for kind in type(module).__mro__ if kind in _CLASSES.values()), None)


def host_class(module: nn.Module) -> type[Any]:
    """The class that a module had before it was pruned."""
    made = made_class(module) if isinstance(module, Decoupled) else None
    return type(module) if made is None else made.__bases__[1]


def mixin_class(module: nn.Module) -> type[Decoupled] | None:
    """The class whose forward of ours a pruned module has."""
    made = made_class(module)
    return None if made is None else made.__bases__[0]


def forward_of(host: type[Any]) -> Any:
    """The host's forward function, without decorators."""
    return inspect.unwrap(host.forward)
