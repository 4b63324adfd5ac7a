"""A plan applied to files gives what it gives in memory, byte for byte."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ViTForImageClassification

from attnprune import apply_plan, apply_to_checkpoint, from_pretrained, load_pruned, make_plan, save_pruned
from attnprune.checkpoint.manifest import Manifest
from attnprune.errors import CheckpointError, NonFiniteError, OptionError, PlanMismatchError

from .conformance import family, fresh, inputs
from .families import FAMILIES
from .selection import examples
from .test_checkpoint import PIXELS, WAYS, same, vit


def blobs(folder: Path) -> list[tuple[str, str, int | None]]:
    """Names (by digest), digests and sizes of the weights."""
    return [tuple(one) for one in Manifest.read(folder).shards]  # type: ignore[misc]


@pytest.mark.parametrize("name", FAMILIES)
def test_files_take_a_plan_as_models_do(name: str, tmp_path_factory: Any) -> None:
    """Every family, every kind of plan, several dtypes and file sizes; once more on what came out."""
    cases = len(family(name).cases())

    @settings(max_examples=examples(6), deadline=None)
    @given(
        st.integers(0, cases - 1), st.sampled_from(sorted(WAYS)), st.sampled_from([torch.float64, torch.float16]),
        st.sampled_from(["5GB", 2000]), st.integers(0, 99),
    )  # fmt: skip
    def check(case: int, way: str, dtype: torch.dtype, size: Any, seed: int) -> None:
        folder, dense = tmp_path_factory.mktemp("stream"), fresh(name, case)
        options = dict(WAYS[way])
        if options.get("compensate"):
            options["data"] = [{key: getattr(x, "detach", lambda x=x: x)() for key, x in inputs(name, case).items()}]
        ratios = {"qk": 0.5, "vo": 0.25} if way == "decoupled" else 0.5
        plan = make_plan(dense, ratios, scorer="random", seed=seed, progress=False, **options)
        save_pruned(dense.to(dtype), folder / "dense", max_shard_size=size)
        skeleton = copy.deepcopy(dense).to("meta")
        kinds = [type(module) for module in skeleton.modules()]
        apply_to_checkpoint(folder / "dense", plan, folder / "files", model=skeleton, max_shard_size=size)
        assert [type(module) for module in skeleton.modules()] == kinds
        apply_plan(dense, plan)
        save_pruned(dense, folder / "memory", max_shard_size=size)
        assert blobs(folder / "files") == blobs(folder / "memory")
        assert Manifest.read(folder / "files").record == Manifest.read(folder / "memory").record
        again = make_plan(dense, 0.3, scorer="random", heads="ragged")
        apply_to_checkpoint(folder / "files", again, folder / "files", model=skeleton)  # in place
        apply_plan(dense, again)
        save_pruned(dense, folder / "memory")
        assert blobs(folder / "files") == blobs(folder / "memory")
        same(dense, load_pruned(folder / "files", fresh(name, case)))

    check()


@pytest.mark.parametrize("size", ["50GB", "5KB"])
@pytest.mark.parametrize("way", ["ragged", "compensated"])
def test_a_directory_of_transformers_needs_no_model(way: str, size: str, tmp_path: Path) -> None:
    """One file or several, with the names that the class had in earlier versions."""
    vit().save_pretrained(tmp_path / "dense", max_shard_size=size)
    model: Any = ViTForImageClassification.from_pretrained(tmp_path / "dense").eval()
    plan = make_plan(model, 0.5, data=[PIXELS], progress=False, **WAYS[way])
    apply_to_checkpoint(tmp_path / "dense", plan, tmp_path / "files")
    apply_plan(model, plan)
    save_pruned(model, tmp_path / "memory")
    assert blobs(tmp_path / "files") == blobs(tmp_path / "memory")
    again: Any = from_pretrained(tmp_path / "files")
    same(model, again)
    with torch.no_grad():
        assert torch.equal(model(PIXELS).logits, again(PIXELS).logits)
    model.save_pretrained(tmp_path / "theirs")  # pruned already
    more = make_plan(model, 0.3, heads="ragged")
    apply_to_checkpoint(tmp_path / "theirs", more, tmp_path / "files")
    apply_plan(model, more)
    same(model, from_pretrained(tmp_path / "files"))


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=20, hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=12)
    model = BertForMaskedLM(config)
    model.save_pretrained(tmp_path / "dense")
    plan = make_plan(model, 0.5, heads="ragged")
    apply_to_checkpoint(tmp_path / "dense", plan, tmp_path / "files")
    apply_plan(model, plan)
    assert blobs(tmp_path / "files") == blobs(save_pruned(model, tmp_path / "memory"))
    both = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.Linear(4, 4), nn.Linear(4, 4)])
    both[2].weight = both[1].weight
    save_pruned(both, tmp_path / "both")
    untied = nn.ModuleList([nn.MultiheadAttention(16, 4), nn.Linear(4, 4), nn.Linear(4, 4)]).to("meta")
    plan = make_plan(both, 0.5)
    apply_to_checkpoint(tmp_path / "both", plan, tmp_path / "out", model=untied)
    apply_plan(both, plan)
    assert Manifest.read(tmp_path / "out").tied == {"2.weight": "1.weight"}
    assert blobs(tmp_path / "out") == blobs(save_pruned(both, tmp_path / "both"))


def test_a_single_file_and_a_directory_without_config(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 8)
    (tmp_path / "in").mkdir()
    save_file(model.state_dict(), tmp_path / "in/model.safetensors")
    plan = make_plan(model, 0.5)
    skeleton = copy.deepcopy(model).to("meta")
    for source in (tmp_path / "in", tmp_path / "in/model.safetensors"):
        apply_to_checkpoint(source, plan, tmp_path / "out", model=skeleton)
        with pytest.raises(CheckpointError, match="model="):
            apply_to_checkpoint(source, plan, tmp_path / "none")
    apply_plan(model, plan)
    same(model, load_pruned(tmp_path / "out", skeleton))


def test_what_does_not_fit_is_refused_and_leaves_the_target(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(16, 4, 8)
    skeleton = copy.deepcopy(model).to("meta")
    dense = save_pruned(model, tmp_path / "dense")
    plan = make_plan(model, 0.5)
    target = apply_to_checkpoint(dense, plan, tmp_path / "target", model=skeleton)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(PlanMismatchError):
        apply_to_checkpoint(target, plan, target, model=skeleton)
    with pytest.raises(OptionError, match="plan"):
        apply_to_checkpoint(dense, plan.to_json(), target, model=skeleton)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError):
        apply_to_checkpoint(dense, plan, target, model=nn.TransformerEncoderLayer(16, 4, 9).to("meta"))
    path = next(dense.glob("*.safetensors"))
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="SHA"):
        apply_to_checkpoint(dense, plan, target, model=skeleton)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="link"):
        apply_to_checkpoint(dense, plan, target, model=skeleton)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.self_attn.in_proj_weight[0, 0] = torch.nan
    save_file(broken.state_dict(), tmp_path / "nan.safetensors")
    with pytest.raises(NonFiniteError, match="in_proj_weight"):
        apply_to_checkpoint(tmp_path / "nan.safetensors", plan, target, model=skeleton)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert type(skeleton.self_attn) is nn.MultiheadAttention


@pytest.mark.long
def test_memory_is_that_of_a_tensor_or_two(tmp_path: Path) -> None:
    """158 MB of weights: the peak of a process that prunes them, over what it needs before, is below a quarter."""
    count, one = 25, nn.TransformerEncoderLayer(512, 8, 512)
    state = {f"{i}.{key}": value.clone() for i in range(count) for key, value in one.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    dense = nn.Sequential(one)
    plan = make_plan(dense, 0.5, heads="ragged")
    layers = [replace(plan.layers[0], spec=replace(plan.specs[0], name=f"{i}.self_attn")) for i in range(count)]
    (tmp_path / "plan.json").write_text(replace(plan, layers=tuple(layers)).to_json())
    code = (
        "import resource, sys, torch, attnprune; from torch import nn; from pathlib import Path\n"
        "import attnprune.checkpoint.stream\n"
        "with torch.device('meta'):\n"
        "    model = nn.Sequential(*[nn.TransformerEncoderLayer(512, 8, 512) for _ in range(25)])\n"
        "plan = attnprune.Plan.from_json(Path(sys.argv[1], 'plan.json').read_text())\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "attnprune.apply_to_checkpoint(sys.argv[1], plan, sys.argv[1] + '/out', model=model)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    size = os.path.getsize(tmp_path / "model.safetensors")
    told = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
    assert int(told.stdout) * (1 if sys.platform == "darwin" else 1024) < size / 4
    apply_plan(dense, plan)
    skeleton = nn.Sequential(*[nn.TransformerEncoderLayer(512, 8, 512, device="meta") for _ in range(count)])
    again: Any = load_pruned(tmp_path / "out", skeleton)
    same(dense[0], again[7])
