"""Choices that need no manual: absolute budgets, what was asked, what to believe, slow shapes, errors that help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnprune
from attnprune import AttentionPruner, AttentionSpec, LatencyTable, Request, bars, errors, make_plan, prune_attention
from attnprune.cli import main, timing
from attnprune.cost.latency import timing as latency_timing
from attnprune.cost.latency.table import Grid
from attnprune.values.budget import Budget, Ceiling

X = torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))


def encoder(width: int = 16) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


def table(seconds: float = 0.04, shares: tuple[float, ...] = (0.1, 0.2, 0.25, 0.3)) -> LatencyTable:
    grid = Grid((2,), (4, 8), (4, 8), shares)
    layers = tuple((f"layers.{i}.self_attn", 0) for i in range(2))
    return LatencyTable({"device": "cpu"}, seconds, 0.4, layers, (grid,), step=4, rounds=3)


# budgets in their own units


@pytest.mark.parametrize(
    ("resource", "value", "most"),
    [("latency", "20ms", 0.02), ("latency", " 1.5 s ", 1.5), ("latency", "300us", 3e-4), ("latency", "300 µs", 3e-4),
     ("macs", 4e9, 4e9), ("params", 10_000_000, 1e7), ("params", 1.5, 1.5)],
)  # fmt: skip
def test_amounts_are_read(resource: Any, value: Any, most: float) -> None:
    request = Request.parse(**{f"target_{resource}": value}, example_inputs=0)
    assert request.amount == Ceiling(resource, pytest.approx(most))
    assert request.rules.split == "auto"
    assert request.timed == (resource == "latency")


@pytest.mark.parametrize(
    ("resource", "value"),
    [("latency", "20"), ("latency", 20), ("latency", "-3ms"), ("latency", "1.2.3s"), ("latency", "0ms"),
     ("macs", "4G"), ("macs", 1), ("macs", -5e9), ("params", float("inf")), ("params", float("nan")), ("params", True)],
)  # fmt: skip
def test_other_amounts_are_refused_with_an_example(resource: Any, value: Any) -> None:
    example = {"latency": '"20ms"', "macs": "4e9", "params": "10_000_000"}[resource]
    with pytest.raises(errors.OptionError, match=f"target_{resource}: expected a number in .0, 1.: .*{example}"):
        Request.parse(**{f"target_{resource}": value}, example_inputs=0)


def test_an_amount_is_the_share_that_it_is_of_the_model() -> None:
    model = encoder()
    params = sum(p.numel() for p in model.parameters())
    macs = attnprune.prune_attention(encoder(), 0.5, example_inputs=X).macs
    assert macs is not None
    for absolute, share, more in (
        ({"target_params": 0.8 * params}, {"target_params": 0.8}, {}),
        ({"target_macs": 0.8 * macs[0]}, {"target_macs": 0.8}, {"example_inputs": X}),
        ({"target_latency": "32ms"}, {"target_latency": 0.8}, {"latency": table()}),
    ):
        options: dict[str, Any] = more
        plan = make_plan(model, **absolute, **options)
        assert plan.layers == make_plan(model, **share, **options).layers
        assert plan.asked is not None
        assert plan.asked.budget is not None
        assert plan.asked.budget.share == pytest.approx(0.8)
        assert attnprune.Plan.from_json(plan.to_json()) == plan
    report = prune_attention(encoder(), target_params=3500)
    assert report.model_parameters[1] <= 3500


@pytest.mark.parametrize(
    ("options", "least", "asked"),
    [
        ({"target_params": 100}, r"2,\d\d\d parameters", "100 parameters"),
        ({"target_macs": 1000.0, "example_inputs": X}, r"\d\d,\d\d\d multiply-adds", "1,000 multiply-adds"),
        ({"target_latency": "20ms", "latency": table()}, "24.00 ms", "20.00 ms"),
    ],
)
def test_what_cannot_be_reached_says_the_least_possible(options: dict[str, Any], least: str, asked: str) -> None:
    with pytest.raises(
        errors.AllocationError, match=rf"expected at least {least}, what is left when .* found {asked}\."
    ):
        make_plan(encoder(), **options)


def test_the_least_that_is_named_is_possible() -> None:
    with pytest.raises(errors.AllocationError) as caught:
        make_plan(encoder(), target_params=2)
    least = int(caught.value.expected.split()[2].replace(",", ""))
    assert prune_attention(encoder(), target_params=least).model_parameters[1] == least
    with pytest.raises(errors.AllocationError):
        make_plan(encoder(), target_params=least - 1)


def test_a_model_that_is_small_enough_is_said_to_be() -> None:
    with pytest.raises(errors.OptionError, match="expected less than the 4,448 parameters that the model takes now"):
        make_plan(encoder(), target_params=5000)


def test_a_pruner_approaches_an_amount() -> None:
    pruner = AttentionPruner(encoder(), target_params=3500, steps=2, scorer="magnitude")
    assert pruner.budget == Budget("params", 3500 / 4448)
    while not pruner.done:
        pruner.step()
    assert pruner.report.model_parameters[1] <= 3500
    with pytest.raises(errors.OptionError, match="target_latency: expected a latency table, for runs"):
        AttentionPruner(encoder(), target_latency="20ms", example_inputs=X)
    timed = AttentionPruner(encoder(), target_latency="32ms", latency=table(), scorer="magnitude", steps=1)
    assert timed.budget is not None
    assert timed.budget.share == pytest.approx(0.8)


# what was asked


def test_asked_says_what_was_asked() -> None:
    fixed = prune_attention(encoder(), {"qk": 0.5, "vo": 0.25})
    assert fixed.asked == {"q": 0.5, "k": 0.5, "v": 0.25, "o": 0.25}
    assert str(fixed).splitlines()[6].split() == ["asked", "-50.0%", "-50.0%", "-25.0%", "-25.0%"]
    found = prune_attention(encoder(), {"qk": 0.5, "vo": 0.25}, split="auto")
    assert found.asked == found.to_dict()["asked"] == {"qkvo": 0.375}
    assert "asked: -37.5% of q, k, v and o together" in str(found)
    assert not any(line.startswith("asked  ") for line in str(found).splitlines())
    budget = prune_attention(encoder(), target_params=0.8)
    assert budget.asked == {"params": 0.8}
    assert "budget: model parameters x 0.800" in str(budget)
    assert prune_attention(encoder(), target_error=0.1).asked == {"error": 0.1}


def test_a_saved_report_remembers_it(tmp_path: Path) -> None:
    for number, options in enumerate(({"qkvo_ratios": 0.5, "split": "auto"}, {"target_params": 0.9})):
        model = encoder()
        report = prune_attention(model, **options)  # type: ignore[arg-type]
        folder = attnprune.save_pruned(model, tmp_path / str(number), report=report)
        assert attnprune.read_report(folder).asked == report.asked


# benchmarks


class Model(nn.Module):
    """Takes as long as it is told to, by a clock of its own."""

    now = 0.0

    def __init__(self, seconds: list[float]) -> None:
        super().__init__()
        self.seconds, self.calls = seconds, 0

    def forward(self) -> None:
        self.calls += 1
        Model.now += self.seconds[self.calls % len(self.seconds)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured is the clock of :class:`Model`, which begins anew: sums of many numbers are rounded."""
    monkeypatch.setattr(Model, "now", 0.0)
    monkeypatch.setattr(latency_timing, "perf_counter", lambda: Model.now)
    monkeypatch.setattr(latency_timing.gc, "collect", lambda: 0)  # takes longer than all else here


