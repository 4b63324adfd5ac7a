"""The paper's protocol on the shipped keyword recogniser: prune a little, fine-tune, merge, again.

Every round of a run removes the same fraction of what is left and then recovers with LoRA as the paper does. The
fraction is ``1 - 0.5 ** (1 / 7)``, 9.4 % (the paper: 10 %), so that seven rounds end at exactly one half, ten at 62.9 %
and fourteen at three quarters. A run is a function of its name and its seed: each round seeds the random numbers anew,
and the state after it is one file, replaced in one step, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import copy
import os
import resource
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnprune
from attnprune.errors import CheckpointError
from attnprune.integrations.peft import lora_recover

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "examples" / "keywords")]

Batch = dict[str, Tensor]
Options = dict[str, Any]
Record = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
LETTER: Options = {"basis": "channels", "compensate": False, "heads": "uniform", "split": "fixed"}
SMOOTHING = 0.1  # of labels, as in the checkpoint's own training
FREE: Options = {"split": "auto", "heads": "ragged"}


class Recipe(NamedTuple):
    """How a round recovers: by LoRA, the best of the checks by validation loss, whatever the loss was before."""

    lr: float
    clips: int  # the next ones of the training set, newly augmented; 6,125 are half of the full set
    batch: int
    distil: float = 0.0  # weight of the divergence from the dense model's outputs; the rest is cross entropy
    checks: int = 1  # looks at the validation loss in a round, the last at its end
    smoothing: float = SMOOTHING  # of labels, in the loss that is trained and in the one that chooses
    whole: int = 0  # instead of updates of rank 16, all weights are trained on so many times these clips


class Way(NamedTuple):
    """One row of the table: what a round removes, after which steps of 9.4 % a round is made, how it recovers."""

    options: Options | None  # None: nothing is removed
    steps: tuple[int, ...]
    recipe: Recipe | None  # None: no recovery; every share is removed from the dense model at once


PAPER_STEPS = tuple(range(1, 10))  # a tenth round ends at 62.9 %, past the paper's last column
HALF_STEPS = tuple(range(1, 8))
OUR_STEPS = (2, 4, 7, 9, 14)
READ = {1: 10, 2: 20, 4: 30, 5: 40, 7: 50, 9: 60, 14: 75}  # steps read on the test split, and the column they go to
LABELS, DISTILLED = Recipe(3e-3, 6125, 32), Recipe(3e-3, 6125, 32, distil=1.0)
MORE = LABELS._replace(clips=24500)  # two passes over the full set in every round; an epoch of the paper's has 84,843
WHOLE = Recipe(1e-3, 6125, 32, distil=0.7, whole=16)  # 98,000 clips, 8 passes over the full set
VARIANTS = {
    f"{scheme}-{scope[0].upper()}-{score}": {"granularity": granularity, "scope": scope, "scorer": scorer, **LETTER}
    for score, scorer in (("FI", "fisher"), ("MAG", "magnitude"))
    for scheme, granularity in (("PH", "channel"), ("EH", "head"))
    for scope in ("global", "local")
}
OURS = {"rotated": {}, "rotated, free": FREE, "rotated, joint": {"granularity": "joint", **FREE}}
WAYS: dict[str, Way] = {
    **{name: Way(options, PAPER_STEPS, LABELS) for name, options in VARIANTS.items()},
    "dense": Way(None, PAPER_STEPS, LABELS),
    **{f"{name}; distilled": Way(VARIANTS[name], HALF_STEPS, DISTILLED) for name in VARIANTS if name.endswith("FI")},
    **{f"{name}; no recovery": Way(options, tuple(READ), None) for name, options in OURS.items()},
    **{f"{name}; all weights": Way(VARIANTS.get(name), (7,), WHOLE) for name in ("EH-L-FI", "dense")},
    **{
        f"{name}; more clips": Way(VARIANTS.get(name), HALF_STEPS, MORE)
        for name in ("PH-G-FI", "PH-L-FI", "EH-G-FI", "EH-L-FI", "dense")
    },
    "rotated; LoRA": Way(OURS["rotated"], OUR_STEPS, LABELS),
    "rotated, free; LoRA": Way(FREE, OUR_STEPS, LABELS),
    "rotated, free; distilled": Way(FREE, OUR_STEPS, DISTILLED),
}


def share(step: int) -> float:
    """What is gone after so many steps of 9.4 % of what is left."""
    return 1 - 0.5 ** (step / 7)


class Clips(NamedTuple):
    """Features (n, 96, 64) and labels (n,) of a split, on the device."""

    features: Tensor
    labels: Tensor

    def batches(self, size: int) -> list[Batch]:
        pairs = zip(self.features.split(size), self.labels.split(size), strict=True)
        return [{"input_values": x, "labels": y} for x, y in pairs]

    @torch.inference_mode()
    def measure(self, model: nn.Module, smoothing: float = 0.0) -> tuple[float, float]:
        """Mean cross entropy against smoothed labels, and accuracy in per cent."""
        model.eval()
        logits = torch.cat([model(input_values=x).logits for x in self.features.split(64)])
        hits = (logits.argmax(-1) == self.labels).float()
        return float(F.cross_entropy(logits, self.labels, label_smoothing=smoothing)), 100 * float(hits.double().mean())


class Task(NamedTuple):
    """A dense model, and the clips that it is scored on and trained on, and the splits that choose and measure."""

    model: nn.Module
    scored: Clips
    train: Clips
    validation: Clips
    test: Clips | None  # None: it is not looked at
    augment: Callable[[Tensor], Tensor]
    device: torch.device

    def round(self, seed: int, number: int, clips: int, size: int) -> list[Batch]:
        """The clips of one round, augmented by torch's random state: rounds go through the training set in turn."""
        generator, whole = torch.Generator().manual_seed(seed), len(self.train.labels)
        passes = -(-(number + 1) * clips // whole)
        order = torch.cat([torch.randperm(whole, generator=generator) for _ in range(passes)])
        order = order[number * clips : (number + 1) * clips]
        found = Clips(self.augment(self.train.features[order]), self.train.labels[order]).batches(size)
        return [{key: x.to(self.device) for key, x in batch.items()} for batch in found]

    def sample(self, seed: int, size: int = 32) -> list[Batch]:
        """The shipped train clips as they are, in an order of the seed's: what scores and bases are found from."""
        order = torch.randperm(len(self.scored.labels), generator=torch.Generator().manual_seed(seed))
        return Clips(*(part[order.to(self.device)] for part in self.scored)).batches(size)


@cache
def keywords(device: str = "cpu", train: Path | None = None) -> Task:
    """The shipped model and its clips, and the full training set from the file that ``generate.py`` writes.

    Without that file the shipped train clips, its first 910, are trained on again and again.
    """
    from data import load_model, load_split, read_features
    from train import augment

    splits = [Clips(*(part.to(device) for part in load_split(name)[:2])) for name in ("train", "validation", "test")]
    whole = Clips(*(read_features(train) if train else load_split("train"))[:2])  # a round at a time goes to the device
    return Task(load_model().to(device), splits[0], whole, *splits[1:], augment, torch.device(device))


def loss_of(task: Task, recipe: Recipe) -> LossFn:
    """Cross entropy with smoothed labels, and a share of the divergence from the dense model on the same clips."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = model(input_values=batch["input_values"]).logits
        hard = F.cross_entropy(logits, batch["labels"], label_smoothing=recipe.smoothing)
        if not recipe.distil or not model.training:  # what is kept is chosen by the labels
            return hard
        with torch.no_grad():
            dense = task.model(input_values=batch["input_values"]).logits
        return (1 - recipe.distil) * hard + recipe.distil * attnprune.distillation_loss(logits, dense)

    return loss


def recover(task: Task, model: nn.Module, recipe: Recipe, seed: int, number: int) -> None:
    """One round's recovery in place: rank 16, alpha 16, attention and MLP, Adam, 5 % warm-up, then linear decay."""
    loss_fn = loss_of(task, recipe)
    if recipe.whole:
        train_all(task, model, recipe, loss_fn, seed, number)
        return
    lora_recover(
        model, task.round(seed, number, recipe.clips, recipe.batch), lr=recipe.lr, loss_fn=loss_fn,
        validation=task.validation.batches(70), checks=recipe.checks, never_worse=False, seed=1000 * seed + number,
        progress=False,
    )  # fmt: skip


def train_all(task: Task, model: nn.Module, recipe: Recipe, loss_fn: LossFn, seed: int, number: int) -> None:
    """Trains every weight: AdamW, 5 % of the steps to warm up, then linear decay, gradients of norm 1 at most."""
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr)
    steps = recipe.whole * -(-recipe.clips // recipe.batch)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min((n + 1) / (0.05 * steps), (steps - n) / steps))
    model.train()
    for part in range(number, number + recipe.whole):
        for batch in task.round(seed, part, recipe.clips, recipe.batch):
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
    model.eval()


def run(task: Task, way: Way, seed: int, file: Path, say: Callable[[str], None] = print) -> list[Record]:
    """All rounds of one way that its state file does not have yet.

    Args:
        task: from :func:`keywords`.
        way: what to do.
        seed: of the order of clips, augmentation and LoRA's first values.
        file: the state, read if there, replaced after every round; it says which way and seed it is of.
        say: told one line per round.

    Returns:
        One record per round: step, the share of attention weights that is gone, validation loss and accuracy and
        test accuracy (None between the steps that are read, or without a test split), seconds of the processor and of
        the clock.

    Raises:
        CheckpointError: the state is of another way (options, steps, recipe), of another seed or training set.
    """
    model, ratios = copy.deepcopy(task.model), [share(step) for step in way.steps]
    pruner, options = None, {}
    if way.options is not None:
        options = {"progress": False, "data": None, **way.options}
        if options.get("scorer") != "magnitude":
            options["data"] = task.sample(seed)
        pruner = attnprune.AttentionPruner(
            model, ratios[-1], steps=len(ratios), schedule=lambda t: ratios[round(t * len(ratios)) - 1] / ratios[-1],
            **options,
        )  # fmt: skip
    records: list[Record] = []
    if file.exists():
        state = torch.load(file, weights_only=True, map_location=task.device)
        check(file, state.get("of", {}), identity(task, way, seed))
        records = state["records"]
        if pruner is not None and state["pruner"]:
            pruner.load_state_dict(state["pruner"])
        if state["model"]:
            model.load_state_dict(state["model"])
    for number in range(len(records), len(ratios)):
        step, clock, cpu = way.steps[number], time.perf_counter(), _cpu()
        torch.manual_seed(1000 * seed + number)
        report = None
        if way.recipe is None:
            model = copy.deepcopy(task.model)
            report = attnprune.prune_attention(model, ratios[number], **options)
        elif pruner is not None:
            pruner.step()
            report = pruner.report
        if way.recipe is not None:
            recover(task, model, way.recipe, seed, number)
        gone = 0.0 if report is None else sum(report.achieved.values()) / 4
        loss, accuracy, tested = None, None, None
        if step in READ:
            loss, accuracy = task.validation.measure(model, SMOOTHING)
            tested = task.test and task.test.measure(model)[1]
        record: Record = {"step": step, "removed": gone, "loss": loss, "validation": accuracy, "test": tested}
        records.append({**record, "cpu": _cpu() - cpu, "wall": time.perf_counter() - clock})
        goes_on = way.recipe is not None
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        kept = {
            "of": identity(task, way, seed), "records": records, "model": model.state_dict() if goes_on else {},
            "pruner": pruner.state_dict() if goes_on and pruner else {},
        }  # fmt: skip
        torch.save(kept, part)
        os.replace(part, file)
        found = "" if loss is None else f"validation {loss:.4f} {accuracy:.2f} %, "
        say(f"step {step}: {gone:.1%} removed, {found}{records[-1]['cpu']:.0f} s")
    return records


def identity(task: Task, way: Way, seed: int) -> Record:
    """What a state is of, as plain values."""
    return {
        "seed": seed,
        "options": way.options,
        "steps": list(way.steps),
        "recipe": way.recipe and way.recipe._asdict(),
        "training clips": len(task.train.labels) if way.recipe else 0,
    }


def check(file: Path, found: Record, expected: Record) -> None:
    """Raises unless a state is of what is to be run."""
    for key, value in expected.items():
        if key not in found or found[key] != value:
            remedy = "move the file away, or take another work directory; states of two recipes are not mixed"
            raise CheckpointError(str(file), f"{key} {value}", str(found.get(key, "none recorded")), remedy)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
