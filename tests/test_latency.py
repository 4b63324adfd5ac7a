"""Latency tables: what is measured, by a clock that the tests move; what is kept, and what is trusted."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnprune
from attnprune import AttentionSpec, LatencyTable, errors
from attnprune.cost.latency import cache, measure, measure_plan, shaped, timing
from attnprune.cost.latency.table import Grid
from attnprune.families import find_views
from attnprune.surgery import Surgeon

# the table


def table(**changes: Any) -> LatencyTable:
    grid = Grid((2, 4), (4, 8), (4, 8), (0.01, 0.02, 0.03, 0.04, 0.05, 0.08, 0.09, 0.1))
    other = Grid((1,), (2,), (3,), (0.2,))
    given = {"machine": {"device": "cpu"}, "seconds": 0.5, "rest": 0.5, "layers": (("a", 0), ("b", 1)),
             "grids": (grid, other), "step": 4, "rounds": 3}  # fmt: skip
    return LatencyTable(**{**given, **changes})


def spec(name: str = "a", heads: int = 4, qk: int = 8, vo: int = 8) -> AttentionSpec:
    return AttentionSpec.of(name, heads=heads, head_dim=8, d_model=16).keep(range(heads), [qk] * heads, [vo] * heads)


def test_measured_shapes_are_as_measured_and_others_between_them() -> None:
    found = {(h, q, v): table().share(spec("a", h, q, v)) for h in (2, 3, 4) for q in (4, 8) for v in (4, 6, 8)}
    assert (found[2, 4, 4], found[2, 4, 8], found[2, 8, 4], found[4, 8, 8]) == (0.01, 0.02, 0.03, 0.1)
    assert found[3, 4, 8] == pytest.approx((0.02 + 0.08) / 2)
    assert found[4, 8, 6] == pytest.approx((0.09 + 0.1) / 2)
    assert table().share(spec("a", 4, 6, 6)) == pytest.approx((0.05 + 0.1) / 2), "between equal dims"
    assert table().predict([spec(), spec("b", 1, 2, 3)]) == 1.0
    assert table().predict([spec("a", 2, 4, 8)]) == pytest.approx(1 - (0.1 - 0.02)), "layers without a spec stay dense"


@settings(max_examples=40)
@given(st.data())
def test_interpolation_stays_between_the_neighbours(data: st.DataObject) -> None:
    axes = [tuple(sorted(data.draw(st.sets(st.integers(1, 12), min_size=1, max_size=4)))) for _ in range(3)]
    count = len(axes[0]) * len(axes[1]) * len(axes[2])
    grid = Grid(*axes, tuple(data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))))
    shape = tuple(data.draw(st.integers(1, 13)) for _ in range(3))
    found = grid.share(*shape)
    inside = all(axis[0] <= value <= axis[-1] for axis, value in zip(axes, shape, strict=True))
    assert (found is None) == (not inside)
    if found is not None:
        near = [[i for i, level in enumerate(axis) if level == value]
                or [max(i for i, level in enumerate(axis) if level < value),
                    min(i for i, level in enumerate(axis) if level > value)]
                for axis, value in zip(axes, shape, strict=True)]  # fmt: skip
        around = [grid.at(h, q, v) for h in near[0] for q in near[1] for v in near[2]]
        assert min(around) - 1e-12 <= found <= max(around) + 1e-12


@pytest.mark.parametrize(
    ("one", "words"),
    [
        (spec("c"), r"c: expected an attention module in the latency table \(\['a', 'b'\]\)"),
        (spec("a", 1), "2 to 4 heads"),
        (spec("a", 4, 2), "4 to 8 qk"),
        (spec("a").keep(range(2), (8, 4), (8, 8)), "equal heads"),
    ],
)
def test_shapes_that_were_not_measured(one: AttentionSpec, words: str) -> None:
    with pytest.raises(errors.LatencyError, match=words):
        table().share(one)


def test_json_round_trip() -> None:
    text = table().to_json()
    assert LatencyTable.from_json(text) == table()
    assert LatencyTable.from_json(text.encode()).to_json() == text


FINE = (("machine",), {}), (("layers",), []), (("layers", 0, 0), "x"), (("layers", 1, 0), "x")


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from places(value, (*path, key))


def test_malformed_tables_are_refused() -> None:
    tree = json.loads(table().to_json())

    def put(path: tuple[Any, ...], value: Any) -> str:
        copied = json.loads(json.dumps(tree))
        node = copied
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return json.dumps(copied)

    texts = ["", "[]", "{", table().to_json()[:-9], "null"]
    for path in list(places(tree))[1:]:
        values = [None, 3 if path[0] == "machine" else "x", -1, [], {}, True, 1e308]
        texts += [put(path, value) for value in values if (path, value) not in FINE]
    for path, value in (
        (("grids", 0, "qk"), [8, 4]),
        (("layers", 0, 1), 2),
        (("layers", 1, 0), "a"),
        (("version",), 2),
    ):
        texts.append(put(path, value))
    for text in texts:
        with pytest.raises(errors.LatencyError):
            LatencyTable.from_json(text)


# measuring, by a clock of our own


class Clock:
    """Time passes only where a Linear runs: one millisecond per output channel, slower while the machine is busy."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.calls = 0.0, 0
        monkeypatch.setattr(timing, "perf_counter", lambda: self.now)

    def watch(self, model: nn.Module) -> nn.Module:
        def tick(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            self.calls += 1
            busy = 3.0 if (self.calls // 250) % 3 == 0 else 1.0
            self.now += 0.001 * busy * output.shape[-1]

        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(tick)
        return model


def vit(layers: int = 4) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48, image_size=8,
                  patch_size=4),
        add_pooling_layer=False,
    ).train()  # fmt: skip


