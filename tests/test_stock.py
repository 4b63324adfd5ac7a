"""Checkpoints for plain transformers, and plans that can become one."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnprune import export_stock, prune_attention, prune_heads
from attnprune.errors import NotExpressibleError

from .conformance import close, fresh
from .test_checkpoint import PIXELS, logits, vit


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
    with pytest.raises(NotExpressibleError, match="shape"):
        export_stock(bert, tmp_path / "out")
    assert not (tmp_path / "out").exists()
