"""What becomes of optimizers: all that is pruned must be in one, names follow, and state follows or is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from attnprune import AttentionPruner, apply_plan, make_plan, masked, prune_attention, prune_channels, prune_heads
from attnprune.errors import OptimizerStateError

from .families import timm_module

X = torch.randn(8, 5, 32, generator=torch.Generator().manual_seed(1))
IDS = torch.randint(0, 50, (4, 5), generator=torch.Generator().manual_seed(1))


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True)


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaModel(transformers.LlamaConfig(vocab_size=50, intermediate_size=16, **sizes))


def bert() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    found: nn.Module = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes), add_pooling_layer=False)
    return found.eval()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    def loss() -> Tensor:
        optimizer.zero_grad()
        out: Any = model(IDS).last_hidden_state if isinstance(model, transformers.PreTrainedModel) else model(X)
        found: Tensor = out[..., 0].square().mean()
        found.backward()  # type: ignore[no-untyped-call]
        return found

    for _ in range(steps):
        loss()
        optimizer.step(loss) if isinstance(optimizer, torch.optim.LBFGS) else optimizer.step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def refused(model: nn.Module, optimizer: Any, match: str, **options: Any) -> None:
    """Before anything moves."""
    before = values(model)
    with pytest.raises(OptimizerStateError, match=match):
        prune_attention(model, 0.5, optimizer=optimizer, progress=False, **options)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# which optimizers


def older(model: nn.Module) -> Any:
    """Made before the model was pruned for the first time."""
    found = torch.optim.SGD(model.parameters(), 0.1)
    prune_attention(model, 0.25, scope="local")
    return found


OTHERS: dict[str, Callable[[nn.Module], Any]] = {
    "older weights": older,
    "another model's": lambda model: torch.optim.AdamW(copy.deepcopy(model).parameters()),
    "matrices alone": lambda model: torch.optim.SGD([p for n, p in model.named_parameters() if "o_proj" not in n][:1]),
    "several, of others": lambda model: [torch.optim.SGD(layer().parameters(), 0.1) for _ in range(2)],
}


@pytest.mark.parametrize("make", [layer, llama, bert])
@pytest.mark.parametrize("name", OTHERS)
def test_all_that_is_pruned_and_trained_is_in_an_optimizer(name: str, make: Any) -> None:
    model = make()
    refused(model, OTHERS[name](model), "in none of them")


def test_every_call_that_prunes_asks_for_them() -> None:
    calls: list[Callable[[nn.Module, Any], object]] = [
        lambda model, optimizer: prune_heads(model, {0: [1]}, optimizer=optimizer),
        lambda model, optimizer: prune_channels(model, {0: {"qk": [[0], [], [], []]}}, optimizer=optimizer),
        lambda model, optimizer: apply_plan(model, make_plan(model, 0.5), optimizer=optimizer),
        lambda model, optimizer: AttentionPruner(model, 0.5, scorer="magnitude").step(optimizer),
    ]
    for call in calls:
        model, other = layer(), layer()
        optimizer = torch.optim.AdamW(model.parameters())
        train(model, optimizer)
        with pytest.raises(OptimizerStateError, match="in none of them"):
            call(other, optimizer)
        call(model, optimizer)
        assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in model.parameters()]
        train(model, optimizer)


def test_averages_follow_units_named_by_hand() -> None:
    model = layer()
    average = torch.optim.swa_utils.AveragedModel(model)
    prune_heads(model, {0: [1]}, averages=[average])
    prune_channels(model, {0: {"vo": [[0], [], []]}}, averages=[average])
    average.update_parameters(model)
    assert torch.equal(average(X), model(X))


def test_two_optimizers_and_what_is_frozen() -> None:
    model = layer()
    frozen = model.self_attn.out_proj.weight
    frozen.requires_grad_(False)
    attention = [p for p in model.self_attn.parameters() if p is not frozen]
    others = [p for n, p in model.named_parameters() if "self_attn" not in n]
    two = [torch.optim.SGD(attention, 0.1, momentum=0.9), torch.optim.AdamW(others)]
    refused(model, two[1], "self_attn.in_proj_weight, self_attn.in_proj_bias in none")
    prune_attention(model, 0.5, optimizer=two)
    held = {id(p) for one in two for group in one.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


# names


def two() -> nn.Module:
    return nn.Sequential(layer(), layer())


def packed() -> nn.Module:
    return timm_module("timm.models.vision_transformer").Attention(32, 4, qkv_bias=True)


@pytest.mark.covering(1)
@pytest.mark.parametrize("make", [layer, bert, two, packed])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_of_parameters_follow(prefix: str, make: Any) -> None:
    model = make()
    named = [(prefix + name, parameter) for name, parameter in model.named_parameters()]
    biases = [pair for pair in named if "bias" in pair[0]]
    weights = [pair for pair in named if "bias" not in pair[0]]
    optimizer = torch.optim.AdamW([{"params": weights, "lr": 0.5}, {"params": biases[::-1]}])
    other = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        train(model, optimizer)
        prune_attention(model, 0.25, optimizer=[optimizer, other])
        now = dict(model.named_parameters())
        for group in optimizer.param_groups:
            assert len(group["params"]) == len(group["param_names"])
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                assert name.startswith(prefix)
                assert now[name.removeprefix(prefix)] is parameter
    assert "param_names" not in other.param_groups[0]
    again = torch.optim.AdamW([{"params": group["params"]} for group in optimizer.param_groups])
    again.load_state_dict(optimizer.state_dict())


def test_names_come_back_when_pruning_fails(monkeypatch: Any) -> None:
    model = layer()
    optimizer = torch.optim.AdamW(model.named_parameters())
    before = copy.deepcopy(optimizer.param_groups[0]["param_names"])
    monkeypatch.setattr("attnprune.api.Report", lambda *_: 1 / 0)  # after everything is done
    monkeypatch.setattr("attnprune.surgery.verify.Verification.commit", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_attention(model, 0.5, optimizer=optimizer, example_inputs=X)
    assert optimizer.param_groups[0]["param_names"] == before


# state that is more than plain tensors


class Odd(Tensor):
    """A tensor subclass that knows no slices, as those of 8-bit optimizers."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise NotImplementedError


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


