"""The program of the paper's table, on a tiny model: one round, interrupted and continued, and rendered."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ASTConfig, ASTForAudioClassification

from attnprune.errors import CheckpointError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def protocol(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_protocol

    return paper_protocol


@pytest.fixture
def task(protocol: Any) -> Any:
    torch.manual_seed(0)
    config = ASTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        num_mel_bins=16, max_length=32, patch_size=8, frequency_stride=8, time_stride=8, num_labels=5,
    )  # fmt: skip
    clips = [protocol.Clips(torch.randn(n, 32, 16), torch.randint(5, (n,))) for n in (24, 24, 12, 12)]
    model = ASTForAudioClassification(config).eval()
    return protocol.Task(model, *clips, lambda x: x + 0.1 * torch.randn_like(x), torch.device("cpu"))


def short(way: Any) -> Any:
    """Two rounds, of as many clips as the task has."""
    return way._replace(steps=(4, 7), recipe=way.recipe._replace(clips=36, batch=8))


LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("PH-G-FI", "EH-L-MAG", "EH-L-FI; all weights")]


@pytest.mark.parametrize("name", ["dense", "rotated, free; distilled", *LONG])
def test_a_run_continues_where_it_was(protocol: Any, task: Any, name: str, tmp_path: Path) -> None:
    way = short(protocol.WAYS[name])
    said: list[str] = []
    whole = protocol.run(task, way, 0, tmp_path / "whole.pt", said.append)

    def stop(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        protocol.run(task, way, 0, tmp_path / "parts.pt", stop)
    parts = protocol.run(task, way, 0, tmp_path / "parts.pt", said.append)
    timed = {"cpu", "wall"}
    assert [{k: v for k, v in one.items() if k not in timed} for one in parts] == [
        {k: v for k, v in one.items() if k not in timed} for one in whole
    ]
    assert len(said) == 3
    if way.options is not None:
        assert whole[1]["removed"] == pytest.approx(0.5)


def test_a_state_of_another_recipe_is_refused(protocol: Any, task: Any, tmp_path: Path) -> None:
    way, file = short(protocol.WAYS["PH-L-MAG"]), tmp_path / "state.pt"
    protocol.run(task, way, 0, file, lambda line: None)
    before = file.read_bytes()
    others = [
        ("recipe", way._replace(recipe=way.recipe._replace(lr=way.recipe.lr / 2)), 0),
        ("recipe", way._replace(recipe=None), 0),
        ("steps", way._replace(steps=(4, 7, 9)), 0),
        ("options", way._replace(options={**way.options, "preset": "paper:PH-G-MAG"}), 0),
        ("seed", way, 1),
    ]
    for key, other, seed in others:
        with pytest.raises(CheckpointError, match=f"state.pt: expected {key} .* another work directory"):
            protocol.run(task, other, seed, file)
    less = protocol.Clips(*(part[:12] for part in task.train))
    with pytest.raises(CheckpointError, match="expected training clips 12, found 24"):
        protocol.run(task._replace(train=less), way, 0, file)
    assert file.read_bytes() == before
    state = torch.load(file, weights_only=True)
    torch.save({key: value for key, value in state.items() if key != "of"}, file)
    with pytest.raises(CheckpointError, match="none recorded"):
        protocol.run(task, way, 0, file)


def test_runs_that_were_cut_short_are_not_collected(
    protocol: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paper_table

    monkeypatch.setattr(protocol, "keywords", lambda *_, **__: task)
    name, file = "rotated; no recovery", paper_table.state_file(tmp_path, 0, "rotated; no recovery")
    way = protocol.WAYS[name]
    protocol.run(task, way._replace(steps=way.steps[:2]), 0, file, lambda line: None)
    assert paper_table.collect(tmp_path, [0], "cpu", None)["runs"] == {}
    monkeypatch.setitem(protocol.WAYS, name, way._replace(steps=way.steps[:2]))
    assert len(paper_table.collect(tmp_path, [0, 1], "cpu", None)["runs"][name]["0"]) == 2


def test_results_of_other_seeds_stay_where_they_are_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from paper_table import joined

    def of(seed: int, model: str = "m", rate: float = 1.0, **more: Any) -> dict[str, Any]:
        recipes = {"a": {"lr": rate}, "b": None, "c": None}
        return {
            "environment": {"model": model, "training clips": 9}, "recipes": recipes,
            "runs": {"a": {str(seed): [seed]}, "c": {str(seed): [seed]}}, **more,
        }  # fmt: skip

    new = {"clips": 7, "dense": 80.0, "runs": {"b": {"0": {"7": 79.0}}}}
    both = joined(of(1), of(0, **{"new clips": new}))
    assert both["runs"] == {"a": {"0": [0], "1": [1]}, "c": {"0": [0], "1": [1]}}
    assert both["new clips"] == new
    assert joined(of(1, **{"new clips": new}), of(0))["new clips"] == new
    assert joined(of(1), of(1, more=0))["runs"] == of(1)["runs"]
    assert joined(of(1), of(0, model="n")) == of(1)
    assert joined(of(1), of(0, rate=2.0))["runs"] == {"a": {"1": [1]}, "c": {"0": [0], "1": [1]}}


def test_a_trial_has_validation_figures_alone(protocol: Any, task: Any, tmp_path: Path) -> None:
    way = short(protocol.WAYS["EH-G-FI"])
    tried = protocol.run(task._replace(test=None), way, 0, tmp_path / "tried.pt", lambda line: None)
    whole = protocol.run(task, way, 0, tmp_path / "whole.pt", lambda line: None)
    assert [one["test"] for one in tried] == [None, None]
    assert [one["loss"] for one in tried] == [one["loss"] for one in whole]
    assert None not in [one["test"] for one in whole]


def test_the_recipe_is_one(protocol: Any) -> None:
    """All variants and the dense reference recover in the same way; both recipes are there for ours too."""
    recipes = {name: protocol.WAYS[name].recipe for name in (*protocol.VARIANTS, "dense", "rotated; LoRA")}
    assert set(recipes.values()) == {protocol.WAYS["rotated, free; LoRA"].recipe}
    distilled = {way.recipe for name, way in protocol.WAYS.items() if name.endswith("; distilled")}
    assert distilled == {recipes["dense"]._replace(distil=1.0)}


def test_an_update_is_kept_though_it_is_worse(protocol: Any, task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The paper trains, always: "no update" is not in the running."""
    model = copy.deepcopy(task.model)

    def loss(model: Any, batch: Any) -> torch.Tensor:  # any change is for the worse on validation
        logits = model(input_values=batch["input_values"]).logits
        if model.training:
            return torch.nn.functional.cross_entropy(logits, batch["labels"])
        return (logits - task.model(input_values=batch["input_values"]).logits).square().mean()

    monkeypatch.setattr(protocol, "loss_of", lambda task, recipe: loss)
    protocol.recover(task, model, protocol.LABELS._replace(clips=24), 0, 0)
    after = model.state_dict()
    assert any(not torch.equal(value, after[name]) for name, value in task.model.state_dict().items())