X = torch.zeros(1, 3, 8, 8)
DENSE = 4 * (3 * 32 + 32 + 48 + 32)
"""Milliseconds of a forward pass by that clock: in each layer Q, K, V, O and two of the MLP."""


def test_the_table_has_what_the_clock_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)  # passes are timed once: nothing but the clock takes time
    clock = Clock(monkeypatch)
    model = clock.watch(vit())
    found = measure(model, X, seconds=1e-9, cache=False, round_to=2)
    (grid,) = found.grids
    assert (grid.heads, grid.qk, grid.vo) == ((4,), (2, 4, 6, 8), (2, 4, 6, 8))
    assert [number for _, number in found.layers] == [0] * 4
    assert found.rest == pytest.approx(4 * (48 + 32) / DENSE)
    for i, qk in enumerate(grid.qk):
        for j, vo in enumerate(grid.vo):
            assert grid.at(0, i, j) == pytest.approx((4 * (2 * qk + vo) + 32) / DENSE), (qk, vo)
    plan = attnprune.make_plan(model, target_latency=0.85, latency=found)
    assert plan.asked is not None
    assert plan.asked.budget is not None
    report = attnprune.apply_plan(model, plan, example_inputs=X, measure=True)
    assert report.latency is not None
    assert report.latency.ratio == pytest.approx(plan.asked.budget.promised)
    assert report.latency.ratio <= 0.85
    assert report.latency.pairs >= 5
    text, dictionary = str(report), report.to_dict()["latency"]
    assert f"latency, measured: {report.latency.seconds[0] * 1000:,.1f} ms -> " in text
    assert "budget: latency x 0.850, predicted x 0." in text
    assert dictionary["promised"] == plan.asked.budget.promised
    assert dictionary["measured"] == report.latency.ratio


