"""Ways side by side: what is in the table, what stays as it was, what is kept on the disk, and what is best."""

from __future__ import annotations

import copy
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import attnprune
from attnprune import Sensitivity, Sweep, errors, sensitivity, sweep
from attnprune.cli import main
from attnprune.cost.latency.table import Grid, LatencyTable
from attnprune.cost.memory import peak_bytes
from attnprune.report.rows import Row
from attnprune.report.sensitivity import Cost
from attnprune.studies import sweep as sweeping
from attnprune.studies.resuming import digest

MAGNITUDE = {"name": "magnitude", "scorer": "magnitude"}


def encoder(seed: int = 0, layers: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


X = torch.randn(24, 5, 16, generator=torch.Generator().manual_seed(1))
DATA = X[:16].split(4)


@torch.no_grad()
def total(model: nn.Module) -> float:
    """A number that the smallest difference shows in."""
    return float(model(X[16:]).double().square().sum())


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def quick(model: nn.Module, evaluate: Callable[[nn.Module], Any] = total, **options: Any) -> Sweep:
    """Two ways, two ratios, nothing timed."""
    given: dict[str, Any] = {"ratios": [0.5, 0.75], "ways": ["default", MAGNITUDE], "data": DATA, "seconds": 0}
    return sweep(model, evaluate, **{**given, **options})


# the table


def test_rows_are_what_pruning_a_copy_gives() -> None:
    model = encoder().eval()
    table = quick(model, ways=["default", MAGNITUDE, {"sequential": True}])
    assert (table.dense.score, table.dense.params) == (total(model), sum(p.numel() for p in model.parameters()))
    assert [(row.way, row.ratio) for row in table.rows] == [
        (way, ratio) for way in ("default", "magnitude", "sequential=True") for ratio in (0.5, 0.75)
    ]
    for row in table.rows:
        again = copy.deepcopy(model)
        example = (X[:1],)
        options = table.ways[row.way]
        report = attnprune.prune_attention(again, row.ratio, data=DATA, example_inputs=example, **options)
        assert row.score == total(again), f"{row.way} {row.ratio}: a shared calibration is bitwise one's own"
        assert report.macs is not None
        assert (row.params, row.macs) == (report.model_parameters[1], report.macs[1])
        assert row.achieved == pytest.approx(row.ratio)
        assert row.memory == peak_bytes(again, example) < table.dense.size("memory")
        assert (row.latency, row.seconds, row.error) == (None, None, "")


def test_one_calibration_serves_all_ways_that_need_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[bool] = []
    real = sweeping.calibrate

    def counted(*args: Any, across_heads: bool, **options: Any) -> Any:
        passes.append(across_heads)
        return real(*args, across_heads=across_heads, **options)

    monkeypatch.setattr(sweeping, "calibrate", counted)
    quick(encoder(), ratios=[0.5], ways=["default", "accurate", MAGNITUDE, {"compensate": False}, {"sequential": True}])
    assert sorted(passes) == [False, True]


def test_the_model_and_random_states_stay_bitwise_and_runs_repeat() -> None:
    model = encoder().train()
    before = whole(model)

    def noisy(found: nn.Module) -> float:
        assert not found.training
        with torch.no_grad():
            for parameter in found.parameters():  # its own copy
                parameter.zero_()
        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    ways = ["default", {"name": "chance", "scorer": "random"}]
    tables = [quick(model, noisy, ways=ways), quick(model, noisy, ways=ways)]
    assert tables[0] == tables[1]
    assert tables[0].dense.score == tables[0].rows[-1].score, "every copy starts from the same random state"
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in whole(model).items())
    assert quick(model, noisy, ways=ways, seed=1).dense.score != tables[0].dense.score


def test_data_are_read_once() -> None:
    times: list[int] = []

    def batches() -> Any:
        times.append(1)
        yield from DATA

    assert quick(encoder(), data=batches()) == quick(encoder())
    assert len(times) == 1


