"""Frozen models: the same function in fewer calls, and back again bitwise."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile

import attnprune
from attnprune import errors, freeze, thaw
from attnprune.nn import frozen as room
from attnprune.nn.policy import Layouts, layouts_of
from attnprune.values.layout import HeadLayout

from .conformance import close, family, fresh, inputs, random_plan, without_fast_path
from .families import FAMILIES
from .selection import examples

running = import_module("attnprune.nn.attend")  # the name in the room is the function's
PLANS: dict[str, tuple[Any, dict[str, Any]]] = {
    "dense": (0.0, {}),
    "uniform": (0.5, {"scope": "local"}),
    "decoupled": ({"qk": 0.5, "vo": 0.25}, {"scope": "local"}),
    "ragged": (0.5, {"heads": "ragged"}),
    "heads": (0.5, {"granularity": "head"}),
}


def encoder(plan: str = "ragged") -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    ratios, options = PLANS[plan]
    attnprune.prune_attention(model, ratios, scorer="random", **options)
    return model


def state_of(model: nn.Module) -> list[Any]:
    """All that thawing has to bring back: classes, attributes, parameters and their values, storage of each."""
    return [
        (name, type(module), sorted(module.__dict__),
         [(key, id(p), p._version, p.untyped_storage().nbytes(), p.detach().clone().numpy().tobytes())
          for key, p in module._parameters.items() if p is not None])
        for name, module in model.named_modules()
    ]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_the_same(name: str) -> None:
    """As pruned, with the layouts that a CPU takes and with padded ones, as on a GPU."""

    @settings(max_examples=examples(3))
    @given(
        seed=st.integers(0, 10_000), case=st.integers(0, len(family(name).cases()) - 1),
        plan=st.sampled_from(list(PLANS)), like_a_gpu=st.booleans(),
    )  # fmt: skip
    def check(seed: int, case: int, plan: str, like_a_gpu: bool) -> None:
        ratios, options = PLANS[plan]
        model, given = fresh(name, case), inputs(name, case, seed)
        attnprune.apply_plan(model, random_plan(model, seed, qkvo_ratios=ratios, **options))
        before = state_of(model)
        with torch.no_grad(), without_fast_path(), pytest.MonkeyPatch.context() as patch:
            expected = family(name).run(model, given)
            if like_a_gpu:
                patch.setattr(room, "layouts_of", aligned)
            names = freeze(model)
            close(family(name).run(model, given), expected, 1e-10, "frozen")
            held = model.state_dict()
            assert names == thaw(model)
            close(family(name).run(model, given), expected, 0.0, "thawed")
        assert state_of(model) == before
        assert all(torch.equal(value, held[key]) for key, value in model.state_dict().items())

    check()


def calls(run: Callable[[], Any]) -> Counter[str]:
    """Operations that Python calls and that compute or move something, by name."""
    with torch.no_grad():
        run()  # what is made once
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            run()
    looks = {"view", "transpose", "t", "split_with_sizes", "split", "unsqueeze", "select", "slice", "expand", "mT",
             "empty", "new_empty"}  # fmt: skip
    found: Counter[str] = Counter()
    for one in seen.events():
        name = one.name.removeprefix("aten::")
        moves = any(child.name in ("aten::copy_", "aten::clone") for child in one.cpu_children)
        if one.cpu_parent is None and name != one.name and name not in looks:
            found[name] += name not in ("reshape", "flatten", "contiguous") or moves
    return found


def aligned(layout: HeadLayout, kind: str, dtype: torch.dtype, width: int) -> Layouts:
    """The layouts of a GPU."""
    return layouts_of(layout, "cuda", torch.float16, width)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("plan", ["uniform", "decoupled", "ragged"])
def test_a_frozen_layer_calls_no_more_than_the_dense_one(plan: str, gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU's layouts and by its kernel; on a CPU three products and a copy stand for one fused call."""
    config = transformers.ASTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=6, intermediate_size=32,
                                    max_length=24, num_mel_bins=24)  # fmt: skip
    dense, x, (ratios, options) = transformers.ASTModel(config).eval(), torch.randn(1, 24, 24), PLANS[plan]
    pruned = copy.deepcopy(dense)
    attnprune.apply_plan(pruned, random_plan(pruned, 0, qkvo_ratios=ratios, **options))
    if gpu:
        monkeypatch.setattr(room, "layouts_of", aligned)
        monkeypatch.setattr(room, "at_once_runs", lambda _: False)
        monkeypatch.setattr(running, "pays", lambda *_: False)
    before = calls(lambda: pruned(x))
    freeze(pruned)
    frozen, whole = calls(lambda: pruned(x)), calls(lambda: dense(x))
    assert whole["linear"] - frozen["linear"] == 2
    assert frozen["scaled_dot_product_attention"] == gpu
    assert frozen.total() <= (whole.total() - 2 if gpu and plan != "ragged" else whole.total() + 1)
    assert plan == "uniform" or frozen.total() < before.total()


