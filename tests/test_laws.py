"""Laws 2 to 7, for every family."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnprune
from attnprune import AttentionSpec, Plan, Surgeon, apply_plan, find_attention, make_plan, masked
from attnprune.families.registry import all_views
from attnprune.values.layer_plan import make_layer
from attnprune.values.layout import KINDS, PROJECTIONS

from .conformance import check_exact, close, family, forward_backward, fresh, inputs, random_plan
from .families import FAMILIES
from .selection import ALL, examples
from .test_exact import MODES, ratios, reachable, seeds

every_family = pytest.mark.parametrize("name", FAMILIES)


def plans(model: nn.Module, seed: int, ratio: float, mode: tuple[str, str, str]) -> Plan:
    granularity, scope, heads = mode
    ratio = reachable(model, ratio) if granularity == "head" else ratio
    return random_plan(model, seed, qkvo_ratios=ratio, granularity=granularity, scope=scope, heads=heads)


def for_cases(name: str, number: int) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Runs a check over random cases of a family."""

    def wrap(check: Callable[..., None]) -> Callable[[], None]:
        case = st.integers(0, len(family(name).cases()) - 1)
        strategy = given(seed=seeds, ratio=ratios, mode=st.sampled_from(MODES), case=case)
        return settings(max_examples=examples(number))(strategy(check))

    return wrap


def snapshot(model: nn.Module) -> list[Any]:
    """Everything there is about a model: classes, attributes, parameters by identity and by bits."""
    found: list[Any] = []
    for module in model.modules():
        plain = {k: v for k, v in module.__dict__.items() if not isinstance(v, (dict, Tensor))}
        parameters = {k: (id(p), None if p is None else p.detach().clone()) for k, p in module._parameters.items()}
        found.append((module, type(module), plain, parameters, list(module._modules.items())))
    return found


def same(before: list[Any], after: list[Any]) -> bool:
    """Whether two snapshots are bitwise equal."""
    if len(before) != len(after):
        return False
    for (m1, c1, a1, p1, s1), (m2, c2, a2, p2, s2) in zip(before, after, strict=True):
        if m1 is not m2 or c1 is not c2 or a1 != a2 or s1 != s2 or p1.keys() != p2.keys():
            return False
        for key, (identity, bits) in p1.items():
            other, other_bits = p2[key]
            if identity != other or (bits is not None and not torch.equal(bits, other_bits)):
                return False
    return True


@every_family
def test_shapes(name: str) -> None:
    """Law 2."""

    @for_cases(name, 16)
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        model = fresh(name, case)
        plan = plans(model, seed, ratio, mode)
        before = sum(p.numel() for p in model.parameters())
        report = apply_plan(model, plan)
        assert before - sum(p.numel() for p in model.parameters()) == report.removed_parameters
        a, b = report.attention_parameters
        assert a - b == report.removed_parameters
        assert tuple((s.qk_dims, s.vo_dims) for s in find_attention(model)) == tuple(
            (s.qk_dims, s.vo_dims) for s in plan.after
        )
        for view in all_views(model):
            layer = plan[view.name]
            if layer.empty:
                continue
            after = layer.after
            key_of = [key for key, count in enumerate(after.groups) for _ in range(count)]
            q, o = (sum(dims[key] for key in key_of) for dims in (after.qk_dims, after.vo_dims))
            k, v = sum(after.qk_dims), sum(after.vo_dims)
            shapes = {"q": (q, view.spec.q_in), "k": (k, view.spec.k_in), "v": (v, view.spec.v_in)}
            shapes["o"] = (view.spec.d_model, o)
            linears: Any = {view.owner(p): p for p in PROJECTIONS}
            for linear, p in linears.items():
                rows = shapes[p][0]
                if view.joint and p != "o":  # of several projections, in one
                    rows = sum(s.size for key, s in view.slots.items() if s.owner is linear and "weight" in key)
                    assert all(view.weight(p).shape == shapes[p] for p in PROJECTIONS[:3])
                assert linear.weight.shape == (rows, shapes[p][1])
                assert (linear.out_features, linear.in_features) == (rows, shapes[p][1])
                for tensor in (linear.weight, linear.bias):
                    if tensor is not None:
                        assert tensor.is_contiguous()
                        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()

    check()


