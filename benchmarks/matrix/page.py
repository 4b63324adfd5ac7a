"""Writes ``docs/reference/matrix.rst`` and ``docs/_static/support.csv`` from the results.

python -m benchmarks.matrix.page
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attnprune.families import looks

from .cells import CELLS, NOTHING, PASSED
from .run import RESULTS, ROOT, Row, read

PAGE = ROOT / "docs" / "reference" / "matrix.rst"
SUPPORT = ROOT / "docs" / "_static" / "support.csv"
KNOWN: Mapping[str, str] = {
    "transformers:audio-spectrogram-transformer": "Audio Spectrogram Transformer",
    "transformers:whisper": "Whisper",
    "transformers:wav2vec2": "wav2vec 2.0",
    "transformers:vit": "ViT",
    "transformers:deit": "DeiT",
    "transformers:dinov2": "DINOv2",
    "transformers:swin": "Swin",
    "timm:ViT": "ViT (timm)",
    "timm:Swin": "Swin (timm)",
    "timm:EVA-02": "EVA-02 (timm)",
    "torchvision:ViT": "ViT (torchvision)",
    "transformers:clip": "CLIP",
    "open_clip:CLIP": "CLIP (open_clip)",
    "transformers:siglip": "SigLIP",
    "transformers:bert": "BERT",
    "transformers:roberta": "RoBERTa",
    "transformers:distilbert": "DistilBERT",
    "transformers:modernbert": "ModernBERT",
    "transformers:t5": "T5",
    "transformers:bart": "BART",
    "transformers:llama": "Llama",
    "transformers:mistral": "Mistral",
    "transformers:qwen3": "Qwen 3",
    "transformers:gemma3": "Gemma 3",
    "transformers:phi3": "Phi-3",
    "transformers:falcon": "Falcon",
    "transformers:gpt2": "GPT-2",
    "transformers:gpt_neox": "GPT-NeoX",
    "transformers:deepseek_v3": "DeepSeek-V3",
    "PyTorch:nn.MultiheadAttention": "nn.MultiheadAttention",
    "PyTorch:nn.TransformerDecoder": "nn.TransformerDecoder",
    "own class:NanoGPT": "nanoGPT's attention",
}
"""Families that many know, for the short table."""
GROUPS: Mapping[str, str] = {
    "Wrong": "What is left computes something else than the dense model with rows and columns at zero.",
    "Passed over silently": "Attention of which nothing is said, neither as found nor as skipped.",
    "Not finished": "The program itself did not come to an end with these.",
    "Complete": "Every attention with four projections around a softmax is pruned, and runs by the host's own forward "
    "or one of ours: projections, kernel and cache shrink.",
    "Complete, expanded": "Every such attention is pruned; some keep the host's own forward on dense dims: parameters "
    "and projections shrink, the kernel and the cache do not.",
    "In part": "Some attention is pruned; the rest is in ``report.skipped``, with the reason given here.",
    "Refused": "Nothing can be pruned; the reason is in ``report.skipped``.",
    "Of another kind": "No attention with four projections around a softmax over keys: deformable, linear, recurrent, "
    "convolutional, over channels; ``report.skipped`` says so.",
}
"""Headings, and what stands under them."""
OTHER_KINDS = (
    *looks.OTHER_KINDS,
    looks.CONVOLVED,
    looks.GATE,
    looks.LEARNED,
    looks.VALUELESS,
    "no softmax over keys was seen in its forward",
)
"""Reasons of attention that has no four projections around a softmax."""
MARKS = {PASSED: "✓", NOTHING: "-"}
MISSING, FAILED = "·", "✗"


def group_of(row: Row) -> str:
    """The heading that a family stands under; empty for what has no attention, or could not be run."""
    said = [str(row.get(name, "")) for name in CELLS]
    if "unusable" in row:
        return ""
    if "attention" not in row:
        return "Not finished"
    if any(one.startswith("wrong") for one in said):
        return "Wrong"
    if row["silent"]:
        return "Passed over silently"
    if not row["attention"]:
        return ""
    others = sum(count for _, why, count in row["skipped"] if why in OTHER_KINDS)
    if row["prunable"] + others < row["attention"]:
        return "In part" if row["prunable"] else "Refused"
    if not row["prunable"]:
        return "Of another kind"
    return "Complete, expanded" if "expanded" in row.get("ways", {}) else "Complete"


def mark(said: str) -> str:
    """A cell as one sign: passed, without a meaning, or a reason below."""
    return next((sign for word, sign in MARKS.items() if said.startswith(word)), FAILED)


def plain(reason: str) -> str:
    """A reason without what differs from family to family: names, numbers and shapes."""
    reason = re.sub(r"^[\w.]*\d[\w.]*(: \w+)?: ", "", reason)
    reason = re.sub(r"(?<=among its parts) \(.*?\)", "", reason)
    reason = re.sub(r"(?<![A-Za-z_])\d[\d.x]*(e[+-]?\d+)?", "N", reason)
    return reason[:160].strip()


class Reasons:
    """Reasons by number, in the order in which they are first given."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, reason: str) -> str:
        number = self.known.setdefault(plain(reason), len(self.known) + 1)
        return f":ref:`{number} <matrix-reason-{number}>`"

    def listed(self) -> Iterable[str]:
        """The reasons, each with its target."""
        for text, number in self.known.items():
            yield f".. _matrix-reason-{number}:\n\n**{number}.** {escaped(text)}\n"


