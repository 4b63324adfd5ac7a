"""The laws of attnprune as a function, for anybody's module: :func:`check_family`."""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .api import apply_plan, find_attention, make_plan
from .calibration.quiet import restored
from .errors import AllocationError, NotExpressibleError, PlanMismatchError
from .families.base import AttentionView
from .families.registry import all_views, plain, skipped_attention
from .nn.kept import ordinary
from .nn.outputs import outputs_of
from .nn.unfused import Unfused
from .surgery import Surgeon
from .values.layer_plan import LayerPlan
from .values.layout import KINDS, Projection
from .values.plan import Plan

MODES = tuple(itertools.product(("channel", "head", "joint"), ("local", "global"), ("uniform", "ragged")))
"""Granularity, scope and heads of the plans that are tried."""
_OURS = str(Path(__file__).parent)


class Checked(NamedTuple):
    """What :func:`check_family` saw."""

    attention: tuple[str, ...]
    """The attention modules, by name."""
    plans: int
    """How many plans were applied."""
    ways: tuple[str, ...]
    """How pruned modules ran: ``"stock"``, ``"decoupled"``, ``"expanded"``."""
    error: float
    """The largest difference from the dense model with rows and columns at zero, as a share of its output."""


def check_family(
    module: nn.Module,
    example: Any,
    *,
    plans: int = 12,
    seed: int = 0,
    tolerance: float | None = None,
) -> Checked:
    """Checks that attnprune prunes a module as its laws say; the module itself is left alone.

    Copies are pruned by random plans of all kinds.

    1. Output and gradients equal those of the dense module with removed rows of Q, K, V and columns of O at zero, in
       evaluation and in training.
    2. Shapes and counts are what plan and report say.
    3. Nothing else moves: modes, flags, other parameters, random state.
    4. A fault in the middle leaves everything as it was.
    5. Plans survive JSON, compose, do nothing when empty, and fit no other module.
    6. Equal requests give equal plans.
    7. The order of heads does not matter to what goes.
    8. Nothing that looks like attention is passed over.

    Args:
        module: any module with attention, with weights that are not all alike.
        example: what it is called with: a tensor, a tuple of positional arguments, or a mapping of keywords.
        plans: how many plans to try.
        seed: for their scores.
        tolerance: by which share of the output a pruned module may differ; None: what rounding in its dtype allows.

    Raises:
        AssertionError: a law is broken; the message says which, with which plan.
        NoAttentionError: nothing in the module can be pruned, or something that looks like attention cannot.

    >>> checked = check_family(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), torch.randn(2, 5, 16), plans=4)
    >>> checked.attention, checked.ways
    (('self_attn',), ('decoupled',))
    """
    module = copy.deepcopy(plain(module)).eval()
    skipped = skipped_attention(module, lambda: _called(module, example))
    assert not skipped, f"law 8: passed over: {skipped}"
    names = tuple(spec.name for spec in find_attention(module))
    dtype = next(p.dtype for p in module.parameters() if p.is_floating_point())
    if tolerance is None:
        tolerance = 1e-10 if dtype == torch.float64 else 100 * torch.finfo(dtype).eps
    ways: set[str] = set()
    error, done = 0.0, 0
    for number in range(plans):
        granularity, scope, heads = MODES[(number + seed) % len(MODES)]
        ratio: Any = (0.5, 0.25, {"qk": 0.5}, {"vo": 0.5}, 0.7)[number % 5]
        ratio = 0.5 if granularity == "head" else ratio
        options: dict[str, Any] = {"granularity": granularity, "scope": scope, "heads": heads}
        options |= {"scorer": "random", "seed": seed + number}
        for share, used in _tried(module, example, ratio, tolerance, options):
            error, ways, done = max(error, share), ways | used, done + 1
    assert done, "no plan could be made"
    _composed(module, seed)
    _all_or_nothing(module, seed)
    _order(module)
    return Checked(names, done, tuple(sorted(ways)), error)


