"""Pruning inside a training loop: schedules, optimizers, observed scores, resuming, all or nothing."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import attnprune
from attnprune import AttentionPruner, Plan, apply_plan, find_attention, make_plan, prune_attention
from attnprune.errors import DataError, OptimizerStateError, OptionError, PlanMismatchError
from attnprune.planning.scorers import Fisher, Magnitude, Taylor
from attnprune.surgery import OptimizerPatch

from .conformance import close, family, flat_removed, fresh, inputs, random_plan

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adamw amsgrad": lambda p: torch.optim.AdamW(p, 1e-3, amsgrad=True, weight_decay=0.1),
    "adamw loop": lambda p: torch.optim.AdamW(p, 1e-3, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, 1e-3, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, centered=True),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-3),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-3),
    "radam": lambda p: torch.optim.RAdam(p, 1e-3),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1e-1),
}


def train(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        given = inputs(name, 0, seed)
        optimizer.zero_grad()
        family(name).run(model, given).square().mean().backward()
        optimizer.step()


def zero(name: str, model: nn.Module, optimizer: torch.optim.Optimizer, plan: Plan) -> None:
    """The oracle: rows that go are zero in the dense model and in all that its optimizer knows."""
    with torch.no_grad():
        for layer in plan:
            for p, (weight, bias) in family(name).dense(model, layer.spec.name).items():
                rows = flat_removed(layer, p)
                for part in (weight,) if p == "o" or bias is None else (weight, bias):
                    base = part._base if part._base is not None else part
                    state = [value for value in optimizer.state[base].values() if value.shape == base.shape]
                    for tensor in (base, *state):
                        view = tensor.as_strided(part.shape, part.stride(), part.storage_offset())
                        view[(slice(None), rows) if p == "o" else rows] = 0


@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize("name", ["ViT", "MHA"])
def test_training_goes_on_as_if_the_rows_had_been_zero(name: str, optimizer_name: str) -> None:
    """Every optimizer here works element by element, so a zeroed dense model with zeroed state is the oracle."""
    model = fresh(name, 0)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train(name, model, optimizer, range(3))
    plan = random_plan(model, 1, qkvo_ratios={"qk": 0.5, "vo": 0.25}, heads="ragged")
    oracle = copy.deepcopy(model)
    other = OPTIMIZERS[optimizer_name](oracle.parameters())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    zero(name, oracle, other, plan)
    groups = list(optimizer.param_groups)
    apply_plan(model, plan, optimizer=optimizer)
    assert all(one is now for one, now in zip(groups, optimizer.param_groups, strict=True))
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}
    assert {id(p) for p in optimizer.state} <= {id(p) for p in model.parameters()}
    train(name, model, optimizer, range(3, 8))
    train(name, oracle, other, range(3, 8))
    given = inputs(name, 0, 99)
    found, expected = (family(name).run(one, given).detach() for one in (model, oracle))
    close(found, expected, 1e-8, "after five more steps")


def test_the_state_of_rotated_parameters_is_carried_by_the_chain_rule() -> None:
    model = fresh("ViT", 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    train("ViT", model, optimizer, range(3))
    data = [{k: v.detach() for k, v in inputs("ViT", 0, seed).items()} for seed in range(3)]
    plan = make_plan(model, 0.5, data=data, progress=False)
    name = plan.layers[0].spec.name
    q, o = (family("ViT").dense(model, name)[p][0] for p in "qo")
    mean, square = optimizer.state[q]["exp_avg"].clone(), optimizer.state[q]["exp_avg_sq"].clone()
    outer = optimizer.state[o]["exp_avg"].clone()
    apply_plan(model, plan, optimizer=optimizer)
    maps, layer = plan.layers[0].fold, plan.layers[0]
    assert maps is not None
    new_q, new_o = (family("ViT").dense(model, name)[p][0] for p in "qo")
    dual = torch.block_diag(*maps.k)
    close(optimizer.state[new_q]["exp_avg"], dual @ mean, 1e-12, "first moment")
    close(optimizer.state[new_q]["exp_avg_sq"], dual.square() @ square, 1e-12, "second moment")
    close(optimizer.state[new_o]["exp_avg"], outer @ torch.block_diag(*maps.v).T, 1e-12, "first moment of O")
    assert layer.spec.heads == 4
    train("ViT", model, optimizer, range(3, 6))


def test_groups_keep_their_settings_and_order() -> None:
    model = fresh("MHA", 0)
    named = dict(model.named_parameters())
    biases = [p for key, p in named.items() if "bias" in key]
    weights = [p for key, p in reversed(named.items()) if "bias" not in key]  # not the model's order
    optimizer = torch.optim.SGD([{"params": biases, "lr": 0.5}, {"params": weights, "weight_decay": 0.3}], 0.1)
    apply_plan(model, random_plan(model, 1, qkvo_ratios=0.5), optimizer=optimizer)
    first, second = optimizer.param_groups
    assert (first["lr"], second["lr"], second["weight_decay"]) == (0.5, 0.1, 0.3)
    key_of = {id(p): key for key, p in model.named_parameters()}
    assert [key_of[id(p)] for p in first["params"]] == [key for key, _ in model.named_parameters() if "bias" in key]
    keys = [key_of[id(p)] for p in second["params"]]
    assert keys[0] == "second.out_proj.weight"
    assert keys[1:4] == [f"second.{p}_proj.weight" for p in "qkv"]


def test_a_group_with_other_modules_keeps_the_order_that_a_new_optimizer_would_have() -> None:
    whole = nn.Sequential(nn.Linear(4, 4), fresh("MHA", 0), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    apply_plan(whole[1], random_plan(whole[1], 1, qkvo_ratios=0.5), optimizer=optimizer)
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in whole.parameters()]


def test_a_scheduler_brings_its_optimizer() -> None:
    model = fresh("ViT", 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    pruner = AttentionPruner(model, 0.5, steps=3, scorer="magnitude")
    for given in ((optimizer, schedule), (None, schedule), ([optimizer], [schedule])):
        train("ViT", model, optimizer, range(2))
        pruner.step(*given)
        schedule.step()
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
    assert schedule.get_last_lr() == [0.1 / 8]
    again = AttentionPruner(model, 0.5, steps=1, scorer="magnitude")
    for odd in (model, 0.1, optimizer):
        with pytest.raises(OptimizerStateError, match="scheduler"):
            again.step(optimizer, odd)
    assert not again.done


def test_a_carried_optimizer_does_not_spike_where_a_fresh_one_does() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 1).double()
    x = torch.randn(16, 4, 16, dtype=torch.float64)
    target = torch.randn(16, 4, 16, dtype=torch.float64)
    with torch.no_grad():  # dead channels, so that pruning itself does not change the loss
        attention = model.layers[0].self_attn
        dead = [0, 1, 8, 9]
        for start in (0, 16, 32):
            attention.in_proj_weight[[start + row for row in dead]] = 0
            attention.in_proj_bias[[start + row for row in dead]] = 0
        attention.out_proj.weight[:, dead] = 0
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    for _ in range(400):
        step(model, optimizer)
    plan = make_plan(model, 0.25, scorer="magnitude", scope="local")
    carried, fresh_ = copy.deepcopy((model, optimizer)), copy.deepcopy(model)
    apply_plan(carried[0], plan, optimizer=carried[1])
    apply_plan(fresh_, plan)
    new = torch.optim.Adam(fresh_.parameters(), 1e-2)
    kept, started, dense = ([step(*pair) for _ in range(15)] for pair in (carried, (fresh_, new), (model, optimizer)))
    assert max(kept) < max(started)
    assert torch.allclose(torch.tensor(kept), torch.tensor(dense), rtol=1e-9, atol=0)  # the dead stay dead


def test_state_of_another_shape_is_refused_before_anything_moves() -> None:
    model = fresh("ViT", 0).float()
    optimizer = torch.optim.Adafactor(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(OptimizerStateError, match="row_var"):
        apply_plan(model, random_plan(model, 1, qkvo_ratios=0.5), optimizer=optimizer)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(OptimizerStateError, match="a int"):
        apply_plan(model, random_plan(model, 1, qkvo_ratios=0.5), optimizer=3)


def test_a_fault_in_the_optimizer_puts_model_average_and_optimizer_back(monkeypatch: Any) -> None:
    model = fresh("MHA", 0)
    average = AveragedModel(model)
    optimizer = torch.optim.Adam(model.parameters())
    train("MHA", model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), average.state_dict(), optimizer.state_dict()))
    real = OptimizerPatch.commit

    def fail(self: OptimizerPatch) -> None:
        real(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(OptimizerPatch, "commit", fail)
    plan = random_plan(model, 1, qkvo_ratios=0.5)
    with pytest.raises(KeyboardInterrupt):
        apply_plan(model, plan, optimizer=optimizer, averages=[average])
    after = (model.state_dict(), average.state_dict(), optimizer.state_dict())
    for old, new in zip(before[:2], after[:2], strict=True):
        assert list(old) == list(new)
        assert all(torch.equal(old[key], new[key]) for key in old)
    assert before[2]["param_groups"] == after[2]["param_groups"]
    for key, state in before[2]["state"].items():
        assert all(torch.equal(value, after[2]["state"][key][name]) for name, value in state.items())
    train("MHA", model, optimizer, range(2, 3))


def test_averages_follow() -> None:
    model = fresh("ViT", 0)
    average, plain = AveragedModel(model), copy.deepcopy(model)
    optimizer = torch.optim.Adam(model.parameters())
    train("ViT", model, optimizer, range(2))
    average.update_parameters(model)
    apply_plan(model, random_plan(model, 1, qkvo_ratios=0.5), optimizer=optimizer, averages=[average, plain])
    for one in (average.module, plain):
        assert [spec.qk_dims for spec in find_attention(one)] == [spec.qk_dims for spec in find_attention(model)]
    train("ViT", model, optimizer, range(2, 4))
    average.update_parameters(model)


# the pruner


def loop(
    model: nn.Module, optimizer: torch.optim.Optimizer, pruner: AttentionPruner, steps: int, first: int = 0
) -> None:
    """Two batches, then a step of the pruner."""
    for i in range(first, first + steps):
        for seed in (2 * i, 2 * i + 1):
            optimizer.zero_grad()
            family("ViT").run(model, inputs("ViT", 0, seed)).square().mean().backward()
            pruner.observe()
            optimizer.step()
        pruner.step(optimizer)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("geometric", [1 - 0.5 ** (i / 4) for i in range(1, 5)]),
        ("linear", [0.125, 0.25, 0.375, 0.5]),
        ("cubic", [0.5 * (1 - (1 - i / 4) ** 3) for i in range(1, 5)]),
        (lambda t: t**2, [0.5 * (i / 4) ** 2 for i in range(1, 5)]),
        ("one-shot", [0.5]),
    ],
)
@pytest.mark.parametrize("split", ["fixed", "auto"])
def test_schedules(schedule: Any, expected: list[float], split: Any) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 2, 32, batch_first=True), 4)
    pruner = AttentionPruner(
        model, 0.5, schedule=schedule, steps=4, scorer="magnitude", heads="ragged", split=split, progress=False
    )
    for share in expected:
        assert not pruner.done
        pruner.step()
        fractions = [pruner.plan.fraction(p) for p in ("q", "k", "v", "o")]
        if split == "fixed":
            assert all(abs(fraction - share) <= 1 / 256 for fraction in fractions)
        else:
            assert abs(sum(fractions) / 4 - share) <= 1 / 256
    assert pruner.done
    with pytest.raises(OptionError, match="at most"):
        pruner.step()


@pytest.mark.parametrize("granularity", ["head", "channel", "joint"])
def test_rounding_does_not_add_up(granularity: Any) -> None:
    model = fresh("Transformer", 0)
    pruner = AttentionPruner(
        model, 0.5, steps=7, granularity=granularity, scorer="magnitude", heads="ragged", progress=False
    )
    while not pruner.done:
        pruner.step()
    once = fresh("Transformer", 0)
    at_once = prune_attention(once, 0.5, granularity=granularity, scorer="magnitude", heads="ragged")
    for p in ("q", "o"):
        unit = 1 / 12 if granularity != "channel" else 1 / 72
        assert abs(pruner.report.achieved[p] - at_once.achieved[p]) <= unit + 1e-9  # type: ignore[index]


@pytest.mark.parametrize(("name", "make"), [("taylor", Taylor), ("fisher", Fisher), ("auto", Fisher)])
def test_observed_scores_are_those_of_a_pass_over_the_same_batches(name: str, make: Any) -> None:
    model = fresh("ViT", 0)
    pruner = AttentionPruner(model, 0.5, steps=1, scorer=name)
    data = [inputs("ViT", 0, seed) for seed in range(3)]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return family("ViT").run(model, batch).square().mean()

    for batch in data:
        model.zero_grad()
        loss_fn(model, batch).backward()
        pruner.observe()
    expected = make_plan(
        fresh("ViT", 0), 0.5, scorer=make(), data=data, loss_fn=loss_fn, basis="channels", compensate=False,
        progress=False,
    )  # fmt: skip
    pruner.step()
    assert pruner.plan.layers == expected.layers


def test_accumulated_gradients_count_as_one_batch() -> None:
    model, whole = fresh("ViT", 0), fresh("ViT", 0)
    one, other = AttentionPruner(model, 0.5, steps=1), AttentionPruner(whole, 0.5, steps=1)
    batch = inputs("ViT", 0, 0)["pixel_values"].detach()
    for part in batch:
        (family("ViT").run(model, {"pixel_values": part[None]}).square().mean() / len(batch)).backward()
    family("ViT").run(whole, {"pixel_values": batch}).square().mean().backward()
    one.observe()
    other.observe()
    one.step()
    other.step()
    assert one.plan.layers == other.plan.layers


class Scaler:
    """Stands for torch.amp.GradScaler, which needs a GPU."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def test_scaled_gradients_are_unscaled_and_overflow_is_left_out() -> None:
    plans = []
    for scales in ((1.0, 1.0), (2.0**10, 2.0**4)):
        model = fresh("ViT", 0)
        pruner = AttentionPruner(model, 0.5, steps=1)
        for seed, scale in enumerate(scales):
            model.zero_grad()
            (family("ViT").run(model, inputs("ViT", 0, seed)).square().mean() * scale).backward()
            pruner.observe(scaler=Scaler(scale))
        next(iter(model.parameters()))
        for p in model.parameters():
            assert p.grad is not None
            p.grad.fill_(torch.inf)
        pruner.observe(scaler=Scaler(4.0))
        assert pruner.state_dict()["observations"] == 2
        with pytest.raises(DataError, match="finite"):
            pruner.observe()
        pruner.step()
        plans.append(pruner.plan.layers)
    assert plans[0] == plans[1]


