"""The command line does what the library does, says what it did, and leaves nothing behind when it fails."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import attnprune
from attnprune import Plan, cli, find_attention, from_pretrained, make_plan, prune_attention, read_report
from attnprune.checkpoint.tensors import Weights
from attnprune.cli import main, timing
from attnprune.cli.inputs import example_inputs
from attnprune.cost.latency import timing as latency_timing
from attnprune.cost.latency.table import Grid, LatencyTable

CONFIG = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
IMAGE = {**CONFIG, "image_size": 16, "patch_size": 8, "num_labels": 5}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``dense`` and ``pruned`` models, and ``data.safetensors``."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE)).eval()
    model.save_pretrained(folder / "dense")
    (folder / "dense" / "preprocessor_config.json").write_text('{"size": 16}')
    (folder / "dense" / "training_args.bin").write_text("not for the pruned model")
    save_file({"pixel_values": torch.randn(20, 3, 16, 16), "labels": torch.arange(20) % 5}, folder / "data.safetensors")
    assert main(["prune", str(folder / "dense"), "--qkvo", ".5", "--scope", "local", "-o", str(folder / "pruned")]) == 0
    return folder


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(place: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command, with names of the place filled in."""

    def call(*words: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        known = {path.name: str(path) for path in place.iterdir()}
        try:
            code = main([known.get(str(word), str(word)) for word in words])
        except SystemExit as stop:
            code = int(str(stop.code or 0))
        out, err = capsys.readouterr()
        return code, out, err

    return call


def told(run: Run, *words: Any) -> dict[str, Any]:
    """The JSON of a command that succeeds."""
    code, out, err = run(*words, "--json")
    assert (code, err) == (0, "")
    found: dict[str, Any] = json.loads(out)
    return found


def data(place: Path, size: int = 8) -> list[dict[str, Tensor]]:
    whole = load_file(place / "data.safetensors")
    return [{key: value[i : i + size] for key, value in whole.items()} for i in range(0, 20, size)]


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in mine.items())


def test_inspect_reads_no_weights(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Weights, "read", None)
    monkeypatch.setattr(Weights, "digest", None)
    found = told(run, "inspect", "dense")
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**IMAGE))
    assert found["class"] == "ViTForImageClassification"
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["attention_parameters"] == 2 * 4 * (24 * 24 + 24)
    assert [(one["name"], one["heads"], one["qk_dims"]) for one in found["attention"]] == [
        (f"vit.layers.{i}.attention", 4, [6] * 4) for i in range(2)
    ]
    code, out, _ = run("inspect", "pruned")
    assert code == 0
    assert out.splitlines()[2].split() == ["vit.layers.0.attention", "4", "3", "3", "24", "1,212"]
    assert told(run, "report", "pruned")["attention_parameters"] == [4800, 2424]