def escaped(text: str) -> str:
    """Text that means nothing else to reStructuredText."""
    return re.sub(r"([*`_|\\<>])", r"\\\1", text)


def line_of(row: Row, reasons: Reasons) -> list[str]:
    """A family's name, modules pruned of how many, how they run, signs of its cells, and numbers of reasons."""
    name = escaped(str(row["name"])) + ("" if row["source"] == "transformers" else f" ({escaped(row['source'])})")
    said = {cell: str(row[cell]) for cell in CELLS if cell in row}
    signs = "".join(mark(said[cell]) if cell in said else MISSING for cell in CELLS) if row.get("prunable") else ""
    why = [f"{cell} {reasons(text)}" for cell, text in said.items() if mark(text) == FAILED]
    why += [f"{escaped(kind)} {reasons(text)}" for kind, text, _ in row.get("skipped", [])]
    why += [f"silent: {escaped(text)}" for text in row.get("silent", [])]
    if "failed" in row:
        why.append(escaped(plain(row["failed"])))
    counts = f"{row.get('prunable', '?')} of {row.get('attention', '?')}"
    ways = ", ".join(row.get("ways", {}))
    return [name, f"{counts} {ways}".strip(), f"``{signs}``" if signs else "", "; ".join(why)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], widths: str = "auto") -> str:
    """A list-table."""
    lines = [".. list-table::", "   :header-rows: 1", f"   :widths: {widths}", ""]
    for row in (header, *rows):
        lines += [f"   {'* -' if place == 0 else '  -'} {cell}".rstrip() for place, cell in enumerate(row)]
    return "\n".join(lines)


def summary(rows: Sequence[Row]) -> str:
    """By package, how many families stand under which heading."""
    groups = [name for name in GROUPS if any(group_of(row) == name for row in rows)]
    body = []
    for source in dict.fromkeys(str(row["source"]) for row in rows):
        counts = Counter(group_of(row) for row in rows if row["source"] == source)
        body.append([source, *(str(counts[name]) for name in groups)])
    total = Counter(group_of(row) for row in rows)
    body.append(["all", *(str(total[name]) for name in groups)])
    return table(["from", *groups], body)


def by_cell(rows: Sequence[Row]) -> str:
    """Of every cell, how often it passed, gave a reason, or has no meaning."""
    body = []
    for name in CELLS:
        counts = Counter(mark(str(row[name])) for row in rows if name in row)
        missing = sum(name not in row for row in rows if row.get("prunable"))
        body.append([name, *(str(counts[sign]) for sign in (MARKS[PASSED], FAILED, MARKS[NOTHING])), str(missing)])
    return table(["cell", "passed", "a reason", "no meaning", "not tried"], body)


def support(rows: Mapping[str, Row]) -> str:
    """The short table of known families, as CSV."""
    out = io.StringIO()
    cells = ("channels", "heads", "ragged", "rotated", "cache", "save/load", "compile", "stock export")
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["model", "pruned", "runs", *cells])
    for key, name in KNOWN.items():
        row = rows[key]
        runs = "expanded" if "expanded" in row["ways"] else "compact"
        counts = f"{row['prunable']} of {row['attention']}"
        writer.writerow([name, counts, runs, *(_word(str(row[cell])) if cell in row else "" for cell in cells)])
    return out.getvalue()