def test_all_weights_are_trained_on_the_same_clips_again_and_again(protocol: Any, task: Any) -> None:
    recipe = protocol.WHOLE._replace(clips=24, batch=8, whole=3)
    model = copy.deepcopy(task.model)
    seen: list[Any] = []
    wanted = protocol.loss_of(task, recipe)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        seen.append(batch["labels"])
        return wanted(model, batch)

    protocol.train_all(task, model, recipe, loss, 0, 0)
    assert len(seen) == 9
    assert not model.training
    after = model.state_dict()
    assert not any(torch.equal(value, after[name]) for name, value in task.model.named_parameters())
    torch.manual_seed(0)
    batch = task.round(0, 0, 24, 24)[0]
    left = protocol.loss_of(task, protocol.LABELS)
    assert left(model, batch) < left(task.model, batch)


def test_rounds_go_through_the_training_set_in_turn(protocol: Any, task: Any) -> None:
    def labels(number: int, clips: int) -> list[int]:
        return torch.cat([batch["labels"] for batch in numbered.round(3, number, clips, 5)]).tolist()

    numbered = task._replace(train=protocol.Clips(task.train.features, torch.arange(24)))
    first, second, third = (labels(number, 12) for number in range(3))
    assert sorted(first + second) == list(range(24))
    assert len(set(third)) == 12
    assert third != first  # another order
    assert sorted(labels(0, 48)) == sorted([*range(24), *range(24)])
    assert labels(1, 12) == second


def test_distances_are_from_both_dense_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_render

    runs = {"dense": (70, 81, 90), "PH-G-FI": (60, 80, 70)}
    results: Any = {
        "dense": {"test": 80},
        "runs": {
            name: {
                str(seed): [{"step": 7, "test": test, "loss": 1.0, "removed": 0.5}] for seed, test in enumerate(tests)
            }
            for name, tests in runs.items()
        },
    }
    assert paper_render.distance(results, "PH-G-FI", 7) == (3, -10, -20, 0)
    assert paper_render.distance(results, "PH-G-FI", 7, tuned=True) == (3, -10, -20, -1)  # the median of -10, -1, -20
    for name in runs:  # what trains all weights has a reference that does so too
        results["runs"][f"{name}; all weights"] = results["runs"].pop(name)
    assert paper_render.distance(results, "PH-G-FI; all weights", 7, tuned=True) == (3, -10, -20, -1)
    results["runs"]["PH-G-FI"] = results["runs"]["PH-G-FI; all weights"]
    assert paper_render.distance(results, "PH-G-FI", 7, tuned=True) is None
    assert paper_render.distance(results, "PH-G-FI", 2) is None