@pytest.mark.covering(1)
@pytest.mark.parametrize("at", [1, 2, 3])
@pytest.mark.parametrize("kind", ["linears", "packed", "mapped"])
def test_resuming_gives_bitwise_the_same_end(kind: str, at: int) -> None:
    def build() -> tuple[nn.Module, AttentionPruner]:
        torch.manual_seed(0)
        if kind != "packed":
            model: nn.Module = fresh("ViT", 0)
        else:
            model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2).double()
        options: dict[str, Any] = {"scorer": "taylor", "heads": "ragged"}
        if kind == "mapped":
            options = {"data": data(), "progress": False}
        return model, AttentionPruner(model, 0.6, steps=4, **options)

    def data() -> list[Any]:
        return [{k: v.detach() for k, v in inputs("ViT", 0, seed).items()} for seed in range(2)]

    def run(model: nn.Module, optimizer: Any, pruner: AttentionPruner, steps: int, first: int = 0) -> None:
        for i in range(first, first + steps):
            for j in range(2):
                generator = torch.Generator().manual_seed(10 * i + j)
                optimizer.zero_grad()
                if kind == "packed":
                    output = model(torch.randn(3, 4, 16, generator=generator, dtype=torch.float64))
                else:
                    output = family("ViT").run(model, inputs("ViT", 0, 10 * i + j))
                output.square().mean().backward()
                if kind != "mapped":
                    pruner.observe()
                optimizer.step()
            pruner.step(optimizer)

    model, pruner = build()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run(model, optimizer, pruner, at)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), pruner.state_dict()], file)
    run(model, optimizer, pruner, 4 - at, at)

    again, resumed = build()
    file.seek(0)
    saved = torch.load(file)
    resumed.load_state_dict(saved[2])
    again.load_state_dict(saved[0])
    other = torch.optim.AdamW(again.parameters(), 1e-3)
    other.load_state_dict(saved[1])
    run(again, other, resumed, 4 - at, at)
    assert resumed.done
    assert list(again.state_dict()) == list(model.state_dict())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert [spec.qk_dims for spec in resumed.plan.after] == [spec.qk_dims for spec in pruner.plan.after]
    for mine, theirs in zip(
        optimizer.state_dict()["state"].values(), other.state_dict()["state"].values(), strict=True
    ):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_resuming_keeps_what_was_observed() -> None:
    model = fresh("ViT", 0)
    pruner = AttentionPruner(model, 0.5, steps=2)
    family("ViT").run(model, inputs("ViT", 0)).square().mean().backward()
    pruner.observe()
    again = AttentionPruner(fresh("ViT", 0), 0.5, steps=2)
    again.load_state_dict(copy.deepcopy(pruner.state_dict()))
    pruner.step()
    again.step()
    assert pruner.plan == again.plan


