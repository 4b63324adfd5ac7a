"""Classes as people write them themselves, and plain PyTorch's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .running import Host

WIDTH, HEADS, TOKENS = 64, 4, 6


class FourLinears(nn.Module):
    """Four Linears and a number of heads."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(part(x), self.num_heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(_merge(functional.scaled_dot_product_attention(q, k, v)))


class WrittenOut(nn.Module):
    """The same with a softmax written out, and names of the paper."""

    def __init__(self) -> None:
        super().__init__()
        self.h = HEADS
        self.W_q, self.W_k, self.W_v, self.W_o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(part(x), self.h) for part in (self.W_q, self.W_k, self.W_v))
        return self.W_o(_merge((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v))


class NanoGPT(nn.Module):
    """nanoGPT's causal attention: one fused ``c_attn``."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n_head, self.n_embd, self.dropout = HEADS, WIDTH, 0.0

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        q, k, v = (y.view(batch, tokens, self.n_head, width // self.n_head).transpose(1, 2) for y in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).contiguous().view(batch, tokens, width))


class Lucidrains(nn.Module):
    """As in vit-pytorch: a norm inside, ``to_qkv`` and ``to_out[0]``, heads of another width than the model's."""

    def __init__(self, dim: int = WIDTH, heads: int = HEADS, dim_head: int = 24) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm, self.attend, self.dropout = nn.LayerNorm(dim), nn.Softmax(dim=-1), nn.Dropout(0.0)
        self.to_qkv = nn.Linear(dim, heads * dim_head * 3, bias=False)
        self.to_out = nn.Sequential(nn.Linear(heads * dim_head, dim), nn.Dropout(0.0))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (_split(part, self.heads) for part in self.to_qkv(self.norm(x)).chunk(3, dim=-1))
        attention = self.dropout(self.attend(q @ k.transpose(-1, -2) * self.scale))
        return self.to_out(_merge(attention @ v))


class LucidrainsCross(nn.Module):
    """``to_q``, ``to_kv`` and ``to_out``."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = HEADS, (WIDTH // HEADS) ** -0.5
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, (k, v) = self.to_q(x), self.to_kv(x if context is None else context).chunk(2, dim=-1)
        q, k, v = (_split(part, self.heads) for part in (q, k, v))
        return self.to_out(_merge((q @ k.mT * self.scale).softmax(dim=-1) @ v))


class LlamaStyle(nn.Module):
    """``wq``, ``wk``, ``wv`` and ``wo``, grouped queries and rotary pairs side by side, as Meta's own code has them."""

    def __init__(self) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, HEADS // 2, WIDTH // HEADS
        self.wq, self.wo = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, self.n_kv_heads * self.head_dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.wq, self.wk, self.wv))
        q, k = _rotated(q), _rotated(k)
        k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, dim=2) for part in (k, v))
        out = functional.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (q, k, v)), is_causal=True)
        return self.wo(_merge(out))


class PackedPerHead(nn.Module):
    """One Linear whose outputs lie head by head: q, k and v of the first, of the second, and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.query_key_value, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2).chunk(3, dim=-1)
        return self.dense(_merge(functional.scaled_dot_product_attention(q, k, v)))


class Residual(nn.Module):
    """Two blocks of one attention and a layer of its own between them."""

    def __init__(self, attention: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(attention() for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for norm, attention in zip(self.norms, self.attentions, strict=True):
            x = x + attention(norm(x))
        return x


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _rotated(x: Tensor) -> Tensor:
    tokens, dim = x.shape[1], x.shape[-1]
    places = torch.arange(tokens, dtype=x.dtype)[:, None] / 100 ** (torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    turned = (
        torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
        * torch.polar(torch.ones_like(places), places)[:, None]
    )
    return torch.view_as_real(turned).flatten(-2)


def normal(*shape: int) -> Tensor:
    """Random inputs, the same for a shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def hosts() -> Iterator[Host]:
    """One's own classes and PyTorch's."""
    classes = (FourLinears, WrittenOut, NanoGPT, Lucidrains, LucidrainsCross, LlamaStyle, PackedPerHead)
    for cls in classes:
        yield Host(cls.__name__, "own class", lambda cls=cls: Residual(cls), lambda _: (normal(2, TOKENS, WIDTH),))

    def attended(query: Tensor, key: Tensor, value: Tensor) -> dict[str, Any]:
        """Without weights: averaged over heads, those that are gone count in a masked model."""
        return {"query": query, "key": key, "value": value, "need_weights": False}

    def torch_host(name: str, build: Callable[[], nn.Module], inputs: Callable[[], Any]) -> Host:
        return Host(name, "PyTorch", build, lambda _: inputs())

    def layer(**options: Any) -> dict[str, Any]:
        return {"d_model": WIDTH, "nhead": HEADS, "dim_feedforward": 32, "dropout": 0.0, **options}

    sequence, memory = normal(2, TOKENS, WIDTH), normal(2, TOKENS + 2, WIDTH)
    yield torch_host(
        "nn.MultiheadAttention", lambda: nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        lambda: attended(sequence, memory, memory),
    )  # fmt: skip
    yield torch_host(
        "nn.MultiheadAttention, kdim, vdim",
        lambda: nn.MultiheadAttention(WIDTH, HEADS, kdim=40, vdim=48, batch_first=True, add_bias_kv=True),
        lambda: attended(sequence, normal(2, 7, 40), normal(2, 7, 48)),
    )
    for norm_first in (False, True):
        yield torch_host(
            f"nn.TransformerEncoder, norm_first={norm_first}",
            lambda norm_first=norm_first: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**layer(batch_first=True, norm_first=norm_first)), 2
            ),
            lambda: (sequence,),
        )
    yield torch_host(
        "nn.TransformerDecoder",
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer(batch_first=True)), 2),
        lambda: (sequence, memory),
    )
    yield torch_host(
        "nn.Transformer",
        lambda: nn.Transformer(
            num_encoder_layers=1, num_decoder_layers=1, batch_first=True,
            **layer(),
        ),
        lambda: (memory, sequence),
    )  # fmt: skip