def test_the_result_is_measured_and_a_miss_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    clock = Clock(monkeypatch)
    model = clock.watch(vit())
    found = measure(model, X, seconds=1e-9, cache=False, round_to=2)
    lucky = replace(found, grids=tuple(replace(one, shares=tuple(x / 2 for x in one.shares[:-1]) + one.shares[-1:])
                                       for one in found.grids))  # fmt: skip
    reports = {}
    for name, one in (("true", found), ("too good", lucky)):
        reports[name] = attnprune.prune_attention(
            clock.watch(vit()), target_latency=0.8, latency=one, example_inputs=X, match_dims=True
        )
    for report in reports.values():
        assert report.latency is not None
    assert not reports["true"].notes
    assert "is above the target x 0.800" in reports["too good"].notes[0]
    quiet = attnprune.prune_attention(vit(), target_latency=0.8, latency=found, example_inputs=X, measure=False)
    assert quiet.latency is None
    assert attnprune.prune_attention(vit(), target_latency=0.8, latency=found).latency is None


@pytest.mark.parametrize(
    ("granularity", "axes"),
    [("channel", ((4,), (2, 4, 6, 8))), ("head", ((1, 2, 3, 4), (8,))), ("joint", ((1, 2, 3, 4), (2, 4, 6, 8)))],
)
def test_which_shapes_are_measured(monkeypatch: pytest.MonkeyPatch, granularity: Any, axes: Any) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    clock = Clock(monkeypatch)
    found = measure(clock.watch(vit(2)), X, granularity=granularity, seconds=1e-9, cache=False, round_to=2)
    assert {(grid.heads, grid.qk) for grid in found.grids} == {axes}
    dense = sum(grid.shares[-1] for grid in found.grids) * 2 + found.rest
    assert dense == pytest.approx(1)
    model = vit(2)
    plan = attnprune.make_plan(model, target_latency=0.8, latency=found, granularity=granularity)
    assert found.predict(plan) <= 0.8 + 1e-9


def test_large_grids_are_thinned() -> None:
    from attnprune.cost.latency.measuring import _axes

    heads, qk, vo = _axes(AttentionSpec.of("a", heads=16, head_dim=128, d_model=64), "joint", 8)
    assert (heads, qk) == ((1, 6, 11, 16), (8, 40, 72, 96, 128))
    assert qk == vo


def test_layers_of_other_kinds_have_grids_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    Clock(monkeypatch)
    monkeypatch.setattr(timing, "perf_counter", iter(range(10**6)).__next__)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.MultiheadAttention(16, heads, batch_first=True) for heads in (2, 4, 2))

        def forward(self, x: torch.Tensor) -> Any:
            y = self.a(x, x, x)[0] + self.c(x, x, x)[0]
            return self.b(y, y[:, :2], y[:, :2])[0]

    found = measure(Two(), torch.zeros(1, 3, 16), seconds=1e-9, cache=False)
    assert found.layers == (("a", 0), ("b", 1), ("c", 0))
    alone = measure(Two(), torch.zeros(1, 3, 16), seconds=1e-9, cache=False, include="b")
    assert [name for name, _ in alone.layers] == ["b"]


def snapshot(model: nn.Module) -> Any:
    state = {key: (value.clone(), value.data_ptr()) for key, value in model.state_dict().items()}
    modules = [(name, type(one), one.training, len(one._forward_hooks), len(one._forward_pre_hooks), set(vars(one)))
               for name, one in model.named_modules()]  # fmt: skip
    return state, modules, torch.get_rng_state(), torch.is_grad_enabled()


def same(a: Any, b: Any) -> bool:
    states = all(torch.equal(a[0][key][0], b[0][key][0]) and a[0][key][1] == b[0][key][1] for key in {*a[0], *b[0]})
    return states and a[1] == b[1] and torch.equal(a[2], b[2]) and a[3] == b[3]


def test_measuring_leaves_the_model_as_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    model = vit(2)
    model.encoder.layer[0].eval() if hasattr(model, "encoder") else model.layers[0].eval()
    before = snapshot(model)
    measure(model, X, seconds=1e-9, cache=False)
    assert same(snapshot(model), before)
    plan = attnprune.make_plan(model, {"qk": 0.5})
    surgeon = Surgeon.prepare(model, find_views(model), plan)
    measure_plan(model, surgeon, X, 1e-9)
    assert same(snapshot(model), before)
    calls = []

    def fail(module: nn.Module, inputs: Any) -> None:
        calls.append(module)
        if len(calls) == 4:
            raise RuntimeError("no")

    handle = find_views(model)[0].module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        measure(model, X, seconds=1e-9, cache=False)
    calls.clear()
    with pytest.raises(RuntimeError, match="no"):
        measure_plan(model, surgeon, X, 1e-9)
    handle.remove()
    assert same(snapshot(model), before)


