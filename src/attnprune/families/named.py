"""An attention class whose parts somebody named: :class:`NamedAdapter`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from torch import nn

from ..errors import AdapterError, OptionError
from ..nn import host_class
from ..values.spec import AttentionSpec
from .base import Adapter, AttentionView
from .names import HEAD_DIM
from .orders import check_order

WHOLE = ({"q", "k", "v", "o"}, {"q", "kv", "o"}, {"qk", "v", "o"}, {"qkv", "o"})
"""Sets of parts that make an attention; the letters say what a part holds."""


class Parts(TypedDict, total=False):
    """How the parts of an attention class are called: paths of modules and attributes, with dots where one lies in
    another (``"to_out.0"``)."""

    q: str
    k: str
    v: str
    o: str
    qkv: str
    """One projection that holds all three; likewise ``kv`` and ``qk``."""
    kv: str
    qk: str
    heads: str | int
    """Where the number of heads is, or the number."""
    kv_heads: str | int
    """The same of key heads; by default as many as the projections' sizes say."""
    scale: str | float
    """What logits are multiplied with, where that is an attribute or a fixed number; by default the class computes it
    as one over the square root of the head dim."""
    order: str
    """How several projections lie in one, as ``"h qkv d"``; by default the first of the usual orders that is proven."""


@dataclass(frozen=True)
class NamedAdapter(Adapter):
    """Finds a class of one's own by what :func:`attnprune.register_adapter` was told of it."""

    kind: type[nn.Module]
    projections: tuple[tuple[str, str], ...]
    """The letters of what each projection holds, and its path."""
    heads: str | int
    kv_heads: str | int | None = None
    scale: str | float | None = None
    order: str | None = None

    @classmethod
    def of(cls, kind: type[nn.Module], given: Mapping[str, Any]) -> NamedAdapter:
        """Checks names, every fault at once.

        Raises:
            AdapterError: parts are missing, unknown or no names.
        """
        letters = {key for key in given if set(key) <= set("qkvo")}
        rest = given.keys() - letters
        faults = [f"no argument {key!r}" for key in sorted(rest - Parts.__annotations__.keys())]
        if letters not in WHOLE:
            faults.append(f"parts {', '.join(sorted(letters)) or 'none'}")
        faults += [f"{key}={given[key]!r}" for key in sorted(letters) if not isinstance(given[key], str)]
        faults += ["no heads"] if given.get("heads") is None else []
        for key, number in (("heads", int), ("kv_heads", int), ("scale", float)):
            value = given.get(key)
            if value is not None and type(value) is not str and not (type(value) in (int, number) and value > 0):
                faults.append(f"{key}={value!r}")
        fused = next((key for key in sorted(letters) if len(key) > 1), None)
        if given.get("order") is not None:
            try:
                check_order(kind.__name__, str(given["order"]), fused or "")
            except OptionError as error:
                faults.append(f"order={given['order']!r} ({error.expected})" if fused else "order= and no fused part")
        if faults:
            raise AdapterError(
                f"register_adapter({kind.__name__})",
                "paths of q, k, v and o (qkv, kv or qk for one that holds several), and of heads or their number",
                "; ".join(faults),
                'write register_adapter(MyAttention, q="to_q", k="to_k", v="to_v", o="to_out.0", heads="heads")',
            )
        projections = tuple((key, given[key]) for key in given if key in letters)
        return cls(kind, projections, **{key: given[key] for key in given if key not in letters})

    def matches(self, module: nn.Module) -> bool:
        return issubclass(host_class(module), self.kind)

    def view(self, name: str, module: nn.Module) -> AttentionView:
        heads, kv_heads, scale = (self._found(name, module, one) for one in (self.heads, self.kv_heads, self.scale))
        parts = {letters: self._found(name, module, path) for letters, path in self.projections}
        return self.of_linears(
            name, module, heads=heads, kv_heads=kv_heads, scale=scale, order=self.order, **parts
        )  # fmt: skip

    def _found(self, name: str, module: nn.Module, path: str | float | None) -> Any:
        if not isinstance(path, str):
            return path
        holder: Any = module
        for word in path.split("."):
            inside, holder = holder, getattr(holder, word, None)
            if holder is None:
                known = [*inside._modules, *vars(inside)] if isinstance(inside, nn.Module) else []
                shown = ", ".join(key for key in known if not key.startswith("_") and key != "training")
                raise AdapterError(
                    f"{name}: {path}", f"{word!r} in {type(inside).__name__}", f"{shown or 'none'}",
                    f"register {self.kind.__name__} with the names of its parts",
                )  # fmt: skip
        return holder

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        same = spec.heads == view.spec.heads and spec.kv_heads == view.spec.kv_heads
        return super().expresses(view, spec) and (same or _holder(view.module, self.heads) is not None)

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:
        for path, value in ((self.heads, spec.heads), (self.kv_heads, spec.kv_heads)):
            holder = _holder(view.module, path)
            if holder is not None:
                setattr(holder, str(path).rpartition(".")[2], value)
        for key in {*HEAD_DIM} & view.module.__dict__.keys():
            setattr(view.module, key, spec.qk_dim)

    def query_gain(self, view: AttentionView, spec: AttentionSpec) -> float:
        if self.scale is not None or not self.expresses(view, spec):
            return 1.0
        return float(view.spec.scale * spec.qk_dim**0.5)


def _holder(module: nn.Module, path: str | int | None) -> nn.Module | None:
    """The module that has an attribute of its own at this path; None for a number, and for what others share."""
    if not isinstance(path, str):
        return None
    *words, last = path.split(".")
    holder: Any = module
    for word in words:
        holder = getattr(holder, word, None)
    return holder if isinstance(holder, nn.Module) and last in holder.__dict__ else None