@ordinary
def _tried(
    module: nn.Module, example: Any, ratio: Any, tolerance: float, options: Mapping[str, Any]
) -> list[tuple[float, set[str]]]:
    """Laws 1 to 3 and 6, and what JSON keeps, in evaluation and in training; nothing where there is no such plan."""
    try:
        plan = make_plan(module, ratio, **options)
    except (AllocationError, NotExpressibleError):  # too few heads, or heads that cannot go
        return []
    again = make_plan(module, ratio, **options)
    assert again.to_json() == plan.to_json(), f"law 6: two plans for {options}"
    assert Plan.from_json(plan.to_json()) == plan, f"law 5: JSON changes the plan for {options}"
    return [_exact(module, example, plan, tolerance, training) for training in (False, True)]


def _called(module: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return module(**example)
    return module(*example) if isinstance(example, (tuple, list)) else module(example)


def _leaves(example: Any) -> tuple[Any, list[Tensor]]:
    """The example with real numbers that ask for gradients, and these."""
    found: list[Tensor] = []

    def one(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone().requires_grad_()
            found.append(value)
        return value

    if isinstance(example, Mapping):
        return {key: one(value) for key, value in example.items()}, found
    if isinstance(example, (tuple, list)):
        return tuple(one(value) for value in example), found
    return one(example), found


def _run(module: nn.Module, example: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and gradients of a fixed projection of the first with respect to the inputs."""
    given, leaves = _leaves(example)
    with Unfused():
        outputs = [one.tensor for one in outputs_of(_called(module, given))]
    first = outputs[0]
    direction = torch.randn(first.shape, generator=torch.Generator("cpu").manual_seed(7)).to(first)
    grads = torch.autograd.grad((first * direction).sum(), leaves, allow_unused=True) if leaves else ()
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
    return [one.detach() for one in outputs], found


def zeroed(module: nn.Module, plan: Plan) -> nn.Module:
    """A copy of a dense module with what a plan removes at zero, by index arithmetic of its own."""
    oracle = copy.deepcopy(module)
    with torch.no_grad():
        for view in all_views(oracle):
            layer = plan[view.name]
            for key, slot in view.slots.items():
                rows = _gone(layer, view.side(key), view)
                channels = slot.cut(slot.parameter.detach()).clone()
                channels[rows] = 0
                slot.write(channels)
    return oracle


def _gone(layer: LayerPlan, side: Projection, view: AttentionView) -> list[int]:
    rows: list[int] = []
    key_of = [key for key, count in enumerate(layer.spec.groups) for _ in range(count)]
    for head, (start, stop) in enumerate(view.spec.layout.spans(side)):
        if side in "kv":
            key, gone = head, all(one in layer.heads for one, other in enumerate(key_of) if other == head)
        else:
            key, gone = key_of[head], head in layer.heads
        removed = () if side == "x" else (layer.qk if side in "qk" else layer.vo)[key]
        rows += range(start, stop) if gone else [start + channel for channel in removed]
    return rows


def _exact(module: nn.Module, example: Any, plan: Plan, tolerance: float, training: bool) -> tuple[float, set[str]]:
    """Laws 1, 2 and 3 for one plan."""
    oracle, pruned = zeroed(module, plan), copy.deepcopy(module)
    for one in (oracle, pruned):
        one.train(training)
        for part in one.modules():
            if isinstance(part, nn.Dropout) or (training and hasattr(part, "dropout")):
                part.eval()  # other shapes draw other masks
    held = {name: (id(p), p.requires_grad) for name, p in pruned.named_parameters()}
    owned = {id(p) for view in all_views(pruned) for s in view.slots.values() for p in [s.parameter]}
    modes, random = {name: part.training for name, part in pruned.named_modules()}, torch.get_rng_state()
    before = sum(p.numel() for p in pruned.parameters())
    report = apply_plan(pruned, plan)
    assert before - sum(p.numel() for p in pruned.parameters()) == report.removed_parameters, "law 2: counts"
    for spec, expected in zip(find_attention(pruned), plan.after, strict=True):
        assert spec.layout == expected.layout, f"law 2: {spec.name}"
    assert torch.equal(random, torch.get_rng_state()), "law 3: random state"
    now = {name: part.training for name, part in pruned.named_modules() if name in modes}
    assert all(modes[name] == mode for name, mode in now.items()), "law 3: modes"
    for name, parameter in pruned.named_parameters():
        if name in held and held[name][0] not in owned:
            assert held[name] == (id(parameter), parameter.requires_grad), f"law 3: {name}"
    with restored(oracle), restored(pruned):
        (expected_out, expected_grads), (found_out, found_grads) = (_run(one, example) for one in (oracle, pruned))
    pairs = [*zip(found_out, expected_out, strict=True)]
    outputs = [one for i, one in enumerate(pairs) if not i or one[0].shape == one[1].shape]  # weights: of heads left
    shares = [_share(*one) for one in (*outputs, *zip(found_grads, expected_grads, strict=True))]
    assert max(shares) <= tolerance, f"law 1: off by {max(shares):.2g} with {plan!r}, training={training}"
    return max(shares), {way.split(":")[0] for way in report.ways.values()}


def _share(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape, f"law 1: shape {tuple(found.shape)}, not {tuple(expected.shape)}"
    size = expected.abs().max().item() if expected.numel() else 0.0
    return (found - expected).abs().max().item() / max(size, 1.0) if expected.numel() else 0.0


@ordinary
def _composed(module: nn.Module, seed: int) -> None:
    """Law 5."""
    first = make_plan(module, 0.25, heads="ragged", scorer="random", seed=seed)
    once, both = copy.deepcopy(module), copy.deepcopy(module)
    state = {name: p.detach().clone() for name, p in once.named_parameters()}
    apply_plan(once, make_plan(once, 0.0))
    assert all(torch.equal(p, state[name]) for name, p in once.named_parameters()), "law 5: an empty plan changes"
    apply_plan(once, first)
    second = make_plan(once, 0.25, heads="ragged", scorer="random", seed=seed + 1)
    apply_plan(once, second)
    apply_plan(both, first.then(second))
    found, expected = once.state_dict(), both.state_dict()
    assert found.keys() == expected.keys(), "law 5: two plans and their sum give other parameters"
    assert all(torch.equal(found[key], expected[key]) for key in found), "law 5: two plans are not their sum"
    if not first.empty:
        try:
            apply_plan(copy.deepcopy(once), first)
        except PlanMismatchError:
            return
        raise AssertionError("law 5: a plan was applied to a module that it was not made for")


def _snapshot(module: nn.Module) -> list[Any]:
    return [
        (type(part), sorted(map(str, part.__dict__)), [(k, id(p)) for k, p in part._parameters.items()])
        for part in module.modules()
    ]


@ordinary
def _all_or_nothing(module: nn.Module, seed: int) -> None:
    """Law 4: a fault at lines all over the commit."""
    model = copy.deepcopy(module)
    plan = make_plan(model, 0.5, heads="ragged", scorer="random", seed=seed)
    before, views = _snapshot(model), all_views(model)
    for at in itertools.count(3, 29):
        surgeon = Surgeon.prepare(model, views, plan)
        with _fault(at) as came, suppress(_Fault):
            surgeon.commit()
        if not came:
            return
        assert _snapshot(model) == before, f"law 4: a fault at line {at} left something behind"


class _Fault(Exception):
    """What is thrown into a commit."""


@contextmanager
def _fault(at: int) -> Iterator[list[bool]]:
    """Raises at the n-th line of attnprune that a commit runs; the list says whether it came to that."""
    came: list[bool] = []
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(_OURS) or frame.f_code.co_name in ("restore", "undo", "_fault"):
            return None  # not in what puts things back
        if event == "line":
            count += 1
            if count == at:
                came.append(True)
                raise _Fault
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield came
    finally:
        sys.settrace(before)


@ordinary
def _order(module: nn.Module) -> None:
    """Law 7: with heads of a layer in the opposite order, the same heads go."""
    plan = make_plan(module, 0.5, scope="local", granularity="channel", scorer="magnitude")
    reordered = copy.deepcopy(module)
    with torch.no_grad():
        for view in all_views(reordered):
            for key, slot in view.slots.items():
                spans = view.spans(view.side(key))
                rows = [row for span in reversed(spans) for row in range(*span)]
                slot.write(slot.cut(slot.parameter.detach())[rows])
    other = make_plan(reordered, 0.5, scope="local", granularity="channel", scorer="magnitude")
    for mine, theirs in zip(plan, other, strict=True):
        for kind in KINDS:
            assert mine.removed(kind) == tuple(reversed(theirs.removed(kind))), f"law 7: {mine.spec.name}"


__all__ = ["Checked", "check_family", "zeroed"]