@pytest.mark.parametrize(("seconds", "calls"), [(0.01, 63), (0.1, 63), (1.0, 10), (8.0, 2), (30.0, 2)])
@pytest.mark.usefixtures("clock")
def test_a_benchmark_ends_in_time(seconds: float, calls: int) -> None:
    ours, theirs = Model([seconds]), Model([seconds])
    found = timing.compare(ours, theirs, {}, None, 1, 20.0)
    assert ours.calls == calls, "a warm-up at least, and a round that counts"
    assert found.rounds <= calls
    assert Model.now <= max(20.0, 4 * seconds) + 1e-6
    assert ("too few" in found.doubt) == (found.rounds < 5)


@pytest.mark.usefixtures("clock")
def test_a_bar_expects_as_many_rounds_as_fit_into_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []

    class Shown(bars.Lines):
        def update(self, n: int = 1) -> None:
            super().update(n)
            told.append((self.n, self.total or 0))

    monkeypatch.setattr(latency_timing, "bar", lambda **how: Shown(None, how["what"], False, how["total"]))
    timing.compare(Model([1.0]), Model([1.0]), {}, None, 1, 20.0)
    assert told == [(n, 10) for n in range(1, 11)], "two seconds a round"


@pytest.mark.usefixtures("clock")
def test_a_noisy_machine_is_not_believed() -> None:
    quiet = timing.compare(Model([0.8]), Model([1.0]), {}, 8, 1)
    assert (quiet.ratio, quiet.rounds, quiet.doubt) == (pytest.approx(0.8), 8, "")
    noisy = timing.compare(Model([0.8, 1.2, 2.0]), Model([1.0]), {}, 9, 1)
    assert "too noisy to believe" in noisy.doubt
    assert "--seconds" in noisy.doubt


