"""A pruned model as a directory: bit-exact, safe to read, and loadable by plain transformers where that is possible."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from attnprune import (
    apply_plan,
    export_stock,
    find_attention,
    load_pruned,
    make_plan,
    prune_attention,
    prune_heads,
    save_pruned,
)
from attnprune.errors import CheckpointError, NotExpressibleError

from .conformance import close, family, fresh, inputs
from .families import FAMILIES

WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"heads": "ragged", "split": "auto"},
    {"granularity": "head"},
    {"granularity": "joint", "heads": "ragged"},
    {"scope": "local", "basis": "rotated"},
)


def same(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for key, value in mine.items():
        assert value.dtype == theirs[key].dtype, key
        assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_bit_exact(name: str, tmp_path_factory: Any) -> None:
    cases = len(family(name).cases())
    dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])

    @settings(max_examples=15, deadline=None)
    @given(st.integers(0, cases - 1), st.sampled_from(WAYS), dtypes, st.integers(0, 99))
    def check(case: int, way: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
        model, folder = fresh(name, case, dtype), tmp_path_factory.mktemp("saved")
        prune_attention(model, 0.5, scorer="random", seed=seed, **way)
        save_pruned(model, folder)
        dense = fresh(name, case)
        again = load_pruned(folder, dense)
        assert again is dense
        same(model, again)
        assert [spec.qk_dims for spec in find_attention(again)] == [spec.qk_dims for spec in find_attention(model)]
        if dtype == torch.float64:
            given_ = inputs(name, case, seed)
            found, expected = (family(name).run(one, given_).detach() for one in (again, model))
            close(found, expected, 0, "output")
        prune_attention(again, 0.3, scorer="random", heads="ragged")
        save_pruned(again, folder)
        same(again, load_pruned(folder, fresh(name, case)))
        assert sorted(path.suffix for path in folder.iterdir()).count(".safetensors") == 1

    check()


def vit(**config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 12}
    more = {"image_size": 16, "patch_size": 8, "num_labels": 5}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**{**sizes, **more, **config})).eval()


PIXELS = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PIXELS).logits  # type: ignore[no-any-return]


def test_a_fresh_process_loads_a_hugging_face_model_from_its_directory_alone(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, {"qk": 0.5, "vo": 0.25}, heads="ragged")
    save_pruned(model, tmp_path)
    expected = logits(model)
    code = (
        "import sys, torch, attnprune; model = attnprune.load_pruned(sys.argv[1]); "
        "x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16); "
        "torch.save(model(x).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "out.pt")], check=True)
    assert torch.equal(torch.load(tmp_path / "out.pt"), expected)
    half = load_pruned(tmp_path, dtype=torch.float16)
    assert next(half.parameters()).dtype == torch.float16


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "local"},
        {"granularity": "head", "scope": "local"},
        {"scope": "local", "basis": "rotated", "data": [PIXELS], "progress": False},
    ],
    ids=["channels", "heads", "rotated"],
)
def test_a_stock_export_gives_the_same_logits_without_attnprune(options: dict[str, Any], tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5, **options)
    before = copy.deepcopy(model.state_dict())
    export_stock(model, tmp_path / "stock")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    code = (
        "import sys; sys.modules['attnprune'] = None\n"
        "import torch; from transformers import AutoModelForImageClassification as Auto\n"
        "model = Auto.from_pretrained(sys.argv[1]).eval()\n"
        "x = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)\n"
        "torch.save(model(x).logits.detach(), sys.argv[2])"
    )
    out = str(tmp_path / "out.pt")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "stock"), out], check=True, capture_output=True)
    close(torch.load(out), logits(model), 1e-5, "logits")


def test_what_no_stock_config_can_say_is_refused(tmp_path: Path) -> None:
    ragged, uneven, layers = vit(), vit(), vit()
    prune_attention(ragged, 0.5, heads="ragged")
    prune_attention(uneven, {"qk": 0.5}, scope="local")
    prune_heads(layers, {1: [0]})
    for model in (ragged, uneven, layers):
        with pytest.raises(NotExpressibleError, match=r"layers\.\d.*scope"):
            export_stock(model, tmp_path / "out")
    with pytest.raises(NotExpressibleError, match="transformers"):
        export_stock(nn.TransformerEncoderLayer(8, 2), tmp_path / "out")
    bert: Any = fresh("Bert", 0)
    prune_attention(bert, 0.5, granularity="head", scope="local")
    with pytest.raises(NotExpressibleError, match="shape"):
        export_stock(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# files that nobody vouches for


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model = nn.TransformerEncoderLayer(16, 4, 8)
    prune_attention(model, 0.5, heads="ragged", scorer="random")
    return save_pruned(model, tmp_path / "saved")


def refused(folder: Path, **options: Any) -> CheckpointError:
    dense = nn.TransformerEncoderLayer(16, 4, 8)
    before, kind = copy.deepcopy(dense.state_dict()), type(dense.self_attn)
    with pytest.raises(CheckpointError) as caught:
        load_pruned(folder, dense, **options)
    assert type(dense.self_attn) is kind
    assert all(torch.equal(value, before[key]) for key, value in dense.state_dict().items())
    assert len(str(caught.value)) < 1000
    return caught.value


def test_altered_manifests_are_refused(saved: Path) -> None:
    path = saved / "attnprune.json"
    good = json.loads(path.read_text())
    name, spec = good["weights"], good["attention"][0]["spec"]

    def attention(**change: Any) -> dict[str, Any]:
        one = good["attention"][0]
        return {"attention": [{**one, "spec": {**spec, **change.pop("spec", {})}, **change}]}

    for change in (
        {"format": "pickle"}, {"version": 2}, {"version": True}, {"extra": 1}, {"weights": "../" + name},
        {"weights": "/etc/passwd"}, {"weights": 3}, {"weights": "model-0000000000000000.safetensors"},
        {"sha256": "0" * 64}, {"sha256": "x"}, {"attention": {}}, {"attention": [1]},
        {"attention": good["attention"] * 2}, attention(kept=[0, 1]), attention(kept=[3, 2, 1, 0]),
        attention(kept=[0, 1, 2, 9]), attention(spec={"name": "other"}), attention(spec={"qk_dims": [9, 1, 1, 1]}),
        attention(spec={"qk_dims": [1 << 30] * 4}), attention(spec={"scale": -1.0}), attention(spec={"d_model": None}),
        attention(spec={"qk_dims": [2, 2, 2, 1]}),
    ):  # fmt: skip
        path.write_text(json.dumps({**good, **change}))
        refused(saved)
    for text in ("", "{", "[]", "null", "[" * 100_000, '{"format": 1, "format": 2}'):
        path.write_text(text)
        refused(saved)
    path.unlink()
    refused(saved)
    path.symlink_to("/etc/hostname")
    refused(saved)


def test_altered_weights_are_refused(saved: Path) -> None:
    path = next(saved.glob("*.safetensors"))
    good = path.read_bytes()
    for raw in (good[:-1], good[:9], b"", good[:100] + bytes([good[100] ^ 1]) + good[101:], b"\xff" * 64):
        path.write_bytes(raw)
        assert "SHA-256" in str(refused(saved))
    for raw in (good[:-1], good[:9], b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + good[8:]):
        path.write_bytes(raw)
        refused(saved, verify=False)
    path.unlink()
    refused(saved)
    path.symlink_to("/etc/hostname")
    refused(saved, verify=False)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    for other in (nn.TransformerEncoderLayer(16, 4, 9), nn.TransformerEncoderLayer(16, 4, 8, bias=False)):
        prune_attention(other, 0.5)
        refused(save_pruned(other, tmp_path / "other"))
    plain = nn.Sequential(nn.TransformerEncoderLayer(16, 4, 8))
    prune_attention(plain, 0.5)
    refused(save_pruned(plain, tmp_path / "third"))


def test_a_config_of_nobody_is_refused(tmp_path: Path) -> None:
    model = vit()
    prune_attention(model, 0.5)
    save_pruned(model, tmp_path)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    for change in (
        {"architectures": ["os"]}, {"architectures": ["pipeline"]}, {"architectures": None}, {"architectures": []},
        {"architectures": ["__name__"]}, {"architectures": "ViTModel"}, {"hidden_size": "x"},
    ):  # fmt: skip
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(CheckpointError):
            load_pruned(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="model="):
        load_pruned(tmp_path)


def test_a_killed_save_leaves_the_old_model_or_the_new(tmp_path: Path) -> None:
    """The process that saves two models in turn is killed at some time or other; what is there always loads."""
    code = (
        "import sys, torch, attnprune\n"
        "from torch import nn\n"
        "models = []\n"
        "for share in (0.25, 0.5):\n"
        "    model = nn.TransformerEncoderLayer(16, 4, 8)\n"
        "    attnprune.prune_attention(model, share, scope='local')\n"
        "    models.append(model)\n"
        "attnprune.save_pruned(models[0], sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    for model in models[::-1]: attnprune.save_pruned(model, sys.argv[1])\n"
    )
    seen = set()
    for i in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.013 * (i + 1))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        dense = nn.TransformerEncoderLayer(16, 4, 8)
        load_pruned(tmp_path, dense)
        seen.add(find_attention(dense)[0].qk_dim)
    assert seen <= {2, 3}


def test_a_plan_is_not_needed_to_load(tmp_path: Path) -> None:
    model = fresh("ViT", 0)
    data = [{k: v.detach() for k, v in inputs("ViT", 0).items()}]
    plan = make_plan(model, 0.5, data=data, progress=False, heads="ragged")
    apply_plan(model, plan)
    same(model, load_pruned(save_pruned(model, tmp_path), fresh("ViT", 0)))
