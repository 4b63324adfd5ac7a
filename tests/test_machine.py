"""Public calls in any order, on small models of several families, with what the dense model gives beside them."""

from __future__ import annotations

import copy
import os
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
    apply_to_checkpoint,
    calibrate,
    find_attention,
    freeze,
    load_pruned,
    make_plan,
    masked,
    pack_qkv,
    prune_attention,
    prune_channels,
    prune_heads,
    save_pruned,
    score_attention,
    thaw,
    unpack_qkv,
)
from attnprune.errors import AllocationError, AttnPruneError, FrozenError, OptionError

from .conformance import close, family, fresh, inputs, without_fast_path, zero
from .selection import ALL

NAMES = ("MHA", "Encoder", "ViT", "Bert", "Decoder", "Timm", "Latent", "Transformer")
STEPS = int(os.environ.get("ATTNPRUNE_STEPS", 2000 if ALL else 80))
PLAIN: dict[str, Any] = {"basis": "channels", "compensate": False, "progress": False}
SHARES = st.sampled_from([0.1, 0.25, 0.4])
NOTHING_TO_GO = AllocationError, OptionError
"""Too little is left, or heads that differ already would have to stay alike."""
thawed = precondition(lambda self: not self.frozen)


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
        self.frozen = False

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

    @thawed
    @rule(
        share=SHARES, granularity=st.sampled_from(["channel", "head"]), scope=st.sampled_from(["local", "global"]),
        heads=st.sampled_from(["uniform", "ragged"]), kind=st.sampled_from(["qk", "vo", "both", *"qkvo"]),
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

    @thawed
    @rule(share=SHARES, heads=st.sampled_from(["uniform", "ragged"]))
    def rotate(self, share: float, heads: Any) -> None:
        try:
            plan = make_plan(
                self.model, share, data=[self.plain], loss_fn=self.loss, heads=heads, scope="local", progress=False
            )
        except NOTHING_TO_GO:
            return
        self.applied(plan)

    @thawed
    @rule(
        share=SHARES, by=st.sampled_from(["ratio", "target_params"]),
        kind=st.sampled_from(["SGD", "AdamW", "RMSprop"]),
    )  # fmt: skip
    def prune_and_follow(self, share: float, by: str, kind: str) -> None:
        """With an optimizer that has state, an average, and inputs to verify by."""
        optimizer = getattr(torch.optim, kind)(self.model.parameters(), 0.0)
        self.loss(self.model, self.plain).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        average = copy.deepcopy(self.model)
        given: dict[str, Any] = {"data": [self.plain], "loss_fn": self.loss, "progress": False, "scorer": "taylor"}
        amount: dict[str, Any] = {"qkvo_ratios": share} if by == "ratio" else {by: 1 - share / 8}
        try:
            plan = make_plan(self.model, scope="local" if by == "ratio" else "global", **amount, **given)
        except NOTHING_TO_GO:
            return
        expected = self.shown(plan)
        apply_plan(self.model, plan, optimizer=optimizer, averages=[average], example_inputs=self.plain)
        self.expected = expected
        close(self.run(average), expected, 1e-8, "average")
        parameters = {id(p): p for p in self.model.parameters()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == parameters.keys()
        for parameter, state in optimizer.state.items():
            assert id(parameter) in parameters
            assert all(one.shape == parameter.shape for one in state.values() if isinstance(one, Tensor) and one.dim())

    @thawed
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

    @thawed
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

    @thawed
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
            self.model, self.frozen = model, False

    # going elsewhere and back

    @rule(device=st.sampled_from([None, "meta"]))
    def save_and_load(self, device: str | None) -> None:
        folder = save_pruned(self.model, self.folder)
        other = copy.deepcopy(self.dense)
        if device and not any(True for _ in other.buffers()):
            other = other.to(device)
        self.model, self.frozen = load_pruned(folder, other), False
        self.model.eval()

    @rule(how=st.sampled_from([copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]))
    def copy(self, how: Callable[[Any], Any]) -> None:
        self.model = how(self.model)

    @thawed
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

    @thawed
    @rule(train=st.booleans())
    def mode(self, train: bool) -> None:
        self.model.train(train)
        assert all(module.training is train for module in self.model.modules())
        close(self.run(self.model), self.expected, 1e-8, "training mode")
        self.model.eval()

    @thawed
    @rule()
    def pack(self) -> None:
        pack_qkv(self.model)

    @thawed
    @rule()
    def unpack(self) -> None:
        unpack_qkv(self.model)

    @thawed
    @rule()
    def freeze(self) -> None:
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        self.frozen = bool(freeze(self.model))
        assert all(torch.equal(value, before[key]) for key, value in self.model.state_dict().items())

    @rule()
    def thaw(self) -> None:
        assert bool(thaw(self.model)) is self.frozen
        self.frozen = False

    @precondition(lambda self: self.frozen)
    @rule()
    def refuse_what_changes_weights(self) -> None:
        for call in (
            lambda: prune_attention(self.model, 0.25),
            lambda: self.model.load_state_dict(self.model.state_dict()),
            lambda: pack_qkv(self.model),
        ):
            with pytest.raises(FrozenError):
                call()

    @rule()
    def look(self) -> None:
        """Calls that only look."""
        before = {key: value.clone() for key, value in self.model.state_dict().items()}
        given: dict[str, Any] = {"data": [self.plain], "loss_fn": self.loss, "progress": False}
        if not self.frozen:
            calibrate(self.model, **given)
            score_attention(self.model, "fisher", **given)
        assert [spec.layout for spec in find_attention(self.model)] == [
            spec.layout for spec in find_attention(copy.deepcopy(self.model))
        ]
        assert all(torch.equal(value, before[key]) for key, value in self.model.state_dict().items())

    @precondition(lambda self: self.plan is not None and not self.frozen)
    @rule(share=SHARES)
    def prune_files(self, share: float) -> None:
        """The plan of all steps, applied to files of the dense model."""
        assert self.plan is not None
        with tempfile.TemporaryDirectory() as folder:
            source = save_pruned(self.dense, f"{folder}/dense")
            target = apply_to_checkpoint(source, self.plan, f"{folder}/pruned", model=copy.deepcopy(self.dense))
            self.model = load_pruned(target, copy.deepcopy(self.dense))

    # modes

    @rule()
    def infer(self) -> None:
        with torch.inference_mode():
            close(family(self.name).run(self.model, self.plain), self.run(self.model), 1e-9, "inference mode")

    @thawed
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
        """Gradients of inputs are the dense oracle's, and weights have some."""
        leaves = [x for x in self.given.values() if isinstance(x, Tensor) and x.requires_grad]
        models = [self.model]
        if self.plan is not None:
            models.append(copy.deepcopy(self.dense))
            zero(self.name, models[1], self.plan)
        found = []
        for model in models:
            weights = [p for p in model.parameters() if p.requires_grad]
            found.append(torch.autograd.grad(self.loss(model, self.given), [*leaves, *weights], allow_unused=True))
            assert any(one is not None for one in found[-1][len(leaves) :])
        for mine, theirs in zip(found[0][: len(leaves)], found[-1], strict=False):
            assert (mine is None) is (theirs is None)
            if mine is not None and theirs is not None:
                close(mine, theirs, 1e-8, "gradient of an input")

    @thawed
    @rule()
    def call_functionally(self) -> None:
        state = {key: value.clone() for key, value in self.model.state_dict().items()}

        class Called:
            def __init__(self, model: nn.Module) -> None:
                self.model = model

            def __call__(self, **inputs: Any) -> Any:
                return torch.func.functional_call(self.model, state, (), inputs)

        with torch.no_grad(), without_fast_path():
            close(family(self.name).run(Called(self.model), self.plain), self.expected, 1e-8, "functional call")  # type: ignore[arg-type]

    @rule()
    def go_without_data(self) -> None:
        """On the meta device."""
        dense, other = (copy.deepcopy(model).to("meta") for model in (self.dense, self.model))
        given = {key: x.to("meta") if isinstance(x, Tensor) else x for key, x in self.plain.items()}
        with torch.no_grad(), without_fast_path():
            try:
                family(self.name).run(dense, given)
            except RuntimeError:  # hosts that look at masks
                return
            assert family(self.name).run(other, given).shape == self.expected.shape

    @precondition(lambda self: ALL)
    @rule(export=st.sampled_from([False] * 9 + [True]))  # which takes seconds
    def trace_and_export(self, export: bool) -> None:
        class Called(nn.Module):
            def __init__(self, machine: Calls) -> None:
                super().__init__()
                self.inner, self.machine = copy.deepcopy(machine.model), machine

            def forward(self, *values: Tensor) -> Tensor:
                given = {**self.machine.plain, **dict(zip(self.machine.tensors, values, strict=True))}
                return family(self.machine.name).run(self.inner, given)

        values = tuple(self.plain[key] for key in self.tensors)
        with torch.no_grad(), without_fast_path():
            if export:
                exported = torch.export.export(Called(self).eval(), values, strict=False).module()
                close(exported(*values), self.expected, 1e-8, "exported")
            traced = torch.jit.trace(Called(self).eval(), values, check_trace=False)
            close(traced(*values), self.expected, 1e-8, "traced")

    @property
    def tensors(self) -> list[str]:
        return [key for key, value in self.plain.items() if isinstance(value, Tensor)]

    @thawed
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
TestCalls.settings = settings(max_examples=STEPS // 20, stateful_step_count=20, deadline=None)