def _word(said: str) -> str:
    """A cell in a word."""
    passed = next((word for end, word in PART.items() if said.endswith(end)), "yes")
    return {MARKS[PASSED]: passed, MARKS[NOTHING]: "n/a"}.get(mark(said), "no")


PART = {"vo alone": "vo", "qk alone": "qk", "whole heads": "heads"}
"""Of cells that passed in part, how they end, and a word for it."""
EXPLAINED = (
    "- channels, heads, ragged, qk != vo: the pruned model gives what the dense one gives with rows and columns at",
    "  zero (:func:`attnprune.masked`), to 1e-8 in double precision; to 1e-5 where the host itself rounds to single.",
    "  Half goes (of ragged heads 40 %; of qk a half and of vo a quarter), by magnitude; heads from every attention",
    "  that has several.",
    "- rotated: the same with heads rotated by data first, and nothing refitted.",
    "- cache: five tokens with and without a cache, greedily and by two beams, and their logits, are the same.",
    "- save/load: :func:`attnprune.save_pruned` and transformers' own ``save_pretrained``, read again.",
    "- compile: TorchDynamo traces one graph where it does of the dense model; export: ``torch.export``, and a run.",
    "- stock export: :func:`attnprune.export_stock`, read by plain transformers: fewer channels, or else fewer whole",
    "  heads. Configs of many classes can say neither, which is then the reason.",
)


def rendered(result: Mapping[str, Any]) -> str:
    """The page."""
    rows = [result["rows"][key] for key in sorted(result["rows"], key=str.lower)]
    about = result["about"]
    shown = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    attending = [row for row in rows if group_of(row)]
    found = sum(row.get("attention", 0) for row in attending)
    pruned = sum(row.get("prunable", 0) for row in attending)
    older = sum(row["code"] != about["code"] for row in rows)
    counts = Counter(group_of(row) for row in attending)
    complete = counts["Complete"] + counts["Complete, expanded"]
    usual = len(attending) - counts["Of another kind"]
    order = "; ".join(f"{number} {name}" for number, name in enumerate(CELLS, 1))
    parts = [
        "The matrix", "==========", "",
        ".. Generated: make matrix", "",
        f"{len(attending)} model families with attention, built tiny with random weights, pruned and run on "
        f"{about['date']}: of their {found:,} attention modules {pruned:,} are pruned. With {shown}. ``make matrix`` "
        "does it again, without a download; ``benchmarks/results/matrix.json`` has every reason in full.", "",
        f"Of {usual:,} families with four projections around a softmax, {complete:,} are pruned completely "
        f"({complete / max(usual, 1):.1%}).", "",
        *([f"{older} rows are of another state of the code.", ""] if older else []),
        summary(attending), "",
        f"A cell is {MARKS[PASSED]} passed, {FAILED} a reason (by its number, below), {MARKS[NOTHING]} without a "
        "meaning for the family, or for its dense model, "
        f"{MISSING} not tried. They stand in this order: {order}.", "",
        *EXPLAINED, "",
        by_cell(attending), "",
    ]  # fmt: skip
    reasons = Reasons()
    for name, text in GROUPS.items():
        members = [row for row in attending if group_of(row) == name]
        if members:
            heading = f"{name} ({len(members)})"
            parts += [heading, "-" * len(heading), "", text, ""]
            lines = [line_of(row, reasons) for row in members]
            parts += [table(["family", "pruned", "cells", "reasons"], lines, "30 20 20 30"), ""]
    if reasons.known:
        parts += ["Reasons", "-------", "", *reasons.listed()]
    none = [row for row in rows if not group_of(row)]
    without = ", ".join(escaped(str(row["name"])) for row in none if "unusable" not in row)
    unusable = [
        f"- {escaped(str(row['name']))}: {escaped(plain(row['unusable']))}" for row in none if "unusable" in row
    ]
    if without:
        parts += ["Without attention", "-----------------", "", f"{without}.", ""]
    if unusable:
        parts += ["Not built or not run here", "-------------------------", "", *unusable, ""]
    return "\n".join(parts).rstrip() + "\n"


def main() -> None:
    result = read(RESULTS)
    PAGE.write_text(rendered(result), "utf-8")
    SUPPORT.write_text(support(result["rows"]), "utf-8")
    print(PAGE.relative_to(Path.cwd()) if PAGE.is_relative_to(Path.cwd()) else PAGE)


if __name__ == "__main__":
    sys.exit(main())