@every_family
def test_nothing_else_moves(name: str) -> None:
    """Law 3."""

    @for_cases(name, 15)
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        model = fresh(name, case, torch.float32)
        plan = plans(model, seed, ratio, mode)
        forward_backward(name, model, inputs(name, case, seed, torch.float32))
        calls: list[str] = []
        for i, module in enumerate(model.modules()):
            module.training = i % 2 == 0
            module.register_forward_hook(lambda *_: calls.append("hook"))
        for i, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(i % 3 != 0)
        hooks = {module: dict(module._forward_hooks) for module in model.modules()}
        modes = {module: module.training for module in model.modules()}
        attention = {id(slot.parameter) for view in all_views(model) for slot in view.slots.values()}
        others = {k: (p, p.detach().clone()) for k, p in model.named_parameters() if id(p) not in attention}
        flags = {
            (v.name, key): (s.parameter.requires_grad, s.cut(s.parameter.detach()), s.cut(s.parameter.grad))
            for v in all_views(model)
            for key, s in v.slots.items()
            if s.parameter.grad is not None
        }
        dense = {view.name: view for view in all_views(model)}
        state = torch.get_rng_state()
        apply_plan(model, plan)
        assert torch.equal(torch.get_rng_state(), state)
        for module, kept in hooks.items():
            assert dict(module._forward_hooks) == kept
            assert module.training == modes[module]
        after = dict(model.named_parameters())
        for key, (parameter, bits) in others.items():
            assert after[key] is parameter
            assert torch.equal(parameter, bits)
        for view in all_views(model):
            layer = plan[view.name]
            for key, slot in view.slots.items():
                if (view.name, key) not in flags:
                    continue
                asks, weights, grads = flags[view.name, key]
                side = view.side(key)
                starts = [start for start, _ in dense[view.name].spec.layout.spans(side)]
                rows = [starts[head] + c for head, channels in layer.stays(side) for c in channels]
                order = [i for span in view.spans(side) for i in range(*span)]
                assert slot.parameter.requires_grad == asks
                assert torch.equal(slot.cut(slot.parameter.detach())[order], weights[rows])
                assert torch.equal(slot.cut(slot.parameter.grad)[order], grads[rows])

    check()


OURS = str(Path(attnprune.__file__).parent)


class Fault(Exception):
    """What the tests throw into a commit."""


