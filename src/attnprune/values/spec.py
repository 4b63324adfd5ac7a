"""What an attention module is, without its tensors: :class:`AttentionSpec` and :class:`HeadLayout`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ..errors import AdapterError
from . import fields
from .layout import KIND_OF, PROJECTIONS, HeadLayout, Kind, Projection


@dataclass(frozen=True)
class AttentionSpec:
    """The frozen facts of one attention module.

    Dims count channels of one head. A model fresh from its class has equal heads; a ragged one has its own number per
    head (:attr:`qk_dims`, :attr:`vo_dims`).

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
    """Channels of the dot product per head."""
    vo_dims: tuple[fields.Size, ...]
    """Channels carried out per head."""
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

    @classmethod
    def of(cls, name: str, *, heads: int, head_dim: int, d_model: int, **facts: Any) -> AttentionSpec:
        """A spec with equal heads; what is not given follows the usual attention module."""
        widths = {key: facts.pop(key, d_model) for key in ("q_in", "k_in", "v_in")}
        scale = facts.pop("scale", head_dim**-0.5)
        return cls(name, d_model, (head_dim,) * heads, (head_dim,) * heads, scale, **widths, **facts)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))
        sizes = (self.d_model, self.q_in, self.k_in, self.v_in, *self.qk_dims, *self.vo_dims)
        if len(self.qk_dims) != len(self.vo_dims) or not self.qk_dims or min(sizes) < 1:
            raise AdapterError(
                self.name,
                "as many qk_dims as vo_dims and at least one, every size positive",
                f"qk_dims {self.qk_dims}, vo_dims {self.vo_dims}, widths {sizes[:4]}",
                "Check the adapter that made this spec",
            )

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.qk_dims)

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads; each query head has its own."""
        return self.heads

    @property
    def qk_dim(self) -> int:
        """Channels of the dot product in the widest head (in every head, unless ragged)."""
        return max(self.qk_dims)

    @property
    def vo_dim(self) -> int:
        """Channels carried out by the widest head (by every head, unless ragged)."""
        return max(self.vo_dims)

    @property
    def ragged(self) -> bool:
        """Whether heads differ in their number of channels."""
        return not self.layout.uniform

    @cached_property
    def layout(self) -> HeadLayout:
        """Where each head's rows are stored."""
        return HeadLayout(self.qk_dims, self.vo_dims)

    def dims(self, kind: Kind) -> tuple[int, ...]:
        """Channels per head of ``"qk"`` or ``"vo"``."""
        return self.qk_dims if kind == "qk" else self.vo_dims

    def width(self, projection: Projection) -> int:
        """The other side of a projection's weight: weights per channel."""
        return {"q": self.q_in, "k": self.k_in, "v": self.v_in, "o": self.d_model}[projection]

    def weights(self, projection: Projection) -> int:
        """Number of weights of a projection, without its bias."""
        return sum(self.dims(KIND_OF[projection])) * self.width(projection)

    def per_channel(self, kind: Kind) -> int:
        """Weights that one channel holds in its two projections."""
        return self.q_in + self.k_in if kind == "qk" else self.v_in + self.d_model

    @property
    def parameters(self) -> int:
        """Number of parameters of the four projections, biases and ``bias_k``, ``bias_v`` included."""
        q, k, v, o = self.bias
        biases = sum(self.qk_dims) * (q + k + self.bias_kv) + sum(self.vo_dims) * (v + self.bias_kv) + self.d_model * o
        return sum(self.weights(projection) for projection in PROJECTIONS) + biases

    def macs(self, tokens: int, keys: int | None = None) -> int:
        """Multiply-adds for one sequence: ``tokens`` queries against ``keys`` keys (default: the same number)."""
        keys = tokens if keys is None else keys
        per_query = self.weights("q") + self.weights("o")
        per_key = self.weights("k") + self.weights("v")
        return tokens * per_query + keys * per_key + tokens * keys * (sum(self.qk_dims) + sum(self.vo_dims))

    def keep(self, heads: Sequence[int], qk_dims: Sequence[int], vo_dims: Sequence[int]) -> AttentionSpec:
        """The spec that is left when only ``heads`` stay, with these dims each."""
        assert len(heads) == len(qk_dims) == len(vo_dims)
        return replace(self, qk_dims=tuple(qk_dims), vo_dims=tuple(vo_dims))

    def describe(self) -> str:
        """Heads and dims in words, for messages."""

        def dims(values: tuple[int, ...]) -> str:
            return str(values[0]) if len(set(values)) == 1 else f"{min(values)} to {max(values)}"

        return f"{self.heads} heads of {dims(self.qk_dims)} (qk) and {dims(self.vo_dims)} (vo), d_model {self.d_model}"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping."""
        return fields.to_dict(self)

    @classmethod
    def from_dict(cls, raw: object, where: str = "spec") -> AttentionSpec:
        """Reads :meth:`to_dict`'s mapping, trusting nothing.

        Raises:
            PlanFormatError: a missing, unknown or malformed field.
        """
        found = fields.checked(cls, raw, where)
        heads = len(found["qk_dims"])
        fields.integer(f"{where}: heads by vo_dims", len(found["vo_dims"]), low=heads, high=heads)
        for key in ("qk_dims", "vo_dims"):
            fields.integer(f"sum of {where}.{key}", sum(found[key]), low=1)
        return cls(**found)
