"""Checkpoints for plain transformers, and plans that can become one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import ASTForAudioClassification

from attnprune import AttentionPruner, export_stock, make_plan, prune_attention, prune_heads
from attnprune.errors import AllocationError, NotExpressibleError, OptionError

from .conformance import close, family, fresh, inputs
from .selection import examples, spread
from .test_checkpoint import PIXELS, vit

KEYWORDS = Path(__file__).parents[1] / "examples/keywords/checkpoint"
SOUND = torch.linspace(-2, 2, 2 * 96 * 64).reshape(2, 96, 64)


def test_a_stock_export_gives_the_same_logits_without_attnprune(tmp_path: Path) -> None:
    """Of a ViT and of the keyword recogniser, in a process where attnprune cannot be imported."""
    keywords = ASTForAudioClassification.from_pretrained(KEYWORDS, dtype=torch.float32).eval()
    ways: dict[str, dict[str, Any]] = {
        "channels": {}, "heads": {"granularity": "head"}, "rotated": {"basis": "rotated", "progress": False},
    }  # fmt: skip
    expected = {}
    models = {"audio": (keywords, SOUND), "image": (vit(), PIXELS)}
    for name, way in spread(models, ways):
        dense, x = models[name]
        model = copy.deepcopy(dense)
        prune_attention(model, 0.5, stock=True, **ways[way], data=[x] if way == "rotated" else None)
        before = copy.deepcopy(model.state_dict())
        export_stock(model, tmp_path / f"{name}-{way}")
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        with torch.no_grad():
            expected[f"{name}-{way}"] = model(x).logits
    code = (
        "import sys; sys.modules['attnprune'] = None\n"
        "import torch; from pathlib import Path; from transformers import AutoModelForImageClassification as Image\n"
        "from transformers import AutoModelForAudioClassification as Audio\n"
        "image = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)\n"
        "audio = torch.linspace(-2, 2, 2 * 96 * 64).reshape(2, 96, 64)\n"
        "found = {}\n"
        "for path in Path(sys.argv[1]).iterdir():\n"
        "    kind, x = (Image, image) if path.name.startswith('image') else (Audio, audio)\n"
        "    found[path.name] = kind.from_pretrained(path).eval()(x).logits.detach()\n"
        "torch.save(found, sys.argv[2])"
    )
    out = str(tmp_path.parent / "out.pt")
    subprocess.run([sys.executable, "-c", code, str(tmp_path), out], check=True, capture_output=True)
    found = torch.load(out)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close(found[key], value, 1e-5, key)


def test_what_no_stock_config_can_say_is_refused(tmp_path: Path) -> None:
    """The error names the layer in the way and the option that would remove it."""
    ragged, uneven, layers = vit(), vit(), vit()
    prune_attention(ragged, 0.5, heads="ragged")
    prune_attention(uneven, {"qk": 0.5}, scope="local")
    prune_heads(layers, {1: [0]})
    for model, layer, option in ((ragged, 0, "uniform"), (uneven, 0, "equal ratios"), (layers, 1, "scope")):
        with pytest.raises(NotExpressibleError, match=rf"layers\.{layer}.*{option}.*stock=True"):
            export_stock(model, tmp_path / "out")
    with pytest.raises(NotExpressibleError, match="transformers"):
        export_stock(nn.TransformerEncoderLayer(8, 2), tmp_path / "out")
    bert: Any = fresh("Bert", 0)
    prune_attention(bert, 0.5, granularity="head", scope="local")
    with pytest.raises(NotExpressibleError, match="save_pruned"):
        export_stock(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [pytest.param("AST", marks=pytest.mark.long), "ViT", "DeiT", "DINOv2"])
def test_stock_plans_can_always_be_exported(name: str, tmp_path_factory: Any) -> None:
    """Whatever else is asked: the plan fits a stock config, and the plain model computes what the pruned one does."""
    cases = len(family(name).cases())

    @settings(max_examples=examples(5), deadline=None)
    @given(
        st.integers(0, cases - 1), st.floats(0, 0.95), st.sampled_from(["head", "channel"]),
        st.sampled_from(["channels", "rotated"]), st.sampled_from([1, 2, "auto"]), st.sampled_from(["local", "global"]),
        st.integers(0, 99),
    )  # fmt: skip
    def check(case: int, ratio: float, granularity: str, basis: str, round_to: Any, scope: str, seed: int) -> None:
        model: Any = fresh(name, case)
        options = {"granularity": granularity, "basis": basis, "round_to": round_to, "scope": scope}
        try:
            report = prune_attention(model, ratio, stock=True, scorer="random", seed=seed, **options)  # type: ignore[arg-type]
        except AllocationError:
            return  # more than the floors and the rounding allow
        shapes = {(spec.heads, *spec.qk_dims, *spec.vo_dims) for spec in report.plan.after}
        assert len(shapes) == 1
        assert report.plan.after[0].qk_dims == report.plan.after[0].vo_dims
        assert {type(module).__name__ for module in model.modules() if "Pruned" in type(module).__name__} == set()
        folder, kernel = export_stock(model, tmp_path_factory.mktemp("stock")), model.config._attn_implementation
        plain = type(model).from_pretrained(folder, dtype=torch.float64, attn_implementation=kernel).eval()
        given_ = inputs(name, case, seed)
        found, expected = (family(name).run(one, given_).detach() for one in (plain, model))
        close(found, expected, 1e-9, "output")

    check()


def test_stock_steps_of_a_pruner_can_be_exported(tmp_path: Path) -> None:
    model = vit()
    pruner = AttentionPruner(model, 0.6, steps=3, stock=True, scorer="magnitude")
    while not pruner.done:
        pruner.step()
        export_stock(model, tmp_path)
    assert model.vit.layers[0].attention.q_proj.out_features < 24 * 0.6


def test_stock_contradicts_what_gives_layers_shapes_of_their_own() -> None:
    for options in (
        {"heads": "ragged"}, {"split": "auto"}, {"granularity": "joint"}, {"target_params": 0.9}, {"target_error": 0.1},
        {"qkvo_ratios": {"qk": 0.5}}, {"exclude": "*0*"}, {"stock": 1},
    ):  # fmt: skip
        model = vit()
        if "target" not in next(iter(options)):
            options = {"qkvo_ratios": 0.5, **options}
        with pytest.raises(OptionError, match="stock"):
            make_plan(model, **{"stock": True, **options})
    for other in (fresh("Bert", 0), nn.TransformerEncoderLayer(16, 4)):
        with pytest.raises(NotExpressibleError, match="save_pruned"):
            make_plan(other, 0.5, stock=True)
    model = vit()
    prune_heads(model, {1: [0]})
    with pytest.raises(NotExpressibleError, match=r"layers\.1"):
        make_plan(model, 0.5, stock=True)