def commit_with_fault(surgeon: Surgeon, at: int) -> bool:
    """Commits, with a fault at the n-th line that runs (in torch or here); says whether it came to that."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        where = frame.f_code.co_filename  # the environment may lie below a folder of any name
        if (not where.startswith(OURS) and "torch/nn/modules" not in where) or frame.f_code.co_name == "restore":
            return None  # not in the interpreter's own callbacks, nor in what puts things back
        if event == "line":
            count += 1
            if count == at:
                raise Fault
        return trace

    sys.settrace(trace)
    try:
        surgeon.commit()
    except Fault:
        return True
    finally:
        sys.settrace(None)
    return False


@pytest.mark.covering(1)
@pytest.mark.parametrize("mapped", [False, True], ids=["cut", "mapped"])
@every_family
def test_all_or_nothing(name: str, mapped: bool) -> None:
    """Law 4."""
    model = fresh(name, 0)
    views = list(all_views(model))
    plan = plans(model, 1, 0.5, ("channel", "global", "ragged"))
    if mapped:
        data = [{k: v.detach() if isinstance(v, Tensor) else v for k, v in inputs(name, 0).items()}]
        plan = make_plan(model, 0.5, data=data, heads="ragged", progress=False)
    before = snapshot(model)
    at, step = 1, 7 if ALL else 37
    while commit_with_fault(Surgeon.prepare(model, views, plan), at):
        assert same(before, snapshot(model)), f"fault at line {at}"
        at += step
    assert at > 10 * step, "too few lines to be a test"
    assert not same(before, snapshot(model))


@every_family
def test_prepare_changes_nothing(name: str) -> None:
    model = fresh(name, 0)
    before = snapshot(model)
    Surgeon.prepare(model, list(all_views(model)), plans(model, 1, 0.5, ("joint", "global", "ragged")))
    assert same(before, snapshot(model))


@every_family
def test_plans(name: str) -> None:
    """Law 5."""

    @for_cases(name, 10)
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        model = fresh(name, case)
        first = plans(model, seed, ratio / 2, mode)
        assert Plan.from_json(first.to_json()) == first
        once = copy.deepcopy(model)
        apply_plan(once, first)
        heads = "ragged" if any(spec.ragged for spec in find_attention(once)) else mode[2]
        second = plans(once, seed + 1, 0.25, ("channel", mode[1], heads))
        apply_plan(once, second)
        both = first.then(second)
        assert Plan.from_json(both.to_json()) == both
        apply_plan(model, both)
        found, expected = once.state_dict(), model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        assert [type(m) for m in once.modules()] == [type(m) for m in model.modules()]

    check()


@every_family
def test_empty_plan_changes_no_bit(name: str) -> None:
    for case in range(len(family(name).cases())):
        model = fresh(name, case)
        before = snapshot(model)
        report = apply_plan(model, make_plan(model, 0.0))
        assert report.plan.empty
        assert same(before, snapshot(model))


@every_family
def test_deterministic(name: str) -> None:
    """Law 6: equal inputs, equal bytes; the number of threads does not matter."""
    for mode in MODES:
        texts = set()
        for threads in (1, 2):
            torch.set_num_threads(threads)
            granularity, scope, heads = mode
            plan = make_plan(fresh(name, 0), 0.5, granularity=granularity, scope=scope, heads=heads)
            texts.add(plan.to_json())
        assert len(texts) == 1


@every_family
def test_order(name: str) -> None:
    """Law 7: permuting heads and channels of the model permutes the plan and nothing else."""

    @settings(max_examples=examples(10))
    @given(seed=seeds, mode=st.sampled_from(MODES))
    def check(seed: int, mode: tuple[str, str, str]) -> None:
        granularity, scope, heads = mode
        model = fresh(name, 0)
        plan = make_plan(model, 0.5, granularity=granularity, scope=scope, heads=heads)
        generator = torch.Generator().manual_seed(seed)
        orders = {}
        for view in all_views(model):
            orders[view.name] = permute(name, model, view.name, view.spec, generator)
        permuted = make_plan(model, 0.5, granularity=granularity, scope=scope, heads=heads)
        for layer, other in zip(plan, permuted, strict=True):
            head_order, channel_order = orders[layer.spec.name]
            share = layer.spec.heads // layer.spec.kv_heads
            assert {head_order[h // share] * share + h % share for h in other.heads} == set(layer.heads)
            for kind in ("qk", "vo"):
                for new, channels in enumerate(other.removed(kind)):
                    old = head_order[new]
                    order = channel_order[kind][new]
                    assert {order[c] for c in channels} == set(layer.removed(kind)[old])

    check()


def permute(name: str, model: nn.Module, layer: str, spec: AttentionSpec, generator: torch.Generator) -> Any:
    """Shuffles key heads, and qk and vo channels inside each; returns which old one stands where. Channels that are
    rotated have places of their own."""
    heads, share = spec.kv_heads, spec.heads // spec.kv_heads
    head_order = torch.randperm(heads, generator=generator).tolist()
    channels = {
        kind: [torch.randperm(spec.dims(kind)[0], generator=generator).tolist() for _ in range(heads)] for kind in KINDS
    }
    if spec.rotary != "none":
        channels["qk"] = [list(range(spec.qk_dim))] * heads
    with torch.no_grad():
        for p, (weight, bias) in family(name).dense(model, layer).items():
            own = channels["qk" if p in "qk" else "vo"]
            dim = len(own[0])
            of = 1 if p in "kv" else share
            index = [
                (old * of + i) * dim + c for new, old in enumerate(head_order) for i in range(of) for c in own[new]
            ]
            if p == "o":
                weight.copy_(weight[:, index].clone())
            else:
                weight.copy_(weight[index].clone())
                if bias is not None:
                    bias.copy_(bias[index].clone())
    return head_order, channels


@every_family
def test_masked(name: str) -> None:
    """A masked model gives what the pruned one gives, and is bitwise as before afterwards."""

    @for_cases(name, 10)
    def check(seed: int, ratio: float, mode: tuple[str, str, str], case: int) -> None:
        model = fresh(name, case)
        plan, data = plans(model, seed, ratio, mode), inputs(name, case, seed)
        before = snapshot(model)
        with masked(model, plan):
            expected, _ = forward_backward(name, model, data)
        assert same(before, snapshot(model))
        apply_plan(model, plan)
        found, _ = forward_backward(name, model, data)
        close(found, expected, 1e-10, "output")

    check()


@every_family
def test_copies_and_files(name: str) -> None:
    """A pruned model can be copied, pickled and loaded by its state dict."""
    model, data = fresh(name, 0), inputs(name, 0)
    apply_plan(model, plans(model, 3, 0.5, ("joint", "global", "ragged")))
    expected, _ = forward_backward(name, model, data)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(model.state_dict())
        found, _ = forward_backward(name, other, data)
        assert torch.equal(found, expected)


@every_family
def test_any_plan(name: str) -> None:
    """Law 1 for plans that no allocation would make."""

    @settings(max_examples=examples(24))
    @given(st.data())
    def check(data: st.DataObject) -> None:
        case = data.draw(st.integers(0, len(family(name).cases()) - 1))
        model = fresh(name, case)
        layers = []
        for layer in make_plan(model, 0.0):
            spec = layer.spec
            heads = data.draw(st.sets(st.integers(0, spec.heads - 1), max_size=spec.heads - 1))
            removed = {}
            for kind in KINDS:
                units = [spec.units(kind, key) for key in range(spec.kv_heads)]
                some = [data.draw(st.sets(st.sampled_from(own), max_size=len(own) - 1)) for own in units]
                removed[kind] = tuple(tuple(channel for unit in own for channel in unit) for own in some)
            layers.append(make_layer(spec, heads, removed))
        check_exact(name, model, inputs(name, case), Plan(tuple(layers)), 1e-10)

    check()