ODD: dict[str, Callable[[nn.Parameter], Any]] = {
    "a subclass of Tensor": lambda p: torch.zeros_like(p).detach().as_subclass(Odd),
    "a sparse tensor": lambda p: torch.zeros_like(p).detach().to_sparse(),
    "blocks": lambda p: torch.zeros(p.numel() // 32, 32 * 2),
    "an object with tensors": lambda p: Box(torch.zeros_like(p)),
    "a list with another shape": lambda p: [torch.zeros_like(p), torch.zeros(7)],
}


@pytest.mark.parametrize("name", ODD)
def test_state_of_another_form_is_refused(name: str) -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.self_attn.out_proj.weight]["state1"] = ODD[name](model.self_attn.out_proj.weight)
    refused(model, optimizer, "state1")


def test_lists_and_mappings_of_plain_tensors_follow() -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    old = model.self_attn.out_proj.weight
    optimizer.state[old].update(
        history=[old.detach().clone(), 3], more={"x": (old.detach().clone(),)}, seen=torch.ones_like(old).bool()
    )
    prune_attention(model, 0.5, optimizer=optimizer)
    new = model.self_attn.out_proj.weight
    state = optimizer.state[new]
    assert torch.equal(state["history"][0], new)
    assert torch.equal(state["more"]["x"][0], new)
    assert state["history"][1] == 3
    assert torch.equal(state["seen"], torch.ones_like(new).bool())


def test_one_vector_of_all_parameters_is_refused() -> None:
    """LBFGS keeps its state with the first parameter, which need not be pruned."""
    model = layer()
    first = list(model.linear1.parameters())
    others = [p for p in model.parameters() if all(p is not one for one in first)]
    optimizer = torch.optim.LBFGS([*first, *others], max_iter=2)
    train(model, optimizer)
    refused(model, optimizer, "one vector of all")


def test_lbfgs_without_state_goes_on() -> None:
    model = layer()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)
    optimizer._numel()  # type: ignore[no-untyped-call]
    prune_attention(model, 0.5, optimizer=optimizer)
    train(model, optimizer)


def test_lbfgs_of_another_module_is_left_alone() -> None:
    model = layer()
    rest = torch.optim.LBFGS(model.linear1.parameters(), max_iter=2)
    attention = torch.optim.SGD([p for n, p in model.named_parameters() if "linear1" not in n], 0.1)
    train(model, rest)
    prune_attention(model, 0.5, optimizer=[rest, attention])
    train(model, rest)


# optimizers around optimizers


