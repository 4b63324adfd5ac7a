"""What the commands do; every one gives facts for JSON and text for people, and writes nothing unless all went well."""

from __future__ import annotations

import argparse
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..api import Decided, decided_by, prepare_plan
from ..calibration.batches import device_named
from ..calibration.sample import Sample
from ..checkpoint.describe import overview, read_report, without_config
from ..checkpoint.hub import fetched
from ..checkpoint.load import from_pretrained
from ..checkpoint.save import save_pruned
from ..checkpoint.source import Source
from ..checkpoint.stock import export_stock
from ..cost.counting import count_macs, count_parameters
from ..errors import AttnPruneWarning, CheckpointError, OptionError
from ..report.making import planned_report
from ..report.report import Report
from ..values.plan import Plan
from ..values.recovery import Recovery
from ..values.request import OPTION_NAMES, Request, no_data_to_tune_on
from .inputs import DataFile, example_inputs
from .outputs import Outputs
from .timing import compare

BESIDE = (  # what models need beside their weights
    "preprocessor_config.json", "processor_config.json", "feature_extractor_config.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


class Done(NamedTuple):
    """The result of a command."""

    facts: dict[str, Any]
    text: str


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the block warnings of ours are lines of text, and transformers' bars and advice do not stand between."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def said(message: Any, category: Any, *where: Any, **more: Any) -> None:
            if isinstance(message, AttnPruneWarning):
                print(f"attnprune: {message}", file=sys.stderr)
            else:
                show(message, category, *where, **more)

        warnings.showwarning = said
        with _transformers_quiet():
            yield


@contextmanager
def _transformers_quiet() -> Iterator[None]:
    try:
        from transformers.utils import logging
    except ModuleNotFoundError:  # what needs it says so, once all else is right
        yield
        return
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def inspect(args: argparse.Namespace) -> Done:
    """Attention modules, dims and parameters."""
    name, specs, total, skipped = overview(args.directory)
    own = sum(spec.parameters for spec in specs)
    facts = {
        "class": name,
        "parameters": total,
        "attention_parameters": own,
        "attention": [
            {
                "name": spec.name, "heads": spec.heads, "qk_dims": list(spec.qk_dims), "vo_dims": list(spec.vo_dims),
                "d_model": spec.d_model, "scale": spec.scale, "parameters": spec.parameters,
            }
            for spec in specs
        ],
        "skipped": [one._asdict() for one in skipped],
    }  # fmt: skip
    rows = [["attention", "heads", "qk", "vo", "d_model", "parameters"]]
    rows += [
        [
            spec.name,
            str(spec.heads),
            _dims(spec.qk_dims),
            _dims(spec.vo_dims),
            str(spec.d_model),
            f"{spec.parameters:,}",
        ]
        for spec in specs
    ]
    head = f"{name}: {total:,} parameters, {own:,} of them ({own / max(total, 1):.1%}) in attention"
    lines = [head, _table(rows), *(f"skipped: {one.name} ({one.kind}): {one.why}" for one in skipped)]
    return Done(facts, "\n".join(lines))


def plan(args: argparse.Namespace) -> Done:
    """What would go."""
    with Outputs() as outputs:
        file = None if args.output is None else outputs.file(args.output)
        picture = None if args.plot is None else outputs.file(args.plot)
        model, _, made = _planned(args)
        found = planned_report(model, made.plan, made.skipped)
        if file is not None:
            file.write_text(made.plan.to_json(), encoding="utf-8")
        if picture is not None:
            found.plot(picture)
    return _reported(found, plan=args.output, plot=args.plot)


def prune(args: argparse.Namespace) -> Done:
    """Prunes and writes."""
    with Outputs() as outputs:
        folder = outputs.folder(args.output, args.overwrite)
        picture = None if args.plot is None else outputs.file(args.plot)
        if args.plan is None:
            model, data, decided = _planned(args)
            made = decided.plan
        else:
            made = _read_plan(args.plan)
            model = loaded(args.directory, args.device)
            data = data_file(args, model)
        given = data.first(1) if data is not None else example_inputs(model, 1, args.length)
        found = _applied(args, model, made, given, data)
        save_pruned(model, folder, report=found)
        for name in BESIDE:
            if (args.directory / name).is_file():
                shutil.copyfile(args.directory / name, folder / name)
        if picture is not None:
            found.plot(picture)
    return _reported(found, model=args.output, plot=args.plot)


def report(args: argparse.Namespace) -> Done:
    """What a pruned model lost."""
    with Outputs() as outputs:
        picture = None if args.plot is None else outputs.file(args.plot)
        found = read_report(args.directory)
        if picture is not None:
            found.plot(picture)
    return _reported(found, plot=args.plot)


def bench(args: argparse.Namespace) -> Done:
    """Latency, parameters and multiply-adds against another model."""
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    pruned, dense = (loaded(one, args.device, dtype) for one in (args.directory, args.against))
    data = data_file(args, dense)
    given = data.first(args.batch_size) if data is not None else example_inputs(dense, args.batch_size, args.length)
    if given is None:
        raise OptionError("--data", "inputs for this model", "none", "give a safetensors file of them")
    threads = torch.get_num_threads() if args.threads is None else args.threads
    times = compare(pruned, dense, given, args.rounds, threads, args.seconds)
    parameters = (count_parameters(pruned), count_parameters(dense))
    macs = (count_macs(pruned, given), count_macs(dense, given))
    inputs = {name: list(value.shape) for name, value in given.items()}
    facts = {
        "inputs": inputs,
        "device": args.device,
        "threads": threads,
        "parameters": list(parameters),
        "macs": list(macs),
        "milliseconds": [1000 * times.ours, 1000 * times.theirs],
        "latency_ratio": times.ratio,
        "latency_ratio_quartiles": list(times.quartiles),
        "rounds": times.rounds,
        "doubt": times.doubt,
    }
    low, high = times.quartiles
    rows = [["", "pruned", "dense", "ratio"]]
    rows.append(["parameters", f"{parameters[0]:,}", f"{parameters[1]:,}", f"{parameters[0] / parameters[1]:.3f}"])
    rows.append(["multiply-adds", f"{macs[0]:,}", f"{macs[1]:,}", f"{macs[0] / max(macs[1], 1):.3f}"])
    rows.append(["latency, ms", f"{1000 * times.ours:.2f}", f"{1000 * times.theirs:.2f}", f"{times.ratio:.3f}"])
    shapes = ", ".join(f"{name} {tuple(shape)}" for name, shape in inputs.items())
    notes = [f"latency: medians of {times.rounds} paired runs; half of the ratios lie between {low:.3f} and {high:.3f}"]
    notes += [f"note: {times.doubt}"] * bool(times.doubt)
    return Done(facts, "\n".join([f"{shapes}; {args.device}, {threads} threads", _table(rows), *notes]))


def export(args: argparse.Namespace) -> Done:
    """A stock checkpoint or an ONNX file."""
    if args.stock is not None:
        with Outputs() as outputs:
            folder = outputs.folder(args.stock, args.overwrite)
            export_stock(loaded(args.directory), folder)
            for name in BESIDE:
                if (args.directory / name).is_file():
                    shutil.copyfile(args.directory / name, folder / name)
        return Done({"stock": str(args.stock)}, f"wrote {args.stock}, which transformers loads without attnprune")
    from ..checkpoint.onnx import check_installed, export_onnx

    check_installed()
    model = loaded(args.directory)
    data = data_file(args, model)
    given = data.first(args.batch_size) if data is not None else example_inputs(model, args.batch_size, args.length)
    if given is None:
        raise OptionError("--data", "inputs for this model", "none", "give a safetensors file of them")
    found = export_onnx(model, args.onnx, given)
    facts = {"onnx": str(found.path), "inputs": found.inputs, "outputs": found.outputs, "error": found.error}
    sizes = "\n".join(f"{name} {list(shape)}" for name, shape in (*found.inputs.items(), *found.outputs.items()))
    checked = "not compared, as onnxruntime is not installed" if found.error is None else (
        f"at most {found.error:.1e} from PyTorch's outputs, at other sizes too"
    )  # fmt: skip
    return Done(facts, f"wrote {found.path}; {checked}\n{sizes}")


def _planned(args: argparse.Namespace) -> tuple[nn.Module, DataFile | None, Decided]:
    model = loaded(args.directory, args.device)
    data = data_file(args, model)
    given = data.first(1) if data is not None else example_inputs(model, 1, args.length)
    options: dict[str, Any] = {
        name: getattr(args, name, None) for name in ("preset", "include", "exclude", *OPTION_NAMES)
    }
    timed = args.preset == "fast" or "auto" in (args.granularity, args.round_to)
    options |= {
        "compensate": {"yes": True, "no": False}.get(args.compensate, args.compensate),
        "example_inputs": given if args.target_latency or args.target_macs or timed else None,
        "progress": not args.quiet,
        "data": data,
    }
    ratios = args.qkvo[0] if args.qkvo is not None and len(args.qkvo) == 1 else args.qkvo
    request = Request.parse(ratios, **{name: value for name, value in options.items() if value is not None})
    return model, data, decided_by(model, request)


def _applied(args: argparse.Namespace, model: nn.Module, made: Plan, given: Any, data: DataFile | None) -> Report:
    """Applies a plan, and tunes the result where that is asked for."""
    recovery = None if args.recover is None else Recovery.parse(args.recover)
    if recovery is not None and data is None:
        raise no_data_to_tune_on()
    sample = Sample(given, data)
    return prepare_plan(model, made, example_inputs=given, sample=sample, recovery=recovery, progress=not args.quiet)()


def here(directory: Path) -> Path:
    """A directory as it is; a model of the Hub from there, with what it needs beside its weights."""
    return directory if directory.is_dir() else fetched(str(directory), beside=BESIDE)


def loaded(directory: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a directory, in evaluation mode."""
    place = device_named(device, "--device")
    manifest = without_config(Source.at(directory))
    if manifest is not None:
        remedy = "use attnprune.load_pruned(directory, model) in Python; inspect and report work here"
        raise OptionError(str(directory), "a model that its config builds", f"a {manifest.model_class}", remedy)
    return from_pretrained(directory, device=place, dtype=dtype).eval()


def data_file(args: argparse.Namespace, model: nn.Module) -> DataFile | None:
    """The batches of ``--data``."""
    if args.data is None:
        return None
    return DataFile(args.data, model, args.batch_size, getattr(args, "samples", None))


def _read_plan(path: Path) -> Plan:
    try:
        return Plan.from_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            str(path), "a plan", error.strerror or "nothing", "make one with attnprune plan"
        ) from error


def _reported(found: Report, **written: Path | None) -> Done:
    paths = {what: str(path) for what, path in written.items() if path is not None}
    lines = [f"wrote {path}" for path in paths.values()]
    return Done({**found.to_dict(), "written": paths}, "\n".join([str(found), *lines]))


def _dims(dims: Sequence[int]) -> str:
    return str(dims[0]) if len(set(dims)) == 1 else f"{min(dims)}..{max(dims)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    )
