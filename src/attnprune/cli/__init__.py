"""The command ``attnprune``: inspect, plan, prune, report, sweep, bench and export models in directories.

Exit codes: 0; 1 if a command fails, with a message on stderr and nothing written; 2 for wrong usage; 130 for an
interrupt. What a command needs is imported once its words are known to be right: ``--version``, ``--help`` and wrong
usage import no PyTorch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import AttnPruneError, CheckpointError
from ..report.rows import SIZES
from ..values.hub_names import HUB_NAME
from ..values.method import BASES, SCORERS
from ..values.presets import PRESETS
from ..values.rules import OPTIONS

_MOST_THREADS = 1024
PICTURES = (".png", ".svg", ".pdf")
EXTRAS = {"transformers": "hf", "matplotlib": "plot", "huggingface_hub": "hub", "onnx": "export"}
"""What brings along packages that commands need."""
_A_MODEL = "a model: config.json and safetensors, dense or pruned; or owner/model of the Hugging Face Hub"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: the words after ``attnprune``; None: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: wrong usage (code 2), ``--help`` and ``--version`` (0), as argparse has it.
    """
    args = parser().parse_args(argv)
    if getattr(args, "qkvo", None) is not None and len(args.qkvo) not in (1, 4):
        args.usage_error(f"argument --qkvo: expected 1 or 4 numbers, found {len(args.qkvo)}")
    try:
        models = [name for name in ("directory", "against") if hasattr(args, name)]
        for path in (getattr(args, name) for name in models):
            if not path.is_dir() and not HUB_NAME.fullmatch(str(path)):
                raise CheckpointError.no_directory(path)
        from ..bars import logged
        from . import commands, trying

        for name in models:
            setattr(args, name, commands.here(getattr(args, name)))
        with commands.quiet(), logged():
            done = trying.sweep_command(args) if args.run == "sweep" else getattr(commands, args.run)(args)
        print(json.dumps(done.facts, indent=1) if args.json else done.text, flush=True)
        return 0
    except AttnPruneError as error:
        message = str(error)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        message = f"{error}. Install what is missing" + (f': pip install "attnprune[{extra}]".' if extra else ".")
    except OSError as error:
        message = str(error)
    print(f"attnprune: {message}", file=sys.stderr)
    return 1


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from attnprune import __version__

    whole = argparse.ArgumentParser(
        prog="attnprune",
        description="Removes heads and channels from attention.",
        epilog="attnprune COMMAND --help lists the options of a command.",
    )
    whole.add_argument("--version", action="version", version=f"attnprune {__version__}")
    kinds = whole.add_subparsers(required=True, metavar="COMMAND")

    one = _command(kinds, "inspect", "attention modules, dims and parameters; reads no weights")
    one.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a model: config.json and safetensors, dense or pruned; or owner/model of the Hub",
    )

    one = _command(kinds, "plan", "decides what would go, and changes nothing")
    _model(one)
    _ratios(one.add_mutually_exclusive_group(required=True))
    _options(one)
    one.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the plan there, as JSON")
    one.add_argument("--plot", type=_picture, metavar="FILE", help="draw it there (.png, .svg, .pdf)")

    one = _command(kinds, "prune", "prunes a model and writes it to another directory")
    _model(one)
    what = one.add_mutually_exclusive_group(required=True)
    _ratios(what)
    what.add_argument("--plan", type=Path, metavar="FILE", help="apply this plan instead of making one")
    _options(one)
    one.add_argument("--recover", metavar="HOW", help="how long the result is tuned: 400 (steps), 60s, 10min, 2epochs")
    one.add_argument("-o", "--output", type=Path, metavar="OUT", required=True, help="directory for the pruned model")
    one.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")
    one.add_argument("--plot", type=_picture, metavar="FILE", help="draw what went (.png, .svg, .pdf)")

    one = _command(kinds, "report", "what a pruned model lost; reads no weights")
    one.add_argument("directory", type=Path, metavar="OUT", help="a pruned model")
    one.add_argument("--plot", type=_picture, metavar="FILE", help="draw it there (.png, .svg, .pdf)")

    one = _command(kinds, "sweep", "ways of pruning side by side, judged by a function of yours")
    _model(one)
    _sweep(one)

    one = _command(kinds, "bench", "latency, parameters and multiply-adds against another model")
    one.add_argument("directory", type=Path, metavar="OUT", help="a pruned model")
    one.add_argument("--against", type=Path, metavar="DIR", required=True, help="the dense model")
    _inputs(one, batch=1)
    one.add_argument("--seconds", type=_seconds, default=20.0, help="about how long to measure (default: %(default)g)")
    one.add_argument("--rounds", type=_count, help="so many paired runs instead, however long they take")
    one.add_argument("--threads", type=_threads, metavar="N", help="threads of PyTorch (default: as it has them)")
    one.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: as saved")
    _device(one)

    one = _command(kinds, "export", "a checkpoint for plain transformers, or an ONNX file")
    one.add_argument("directory", type=Path, metavar="OUT", help="a pruned model")
    where = one.add_mutually_exclusive_group(required=True)
    where.add_argument("--stock", type=Path, metavar="DIR", help="a checkpoint that needs no attnprune")
    where.add_argument("--onnx", type=Path, metavar="FILE", help="an ONNX file for any batch size and length")
    one.add_argument("--overwrite", action="store_true", help="replace a model that the directory holds")
    _inputs(one, batch=2)
    return whole


