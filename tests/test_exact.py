"""Law 1: the pruned model equals the dense one with removed rows and columns at zero.

``make test-exact`` runs 200 random cases for every family and mode in float64, ``make test-all`` 5, and ``make test`` 3
for a part of them, in which every family that no other one stands for meets every granularity, scope and kind of heads.
"""

from __future__ import annotations

import importlib
import itertools
import math
import os
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from attnprune import find_attention
from attnprune.errors import OptionError
from attnprune.nn import Plain, attend, execution, products
from attnprune.nn import policy as layouts
from attnprune.nn.policy import arrange
from attnprune.values.layout import Bucket, HeadLayout

from .conformance import check_exact, family, fresh, inputs, random_plan
from .families import FAMILIES
from .selection import ALL, examples, telling

attend_module = importlib.import_module("attnprune.nn.attend")  # the package has a function of this name
GRANULARITIES, SCOPES, HEADS = ("head", "channel", "joint"), ("local", "global"), ("uniform", "ragged")
MODES = list(itertools.product(GRANULARITIES, SCOPES, HEADS))
CASES = int(os.environ.get("ATTNPRUNE_CASES", "5" if ALL else "3"))  # for every family and mode
seeds = st.integers(0, 10_000)
ratios = st.sampled_from([0.0, 0.2, 0.4, 0.5, 0.6, 0.75, 0.8])


def reachable(model: nn.Module, ratio: float) -> float:
    """One head of every layer has to stay; with grouped queries one group, or keys and values that all heads share."""
    spec = find_attention(model)[0]
    return min(ratio, 1 - 1 / spec.kv_heads if spec.kv_heads > 1 else 0.5)


@pytest.mark.covering(2)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact(name: str, granularity: str, scope: str, heads: str) -> None:
    @settings(max_examples=CASES)
    @given(seed=seeds, qk=ratios, vo=ratios, case=st.integers(0, len(family(name).cases()) - 1), train=st.booleans())
    def check(seed: int, qk: float, vo: float, case: int, train: bool) -> None:
        model = fresh(name, case, train=train)
        if granularity == "head":
            qk = vo = reachable(model, qk)
        plan = random_plan(
            model, seed, qkvo_ratios={"qk": qk, "vo": vo}, granularity=granularity, scope=scope, heads=heads
        )
        check_exact(name, model, inputs(name, case, seed), plan, 1e-10)

    check()


@pytest.mark.parametrize("name", telling(FAMILIES))
def test_exact_in_float32(name: str) -> None:
    @settings(max_examples=examples(40))
    @given(seed=seeds, ratio=ratios, mode=st.sampled_from(MODES), case=st.integers(0, len(family(name).cases()) - 1))
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        granularity, scope, heads = mode
        model = fresh(name, case, torch.float32)
        ratio = reachable(model, ratio) if granularity == "head" else ratio
        plan = random_plan(model, seed, qkvo_ratios=ratio, granularity=granularity, scope=scope, heads=heads)
        check_exact(name, model, inputs(name, case, seed, torch.float32), plan, 1e-5)

    check()


LAYOUTS = ("separate", "buckets", "groups", "padded", "products")


@pytest.mark.covering(1)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FAMILIES)
def test_exact_in_every_layout(name: str, layout: str) -> None:
    """Every execution layout computes the same, forced one by one, forward and gradient."""

    @settings(max_examples=8)
    @given(
        seed=seeds, qk=ratios, vo=ratios, heads=st.sampled_from(["uniform", "ragged"]), train=st.booleans(),
        case=st.integers(0, len(family(name).cases()) - 1), gather=st.booleans(),
        call=st.sampled_from([0, 300, 1 << 60]),
        whole=st.sampled_from([0, 1 << 60]), piece=st.sampled_from([1, 20, 60, 1 << 20]), row=st.sampled_from([1, 32]),
    )  # fmt: skip
    def check(
        seed: int, qk: float, vo: float, heads: str, train: bool, case: int, gather: bool, call: int, whole: int,
        piece: int, row: int,
    ) -> None:  # fmt: skip
        model = fresh(name, case, train=train)
        plan = random_plan(model, seed, qkvo_ratios={"qk": qk, "vo": vo}, heads=heads)
        with pytest.MonkeyPatch.context() as patch, execution(layout):
            patch.setattr(attend_module, "FEW", 1 << 60 if gather else 0)
            patch.setitem(layouts.CALL, "cpu", call)
            patch.setitem(layouts.ALIGNED, "cpu", row)
            patch.setattr(products, "WHOLE", whole)
            patch.setattr(products, "PIECE", piece)
            patch.setattr(products, "CAUSAL", 2)
            check_exact(name, model, inputs(name, case, seed), plan, 1e-10)

    check()


