"""What a family of attention modules must tell: :class:`Adapter`."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import AdapterError, DataError, WrappedModelError
from ..nn import Decoupled, State, decoupled_class, host_class
from ..values.layout import KIND_OF, PROJECTIONS, Kind
from ..values.spec import AttentionSpec
from .views import AttentionView, Slot


class Adapter(ABC):
    """Finds one family of attention modules, tells where their projections live, and gives them another shape.

    A subclass writes :meth:`matches`, :meth:`view` (usually by :meth:`of_linears`) and :meth:`reshape`; one more,
    :attr:`decoupled`, lets a family run shapes that the host's own forward cannot.
    """

    decoupled: ClassVar[type[Decoupled] | None] = None
    """The class whose forward runs what the host cannot: qk_dim unlike vo_dim, ragged heads."""

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether this adapter handles the module. Looks at what the module is, never at its name in the model."""

    @abstractmethod
    def view(self, name: str, module: nn.Module) -> AttentionView:
        """The live view of a module that matches."""

    def reshape(self, view: AttentionView, spec: AttentionSpec) -> None:  # noqa: B027
        """Sets the host's own shape attributes (number of heads, head dim) to the spec. The default sets nothing."""

    def commit(self, view: AttentionView, tensors: Mapping[str, nn.Parameter], spec: AttentionSpec) -> None:
        """Puts new parameters in place and makes the module run them; only assigns, as everything is built before.

        Args:
            view: the module as it was.
            tensors: a parameter for every slot of the view.
            spec: the new shape.
        """
        for key, parameter in tensors.items():
            slot = view.slots[key]
            setattr(slot.owner, slot.name, parameter)
            if isinstance(slot.owner, nn.Linear) and slot.name == "weight":
                slot.owner.out_features, slot.owner.in_features = parameter.shape
        self.reshape(view, spec)

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        """Whether the host's own forward can run this shape. The default: equal heads with qk_dim equal to vo_dim."""
        return not spec.ragged and spec.qk_dim == spec.vo_dim

    def query_gain(self, view: AttentionView, spec: AttentionSpec) -> float:
        """What Q is multiplied with where the host itself computes the softmax scale from the pruned head dim."""
        return 1.0

    def decoupled_for(self, view: AttentionView) -> type[Decoupled] | None:
        """The class with a forward of ours for this module, or None if there is none."""
        return self.decoupled

    def fixed(self, view: AttentionView) -> Mapping[Kind, str]:
        """Kinds whose channels may be removed but not mixed, each with the reason; none by default.

        A norm or a rotary embedding between projection and product sets qk channels apart from one another: a rotated
        basis would change what it does. Such kinds keep their channels, and the report says why.
        """
        return {}

    def attended(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which keys each query may attend to, ``(batch, heads, queries, keys)`` bool, any but the last may be 1.

        Calibration leaves out tokens that nobody attends to. None: all. The default reads ``attention_mask``: bool
        (True attends), additive, or 0 and 1 per key.

        Args:
            view: the module whose forward is about to run.
            args: its positional arguments.
            kwargs: its keyword arguments.
        """
        forward = inspect.signature(inspect.unwrap(host_class(view.module).forward))
        bound = forward.bind_partial(view.module, *args, **kwargs).arguments
        mask = bound.get("attention_mask", bound.get("kwargs", {}).get("attention_mask"))
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            found = f"a tensor of {mask.dim()} dimensions" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise DataError(
                f"{view.name}: attention_mask",
                "a tensor (batch, keys) or (batch, heads, queries, keys)",
                found,
                'calibrate with the "sdpa" or "eager" attention implementation',
            )
        return may_attend(mask)

    def constant_keys(self, view: AttentionView) -> Tensor | None:
        """``(keys, channels)``: keys that every sequence has beside those that K makes; None by default."""
        return None

    def recast(self, view: AttentionView, spec: AttentionSpec, kept: tuple[int, ...]) -> None:
        """Gives the module the class that can run the spec: its own, or a subclass of it with a forward of ours."""
        if not self.expresses(view, spec):
            self.decouple(view, spec, kept)
            return
        view.module.__class__ = host_class(view.module)
        view.module.__dict__.pop("attnprune_state", None)

    def decouple(
        self,
        view: AttentionView,
        spec: AttentionSpec | None = None,
        kept: tuple[int, ...] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        """Gives the module a subclass of its own class with a forward of ours; without a spec for the shape it has."""
        module, before = view.module, getattr(view.module, "attnprune_state", None)
        mixin = self.decoupled_for(view)
        assert mixin is not None, "surgery checks this before anything moves"
        spec = view.spec if spec is None else spec
        numbers = before.kept if before else tuple(range(view.spec.heads))
        dense = before.dense_heads if before else view.spec.heads
        module.__class__ = decoupled_class(mixin, host_class(module))
        still = numbers if kept is None else tuple(numbers[head] for head in kept)
        module.attnprune_state = State(spec.layout, spec.scale, dense, still, packed)  # type: ignore[assignment]

    def of_linears(
        self,
        name: str,
        module: nn.Module,
        *,
        q: Any,
        k: Any,
        v: Any,
        o: Any,
        heads: int,
        scale: float | None = None,
    ) -> AttentionView:
        """A view of a module whose projections are four Linears.

        Args:
            name: the module's name in the model.
            module: the module whose forward splits heads.
            q: the query projection; likewise ``k``, ``v`` and the output projection ``o``.
            heads: number of heads.
            scale: what the host multiplies the logits with; by default one over the square root of the qk dim.

        Raises:
            AdapterError: the projections' sizes do not fit one another or the number of heads.
        """
        linears = {"q": q, "k": k, "v": v, "o": o}
        for p, linear in linears.items():
            check_linear(f"{name}: {p}", linear)
        sizes = {p: (linear.out_features, linear.in_features) for p, linear in linears.items()}
        (qs, q_in), (ks, k_in), (vs, v_in), (d_model, os) = (sizes[p] for p in PROJECTIONS)
        state: State | None = getattr(module, "attnprune_state", None)
        if state is not None:
            qk_dims, vo_dims, scale = state.layout.qk, state.layout.vo, state.scale
        else:
            qk_dims, vo_dims = (int(qs) // heads,) * heads, (int(vs) // heads,) * heads
        if not (sum(qk_dims) == qs == ks and sum(vo_dims) == vs == os):
            raise AdapterError(
                name,
                f"Q and K, and V and O, of equal size, divisible by {heads} heads",
                ", ".join(f"{p} {tuple(size)}" for p, size in sizes.items()),
                "write an adapter that tells how this module splits heads",
            )
        bias = tuple(linears[p].bias is not None for p in PROJECTIONS)
        slots = {}
        for p in PROJECTIONS:
            axis, size = (1, sum(vo_dims)) if p == "o" else (0, sum(qk_dims if KIND_OF[p] == "qk" else vo_dims))
            slots[f"{p}.weight"] = Slot(linears[p], "weight", size, axis)
            if p != "o" and linears[p].bias is not None:
                slots[f"{p}.bias"] = Slot(linears[p], "bias", size)
        spec = AttentionSpec(
            name,
            int(d_model),
            qk_dims,
            vo_dims,
            qk_dims[0] ** -0.5 if scale is None else float(scale),
            int(q_in),
            int(k_in),
            int(v_in),
            bias,  # type: ignore[arg-type]
        )
        return AttentionView(spec, module, self, slots)


def check_linear(where: str, module: Any) -> None:
    """Raises WrappedModelError unless a module has what a Linear has."""
    if not all(hasattr(module, key) for key in ("in_features", "out_features", "weight")):
        remedy = "unwrap, merge or dequantise it, or exclude this layer"
        raise WrappedModelError(where, "an nn.Linear", f"a {type(module).__name__}", remedy)


def linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """A Linear that holds these very parameters."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device=torch.device("meta"))
    linear.weight = weight
    linear.bias = bias  # type: ignore[assignment]
    return linear


def may_attend(mask: Tensor) -> Tensor:
    """A mask as bool ``(batch, heads, queries, keys)``, True attends; ``(batch, keys)`` serves all queries.

    Floating-point masks are added to the logits: what they lower by half of the dtype's range or more is cut off.
    """
    if mask.is_floating_point() and mask.dim() == 4:
        allowed = mask > torch.finfo(mask.dtype).min / 2
    else:
        allowed = mask.bool()
    return allowed if allowed.dim() == 4 else allowed[:, None, None]