def _command(kinds: Any, name: str, text: str) -> argparse.ArgumentParser:
    found: argparse.ArgumentParser = kinds.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    found.set_defaults(run=name, usage_error=found.error)
    found.add_argument("--json", action="store_true", help="print JSON")
    return found


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "directory",
        type=Path,
        metavar="DIR",
        help="a model: config.json and safetensors, dense or pruned; or owner/model of the Hub",
    )
    _device(one)


def _ratios(group: Any) -> None:
    group.add_argument(
        "--qkvo", type=float, nargs="+", metavar="R",
        help="the share of weights to remove from q, k, v and o: four numbers in [0, 1), or one for all",
    )  # fmt: skip
    shares = {
        "error": "of energy that may be lost",
        "latency": "of latency to keep, or a time (20ms)",
        "macs": "of multiply-adds to keep, or how many (4e9)",
        "params": "of the model's parameters to keep, or how many (1e7)",
    }
    for name, text in shares.items():
        kind = _time if name == "latency" else float
        group.add_argument(f"--target-{name}", type=kind, metavar="X", help=f"instead: the share {text}")


def _options(one: argparse.ArgumentParser) -> None:
    one.add_argument("--preset", choices=tuple(PRESETS), metavar="NAME", help=f"one of {', '.join(PRESETS)}")
    for name, values in OPTIONS.items():
        one.add_argument(f"--{name}", choices=values, help=f"as {name}= of prune_attention")
    one.add_argument("--scorer", choices=("auto", *SCORERS), help="how units are scored")
    one.add_argument("--basis", choices=BASES, help="whether heads are rotated first")
    one.add_argument("--compensate", choices=("auto", "yes", "no"), help="whether what stays is refitted")
    one.add_argument("--sequential", action="store_true", default=None, help="moments and refits layer by layer")
    one.add_argument("--round-to", type=_multiple, metavar="N", help='multiple that a head keeps, or "auto"')
    one.add_argument("--match-dims", action="store_true", default=None, help="as many qk as vo channels in every head")
    one.add_argument("--stock", action="store_true", default=None, help="only shapes that export --stock can write")
    one.add_argument("--min-heads", type=_count, metavar="N", help="heads that every layer keeps")
    one.add_argument("--min-channels", type=_count, metavar="N", help="channels that every head keeps")
    one.add_argument("--include", nargs="+", metavar="GLOB", help="only attention modules of these names")
    one.add_argument("--exclude", nargs="+", metavar="GLOB", help="no attention modules of these names")
    one.add_argument("--seed", type=int, help="of random scores and projections")
    _inputs(one, batch=8)
    one.add_argument("--samples", type=_count, metavar="N", help="use the first N samples of the data only")
    one.add_argument("--quiet", action="store_true", help="no word of progress")


def _sweep(one: argparse.ArgumentParser) -> None:
    one.add_argument("--eval", required=True, metavar="MODULE:NAME", help="a function of a model that gives its score")
    one.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.5, 0.75], metavar="R",
                     help="shares to remove (default: .25 .5 .75)")  # fmt: skip
    one.add_argument("--ways", nargs="+", default=["default", "accurate", "fast", "paper:PH-G-FI"], metavar="WAY",
                     help=f"of default, {', '.join(PRESETS)}; those that end in FI need labels in the data "
                     "(default: %(default)s)")  # fmt: skip
    _inputs(one, batch=8, named=True)
    one.add_argument("--samples", type=_count, metavar="N", help="use the first N samples of a file only")
    one.add_argument("--lower-is-better", action="store_true", help="the score is a loss, an error, a perplexity")
    one.add_argument("--within", type=float, default=0.5, metavar="X",
                     help="what the best may lose, in the unit of the score (default: %(default)s)")  # fmt: skip
    one.add_argument("--by", choices=SIZES, default="params", help="what the best has least of (default: %(default)s)")
    one.add_argument("--seconds", type=float, default=2.0, metavar="S",
                     help="how long each row is timed; 0: not at all (default: %(default)s)")  # fmt: skip
    one.add_argument("--resume", type=Path, metavar="FILE", help="keep finished rows there, and go on from them")
    one.add_argument("--include", nargs="+", metavar="GLOB", help="only attention modules of these names")
    one.add_argument("--exclude", nargs="+", metavar="GLOB", help="no attention modules of these names")
    one.add_argument("--seed", type=int, help="where random numbers start")
    one.add_argument("--quiet", action="store_true", help="no word of progress")
    one.add_argument("-o", "--output", type=Path, metavar="FILE", help="write the table there, as JSON")
    one.add_argument("--plot", type=_picture, metavar="FILE", help="draw it there (.png, .svg, .pdf)")


def _inputs(one: argparse.ArgumentParser, batch: int, named: bool = False) -> None:
    one.add_argument(
        "--data", type=str if named else Path, metavar="FILE or MODULE:NAME" if named else "FILE",
        help="safetensors with the model's keyword inputs, samples along the first dimension; may hold labels"
        + (", or batches of a module of yours" if named else ""),
    )  # fmt: skip
    one.add_argument("--batch-size", type=_count, default=batch, metavar="N", help="default: %(default)s")
    one.add_argument("--length", type=_count, default=128, metavar="N",
                     help="tokens of made-up text, where no data are given (default: %(default)s)")  # fmt: skip


def _device(one: argparse.ArgumentParser) -> None:
    one.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return found


def _time(text: str) -> float | str:
    """A share is a number; what has a unit stays as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def _threads(text: str) -> int:
    if (count := _count(text)) > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"{text} is more than {_MOST_THREADS}; this machine has {os.cpu_count()} CPUs")
    return count


def _multiple(text: str) -> int | str:
    return text if text == "auto" else _count(text)


def _picture(text: str) -> Path:
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{text!r} does not end in {', '.join(PICTURES)}")
    return Path(text)