WAYS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "magnitude": (["--qkvo", ".5"], {"qkvo_ratios": 0.5}),
    "four": (["--qkvo", ".6", ".6", ".3", ".3"], {"qkvo_ratios": [0.6, 0.6, 0.3, 0.3]}),
    "heads": (
        ["--qkvo", ".5", "--granularity", "head", "--scope", "local", "--min-heads", "2"],
        {"qkvo_ratios": 0.5, "granularity": "head", "scope": "local", "min_heads": 2},
    ),
    "random": (
        ["--qkvo", ".5", "--scorer", "random", "--seed", "3", "--heads", "ragged", "--round-to", "2",
         "--min-channels", "2", "--include", "*.1.*"],
        {"qkvo_ratios": 0.5, "scorer": "random", "seed": 3, "heads": "ragged", "round_to": 2, "min_channels": 2,
         "include": ["*.1.*"]},
    ),
    "auto": (["--qkvo", ".5", "--round-to", "auto", "--match-dims"],
             {"qkvo_ratios": 0.5, "round_to": "auto", "match_dims": True}),
    "stock": (["--qkvo", ".3", "--stock"], {"qkvo_ratios": 0.3, "stock": True}),
    "budget": (["--target-params", ".8"], {"target_params": 0.8}),
    "macs": (["--target-macs", ".8"], {"target_macs": 0.8, "example_inputs": torch.zeros(1, 3, 16, 16)}),
    "fisher": (
        ["--qkvo", ".5", "--scorer", "fisher", "--basis", "channels", "--compensate", "no",
         "--data", "data.safetensors"],
        {"qkvo_ratios": 0.5, "scorer": "fisher", "basis": "channels", "compensate": False, "data": 8},
    ),
    "rotated": (
        ["--qkvo", ".5", "--split", "auto", "--sequential", "--compensate", "yes", "--data", "data.safetensors",
         "--batch-size", "5"],
        {"qkvo_ratios": 0.5, "split": "auto", "sequential": True, "compensate": True, "data": 5},
    ),
    "error": (
        ["--target-error", ".1", "--exclude", "*.0.*", "--data", "data.safetensors", "--samples", "8", "--quiet"],
        {"target_error": 0.1, "exclude": ["*.0.*"], "data": -8},
    ),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_plan_and_prune_are_those_of_the_library(way: str, run: Run, place: Path, tmp_path: Path) -> None:
    words, options = WAYS[way]
    model = from_pretrained(place / "dense")
    if "data" in options:
        size = options["data"]
        options = {**options, "data": data(place, abs(size))[: 1 if size < 0 else None]}
    expected = make_plan(model, **options)
    facts = told(run, "plan", "dense", *words, "-o", tmp_path / "plan.json")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == expected
    report = prune_attention(model, **options)
    told_by_library = {**report.to_dict(), "macs": None, "verified": None}
    assert facts == {**told_by_library, "written": {"plan": str(tmp_path / "plan.json")}}
    done = told(run, "prune", "dense", *words, "-o", tmp_path / "a")
    assert done["macs"][1] < done["macs"][0]
    assert done["verified"]["error"] < 1e-5
    assert {**done, "macs": None, "written": {}, "verified": None} == {**told_by_library, "written": {}}
    by_plan = told(run, "prune", "dense", "--plan", tmp_path / "plan.json", "-o", tmp_path / "b")
    assert {**by_plan, "written": 0, "verified": 0} == {**done, "written": 0, "verified": 0}
    for folder in (tmp_path / "a", tmp_path / "b"):
        same(from_pretrained(folder), model)
        assert (folder / "preprocessor_config.json").read_text() == '{"size": 16}'
        assert not (folder / "training_args.bin").exists()
    del done["written"]
    assert {**read_report(tmp_path / "a").to_dict(), "plan": 0} == {**done, "plan": 0}