def test_time_is_that_of_pairs_and_no_part_of_equality() -> None:
    table = quick(encoder(), ways=["default"], ratios=[0.5], seconds=0.01)
    (row,) = table.rows
    assert table.dense.latency == 1
    assert row.latency is not None
    assert row.latency > 0
    assert row.seconds is not None
    assert "latency" in str(table)
    assert row == replace(row, latency=None, seconds=2.0)


def test_without_data_or_inputs_there_is_nothing_to_run_on() -> None:
    table = quick(encoder(), data=None)
    assert [row.macs for row in (table.dense, *table.rows)] == [None] * 5
    assert table.rows[0].score == table.rows[2].score, "without data the default is magnitude"
    assert "multiply-adds" not in str(table)
    with pytest.raises(errors.OptionError, match="by: expected a column with figures, found 'macs'"):
        table.best(by="macs")
    assert quick(encoder(), data=None, example_inputs=X[:1]).dense.macs


def test_a_way_that_cannot_be_had_does_not_lose_the_rest() -> None:
    calls: list[int] = []

    def moody(model: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of\nmemory")
        return total(model)

    table = quick(encoder(), moody, ways=["default", "paper:PH-G-FI", MAGNITUDE])
    assert [row.error.partition(":")[0] for row in table.rows] == [
        "RuntimeError", "", "DataError", "DataError", "", "",
    ]  # fmt: skip
    assert table.rows[0].error == "RuntimeError: out of memory"
    assert table.rows[2].score is None
    text = str(table)
    assert "paper:PH-G-FI, 0.5, 0.75: DataError: data: expected labels, of which a scalar loss is made" in text
    assert "a tensor of that name in a file" in text, "for whom the command line serves"
    assert table.best(within=1e9).error == ""
    assert table.plot() is not None


@pytest.mark.parametrize("found", [float("nan"), "good", None])
def test_a_score_that_is_none_is_refused_for_the_dense_model(found: Any) -> None:
    with pytest.raises(errors.DataError, match="evaluate: expected a finite number"):
        quick(encoder(), lambda model: found)


def test_faults_are_said_together_and_before_anything_runs() -> None:
    def never(model: nn.Module) -> float:
        raise AssertionError

    with pytest.raises(errors.OptionError) as caught:
        quick(
            encoder(), never, ways=["default", "quick", {"granularty": "head"}, "default"], ratios=[0.5, 1.5],
            seconds=-1, minchannels=2,
        )  # fmt: skip
    wrong = [fault.where for fault in caught.value.faults]
    assert wrong == ["sweep", "ways", "ways", "ratios", "seconds"]
    with pytest.raises(errors.OptionError, match="granularity"):
        quick(encoder(), never, ways=[{"granularty": "head"}])
    for bad in ([], "default", {"a": {}}, [3], [{"name": ""}]):
        with pytest.raises(errors.OptionError, match="ways"):
            quick(encoder(), never, ways=bad)
    for bad in ([], [True], ["a"], 1.0):
        with pytest.raises(errors.OptionError, match="ratios"):
            quick(encoder(), never, ratios=bad)
    for bad in (X, [], "data"):
        with pytest.raises(errors.DataError, match="data"):
            quick(encoder(), never, data=bad)
    with pytest.raises(errors.OptionError, match="evaluate"):
        quick(encoder(), 3)  # type: ignore[arg-type]
    with pytest.raises(errors.NoAttentionError):
        quick(nn.Linear(2, 2), never)
    with pytest.raises(errors.OptionError, match="resume"):
        quick(encoder(), never, resume="/nowhere/at/all.json")


# what is best


DENSE = Row("dense", 0.0, 0.0, 90.0, 1000, 100, 10, 1.0, 0.001)
LARGE = Row("dense", 0.0, 0.0, 90.0, 7_000_000_000, 10**15, 10**12)
ROWS = (
    Row("a", 0.5, 0.5, 89.6, 800, 80, 8, 0.9, 0.0009),
    Row("a", 0.75, 0.75, 89.4, 700, 70, 7, 0.7, 0.0007),
    Row("b", 0.5, 0.5, 91.0, 800, 85, 9, 1.2, 0.0012),
    Row("b", 0.75, error="DataError: no"),
)
TABLE = Sweep(DENSE, ROWS, {"a": {"scope": "local"}, "b": {"scorer": "random"}})


def test_best_is_the_smallest_within() -> None:
    assert TABLE.best() is ROWS[2], "of those that cost the same the better one"
    assert TABLE.best(0.5, "latency") is ROWS[0]
    assert TABLE.best(0.6) is TABLE.best(1, "macs") is ROWS[1]
    assert TABLE.best(0.45, "memory") is ROWS[0]
    assert TABLE.pareto() == (ROWS[1], ROWS[2])
    assert TABLE.pareto("latency") == (ROWS[1], ROWS[0], DENSE, ROWS[2])
    assert Sweep(DENSE, ROWS[:2]).best(0) is DENSE
    lower = Sweep(DENSE, ROWS, higher_is_better=False)
    assert lower.best(0) is ROWS[1]
    assert lower.drop(ROWS[2]) == 1
    with pytest.raises(errors.OptionError, match="by: expected one of params, latency, macs, memory, found 'size'"):
        TABLE.best(by="size")  # type: ignore[arg-type]
    with pytest.raises(errors.OptionError, match="within"):
        TABLE.best(-1)


def test_a_share_that_is_taken_for_points_is_warned_of() -> None:
    shares = Sweep(replace(DENSE, score=0.9), (replace(ROWS[0], score=0.6),))
    with pytest.warns(errors.AttnPruneWarning, match=r"write 0.005 for 0.5 points of a hundred"):
        assert shares.best() is shares.rows[0]
    assert shares.best(0.005) is shares.dense


def test_the_table_as_text_html_and_json() -> None:
    lines = str(TABLE).splitlines()
    assert lines[0].split() == [
        "way", "ratio", "removed", "score", "change", "parameters", "multiply-adds", "latency", "memory",
    ]  # fmt: skip
    assert lines[2].split() == ["dense", "90", "1,000", "100", "1.00", "ms", "10"]
    assert lines[4].replace(" x ", " ").split() == [
        "a",
        "0.5",
        "50.0%",
        "89.6",
        "-0.4",
        "0.800",
        "0.800",
        "0.900",
        "0.800",
    ]
    assert lines[-1] == "b, 0.75: DataError: no"
    page = TABLE._repr_html_()
    assert page.count("<tr>") == 6
    assert "<td>89.6</td>" in page
    again = Sweep.from_json(TABLE.to_json())
    assert again == TABLE
    assert (again.ways, again.rows[1].latency) == (TABLE.ways, 0.7)
    assert Sweep.from_json(Sweep(LARGE, ()).to_json()).dense == LARGE
    odd = Sweep(DENSE, ROWS, {"a": {"scorer": object, "include": ["x"], "rules": {"scope": "local"}}})
    assert json.loads(odd.to_json())["ways"]["a"]["include"] == ["x"]


@pytest.mark.parametrize(
    "change",
    [{"rows": [{}]}, {"rows": 3}, {"dense": None}, {"ways": 1}, {"ways": {"a": 1}}, {"version": 2}, {"more": 1},
     {"higher_is_better": 1}],
    ids=str,
)  # fmt: skip
def test_a_malformed_table_is_refused(change: dict[str, Any]) -> None:
    raw = json.dumps({**json.loads(TABLE.to_json()), **change})
    with pytest.raises(errors.OptionError, match="sweep: "):
        Sweep.from_json(raw)


GRID = Grid((2,), (4, 8), (4, 8), (0.1, 0.2, 0.2, 0.3))
TABLES: dict[str, tuple[Any, type[errors.AttnPruneError]]] = {
    "sweep": (TABLE, errors.OptionError),
    "sensitivity": (Sensitivity((Cost("a", "qk", 0.25, 0.5),), 0.5, "distortion"), errors.OptionError),
    "latency": (LatencyTable({"device": "cpu"}, 0.01, 0.7, (("a", 0),), (GRID,), 4, 5), errors.LatencyError),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_written_and_read_alike(name: str) -> None:
    table, error = TABLES[name]
    whole = json.loads(table.to_json())
    assert whole == {"format": f"attnprune.{name}", "version": 1, **table.to_dict()}
    assert type(table).from_json(table.to_json()) == table
    for change in ({"version": True}, {"version": 2}, {"format": "attnprune.plan"}, {"more": 1}):
        with pytest.raises(error, match=f"^{name}: "):
            type(table).from_json(json.dumps({**whole, **change}))
    for text in ("[]", "{", json.dumps(whole)[:-9]):
        with pytest.raises(error, match=f"^{name}: "):
            type(table).from_json(text)


def test_the_picture_has_a_line_for_every_way(tmp_path: Path) -> None:
    figure = TABLE.plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    panels = figure.axes
    assert [panel.get_xlabel() for panel in panels] == [
        "parameters of the model, % of dense", "latency, measured, % of dense",
    ]  # fmt: skip
    lines = {line.get_label(): line for line in panels[0].get_lines()}
    assert lines["a"].get_xydata().tolist() == [[80.0, 89.6], [70.0, 89.4]]
    assert lines["b"].get_xydata().tolist() == [[80.0, 91.0]]
    assert lines["dense"].get_xydata().tolist() == [[100.0, 90.0]]
    assert "higher is better" in panels[0].get_ylabel()
    with pytest.raises(errors.OptionError, match="a row with a score"):
        Sweep(DENSE, ROWS[3:]).plot()


# going on


class Counter:
    """How often something was called."""

    calls = 0


def test_an_interrupted_sweep_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path, seen = tmp_path / "rows.json", Counter()

    def counted(model: nn.Module) -> float:
        seen.calls += 1
        if seen.calls == 4:
            raise KeyboardInterrupt
        return total(model)

    with pytest.raises(KeyboardInterrupt):
        quick(encoder(), counted, resume=path)
    assert len(json.loads(path.read_text())["rows"]) == 3
    table = quick(encoder(), counted, resume=path)
    assert seen.calls == 4 + 2, "three rows were there"
    assert table == quick(encoder())
    assert [one.name for one in tmp_path.iterdir()] == ["rows.json"]


def test_rows_of_something_else_are_not_mixed_up(tmp_path: Path) -> None:
    path, seen = tmp_path / "rows.json", Counter()

    def counted(model: nn.Module) -> float:
        seen.calls += 1
        return total(model)

    def other(model: nn.Module) -> float:
        seen.calls += 1
        return 2 * total(model)

    base = {"ways": ["default"], "ratios": [0.5], "resume": path}
    changed = encoder()
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-6
    made: list[Sweep] = []
    for model, evaluate, options, new in (
        (encoder(), counted, {}, 2),
        (encoder(), counted, {}, 0),
        (changed, counted, {}, 2),
        (encoder(), other, {}, 2),
        (encoder(), counted, {"min_channels": 2}, 2),
        (encoder(), counted, {"data": X[:12].split(4)}, 2),
        (encoder(), counted, {"ratios": [0.5, 0.25]}, 1),
        (encoder(), counted, {"ways": [{"name": "default", "scope": "local"}]}, 1),
        (encoder(), counted, {"ways": [{"name": "renamed"}]}, 0),
        (encoder(), counted, {}, 0),
    ):
        before = seen.calls
        made.append(quick(model, evaluate, **{**base, **options}))
        assert seen.calls - before == new, options
    assert made[0] == made[1] == made[-1]
    assert made[2].dense.score != made[0].dense.score
    assert made[-2].rows[0].way == "renamed"


@pytest.mark.parametrize("text", ["", "{}", '{"format": 1, "version": 1, "rows": {}}', "[1]"])
def test_a_file_of_something_else_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(errors.OptionError, match=r"resume: .*as sweep writes it"):
        quick(encoder(), resume=path)
    assert path.read_text() == text


def scaled(factor: float) -> Callable[[nn.Module], float]:
    def evaluate(model: nn.Module) -> float:
        return factor * total(model)

    return evaluate


def test_a_fingerprint_tells_what_differs() -> None:
    model, same = encoder(), encoder()
    assert digest(model) == digest(same)
    same.layers[0].dropout.p = 0.3  # type: ignore[union-attr, index]
    different = [
        model, same, encoder(1), [1, 2], [12], {"a": 1}, {"b": 1}, torch.ones(2), torch.ones(2).double(),
        torch.ones(2, 1), lambda model: 1, lambda model: 2, total, 1, True, "1", None,
        scaled(2.0), scaled(3.0), partial(scaled, 2.0), partial(scaled, 3.0), np.ones(2), np.zeros(2), {1, 2}, {1, 3},
        int, float,
    ]  # fmt: skip
    assert len({digest(one) for one in different}) == len(different)
    assert digest(scaled(2.0)) == digest(scaled(2.0))


# memory


def test_memory_is_the_most_that_is_alive_at_a_moment() -> None:
    model = nn.Sequential(nn.Linear(8, 64, bias=False), nn.ReLU(), nn.Linear(64, 8, bias=False))
    weights, x = 2 * 8 * 64, torch.zeros(10, 8)
    assert peak_bytes(model, x) == 4 * (weights + 80 + 2 * 640), "both sides of the ReLU at once"
    assert peak_bytes(nn.Sequential(*[nn.ReLU() for _ in range(9)]), x) == 4 * 3 * 80, "what went does not count"
    assert peak_bytes(model, torch.zeros(99, 8)[:10]) == peak_bytes(model, x), "of an input, what the model sees"
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight  # type: ignore[union-attr]
    assert peak_bytes(tied, x) == 4 * (64 + 3 * 80), "shared weights count once"


# layers one by one


def test_costs_are_those_of_one_layer_alone() -> None:
    model = encoder(layers=2).train()
    before = whole(model)
    found = sensitivity(model, DATA, parts=["layer", "qk"])
    assert all(torch.equal(value, before[key]) for key, value in whole(model).items())
    assert model.training
    assert found == sensitivity(model, iter(DATA), parts=["layer", "qk"]), "bitwise the same, and read once"
    assert (found.names, found.parts) == (("layers.0.self_attn", "layers.1.self_attn"), ("layer", "qk"))
    model.eval()
    plan = attnprune.make_plan(model, {"qk": 0.5}, scope="local", data=DATA[:3])
    only = attnprune.Plan((plan["layers.1.self_attn"],))
    with torch.no_grad():
        dense = model(DATA[3])
        with attnprune.masked(model, only):
            apart = model(DATA[3]) - dense
    expected = float(apart.double().square().sum() / dense.double().square().sum())
    assert found.of("layers.1.self_attn", "qk") == pytest.approx(expected, rel=1e-4)
    assert [one.achieved for one in found.costs] == [0.5, 0.25, 0.5, 0.25]
    assert all(one.cost > 0 for one in found.costs)


def test_with_a_score_the_cost_is_its_drop() -> None:
    model = encoder().eval()
    found = sensitivity(model, DATA, total, ratio=0.75, parts=["vo"], include="layers.0.*")
    plan = attnprune.make_plan(model, {"vo": 0.75}, scope="local", data=DATA, include="layers.0.*")
    with attnprune.masked(model, plan):
        after = total(model)
    assert found.dense == total(model)
    assert found.of("layers.0.self_attn", "vo") == pytest.approx(total(model) - after)
    lower = sensitivity(model, DATA, total, ratio=0.75, parts=["vo"], include="layers.0.*", higher_is_better=False)
    assert [one.cost for one in lower.costs] == [-one.cost for one in found.costs]


def test_padded_tokens_do_not_count() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = encoder()

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            found: Tensor = self.inner(x, src_key_padding_mask=attention_mask == 0)
            return found + (attention_mask == 0)[..., None] * 1e6

    mask = torch.ones(4, 5)
    mask[:, 3:] = 0
    found = sensitivity(Padded(), [{"x": x, "attention_mask": mask} for x in DATA], parts=["layer"])
    assert all(one.cost > 1e-4 for one in found.costs)


def test_faults_of_sensitivity() -> None:
    with pytest.raises(errors.OptionError) as caught:
        sensitivity(encoder(), DATA, 3, ratio=1.0, scoper="local")  # type: ignore[arg-type, call-arg]
    assert [fault.where for fault in caught.value.faults] == ["sensitivity", "ratio", "evaluate"]
    with pytest.raises(errors.DataError, match="at least two batches"):
        sensitivity(encoder(), DATA[:1])
    with pytest.raises(errors.OptionError, match="qkvo_ratios"):
        sensitivity(encoder(), DATA, parts=["mlp"])
    found = Sensitivity((Cost("a", "qk", 0.25, 0.5), Cost("b", "qk", 0.25, 0.125)), 0.5, "distortion")
    for call in (lambda: found.of("a", "vo"), lambda: found.ranked(), lambda: Sensitivity.from_json("{}")):
        with pytest.raises(errors.OptionError):
            call()


def test_sensitivity_in_words_and_pictures(tmp_path: Path) -> None:
    costs = tuple(Cost(f"layers.{i}.attn", part, 0.5, 0.1 * i) for i in range(3) for part in ("layer", "qk", "vo"))
    found = Sensitivity(costs, 0.5, "drop of the score", 90.0)
    assert str(found).splitlines()[3].split() == ["layers.1.attn", "0.1", "0.1", "0.1"]
    assert str(found).splitlines()[-1] == "drop of the score where 50% of one part goes alone; dense 90"
    assert found._repr_html_().count("<tr>") == 4
    assert Sensitivity.from_json(found.to_json()) == found
    figure = found.plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").exists()
    assert [bar.get_width() for bar in figure.axes[0].containers[0]] == [0.0, 0.1, 0.2]
    with pytest.raises(errors.OptionError):
        Sensitivity((), 0.5, "distortion").plot()


# the command


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "judge_of_sweep.py").write_text(
        "import torch\n"
        "X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "def energy(model):\n"
        "    with torch.no_grad():\n"
        "        return float(model(X).logits.square().sum())\n"
        "def data():\n"
        "    return [{'pixel_values': x} for x in X.split(2)]\n"
        "BATCHES = data()\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path  # type: ignore[misc]
    sys.modules.pop("judge_of_sweep", None)


def test_the_command_is_the_function(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", "vit", "--eval", "judge_of_sweep:energy", "--ratios", ".5", "--ways", "default", "fast",
             "--seconds", "0", "--within", "0.05"]  # fmt: skip
    assert main([*words, "--data", "judge_of_sweep:data", "-o", "a.json", "--plot", "a.png"]) == 0
    out = capsys.readouterr().out
    assert "best within 0.05 by params: " in out
    import judge_of_sweep as judge  # type: ignore[import-not-found]

    table = sweep(
        attnprune.from_pretrained("vit"), judge.energy, [0.5], ["default", "fast"], data=judge.data(), seconds=0
    )
    assert Sweep.from_json((place / "a.json").read_text()) == table
    assert str(table) in out
    assert main([*words, "--data", "judge_of_sweep:BATCHES", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["score"] for row in told["rows"]] == [row.score for row in table.rows]
    assert told["best"]["way"] == table.best(0.05).way


def test_wrong_words_are_told(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (place / "needs_nowhere.py").write_text("import nowhere\n")
    for words, told in (
        (["--eval", "judge_of_sweep"], "--eval: expected module:name, found 'judge_of_sweep'"),
        (["--eval", "nowhere:at"], "--eval: expected a module nowhere, found none"),
        (["--eval", "judge_of_sweep.py:energy"], "--eval: expected module:name, found 'judge_of_sweep.py:energy'"),
        (["--eval", "judge_of_sweep:enery"], "found no such name. Names there are like ['energy'"),
        (["--eval", "needs_nowhere:at"], "attnprune: No module named 'nowhere'. Install what is missing.\n"),
        (["--eval", "judge_of_sweep:X"], "--eval: expected a function of a model, found a Tensor"),
        (["--eval", "judge_of_sweep:energy", "--ways", "slow"], "ways: expected"),
    ):
        assert main(["sweep", "vit", *words, "--data", "judge_of_sweep:data", "-o", "b.json"]) == 1
        assert told in capsys.readouterr().err
        assert not (place / "b.json").exists()
