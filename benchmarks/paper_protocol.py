"""The paper's protocol on a keyword recogniser, the shipped or the first: prune a little, fine-tune, merge, again.

Every round of a run removes the same fraction of what is left and then recovers with LoRA as the paper does. The
fraction is ``1 - 0.5 ** (1 / 7)``, 9.4 % (the paper: 10 %), so that seven rounds end at exactly one half, ten at 62.9 %
and fourteen at three quarters. A run is a function of its name and its seed: each round seeds the random numbers anew,
and the state after it is one file, replaced in one step, so a run that was interrupted goes on where it was.
"""

from __future__ import annotations

import copy
import os
import resource
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from paper_render import COLUMNS
from torch import Tensor, nn

import attnprune
from attnprune.errors import CheckpointError
from attnprune.integrations.peft import lora_recover

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "examples" / "keywords")]

Batch = dict[str, Tensor]
Options = dict[str, Any]
Record = dict[str, Any]
LossFn = Callable[[nn.Module, Batch], Tensor]
LETTER: Options = {"heads": "uniform", "split": "fixed"}
SMOOTHING = 0.1  # of labels, as in the checkpoint's own training
FREE: Options = {"split": "auto", "heads": "ragged"}


class Recipe(NamedTuple):
    """How a round recovers: by LoRA, the best of the checks by validation loss, whatever the loss was before."""

    lr: float
    clips: int  # the next ones of the training set, newly augmented
    batch: int
    distil: float = 0.0  # weight of the divergence from the dense model's outputs; the rest is cross entropy
    checks: int = 1  # looks at the validation loss in a round, the last at its end
    smoothing: float = SMOOTHING  # of labels, in the loss that is trained and in the one that chooses
    whole: int = 0  # instead of updates of low rank, all weights are trained on so many times these clips
    rank: int = 16  # of the updates


class Way(NamedTuple):
    """One row of the table: what a round removes, after which steps of 9.4 % a round is made, how it recovers."""

    options: Options | None  # None: nothing is removed
    steps: tuple[int, ...]
    recipe: Recipe | None  # None: no recovery; every share is removed from the dense model at once


PAPER_STEPS = tuple(range(1, 10))  # a tenth round ends at 62.9 %, past the paper's last column
HALF_STEPS = tuple(range(1, 8))
EIGHT_STEPS = tuple(range(1, 9))  # the eighth asks for 54.7 %, which of six heads are three, as in the two before
OUR_STEPS = (2, 4, 7, 9, 14)
LABELS, DISTILLED = Recipe(3e-3, 6125, 32), Recipe(3e-3, 6125, 32, distil=1.0)
MORE = LABELS._replace(clips=24500)
EPOCH = LABELS._replace(clips=84843)  # as many as an epoch of the paper's has
WHOLE = Recipe(1e-3, 6125, 32, distil=0.7, whole=16)  # 98,000 clips
VARIANTS: dict[str, Options] = {
    f"{scheme}-{threshold}-{score}": {"preset": f"paper:{scheme}-{threshold}-{score}", **LETTER}
    for score in ("FI", "MAG")
    for scheme in ("PH", "EH")
    for threshold in "GL"
}
BEFORE: dict[str, Options] = {  # of the first recogniser: 2-norm, numbers of units rounded to the nearest
    f"{scheme}-{scope[0].upper()}-{score}": {
        "granularity": granularity, "scope": scope, "scorer": scorer, "basis": "channels", "compensate": False,
        "rounding": "nearest", **LETTER,
    }
    for score, scorer in (("FI", "fisher"), ("MAG", "magnitude"))
    for scheme, granularity in (("PH", "channel"), ("EH", "head"))
    for scope in ("global", "local")
}  # fmt: skip
OURS = {"rotated": {}, "rotated, free": FREE, "rotated, joint": {"granularity": "joint", **FREE}}


def ways_of(variants: dict[str, Options]) -> dict[str, Way]:
    """The rows of the table, by name."""
    return {
        **{name: Way(options, PAPER_STEPS, LABELS) for name, options in variants.items()},
        "dense": Way(None, PAPER_STEPS, LABELS),
        **{
            f"{name}; distilled": Way(variants[name], HALF_STEPS, DISTILLED) for name in variants if name.endswith("FI")
        },
        **{f"{name}; no recovery": Way(options, tuple(COLUMNS), None) for name, options in OURS.items()},
        **{f"{name}; all weights": Way(variants.get(name), (7,), WHOLE) for name in ("EH-L-FI", "dense")},
        **{
            f"{name}; more clips": Way(variants.get(name), HALF_STEPS, MORE)
            for name in ("PH-G-FI", "PH-L-FI", "EH-G-FI", "EH-L-FI", "dense")
        },
        **{f"{name}; 84,843 clips": Way(variants.get(name), EIGHT_STEPS, EPOCH) for name in ("EH-L-FI", "dense")},
        "rotated, free; more clips": Way(FREE, OUR_STEPS, MORE),
        "rotated; LoRA": Way(OURS["rotated"], OUR_STEPS, LABELS),
        "rotated, free; LoRA": Way(FREE, OUR_STEPS, LABELS),
        "rotated, free; distilled": Way(FREE, OUR_STEPS, DISTILLED),
    }