def test_shaped_plans_have_the_shape() -> None:
    one = spec()
    after = shaped(one, 3, 5, 8).after
    assert (after.qk_dims, after.vo_dims) == ((5,) * 3, (8,) * 3)
    assert shaped(one, 4, 8, 8).empty


def test_a_slower_plan_warns_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    model = vit(2)
    clock = {"now": 0.0}
    monkeypatch.setattr(timing, "perf_counter", lambda: clock["now"])

    def tick(module: nn.Module, inputs: Any, output: Any) -> None:
        clock["now"] += 2.0 if "Pruned" in type(module).__name__ else 1.0

    for view in find_views(model):
        view.module.register_forward_hook(tick)
    plan = attnprune.make_plan(model, {"qk": 0.375})
    with pytest.warns(errors.AttnPruneWarning, match=r"takes 2\.000 .* 2 layers have qk unlike vo.*multiples of 8"):
        report = attnprune.apply_plan(model, plan, example_inputs=X, measure=True)
    assert report.latency is not None
    assert report.latency.ratio == 2.0
    with pytest.raises(errors.OptionError, match="example_inputs"):
        attnprune.apply_plan(vit(2), plan, measure=True)


# the cache


def test_cached_times_are_of_this_code() -> None:
    nothing = hashlib.sha256().hexdigest()[:12]
    assert nothing not in cache.fingerprint(vit(1), X, {})["attnprune"]


def test_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(timing, "FAST", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(sys, "platform", "linux")

    def taken(model: nn.Module, x: torch.Tensor = X, **options: Any) -> LatencyTable:
        return measure(model, x, seconds=1e-9, **options)

    first = taken(vit(1))
    (file,) = (tmp_path / "user" / "attnprune").iterdir()
    assert taken(vit(1)) == first, "read, not measured anew"
    taken(vit(2))
    taken(vit(1), torch.zeros(2, 3, 8, 8))
    taken(vit(1).double(), X.double())
    taken(vit(1), round_to=4)
    taken(vit(1), granularity="head")
    monkeypatch.setattr(torch, "__version__", "99")
    taken(vit(1))
    monkeypatch.undo()
    monkeypatch.setattr(timing, "FAST", 0.0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    assert len(list(file.parent.iterdir())) == 7, "other models, inputs, dtypes, shapes and versions have their own"
    assert taken(vit(1), cache=str(tmp_path / "mine")) != first
    assert len(list((tmp_path / "mine").iterdir())) == 1
    text = file.read_text()
    other = LatencyTable.from_json(text)
    lies = [text[:50], "", text.replace('"rest":', '"rest": "a",'),
            LatencyTable.from_json(text.replace(other.machine["processor"], "another")).to_json()]  # fmt: skip
    for lie in lies:
        file.write_text(lie)
        with pytest.warns(errors.AttnPruneWarning, match="measured anew"):
            again = taken(vit(1))
        assert LatencyTable.from_json(file.read_text()) == again, "and replaced"
    file.unlink()
    file.mkdir()  # cannot be written: no error, and no draft left
    taken(vit(1))
    assert not [path for path in file.parent.iterdir() if path.name.startswith(".")]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    taken(vit(1), cache=False)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [({"granularity": "layer"}, "granularity"), ({"round_to": 0}, "round_to"), ({"seconds": 0}, "seconds")],
)
def test_what_measure_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(errors.OptionError, match=words):
        measure(vit(1), X, cache=False, **options)


def test_ragged_models_are_not_measured() -> None:
    model = vit(1)
    attnprune.prune_channels(model, {0: {"qk": [[0], [], [], []]}})
    with pytest.raises(errors.LatencyError, match="equal heads"):
        measure(model, X, cache=False)
