"""Two processes: the same plan in both, gradients averaged, DistributedDataParallel wrapped anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from attnprune import AttentionPruner, rewrap
from attnprune.errors import PlanMismatchError, WrappedModelError


def build() -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def batch(number: int) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found: dict[str, Any] = {}
    model: Any = DistributedDataParallel(build(), gradient_as_bucket_view=True)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = AttentionPruner(model, 0.5, steps=2, heads="ragged")
    for step in range(4):
        optimizer.zero_grad()
        model(batch(2 * step + rank)).square().mean().backward()
        pruner.observe()
        optimizer.step()
        if step % 2:
            pruner.step(optimizer)
            model = rewrap(model)
            assert model.gradient_as_bucket_view
    optimizer.zero_grad()
    model(batch(50 + rank)).square().mean().backward()
    found["grad"] = [p.grad.clone() for p in model.parameters()]
    found["model"], found["plan"] = model.module.state_dict(), pruner.plan.to_json()

    plain = build()  # not wrapped: every process has gradients of its own
    pruner = AttentionPruner(plain, 0.5, steps=1)
    plain(batch(100 + rank)).square().mean().backward()
    pruner.observe()
    pruner.step()
    found["own"] = pruner.plan.to_json()

    other = build()
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with torch.no_grad():
        pruner = AttentionPruner(other, 0.5, steps=1, scorer="random", seed=rank)
    with pytest.raises(PlanMismatchError, match="every process"):
        pruner.step()
    assert pruner.steps_done == 0
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    torch.save(found, f"{folder}/{rank}")
    distributed.destroy_process_group()


def test_two_processes_end_as_one_that_sees_both_batches(tmp_path: Path) -> None:
    multiprocessing.spawn(worker, (str(tmp_path),), nprocs=2)
    one, two = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert one["plan"] == two["plan"]
    assert one["own"] == two["own"]
    assert all(torch.equal(a, b) for a, b in zip(one["grad"], two["grad"], strict=True))
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = AttentionPruner(model, 0.5, steps=2, heads="ragged")
    for step in range(4):
        optimizer.zero_grad()
        model(torch.cat([batch(2 * step), batch(2 * step + 1)])).square().mean().backward()
        pruner.observe()
        optimizer.step()
        if step % 2:
            pruner.step(optimizer)
    assert pruner.plan.to_json() == one["plan"]
    for key, value in model.state_dict().items():
        assert torch.allclose(value, one["model"][key], rtol=0, atol=1e-9)
        assert torch.equal(one["model"][key], two["model"][key])
    single = build()
    alone = AttentionPruner(single, 0.5, steps=1)
    for number in (100, 101):
        single.zero_grad()
        single(batch(number)).square().mean().backward()
        alone.observe()
    alone.step()
    assert alone.plan.to_json() == one["own"]


def test_only_a_wrapper_is_wrapped_anew() -> None:
    with pytest.raises(WrappedModelError, match="a Linear"):
        rewrap(nn.Linear(2, 2))