def test_few_tokens_run_all_heads_at_once_and_many_at_their_own_dims(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder()
    found = []
    project = room.Frozen.project

    def spy(*args: Any) -> Any:
        found.append(project(*args))
        return found[-1]

    monkeypatch.setattr(room.Frozen, "project", spy)
    few, many = torch.randn(1, 8, 32), torch.randn(1, 500, 32)
    with torch.no_grad():
        expected = [model(few), model(many)]
        freeze(model)
        for x, y in zip((few, many), expected, strict=True):
            torch.testing.assert_close(model(x), y)
    assert [one.layout.uniform for one in found] == [True, True, False, False]


def test_copies_pickles_moves_and_files_are_frozen_or_as_they_were(tmp_path: Any) -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        twin = copy.deepcopy(model)
        freeze(model)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            attention = other.layers[0].self_attn
            assert attention.attnprune_frozen is not None
            torch.testing.assert_close(other(x), expected)
            with torch.no_grad():
                attention.q_proj.weight.mul_(1.5)  # nobody else's
            torch.testing.assert_close(model(x), expected)
            with pytest.raises(errors.FrozenError, match="thaw"):
                other(x)
            thaw(other)
            assert (other(x) - expected).abs().max() > 1e-4
        moved = copy.deepcopy(model).double()
        assert moved.layers[0].self_attn.attnprune_frozen.own.weight.dtype == torch.float64
        torch.testing.assert_close(moved(x.double()).float(), expected)
        held = moved.layers[0].self_attn.attnprune_frozen.own.weight
        assert held.data_ptr() == moved.layers[0].self_attn.q_proj.weight.data_ptr()  # one copy, not two

        attnprune.save_pruned(model, tmp_path)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
        dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        loaded = attnprune.load_pruned(tmp_path, dense)
        torch.testing.assert_close(loaded(x), expected)
        assert {key: value.shape for key, value in model.state_dict().items()} == {
            key: value.shape for key, value in twin.state_dict().items()
        }
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(twin(x), expected)


def test_what_would_change_weights_says_to_thaw() -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    plan = attnprune.make_plan(model, 0.25, scorer="random", heads="ragged")
    state = model.state_dict()
    freeze(model)
    before = state_of(model)
    wanted: list[Callable[[], Any]] = [
        lambda: attnprune.prune_attention(model, 0.5),
        lambda: attnprune.make_plan(model, 0.5),
        lambda: attnprune.apply_plan(model, plan),
        lambda: attnprune.masked(model, plan).__enter__(),
        lambda: attnprune.prune_heads(model, {0: [0]}),
        lambda: attnprune.AttentionPruner(model, 0.5).step(),
        lambda: attnprune.pack_qkv(model),
        lambda: model.load_state_dict(state),
        lambda: model.train()(x),
    ]
    for act in wanted:
        with pytest.raises(errors.FrozenError, match=r"attnprune\.thaw\(model\)"):
            act()
        model.eval()
        assert state_of(model) == before, act
    attention = model.layers[0].self_attn
    attention.q_proj = copy.deepcopy(attention.q_proj)
    with torch.no_grad(), pytest.raises(errors.FrozenError, match="thaw"):
        model(x)
    assert thaw(model) == ("layers.0.self_attn", "layers.1.self_attn")  # whatever was exchanged meanwhile
    model(x)


def test_gradients_hooks_autocast_and_forced_layouts_are_served_by_the_projections() -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    twin = copy.deepcopy(model)
    freeze(model)
    for one in (twin, model):
        one(x).square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    seen = []
    handle = model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        torch.testing.assert_close(model(x), twin(x))
        handle.remove()
        assert seen == [1]
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(x), twin(x))
        with attnprune.nn.execution("padded"):
            assert torch.equal(model(x), twin(x))


def test_compiled_exported_and_traced() -> None:
    model, x = encoder().layers[0], torch.randn(2, 5, 32)
    with torch.no_grad():
        expected = model(x)
        freeze(model)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            torch.testing.assert_close(torch.jit.trace(model, x)(x), expected)


def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for plan in ("uniform", "ragged"):
        model, made = encoder(plan), []
        before = state_of(model)
        make = room.Frozen.make

        def second(self: Any, module: nn.Module, made: list[Any] = made, make: Any = make) -> None:
            made.append(module)
            if len(made) == 2:
                raise KeyboardInterrupt
            make(self, module)

        with monkeypatch.context() as patch:
            patch.setattr(room.Frozen, "make", second)
            with pytest.raises(KeyboardInterrupt):
                freeze(model)
        assert len(made) == 2
        assert state_of(model) == before
    model.layers[1].self_attn.q_proj = nn.utils.parametrizations.weight_norm(model.layers[1].self_attn.q_proj)
    with pytest.raises(errors.ParametrizedError):
        freeze(model)
    assert model.layers[0].self_attn.attnprune_frozen is None


def test_twice_packed_or_in_inference_mode_is_the_same() -> None:
    model, x = encoder(), torch.randn(2, 5, 32)
    attnprune.pack_qkv(model)
    with torch.inference_mode():
        expected = model(x)
        assert freeze(model) == freeze(model) == ("layers.0.self_attn", "layers.1.self_attn")
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(errors.FrozenError):
            attnprune.unpack_qkv(model)
        thaw(model)
        assert thaw(model) == ()
    assert attnprune.unpack_qkv(model) == ("layers.0.self_attn", "layers.1.self_attn")  # as it was
    assert not any(p.is_inference() for p in model.parameters())


def test_layouts_for_a_gpu_are_aligned_and_for_a_cpu_alike() -> None:
    ragged, even = HeadLayout((3, 17, 70), (5, 9, 66)), HeadLayout((8, 8), (16, 16))
    cuda = layouts_of(ragged, "cuda", torch.float16, 64)
    assert set(cuda.few.qk) == {72}
    assert all(dim % 8 == 0 for dim in cuda.many.qk + cuda.many.vo)
    assert len(cuda.many.buckets) == 2  # heads of one tile, and of two
    cpu = layouts_of(ragged, "cpu", torch.float32, 64)
    assert (cpu.few.qk, cpu.few.vo, cpu.many) == ((70,) * 3, (66,) * 3, ragged)
    assert layouts_of(even, "cpu", torch.float32, 64).few == even