def head_by_head(
    q: Tensor, k: Tensor, v: Tensor, layout: HeadLayout, mask: Tensor | None = None, **options: Any
) -> Tensor:
    """Context in stored order: every head by the fused kernel on its own; masks ``(batch, 1 or heads, ...)``."""
    contexts = []
    for head in layout.order:
        qk, vo = (slice(*layout.span(p, head)) for p in ("q", "v"))
        own = None if mask is None else mask[:, head if mask.shape[1] > 1 else 0]
        contexts.append(F.scaled_dot_product_attention(q[..., qk], k[..., qk], v[..., vo], own, scale=0.3, **options))
    return torch.cat(contexts, dim=-1)


@settings(max_examples=40)
@given(
    seed=seeds, dims=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    batch=st.integers(1, 3), queries=st.integers(1, 7), keys=st.integers(1, 7), alike=st.integers(1, 3),
    whole=st.sampled_from([0, 20, 60, 1 << 60]), each=st.booleans(),
    piece=st.sampled_from([1, 9, 25, 70, 1 << 20]), mask=st.sampled_from(["none", "bool", "additive", "causal"]),
    single=st.booleans(), threads=st.sampled_from([1, 2, 3]),
)  # fmt: skip
def test_products(
    seed: int, dims: list[tuple[int, int]], batch: int, queries: int, keys: int, alike: int, whole: int, each: bool,
    piece: int, mask: str, single: bool, threads: int,
) -> None:  # fmt: skip
    """Whole, in pieces of any size, or shared by threads: what the fused kernel gives, with queries that may attend to
    nothing."""
    g = torch.Generator().manual_seed(seed)
    layout = HeadLayout(*map(tuple, zip(*dims * alike, strict=True)))
    q, k, v = (
        torch.randn(batch, tokens, sum(width), generator=g, dtype=torch.float64)
        for tokens, width in ((queries, layout.qk), (keys, layout.qk), (keys, layout.vo))
    )
    rows = len(layout.qk) if each else 1
    allowed = torch.rand(1 if single else batch, rows, queries, keys, generator=g) > 0.4
    given = {"none": None, "causal": None, "bool": allowed, "additive": torch.zeros(allowed.shape, dtype=q.dtype)}[mask]
    if mask == "additive":
        given = torch.randn(allowed.shape, generator=g, dtype=q.dtype).masked_fill(~allowed, -torch.inf)
    causal = mask == "causal"
    expected = head_by_head(q, k, v, layout, given, is_causal=causal).nan_to_num(0.0)

    def of(mask: Tensor, bucket: Bucket) -> Tensor:
        return mask[:, list(bucket.heads)] if each else mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "WHOLE", whole)
        patch.setattr(products, "PIECE", piece)
        patch.setattr(products, "CAUSAL", 3)
        patch.setattr(products, "OWN", piece)
        patch.setattr(products, "MANY", 0)
        torch.set_num_threads(threads)  # really: threads that begin here learn it, too
        found = products.products(q, k, v, layout, Plain(0.3, given, causal, of))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_gradients_where_a_query_attends_to_nothing() -> None:
    """They are zero for it, and no NaN reaches the others."""
    layout = HeadLayout(qk=(2, 3), vo=(4, 1))
    allowed = torch.tensor([[True, False, True], [False, False, False]])
    for mask in (allowed, torch.zeros(2, 3).double().masked_fill(~allowed, -torch.inf)):
        q, k, v = (torch.randn(1, n, 5, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
        found = products.products(q, k, v, layout, Plain(0.3, mask[None, None], False, lambda rows, _: rows))
        expected = head_by_head(q[:, :1], k[:, ::2], v[:, ::2], layout)
        torch.testing.assert_close(found, F.pad(expected, (0, 0, 0, 1)))
        ours = torch.autograd.grad(found.square().sum(), (q, k, v))
        theirs = torch.autograd.grad(expected.square().sum(), (q, k, v))
        torch.testing.assert_close(ours, theirs)


@settings(max_examples=40)
@given(
    dims=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=6), pairs=st.integers(1, 50),
    call=st.integers(0, 2000), multiple=st.sampled_from([1, 4, 8]),
)  # fmt: skip
def test_groups_cost_the_least(dims: list[tuple[int, int]], pairs: int, call: int, multiple: int) -> None:
    """Against every partition of the buckets."""

    def cost(parts: Sequence[Sequence[Bucket]]) -> int:
        widths = [math.ceil(max(max(b.qk_dim, b.vo_dim) for b in part) / multiple) * multiple for part in parts]
        heads = [sum(len(b.heads) for b in part) for part in parts]
        return sum(call + 2 * pairs * count * width for count, width in zip(heads, widths, strict=True))

    buckets = HeadLayout(*map(tuple, zip(*dims, strict=True))).buckets
    found = layouts.partition(buckets, pairs, call, multiple)
    assert sorted(part for group in found for part in group.parts) == sorted(buckets)
    assert cost([group.parts for group in found]) == min(map(cost, partitions(list(buckets))))


def partitions(items: list[Bucket]) -> Iterator[list[list[Bucket]]]:
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def test_the_layout_that_shapes_suggest(monkeypatch: pytest.MonkeyPatch) -> None:
    near = HeadLayout(qk=(4, 2, 4), vo=(3, 3, 3))
    x = torch.zeros(1, 8, 10)
    assert products.pays(near, x, x, x)
    assert not products.pays(near, x.half(), x.half(), x.half())
    assert not products.pays(near, x.requires_grad_(), x, x)
    even = HeadLayout(qk=(5, 5), vo=(5, 5))
    x = torch.zeros(1, 8, 10)
    assert products.pays(even, x, x, x)
    monkeypatch.setattr(products, "EQUAL", 0)
    assert not products.pays(even, x, x, x)
    monkeypatch.setitem(layouts.CALL, "cpu", 1 << 60)
    assert [group.bucket[:3] for group in arrange(near, x, x)] == [((0, 2, 1), 4, 4)]
    monkeypatch.setitem(layouts.CALL, "cpu", 0)
    assert [group.bucket[:3] for group in arrange(near, x, x)] == [((1,), 3, 3), ((0, 2), 4, 4)]
    with execution("padded"):
        assert len(arrange(near, x, x)) == 1
    with execution("separate"):
        assert [group.bucket for group in arrange(near, x, x)] == list(near.buckets)
    with pytest.raises(OptionError, match="one of auto"), execution("fast"):  # type: ignore[arg-type]
        pass


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_products_are_for_few_threads_on_a_cpu_at_inference(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would lose by them, or could not write in place, keeps its kernels."""
    layout = HeadLayout(qk=(4, 2, 4), vo=(3, 3, 4))
    x, other = torch.zeros(1, 8, 10), torch.zeros(1, 8, 10, requires_grad=True)
    assert products.pays(layout, x, x, x)
    assert products.pays(layout, x.double(), x, x)
    assert not products.pays(layout, x.to("meta"), x, x), "another device"
    assert not products.pays(layout, x.bfloat16(), x, x)
    assert not products.pays(layout, nn.Parameter(x, requires_grad=False), x, x), "what may override functions"
    for one in ((other, x, x), (x, other, x), (x, x, other)):
        assert not products.pays(layout, *one), "training"
        with torch.no_grad():
            assert products.pays(layout, *one)
    with torch.autocast("cpu"):
        assert not products.pays(layout, x, x, x)
    seen: list[bool] = []
    torch.vmap(lambda y: seen.append(products._in_place(y, y, y)) or y)(x)
    torch.jit.trace(lambda y: seen.append(products.pays(layout, y, y, y)) or y, x, check_trace=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert [*seen, products.pays(layout, x, x, x), products._in_place(x, x, x)] == [False] * 4
    monkeypatch.undo()
    for threads, fine in ((products.THREADS, True), (products.THREADS + 1, False)):
        torch.set_num_threads(threads)
        assert products.pays(layout, x, x, x) == fine


@pytest.mark.parametrize(("tokens", "heads", "batch"), [(64, 4, 16), (128, 16, 1), (32, 16, 16)])
def test_equal_dims_take_products_up_to_a_number_of_scores(tokens: int, heads: int, batch: int) -> None:
    assert batch * heads * tokens * tokens == products.EQUAL
    layout = HeadLayout(qk=(2,) * heads, vo=(2,) * heads)
    for more, fine in ((0, True), (1, False)):
        x = torch.zeros(batch, tokens + more, 2 * heads)
        assert products.pays(layout, x, x, x) == fine
    assert products.pays(HeadLayout(qk=(2,) * heads, vo=(1,) * heads), x, x, x), "unequal dims always do"
    x = torch.zeros(1, 2000, 4)
    assert products.pays(HeadLayout(qk=(1, 3), vo=(1, 3)), x, x, x), "and ragged heads"


def test_half_precision_is_worked_out_in_float32() -> None:
    layout, plain = HeadLayout(qk=(4, 2), vo=(3, 3)), Plain(0.3, None, False, lambda rows, _: rows)
    q, k, v = (torch.randn(2, 9, 6).bfloat16() for _ in range(3))
    expected = products.products(q.float(), k.float(), v.float(), layout, plain).bfloat16()
    assert torch.equal(products.products(q, k, v, layout, plain), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(products.products(q, k, v, layout, plain), expected)


def test_what_is_large_is_never_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "WHOLE", 24)
    monkeypatch.setattr(products, "_whole", None)  # not called
    layout, plain = HeadLayout(qk=(4, 2), vo=(3, 3)), Plain(0.3, None, False, lambda rows, _: rows)
    assert products.products(*torch.randn(3, 1, 5, 6), layout, plain).shape == (1, 5, 6)


def test_places_found_in_inference_mode_serve_training() -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, _: object) -> tuple[Tensor, None]:
        return F.scaled_dot_product_attention(q, k, v), None

    layout = HeadLayout(qk=(5, 2), vo=(3, 4))  # dims that no other test has, so that nothing is kept of them
    with torch.inference_mode():
        attend(*torch.randn(3, 1, 4, 7), layout, kernel)
    x = torch.randn(1, 4, 7, requires_grad=True)
    attend(x, x, x, layout, kernel)[0].sum().backward()
    assert x.grad is not None
    found = attend_module._places(((0, 1, 5), (5, 1, 2)), 5, 7, torch.device("meta"))
    assert [one.device.type for one in found] == ["meta", "meta"]


def test_pieces_are_no_larger_than_what_is_worked_on() -> None:
    assert products.cut(8, 512, 512, False) == (8, 512), "all heads"
    assert products.cut(12, 1214, 1214, False) == (6, 405), "some heads, a run of their queries"
    assert products.cut(12, 4096, 4096, False) == (2, 512)
    assert products.cut(1, 3, products.PIECE + 1, False) == (1, 1), "one query"
    assert products.cut(12, 1024, 1024, True)[1] == products.CAUSAL
    assert products._run(1214, 1214, products.OWN, False) == 607
    assert products._run(1024, 512, products.OWN, True) == products.CAUSAL
    for heads, queries, keys in ((8, 512, 512), (12, 1214, 1214), (12, 4096, 4096)):
        together, run = products.cut(heads, queries, keys, False)
        assert together * run * keys <= products.PIECE


def on(device: str, dtype: torch.dtype, batch: int, tokens: int) -> Any:
    """What :func:`arrange` reads of queries and keys, on a device that need not be there."""
    return SimpleNamespace(shape=(batch, tokens, 1), device=torch.device(device), dtype=dtype)


@pytest.mark.parametrize(("dtype", "multiple"), [(torch.bfloat16, 8), (torch.float16, 8), (torch.float32, 4)], ids=str)
def test_what_runs_on_cuda(dtype: torch.dtype, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dims and rows that the kernels take; a call for all heads where launches rule, more where heads are busy."""
    decoupled, odd = HeadLayout(qk=(16,) * 12, vo=(48,) * 12), HeadLayout(qk=(35,) * 12, vo=(21,) * 12)
    ragged = HeadLayout(qk=(6, 6, 6, 60, 60, 60), vo=(8, 8, 8, 64, 64, 64))
    few, many = on("cuda", dtype, 1, 1214), on("cuda", dtype, 32, 1214)
    for layout, width in ((decoupled, 48), (odd, 40 if multiple == 8 else 36)):
        for x in (few, many):
            assert [group.bucket[:3] for group in arrange(layout, x, x)] == [(tuple(range(12)), width, width)]
    for x in (few, many):
        assert [group.bucket[:3] for group in arrange(ragged, x, x)] == [(tuple(range(6)), 64, 64)], "one tile"
    tiles = HeadLayout(qk=(6, 6, 6, 72, 72, 72), vo=(8, 8, 8, 64, 64, 64))
    apart = [((0, 1, 2), 8, 8), ((3, 4, 5), 72, 72)]
    assert [group.bucket[:3] for group in arrange(tiles, many, many)] == apart
    assert len(arrange(tiles, few, few)) == 1
    short = on("cuda", dtype, 32, 8)
    assert len(arrange(tiles, many, short)) == len(arrange(tiles, short, many)) == 1, "queries and keys both count"
    unknown = on("mps", dtype, 32, 1214)
    assert [group.bucket[:3] for group in arrange(odd, unknown, unknown)] == [(tuple(range(12)), 35, 35)]
    assert [group.bucket[:3] for group in arrange(ragged, unknown, unknown)] == [
        ((0, 1, 2), 8, 8),
        ((3, 4, 5), 64, 64),
    ], "not known"
    cpu = on("cpu", dtype, 1, 146)
    assert len(arrange(ragged, cpu, cpu)) == 2, "calls cost less there"
    monkeypatch.setattr(layouts, "takes_unequal", lambda dtype: True)
    assert [group.bucket[:3] for group in arrange(decoupled, few, few)] == [(tuple(range(12)), 16, 48)], "as they are"
    wide = (40, 24) if multiple == 8 else (36, 24)
    assert [group.bucket[1:3] for group in arrange(odd, many, many)] == [wide]
    wide = HeadLayout((64 if multiple == 8 else 60,) * 6, (64,) * 6)
    grown = HeadLayout((8, 8, 8, 72, 72, 72), tiles.vo)
    for layout, x, found in ((ragged, few, wide), (ragged, many, wide), (tiles, many, grown), (ragged, cpu, None)):
        assert layouts.widened(layout, x) == found
    assert layouts.widened(decoupled, few) is None, "heads are alike"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert len(arrange(tiles, few, few)) == 1
    assert len(arrange(tiles, many, many)) == (2 if layouts.KNOWN else 1), "sizes are known"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padded_weights_are_for_the_dtype_that_products_are_in(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under autocast that is not the dtype of what comes in."""
    monkeypatch.setitem(layouts.ALIGNED, "cpu", 16)
    layout, x, width = HeadLayout(qk=(3, 4), vo=(3, 4)), torch.zeros(1, 4, 7), 16 // dtype.itemsize
    with execution("padded"), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        assert layouts.widened(layout, x) == HeadLayout((width, width), (width, width))


def test_weights_come_in_logical_order_however_heads_are_arranged(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = HeadLayout(qk=(4, 2, 3, 4), vo=(3, 3, 2, 3))
    assert list(layout.order) == [0, 3, 1, 2], "not its own inverse"
    q, k, v = torch.randn(2, 5, 13), torch.randn(2, 5, 13), torch.randn(2, 5, 11)

    def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, _: object) -> tuple[torch.Tensor, torch.Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights

    found = []
    for few in (0, 1 << 60):
        monkeypatch.setattr(attend_module, "FEW", few)
        found.append(attend(q, k, v, layout, kernel))
    torch.testing.assert_close(found[0], found[1])
    own = [(q[..., slice(*layout.span("q", h))] @ k[..., slice(*layout.span("k", h))].mT).softmax(-1) for h in range(4)]
    torch.testing.assert_close(found[1][1], torch.stack(own, dim=1))