# shapes that are slow


def test_shapes_that_are_slow_where_they_were_measured_are_noted() -> None:
    ragged = prune_attention(encoder(), 0.5, heads="ragged", scorer="random")
    (note,) = ragged.notes
    assert note.startswith("may run no faster than dense, as 2 layers have heads of several sizes")
    assert 'preset="fast"' in note
    assert f"note: {note}" in str(ragged)
    assert prune_attention(encoder(), 0.5).notes == ()
    assert prune_attention(encoder(512), 0.5, heads="ragged", scorer="random").notes == ()


class Capped(nn.Module):
    """Attention whose logits no forward of ours makes."""

    def __init__(self, heads: str) -> None:
        super().__init__()
        setattr(self, heads, 2)
        self.called = heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part(x).unflatten(-1, (getattr(self, self.called), -1)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        found: torch.Tensor = self.o_proj((torch.tanh(q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
        return found


def test_layers_that_run_expanded_are_noted_with_what_helps_them() -> None:
    report = prune_attention(Capped("num_heads"), {"qk": 0.5}, heads="ragged", scorer="random")
    assert report.ways[""].startswith("expanded")
    (note,) = report.notes
    assert note.startswith("may run no faster than dense, as 1 layers run expanded")
    assert "uniform" not in note, "even heads would not help"
    assert prune_attention(Capped("num_heads"), 0.5, granularity="head").notes == ()


def test_what_is_missing_of_an_attention_is_said() -> None:
    (skipped,) = attnprune.skipped_attention(nn.Sequential(Capped("parts")))
    assert "a number of heads is not among its attributes" in skipped.why


def test_a_plan_that_a_table_predicts_to_be_slow_warns() -> None:
    slow, fast = table(shares=(0.4, 0.4, 0.4, 0.3)), table()
    with pytest.warns(
        errors.AttnPruneWarning, match=r"predicted to take 1\.200 of the dense model's time: .*multiples of 8"
    ):
        make_plan(encoder(), 0.5, scope="local", latency=slow)
    make_plan(encoder(), 0.5, scope="local", latency=fast)
    make_plan(encoder(), 0.5, heads="ragged", scorer="random", latency=slow)  # no table tells their time
    spec = AttentionSpec.of("layers.0.self_attn", heads=2, head_dim=8, d_model=16)
    assert slow.predict([spec.keep(range(2), (4, 4), (4, 4))]) > 1


# errors that say what is wrong


class Grid2d(nn.Module):
    """Takes (batch, tokens, width), and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, _, _ = x.shape
        found: torch.Tensor = self.inner(x)
        return found


def test_a_sample_that_is_no_batch_is_named() -> None:
    wrong = "expected a batch, with samples along the first dimension, found a .*6, 16.*x.None."
    for call in (
        lambda: prune_attention(Grid2d(), 0.5, data=[X[0]] * 3),
        lambda: attnprune.calibrate(Grid2d(), [{"x": X[0]}]),
        lambda: attnprune.score_attention(Grid2d(), "gate", data=[X[0]]),
    ):
        with pytest.raises(errors.DataError, match=f"data: {wrong}"):
            call()
    with pytest.raises(errors.DataError, match=f"example_inputs: {wrong}"):
        prune_attention(Grid2d(), 0.5, example_inputs=X[0])
    with pytest.raises(errors.DataError, match="data: expected tensors, found a dict"):
        attnprune.calibrate(Grid2d(), [{"x": [1, 2, 3]}])


def test_other_errors_of_a_model_stay_its_own() -> None:
    class Broken(Grid2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        attnprune.calibrate(Broken(), [X])


@pytest.mark.parametrize("command", ["inspect", "report", "plan", "bench"])
def test_a_directory_that_is_not_there_is_named_without_transformers(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    more = {"plan": ["--qkvo", ".5"], "bench": ["--against", "/nope"]}.get(command, [])
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "transformers.utils", None)
    assert main([command, str(tmp_path / "nope"), *more]) == 1
    assert "nope: expected a directory, found nothing. Check the path;" in capsys.readouterr().err
