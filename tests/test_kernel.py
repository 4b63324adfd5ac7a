"""Our kernel: heads of any dims in one launch. On a GPU where there is one, else by Triton's interpreter; the operator
around it, and what it falls back to, everywhere."""

from __future__ import annotations

import copy
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnprune
from attnprune.errors import OptionError
from attnprune.nn.kernels import available, heads_attention, operator
from attnprune.nn.kernels.table import blocks, table_of
from attnprune.values.layout import HeadLayout

from .conformance import close, family, fresh, inputs, random_plan, without_fast_path
from .selection import ALL

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
dims = st.one_of(st.integers(1, 20), st.sampled_from([24, 33, 40, 48, 64, 72]))


def close_to_exact(found: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    """As near to float64 as PyTorch's own operations in the same dtype, or as rounding of the output allows."""
    q, k, v, layout = args
    mask, rest = options["mask"], [options[key] for key in ("causal", "scale", "window", "softcap")]
    precise = mask.double() if mask is not None and mask.is_floating_point() else mask
    exact = operator.vendors(q.double(), k.double(), v.double(), layout, precise, *rest)
    theirs = operator.vendors(q, k, v, layout, mask, *rest)
    allowed = 8 * torch.finfo(q.dtype).eps * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
    error = (found - exact).abs().max().item() if exact.numel() else 0.0
    assert error <= 2 * (theirs - exact).abs().nan_to_num().max().item() + allowed if exact.numel() else True


@needs_triton
@settings(max_examples=300 if ALL else 14)
@given(
    heads=st.lists(st.tuples(dims, dims, st.integers(1, 3)), min_size=1, max_size=4), batch=st.integers(1, 2),
    queries=st.sampled_from([1, 5, 17, 70]), keys=st.sampled_from([1, 7, 33, 130]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), equal=st.booleans(),
    kind=st.sampled_from(["none", "causal", "padding", "bool", "added", "by head"]), window=st.sampled_from([0, 3, 40]),
    softcap=st.sampled_from([0.0, 2.0]), packed=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
@example([(48, 16, 1)] * 3, 2, 70, 130, torch.float16, True, "added", 0, 0.0, True, 0)  # no powers of two
@example([(24, 72, 2), (5, 3, 1)], 1, 17, 33, torch.bfloat16, False, "by head", 40, 2.0, True, 1)
@example([(24, 16, 1)], 1, 70, 130, torch.float16, True, "none", 3, 0.0, False, 2)  # keys left out
@example([(9, 33, 2)], 1, 70, 130, torch.float32, True, "causal", 40, 0.0, False, 3)
def test_kernel_computes_attention(
    heads: list[tuple[int, int, int]], batch: int, queries: int, keys: int, dtype: torch.dtype, equal: bool, kind: str,
    window: int, softcap: float, packed: bool, seed: int,
) -> None:  # fmt: skip
    heads = [heads[0]] * len(heads) if equal else heads
    layout = HeadLayout(*map(tuple, zip(*heads, strict=True)))
    generator = torch.Generator().manual_seed(seed)
    queries = keys if kind == "causal" else queries
    shapes = [(batch, length, layout.channels(p)) for p, length in (("q", queries), ("k", keys), ("v", keys))]
    if packed:  # slices of one product, channels of others between the rows
        wide = torch.randn(batch, max(queries, keys), sum(shape[2] for shape in shapes) + 3, generator=generator)
        parts = wide.to(dtype).split([*(shape[2] for shape in shapes), 3], -1)[:3]
        q, k, v = (part[:, : shape[1]].to(DEVICE) for part, shape in zip(parts, shapes, strict=True))
    else:  # channels apart
        q, k, v = (torch.randn(*shape[:1], shape[2], shape[1], generator=generator).to(DEVICE, dtype).mT
                   for shape in shapes)  # fmt: skip
    rows = {"padding": (batch, 1, 1, keys), "by head": (batch, layout.heads, queries, keys)}
    shape = rows.get(kind, (1, 1, queries, keys))
    mask = None
    if kind in ("padding", "bool"):
        mask = (torch.rand(shape, generator=generator) < 0.6).to(DEVICE)  # some queries attend to nothing
    elif kind in ("added", "by head"):
        mask = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    options = {"scale": 0.3, "mask": mask, "causal": kind == "causal", "window": window, "softcap": softcap}
    found = heads_attention(q, k, v, layout, **options)
    assert found.shape == (batch, queries, layout.channels("o"))
    close_to_exact(found, (q, k, v, layout), options)


@needs_triton
@pytest.mark.parametrize("layout", [HeadLayout((20,) * 2, (9,) * 2), HeadLayout((3, 33), (40, 5), (2, 1))])
def test_all_of_the_output_is_written_and_nothing_else(layout: HeadLayout) -> None:
    forward = import_module("attnprune.nn.kernels.forward")
    q, k, v = (torch.randn(2, 37, layout.channels(p), device=DEVICE) for p in "qkv")
    room = torch.full((4, 50, layout.channels("o") + 7), torch.nan, device=DEVICE)
    out = room[1:3, 5:42, 3 : 3 + layout.channels("o")]
    forward.launch(q, k, v, out, table_of(layout), None, False, 0.5, 0, 0.0)
    torch.testing.assert_close(out, operator.vendors(q, k, v, layout, None, False, 0.5, 0, 0.0))
    assert int(room.isnan().sum()) == room.numel() - out.numel()
    out.fill_(torch.nan)
    nothing = torch.zeros(2, 1, 1, 37, dtype=torch.bool, device=DEVICE)
    forward.launch(q, k, v, out, table_of(layout), nothing, False, 0.5, 0, 0.0)
    assert not out.any()


@needs_triton
@pytest.mark.parametrize(("name", "case"), [("ViT", 1), ("Decoder", 0), ("Decoder", 2), ("MHA", 6), ("MHA", 5)])
def test_models_run_by_it(name: str, case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = fresh(name, case, torch.float32), inputs(name, case, dtype=torch.float32)
    given = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in given.items()}
    attnprune.apply_plan(model, random_plan(model, 0, qkvo_ratios=0.5, heads="ragged"))
    model = model.to(DEVICE)
    launches = []
    forward = import_module("attnprune.nn.kernels.forward")
    launch = forward.launch
    monkeypatch.setattr(forward, "launch", lambda *args: launches.append(launch(*args)))
    with torch.no_grad(), without_fast_path():
        expected = family(name).run(model, given)
        frozen = copy.deepcopy(model)
        attnprune.freeze(frozen)
        with attnprune.nn.execution("kernel"):
            close(family(name).run(model, given), expected, 1e-4, "as it is")
            count = len(launches)
            close(family(name).run(frozen, given), expected, 1e-4, "frozen")
    plain = not given.get("need_weights") and "eager" not in str(family(name).cases()[case])
    assert count == plain * len(attnprune.find_attention(model))
    assert len(launches) == 2 * count


CASES: list[tuple[HeadLayout, dict[str, Any]]] = [
    (HeadLayout((4, 2), (3, 5), (2, 1)), {}),
    (HeadLayout((4, 4), (4, 4)), {"causal": True}),
    (HeadLayout((4, 2), (3, 5), (2, 1)), {"window": 3, "softcap": 2.0, "causal": True}),
    (HeadLayout((4, 2), (3, 5), (2, 1)), {"mask": torch.randn(1, 3, 6, 6)}),
    (HeadLayout((4, 2), (3, 5)), {"mask": torch.rand(2, 1, 1, 6) < 0.6}),
]


def by_hand(q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, options: dict[str, Any]) -> Tensor:
    """Attention head by head, as the docstring says."""
    mask, window, cap = options.get("mask"), options.get("window", 0), options.get("softcap", 0)
    found: dict[int, Tensor] = {}
    for head in range(layout.heads):
        key = layout.key_of[head]
        spans = {"q": head, "k": key, "v": key}
        left, right, values = (x[..., slice(*layout.span(p, spans[p]))] for p, x in (("q", q), ("k", k), ("v", v)))
        logits = left @ right.mT * 0.5
        logits = cap * (logits / cap).tanh() if cap else logits
        i, j = torch.arange(q.shape[1])[:, None], torch.arange(k.shape[1])
        seen = (j <= i) if options.get("causal") else torch.ones(len(i), len(j), dtype=torch.bool)
        seen = seen & ((i - j).abs() < window) if window else seen
        if mask is not None:
            row = mask[:, head if mask.shape[1] > 1 else 0]
            logits, seen = (logits, seen & row) if row.dtype == torch.bool else (logits + row, seen)
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num()
        found[layout.span("o", head)[0]] = weights @ values
    return torch.cat([found[start] for start in sorted(found)], -1)


@pytest.mark.parametrize(("layout", "options"), CASES)
def test_operator_falls_back_and_has_gradients(
    layout: HeadLayout, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert not available(torch.device("cpu"))
    tensors = [torch.randn(2, 6, layout.channels(p), dtype=torch.float64, requires_grad=True) for p in "qkv"]
    options = {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in options.items()}
    found, expected = (
        heads_attention(*tensors, layout, scale=0.5, **options), by_hand(*tensors, layout, options)
    )  # fmt: skip
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for mine, theirs in zip(
        torch.autograd.grad(found, tensors, direction), torch.autograd.grad(expected, tensors, direction), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_operator_is_one_of_pytorch() -> None:
    layout = HeadLayout((4, 2), (3, 5), (2, 1))
    tensors = [torch.randn(1, 4, layout.channels(p), requires_grad=True) for p in "qkv"]
    rest = (list(layout.qk), list(layout.vo), list(layout.groups), None, True, 0.5, 0, 0.0)
    torch.library.opcheck(torch.ops.attnprune.heads.default, (*tensors, *rest), test_utils=(
        "test_schema", "test_faketensor", "test_autograd_registration"))  # fmt: skip
    with torch.no_grad():
        run = torch.compile(lambda *x: heads_attention(*x, layout, scale=0.5), backend="eager", fullgraph=True)
        torch.testing.assert_close(run(*tensors), heads_attention(*tensors, layout, scale=0.5))
    with pytest.raises(OptionError, match="heads_attention"):
        heads_attention(tensors[0][..., 1:], *tensors[1:], layout, scale=0.5)


def test_blocks_cover_every_dim() -> None:
    for dim in range(1, 257):
        first, second = blocks(dim)
        assert all(size == 0 or (size >= 16 and size.bit_count() == 1) for size in (first, second)), dim
        assert dim <= first + second <= max(16, 2 * dim - 2), dim


def test_large_heads_come_first_and_small_ones_work_on_less() -> None:
    table = table_of(HeadLayout((8, 64, 8, 64), (8, 64, 16, 48)))
    assert [entry[6] for entry in table.entries] == [1, 3, 0, 2]
    assert table.large == 2
    assert table.blocks == (64, 0, 64, 0, 16, 0, 16, 0)
    assert (table.even, table.align) == ((0, 0), 8)
    assert table_of(HeadLayout((24, 24), (40, 40)))[2:] == ((32, 0, 32, 16, 0, 0, 0, 0), (24, 40), 8)


@pytest.mark.long
def test_nothing_of_it_is_imported_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = (
        "import sys, torch, attnprune; layer = torch.nn.TransformerEncoderLayer(16, 2, 16, batch_first=True).eval();"
        "attnprune.prune_attention(layer, 0.5, heads='ragged'); attnprune.freeze(layer); x = torch.randn(1, 3, 16)\n"
        "with torch.no_grad(), attnprune.nn.execution('kernel'): layer(x)\n"
        "assert 'attnprune.nn.kernels.forward' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


COMPILED = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from attnprune.nn.kernels.forward import _kernel
from attnprune.nn.kernels.table import sizes, table_of
from attnprune.values.layout import HeadLayout
names = ["QK1", "QK2", "VO1", "VO2", "SMALL_QK1", "SMALL_QK2", "SMALL_VO1", "SMALL_VO2", "QK", "VO"]
for layout in (HeadLayout((48,) * 2, (40,) * 2), HeadLayout((8, 64), (24, 16))):
    table = table_of(layout)
    m, n, warps, stages = sizes(table, torch.bfloat16)
    fixed = dict(zip(names, (*table.blocks, *table.even))) | {
        "ALIGN": table.align, "M": m, "N": n, "MASK": 0, "CAUSAL": True, "WINDOW": False, "SOFTCAP": False,
        "PRECISION": "tf32", "WIDEN": False, "q_c": 1, "k_c": 1, "v_c": 1, "o_c": 1}
    kinds = {**dict.fromkeys("qkvo", "*bf16"), "mask": "*bf16", "table": "*i32", "scale": "fp32", "softcap": "fp32"}
    given = {name: "constexpr" if name in fixed else kinds.get(name, "i32") for name in _kernel.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, name in enumerate(_kernel.arg_names) if name in "qkvo"}
    source = ASTSource(fn=_kernel, signature=given, constexprs=fixed, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps, "num_stages": stages})
    assert made.asm["ptx"].count("wgmma.mma_async") and made.metadata.shared < 200_000
    # of 16 bytes each: copies of fewer are called otherwise
    assert made.asm["ptx"].count("cp.async.cg") and not made.asm["ptx"].count("cp.async.ca"), layout
"""


@needs_triton
@pytest.mark.long
def test_compiled_for_an_h100_loads_run_ahead_in_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU is needed for that: products run on matrix units, and keys and values are copied by 16 bytes."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    subprocess.run([sys.executable, "-W", "ignore", "-c", COMPILED], check=True)