def test_a_compiled_model_traces_again_after_a_step() -> None:
    model = fresh("ViT", 1)
    compiled = torch.compile(model, backend="eager")
    given = {k: v.detach() for k, v in inputs("ViT", 1).items()}
    _ = compiled(**given)
    pruner = AttentionPruner(compiled, 0.5, steps=2, scorer="magnitude")
    while not pruner.done:
        pruner.step()
        close(compiled(**given).last_hidden_state.detach(), model(**given).last_hidden_state.detach(), 1e-12, "output")
    assert [layer.spec.name for layer in pruner.plan.layers] == [spec.name for spec in find_attention(model)]
    plain = fresh("ViT", 1)  # what it saves is of the model inside
    AttentionPruner(plain, 0.5, steps=2, scorer="magnitude").load_state_dict(pruner.state_dict())
    close(plain(**given).last_hidden_state.detach(), compiled(**given).last_hidden_state.detach(), 1e-12, "output")


def test_what_a_pruner_refuses() -> None:
    model = fresh("ViT", 0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for options, words in (
        ({"schedule": "slow"}, "schedule"),
        ({"schedule": lambda t: 2.0}, r"\[0, 1\]"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"granularty": "head"}, "granularty"),
        ({"granularity": "layer"}, "granularity"),
        ({"min_channels": 0}, "min_channels"),
    ):
        with pytest.raises(OptionError, match=words):
            AttentionPruner(model, 0.5, **options)  # type: ignore[arg-type]
    pruner = AttentionPruner(model, 0.5, steps=2, scorer="fisher")
    with pytest.raises(DataError, match="observe"):
        pruner.step()
    with pytest.raises(DataError, match="zero_grad"):
        pruner.observe()
    for options in ({"scorer": Magnitude()}, {"data": []}, {"scorer": "random"}, {"basis": "rotated"}):
        with pytest.raises(OptionError, match="observe"):
            AttentionPruner(model, 0.5, **options).observe()  # type: ignore[arg-type]
    state = pruner.state_dict()
    with pytest.raises(OptionError, match=r"0\.25"):
        AttentionPruner(model, 0.25, steps=2).load_state_dict(state)
    with pytest.raises(OptionError, match="state_dict"):
        pruner.load_state_dict({})
    with pytest.raises(PlanMismatchError, match="layers"):
        AttentionPruner(nn.MultiheadAttention(16, 4), 0.5, steps=2).load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("options", [{}, {"scorer": "fisher"}, {"scorer": "taylor"}, {"preset": "fast"}])
