"""What an attention module is, without its tensors: :class:`AttentionSpec` and :class:`HeadLayout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from ..errors import AdapterError
from . import fields
from .layout import PROJECTIONS, SIDES, HeadLayout, Kind, Projection

Features = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Numbers of features of Q, K, V and O: of what Q, K and V read, of what O writes."""
NOTHING: Features = ((), (), (), ())
Rotary = Literal["none", "half", "interleaved"]


@dataclass(frozen=True)
class AttentionSpec:
    """The frozen facts of one attention module.

    Dims count channels of one head. A model fresh from its class has equal heads; a ragged one has its own number per
    head (:attr:`qk_dims`, :attr:`vo_dims`). With grouped queries several query heads share the keys and values of one
    key head (:attr:`groups`); channels then belong to the group: a qk channel is a row of K and one of every query head
    of Q, a vo channel a row of V and a column of O for every query head.

    >>> spec = AttentionSpec.of("layers.0.attention", heads=12, head_dim=64, d_model=768)
    >>> spec.heads, spec.qk_dim, spec.vo_dim, spec.parameters
    (12, 64, 64, 2362368)
    >>> spec.macs(tokens=146) / 1e6  # millions
    377.198592
    """

    name: str
    """Fully qualified name in the model."""
    d_model: fields.Size
    """Width of what O writes."""
    qk_dims: tuple[fields.Size, ...]
    """Channels of the dot product per key head."""
    vo_dims: tuple[fields.Size, ...]
    """Channels carried out per key head."""
    scale: fields.Positive
    """What the logits are multiplied with before the softmax; data, never recomputed from a pruned dim."""
    q_in: fields.Size
    """Width of what Q reads."""
    k_in: fields.Size
    """Width of what K reads."""
    v_in: fields.Size
    """Width of what V reads."""
    bias: tuple[bool, bool, bool, bool] = (True, True, True, True)
    """Whether Q, K, V, O have a bias."""
    bias_kv: bool = False
    """Whether a learned key and value are appended to the sequence (nn.MultiheadAttention's ``add_bias_kv``)."""
    fused: bool = False
    """Whether Q, K and V lie in one packed weight."""
    groups: tuple[fields.Size, ...] = ()
    """Query heads per key head; none given: one each."""
    rotary: Rotary = "none"
    """Which channels of a head are rotated together by a rotary embedding: the first and second half of those that
    are (``"half"``, as in LLaMA), or neighbours (``"interleaved"``, as in GPT-J)."""
    rotary_dims: tuple[int, ...] = ()
    """Per key head, how many channels are rotated: the first ones."""
    gated: bool = False
    """Whether Q's projection also makes a gate for every channel that O reads (as in Qwen3-Next)."""
    q_extra: int = 0
    """Channels of every query head that Q has beside the qk channels: they meet keys that all heads share (the rotary
    part of multi-head latent attention), or no keys at all. They go only with their head, have no scores, and are in no
    ratio."""
    left_out: Features = NOTHING
    """Of Q, K and V the input features that they do not read, of O the output features that it does not write,
    ascending; :attr:`d_model` and the widths count these too, weights do not."""

    @classmethod
    def of(cls, name: str, *, heads: int, head_dim: int, d_model: int, **facts: Any) -> AttentionSpec:
        """A spec with equal heads; what is not given follows the usual attention module."""
        widths = {key: facts.pop(key, d_model) for key in ("q_in", "k_in", "v_in")}
        scale = facts.pop("scale", head_dim**-0.5)
        keys = facts.pop("kv_heads", heads)
        groups = () if keys == heads else (heads // keys,) * keys
        return cls(name, d_model, (head_dim,) * keys, (head_dim,) * keys, scale, **widths, groups=groups, **facts)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))
        object.__setattr__(self, "groups", tuple(self.groups) or (1,) * len(self.qk_dims))
        sizes = (self.d_model, self.q_in, self.k_in, self.v_in, *self.qk_dims, *self.vo_dims, *self.groups)
        if not len(self.qk_dims) == len(self.vo_dims) == len(self.groups) or not self.qk_dims or min(sizes) < 1:
            raise AdapterError(
                self.name,
                "as many qk_dims as vo_dims and groups, and at least one, every size positive",
                f"qk_dims {self.qk_dims}, vo_dims {self.vo_dims}, groups {self.groups}, widths {sizes[:4]}",
                "Check the adapter that made this spec",
            )
        if self.rotary == "none":
            object.__setattr__(self, "rotary_dims", (0,) * self.kv_heads)
        pairs = zip(self.rotary_dims, self.qk_dims, strict=False)
        if len(self.rotary_dims) != self.kv_heads or any(dim % 2 or not 0 <= dim <= most for dim, most in pairs):
            raise AdapterError(
                self.name,
                "an even number of rotary channels for every key head, at most its qk_dim",
                f"rotary_dims {self.rotary_dims}, qk_dims {self.qk_dims}",
                "Check the adapter that made this spec",
            )

        for p, gone in zip(PROJECTIONS, self.left_out, strict=True):
            if gone and (list(gone) != sorted(set(gone)) or gone[0] < 0 or gone[-1] >= self.features(p)):
                raise AdapterError(
                    f"{self.name}: left_out of {p}",
                    f"ascending numbers of {self.features(p)} features, each once",
                    f"{gone[:8]}",
                    "Check the adapter that made this spec",
                )
            if len(gone) == self.features(p):
                raise AdapterError(f"{self.name}: left_out of {p}", "a feature that stays", "none", "Leave out fewer")

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return sum(self.groups)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return len(self.qk_dims)

    @property
    def qk_dim(self) -> int:
        """Channels of the dot product in the widest head (in every head, unless ragged)."""
        return max(self.qk_dims)

    @property
    def vo_dim(self) -> int:
        """Channels carried out by the widest head (by every head, unless ragged)."""
        return max(self.vo_dims)

    @property
    def dims_of(self) -> frozenset[tuple[int, int]]:
        """The qk and vo dims that heads have."""
        return frozenset(zip(self.qk_dims, self.vo_dims, strict=True))

    @property
    def ragged(self) -> bool:
        """Whether heads differ in their number of channels."""
        return not self.layout.uniform

    @cached_property
    def layout(self) -> HeadLayout:
        """Where each head's rows are stored."""
        return HeadLayout(self.qk_dims, self.vo_dims, self.groups, self.q_extra)

    @property
    def shape(self) -> tuple[HeadLayout, Features]:
        """Channels of every head, and the features that projections leave out."""
        return self.layout, self.left_out

    def dims(self, kind: Kind) -> tuple[int, ...]:
        """Channels per key head of ``"qk"`` or ``"vo"``."""
        return self.qk_dims if kind == "qk" else self.vo_dims

    def units(self, kind: Kind, key: int) -> list[tuple[int, ...]]:
        """The channels of a key head, those that only go together in one: rotary pairs.

        >>> AttentionSpec.of("a", heads=1, head_dim=5, d_model=8, rotary="half", rotary_dims=(4,)).units("qk", 0)
        [(0, 2), (1, 3), (4,)]
        """
        turned = self.rotary_dims[key] if kind == "qk" else 0
        half = turned // 2
        pairs = [(i, i + half) if self.rotary == "half" else (2 * i, 2 * i + 1) for i in range(half)]
        return [*pairs, *((channel,) for channel in range(turned, self.dims(kind)[key]))]

    def features(self, projection: Projection) -> int:
        """How many features a projection could read (Q, K, V) or write (O)."""
        widths = {"q": self.q_in, "k": self.k_in, "v": self.v_in, "o": self.d_model, "x": self.q_in}
        return widths[projection]

    def missing(self, projection: Projection) -> tuple[int, ...]:
        """The features that it leaves out; what Q holds besides reads what Q reads."""
        return self.left_out[PROJECTIONS.index("q" if projection == "x" else projection)]

    def present(self, projection: Projection) -> tuple[int, ...]:
        """The features that it reads or writes, ascending."""
        gone = set(self.missing(projection))
        return tuple(feature for feature in range(self.features(projection)) if feature not in gone)

    def width(self, projection: Projection) -> int:
        """The other side of a projection's weight: weights per channel."""
        return self.features(projection) - len(self.missing(projection))

    def weights(self, projection: Projection) -> int:
        """Number of weights of a projection, without its bias."""
        return self.layout.channels(projection) * self.width(projection)

    def per_channel(self, kind: Kind) -> tuple[int, int]:
        """Weights that one channel holds for every query head (in Q or O), and once for the key head (in K or V)."""
        return (self.width("q"), self.width("k")) if kind == "qk" else (self.width("o"), self.width("v"))

    @property
    def parameters(self) -> int:
        """Number of parameters of the four projections, biases and ``bias_k``, ``bias_v`` included."""
        q, k, v, o = self.bias
        biases = (self.layout.channels("q") + self.layout.channels("x")) * q + sum(self.qk_dims) * (k + self.bias_kv)
        biases += sum(self.vo_dims) * (v + self.bias_kv) + self.d_model * o
        gates = self.layout.channels("o") * (self.width("q") + q) * self.gated
        return sum(self.weights(side) for side in SIDES) + biases + gates

    def macs(self, tokens: int, keys: int | None = None) -> int:
        """Multiply-adds for one sequence: ``tokens`` queries against ``keys`` keys (default: the same number)."""
        keys = tokens if keys is None else keys
        per_query = self.weights("q") + self.weights("x") + self.weights("o")
        per_query += self.layout.channels("o") * self.width("q") * self.gated
        per_key = self.weights("k") + self.weights("v")
        products = self.layout.channels("q") + self.layout.channels("x") + self.layout.channels("o")
        return tokens * per_query + keys * per_key + tokens * keys * products

    @property
    def head_units(self) -> tuple[tuple[int, ...], ...]:
        """Query heads that go together where whole heads go: those of a key head, so that all four projections lose
        their share; each alone where all share one key head."""
        if self.kv_heads == 1:
            return tuple((head,) for head in range(self.heads))
        return tuple(tuple(self.layout.queries(key)) for key in range(self.kv_heads))

    def keys_of(self, heads: Sequence[int]) -> tuple[int, ...]:
        """The key heads that these query heads use, ascending."""
        return tuple(sorted({self.layout.key_of[head] for head in heads}))

    def keep(
        self,
        heads: Sequence[int],
        qk_dims: Sequence[int],
        vo_dims: Sequence[int],
        rotary_dims: Sequence[int] | None = None,
        left_out: Features | None = None,
    ) -> AttentionSpec:
        """The spec that is left when only these query heads stay.

        Args:
            heads: query heads that stay, ascending.
            qk_dims: channels of every key head that is left; likewise ``vo_dims``.
            rotary_dims: how many of the qk channels are rotated; None: as many as fit.
            left_out: features that projections leave out; None: as now.
        """
        keys = self.keys_of(heads)
        assert len(keys) == len(qk_dims) == len(vo_dims)
        if rotary_dims is None:
            before = [self.rotary_dims[key] for key in keys]
            rotary_dims = [min(turned, dim // 2 * 2) for turned, dim in zip(before, qk_dims, strict=True)]
        groups = [sum(self.layout.key_of[head] == key for head in heads) for key in keys]
        return replace(
            self, qk_dims=tuple(qk_dims), vo_dims=tuple(vo_dims), groups=tuple(groups), rotary_dims=tuple(rotary_dims),
            left_out=self.left_out if left_out is None else left_out,
        )  # fmt: skip

    def describe(self) -> str:
        """Heads and dims in words, for messages."""

        def dims(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

        shared = f" on {self.kv_heads} key heads" if self.heads > self.kv_heads else ""
        inside = f"{dims(self.qk_dims)} (qk) and {dims(self.vo_dims)} (vo)"
        counts = [f"{p} {self.width(p)}" for p in PROJECTIONS if self.missing(p)]
        outside = f", features {', '.join(counts)}" if counts else ""
        return f"{self.heads} heads{shared} of {inside}, d_model {self.d_model}{outside}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; what most attention has not (groups, rotary pairs, gates, more in Q) is left out."""
        found = fields.to_dict(self)
        if self.heads == self.kv_heads:
            del found["groups"]
        if self.rotary == "none":
            del found["rotary"], found["rotary_dims"]
        if not self.gated:
            del found["gated"]
        if not self.q_extra:
            del found["q_extra"]
        if self.left_out == NOTHING:
            del found["left_out"]
        return found

    @classmethod
    def from_dict(cls, raw: object, where: str = "spec") -> AttentionSpec:
        """Reads :meth:`to_dict`'s mapping, trusting nothing.

        Raises:
            PlanFormatError: a missing, unknown or malformed field.
        """
        usual = {
            "groups": [], "rotary": "none", "rotary_dims": [], "gated": False, "q_extra": 0,
            "left_out": [[], [], [], []],
        }  # fmt: skip
        found = fields.checked(cls, {**usual, **raw} if isinstance(raw, dict) else raw, where)
        heads = len(found["qk_dims"])
        fields.integer(f"{where}: heads by vo_dims", len(found["vo_dims"]), low=heads, high=heads)
        for key in ("qk_dims", "vo_dims"):
            fields.integer(f"sum of {where}.{key}", sum(found[key]), low=1)
        if found["groups"]:
            fields.integer(f"{where}: heads by groups", len(found["groups"]), low=heads, high=heads)
            fields.integer(f"sum of {where}.groups", sum(found["groups"]), low=1)
        fields.integer(f"{where}.q_extra of all heads", found["q_extra"] * (sum(found["groups"]) or heads))
        if found["rotary"] != "none":
            fields.integer(f"{where}: heads by rotary_dims", len(found["rotary_dims"]), low=heads, high=heads)
            for turned, dim in zip(found["rotary_dims"], found["qk_dims"], strict=True):
                fields.integer(f"{where}.rotary_dims, halved", turned // 2 if turned % 2 == 0 else -1, high=dim // 2)
        return cls(**found)
