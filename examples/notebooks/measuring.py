"""Forms of one model side by side: what the notebooks in this folder share.

Every form is a function that takes what the model takes and returns its first output.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from torch import Tensor, nn


class Row(NamedTuple):
    """What is said of one form of the model."""

    form: str
    score: float
    parameters: int
    megabytes: float
    """Of its file."""
    milliseconds: float
    """Of one forward pass."""


def torch_form(model: nn.Module) -> Callable[..., Tensor]:
    """The model in evaluation mode, without gradients."""
    model.eval()

    def run(**inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(**inputs)[0]

    return run


def onnx_form(path: Path) -> Callable[..., Tensor]:
    """The file in onnxruntime, on as many threads as PyTorch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options)

    def run(**inputs: Tensor) -> Tensor:
        output, *_ = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        return torch.from_numpy(output)

    return run


def megabytes(form: nn.Module | Path) -> float:
    """The size of a model's weights in a file, or of a file."""
    if isinstance(form, Path):
        return form.stat().st_size / 1e6
    file = io.BytesIO()
    torch.save(form.state_dict(), file)
    return len(file.getvalue()) / 1e6


def milliseconds(forms: Mapping[str, Callable[..., Tensor]], inputs: Mapping[str, Tensor], rounds: int) -> list[float]:
    """For each form the median of so many forward passes, taken in turns, so that a busy machine slows all alike."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(rounds + 2):
        for name, run in forms.items():
            began = time.perf_counter()
            run(**inputs)
            if number >= 2:  # the first two warm up
                times[name].append(1e3 * (time.perf_counter() - began))
    return [statistics.median(own) for own in times.values()]


def compare(
    models: Mapping[str, nn.Module],
    onnx: Path,
    score: Callable[[Callable[..., Tensor]], float],
    inputs: Mapping[str, Tensor],
    rounds: int,
) -> list[Row]:
    """A row for every model, and one for the ONNX file of the last but one.

    Args:
        models: by name; the last one is quantised.
        onnx: the file.
        score: what a form is worth.
        inputs: of the forward pass that is timed.
        rounds: how often it is.
    """
    forms = {name: torch_form(model) for name, model in models.items()} | {"as ONNX": onnx_form(onnx)}
    sizes = [megabytes(form) for form in (*models.values(), onnx)]
    counts = [sum(one.numel() for one in model.parameters()) for model in (*models.values(), [*models.values()][-2])]
    figures = zip(forms.items(), counts, sizes, milliseconds(forms, inputs, rounds), strict=True)
    return [Row(name, score(form), *rest) for (name, form), *rest in figures]


def table(rows: Sequence[Row], score: str) -> Any:
    """The rows as a notebook shows them."""
    lines = [f"| form | {score} | parameters | file, MB | one pass, ms |", "|---|--:|--:|--:|--:|"]
    for row in rows:
        figures = f"{row.score:.2f} | {row.parameters:,} | {row.megabytes:.2f} | {row.milliseconds:.2f}"
        lines.append(f"| {row.form} | {figures} |")
    return Markdown("\n".join(lines))


def picture(rows: Sequence[Row], score: str) -> None:
    """The score against the size of the file and against time: up and to the left is better."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True, layout="constrained")
    for panel, name, unit in zip(panels, ("megabytes", "milliseconds"), ("file, MB", "one pass, ms"), strict=True):
        for number, row in enumerate(rows):
            colour = plt.colormaps["cividis"](0.9 * number / max(len(rows) - 1, 1))
            panel.plot(getattr(row, name), row.score, "osD^v"[number % 5], color=colour, markersize=8, label=row.form)
        panel.set_xlabel(unit)
        panel.set_xlim(left=0)
        panel.grid(color="0.93")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(score)
    scores = [row.score for row in rows]
    panels[0].set_ylim(min(*scores, max(scores) - 4) - 1, max(scores) + 1)  # points of no weight are not blown up
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(rows), frameon=False, fontsize="small")
