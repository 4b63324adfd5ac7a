"""Tuning what pruning left: never worse on what was held out, nothing else moves, one call in every face."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from math import cos, pi
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnprune
from attnprune import AttentionPruner, Recovery, apply_plan, estimate_recovery, make_plan, prune_attention, recover
from attnprune.cli import main
from attnprune.errors import AttnPruneError, CheckpointError, DataError, OptionError
from attnprune.families.registry import all_views
from attnprune.families.slots import Slot
from attnprune.recovery import costs, tuning
from attnprune.recovery import recover as recovering
from attnprune.recovery.objective import Objective
from attnprune.recovery.recover import Recovering, prepared
from attnprune.recovery.splitting import split
from attnprune.recovery.tuned import LowRank, Whole, updates_of
from attnprune.recovery.tuning import RISE
from attnprune.values.recovery import Length, RecoveryOptions

from .conformance import fresh, inputs
from .processes import forked, in_processes
from .selection import examples

Data = list[Tensor]


def build(dropout: float = 0.0, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout, batch_first=True)
    return nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)


def batches(count: int = 6, size: int = 4) -> Data:
    """Of a few directions, so that what is learnt of some holds for others."""
    chance = torch.Generator().manual_seed(1)
    basis = torch.randn(3, 16, generator=chance)
    return [torch.randn(size, 5, 3, generator=chance) @ basis for _ in range(count)]


@lru_cache(maxsize=None)
def _pruned() -> tuple[nn.Module, nn.Module]:
    dense = build().eval()
    model = copy.deepcopy(dense)
    prune_attention(model, 0.5, scorer="random")
    return model, dense


def pruned() -> tuple[nn.Module, nn.Module]:
    """A pruned model and the dense one."""
    model, dense = _pruned()
    return copy.deepcopy(model), copy.deepcopy(dense)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def held_loss(model: nn.Module, dense: nn.Module, held: Data) -> float:
    """What decides, computed by other means: the mean relative square of states after blocks and of the output."""
    losses = []
    for batch in held:
        states: list[list[Tensor]] = []
        for one in (model.eval(), dense):
            x, mine = batch, []
            for layer in one.layers:  # type: ignore[union-attr]
                x = layer(x)
                mine.append(x)
            states.append([*mine, x])
        parts = [(s - t).square().mean() / t.square().mean() for s, t in zip(*states, strict=True)]
        losses.append(float(torch.stack(parts).mean().detach()))
    return sum(losses) / len(losses)


# what it gives


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("AST", "Timm", "Latent", "Encoder")]


@pytest.mark.parametrize("name", ["MHA", "Bert", "Decoder", "Seq2Seq", *LONG])
def test_models_of_every_kind_come_nearer_and_nothing_else_moves(name: str) -> None:
    """Packed and fused projections, masks, cross-attention, rotary and grouped queries, expanded hosts; in training
    mode, with frozen layers, gradients, hooks and an optimizer of the user's."""
    dense = fresh(name, 0, torch.float32)
    model = fresh(name, 0, torch.float32, train=True)
    given = [inputs(name, 0, seed, torch.float32) for seed in range(2)]
    data = [{key: x.detach() if isinstance(x, Tensor) else x for key, x in batch.items()} for batch in given]
    prune_attention(model, 0.5, scorer="random", heads="ragged")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
        parameter.grad = torch.ones_like(parameter) if number % 3 == 1 else None
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    moments = copy.deepcopy(optimizer.state_dict())
    tuned = {id(one.parameter) for one in updates_of(model, all_views(model), (), Recovery())}
    before, others = bits(dense), [(p, p.detach().clone()) for p in model.parameters() if id(p) not in tuned]
    flags = [(p, p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modules = [(m, m.training, type(m), {k: v for k, v in vars(m).items() if k[:1] != "_"}) for m in model.modules()]
    chance = torch.get_rng_state()
    found = recover(model, dense, data, steps=6, seed=3, held_out=data)
    assert found.after < found.before
    assert same(before, bits(dense))
    assert all(torch.equal(p, value) for p, value in others)
    assert all(p.requires_grad == flag for p, flag, _ in flags)
    assert all(p.grad is None if grad is None else torch.equal(p.grad, grad) for p, _, grad in flags)
    for module, mode, kind, own in modules:
        assert (module.training, type(module)) == (mode, kind)
        assert vars(module).keys() >= own.keys()
        assert not module._forward_hooks
        assert "forward" not in vars(module)
    assert torch.equal(chance, torch.get_rng_state())
    assert str(moments) == str(optimizer.state_dict())


@pytest.mark.parametrize("layerwise", [False, True])
def test_what_is_said_is_what_was_held_out(layerwise: bool) -> None:
    model, dense = pruned()
    held = batches(8)[6:]
    before = held_loss(model, dense, held)
    found = recover(model, dense, batches(), steps=30, held_out=held, layerwise=layerwise)
    assert found.steps == 30
    assert found.before == pytest.approx(before, rel=1e-5)
    assert found.after == pytest.approx(held_loss(model, dense, held), rel=1e-5)
    assert found.after < 0.9 * found.before


@settings(max_examples=examples(30))
@given(
    lr=st.sampled_from([1e-9, 1e-3, 0.1, 3.0, 1e6, 1e30]),
    count=st.integers(1, 3),
    steps=st.integers(1, 12),
    spoilt=st.sampled_from(["nothing", "one batch", "every gradient", "every other gradient"]),
    options=st.sampled_from([{}, {"layerwise": True}, {"lora": 2}, {"norms": True}]),
)
def test_it_is_never_worse(lr: float, count: int, steps: int, spoilt: str, options: dict[str, Any]) -> None:
    model, dense = pruned()
    data, held = batches(count, 2), batches(5, 2)[3:]
    if spoilt == "one batch":
        data[0] = torch.full_like(data[0], torch.nan)
    if "gradient" in spoilt:
        calls = iter(range(10_000))
        every = spoilt.startswith("every g")
        layer = model.layers[1].linear1  # type: ignore[union-attr, index]

        def spoil(grad: Tensor) -> Tensor:
            return grad * torch.nan if every or next(calls) % 2 else grad

        def hear(module: nn.Module, args: Any, output: Tensor) -> None:
            if output.requires_grad:
                output.register_hook(spoil)

        layer.register_forward_hook(hear)
    values, before = bits(model), held_loss(model, dense, held)
    found = recover(model, dense, data, steps=steps, lr=lr, held_out=held, **options)
    after = held_loss(model, dense, held)
    assert found.after <= found.before
    assert after <= before * (1 + 1e-5)
    assert after == pytest.approx(found.after, rel=1e-4)
    if found.after == found.before or (spoilt == "every gradient" and "layerwise" not in options):
        assert same(values, bits(model))


def test_steps_whose_gradients_are_spoilt_are_left_out() -> None:
    model, dense = pruned()
    calls = iter(range(10_000))

    def hear(module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda grad: grad * torch.nan if next(calls) % 2 else grad)

    model.layers[1].linear1.register_forward_hook(hear)  # type: ignore[union-attr, index]
    found = recover(model, dense, batches(), steps=20, held_out=batches(8)[6:])
    assert found.after < 0.95 * found.before


def test_a_rate_is_found_by_what_there_is_to_recover() -> None:
    model, dense = pruned()
    with prepared(model, dense, batches(), all_views(model), Recovery(), None, None, False) as tuner:
        rates = []
        for loss in (1.0, 1e-2, 1e-4):
            tuner.now.before = loss
            rates.append(tuner.rate(RISE) / (1 + cos(pi * RISE)) * 2)
    assert rates == pytest.approx([0.01, 0.008, 0.0008])


def test_a_rate_that_is_too_large_is_cut_on_the_way() -> None:
    model, dense = pruned()
    found = recover(model, dense, batches(), steps=60, lr=3.0)
    assert found.after < 0.95 * found.before


def test_the_same_call_gives_the_same_weights_however_states_are_kept() -> None:
    results = []
    for options in ({"keep_states": True}, {"keep_states": False}, {"checkpointing": True}):
        model, dense = pruned()
        torch.manual_seed(len(results))
        recover(model, dense, batches(), steps=7, seed=4, **options)
        results.append(bits(model))
        assert not any("forward" in vars(module) for module in model.modules())
    assert all(same(results[0], other) for other in results[1:])
    model, dense = pruned()
    recover(model, dense, batches(), steps=7, seed=5)
    assert not same(results[0], bits(model))


def test_states_are_asked_for_once_where_they_are_kept() -> None:
    counts = []
    for keep in (True, False):
        model, dense = pruned()
        runs: list[int] = []
        dense.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        recover(model, dense, batches(), steps=15, keep_states=keep)
        counts.append(len(runs))
    assert counts == [6, 15 + 11]  # each batch once; each step, and each look at the one that is held out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_half_precision_learns_by_steps_that_it_could_not_hold(dtype: torch.dtype) -> None:
    model, dense = pruned()
    model, dense = model.to(dtype), dense.to(dtype)
    found = recover(model, dense, [x.to(dtype) for x in batches()], steps=40, lr=1e-3)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert found.after < found.before


def test_dropout_is_off_and_comes_back() -> None:
    results = []
    for dropout in (0.0, 0.5):
        dense = build(dropout).eval()
        model = copy.deepcopy(dense).train()
        prune_attention(model, 0.5, scorer="random")
        recover(model, dense, batches(), steps=5)
        assert model.training
        results.append(bits(model))
    assert same(*results)


def test_a_layer_that_runs_twice_is_tuned_once() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    dense = nn.Sequential(layer, layer)
    model = copy.deepcopy(dense)
    prune_attention(model, 0.5, scorer="random")
    for layerwise in (False, True):
        one = copy.deepcopy(model)
        found = recover(one, dense, batches(), steps=20, layerwise=layerwise)
        assert found.after < found.before
        assert one[0] is one[1]


# what is tuned


def test_updates_of_low_rank_are_of_low_rank() -> None:
    model, dense = pruned()
    before = bits(model)
    found = recover(model, dense, batches(), steps=20, lora=2)
    assert found.after < found.before
    changes = {name: value - before[name] for name, value in bits(model).items()}
    ranks = {name: int(torch.linalg.matrix_rank(x, rtol=1e-4)) for name, x in changes.items() if x.dim() == 2}
    assert set(ranks.values()) == {0, 2}
    assert all((rank == 2) == ("self_attn" in name) for name, rank in ranks.items())


def test_the_gradients_of_factors_are_those_of_the_product() -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    update = LowRank(weight, 2, torch.Generator().manual_seed(0))
    a, b = (tensor.clone().requires_grad_() for tensor in update.tensors)
    with torch.no_grad():
        b += 1.0
        update.tensors[1] += 1.0
    grad = torch.randn(6, 5)
    (update.base + b @ a).backward(grad)  # type: ignore[no-untyped-call]
    update.take(grad)
    for mine, wanted in zip(update.tensors, (a, b), strict=True):
        assert torch.allclose(mine.grad, wanted.grad)  # type: ignore[arg-type]
    update.write()
    assert torch.allclose(weight, update.base + b @ a)


def test_channels_that_are_no_attentions_stay() -> None:
    """A parameter that also holds what another part of the model reads."""
    owner = nn.Linear(3, 6)
    view = all_views(nn.TransformerEncoderLayer(16, 4, 32))[0]
    slots = {"q.weight": Slot(owner, "weight", 2, 0, 1), "k.weight": Slot(owner, "weight", 1, 0, 4)}
    slots |= {key: slot for key, slot in view.slots.items() if key in ("v.weight", "o.weight")}
    (update, *_) = updates_of(owner, [type(view)(view.spec, view.module, view.adapter, slots)], (), Recovery(lora=1))
    assert isinstance(update, Whole)
    update.take(torch.ones(6, 3))
    assert update.tensors[0].grad is not None
    assert update.tensors[0].grad[:, 0].tolist() == [0, 1, 1, 0, 1, 0]


def test_only_chosen_layers_and_norms_change() -> None:
    for options, wanted in (
        ({"include": "layers.1*"}, {"layers.1.self_attn"}),
        ({"norms": True}, {f"layers.{i}.{part}" for i in (0, 1) for part in ("self_attn", "norm1", "norm2")}),
    ):
        model, dense = pruned()
        before = bits(model)
        recover(model, dense, batches(), steps=10, **options)
        changed = {name for name, value in bits(model).items() if not torch.equal(value, before[name])}
        assert {next(one for one in wanted if name.startswith(one)) for name in changed} == wanted


def test_labels_and_divergence_count_where_they_are_asked_for() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(build(), nn.Linear(16, 5)).eval()
    pairs = [(x, torch.randint(5, (4, 5))) for x in batches()]
    model = copy.deepcopy(dense)
    prune_attention(model, 0.5, scorer="random")

    def told(**options: Any) -> float:
        return recover(copy.deepcopy(model), dense, pairs, steps=1, lr=1e-9, **options).before

    plain, weighed = told(), told(labels=0.5)
    (held,) = split(pairs, Recovery(steps=1)).held
    loss = nn.functional.cross_entropy(model.eval()(held[0]).flatten(0, 1), held[1].flatten())
    assert weighed - plain == pytest.approx(0.5 * float(loss.detach()), rel=1e-4)
    apart = [attnprune.distillation_loss(model(held[0]), dense(held[0]), temperature=2.0)]
    assert told(kl=3.0, temperature=2.0) - plain == pytest.approx(3 * float(apart[0].detach()), rel=1e-4)
    with pytest.raises(DataError, match="a scalar loss"):
        recover(copy.deepcopy(model), dense, batches(), steps=1, labels=1.0)


def test_batches_that_only_loss_fn_understands() -> None:
    model, dense = pruned()
    data = [{"strange": x} for x in batches()]
    found = recover(model, dense, data, steps=10, loss_fn=lambda m, batch: m(batch["strange"]).sum())
    assert found.after < found.before


# how long


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (7, Length(7, "steps")),
        ("7", Length(7, "steps")),
        ("60s", Length(60, "seconds")),
        ("1.5 min", Length(90, "seconds")),
        ("2h", Length(7200, "seconds")),
        ("0.5 epochs", Length(0.5, "epochs")),
    ],
)
def test_lengths_that_are_read(text: Any, wanted: Length) -> None:
    assert Length.parse(text) == wanted


