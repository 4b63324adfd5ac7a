"""Public calls in any order, on small models of several families, with what the dense model gives beside them."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attnprune import (
    AttentionPruner,
    Plan,
    apply_plan,
    find_attention,
    load_pruned,
    make_plan,
    masked,
    pack_qkv,
    prune_attention,
    prune_channels,
    prune_heads,
    save_pruned,
    unpack_qkv,
)
from attnprune.errors import AllocationError, AttnPruneError, OptionError

from .conformance import close, family, fresh, inputs, without_fast_path, zero
from .selection import ALL

NAMES = ("MHA", "Encoder", "ViT", "Bert", "Decoder", "Timm")
PLAIN: dict[str, Any] = {"basis": "channels", "compensate": False, "progress": False}
SHARES = st.sampled_from([0.1, 0.25, 0.4])
NOTHING_TO_GO = AllocationError, OptionError
"""Too little is left, or heads that differ already would have to stay alike."""


class Calls(RuleBasedStateMachine):
    """A model, the plan of all that went so far, and the output that it has to give."""

    name = ""
    model: Any
    dense: nn.Module
    plan: Plan | None
    """None once heads were rotated: then the model itself, masked, says what is right."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(name=st.sampled_from(NAMES), case=st.integers(0, 20))
    def begin(self, name: str, case: int) -> None:
        self.name, self.case = name, case % len(family(name).cases())
        self.dense, self.model = fresh(name, self.case), fresh(name, self.case)
        self.given = inputs(name, self.case)
        self.plain = {key: x.detach() if isinstance(x, Tensor) else x for key, x in self.given.items()}
        self.plan = make_plan(self.model, 0.0, **PLAIN)
        self.expected = self.run(self.dense)
        self.packed = False

    # what is right

    def run(self, model: nn.Module) -> Tensor:
        with torch.no_grad(), without_fast_path():
            return family(self.name).run(model, self.plain).clone()

    def loss(self, model: Any, batch: Any) -> Tensor:
        return family(self.name).run(model, batch).square().mean()

    def shown(self, plan: Plan) -> Tensor:
        """The output after a plan for the model as it is now."""
        self.plan = None if self.plan is None or any(layer.fold for layer in plan) else self.plan.then(plan)
        if self.plan is not None:
            oracle = copy.deepcopy(self.dense)
            zero(self.name, oracle, self.plan)
            return self.run(oracle)
        other = copy.deepcopy(self.model)
        with masked(other, plan):
            return self.run(other)

    @invariant()
    def right(self) -> None:
        if self.name:
            close(self.run(self.model), self.expected, 1e-8, f"{self.name} {self.case}")
            assert not self.model._forward_pre_hooks

    def applied(self, plan: Plan, **options: Any) -> None:
        expected = self.shown(plan)
        report = apply_plan(self.model, plan, **options)
        self.expected = expected
        assert [layer.after.qk_dims for layer in report.layers] == [layer.after.qk_dims for layer in plan]

    # pruning

    @rule(
        share=SHARES, granularity=st.sampled_from(["channel", "head"]), scope=st.sampled_from(["local", "global"]),
        heads=st.sampled_from(["uniform", "ragged"]), kind=st.sampled_from(["qk", "vo", "both"]),
        seed=st.integers(0, 9),
    )  # fmt: skip
    def prune(self, share: float, granularity: Any, scope: Any, heads: Any, kind: str, seed: int) -> None:
        ratios: Any = share if kind == "both" or granularity == "head" else {kind: share}
        heads = "uniform" if granularity == "head" else heads
        try:
            plan = make_plan(
                self.model,
                ratios,
                granularity=granularity,
                scope=scope,
                heads=heads,
                scorer="random",
                seed=seed,
                **PLAIN,
            )
        except NOTHING_TO_GO:  # too little is left
            return
        if seed % 2:
            plan = Plan.from_json(plan.to_json())
        self.applied(plan)

    @rule(share=SHARES, heads=st.sampled_from(["uniform", "ragged"]))
    def rotate(self, share: float, heads: Any) -> None:
        try:
            plan = make_plan(
                self.model, share, data=[self.plain], loss_fn=self.loss, heads=heads, scope="local", progress=False
            )
        except NOTHING_TO_GO:
            return
        self.applied(plan)

    @rule(data=st.data())
    def prune_by_hand(self, data: Any) -> None:
        specs = find_attention(self.model)
        spec = data.draw(st.sampled_from(specs))
        if data.draw(st.booleans()) and len(spec.head_units) > 1:
            gone = data.draw(st.sampled_from(spec.head_units))
            plan = prune_heads(copy.deepcopy(self.model), {spec.name: gone}).plan
            expected = self.shown(plan)
            prune_heads(self.model, {spec.name: gone})
        else:
            kind = data.draw(st.sampled_from(["qk", "vo"]))
            key = data.draw(st.integers(0, spec.kv_heads - 1))
            units = spec.units(kind, key)
            if len(units) < 2:
                return
            rows: list[tuple[int, ...]] = [()] * spec.kv_heads
            rows[key] = tuple(units[data.draw(st.integers(0, len(units) - 1))])
            plan = prune_channels(copy.deepcopy(self.model), {spec.name: {kind: rows}}).plan
            expected = self.shown(plan)
            prune_channels(self.model, {spec.name: {kind: rows}})
        self.expected = expected

    @rule(share=SHARES, steps=st.integers(1, 2))
    def step(self, share: float, steps: int) -> None:
        """With an optimizer that leaves weights as they are."""
        optimizer = torch.optim.SGD(self.model.parameters(), 0.0, momentum=0.9)
        try:
            pruner = AttentionPruner(self.model, share, steps=steps, scope="local", scorer="fisher")
            for _ in range(steps):
                optimizer.zero_grad()
                self.loss(self.model, self.plain).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                pruner.observe()
                expected = self.shown(pruner.next_plan())
                pruner.step(optimizer)
                self.expected = expected
        except NOTHING_TO_GO:
            pass
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in self.model.parameters()}

    @rule(share=SHARES)
    def mask(self, share: float) -> None:
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        try:
            plan = make_plan(self.model, share, scorer="random", **PLAIN)
        except NOTHING_TO_GO:
            return
        with masked(self.model, plan):
            inside = self.run(self.model)
        assert all(torch.equal(value, before[key]) for key, value in self.model.state_dict().items())
        other = copy.deepcopy(self.model)
        apply_plan(other, plan)
        close(self.run(other), inside, 1e-8, "masked")

    @precondition(lambda self: self.plan is not None)
    @rule()
    def all_at_once(self) -> None:
        """The plan of all steps, applied to a dense model."""
        assert self.plan is not None
        model = copy.deepcopy(self.dense)
        if not self.plan.empty:
            apply_plan(model, self.plan)
            self.model, self.packed = model, False

    # going elsewhere and back

    @rule(device=st.sampled_from([None, "meta"]))
    def save_and_load(self, device: str | None) -> None:
        folder = save_pruned(self.model, self.folder)
        other = copy.deepcopy(self.dense)
        if device and not any(True for _ in other.buffers()):
            other = other.to(device)
        self.model, self.packed = load_pruned(folder, other), False
        self.model.eval()

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how: Callable[[Any], Any]) -> None:
        self.model = how(self.model)

    @rule()
    def state(self) -> None:
        state = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.model.load_state_dict(state)

    @rule()
    def move(self) -> None:
        other = copy.deepcopy(self.model).to(torch.float32)
        given = {
            key: x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in self.plain.items()
        }
        with torch.no_grad(), without_fast_path():
            close(family(self.name).run(other, given).double(), self.expected, 1e-2, "float32")
        self.model.to("cpu", torch.float64)
        self.packed = False

    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.model.train(train)
        assert all(module.training is train for module in self.model.modules())
        close(self.run(self.model), self.expected, 1e-8, "training mode")
        self.model.eval()

    @rule()
    def pack(self) -> None:
        pack_qkv(self.model)
        self.packed = True

    @rule()
    def unpack(self) -> None:
        unpack_qkv(self.model)
        self.packed = False

    # modes

    @rule()
    def infer(self) -> None:
        with torch.inference_mode():
            close(family(self.name).run(self.model, self.plain), self.run(self.model), 1e-9, "inference mode")

    @rule(share=SHARES)
    def prune_in_inference_mode(self, share: float) -> None:
        try:
            plan = make_plan(self.model, share, scorer="random", **PLAIN)
        except NOTHING_TO_GO:
            return
        expected = self.shown(plan)
        with torch.inference_mode():
            apply_plan(self.model, plan)
        self.expected = expected
        assert not any(p.is_inference() for p in self.model.parameters())

    @rule()
    def fake(self) -> None:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad(), without_fast_path():
            given = {key: mode.from_tensor(x) if isinstance(x, Tensor) else x for key, x in self.plain.items()}
            found = family(self.name).run(self.model, given)
        assert found.shape == self.expected.shape

    @rule()
    def differentiate(self) -> None:
        self.model.zero_grad()
        self.loss(self.model, self.given).backward()  # type: ignore[no-untyped-call]
        assert any(p.grad is not None for p in self.model.parameters())
        self.model.zero_grad()

    @precondition(lambda self: ALL)
    @rule()
    def trace(self) -> None:
        class Called(nn.Module):
            def __init__(self, machine: Calls) -> None:
                super().__init__()
                self.inner, self.machine = copy.deepcopy(machine.model), machine

            def forward(self, *values: Tensor) -> Tensor:
                given = {**self.machine.plain, **dict(zip(self.machine.tensors, values, strict=True))}
                return family(self.machine.name).run(self.inner, given)

        values = tuple(self.plain[key] for key in self.tensors)
        with torch.no_grad(), without_fast_path():
            traced = torch.jit.trace(Called(self).eval(), values, check_trace=False)
            close(traced(*values), self.expected, 1e-8, "traced")

    @property
    def tensors(self) -> list[str]:
        return [key for key, value in self.plain.items() if isinstance(value, Tensor)]

    @rule()
    def refuse(self) -> None:
        """What fails changes nothing."""
        for call in (
            lambda: prune_attention(self.model, 0.5, data=[], progress=False),
            lambda: prune_heads(self.model, {0: [99]}),
            lambda: prune_attention(self.model, 1.5),
        ):
            with pytest.raises(AttnPruneError):
                call()


TestCalls = Calls.TestCase
TestCalls.settings = settings(max_examples=100 if ALL else 3, stateful_step_count=20, deadline=None)
