"""The model card: ``README.md`` beside the weights, for people and for the Hugging Face Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..values.hub_names import HUB_NAME, is_hub_name
from ..values.spec import AttentionSpec
from .folder import Folder
from .manifest import Manifest

if TYPE_CHECKING:
    from ..report.report import Report

CARD = "README.md"
_MARK = "<!-- Written by attnprune, which replaces it when the model is saved again; without this line it stays. -->"
_KEY = re.compile(r"[A-Za-z][\w-]*")


def is_free(folder: Folder) -> bool:
    """Whether a card may be written: there is none, or one that nobody has made their own."""
    return not folder.has(CARD) or _MARK.encode() in folder.read(CARD)


def card_of(
    manifest: Manifest,
    *,
    name: str,
    smaller: bool = True,
    report: Report | None = None,
    base_model: str = "",
    head: Mapping[str, Any] | None = None,
) -> str:
    """The text of a card: a YAML head, what was removed, and how to load what is left.

    Args:
        manifest: of the saved model.
        name: of the directory, or of the model on the Hub.
        smaller: whether the model is smaller than its config says, so that plain transformers cannot load it.
        report: what pruning reported.
        base_model: the model that was pruned, where it has a name on the Hub.
        head: entries of the head, in place of those made here.

    Raises:
        OptionError: ``head`` has an entry that no head can have.
    """
    kind = (manifest.config or {}).get("model_type")
    made: dict[str, Any] = {
        "library_name": "attnprune",
        "tags": ["attnprune", "pruning", *([kind] if isinstance(kind, str) else [])],
        **({"base_model": base_model} if base_model else {}),
    }
    what = manifest.model_class.rpartition(".")[2]
    done = "with attention made smaller by attnprune" if smaller else "as attnprune saves it, nothing removed"
    of = f" of `{base_model}`" if base_model else ""
    sections = [_head({**made, **(head or {})}), _MARK, f"# {name}", f"`{what}`{of}, {done}."]
    if report is not None:
        sections += ["## What was removed", f"```text\n{report}\n```"]
    elif smaller:
        shapes = [_row(one.spec) for one in manifest.record.attention]
        table = ["| attention | heads | qk channels | vo channels |", "|---|---|---|---|", *shapes]
        sections += ["## What is left of attention", "\n".join(table)]
    sections += ["## How to load it", _loading(manifest, name, smaller)]
    return "\n\n".join(sections) + "\n"


def base_of(config: Any) -> str:
    """The name on the Hub of the model that a config came from; empty where it has none."""
    name = getattr(config, "_name_or_path", None)
    return name if isinstance(name, str) and is_hub_name(name) else ""


def _head(entries: Mapping[str, Any]) -> str:
    """YAML between dashes; JSON is YAML, so that values need no rules of their own."""
    lines = []
    for key, value in entries.items():
        try:
            text = json.dumps(value, allow_nan=False) if _KEY.fullmatch(key) else None
        except (TypeError, ValueError):
            text = None
        if text is None:
            remedy = 'write card={"license": "apache-2.0"}'
            raise OptionError("card", "names with values that JSON has", f"{key!r}: {value!r}"[:80], remedy)
        lines.append(f"{key}: {text}")
    return "\n".join(["---", *lines, "---"])


def _row(spec: AttentionSpec) -> str:
    dims = [str(one[0]) if len(set(one)) == 1 else f"{min(one)} to {max(one)}" for one in (spec.qk_dims, spec.vo_dims)]
    return f"| `{spec.name or 'the model itself'}` | {spec.heads} | {dims[0]} | {dims[1]} |"


def _loading(manifest: Manifest, name: str, smaller: bool) -> str:
    if manifest.config is None:
        lines = ["import attnprune", "", f'model = attnprune.load_pruned("{name}", dense)']
        text = (
            f"`dense` is a `{manifest.model_class}` as it was before pruning; its weights may be anything, or lie on "
            "the meta device. From the Hub, `huggingface_hub.snapshot_download` gives the directory."
        )
        return "\n".join(["```python", *lines, "```", "", text])
    lines = ["# pip install 'attnprune[hf]'", "import attnprune", "", f'model = attnprune.from_pretrained("{name}")']
    if not HUB_NAME.fullmatch(name):
        lines[-1] += "  # this directory, or its name on the Hub"
    text = (
        "Plain transformers refuses it, as it has no attention implementation `attnprune.from_pretrained`."
        if smaller
        else "Plain transformers loads it too."
    )
    return "\n".join(["```python", *lines, "```", "", text])
