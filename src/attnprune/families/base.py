"""What a family of attention modules must tell (:class:`Adapter`), and a live module of it (:class:`AttentionView`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from ..nn import Decoupled, host_class
from ..nn.decoupled import State, mixin_class, recast
from ..nn.expanded import Read
from ..nn.rotary import Turning
from ..values.layout import KIND_OF, PROJECTIONS, Kind, Projection
from ..values.spec import NOTHING, AttentionSpec
from . import linears
from .calls import Call, calls_of
from .linears import Small
from .slots import FOLLOWS, Port, Slot
from .states import Numbers, next_state, numbers_known, telling
from .ways import EVERY, Verdict, Way


@dataclass(frozen=True, eq=False)
class AttentionView:
    """A live attention module: its spec and where its projections live. Never serialised.

    Args:
        spec: the module's facts.
        module: the module whose forward splits heads.
        adapter: the module's family: who made the view, and who can give the module another shape.
        slots: where channels lie, by name: ``q.weight``, ``q.bias`` (if there is one), ``k.weight`` … ``o.weight``,
            ``x.weight`` (``q_extra``), and what runs along them besides (``bias_k`` of ``nn.MultiheadAttention``).
        kinds: for every slot, whose channels it follows: ``"qk"`` or ``"vo"``.
        host: the module that holds all four projections, where ``module`` does not; what is run to prove what it is.
        verdict: what running it showed; None for modules that were pruned before.
        masks_by_head: whether the model may hand it masks with a row for every dense head.
        orders: by order, other slots that may be meant; the first that holds is found by running it.
    """

    spec: AttentionSpec
    module: nn.Module
    adapter: Adapter
    slots: Mapping[str, Slot]
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    host: nn.Module | None = None
    verdict: Verdict | None = None
    masks_by_head: bool = False
    orders: Mapping[str, Mapping[str, Slot]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        usual = {name: KIND_OF[FOLLOWS[part]] for name in self.slots if (part := name.split(".")[0]) in FOLLOWS}
        object.__setattr__(self, "kinds", {**usual, **self.kinds})

    @property
    def name(self) -> str:
        """The module's fully qualified name."""
        return self.spec.name

    @property
    def state(self) -> State | None:
        """What the module knows of its pruning; None where it runs by its own forward."""
        return self.module.__dict__.get("attnprune_state")

    @property
    def top(self) -> nn.Module:
        """The module that holds all four projections."""
        return self.module if self.host is None else self.host

    def lying(self, order: str) -> AttentionView:
        """With the slots of one of its orders; of none, as it is."""
        return replace(self, slots=self.orders[order], orders={}) if order in self.orders else self

    # weights

    def weight(self, projection: Projection) -> Tensor:
        """``(channels, in)`` weight rows of Q, K, V, or columns of O, in stored order, detached; a view."""
        return (slot := self.slots[f"{projection}.weight"]).cut(slot.values)

    def heads(self, projection: Projection) -> list[Tensor]:
        """Per head of a projection (of Q and O query heads, of K and V key heads) ``(channel, in)``: its weights in
        logical order; views. For O the second dimension is what it writes. :meth:`stacked` gives equal heads as one."""
        return [self.weight(projection)[slice(*span)] for span in self.spans(projection)]

    def stacked(self, projection: Projection) -> Tensor:
        """``(head, channel, in)``: the weights of a projection with equal heads; a view."""
        return rearrange(self.weight(projection), "(h d) e -> h d e", h=len(self.spans(projection)))

    def spans(self, projection: Projection) -> tuple[tuple[int, int], ...]:
        """Per logical head of a projection, its first and last-plus-one stored channel."""
        return self.spec.layout.spans(projection)

    def shared(self, values: Tensor, projection: Projection) -> Tensor:
        """``(..., channels of K or V)`` from ``(..., channels of Q or O)``, in stored order: what heads of one key
        head have is added up. Of K and V, and where no heads share, the values themselves."""
        if projection in "kv" or not (layout := self.spec.layout).grouped:
            return values
        spans = layout.spans(projection)
        groups = ([values[..., slice(*spans[head])] for head in layout.queries(key)] for key in layout.key_order)
        return torch.cat([torch.stack(group).sum(0) for group in groups], dim=-1)

    def by_head(self, values: Tensor, kind: Kind) -> Tensor:
        """``(key heads, dim)`` from ``(channels of K or V,)`` in stored order; places that ragged heads lack hold
        infinity."""
        if not self.spec.ragged:
            return rearrange(values, "(h d) -> h d", h=self.spec.kv_heads)
        rows = [values[slice(*span)] for span in self.spans("k" if kind == "qk" else "v")]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.inf)

    def side(self, key: str) -> Projection:
        """The projection whose channels a slot follows: its own; what lies along qk or vo channels besides follows K or
        V."""
        return FOLLOWS.get(key.split(".")[0], "k" if self.kinds[key] == "qk" else "v")

    # modules

    def owner(self, projection: Projection) -> nn.Module:
        """The module that holds a projection's weight."""
        return self.slots[f"{projection}.weight"].owner

    @property
    def joint(self) -> bool:
        """Whether a parameter holds several projections."""
        return len({(id(slot.owner), slot.name) for slot in self.slots.values()}) < len(self.slots)

    @property
    def called(self) -> bool:
        """Whether each projection is a module of its own, not a parameter of the attention itself."""
        return all(self.owner(p) is not self.module for p in PROJECTIONS)

    @property
    def linears(self) -> dict[Projection, nn.Linear] | None:
        """The four Linear modules, or None where several projections lie in one, or in other parameters."""
        linears: dict[Projection, nn.Linear] = {p: o for p in PROJECTIONS if isinstance(o := self.owner(p), nn.Linear)}
        return linears if len({id(one) for one in linears.values()}) == len(PROJECTIONS) else None

    def port(self, projection: Projection) -> Port:
        """What a projection writes (Q, K, V) or reads (O) while the model runs."""
        return Port(self.slots[f"{projection}.weight"], projection == "o")

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """Every module that a commit may touch: the attention itself and the owners of its parameters."""
        return tuple(dict.fromkeys((self.module, *(slot.owner for slot in self.slots.values()))))

    # how it runs

    @property
    def runs_expanded(self) -> bool:
        """Whether it runs by its host's forward on dense dims."""
        return self.state is not None and self.state.expanded is not None

    @property
    def read(self) -> bool:
        """Whether its host reads the weights of projections, instead of calling them."""
        return isinstance(self.owner("q"), Read) if self.verdict is None else self.verdict.read

    @property
    def mixin_runs(self) -> bool:
        """Whether it runs by a forward of ours."""
        return isinstance(self.module, Decoupled)

    def way(self, spec: AttentionSpec) -> Way | None:
        """How the module runs in a shape, the first that fits; None if there is no way."""
        state, verdict = self.state, self.verdict
        if state is not None and state.expanded is not None:
            return "expanded" if spec.heads == self.spec.heads or "expanded" in state.heads else None
        stock, decoupled, expanded = True, self.mixin, self.called
        if self.mixin_runs:
            stock, expanded = state is None or state.stock, False
        elif verdict is not None:
            word = not (verdict.ran and verdict.attends) and not verdict.expanded  # the family's, if anybody's
            stock, expanded = verdict.stock, verdict.expanded or (word and self.called)
        heads = self.heads_may_go if (fewer := spec.heads < self.spec.heads) else EVERY
        alone = fewer and verdict is not None and verdict.stock_heads and spec.dims_of == self.spec.dims_of
        stock = alone or (stock and "stock" in heads)
        if stock and self.expresses(spec) and not (fewer and self.masks_by_head) and spec.left_out == NOTHING:
            return "stock"
        if decoupled is not None and "decoupled" in heads:
            return "decoupled"
        return "expanded" if expanded and "expanded" in heads else None

    @property
    def heads_may_go(self) -> frozenset[str]:
        """Ways to run in which whole heads may go."""
        if self.state is not None:
            return frozenset(self.state.heads)
        return EVERY if self.verdict is None or not self.verdict.ran else self.verdict.heads

    @property
    def mixin(self) -> type[Decoupled] | None:
        """The class with a forward of ours that runs, or may run, the module."""
        if isinstance(self.module, Decoupled):
            return mixin_class(self.module)
        known = self.verdict
        return next(iter(self.adapter.decoupled_for(self)), None) if known is None else known.decoupled

    @property
    def fixed(self) -> dict[Kind, str]:
        """Kinds whose channels may be removed but not mixed, each with the reason."""
        seen = self.verdict if self.state is None else self.state
        return {**({} if seen is None else seen.fixed), **self.adapter.fixed(self)}

    # what the family says

    def expresses(self, spec: AttentionSpec) -> bool:
        """Whether the host's own attributes can say this shape."""
        return self.adapter.expresses(self, spec)

    def query_gain(self, spec: AttentionSpec) -> float:
        """What Q is multiplied with where the host itself computes the softmax scale from the pruned head dim."""
        return self.adapter.query_gain(self, spec)

    def commit(self, tensors: Mapping[str, nn.Parameter], spec: AttentionSpec) -> None:
        """Puts new parameters in place and sets the host's own shape attributes."""
        self.adapter.commit(self, tensors, spec)

    def attended(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which keys each query may attend to in a call of the module (:meth:`Adapter.attended`)."""
        return self.adapter.attended(self, args, kwargs)

    def turning(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Turning | None:
        """How queries and keys are rotated in a call of the module (:meth:`Adapter.turning`)."""
        return self.adapter.turning(self, args, kwargs)

    @property
    def constant_keys(self) -> Tensor | None:
        """``(keys, channels)``: keys that every sequence has beside those that K makes."""
        return self.adapter.constant_keys(self)

    # classes

    def recast(self) -> None:
        """Gives the module the class that it had before it was pruned."""
        self.module.__class__ = host_class(self.module)
        self.module.__dict__.pop("attnprune_state", None)

    def decouple(
        self,
        mixin: type[Decoupled],
        spec: AttentionSpec | None = None,
        kept: Sequence[int] | None = None,
        *,
        numbers: Numbers | None = None,
        packed: bool = False,
        dense: bool = False,
    ) -> None:
        """Gives the module a subclass of its own class with a forward of ours.

        Args:
            mixin: the class with that forward.
            spec: the shape; None: the one it has.
            kept: heads that are left; None: all.
            numbers: of each kind, per key head that is left, the dense numbers of its channels; None: those it has.
            packed: whether the weights of Q, K and V lie side by side.
            dense: whether it was never pruned.
        """
        module, spec = self.module, self.spec if spec is None else spec
        state = self.next_state(spec, kept)._replace(packed=packed, dense=dense)
        if mixin.tells_channels(host_class(module)):
            state = telling(state, self.state, self.spec, spec, self.numbers if numbers is None else numbers)
        recast(module, mixin)
        module.attnprune_state = state  # type: ignore[assignment]

    @property
    def numbers(self) -> Numbers:
        """Of each kind, per key head, the dense numbers of its channels, as far as the module tells them apart."""
        return numbers_known(self.state, self.spec)

    @property
    def tells_channels(self) -> bool:
        """Whether it matters for a file of the module which of the dense channels are left."""
        return self.runs_expanded or (self.state is not None and self.state.numbers is not None)

    def next_state(self, spec: AttentionSpec, kept: Sequence[int] | None = None) -> State:
        """What the module will know once it has this shape."""
        before, heads = self.state, sorted(self.heads_may_go)
        stock = self.verdict.stock if self.verdict is not None else before is None or before.stock
        known = next_state(before, self.spec, spec, kept, stock=stock, fixed=self.fixed, heads=heads)
        seen, order = self.verdict or before or known, next(iter(self.orders), "")
        return known._replace(recorded=seen.recorded, order=seen.order or order, rotary_dim=seen.rotary_dim)


class Adapter(ABC):
    """Finds one family of attention modules, tells where their projections live, and gives them another shape.

    A subclass writes :meth:`matches` and :meth:`view` (usually by :meth:`of_linears`), and :meth:`reshape` where the
    host's attributes say its shape; :attr:`decoupled` lets a family run shapes that the host's own forward cannot.
    What a subclass says is proposed; running the module decides (:mod:`attnprune.families.proof`).
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
            linears.put(view.slots[key].owner, view.slots[key].name, parameter)
        self.reshape(view, spec)

    def expresses(self, view: AttentionView, spec: AttentionSpec) -> bool:
        """Whether the host's own forward can run this shape. The default: equal heads with qk_dim equal to vo_dim, in
        groups of one size, and no projection that shares its parameter with another."""
        return not view.joint and not spec.ragged and spec.qk_dim == spec.vo_dim and len(set(spec.groups)) == 1

    def query_gain(self, view: AttentionView, spec: AttentionSpec) -> float:
        """What Q is multiplied with where the host itself computes the softmax scale from the pruned head dim."""
        return 1.0

    def decoupled_for(self, view: AttentionView) -> Sequence[type[Decoupled]]:
        """Classes with a forward of ours for this module, the one to try first first; none if there is none."""
        return () if self.decoupled is None else (self.decoupled,)

    def fixed(self, view: AttentionView) -> Mapping[Kind, str]:
        """Kinds whose channels may be removed but not mixed, each with the reason; none by default.

        A norm or a rotary embedding between projection and product sets qk channels apart: a rotated basis would change
        what it does. Such kinds keep their channels, and the report says why. What running finds is added.
        """
        return {}

    def attended(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
        """Which keys each query may attend to, ``(batch, heads, queries, keys)`` bool, any but the last may be 1.

        Calibration leaves out tokens that nobody attends to. None: all. The default reads ``attention_mask``: bool
        (True attends), additive, or 0 and 1 per key. Arguments are those of a call that is about to run.
        """
        return linears.attended(view.name, view.module, args, kwargs)

    def turning(self, view: AttentionView, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Turning | None:
        """How a call that is about to run rotates queries and keys, if that is all before their product; or None."""
        return None

    def constant_keys(self, view: AttentionView) -> Tensor | None:
        """``(keys, channels)``: keys that every sequence has beside those that K makes; None by default."""
        return None

    def calls(self, view: AttentionView) -> Sequence[Call]:
        """Ways to call the view's host that show all it does, the plainest first; by default by its arguments' names.
        What the host refuses is left out; where no call gives an argument, no forward of ours fits: nobody knows it."""
        return calls_of(view.top, view.spec)

    def small(self, view: AttentionView) -> Small:
        """A smaller size at which the host computes the same way, for a stand-in of it.

        What happens between projections does not depend on the model's width. The default cuts that to 64.

        Returns:
            The spec of the stand-in, shapes by the id of a parameter, and attributes to set by the id of a module.
        """
        return linears.slim(view.spec, view.slots, view.top)

    def of_linears(
        self,
        name: str,
        module: nn.Module,
        *,
        heads: int,
        scale: float | None = None,
        kv_heads: int | None = None,
        order: str | None = None,
        **parts: Any,
    ) -> AttentionView:
        """A view of a module whose projections are Linears.

        Args:
            name, module: the module whose forward splits heads, and its name in the model.
            heads, kv_heads: number of heads, and of key heads; by default as many as the projections' sizes say.
            scale: what the host multiplies the logits with; by default one over the square root of the qk dim.
            order: how several projections lie in one, as ``"qkv h d"`` (three blocks) or ``"h qkv d"`` (by head); by
                default the first of the usual orders that proof finds right.
            parts: ``q``, ``k``, ``v``, ``o``; or ``qkv``, ``kv`` or ``qk`` for one that holds several, and the others.

        Raises:
            AdapterError: the projections' sizes do not fit one another or the number of heads.
        """
        state: State | None = module.__dict__.get("attnprune_state")
        spec, slots, orders = linears.described(name, parts, heads, scale, state, kv_heads, order)
        return AttentionView(spec, module, self, slots, orders=orders)