WAYS, FIRST_WAYS = ways_of(VARIANTS), ways_of(BEFORE)
"""Of the shipped recogniser, and of the first."""


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
def keywords(device: str = "cpu", train: Path | None = None, test: Path | None = None, *, first: bool = False) -> Task:
    """The shipped model or the first, the clips, and the training set from the file that ``generate.py`` made.

    Without that file the shipped train clips, its first 910, are trained on again and again. ``test`` is a file of test
    clips in place of the shipped ones.
    """
    from data import CHECKPOINT, FIRST, load_model, load_split, read_features
    from train import augment

    found = [load_split("train"), load_split("validation"), read_features(test) if test else load_split("test")]
    splits = [Clips(*(part.to(device) for part in one[:2])) for one in found]
    whole = Clips(*(read_features(train) if train else load_split("train"))[:2])  # a round at a time goes to the device
    model = load_model(FIRST if first else CHECKPOINT).to(device)
    return Task(model, splits[0], whole, *splits[1:], augment, torch.device(device))


class Logits(nn.Module):
    """A model from features to logits, as CUDA graphs are made of."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_values=x).logits


def loss_of(task: Task, recipe: Recipe) -> LossFn:
    """Cross entropy with smoothed labels, and a share of the divergence from the dense model on the same clips.

    On a GPU a training step of so small a model is launches and little else: they are recorded once, as a graph, so the
    function is good for one round.
    """
    graph: list[Callable[[Tensor], Tensor]] = []

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x = batch["input_values"]
        if x.is_cuda and model.training and len(x) == recipe.batch:
            if not graph:
                warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")  # of the stream that recorded
                graph.append(torch.cuda.make_graphed_callables(Logits(model).train(), (x.clone(),)))  # its own
            logits = graph[0](x)
        else:
            logits = model(input_values=x).logits
        hard = F.cross_entropy(logits, batch["labels"], label_smoothing=recipe.smoothing)
        if not recipe.distil or not model.training:  # what is kept is chosen by the labels
            return hard
        with torch.no_grad():
            dense = task.model(input_values=x).logits
        return (1 - recipe.distil) * hard + recipe.distil * attnprune.distillation_loss(logits, dense)

    return loss


def recover(task: Task, model: nn.Module, recipe: Recipe, seed: int, number: int) -> None:
    """One round's recovery in place: alpha 16, attention and MLP, Adam, 5 % warm-up, then linear decay."""
    loss_fn = loss_of(task, recipe)
    if recipe.whole:
        train_all(task, model, recipe, loss_fn, seed, number)
        return
    lora_recover(
        model, task.round(seed, number, recipe.clips, recipe.batch), rank=recipe.rank, lr=recipe.lr, loss_fn=loss_fn,
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


def resume(
    task: Task, way: Way, seed: int, file: Path
) -> tuple[nn.Module, attnprune.AttentionPruner | None, list[Record], Options]:
    """The model, its pruner and the records that a state file holds, or those that a run begins with; the options.

    Raises:
        CheckpointError: as :func:`run`.
    """
    model, ratios = copy.deepcopy(task.model), [share(step) for step in way.steps]
    pruner, options = None, {}
    if way.options is not None:
        options = {"progress": False, "data": None, **way.options}
        if options.get("scorer") != "magnitude" and not options.get("preset", "").endswith("MAG"):
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
    return model, pruner, records, options


def again(task: Task, way: Way, seed: int, file: Path) -> dict[str, float]:
    """Test accuracy, by step, of the models of a finished run on the task's test clips, which may be other ones.

    A run without recovery is made again, for one half and three quarters; of others the states have the models at one
    half and at the end.
    """
    found = {}
    for kept in (half_of(file), file) if way.recipe else ():
        if kept.exists():
            model, _, records, _ = resume(task, way, seed, kept)
            found[str(way.steps[len(records) - 1])] = task.test.measure(model)[1]
    for step in () if way.recipe else (7, 14):
        model, _, _, options = resume(task, way, seed, file)
        attnprune.prune_attention(model, share(step), **options)
        found[str(step)] = task.test.measure(model)[1]
    return found


def half_of(file: Path) -> Path:
    """Where the state at one half is kept, of a run that goes on from there."""
    return file.with_suffix(".half.pt")


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
    ratios = [share(step) for step in way.steps]
    model, pruner, records, options = resume(task, way, seed, file)
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
        if step in COLUMNS or number + 1 == len(ratios):
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
        if step == 7 and goes_on and number + 1 < len(ratios):
            shutil.copyfile(part, half_of(file))
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
    if found.get("recipe"):
        found = {**found, "recipe": Recipe(**found["recipe"])._asdict()}  # a field that came later had its default
    for key, value in expected.items():
        if key not in found or found[key] != value:
            remedy = "move the file away, or take another work directory; states of two recipes are not mixed"
            raise CheckpointError(str(file), f"{key} {value}", str(found.get(key, "none recorded")), remedy)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
