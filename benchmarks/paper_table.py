"""The paper's table, end to end: eight variants by its protocol, and ours, on the shipped keyword recogniser.

    python examples/keywords/generate.py DIR --only train --per-class 700   # 24,500 clips, 11 minutes; needs espeak-ng
    python benchmarks/paper_table.py --train DIR/train.safetensors --seeds 0 1 2    # resumable
    python benchmarks/paper_table.py --first --train ...    # on the first recogniser, with its clips (--per-class 350)
    python benchmarks/paper_table.py --render               # the table and the plot again, from the results file
    python examples/keywords/generate.py DIR --only test --per-class 200 --seed 1    # 7,000 clips more
    python benchmarks/paper_table.py --train DIR/train.safetensors --new-test DIR/test.safetensors
    python benchmarks/paper_table.py --trial PH-L-FI 1e-3 6125 32 0    # another recipe, by validation only

Prune, fine-tune with LoRA, merge, again (:mod:`paper_protocol`). Every round of every run leaves its state in the work
directory, so the same command continues what was interrupted. Results go to ``results/paper_table_shipped.json``, that
of the first recogniser to ``results/paper_table.json``, beside what
other seeds and ways have there of the same model, clips and recipes; from it
``paper_render.py`` writes the Markdown table, the table of the documentation and the plot. No choice is made on the
test split: the recipe was chosen by validation loss. A state of another recipe is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _paired import environment

ROOT = Path(__file__).resolve().parent
RESULTS = {True: ROOT / "results" / "paper_table.json", False: ROOT / "results" / "paper_table_shipped.json"}
"""Of the first recogniser, and of the shipped one."""


def state_file(workdir: Path, seed: int, name: str) -> Path:
    """Where a run keeps its state."""
    return workdir / f"seed{seed}" / f"{''.join(c if c.isalnum() else '-' for c in name)}.pt"


def ways(first: bool) -> Mapping[str, Any]:
    """The rows of a table."""
    import paper_protocol as protocol

    return protocol.FIRST_WAYS if first else protocol.WAYS


def work(jobs: Any, workdir: Path, device: str, train: Path | None, first: bool, threads: int) -> None:
    """A worker process: runs jobs until the queue holds None."""
    import paper_protocol as protocol

    torch.set_num_threads(threads)
    task = protocol.keywords(device, train, first=first)
    while (job := jobs.get()) is not None:
        seed, name = job
        say = partial(print, f"seed {seed}, {name},", flush=True)
        protocol.run(task, ways(first)[name], seed, state_file(workdir, seed, name), say)


def collect(workdir: Path, seeds: list[int], device: str, train: Path | None, first: bool = False) -> dict[str, Any]:
    """Every finished run that the state files hold, with what the figures depend on."""
    import paper_protocol as protocol

    task, runs = protocol.keywords(device, train, first=first), {}
    for name, seed in product(ways(first), seeds):
        file = state_file(workdir, seed, name)
        if file.exists():
            records = torch.load(file, weights_only=True, map_location="cpu")["records"]
            if len(records) < len(ways(first)[name].steps):  # was cut short
                continue
            short = [{k: round(v, 5) if isinstance(v, float) else v for k, v in record.items()} for record in records]
            runs.setdefault(name, {})[str(seed)] = short
    found = environment("attnprune", "transformers", "peft")
    found.pop("load", None)
    recipes = {name: way.recipe and way.recipe._asdict() for name, way in ways(first).items()}
    dense = {"validation": task.validation.measure(task.model)[1], "test": task.test.measure(task.model)[1]}
    digest = hashlib.sha256(b"".join(x.cpu().numpy().tobytes() for x in task.model.state_dict().values()))
    found |= {"device": device, "training clips": len(task.train.labels), "model": digest.hexdigest()[:12]}
    results = {"environment": found, "dense": dense, "recipes": recipes, "runs": runs}
    if (new := workdir / "new_clips.json").exists():
        results["new clips"] = json.loads(new.read_text())
    return results


def joined(results: dict[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Some results and what earlier ones have beside: runs of the same model, training clips and recipes."""
    if not before or any(
        before["environment"].get(key) != results["environment"][key] for key in ("model", "training clips")
    ):
        return results
    other = [name for name, recipe in results["recipes"].items() if before["recipes"].get(name, "none") != recipe]

    def both(runs: Mapping[str, Any], earlier: Mapping[str, Any]) -> dict[str, Any]:  # of one run twice the later one
        kept = {name: {} if name in other else earlier.get(name, {}) for name in results["recipes"]}
        found = {name: {**seeds, **runs.get(name, {})} for name, seeds in kept.items()}
        return {name: dict(sorted(seeds.items())) for name, seeds in found.items() if seeds}

    found = {**results, "runs": both(results["runs"], before["runs"])}
    new = [one["new clips"] for one in (results, before) if "new clips" in one]
    if new and new[0]["clips"] == new[-1]["clips"]:
        found["new clips"] = {**new[0], "runs": both(new[0]["runs"], new[-1]["runs"])}
    return found


