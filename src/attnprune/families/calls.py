"""How a host is called while it is proven: by the names of its arguments, or as the user's own model called it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.attempt import MACHINE
from ..values.spec import AttentionSpec
from .probe_cache import ProbeCache

CACHES = ("past_key_values", "past_key_value", "cache", "layer_past")
MASKS = (
    "attention_mask", "attn_mask", "mask", "bias", "attention_bias", "position_bias", "relative_position_bias",
    "causal_attention_mask", "encoder_attention_mask",
)  # fmt: skip
HEAD_MASKS = ("head_mask", "layer_head_mask")
SOURCES = ("key_value_states", "encoder_hidden_states", "context", "memory", "encoder_output")
KEYS, VALUES = ("key", "keys", "k", "key_states"), ("value", "values", "v", "value_states")
ANGLES = ("position_embeddings", "rotary_pos_emb", "rope", "freqs_cis", "rotary_emb")
ADDED = ("object_queries", "query_pos", "pos")
"""What is added to the inputs of queries and keys, as in DETR."""
PLACES = ("cache_position",)
POSITIONS = ("position_ids",)
LONGEST = ("max_seqlen", "max_seq_len", "max_length_q")
LENGTHS = ("cu_seqlens", "cu_seq_lens", "cu_window_seqlens", "cu_seqlens_q")
FLAGS = ("output_attentions", "need_weights", "is_causal", "return_attention", "output_attention", "use_cache")

Arguments = dict[str, Any]
LONGER = "one sequence of nine tokens"
PLACE = "*"
"""The name of a positional argument that has none, as in a forward that hands on all it gets."""


@dataclass(frozen=True)
class Call:
    """One way to call a host, or several times in a row with one cache.

    ``arguments(generator, dtype)`` makes new keyword arguments, the same for a generator of the same seed.
    """

    what: str
    arguments: Callable[[torch.Generator, torch.dtype], list[Arguments]]
    rounding: float = 1.0
    """How much more than usual rounding may differ."""
    by_head: str | None = None
    """The argument with a row for every head, in its second dimension."""
    recorded: Sequence[Any] = field(default=())
    """Positional arguments, of a recorded call."""
    exactly: bool = False
    """Whether it is computed in float64 throughout, as the host rounds to less (``attnprune.nn.exactly``)."""


class Stranger:
    """In place of an argument whose name tells nothing. It is good for nothing: a host that computes the same with it
    does not read that argument, and a forward of ours that takes it for another fails."""

    def __bool__(self) -> bool:
        raise TypeError("nobody knows what this argument is")


class Signature:
    """What a host's forward takes, by role."""

    def __init__(self, host: nn.Module) -> None:
        self.host = host
        parameters = inspect.signature(type(host).forward).parameters
        kinds = inspect.Parameter
        named = [p for p in parameters.values() if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        self.names = [p.name for p in named[1:]]
        self.required = [p.name for p in named[1:] if p.default is kinds.empty]
        self.open = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
        if not self.names and any(p.kind is kinds.VAR_POSITIONAL for p in parameters.values()):
            self.names = [PLACE, *(("attention_mask", "attn_mask", "mask") if self.open else ())]

    def first(self, names: Sequence[str]) -> str | None:
        """The first of these names that the forward takes."""
        return next((name for name in self.names if name in names), None)


def calls_of(host: nn.Module, spec: AttentionSpec) -> list[Call]:
    """Ways to call a host by its arguments' names; the first is the plainest. None where a name tells nothing."""
    signature = Signature(host)
    if not signature.names:
        return []
    dtype = next((p.dtype for p in host.parameters() if p.is_floating_point()), torch.float64)
    # what an argument that may be missing may still have to be; Q may read less than what comes in, through a low rank
    given = ((), ADDED, ANGLES, SOURCES, (*ANGLES, *SOURCES), PLACES, (*PLACES, *SOURCES), POSITIONS, MASKS)
    for width, more, form in product(dict.fromkeys((spec.q_in, spec.d_model)), given, FORMS):
        inputs = _Inputs(signature, spec, more, form, width)
        if (more and not inputs.optional) or not inputs.possible:
            continue
        try:
            found = inputs(torch.Generator("cpu").manual_seed(0), dtype)
            host(*positional(found), **found)
        except MACHINE:
            raise
        except Exception:  # the next one, then
            continue
        return list(_variants(signature, spec, inputs))
    return [Call("plain inputs", lambda generator, dtype: [_Inputs(signature, spec, ())(generator, dtype)])]


def positional(arguments: Arguments) -> list[Any]:
    """Takes the argument without a name out of the others."""
    return [arguments.pop(PLACE)] if PLACE in arguments else []


def rotary_width(host: nn.Module, spec: AttentionSpec) -> int:
    """How many channels of a head the tables of a host's rotary embedding have, by what it and its config say."""
    most = spec.qk_dim + spec.q_extra
    for module in host.modules():
        for name in ("rotary_ndims", "rotary_dim", "rotary_emb_dim", "qk_rope_head_dim"):
            width = module.__dict__.get(name)
            if isinstance(width, int) and 0 < width <= most:
                return width
        config = module.__dict__.get("config")
        found = getattr(config, "rope_parameters", None)
        share = found.get("partial_rotary_factor") if isinstance(found, Mapping) else None
        share = getattr(config, "partial_rotary_factor", None) if share is None else share
        if isinstance(share, float) and 0 < share < 1:
            return int(spec.qk_dim * share)
    return spec.q_extra or spec.qk_dim


class Form(NamedTuple):
    """How a host takes what it is called with."""

    by_pair: bool = False
    """Rotary tables have one angle for each pair of channels."""
    single: bool = False
    """Rotary tables serve the whole batch, and have no batch dimension."""
    packed: bool = False
    """Sequences of several lengths lie one after the other, without a batch dimension."""
    one: bool = False
    """Such are a batch of one."""
    grid: bool = False
    """Tokens are a grid of rows and columns."""
    complex: bool = False
    """Rotary tables hold one complex number for each pair of channels."""


FORMS = (
    Form(), Form(by_pair=True), Form(by_pair=True, complex=True), Form(single=True), Form(single=True, packed=True),
    Form(packed=True, one=True), Form(grid=True),
)  # fmt: skip


class _Inputs:
    """Makes arguments that every call of a host needs.

    Args:
        signature: what the host takes.
        spec: the attention.
        more: names of arguments to give although they may be missing.
        form: how it takes them.
        hidden: width of what it reads; None: that of what Q reads.
    """

    def __init__(
        self,
        signature: Signature,
        spec: AttentionSpec,
        more: Sequence[str],
        form: Form = FORMS[0],
        hidden: int | None = None,
    ) -> None:
        self.read = spec.q_in if hidden is None else hidden
        self.form, self.width = form, rotary_width(signature.host, spec) // (2 if form.by_pair else 1)
        self.lengths = signature.first(LENGTHS)
        self.spec, self.hidden, self.required = spec, signature.names[0], signature.required
        self.key, self.value = (
            name if name in signature.required else None for name in (signature.first(KEYS), signature.first(VALUES))
        )
        wanted = [name for name in signature.names if name in more and name not in signature.required]
        self.padding = next((name for name in signature.names if name in MASKS and name in more), None)
        self.optional = tuple(wanted) if self.padding is None else (*wanted, self.padding)
        self.source = next((name for name in (*signature.required, *wanted) if name in SOURCES), None)
        if self.source is None and spec.k_in != spec.q_in:
            self.source = signature.first(SOURCES)
        self.angles = next((name for name in (*signature.required, *wanted) if name in ANGLES), None)
        self.places = next((name for name in wanted if name in PLACES), None)
        self.positions = next((name for name in wanted if name in POSITIONS), None)
        self.added = next((name for name in wanted if name in ADDED), None)

    def __call__(
        self, generator: torch.Generator, dtype: torch.dtype, batch: int = 2, tokens: int = 5, size: float = 1.0
    ) -> Arguments:
        spec = self.spec
        lead = [1] * self.form.one if self.form.packed else [batch]

        def normal(tokens: int, width: int) -> Tensor:
            shape = [*lead, -(-tokens // 3), min(tokens, 3), width] if self.form.grid else [*lead, tokens, width]
            return torch.randn(shape, generator=generator, dtype=dtype, device="cpu") * size

        found: Arguments = {self.hidden: normal(tokens, self.read)}
        if self.key is not None:
            found[self.key] = normal(tokens, spec.k_in)
        if self.value is not None:
            found[self.value] = normal(tokens, spec.v_in)
        if self.source is not None:
            found[self.source] = normal(tokens + 2, spec.k_in)
        if self.angles is not None:
            rows = () if self.form.single else (batch,)
            turn = torch.randn(*rows, tokens, self.width, generator=generator, dtype=dtype, device="cpu")
            cos, sin = turn.cos(), turn.sin()
            found[self.angles] = torch.complex(cos, sin) if self.form.complex else (cos, sin)
        if self.added is not None:
            found[self.added] = normal(tokens, self.read)
        if self.places is not None:
            found[self.places] = torch.arange(tokens, device="cpu")
        if self.positions is not None:
            found[self.positions] = _positions(found[self.hidden])
        if self.form.packed and self.lengths is not None:
            ends = [0, tokens] if tokens < 3 else [0, tokens - 2, tokens]
            found[self.lengths] = torch.tensor(ends, dtype=torch.int32, device="cpu")
        if self.padding is not None:
            found[self.padding] = torch.ones(batch, self.keys(found), dtype=torch.long, device="cpu")
        return {**dict.fromkeys(self.required), **found}

    @property
    def possible(self) -> bool:
        """Whether the host has arguments of this form."""
        if self.form.packed:
            return self.lengths is not None
        if self.form.grid:
            return self.key is None and self.source is None
        return self.angles is not None or not (self.form.by_pair or self.form.single)

    def keys(self, found: Arguments) -> int:
        """How many keys there are."""
        read: Tensor = found[self.key or self.source or self.hidden]
        return int(read.shape[-2])


def _variants(signature: Signature, spec: AttentionSpec, inputs: _Inputs) -> Iterator[Call]:
    heads = spec.heads

    def call(
        what: str,
        more: Callable[..., Arguments] | None = None,
        rounding: float = 1.0,
        by_head: str | None = None,
        **how: Any,
    ) -> Call:
        def arguments(generator: torch.Generator, dtype: torch.dtype) -> list[Arguments]:
            found = inputs(generator, dtype, **how)
            return [found | ({} if more is None else more(generator, dtype, found))]

        return Call(what, arguments, rounding, by_head)

    def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device="cpu")

    yield call("plain inputs")
    yield call(LONGER, batch=1, tokens=9)
    yield call("a single token", tokens=1)
    yield call("large inputs", size=30.0, rounding=1e3)
    yield call("huge inputs", size=2e3, rounding=1e6)

    if inputs.angles is not None and not inputs.form.complex:
        where = inputs.angles

        def last(g: torch.Generator, dtype: torch.dtype, found: Arguments) -> Arguments:
            return {where: tuple(table[..., 2:, :] for table in found[where])}

        yield call("rotary tables of the last tokens alone", last)

    for mask in () if inputs.padding is None else (inputs.padding,):

        def padding(g: torch.Generator, dtype: torch.dtype, found: Arguments, mask: str = mask) -> Arguments:
            seen = torch.rand(found[mask].shape, generator=g, device="cpu") < 0.6
            seen[:, 0] = True
            return {mask: seen.long()}

        yield call(f"a padding {mask}", padding)
    for mask in (name for name in signature.names if name in MASKS):
        of_source = mask.startswith("encoder") and inputs.source is None
        source = signature.first(SOURCES) if of_source else None

        def square(found: Arguments, source: str | None = source) -> tuple[int, int]:
            keys = found[source].shape[-2] if source is not None else inputs.keys(found)
            return found[inputs.hidden].shape[-2], keys

        def sourced(g: torch.Generator, dtype: torch.dtype, source: str | None = source) -> Arguments:
            return {} if source is None else {source: normal(g, dtype, 2, 7, spec.k_in)}

        for rows in (1, heads):

            def additive(
                g: torch.Generator, dtype: torch.dtype, found: Arguments, rows: int = rows, mask: str = mask,
                square: Any = square, sourced: Any = sourced,
            ) -> Arguments:  # fmt: skip
                more = sourced(g, dtype)
                return {**more, mask: normal(g, dtype, 2, rows, *square({**found, **more}))}

            every = rows > 1
            yield call(f"an additive {mask}{' of every head' * every}", additive, by_head=mask if every else None)

        def causal(
            g: torch.Generator, dtype: torch.dtype, found: Arguments, mask: str = mask, square: Any = square,
            sourced: Any = sourced,
        ) -> Arguments:  # fmt: skip
            more = sourced(g, dtype)
            shape = square({**found, **more})
            hide = torch.ones(shape, dtype=torch.bool, device="cpu").triu(1)
            zeros = torch.zeros(2, 1, *shape, dtype=dtype, device="cpu")
            return {**more, mask: zeros.masked_fill(hide, torch.finfo(dtype).min)}

        yield call(f"a causal {mask}", causal)

        def boolean(
            g: torch.Generator, dtype: torch.dtype, found: Arguments, mask: str = mask, square: Any = square,
            sourced: Any = sourced,
        ) -> Arguments:  # fmt: skip
            more = sourced(g, dtype)
            seen = torch.rand(2, 1, *square({**found, **more}), generator=g, device="cpu") < 0.6
            seen[..., 0] = True
            return {**more, mask: seen}

        yield call(f"a bool {mask}", boolean)
    for name in (name for name in signature.names if name in HEAD_MASKS):
        yield call(f"a {name}", lambda g, dtype, _, name=name: {name: normal(g, dtype, 1, heads, 1, 1)}, by_head=name)
    for flag in FLAGS:
        if flag in signature.names or (signature.open and flag in ("output_attentions", "is_causal")):
            for on in (True, False):
                yield call(f"{flag}={on}", lambda g, dtype, _, flag=flag, on=on: {flag: on})
    for name in (name for name in signature.names if name in LONGEST):
        yield call(f"a {name}", lambda g, dtype, found, name=name: {name: int(found[inputs.hidden].shape[-2])})
    for name in (name for name in signature.names if name in POSITIONS):
        yield call(f"a {name}", lambda g, dtype, found, name=name: {name: _positions(found[inputs.hidden])})
    if inputs.source is None:
        for source in (name for name in signature.names if name in SOURCES):
            yield call(
                f"another {source}", lambda g, dtype, _, source=source: {source: normal(g, dtype, 2, 7, spec.k_in)}
            )
    cache = signature.first(CACHES)
    if cache is not None:

        def cached(generator: torch.Generator, dtype: torch.dtype) -> list[Arguments]:
            memory, found, seen = ProbeCache(), [], 0
            for tokens in (4, 1, 2):
                step = {**inputs(generator, dtype, tokens=tokens), cache: memory}
                if "cache_position" in signature.names:
                    step["cache_position"] = torch.arange(seen, seen + tokens, device="cpu")
                found.append(step)
                seen += tokens
            return found

        yield Call("a cache", cached)


def by_position(host: nn.Module, call: Call, dtype: torch.dtype, ignored: Collection[str] = ()) -> Call | None:
    """A call with its arguments in the host's order instead of by name, those that it ignores any; None where they are
    so already."""
    signature = Signature(host)
    if call.recorded or PLACE in signature.names:
        return None
    given = call.arguments(torch.Generator("cpu").manual_seed(1), dtype)[0]
    parameters = inspect.signature(type(host).forward).parameters
    last = max((place for place, name in enumerate(signature.names) if name in given), default=0)
    args: list[Any] = []
    for parameter in (parameters[name] for name in signature.names[: last + 1]):
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            break
        default = None if parameter.default is inspect.Parameter.empty else parameter.default
        value = given.pop(parameter.name, default)
        args.append(Stranger() if parameter.name in ignored else value)
    return replace(call, what="arguments by position", arguments=lambda *_: [dict(given)], recorded=tuple(args))


def _positions(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[-2], device="cpu").expand(hidden.shape[:-1])