class Around(torch.optim.Optimizer):
    """As SAM is written: an optimizer with another one inside that shares its groups, and state of its own."""

    def __init__(self, params: Any, kind: Any, **options: Any) -> None:
        super().__init__(params, options)
        self.base_optimizer = kind(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["old_p"] = parameter.clone()
        self.base_optimizer.step()


class Slowly(torch.optim.Optimizer):
    """As Lookahead is written: its groups are the inner optimizer's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.defaults = optimizer, optimizer.defaults
        self.param_groups, self.state = optimizer.param_groups, {}  # type: ignore[assignment]

    def step(self, closure: Any = None) -> None:
        self.optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad()


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("way", ["SAM", "Lookahead", "both"])
def test_momentum_of_an_inner_optimizer_follows(way: str, rotated: bool) -> None:
    model, plain = layer(), layer()
    options = {"lr": 0.1, "momentum": 0.9}
    optimizer: Any = Slowly(torch.optim.SGD(model.parameters(), **options))
    inner = optimizer.optimizer
    if way != "Lookahead":
        optimizer = Around(model.parameters(), torch.optim.SGD, **options)
        inner = optimizer.base_optimizer
    if way == "both":
        optimizer = Slowly(optimizer)
    other = torch.optim.SGD(plain.parameters(), **options)
    train(model, optimizer)
    train(plain, other)
    plan = make_plan(model, 0.5, data=[X] if rotated else None, progress=False)
    apply_plan(model, plan, optimizer=optimizer)
    apply_plan(plain, plan, optimizer=other)
    assert {id(p) for p in inner.state} == {id(p) for p in model.parameters()}
    train(model, optimizer)
    train(plain, other)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_inner_optimizers_come_back_when_pruning_fails(monkeypatch: Any) -> None:
    model = layer()
    optimizer = Around(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    train(model, optimizer)
    before = copy.deepcopy((optimizer.state_dict(), optimizer.base_optimizer.state_dict()))
    monkeypatch.setattr("attnprune.surgery.verify.Verification.commit", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prune_attention(model, 0.5, optimizer=optimizer, example_inputs=X)
    now = (optimizer.state_dict(), optimizer.base_optimizer.state_dict())
    tree_map(lambda a, b: torch.testing.assert_close(a, b, rtol=0, atol=0), before, now)
    assert {id(p) for p in optimizer.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


# rotated plans


@pytest.mark.parametrize("make", [layer, bert])
def test_averages_of_weights_follow_as_weights_do(make: Any) -> None:
    """Before ``t0`` ASGD's averages are the parameters themselves."""
    model = make()
    optimizer = torch.optim.ASGD(model.parameters(), 1e-2)
    train(model, optimizer)
    data = [X if make is layer else IDS]
    prune_attention(model, 0.5, data=data, optimizer=optimizer, progress=False)
    for parameter in model.parameters():
        torch.testing.assert_close(optimizer.state[parameter]["ax"], parameter.detach())


@pytest.mark.parametrize("make", [layer, bert])
def test_step_sizes_stay_positive_and_within_what_they_were(make: Any) -> None:
    model = make()
    optimizer = torch.optim.Rprop(model.parameters(), 1e-2, step_sizes=(1e-4, 0.1))
    train(model, optimizer, 5)
    prune_attention(model, 0.5, data=[X if make is layer else IDS], optimizer=optimizer, progress=False)
    for parameter in model.parameters():
        size = optimizer.state[parameter]["step_size"]
        assert size.shape == parameter.shape
        assert 1e-4 * 0.99 <= float(size.min()) <= float(size.max()) <= 0.101
    train(model, optimizer)


def test_a_gain_of_queries_is_one_of_their_average_and_their_steps() -> None:
    """MPNet as the host runs it makes its softmax scale from the pruned head dim, so Q is multiplied."""
    config = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 16}
    model: Any = transformers.MPNetModel(transformers.MPNetConfig(vocab_size=50, **config), add_pooling_layer=False)
    for kind, key in ((torch.optim.ASGD, "ax"), (torch.optim.Rprop, "step_size")):
        one = copy.deepcopy(model).eval()
        optimizer = kind(one.parameters(), 1e-2)
        query = one.encoder.layer[0].attention.attn.q
        nn.init.normal_(query.bias)
        one(IDS).last_hidden_state[..., 0].square().mean().backward()
        optimizer.step()
        old, old_bias = query.weight, query.bias
        plan = make_plan(one, 0.5, scope="local", heads="uniform")
        before = optimizer.state[old][key].clone()
        with masked(one, plan):
            expected = one(IDS).last_hidden_state
        apply_plan(one, plan, optimizer=optimizer)
        rows = [8 * head + channel for head, kept in plan.layers[0].stays("q") for channel in kept]
        gain = (4 / 8) ** 0.5
        torch.testing.assert_close(query.weight, old[rows] * gain)
        torch.testing.assert_close(query.bias, old_bias[rows] * gain)
        torch.testing.assert_close(optimizer.state[query.weight][key], before[rows] * gain)
        torch.testing.assert_close(query.weight.grad, old.grad[rows] / gain)
        torch.testing.assert_close(one(IDS).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", ["hessian", "z"])
def test_state_of_unknown_meaning_is_refused_where_channels_are_mixed(key: str) -> None:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.state[model.self_attn.in_proj_weight][key] = torch.zeros(96, 32)
    refused(model, optimizer, key, data=[X])
    optimizer.state[model.self_attn.in_proj_weight]["momentum_buffer"] = torch.zeros(96, 32, dtype=torch.int8)
    refused(model, optimizer, "momentum_buffer|" + key, data=[X])
    prune_attention(model, 0.5, optimizer=optimizer)  # channels as they stand
