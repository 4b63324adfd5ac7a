"""One host tried: dense, with rows and columns at zero, and pruned in every way that its family proposes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...nn import Decoupled, host_class
from ...nn.nested import tensors_in
from ...values.layout import KINDS, Kind
from ...values.spec import AttentionSpec, Rotary
from ..base import AttentionView
from ..calls import CACHES, PLACE, Call, Signature, by_position
from ..expansion import expand_view, joints, numbers_left
from ..ways import Verdict
from .heads import Heads
from .removal import Removal
from .rotary import mix, rotary_of
from .runs import ROUNDING, Result, attends, ignores, run, short, with_dropout, without_dropout
from .stand_in import StandIn


class Trial:
    """Runs of one stand-in: dense, with rows and columns at zero, and pruned in every way."""

    def __init__(
        self, again: Callable[[], StandIn], stand_in: StandIn, calls: Sequence[Call], dtype: torch.dtype
    ) -> None:
        """
        Args:
            again: makes the stand-in anew.
            stand_in: the copy to try.
            calls: ways to call it; those that it refuses are left out.
            dtype: of its weights.
        """
        self.again, self.stand_in, self.dtype, self.view = again, stand_in, dtype, stand_in.view
        self.calls: list[Call] = []
        self.problem = ""
        """What the host raised first."""
        for call in calls:
            try:
                run(stand_in.host, call, dtype)
            except Exception as error:  # a host need not take every argument in every form
                said = short(error)
                self.problem = self.problem or said
                continue
            self.calls.append(call)
        self.reasons: dict[str, str] = {}
        self.ignored: set[str] = set()
        self.unseen = self._unseen()
        self.order = ""
        """The order in which several projections lie in one, where that had to be found."""
        if self.calls and dtype == torch.float64 and self._rounds():
            self.calls = [replace(call, exactly=True) for call in self.calls]

    def _rounds(self) -> bool:
        """Whether the host rounds to less than float64 somewhere."""
        calls = self.calls[0], replace(self.calls[0], exactly=True)
        first, second = (Result(self.stand_in.host, call, self.dtype).outputs for call in calls)
        return not all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def _unseen(self) -> list[str]:
        """Arguments of the host that no call gave, or none but None although it reads them, or that it refused."""
        if any(call.recorded for call in self.calls):
            return []
        generator, host = torch.Generator("cpu").manual_seed(0), self.stand_in.host
        given = [found for call in self.calls for found in call.arguments(generator, self.dtype)]
        seen = {name for found in given for name, value in found.items() if value is not None}
        names = Signature(host).names
        if PLACE in names and PLACE not in seen:  # a wrapper that hands on all it gets, whatever its family gives
            return []
        if self.view.module.__dict__.get("layer_idx", 0) is None:  # no place in a cache: it takes none
            seen |= {*CACHES}
        required = [name for name in names if name not in seen and any(name in found for found in given)]
        self.ignored = {name for name in required if ignores(host, self.calls[0], name, self.dtype)}
        return [name for name in names if name not in seen | self.ignored]

    def verdict(self) -> Verdict:
        """What the runs show. Every removal takes away more than the one before, so one set of weights serves all."""
        view, spec = self.view, self.view.spec
        seen = attends(self.stand_in.host, self.calls, self.dtype, {*spec.qk_dims, *spec.vo_dims})
        self._find_order()
        for way in ("stock", "decoupled") if self.unseen else ():
            self.reasons[way] = f"nobody knows what its argument {self.unseen[0]} does"
        forwards = () if self.unseen else view.adapter.decoupled_for(view)
        telling = [mixin for mixin in forwards if mixin.tells_channels(host_class(view.module))]
        fitting = [mixin for mixin in forwards if mixin not in telling and self._decoupled(mixin)]
        # what a forward computes that tells no channels apart has no rotary embedding
        rotary, turned = self._rotary() if not fitting else ("none", 0)
        fitting += [mixin for mixin in telling if self._decoupled(mixin)]
        mixins = {f"decoupled {mixin.__name__}": mixin for mixin in fitting}
        spec = self.view.spec
        ways: dict[str, set[bool]] = {}  # whether heads may go, where the way is open
        for removal in (Removal(spec, False, False), Removal(spec, True, False), Removal(spec, True, True)):
            if not self._try(removal, mixins, ways):  # whole heads cannot go: channels alone
                self.reasons["heads"] = "its output is not finite where all of a head is zero"
                self.stand_in = self.again()
                self._told(spec)
                self._try(Removal(spec, False, True), mixins, ways)
                break
        for way in ("stock", "expanded", "read", *mixins):  # a way that failed with heads may still hold for channels
            if way in self.reasons and way in ways:
                self.reasons[f"{way}, heads"] = self.reasons.pop(way)
        read = "expanded" not in ways and "read" in ways
        if read:
            ways["expanded"] = ways.pop("read")
        decoupled = next((mixin for way, mixin in mixins.items() if way in ways), None)
        if not view.called:
            self.reasons["expanded"] = "its projections are not modules of their own"
        if "expanded" in ways and decoupled is None and "stock" not in ways and not self._heads(self.view).lie():
            self.reasons["expanded"] = "its heads do not lie one after the other in its projections"
            ways.pop("expanded")
        plain = decoupled is not None and not decoupled.tells_channels(host_class(self.view.module))
        fixed = {} if plain else self._fixed()
        heads = frozenset(way.split()[0] for way, found in ways.items() if True in found)
        stock = "stock" in ways
        return Verdict(
            stock, decoupled, "expanded" in ways, read, heads, seen, fixed, dict(self.reasons), rotary=rotary,
            rotary_dim=turned, order=self.order, stock_heads=not (stock or self.unseen) and self._loses_heads(spec),
        )  # fmt: skip

    def _loses_heads(self, spec: AttentionSpec) -> bool:
        """Whether the host runs fewer heads of the dims that it has, as its attributes say them."""
        removal = Removal(spec, True, False, channels=False)
        if not removal.removes_heads or not self.view.expresses(removal.after):
            return False
        before, self.stand_in = dict(self.reasons), self.again()
        self._told(spec)
        other = self._made("stock", self._stock(removal))
        self._zero(removal)
        same, self.reasons = other is not None and self._finite() and self._same("stock", other, removal), before
        return same

    def _rotary(self) -> tuple[Rotary, int]:
        """What a rotary embedding rotates together; from then on the spec says so."""
        call = self.calls[0]

        def same(call: Call, changes: Sequence[Callable[[], None]]) -> bool:
            expected = self._outputs([call])[0]
            before = [(slot.parameter.detach(), slot.parameter.detach().clone()) for slot in self.view.slots.values()]
            for change in changes:
                change()
            found = self._outputs([call])[0]
            for parameter, values in before:
                parameter.copy_(values)
            return self._alike("rotary", replace(call, rounding=1e3 * call.rounding), found, expected)

        style, turned = rotary_of(self.stand_in, call, same)
        self.reasons.pop("rotary", None)
        spec = self.view.spec
        if style != "none":
            self._told(replace(spec, rotary=style, rotary_dims=(turned,) * spec.kv_heads))
        return style, turned

    def _told(self, spec: AttentionSpec) -> None:
        """The stand-in's spec is this from now on, and its channels lie in the order that was found."""
        self.view = self.stand_in.view = replace(self.stand_in.view.lying(self.order), spec=spec)

    def _find_order(self) -> None:
        """Takes the first order of the view's in which its heads lie; without one that of the view."""
        # of queries and gates nothing but the strict question tells one from the other
        tries = [(o, strictly) for strictly in (True, False) for o in self.view.orders if strictly or "g" not in o]
        found = (o for o, strictly in tries if self._heads(self.view.lying(o)).in_order(strictly))
        self.order = next(found, "")
        self._told(self.view.spec)

    def _heads(self, view: AttentionView) -> Heads:
        def outputs() -> Result:
            return self._outputs(self.calls[:1])[0]

        def alike(one: Result, other: Result) -> bool:
            found = self._alike("lie", self.calls[0], one, other)
            self.reasons.pop("lie", None)
            return found

        return Heads(view, outputs, alike)

    def _try(self, removal: Removal, mixins: Mapping[str, type[Decoupled]], ways: dict[str, set[bool]]) -> bool:
        """Tries the ways that a removal is for; False if it leaves nothing to compare."""
        makers = {}
        if removal.ragged:
            makers = {way: self._cut(mixin, removal) for way, mixin in mixins.items()}
            if self.view.called:
                makers["expanded"] = self._expanded(removal)
        elif self.view.adapter.expresses(self.view, removal.after) and not self.unseen:
            makers["stock"] = self._stock(removal)
        made = {way: self._made(way, make) for way, make in makers.items() if way not in self.reasons}
        self._zero(removal)
        if removal.removes_heads and not self._finite():
            return False
        for way, other in made.items():
            if other is not None and self._same(way, other, removal):
                ways.setdefault(way, set()).add(removal.removes_heads)
        if "expanded" in makers and "expanded" in self.reasons and "read" not in self.reasons:
            other = self._made("read", self._expanded(removal, read=True))
            if other is not None and self._same("read", other, removal):
                ways.setdefault("read", set()).add(removal.removes_heads)
        return True

    def _finite(self) -> bool:
        return all(bool(out.isfinite().all()) for out in Result(self.stand_in.host, self.calls[0], self.dtype).outputs)

    def _made(self, way: str, make: Callable[[], StandIn]) -> StandIn | None:
        try:
            return make()
        except Exception as error:
            self.reasons[way] = f"its parts cannot be exchanged ({short(error)})"
            return None

    # pruned copies, of values that the oracle keeps as well
    def _parameter(self, slot: Any, rows: Sequence[int] | None) -> nn.Parameter:
        channels = slot.cut(slot.parameter.detach())
        if rows is not None:
            channels = channels[torch.tensor(rows, dtype=torch.long)]
        return nn.Parameter(channels.movedim(0, slot.axis))

    def _committed(self, removal: Removal | None, stock: bool = False) -> tuple[StandIn, AttentionSpec, Sequence[int]]:
        other = self.stand_in.copy()
        spec = self.view.spec if removal is None else removal.after
        tensors = {
            key: self._parameter(slot, None if removal is None else removal.rows[other.view.side(key)])
            for key, slot in other.view.slots.items()
        }
        gain = other.view.query_gain(spec) if stock else 1.0
        if gain != 1:
            for key in ("q.weight", "q.bias"):
                if key in tensors:
                    tensors[key] = nn.Parameter(tensors[key].detach() * gain)
        other.view.commit(tensors, spec)
        other.fresh = {id(tensor): tensor for tensor in tensors.values()}
        return other, spec, range(spec.heads) if removal is None else removal.heads

    def _stock(self, removal: Removal) -> Callable[[], StandIn]:
        return lambda: self._committed(removal, stock=True)[0]

    def _cut(self, mixin: type[Decoupled], removal: Removal | None) -> Callable[[], StandIn]:
        def make() -> StandIn:
            other, spec, kept = self._committed(removal)
            numbers = None if removal is None else numbers_left(other.view, spec, kept, removal.rows)
            other.view.decouple(mixin, spec, kept, numbers=numbers)
            return other

        return make

    def _expanded(self, removal: Removal, read: bool = False) -> Callable[[], StandIn]:
        def make() -> StandIn:
            other = self.stand_in.copy()
            parameters = {}
            for joint in joints(other.view):
                places = [place for part in joint.places(other.view, removal.rows).values() for place in part]
                parameters[id(joint.owner), joint.name] = self._parameter(joint.slot, places)
            expand_view(other.view, parameters, removal.after, removal.heads, removal.rows, read=read)
            return other

        return make

    # comparisons
    def _zero(self, removal: Removal) -> None:
        with torch.no_grad():
            for key, slot in self.view.slots.items():
                channels = slot.cut(slot.parameter.detach()).clone()
                channels[torch.tensor(removal.gone[self.view.side(key)], dtype=torch.long)] = 0
                slot.write(channels)

    def _same(self, way: str, other: StandIn, removal: Removal) -> bool:
        """Whether a pruned copy computes what the stand-in, with zeros, computes."""
        for number, call in enumerate(self.calls):
            expected = Result(self.stand_in.host, call, self.dtype, number == 0)
            try:
                own = removal.heads if way == "stock" else None
                found = Result(other.host, call, self.dtype, number == 0, own)
            except Exception as error:
                return self._refused(way, f"it fails, called with {call.what}, ({short(error)})")
            heads = removal.heads if way not in ("expanded", "read") else None
            if not self._alike(way, call, found, expected, heads):
                return False
        return way not in ("expanded", "read") or self._in_training(way, other)

    def _alike(self, way: str, call: Call, found: Result, expected: Result, heads: Sequence[int] | None = None) -> bool:
        if found.shape != expected.shape:
            return self._refused(way, f"called with {call.what}, it returns other things than a forward of ours")
        pairs = [*zip(found.outputs, expected.outputs, strict=True), *zip(found.grads, expected.grads, strict=False)]
        for mine, theirs in zip(found.weights, expected.weights, strict=True):
            if heads is not None and theirs.shape[1] == self.view.spec.heads and mine.shape[1] == len(heads):
                theirs = theirs[:, list(heads)]
            pairs.append((mine, theirs))
        for mine, theirs in pairs:
            if mine.shape != theirs.shape:
                self.reasons[way] = (
                    f"called with {call.what}, it returns shape {tuple(theirs.shape)}, not {tuple(mine.shape)}"
                )
                return False
            both = torch.isfinite(theirs) & torch.isfinite(mine)
            if not bool((both | (theirs == mine) | (theirs.isnan() & mine.isnan())).all()):
                return self._refused(way, f"called with {call.what}, infinities stand at other places")
            size = theirs[both].abs().max().item() if bool(both.any()) else 0.0
            error = (mine - theirs)[both].abs().max().item() if bool(both.any()) else 0.0
            if error > ROUNDING[self.dtype] * call.rounding * max(size, 1e-3):
                off = f"off by {error / max(size, 1e-300):.2g} of its largest output"
                return self._refused(way, f"called with {call.what}, it computes something else ({off})")
        return True

    def _decoupled(self, mixin: type[Decoupled]) -> bool:
        """Whether a forward of ours computes at full rank what the host's does, in training with dropout too."""
        way = f"decoupled {mixin.__name__}"
        other = self._made(way, self._cut(mixin, None))
        if other is None:
            return False
        plain = by_position(self.stand_in.host, self.calls[0], self.dtype, self.ignored) or self.calls[0]
        try:
            found = Result(other.host, plain, self.dtype)
        except Exception as error:
            return self._refused(way, f"a forward of ours is not called as it is ({short(error)})")
        alike = self._alike(way, plain, found, Result(self.stand_in.host, plain, self.dtype))
        return alike and self._in_training(way, other) and self._written_out(way, other)

    def _written_out(self, way: str, other: StandIn) -> bool:
        """Whether the same holds where transformers is told to write attention out, as users do to see its weights."""
        configs = [module.__dict__.get("config") for module in self.stand_in.host.modules()]
        config = next((one for one in configs if getattr(one, "_attn_implementation", None) == "sdpa"), None)
        if config is None:
            return True
        try:
            config._attn_implementation = "eager"
            expected, found = (Result(one.host, self.calls[0], self.dtype) for one in (self.stand_in, other))
        except Exception as error:  # a class need not have both
            short(error)  # what the machine lacks is raised again
            return True
        finally:
            config._attn_implementation = "sdpa"
        return self._alike(way, replace(self.calls[0], what="attention written out"), found, expected)

    def _refused(self, way: str, why: str) -> bool:
        self.reasons[way] = why
        return False

    def _in_training(self, way: str, other: StandIn) -> bool:
        call = self.calls[0]
        hosts = self.stand_in.host, other.host
        try:
            for host in hosts:
                with_dropout(host)
            try:
                expected = Result(hosts[0], call, self.dtype, True)
            except Exception as error:  # the host itself: what it does in training is not seen
                return way in ("expanded", "read") or self._refused(way, f"it does not train here ({short(error)})")
            try:
                found = Result(hosts[1], call, self.dtype, True)
            except Exception as error:
                return self._refused(way, f"it fails in training ({short(error)})")
            alike = self._alike(way, replace(call, what="dropout in training"), found, expected)
            return alike and (way in ("expanded", "read") or self._same_gradients(way, other))
        finally:
            for host in hosts:
                without_dropout(host)

    def _same_gradients(self, way: str, other: StandIn) -> bool:
        """Whether weights have gradients where the host's have some, at full rank."""
        dense = list(self.view.slots.values())
        total = [0.0, 0.0]
        for side, (host, parameters) in enumerate(
            ((self.stand_in.host, {id(s.parameter): s.parameter for s in dense}), (other.host, other.fresh))
        ):
            host.zero_grad()
            leaves = list(parameters.values())
            outputs, _ = run(host, self.calls[0], self.dtype, True)
            out = next(tensors_in(outputs))
            direction = torch.randn(out.shape, generator=torch.Generator("cpu").manual_seed(2), dtype=self.dtype)
            grads = torch.autograd.grad((out * direction).sum(), leaves, allow_unused=True)
            total[side] = sum(float(grad.square().sum()) for grad in grads if grad is not None)
        if abs(total[0] - total[1]) > 1e-6 * max(total):
            return self._refused(way, "its weights get other gradients")
        return True

    def _outputs(self, calls: Sequence[Call]) -> list[Result]:
        """What calls give, without what comes along: weights; keys and values, of a host that returns them."""
        found = [Result(self.stand_in.host, call, self.dtype) for call in calls]
        for one in found:
            one.weights = []
        return found

    def _fixed(self) -> dict[Kind, str]:
        """Kinds whose channels may not be mixed: one head is turned, which must not change the output."""
        calls = [call for call in self.calls if "=" not in call.what and call.rounding == 1]
        expected = self._outputs(calls)
        found: dict[Kind, str] = {}
        for kind in KINDS:
            with torch.no_grad():
                mix(self.stand_in, kind)
            turned = self._outputs(calls)
            pairs = zip(calls, turned, expected, strict=True)
            if not all(self._alike("rotate", replace(c, rounding=1e3 * c.rounding), a, b) for c, a, b in pairs):
                found[kind] = "its own forward tells channels of a head apart"
            expected = turned
        self.reasons.pop("rotate", None)
        return found