@pytest.mark.parametrize("text", [0, -1, True, 2.5, "", "s", "-3s", "0s", "1.5", "3 days", "nan", None, [3]])
def test_lengths_that_are_refused(text: Any) -> None:
    with pytest.raises(OptionError, match="a number of steps"):
        Length.parse(text)


def test_budgets_of_epochs_and_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, dense = pruned()
    assert recover(model, dense, batches(8), "2 epochs").steps == 14  # one of eight is held out
    looks = itertools.count()  # at a clock on which each takes 10 ms, however busy the machine is
    clock = SimpleNamespace(monotonic=lambda: next(looks) / 100)
    for module in (tuning, recovering):
        monkeypatch.setattr(module, "time", clock)
    found = recover(model, dense, batches(), "0.4s")
    assert found.steps > 1
    assert 0.3 < found.seconds < 0.5


def test_data_are_read_no_further_than_the_steps_need() -> None:
    model, dense = pruned()

    def endless() -> Iterator[Tensor]:
        while True:
            yield batches(1)[0]

    assert recover(model, dense, endless(), steps=3).steps == 3


def test_what_is_held_out() -> None:
    some = [torch.full((4, 2), float(number)) for number in range(40)]
    train, held = split(some, Recovery(seed=1))
    assert (len(train), len(held)) == (36, 4)
    assert sorted(float(x[0, 0]) for x in (*train, *held)) == [float(number) for number in range(40)]
    assert [x[0, 0] for x in held] != [x[0, 0] for x in split(some, Recovery(seed=2)).held]
    pair = (torch.arange(10.0)[:, None], torch.arange(10))
    train, held = split([pair], Recovery(held_out=0.25))
    assert sorted([*train[0][1].tolist(), *held[0][1].tolist()]) == list(range(10))
    assert len(held[0][1]) == 3
    assert held[0][0][:, 0].tolist() == held[0][1].tolist()
    loader = torch.utils.data.DataLoader(torch.arange(6.0), shuffle=True)
    chance = torch.get_rng_state()
    split(loader, Recovery())
    assert torch.equal(chance, torch.get_rng_state())