def test_target_latency_is_measured_and_planned_as_by_the_library(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Times are made up, so that both see the same ones: attention is 0.8 of all, and as fast as it is small."""
    asked = []

    def measure(model: nn.Module, inputs: Any, **options: Any) -> LatencyTable:
        asked.append((inputs["pixel_values"].shape, options["round_to"]))
        dims = tuple(range(1, 7))
        shares = tuple(0.1 * heads * (qk + vo) / 12 for heads in range(1, 5) for qk in dims for vo in dims)
        names = tuple((spec.name, 0) for spec in find_attention(model))
        return LatencyTable({}, 1.0, 0.2, names, (Grid((1, 2, 3, 4), dims, dims, shares),), 1, 3)

    monkeypatch.setattr("attnprune.latency.measure", measure)
    model = from_pretrained(place / "dense")
    expected = make_plan(model, target_latency=0.7, example_inputs={"pixel_values": torch.zeros(1, 3, 16, 16)})
    facts = told(run, "plan", "dense", "--target-latency", ".7", "-o", tmp_path / "plan.json")
    assert Plan.from_json((tmp_path / "plan.json").read_text()) == expected
    assert expected.asked is not None
    assert expected.asked.budget is not None
    assert facts["latency"]["promised"] == expected.asked.budget.promised <= 0.7
    assert facts["how"]["budget"]["resource"] == "latency"
    done = told(run, "prune", "dense", "--target-latency", ".7", "-o", tmp_path / "a")
    assert done["latency"]["promised"] == facts["latency"]["promised"]
    assert asked == [((1, 3, 16, 16), "auto")] * 3
    assert "budget: latency x 0.700, predicted x" in run("report", tmp_path / "a")[1]
    assert run("plan", "dense", "--target-latency", ".1")[0] == 1  # less than what is not attention takes


def test_a_model_that_is_not_of_transformers(run: Run, tmp_path: Path) -> None:
    """Its config builds nothing, so what is known is in the manifest; the rest says what to do."""
    model = nn.TransformerEncoderLayer(32, 4, 16)
    whole = sum(p.numel() for p in model.parameters())
    report = prune_attention(model, 0.5, granularity="joint", heads="ragged")
    attnprune.save_pruned(model, tmp_path / "a", report=report)
    found = told(run, "inspect", tmp_path / "a")
    assert found["class"] == "torch.nn.modules.transformer.TransformerEncoderLayer"
    assert found["parameters"] == sum(p.numel() for p in model.parameters()) < whole
    assert found["attention"][0]["qk_dims"] == list(find_attention(model)[0].qk_dims)
    facts = told(run, "report", tmp_path / "a", "--plot", tmp_path / "a.png")
    assert {**facts, "plan": 0, "written": 0} == {**report.to_dict(), "plan": 0, "written": 0}
    assert (tmp_path / "a.png").stat().st_size > 1000
    for words in (["plan", "--qkvo", ".5"], ["export", "--onnx", tmp_path / "x"], ["bench", "--against", "dense"]):
        code, out, err = run(words[0], tmp_path / "a", *words[1:])
        assert (code, out) == (1, "")
        assert "TransformerEncoderLayer" in err
        assert "attnprune.load_pruned" in err
    attnprune.save_pruned(model, tmp_path / "b")
    code, _, err = run("report", tmp_path / "b")
    assert code == 1
    assert "report=" in err
    other = nn.TransformerEncoderLayer(32, 4, 16)
    prune_attention(other, 0.25)
    attnprune.save_pruned(other, tmp_path / "c", report=report)
    code, _, err = run("report", tmp_path / "c")
    assert code == 1
    assert "report" in err


def test_report_and_pictures(run: Run, place: Path, tmp_path: Path) -> None:
    code, out, err = run("report", "pruned", "--plot", tmp_path / "a.png")
    assert (code, err) == (0, "")
    assert out == f"{read_report(place / 'pruned')}\nwrote {tmp_path / 'a.png'}\n"
    assert "asked                       " in out
    for words in (["plan", "dense"], ["prune", "dense", "-o", tmp_path / "out"]):
        assert run(*words, "--qkvo", ".5", "--plot", tmp_path / f"{words[0]}.svg")[0] == 0
    names = {"a.png", "plan.svg", "prune.svg", "out"}
    assert {path.name for path in tmp_path.iterdir()} == names
    dense = told(run, "report", "dense")
    assert (dense["asked"], dense["achieved"]["q"]) == (None, 0)


def test_a_report_of_several_rounds_tells_shapes_alone(run: Run, place: Path, tmp_path: Path) -> None:
    assert run("prune", "pruned", "--qkvo", ".3", "--heads", "ragged", "-o", tmp_path / "out")[0] == 0
    found = read_report(tmp_path / "out")
    assert found.asked is None
    assert [layer.spec.qk_dims for layer in found.layers] == [(6, 6, 6, 6)] * 2
    assert [layer.after for layer in found.layers] == list(find_attention(from_pretrained(tmp_path / "out")))
    from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "plain")  # the record is in the config then
    assert read_report(tmp_path / "plain").plan == found.plan


def test_bench(run: Run, place: Path) -> None:
    found = told(run, "bench", "pruned", "--against", "dense", "--rounds", "3", "--batch-size", "2", "--threads", "1")
    models = [from_pretrained(place / name) for name in ("pruned", "dense")]
    assert found["parameters"] == [sum(p.numel() for p in model.parameters()) for model in models]
    assert found["macs"][0] < found["macs"][1]
    low, high = found["latency_ratio_quartiles"]
    assert 0 < low <= found["latency_ratio"] <= high
    assert found["inputs"] == {"pixel_values": [2, 3, 16, 16]}
    assert found["rounds"] == 3
    code, out, _ = run("bench", "pruned", "--against", "dense", "--data", "data.safetensors", "--rounds", "1",
                       "--dtype", "bfloat16")  # fmt: skip
    assert code == 0
    assert "pixel_values (1, 3, 16, 16)" in out


def test_bench_runs_in_turns_and_leaves_warm_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    now = 0.0

    class Model(nn.Module):
        def __init__(self, seconds: float) -> None:
            super().__init__()
            self.seconds = seconds

        def forward(self) -> None:
            nonlocal now
            calls.append(self.seconds)
            number = (len(calls) - 1) // 2 - timing.WARM_UP
            slow = [1.0, 1.0, 5.0, 1.0][number] if number >= 0 else 1000.0  # the machine is busy in the third round
            now += slow * self.seconds

    ours, theirs = Model(0.8), Model(1.0)
    monkeypatch.setattr(latency_timing, "perf_counter", lambda: now)
    before = torch.get_num_threads()
    found = timing.compare(ours, theirs, {}, 4, 2)
    assert found.ratio == pytest.approx(0.8)
    assert (found.ours, found.theirs) == (pytest.approx(0.8), pytest.approx(1.0))
    assert found.quartiles == (pytest.approx(0.8), pytest.approx(0.8))
    firsts = calls[::2]
    assert all(one != other for one, other in pairwise(firsts))
    assert torch.get_num_threads() == before


@pytest.mark.long
def test_export(run: Run, place: Path, tmp_path: Path) -> None:
    assert told(run, "export", "pruned", "--stock", tmp_path / "stock") == {"stock": str(tmp_path / "stock")}
    stock = transformers.ViTForImageClassification.from_pretrained(tmp_path / "stock").eval()
    images = data(place)[0]["pixel_values"]
    expected = from_pretrained(place / "pruned")(images).logits
    torch.testing.assert_close(stock(images).logits, expected)
    assert (tmp_path / "stock" / "preprocessor_config.json").exists()
    found = told(run, "export", "pruned", "--onnx", tmp_path / "a.onnx", "--data", "data.safetensors")
    assert found["inputs"] == {"pixel_values": ["batch", 3, 16, 16]}
    assert found["outputs"] == {"logits": ["batch", 5]}
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(None, {"pixel_values": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected.detach(), rtol=1e-4, atol=1e-4)


def test_models_are_replaced_only_when_asked(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    prune = ["prune", "dense", "--scorer", "random", "-o", out, "--qkvo"]
    assert run(*prune, ".5")[0] == 0
    code, _, err = run(*prune, ".8")
    assert code == 1
    assert "--overwrite" in err
    assert read_report(out).asked == dict.fromkeys("qkvo", 0.5)
    (out / "notes.txt").write_text("mine")
    assert run(*prune, ".8", "--overwrite")[0] == 0
    assert read_report(out).asked == dict.fromkeys("qkvo", 0.8)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    code, _, err = run("prune", "dense", "--qkvo", ".5", "-o", tmp_path / "other", "--overwrite")
    assert code == 1
    assert "a model to replace" in err
    assert (tmp_path / "other" / "thesis.tex").read_text() == "precious"


FAILURES: dict[str, tuple[list[str], str]] = {
    "no directory": (["inspect", "none"], "none: expected a directory, found nothing"),
    "no model": (["inspect", "empty"], "expected this file, or config.json"),
    "no model to plan": (["plan", "empty", "--qkvo", ".5"], "expected this file, or config.json"),
    "ratio": (["plan", "dense", "--qkvo", "1.5"], "a number in [0, 1)"),
    "scorer": (["plan", "dense", "--qkvo", ".5", "--scorer", "fisher"], "an iterable of batches"),
    "pattern": (["plan", "dense", "--qkvo", ".5", "--include", "nothing*"], "nothing*"),
    "device": (["plan", "dense", "--qkvo", ".5", "--device", "toaster"], "a device of this machine, found 'toaster'"),
    "no plan": (["prune", "dense", "--plan", "none", "-o", "OUT"], "expected a plan"),
    "plan of another": (["prune", "pruned", "--plan", "plan.json", "-o", "OUT"], "Was it pruned before?"),
    "malformed plan": (["prune", "dense", "--plan", "data.safetensors", "-o", "OUT"], "plan"),
    "no data": (["prune", "dense", "--qkvo", ".5", "--data", "none", "-o", "OUT"], "found no such file"),
    "no safetensors": (["plan", "dense", "--qkvo", ".5", "--data", "plan.json"], "expected a safetensors file"),
    "missing key": (["plan", "dense", "--qkvo", ".5", "--data", "missing"], "expected a tensor pixel_values"),
    "unknown key": (["plan", "dense", "--qkvo", ".5", "--data", "unknown"], "found lables. Names are like ['labels'"),
    "lengths": (["plan", "dense", "--qkvo", ".5", "--data", "lengths"], "found 20 of labels, 19 of pixel_values"),
    "no samples": (["plan", "dense", "--qkvo", ".5", "--data", "nothing"], "at least one sample"),
    "shape": (["plan", "dense", "--qkvo", ".5", "--data", "shape"], "pixel_values (4, 3, 8, 8)"),
    "label": (["plan", "dense", "--qkvo", ".5", "--data", "label"], "inputs that the model can run"),
    "not expressible": (["export", "ragged model", "--stock", "OUT"], "heads of equal dims"),
    "no place": (["prune", "dense", "--qkvo", ".5", "-o", "OUT/deep/er"], "a directory to write in"),
    "a file": (["prune", "dense", "--qkvo", ".5", "-o", "plan.json"], "found a file or a link"),
    "a directory": (["plan", "dense", "--qkvo", ".5", "-o", "dense"], "found a directory"),
    "onnx": (["export", "pruned", "--onnx", "OUT/a.onnx"], "a directory"),
}


@pytest.fixture(scope="module")
def broken(place: Path) -> Path:
    """Files that no command can use."""
    images, labels = torch.randn(4, 3, 16, 16), torch.zeros(20, dtype=torch.long)
    for name, tensors in {
        "missing": {"labels": labels},
        "unknown": {"pixel_values": images, "lables": labels[:4]},
        "lengths": {"pixel_values": torch.randn(19, 3, 16, 16), "labels": labels},
        "nothing": {"pixel_values": images[:0].contiguous()},
        "shape": {"pixel_values": images[:, :, :8, :8].contiguous()},
        "label": {"pixel_values": images, "labels": labels[:4] + 7},
    }.items():
        save_file(tensors, place / name)
    (place / "empty").mkdir()
    (place / "plan.json").write_text(make_plan(from_pretrained(place / "dense"), 0.5).to_json())
    ragged = from_pretrained(place / "dense")
    prune_attention(ragged, 0.5, scorer="random", heads="ragged")
    attnprune.save_pruned(ragged, place / "ragged model")
    return place


@pytest.mark.parametrize("case", FAILURES)
def test_failures_say_so_and_leave_nothing(case: str, run: Run, broken: Path, tmp_path: Path) -> None:
    words, expected = FAILURES[case]
    before = sorted(path.relative_to(broken) for path in broken.rglob("*"))
    code, out, err = run(*[word.replace("OUT", str(tmp_path / "OUT")) for word in words])
    assert code == 1
    assert out == ""
    assert err.startswith("attnprune: ")
    assert expected in err
    assert len(err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    assert sorted(path.relative_to(broken) for path in broken.rglob("*")) == before


USAGE = (
    [], ["inspect"], ["cut", "dense"], ["plan", "dense"], ["plan", "dense", "--qkvo", ".5", ".5"],
    ["plan", "dense", "--qkvo", "half"], ["plan", "dense", "--qkvo", ".5", "--target-error", ".1"],
    ["plan", "dense", "--qkvo", ".5", "--scope", "universal"], ["plan", "dense", "--qkvo", ".5", "--round-to", "0"],
    ["plan", "dense", "--qkvo", ".5", "--plot", "picture.txt"], ["prune", "dense", "--qkvo", ".5"],
    ["prune", "dense", "--qkvo", ".5", "--plan", "plan.json", "-o", "out"], ["export", "pruned"],
    ["export", "pruned", "--stock", "a", "--onnx", "b"], ["bench", "pruned"],
    ["bench", "pruned", "--against", "dense", "--rounds", "-1"],
    ["bench", "pruned", "--against", "dense", "--threads", "999999999"],
)  # fmt: skip


@pytest.mark.parametrize("words", USAGE, ids=" ".join)
def test_wrong_usage(words: list[str], run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert err.startswith("usage: attnprune")


@pytest.mark.parametrize("fails", ["save_pruned", "plot"])
def test_nothing_is_written_if_a_step_fails(
    fails: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.commands.Report if fails == "plot" else cli.commands, fails, full)
    code, _, err = run("prune", "dense", "--qkvo", ".5", "-o", tmp_path / "out", "--plot", tmp_path / "a.png")
    assert (code, err) == (1, "attnprune: [Errno 28] No space left on device\n")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands, "save_pruned", stop)
    assert run("prune", "dense", "--qkvo", ".5", "-o", tmp_path / "out") == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, _, err = run("report", "pruned", "--plot", tmp_path / "a.png")
    assert code == 1
    assert 'pip install "attnprune[plot]"' in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("cls", "config", "options", "shapes"),
    [
        ("ASTModel", "ASTConfig", {"num_mel_bins": 24, "max_length": 32}, {"input_values": (2, 32, 24)}),
        ("BertModel", "BertConfig", {"vocab_size": 9, "max_position_embeddings": 5},
         {"input_ids": (2, 5), "attention_mask": (2, 5)}),
        ("DeiTModel", "DeiTConfig", {"image_size": 16, "patch_size": 8}, {"pixel_values": (2, 3, 16, 16)}),
        ("Wav2Vec2Model", "Wav2Vec2Config", {"num_conv_pos_embedding_groups": 2}, None),
    ],
)  # fmt: skip
def test_made_up_inputs(cls: str, config: str, options: dict[str, Any], shapes: dict[str, Any] | None) -> None:
    model = getattr(transformers, cls)(getattr(transformers, config)(**CONFIG, **options)).eval()
    found = example_inputs(model, 2, 7)
    assert shapes == (found and {name: tuple(value.shape) for name, value in found.items()})
    if found:
        model(**found)
    assert example_inputs(nn.Linear(2, 2), 2, 7) is None


def test_bench_and_export_ask_for_inputs_that_nobody_can_make_up(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.commands, "example_inputs", lambda *_: None)
    for words in (["bench", "pruned", "--against", "dense"], ["export", "pruned", "--onnx", "a.onnx"]):
        code, _, err = run(*words)
        assert code == 1
        assert "--data: expected inputs for this model" in err


def test_the_version(run: Run) -> None:
    assert run("--version") == (0, f"attnprune {attnprune.__version__}\n", "")


def test_a_failure_is_the_end_of_the_process(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["attnprune", "report", str(place / "none")])
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("attnprune", run_name="__main__")
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (1, "", 1)


@pytest.mark.long
def test_whoever_reads_the_output_may_stop(place: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "attnprune", "inspect", str(place / "dense")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as one:
        assert one.stdout is not None
        assert one.stderr is not None
        one.stdout.close()
        assert one.stderr.read() == b""
        assert one.wait() == 0


def test_the_entry_point_is_there() -> None:
    lines = (Path(__file__).parents[1] / "pyproject.toml").read_text().splitlines()
    assert 'attnprune = "attnprune.cli:main"' in lines
