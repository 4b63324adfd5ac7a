"""Draws the pictures of ``docs/how_to/gallery.rst`` anew, from the keyword recogniser that is shipped beside this file.

    python examples/pictures.py [--out docs/_static/gallery]

Takes half a minute. Every file stays below 60 KB, by a palette.
"""

from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import attnprune

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "keywords"))
from data import load_model, load_split  # noqa: E402

OUT = HERE.parent / "docs" / "_static" / "gallery"
TABLE = HERE.parent / "docs" / "_static" / "sweep.json"
LARGEST = 60_000  # bytes
LAYER = "audio_spectrogram_transformer.layers.2.attention"


def save(figure: Any, path: Path) -> None:
    """Writes a figure as a PNG with a palette, of as many colours as the file's size allows."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    for colours in (256, 128, 64):
        Image.open(drawn).convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(path, optimize=True)
        if path.stat().st_size < LARGEST:
            break
    print(f"{path} ({path.stat().st_size / 1000:.0f} KB)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the pictures")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)

    features, labels, _ = load_split("train")
    places = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:256].split(16)
    data = [{"input_values": features[some], "labels": labels[some]} for some in places]

    model = load_model()
    calibration = attnprune.calibrate(model, data)
    save(attnprune.plots.energy(attnprune.energy_curves(model, calibration), target_error=0.01), out / "energy.png")
    fisher = attnprune.score_attention(model, "fisher", basis="channels", data=data)
    save(attnprune.plots.scores(fisher), out / "scores.png")
    save(fisher[LAYER].plot(name=LAYER), out / "channels.png")

    save(attnprune.sensitivity(model, data).plot(), out / "sensitivity.png")
    table = attnprune.Sweep.from_json(TABLE.read_text())  # python examples/sweep_keywords.py --table writes it
    save(table.plot(), out / "sweep.png")

    for name, options in {
        "uniform": {"scorer": "fisher", "basis": "channels", "compensate": False},
        "ragged": {"split": "auto", "heads": "ragged"},
        "heads": {"scorer": "fisher", "granularity": "head", "compensate": False},
    }.items():
        report = attnprune.prune_attention(load_model(), 0.6, data=data, **options)
        save(report.plot(), out / f"{name}.png")


if __name__ == "__main__":
    main()