def test_an_estimate_leaves_no_trace() -> None:
    model, dense = pruned()
    before = bits(model)
    for length in (20, "2s"):
        found = estimate_recovery(model, dense, batches(), length)
        assert same(before, bits(model))
        assert found.steps == 20 or length == "2s"
        assert found.seconds == pytest.approx(found.steps * found.step + 11 * found.look, rel=0.5)
    values = sum(one.parameter.nbytes for one in updates_of(model, all_views(model), (), Recovery()))
    assert found.bytes > 5 * values  # gradients, two moments, two copies
    assert "beside both models" in str(found)
    ours, theirs = ([*inspect.signature(one).parameters.values()] for one in (estimate_recovery, recover))
    assert ours == theirs


LENGTHS = {
    "equal": [5] * 12, "rising": [*range(1, 31)], "a long tail": [2] * 20 + [40, 60, 90],
    "two": [1, 9, 2], "one": [3, 3],
}  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("hiccup", [False, True])
@pytest.mark.parametrize("steps", [1, 17, 200, "9s"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_an_estimate_holds_where_batches_are_not_alike(
    lengths: list[int], steps: int | str, hiccup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that is set by what is computed; one step takes ten times as long as it should."""
    model, dense = pruned()
    clock, met = [0.0], set[Any]()
    gradients = Objective.gradients

    def timed(self: Objective, key: Any, batch: Tensor, *rest: Any) -> Any:
        slow = 10 if hiccup and len(met) == 2 < len(lengths) - 1 else 1
        clock[0] += (0.02 + 0.01 * batch.shape[1]) * (1.0 if key in met else 1.4 * slow)
        met.add(key)
        return gradients(self, key, batch, *rest)

    monkeypatch.setattr(Objective, "gradients", timed)
    monkeypatch.setattr(costs, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    for module in (tuning, recovering):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    data = [torch.randn(2, length, 16) for length in lengths]
    said = estimate_recovery(model, dense, data, steps, held_out=data[:1])
    hiccup, clock[0] = False, 0.0
    met.clear()
    found = recover(model, dense, data, steps, held_out=data[:1])
    assert said.seconds == pytest.approx(clock[0], rel=0.3)
    assert said.steps == found.steps or (steps == "9s" and said.steps == pytest.approx(found.steps, rel=0.3))


def test_the_memory_that_an_estimate_says_is_that_of_the_largest_batch() -> None:
    model, dense = pruned()
    long, short = torch.randn(2, 300, 16), torch.randn(2, 3, 16)

    def said(data: Data, seed: int = 0) -> int:
        return estimate_recovery(model, dense, data, 40, seed=seed, held_out=[short]).bytes

    mixed = {said([short] * 9 + [long], seed) for seed in range(4)}
    assert len(mixed) == 1
    assert said([short] * 10) < max(mixed) < said([long] * 10)
    assert max(mixed) - said([short] * 10) > 10 * long.nbytes  # what is kept for the pass back


# stopped, and faults


class Stopped(BaseException):
    pass


def stopping(after: int) -> Callable[[nn.Module, Tensor], Tensor]:
    """Runs models until one has run with gradients so many times."""
    runs = iter(range(10_000))

    def loss_fn(model: nn.Module, batch: Tensor) -> Tensor:
        if torch.is_grad_enabled() and next(runs) >= after:
            raise Stopped
        return model(batch).sum()  # type: ignore[no-any-return]

    return loss_fn


@pytest.mark.parametrize("options", [{}, {"lora": 2, "lr": 3.0}])
def test_what_was_stopped_goes_on_bitwise(options: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    arguments: dict[str, Any] = {"steps": 20, "resume": file, "seed": 2, **options}
    model, dense = pruned()
    before = bits(model)
    with pytest.raises(Stopped):
        recover(model, dense, batches(), loss_fn=stopping(13), **arguments)
    assert same(before, bits(model))
    whole, _ = pruned()
    wanted = recover(whole, dense, batches(), loss_fn=stopping(99), **{**arguments, "resume": None})
    found = recover(model, dense, batches(), loss_fn=stopping(9), **arguments)  # the 12 before are not taken again
    assert found[:3] == wanted[:3]
    assert same(bits(whole), bits(model))
    again, _ = pruned()
    assert recover(again, dense, batches(), loss_fn=stopping(0), **arguments)[:3] == wanted[:3]
    assert same(bits(whole), bits(again))
    for other in ({"seed": 3}, {"lr": 0.1}):
        with pytest.raises(CheckpointError, match="the same model"):
            recover(pruned()[0], dense, batches(), loss_fn=stopping(99), **{**arguments, **other})
    file.write_bytes(b"no such thing")
    with pytest.raises(CheckpointError, match="a file that recovery wrote"):
        recover(pruned()[0], dense, batches(), **arguments)


def test_faults_are_named_before_anything_changes() -> None:
    model, dense = pruned()
    before = bits(model)
    sharing = copy.copy(model)
    data = batches()
    nan = [torch.full_like(x, torch.nan) for x in data]
    for call, match in (
        (lambda: recover(model, model, data), "the pruned model itself"),
        (lambda: recover(model, sharing, data), "which the pruned model uses too"),
        (lambda: recover(model, build(depth=1), data), "a block layers.1"),
        (lambda: recover(model, dense, data[0]), "an iterable of batches"),
        (lambda: recover(model, dense, []), "at least one batch"),
        (lambda: recover(model, dense, [data[0][:1]]), "others to stop by"),
        (lambda: recover(model, dense, nan), "a finite loss"),
        (lambda: recover(model, dense, data, layerwise=True, kl=1.0), "none with layerwise"),
        (lambda: recover(model, dense, data, lr=0.0, lora=0), "found 2"),
        (lambda: recover(model, dense, data, laerning_rate=1.0), "recover: "),  # type: ignore[call-arg]
        (lambda: recover(model, dense, data, kl=1.0, loss_fn=lambda m, x: m.layers[1](m.layers[0](x)).sum()), "kl"),
        (lambda: recover(model, dense, data, loss_fn=lambda m, x: x.sum()), "capture"),
        (lambda: recover(model, dense, data, layerwise=True, loss_fn=lambda m, x: x.sum()), "capture"),
        (lambda: prune_attention(build(), 0.5, recover=3), "data to tune on"),
        (lambda: prune_attention(build(), 0.5, data=data, recover={"step": 3}), "steps"),
    ):
        with pytest.raises(AttnPruneError, match=match):
            call()
        assert same(before, bits(model))


def test_typed_keys_are_the_fields() -> None:
    assert RecoveryOptions.__optional_keys__ | {"steps"} == {*Recovery.__dataclass_fields__}


# the faces


def test_pruning_and_tuning_in_one_call() -> None:
    """Also where V and O stay, whose parameters the dense copy must not share; the optimizer goes on."""
    by_hand, dense = build().eval(), build().eval()
    options: dict[str, Any] = {"data": batches(), "progress": False}
    prune_attention(by_hand, {"qk": 0.5}, **options)
    wanted = recover(by_hand, dense, batches(), steps=12)
    model = build().eval()
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    report = prune_attention(model, {"qk": 0.5}, recover=12, optimizer=optimizer, **options)
    assert report.recovered is not None
    assert report.recovered[:3] == wanted[:3]
    assert same(bits(by_hand), bits(model))
    assert {id(p) for p in model.parameters()} == {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert f"recovered: held-out loss {wanted.before:.4g}" in str(report)
    assert report.to_dict()["recovered"]["steps"] == 12
    other = build().eval()
    plan = make_plan(other, {"qk": 0.5}, recover=12, **options)
    found = apply_plan(other, plan, data=iter(batches()), recover={"steps": 12}).recovered
    assert found is not None
    assert found[:3] == wanted[:3]
    assert same(bits(by_hand), bits(other))


def test_a_fault_while_tuning_undoes_the_pruning() -> None:
    model = build().eval()
    before, parameters = bits(model), list(model.parameters())
    with pytest.raises(Stopped):
        prune_attention(
            model, {"qk": 0.5}, scorer="magnitude", data=batches(), recover=10, verify=False, loss_fn=stopping(4)
        )
    assert same(before, bits(model))
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))


def test_tuning_can_be_undone() -> None:
    model = build().eval()
    before, plan = bits(model), make_plan(model, {"qk": 0.5})
    step = Recovering(model, plan, Recovery(3), batches(), progress=False)
    with torch.no_grad():
        model.layers[1].self_attn.in_proj_weight.mul_(0.9)  # type: ignore[union-attr, index, operator]
    step.commit()
    assert not same(before, bits(model))
    step.undo()
    assert same(before, bits(model))


def test_only_what_is_tuned_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    shared: list[set[str]] = []
    made = Objective.__init__

    def init(self: Objective, model: nn.Module, dense: nn.Module, *rest: Any) -> None:
        mine = {id(p) for p in model.parameters()}
        shared.append({name.split(".")[2] for name, p in dense.named_parameters() if id(p) in mine})
        made(self, model, dense, *rest)

    monkeypatch.setattr(Objective, "__init__", init)
    prune_attention(build().eval(), 0.5, data=batches(), recover=1)
    assert shared == [{"linear1", "linear2", "norm1", "norm2"}]


def test_a_pruner_tunes_after_each_step() -> None:
    model = build().eval()
    pruner = AttentionPruner(model, 0.5, steps=2, data=batches(), recover=5, progress=False)
    while not pruner.done:
        report = pruner.step()
        assert report.recovered is not None
        assert report.recovered.after < report.recovered.before


def test_the_command_tunes_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import transformers
    from safetensors.torch import save_file

    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    config = transformers.ViTConfig(**size, image_size=16, patch_size=8, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "dense")
    save_file({"pixel_values": torch.randn(32, 3, 16, 16)}, tmp_path / "data.safetensors")
    words = ["prune", f"{tmp_path}/dense", "--qkvo", ".5", "--recover", "20", "--quiet"]
    assert main([*words, "-o", f"{tmp_path}/none"]) == 1
    assert "data to tune on" in capsys.readouterr().err
    assert main([*words, "--data", f"{tmp_path}/data.safetensors", "-o", f"{tmp_path}/small"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("recovered: held-out loss"))
    assert "in 20 steps" in line
    assert main(["report", f"{tmp_path}/small"]) == 0
    assert line in capsys.readouterr().out


# several processes


def _tunes(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/at", rank=rank, world_size=2)
    model, dense = pruned()
    model, dense = model.double(), dense.double()
    data = [x.double() for x in batches()]
    with attnprune.across_processes():
        found = recover(model, dense, data[2 * rank : 2 * rank + 2], steps=4, held_out=data[4 + rank : 5 + rank])
    torch.save((found[:3], bits(model)), f"{folder}/{rank}")
    spoilt = [x * (torch.nan if rank else 1.0) for x in data]
    try:
        with attnprune.across_processes():
            recover(model, dense, spoilt, steps=4)
    except AttnPruneError as error:
        torch.save(type(error).__name__, f"{folder}/error{rank}")
    torch.distributed.destroy_process_group()


@forked
@pytest.mark.long
def test_processes_share_their_gradients_and_their_faults(tmp_path: Path) -> None:
    in_processes(2, _tunes, str(tmp_path))
    (one, mine), (other, theirs) = (torch.load(tmp_path / str(rank), weights_only=False) for rank in (0, 1))
    assert one == other
    assert same(mine, theirs)
    assert one[1] < one[0]
    assert {torch.load(tmp_path / f"error{rank}") for rank in (0, 1)} <= {"DataError", "ProcessError"}
