"""The command ``attnprune sweep``: ways of pruning side by side, judged by a function of the user's."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import OptionError
from ..studies.sweep import sweep
from .commands import Done, data_file, loaded
from .inputs import example_inputs
from .outputs import Outputs


def sweep_command(args: argparse.Namespace) -> Done:
    """Ways side by side; the table goes to stdout, and to files where asked for."""
    with Outputs() as outputs:
        table_file = None if args.output is None else outputs.file(args.output)
        picture = None if args.plot is None else outputs.file(args.plot)
        evaluate = named(args.eval, "--eval")
        if not callable(evaluate):
            raise OptionError("--eval", "a function of a model", f"a {type(evaluate).__name__}", "name a function")
        model = loaded(args.directory, args.device)
        data = _data(args, model)
        first = None if data is not None else example_inputs(model, 1, args.length)
        chosen = {name: getattr(args, name) for name in ("include", "exclude", "seed") if getattr(args, name)}
        table = sweep(
            model, evaluate, args.ratios, args.ways, data=data, example_inputs=first, resume=args.resume,
            higher_is_better=not args.lower_is_better, seconds=args.seconds, progress=not args.quiet, **chosen,
        )  # fmt: skip
        best = table.best(args.within, args.by)
        if table_file is not None:
            table_file.write_text(table.to_json(), encoding="utf-8")
        if picture is not None:
            table.plot(picture)
    written = {what: str(path) for what, path in (("table", args.output), ("plot", args.plot)) if path is not None}
    facts = {**table.to_dict(), "best": {"way": best.way, "ratio": best.ratio}, "written": written}
    what = f"{best.way} at {best.ratio:g}" if best is not table.dense else "the dense model: nothing else is within"
    lines = [str(table), f"best within {args.within:g} by {args.by}: {what}"]
    return Done(facts, "\n".join([*lines, *(f"wrote {path}" for path in written.values())]))


def named(text: str, option: str) -> Any:
    """What ``module:name`` names; modules of the working directory count.

    Raises:
        OptionError: no such module or name, or another form.
    """
    place, _, name = text.partition(":")
    if not place or not name or place.endswith(".py"):
        raise OptionError(option, "module:name", repr(text), "write mymodule:accuracy for a function of mymodule.py")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = import_module(place)
    except ModuleNotFoundError as error:
        if error.name != place.split(".")[0]:
            raise
        remedy = "run the command where the module lies, or set PYTHONPATH"
        raise OptionError(option, f"a module {place}", "none", remedy) from error
    for part in name.split("."):
        if not hasattr(found, part):
            near = get_close_matches(part, [one for one in vars(found) if not one.startswith("_")], n=5, cutoff=0.0)
            raise OptionError(option, f"{part} in {place}", "no such name", f"names there are like {near}")
        found = getattr(found, part)
    return found


def _data(args: argparse.Namespace, model: nn.Module) -> Iterable[Any] | None:
    """Batches: of a file, or what a function of the user's or a variable gives."""
    if args.data is None or ":" not in str(args.data) or Path(args.data).exists():
        args.data = None if args.data is None else Path(args.data)
        return data_file(args, model)
    found = named(args.data, "--data")
    return found() if callable(found) and not isinstance(found, Iterable) else found  # type: ignore[no-any-return]