def test_new_clips_have_a_dense_figure_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import paper_render

    name = "EH-L-FI; 84,843 clips"
    records = [
        {"step": step, "test": test, "loss": 1.0, "removed": 0.5} for step, test in ((3, None), (7, 70), (8, 76))
    ]
    results: Any = {"dense": {"test": 80}, "runs": {name: {"0": records}}}
    assert paper_render.distance(results, name, 7, new=True) is None
    assert "new clips" not in "".join(paper_render.claims(results) + paper_render.rows(results)[0])
    alike = {"0": {"7": 84, "8": 85}}
    new = {"clips": 9000, "dense": 83, "runs": {name: {"0": {"7": 72, "8": 82.5}}, "dense; 84,843 clips": alike}}
    results["new clips"] = new
    assert paper_render.distance(results, name, 7) == (1, -10, -10, -10)
    assert paper_render.distance(results, name, 8, new=True) == (1, -0.5, -0.5, -0.5)
    assert paper_render.distance(results, name, 8, new=True, tuned=True) == (1, -2.5, -2.5, -2.5)
    assert paper_render.distance(results, name, 3) is None
    header, body = paper_render.rows(results)
    assert header[-2] == "at 50 %, 9,000 new clips, from dense as shipped"
    assert body[0][-2:] == ["-11.00", ""]


@pytest.mark.long
def test_new_clips_measure_the_models_that_were_run(
    protocol: Any, task: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import paper_table

    on = short(protocol.WAYS["PH-L-MAG"])
    ways = {
        "rotated; no recovery": protocol.WAYS["rotated; no recovery"],
        "PH-L-MAG": on,
        "EH-G-MAG": on._replace(steps=(4, 7, 9)),
    }
    monkeypatch.setattr(protocol, "WAYS", ways)
    records = {}
    for name, way in ways.items():
        ran = protocol.run(task, way, 0, paper_table.state_file(tmp_path, 0, name), lambda line: None)
        records[name] = {str(one["step"]): one["test"] for one in ran}
    found = paper_table.on_new_clips(tmp_path, [0, 1], task)  # the same clips, so the same figures
    assert found["clips"] == 12
    for name, steps in {"rotated; no recovery": ("7", "14"), "PH-L-MAG": ("7",), "EH-G-MAG": ("7", "9")}.items():
        assert found["runs"][name]["0"] == {step: records[name][step] for step in steps}
    other = protocol.Clips(task.test.features.flip(0), (task.test.labels + 1) % 5)
    assert paper_table.on_new_clips(tmp_path, [0], task._replace(test=other)) != found


def test_a_state_of_before_a_field_is_of_its_default(protocol: Any, task: Any, tmp_path: Path) -> None:
    way, file = short(protocol.WAYS["PH-L-MAG"]), tmp_path / "state.pt"
    records = protocol.run(task, way, 0, file, lambda line: None)
    state = torch.load(file, weights_only=True)
    del state["of"]["recipe"]["rank"]
    torch.save(state, file)
    assert protocol.run(task, way, 0, file) == records
    with pytest.raises(CheckpointError, match="expected recipe"):
        protocol.run(task, way._replace(recipe=way.recipe._replace(rank=8)), 0, file)


def test_the_protocol_is_the_papers(protocol: Any) -> None:
    shares = [protocol.share(step) for step in range(15)]
    left = [1 - share for share in shares]
    assert shares[7] == 0.5
    assert shares[14] == 0.75
    assert all(b / a == pytest.approx(left[1]) for a, b in itertools.pairwise(left))
    assert len(protocol.VARIANTS) == 8


@pytest.mark.parametrize("first", [True, False])
def test_shipped_results_render(protocol: Any, first: bool, tmp_path: Path) -> None:
    """What is shipped is what the shipped results give, and they are of the recipes that the program has."""
    import paper_render
    import paper_table

    file, ways = paper_table.RESULTS[first], paper_table.ways(first)
    results = json.loads(file.read_text())
    text = paper_render.render(results, file.stem, tmp_path)
    assert text + "\n" == file.with_suffix(".md").read_text()
    shipped, drawn = (root / "docs" / "_static" / f"{file.stem}.csv" for root in (BENCHMARKS.parent, tmp_path))
    assert shipped.read_text() == drawn.read_text()
    assert {name for name in paper_render.PAPER if name.endswith("FI")} <= set(results["runs"])
    assert results["recipes"] == {name: way.recipe and way.recipe._asdict() for name, way in ways.items()}
    for name, runs in results["runs"].items():
        for records in runs.values():
            assert [record["step"] for record in records] == list(ways[name].steps)[: len(records)]
