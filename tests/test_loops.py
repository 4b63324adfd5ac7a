"""What real training loops do: loss scales, autocast, clipping, gradient checkpointing, compilation, sudden ends."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attnprune import AttentionPruner, prune_attention


def build(checkpointed: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True) for _ in range(2)]
    return Checkpointed(layers) if checkpointed else nn.Sequential(*layers)


class Checkpointed(nn.Sequential):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__(*layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def batch(number: int) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(number))


def loss_of(model: Any, number: int) -> Tensor:
    loss: Tensor = (model(batch(number)) - batch(1000 + number)).square().mean()
    return loss


class Run:
    """Four optimizer steps between steps of the pruner."""

    def __init__(self, **options: Any) -> None:
        self.model = build(options.pop("checkpointed", False))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1e-2)
        self.pruner = AttentionPruner(self.model, 0.5, steps=3, heads="ragged", **options)
        self.number = 0

    def train(self, stop: int, clip: float = 0.0, autocast: bool = False) -> Run:
        while self.number < stop:
            self.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(self.model, self.number)
            loss.backward()
            if not self.pruner.done:
                self.pruner.observe()
            if clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), clip)
            self.optimizer.step()
            self.number += 1
            if not self.number % 4 and not self.pruner.done:
                self.pruner.step(self.optimizer)
        return self

    def save(self, file: Path) -> None:
        parts = {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}
        torch.save({**{name: part.state_dict() for name, part in parts.items()}, "number": self.number}, f"{file}.new")
        os.replace(f"{file}.new", file)

    def load(self, file: Path) -> Run:
        state = torch.load(file, weights_only=True)
        self.pruner.load_state_dict(state["pruner"], optimizer=self.optimizer)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.number = state["number"]
        return self

    def everything(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()["state"]
        moments = {f"{i} {key}": value for i, one in state.items() for key, value in one.items()}
        return {**self.model.state_dict(), **moments}


def same(one: Run, two: Run) -> bool:
    a, b = one.everything(), two.everything()
    return one.pruner.plan == two.pruner.plan and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_gradient_checkpointing_changes_nothing() -> None:
    assert same(Run(checkpointed=True).train(14), Run().train(14))


def test_what_is_observed_before_clipping_is_not_clipped() -> None:
    seen = [Run().train(1, clip=clip).pruner.state_dict()["seen"] for clip in (0.0, 1e-3)]
    for name, parts in seen[0].items():
        assert all(torch.equal(a, b) for a, b in zip(parts, seen[1][name], strict=True))
    run = Run().train(14, clip=0.01)
    assert run.pruner.done
    assert run.pruner.report.achieved["q"] == 0.5


def test_autocast_to_bfloat16() -> None:
    run, exact = Run().train(3, autocast=True), Run().train(3)
    for name, parts in run.pruner.state_dict()["seen"].items():
        for mine, theirs in zip(parts, exact.pruner.state_dict()["seen"][name], strict=True):
            assert mine.dtype == torch.float64
            assert float((mine - theirs).norm() / theirs.norm()) < 0.1
    run.train(14, autocast=True)
    assert run.pruner.done
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in run.model.parameters())


def test_gradients_in_bfloat16_are_summed_exactly() -> None:
    model = build().to(torch.bfloat16)
    pruner = AttentionPruner(model, 0.5, steps=1)
    (model(batch(0).bfloat16()).float() - batch(1)).square().mean().backward()
    pruner.observe()
    rows = model[0].self_attn.in_proj_weight.grad.double().square().sum(1)  # type: ignore[union-attr, operator, index]
    qk = pruner.state_dict()["seen"]["0.self_attn"][0]
    assert torch.allclose(qk, rows[:16] + rows[16:32] + 2 * 16 * 1e-6, rtol=1e-6, atol=0)


def test_a_grad_scaler_on_the_way_through_float16() -> None:
    """torch's own scaler; its scale is too large at first, so that the first steps overflow and are left out."""
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    pruner, plain = (AttentionPruner(model, 0.5, steps=1, heads="ragged") for _ in range(2))
    weights: list[Any] = [p for name, p in model.named_parameters() if "attn" in name and "weight" in name]
    overflowed = 0
    for number in range(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loss_of(model, number % 4)
        scaler.scale(loss).backward()
        finite = all(bool(p.grad.isfinite().all()) for p in weights)
        pruner.observe(scaler=scaler)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        scaler.step(optimizer)
        scaler.update()
        overflowed += not finite
        if finite:
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(model, number % 4)
            loss.backward()
            plain.observe()
    assert 0 < overflowed < 19
    mine, theirs = pruner.state_dict(), plain.state_dict()
    assert mine["observations"] == theirs["observations"] == 20 - overflowed
    for name, parts in mine["seen"].items():
        for a, b in zip(parts, theirs["seen"][name], strict=True):
            assert float((a - b).norm() / b.norm()) < 0.05
    pruner.step(optimizer)
    assert pruner.report.achieved["q"] == 0.5


@pytest.mark.long
def test_a_compiled_model_trains_on_after_every_step() -> None:
    """The graphs of the old shapes are not used again, and no graph breaks."""
    run, eager = Run(), Run()
    compiled = torch.compile(run.model, backend="eager", fullgraph=True)
    for number in range(9):
        for model, one in ((compiled, run), (eager.model, eager)):
            one.optimizer.zero_grad()
            loss_of(model, number).backward()
            if not one.pruner.done:
                one.pruner.observe()
            one.optimizer.step()
            if number % 4 == 3 and not one.pruner.done:
                one.pruner.step(one.optimizer)
        outputs = [model(batch(99)).detach() for model in (compiled, eager.model)]
        assert torch.allclose(*outputs, rtol=0, atol=1e-5)
    assert run.pruner.plan.layers == eager.pruner.plan.layers
    assert run.pruner.steps_done == 2


@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.long), {"heads": "ragged", "split": "auto"}])
@pytest.mark.long
def test_what_was_compiled_before_is_not_run_after(options: Any) -> None:
    model = build().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = compiled(batch(0)).detach()
    prune_attention(compiled, 0.5, **options)
    after = compiled(batch(0)).detach()
    assert torch.allclose(after, model(batch(0)).detach(), rtol=0, atol=1e-6)
    assert not torch.allclose(after, before, rtol=0, atol=1e-3)


@pytest.mark.long
def test_a_run_that_is_killed_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = Run().train(14)
    file = tmp_path / "run.pt"
    rng = random.Random(0)
    ends, kills = set(), 0
    began = time.perf_counter()
    Run().train(14)
    one_step = (time.perf_counter() - began) / 14
    while kills < 12:
        done, told = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                run = Run().load(file) if file.exists() else Run()
                while run.number < 14:
                    run.train(run.number + 1)
                    run.save(file)
                    os.write(told, b".")
            finally:
                os._exit(0)
        os.close(told)
        for _ in range(rng.randint(0, 4)):  # it gets on, however busy the machine is
            os.read(done, 1)
        time.sleep(rng.uniform(0, 2 * one_step))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(done)
        kills += 1
        if file.exists():
            run = Run().load(file)
            ends.add(run.number)
            assert same(run.train(14), whole)
            if ends and max(ends) == 14:
                file.unlink()
    assert len(ends) > 1