def on_new_clips(workdir: Path, seeds: list[int], task: Any, first: bool = False) -> dict[str, Any]:
    """Test accuracy, on other test clips, of every run's models at one half and at its end."""
    import paper_protocol as protocol

    found: dict[str, Any] = {"clips": len(task.test.labels), "dense": task.test.measure(task.model)[1], "runs": {}}
    for name, seed in product(ways(first), seeds):
        way, file = ways(first)[name], state_file(workdir, seed, name)
        if file.exists():
            found["runs"].setdefault(name, {})[str(seed)] = one = protocol.again(task, way, seed, file)
            print(f"seed {seed}, {name}: {one}", flush=True)
    return found


def trial(args: argparse.Namespace, task: Any) -> None:
    """Seven rounds of a variant, to one half, with another recipe: prints validation figures, reads no test clip."""
    import paper_protocol as protocol

    name, *numbers = args.trial
    lr, clips, batch, distil = map(float, numbers)
    options = ways(args.first)[name].options
    recipe = protocol.Recipe(lr, int(clips), int(batch), distil, rank=args.rank)
    way = protocol.Way(options, protocol.HALF_STEPS, recipe)
    for seed in args.seeds:
        file = state_file(args.workdir, seed, " ".join(["trial", *args.trial, f"rank {args.rank}"]))
        protocol.run(task._replace(test=None), way, seed, file, partial(print, f"seed {seed},", flush=True))


def late(name: str) -> int:
    """The order of runs: what is published early has the claims in it."""
    return 2 * name.endswith("distilled") + name.endswith("MAG")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--workdir", type=Path, help="holds the state of every run (paper_table_work/shipped, or first)"
    )
    parser.add_argument("--jobs", type=int, default=2, help="worker processes (2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of each (1)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--train", type=Path, help="the full training set (without it: the 910 shipped clips)")
    parser.add_argument("--only", default="", help="only the ways in whose name this pattern is found")
    parser.add_argument("--collect", action="store_true", help="run nothing; write what the work directory holds")
    parser.add_argument("--render", action="store_true", help="run nothing; draw from the results file")
    parser.add_argument("--new-test", type=Path, help="run nothing; measure what was run on the clips of this file too")
    parser.add_argument("--trial", nargs=5, metavar=("VARIANT", "RATE", "CLIPS", "BATCH", "DISTIL"),
                        help="only run seven rounds of a variant with these, and print validation figures")  # fmt: skip
    parser.add_argument("--rank", type=int, default=16, help="of a trial's updates (16)")
    parser.add_argument("--first", action="store_true", help="the recogniser that was shipped first")
    args = parser.parse_args()
    if args.rank != 16 and not args.trial:
        parser.error("--rank is of a --trial: the table's updates have rank 16")
    args.workdir = args.workdir or Path("paper_table_work", "first" if args.first else "shipped")
    sys.path[:0] = [str(ROOT)]
    import paper_protocol as protocol
    from paper_render import render

    if args.trial:
        torch.set_num_threads(args.threads)
        trial(args, protocol.keywords(args.device, args.train, first=args.first))
        return
    if not (args.render or args.collect or args.new_test):
        context = torch.multiprocessing.get_context("spawn")
        jobs = context.Queue()
        names = sorted((name for name in ways(args.first) if re.search(args.only, name)), key=late)
        for name, seed in product(names, args.seeds):
            jobs.put((seed, name))
        for _ in range(args.jobs):
            jobs.put(None)
        options = (jobs, args.workdir, args.device, args.train, args.first, args.threads)
        workers = [context.Process(target=work, args=options) for _ in range(args.jobs)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise SystemExit("a worker failed; what is done is kept, run again to continue")
    if args.new_test:
        task = protocol.keywords(args.device, args.train, args.new_test, first=args.first)
        found = on_new_clips(args.workdir, args.seeds, task, args.first)
        (args.workdir / "new_clips.json").write_text(json.dumps(found, indent=1) + "\n")
    file = RESULTS[args.first]
    before = json.loads(file.read_text()) if file.exists() else {}
    if not args.render:
        results = joined(collect(args.workdir, args.seeds, args.device, args.train, args.first), before)
        file.write_text(json.dumps(results, indent=1) + "\n")
    print(render(json.loads(file.read_text()), file.stem))


if __name__ == "__main__":
    main()