@pytest.mark.parametrize("name", ["ViT", "MHA"])
def test_a_step_without_gradients_is_no_step_by_magnitude(name: str, options: Any) -> None:
    model = fresh(name, 0)
    pruner = AttentionPruner(model, 0.5, steps=2, **options)
    for call in (pruner.step, pruner.next_plan):
        with pytest.raises(DataError, match=r'gradients to score by.*scorer="magnitude"'):
            call()
    assert pruner.steps_done == 0
    for scorer in ("magnitude", "random", Magnitude()):  # asked for
        AttentionPruner(model, 0.25, steps=1, scorer=scorer).step()


def test_gradients_of_one_step_do_not_serve_the_next() -> None:
    model = fresh("ViT", 0)
    optimizer, pruner = torch.optim.SGD(model.parameters(), 0.1), AttentionPruner(model, 0.5, steps=2)
    loop(model, optimizer, pruner, 1)
    with pytest.raises(DataError, match="observe"):
        pruner.step(optimizer)


def seen(pruner: AttentionPruner) -> dict[str, Any]:
    family("ViT").run(pruner.model, inputs("ViT", 0, 0)).square().mean().backward()
    pruner.observe()
    return pruner.state_dict()


WRONG: dict[str, Any] = {
    "steps_done": [-5, 99, True, 1.0, None, "1"],
    "observations": [-1, 1.5, None, True, 0],
    "parameters": [-1, None, "x"],
    "plan": [None, 3, "{}", "not JSON", "[]"],
    "seen": [None, [], {}, {"x": []}, "names"],
    "version": [None, 2, True],
    "steps": [3, None],
    "ratios": [None, {}, {"q": 1}],
    "budget": [{"resource": "latency", "share": 0.5}, 3],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_malformed_state_is_refused_and_changes_nothing(key: str, value: Any) -> None:
    state = seen(AttentionPruner(fresh("ViT", 0), 0.5, steps=2))
    pruner = AttentionPruner(fresh("ViT", 0), 0.5, steps=2)
    before = (pruner.state_dict(), pruner.model.state_dict())
    with pytest.raises(attnprune.errors.AttnPruneError):
        pruner.load_state_dict({**state, key: value})
    if key != "budget":
        with pytest.raises(attnprune.errors.AttnPruneError):
            pruner.load_state_dict({one: other for one, other in state.items() if one != key})
    now = (pruner.state_dict(), pruner.model.state_dict())
    assert str(now) == str(before)
    pruner.load_state_dict(state)
    pruner.step()


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[:2],
        lambda parts: [part[:-1] for part in parts],
        lambda parts: [part * torch.nan for part in parts],
        lambda parts: [part.long() for part in parts],
        lambda parts: [part.tolist() for part in parts],
        lambda parts: parts[0],
        lambda parts: None,
    ],
)
def test_malformed_sums_are_refused(change: Any) -> None:
    pruner = AttentionPruner(fresh("ViT", 0), 0.5, steps=2)
    state = seen(pruner)
    name = next(iter(state["seen"]))
    with pytest.raises(OptionError, match="seen"):
        pruner.load_state_dict({**state, "seen": {**state["seen"], name: change(state["seen"][name])}})


def test_a_state_with_a_budget_is_checked_too() -> None:
    pruner = AttentionPruner(fresh("ViT", 0), target_params=0.9, steps=2)
    state = seen(pruner)
    for key, value in (("cost", 0.0), ("cost", -1), ("cost", None), ("cost", float("nan")), ("latency", 3)):
        with pytest.raises(OptionError, match=key):
            pruner.load_state_dict({**state, key: value})
    with pytest.raises(attnprune.errors.LatencyError):
        pruner.load_state_dict({**state, "latency": "{}"})
    pruner.load_state_dict(state)


def test_one_step_at_a_time_ends_where_the_plan_says() -> None:
    model, dense = fresh("ViT", 0), fresh("ViT", 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)  # weights stay, so the plan of all steps is the model
    pruner = AttentionPruner(model, 0.5, steps=3, heads="ragged")
    loop(model, optimizer, pruner, 3)
    apply_plan(dense, pruner.plan)
    assert pruner.report.removed_parameters == sum(p.numel() for p in fresh("ViT", 0).parameters()) - sum(
        p.numel() for p in model.parameters()
    )
    for one, other in itertools.zip_longest(model.parameters(), dense.parameters()):
        assert torch.equal(one, other)
