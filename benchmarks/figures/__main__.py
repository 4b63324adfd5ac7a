"""Measures what is out of date, and writes the figures into README and documentation.

    python -m benchmarks.figures                 # what is out of date; goes on where it was stopped
    python -m benchmarks.figures --list          # what there is, how long each takes, and what is not run here
    python -m benchmarks.figures demo llama      # only these; --force: also where they are up to date
    python -m benchmarks.figures --check         # measures and writes nothing, says what disagrees

A figure stands between words that ``quotes.py`` knows, in any number of places; all have it from one results file.
"""

from __future__ import annotations

import argparse
import sys

from .quotes import quotes, results
from .quoting import ROOT, faults, texts
from .runs import COMMANDS, ELSEWHERE, RUNS, execute, kept, missing, outdated


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these; see --list")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    parser.add_argument("--check", action="store_true", help="only compare README and documentation with the results")
    parser.add_argument("--force", action="store_true", help="also what is up to date")
    args = parser.parse_args()
    unknown = set(args.names) - {run.name for run in RUNS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; one of {', '.join(run.name for run in RUNS)}")
    if args.list:
        listed()
        return 0
    if not args.check:
        measured(args.names, args.force)
        written()
    found = faults(quotes(results()), texts())
    for fault in found:
        print(fault)
    if any(fault.startswith("nowhere") for fault in found):
        print("What stands nowhere: write it so, or change its words in benchmarks/figures/quotes.py.")
    return bool(found)


def measured(names: list[str], force: bool) -> None:
    """Runs what is out of date, one after the other."""
    for run in RUNS:
        if names and run.name not in names:
            continue
        last = kept(run.name).get("seconds")
        if missing(run):
            print(f"{run.name}: not run, it needs pip install {run.needs}")
        elif force or outdated(run):
            print(f"{run.name}: python {run.command}" + (f" (took {last} s)" if last else ""), flush=True)
            print(f"{run.name}: {execute(run)['seconds']} s", flush=True)
        else:
            print(f"{run.name}: up to date")
    print(f"{len(ELSEWHERE)} others are not run here (--list says why, and how)")


def written() -> None:
    """Puts the figures of the results where README and documentation state them."""
    found = quotes(results())
    for page, text in texts().items():
        new = text
        for quote in found:
            new = quote.corrected(new)
        if new != text:
            (ROOT / page).write_text(new)
            print(f"{page}: written")


def listed() -> None:
    """What there is."""
    for run in RUNS:
        own = kept(run.name)
        state = "out of date" if outdated(run) else "up to date"
        took = f", {own['seconds']} s" if "seconds" in own else ""
        took += f" ({own['of a processor']} of a processor)" if "of a processor" in own else ""
        print(f"{run.name}: {state}, measured {own.get('measured', 'never')}{took}\n    python {run.command}")
    print("\nNot run here:")
    for name, why in sorted(ELSEWHERE.items()):
        own = kept(name)
        command = own.get("command") or COMMANDS[name]
        print(f"{name}: {why}; measured {own.get('measured', 'as the file says')}\n    {command}")


if __name__ == "__main__":
    sys.exit(main())
