"""Pruning in a loop of accelerate: accumulated gradients, checkpoints, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from attnprune import AttentionPruner
from attnprune.errors import CheckpointError, OptionError, ShardedError
from attnprune.integrations.accelerate import FILE, AcceleratedPruner


def build() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def batch(number: int) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(number))


class Run:
    """A training run; two batches make an optimizer step, two of those a pruning step."""

    def __init__(self, **options: Any) -> None:
        model = build()
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, **options)
        self.average = AveragedModel(model)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        self.pruner = AttentionPruner(model, 0.5, steps=3, heads="ragged")
        self.model, self.optimizer, self.schedule = self.accelerator.prepare(model, optimizer, schedule)
        self.pruning = AcceleratedPruner(
            self.accelerator, self.pruner, self.model, self.optimizer, averages=[self.average]
        )
        self.accelerator.register_for_checkpointing(self.average)

    def train(self, start: int, stop: int) -> None:
        for number in range(start, stop):
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(batch(number)).square().mean())
                self.pruning.observe()
                self.accelerator.clip_grad_norm_(self.model.parameters(), 0.1)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            if number % 2:
                self.average.update_parameters(self.model)
            if number % 4 == 3 and not self.pruning.done:
                self.pruning.step()

    def state(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        moments = {f"{i} {key}": value for i, one in state["state"].items() for key, value in one.items()}
        rates = {"rate": torch.tensor(state["param_groups"][0]["lr"])}
        average = {f"average {key}": value for key, value in self.average.state_dict().items()}
        return copy.deepcopy({**self.model.state_dict(), **moments, **average, **rates})


def same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(value, two[key]) for key, value in one.items())


@pytest.fixture(autouse=True)
def fresh_state() -> Any:
    """An example of the documentation may have made an Accelerator before."""
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # as accelerate's own tests do
    GradientState._reset_state()


@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.long) for at in (6, 10)), 14])
def test_resuming_ends_bitwise_where_the_uninterrupted_run_does(tmp_path: Path, at: int) -> None:
    whole = Run()
    whole.train(0, at)
    whole.accelerator.save_state(str(tmp_path))
    there = whole.state()
    whole.train(at, 16)
    assert whole.pruning.done
    again = Run()
    again.accelerator.load_state(str(tmp_path))
    assert same(again.state(), there)
    again.train(at, 16)
    assert again.pruner.plan == whole.pruner.plan
    assert same(again.state(), whole.state())
    assert again.pruning.report.achieved["q"] == 0.5


def test_what_is_observed_is_the_gradient_of_all_accumulated_batches_unclipped() -> None:
    run = Run()
    run.train(0, 2)
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=3, heads="ragged")
    (sum(model(batch(number)).square().mean() for number in range(2)) / 2).backward()
    pruner.observe()
    mine, theirs = (one.state_dict() for one in (pruner, run.pruner))
    assert mine["observations"] == theirs["observations"] == 1
    for name, parts in mine["seen"].items():
        assert all(torch.allclose(a, b, rtol=1e-4) for a, b in zip(parts, theirs["seen"][name], strict=True))


def test_half_precision_is_scaled_back() -> None:
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=1)
    loss = model(batch(0)).square().mean()
    loss.backward()
    pruner.observe()
    expected = pruner.state_dict()["seen"]
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = SimpleNamespace(get_scale=lambda: 1024.0)
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=1)
    pruning = AcceleratedPruner(accelerator, pruner, model, torch.optim.SGD(model.parameters(), 0.1))
    (model(batch(0)).square().mean() * 1024).backward()
    pruning.observe()
    for name, parts in pruner.state_dict()["seen"].items():
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(parts, expected[name], strict=True))


def test_autocast_to_bfloat16() -> None:
    run = Run(mixed_precision="bf16")
    run.train(0, 12)
    assert run.pruning.done
    assert all(p.dtype == torch.float32 and bool(p.isfinite().all()) for p in run.model.parameters())
    assert run.model.layers[0].self_attn.q_proj.weight.shape[0] < 16


def test_what_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    run = Run()
    with pytest.raises(OptionError, match="prepared"):
        AcceleratedPruner(run.accelerator, run.pruner, build(), run.optimizer)
    with pytest.raises(OptionError, match="Accelerator"):
        AcceleratedPruner(run.model, run.pruner, run.model, run.optimizer)
    with pytest.raises(OptionError, match="AttentionPruner"):
        AcceleratedPruner(run.accelerator, run.model, run.model, run.optimizer)  # type: ignore[arg-type]
    before = run.state()
    with pytest.raises(CheckpointError, match=FILE):
        run.accelerator.load_state(str(tmp_path))
    assert same(before, run.state())
    monkeypatch.setattr(run.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ShardedError, match="next_plan"):
        AcceleratedPruner(run.accelerator, run.pruner, run.model, run.optimizer)
