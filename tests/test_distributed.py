"""Two processes: the same plan in both, sums put together, failures shared, wrappers made anew, shards."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch_pruning.pruner.importance import TaylorImportance

import attnprune
from attnprune import AttentionPruner, Plan, across_processes, make_plan, prune_attention, rewrap
from attnprune.cost.latency import Grid, LatencyTable
from attnprune.cost.latency.multiples import Share
from attnprune.errors import (
    AttnPruneError,
    NonFiniteError,
    OptimizerStateError,
    PlanMismatchError,
    ProcessError,
    ShardedError,
    WrappedModelError,
)
from attnprune.integrations.accelerate import AcceleratedPruner

from .processes import forked, in_processes

pytestmark = forked


def build() -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 16, 0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()


def batch(number: int) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(number), dtype=torch.float64)


def loss_of(model: nn.Module, x: Any) -> Tensor:
    return model(x).square().mean()


def shapes(plan: Plan) -> list[Any]:
    return [(layer.heads, layer.qk, layer.vo) for layer in plan]


# what each of the two does


def ddp(rank: int) -> Any:
    model: Any = DistributedDataParallel(build(), gradient_as_bucket_view=True, bucket_cap_mb=0.001)
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = AttentionPruner(model, 0.5, steps=2, heads="ragged")
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, batch(2 * step + rank)).backward()
        pruner.observe()
        optimizer.step()
        if step % 2:
            pruner.step(optimizer)
            assert rewrap(model) is model
            assert model.gradient_as_bucket_view
            assert model.bucket_bytes_cap == int(0.001 * 2**20)
    model.eval()
    assert not rewrap(model).training
    model.train()
    optimizer.zero_grad()
    loss_of(model, batch(50 + rank)).backward()
    assert len(calls) == 5
    with pytest.raises(WrappedModelError, match=r"model\.module"):
        attnprune.apply_plan(model, pruner.plan)
    grads = [p.grad.clone() for p in model.parameters()]
    return {"grad": grads, "model": model.module.state_dict(), "plan": pruner.plan.to_json()}


def own_gradients(rank: int) -> Any:
    model = build()  # not wrapped
    pruner = AttentionPruner(model, 0.5, steps=1)
    loss_of(model, batch(100 + rank)).backward()
    pruner.observe()
    pruner.step()
    return pruner.plan.to_json()


def one_saw_nothing(rank: int) -> Any:
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=1)
    if rank:
        loss_of(model, batch(100)).backward()
        pruner.observe()
    return shapes(pruner.next_plan())


WAYS: dict[str, dict[str, Any]] = {
    "taylor": {"scorer": "taylor", "basis": "rotated", "compensate": True},
    "fisher": {"scorer": "fisher", "basis": "channels", "compensate": True},
    "per sample": {"basis": "channels", "compensate": False},
    "gate": {"scorer": "gate", "basis": "channels", "compensate": True},
    "torch-pruning": {"scorer": TaylorImportance(), "basis": "channels", "compensate": True},
    "rotated": {"split": "auto", "heads": "ragged"},
    "in sequence": {"sequential": True},
    "error": {"qkvo_ratios": None, "target_error": 0.2},
}


def planned(way: str, data: list[Tensor]) -> Any:
    options = {"qkvo_ratios": 0.5, **WAYS[way]}
    model = build()
    with across_processes():
        plan = make_plan(model, data=data, loss_fn=loss_of, progress=False, **options)
    attnprune.apply_plan(model, plan)
    return plan, model(batch(0))


def shared_data(rank: int) -> Any:
    return {way: planned(way, [batch(rank), batch(2 + rank)]) for way in WAYS}


def scores(data: list[Tensor]) -> Any:
    with across_processes():
        return attnprune.score_attention(build(), "gate", basis="channels", data=data, loss_fn=loss_of, progress=False)


def shared_scores(rank: int) -> Any:
    return scores([batch(rank), batch(2 + rank)])


def with_pruner(rank: int) -> Any:
    pruner = AttentionPruner(
        build(), 0.5, steps=2, data=[batch(rank), batch(2 + rank)], loss_fn=loss_of, progress=False
    )
    pruner.step()
    pruner.step()
    return pruner.plan


def refused(rank: int, call: Callable[[nn.Module], object]) -> AttnPruneError:
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(AttnPruneError) as caught:
        call(model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return caught.value


CLOCKS: dict[str, dict[str, Any]] = {
    "budget": {"target_latency": 0.8},
    "heads": {"qkvo_ratios": 0.5, "granularity": "auto"},
    "multiples": {"qkvo_ratios": 0.5, "round_to": "auto"},
}


def other_clocks(rank: int) -> Any:
    """Plans of what is measured, where heads are slow on the first and fast on the second, and so on."""

    def table(model: nn.Module, *_: Any, **__: Any) -> LatencyTable:
        shares = [0.05 * ((vo if rank else qk) + 1) for qk in range(1, 9) for vo in range(1, 9)]
        names = tuple((spec.name, 0) for spec in attnprune.find_attention(model))
        grid = Grid((2,), tuple(range(1, 9)), tuple(range(1, 9)), tuple(shares))
        return LatencyTable({}, 1.0, 0.1, names, (grid,), 1, 3)

    def whole(model: Any, plan: Plan, *_: Any) -> tuple[float, None]:
        return (0.5 if bool(plan.layers[0].heads) == bool(rank) else 0.9), None

    def multiples(*_: Any) -> dict[int, Share]:
        return {1: Share(1.0, 0.0), 2: Share(1.5 - rank, 0.0)}

    with pytest.MonkeyPatch.context() as patch, across_processes():
        patch.setattr("attnprune.cost.latency.measure", table)
        patch.setattr("attnprune.planning.faster.Surgeon.prepare", lambda model, views, plan: plan)
        patch.setattr("attnprune.planning.faster.measure_plan", whole)
        patch.setattr("attnprune.planning.faster.measure_multiples", multiples)
        return {
            way: make_plan(build(), example_inputs=batch(0), progress=False, **options)
            for way, options in CLOCKS.items()
        }


def failures(rank: int) -> Any:
    def other_scores(model: nn.Module) -> None:
        pruner = AttentionPruner(model, 0.5, steps=1, scorer="random", seed=rank)
        try:
            pruner.step()
        finally:
            assert not pruner.done

    def bad_data(model: nn.Module) -> None:
        x = batch(rank) if not rank else torch.full_like(batch(1), torch.nan)
        with across_processes():
            prune_attention(model, 0.5, data=[x], loss_fn=loss_of, progress=False)

    def bad_optimizer(model: nn.Module) -> None:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        pruner = AttentionPruner(model, 0.5, steps=1, scorer="magnitude")
        odd: Any = object() if rank else optimizer
        try:
            pruner.step(odd)
        finally:
            assert not pruner.done
            assert all(p in set(model.parameters()) for p in optimizer.param_groups[0]["params"])

    return [refused(rank, call) for call in (other_scores, bad_data, bad_optimizer)]


def shards(rank: int) -> Any:
    model = build()
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    by_weights = make_plan(model, 0.5, scorer="magnitude")
    pruner = AttentionPruner(model, 0.5, steps=1, scorer="taylor")
    loss_of(model, batch(200 + rank)).backward()
    pruner.observe()
    plan = pruner.next_plan()
    for call in (pruner.step, lambda: prune_attention(model, 0.5, data=[batch(0)])):
        with pytest.raises(ShardedError, match="before sharding"):
            call()
    assert not pruner.done
    whole = build()
    whole.load_state_dict(get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)))
    attnprune.apply_plan(whole, Plan.from_json(plan.to_json()))
    for layer in whole.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(whole, mesh=mesh)
    optimizer = torch.optim.AdamW(whole.parameters(), 1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = loss_of(whole, batch(200 + rank))
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    state = get_model_state_dict(whole, options=StateDictOptions(full_state_dict=True))
    return {"weights": by_weights, "plan": plan, "losses": losses, "state": state}


def accelerated(rank: int, folder: str) -> Any:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")

    def run() -> Any:
        accelerator = Accelerator(cpu=True)
        assert accelerator.num_processes == 2
        model = build()
        model, optimizer = accelerator.prepare(model, torch.optim.Adam(model.parameters(), 1e-2))
        pruner = AttentionPruner(model, 0.5, steps=2)
        return accelerator, model, optimizer, AcceleratedPruner(accelerator, pruner, model, optimizer)

    def train(steps: range, accelerator: Any, model: Any, optimizer: Any, pruning: AcceleratedPruner) -> Any:
        for step in steps:
            optimizer.zero_grad()
            accelerator.backward(loss_of(model, batch(2 * step + rank)))
            pruning.observe()
            optimizer.step()
            if step % 2 and not pruning.done:
                pruning.step()
        return {key: value.clone() for key, value in model.module.state_dict().items()}

    first = run()
    train(range(3), *first)
    first[0].save_state(f"{folder}/state")
    whole = train(range(3, 6), *first)
    again = run()
    again[0].load_state(f"{folder}/state")
    return {"whole": whole, "again": train(range(3, 6), *again), "plan": again[3].pruner.plan}


PARTS = (ddp, own_gradients, one_saw_nothing, shared_data, shared_scores, with_pruner, other_clocks, failures, shards)


def worker(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {part.__name__: part(rank) for part in PARTS}
    found["accelerated"] = accelerated(rank, folder)
    torch.save(found, f"{folder}/{rank}")
    distributed.barrier()
    os._exit(0)  # gloo's threads may outlive the interpreter


@pytest.fixture(scope="module")
def both(tmp_path_factory: Any) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("two")
    in_processes(2, worker, str(folder))
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(2)]


def test_two_processes_end_as_one_that_sees_both_batches(both: Any) -> None:
    one, two = (found["ddp"] for found in both)
    assert one["plan"] == two["plan"]
    assert all(torch.equal(a, b) for a, b in zip(one["grad"], two["grad"], strict=True))
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = AttentionPruner(model, 0.5, steps=2, heads="ragged")
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, torch.cat([batch(2 * step), batch(2 * step + 1)])).backward()
        pruner.observe()
        optimizer.step()
        if step % 2:
            pruner.step(optimizer)
    assert pruner.plan.to_json() == one["plan"]
    for key, value in model.state_dict().items():
        assert torch.allclose(value, one["model"][key], rtol=0, atol=1e-9)
        assert torch.equal(one["model"][key], two["model"][key])


def alone(*numbers: int) -> AttentionPruner:
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=1)
    for number in numbers:
        model.zero_grad()
        loss_of(model, batch(number)).backward()
        pruner.observe()
    return pruner


def test_gradients_of_unwrapped_models_are_put_together(both: Any) -> None:
    assert both[0]["own_gradients"] == both[1]["own_gradients"] == alone(100, 101).next_plan().to_json()
    assert both[0]["one_saw_nothing"] == both[1]["one_saw_nothing"] == shapes(alone(100).next_plan())


@pytest.mark.parametrize("way", WAYS)
def test_shares_of_data_are_as_good_as_all_of_them(both: Any, way: str) -> None:
    plan, output = planned(way, [batch(number) for number in range(4)])
    for found in both:
        theirs, their_output = found["shared_data"][way]
        assert shapes(theirs) == shapes(plan)
        assert torch.allclose(their_output, output, rtol=0, atol=1e-6)
    assert both[0]["shared_data"][way][0] == both[1]["shared_data"][way][0]


def test_shared_scores_are_those_of_all_data(both: Any) -> None:
    for name, one in scores([batch(number) for number in range(4)]).items():
        for found in both:
            theirs = found["shared_scores"][name]
            for key in ("qk", "vo", "head"):
                assert torch.allclose(getattr(theirs, key), getattr(one, key), rtol=1e-6)


def test_a_pruner_shares_its_data(both: Any) -> None:
    data = [batch(number) for number in range(4)]
    pruner = AttentionPruner(build(), 0.5, steps=2, data=data, loss_fn=loss_of, progress=False)
    pruner.step()
    pruner.step()
    assert both[0]["with_pruner"] == both[1]["with_pruner"]
    assert shapes(both[0]["with_pruner"]) == shapes(pruner.plan)


def test_the_clock_of_the_first_process_counts(both: Any) -> None:
    one, two = (found["other_clocks"] for found in both)
    assert one == two
    asked = {way: plan.asked for way, plan in one.items()}
    assert asked["heads"].granularity == "channel"
    assert asked["multiples"].round_to == 1
    for layer in one["budget"].after:
        assert min(layer.qk_dims) < 8 == min(layer.vo_dims), "qk is what takes time on the first"


def test_where_one_fails_none_changes(both: Any) -> None:
    kinds = [[type(error) for error in found["failures"]] for found in both]
    assert kinds == [
        [PlanMismatchError, ProcessError, ProcessError],
        [PlanMismatchError, NonFiniteError, OptimizerStateError],
    ]
    told = [str(error) for error in both[0]["failures"]]
    assert "every process" in told[0]
    assert "on rank 1, NonFiniteError" in told[1]
    assert "on rank 1, OptimizerStateError" in told[2]


def test_shards_are_planned_on_and_whole_models_are_cut(both: Any) -> None:
    one, two = (found["shards"] for found in both)
    assert one["weights"] == two["weights"] == make_plan(build(), 0.5, scorer="magnitude")
    model = build()
    pruner = AttentionPruner(model, 0.5, steps=1, scorer="taylor")
    loss_of(model, torch.cat([batch(200), batch(201)])).backward()
    pruner.observe()
    assert one["plan"] == two["plan"] == pruner.next_plan()
    pruner.step()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, torch.cat([batch(200), batch(201)]))
        loss.backward()
        optimizer.step()
        assert abs(float(loss.detach()) - (one["losses"][step] + two["losses"][step]) / 2) < 1e-9
    for key, value in model.state_dict().items():
        assert torch.allclose(value, one["state"][key], rtol=0, atol=1e-9)


def test_an_accelerator_of_two_processes_and_its_checkpoint(both: Any) -> None:
    one, two = (found["accelerated"] for found in both)
    assert one["plan"] == two["plan"]
    for found in (one["again"], two["whole"], two["again"]):
        assert all(torch.equal(value, found[key]) for key, value in one["whole"].items())
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = AttentionPruner(model, 0.5, steps=2)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, torch.cat([batch(2 * step), batch(2 * step + 1)])).backward()
        if not pruner.done:
            pruner.observe()
        optimizer.step()
        if step % 2 and not pruner.done:
            pruner.step(optimizer)
    assert pruner.plan == one["plan"]
    for key, value in model.state_dict().items():
        assert torch.allclose(value, one["whole"][key], rtol=0, atol=1e-9)


def test_only_a_wrapper_is_wrapped_anew() -> None:
    with pytest.raises(WrappedModelError, match="a Linear"):
        rewrap(nn.Linear(2, 2))
