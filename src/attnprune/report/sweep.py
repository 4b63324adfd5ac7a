"""What ways of pruning give, side by side: :class:`Sweep`, a table of :class:`.rows.Row`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from warnings import warn

from ..errors import AttnPruneWarning, OptionError
from ..values import fields
from ..values.tables import aligned, html_table
from .rows import SIZES, Row, Saved, read_row

FORMAT, VERSION = "attnprune.sweep", 1
COLUMNS = ("way", "ratio", "removed", "score", "change", "parameters", "multiply-adds", "latency", "memory")


@dataclass(frozen=True)
class Sweep:
    """A table of what :func:`attnprune.sweep` tried: the dense model, and a row for every way and ratio. Frozen, JSON.

    ``str(table)`` is for reading, notebooks show a table, :meth:`plot` draws the trade-off, :meth:`best` picks.

    >>> dense = Row("dense", 0.0, 0.0, 90.0, 1000)
    >>> table = Sweep(dense, (Row("default", 0.5, 0.5, 89.8, 800), Row("default", 0.75, 0.75, 85.0, 700)))
    >>> table.best(within=0.5).ratio, table.best(within=9).ratio, table.best(within=0.1).way
    (0.5, 0.75, 'dense')
    >>> Sweep.from_json(table.to_json()) == table
    True
    """

    dense: Row
    """The model as it was given."""
    rows: tuple[Row, ...]
    """In the order of the ways, for each by ratio."""
    ways: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)
    """By name, the options of every way: ``prune_attention(model, row.ratio, **table.ways[row.way])`` does it again."""
    higher_is_better: bool = True
    """Whether a higher score is a better one."""

    def drop(self, row: Row) -> float | None:
        """By how much a row is worse than the dense model, in the unit of the scores; below 0: better."""
        if row.score is None or self.dense.score is None:
            return None
        return (self.dense.score - row.score) * (1 if self.higher_is_better else -1)

    def best(self, within: float = 0.5, by: Saved = "params") -> Row:
        """The smallest or fastest of all that lose at most so much.

        The dense model is one of them: where nothing else is within, or smaller, it is the best. Scores that were
        looked at to choose are too good by a little: judge the choice on data that ``evaluate`` did not see.

        Args:
            within: what may be lost, in the unit of the scores: 0.5 is half a point where they are percentages, and
                0.005 where they lie between 0 and 1.
            by: ``"params"``, ``"latency"``, ``"macs"`` or ``"memory"``. Of rows that cost the same, the better one.

        Raises:
            OptionError: another word, a negative number, or a column that nobody counted.
        """
        if by not in SIZES:
            raise OptionError("by", f"one of {', '.join(SIZES)}", repr(by), "pick one of them")
        if isinstance(within, bool) or not isinstance(within, (int, float)) or not within >= 0:
            raise OptionError("within", "a number from 0", repr(within), "write 0.5 for half a point")
        if self.dense.size(by) is None:
            raise OptionError("by", "a column with figures", repr(by), "pass example_inputs= to sweep, or data=")
        score = self.dense.score
        if score is not None and 0 < score <= 1 and within >= 0.1:
            warn(
                f"within={within:g} is much where the dense model scores {score:.3g}: write {within / 100:g} for "
                f"{within:g} points of a hundred.", AttnPruneWarning, stacklevel=2,
            )  # fmt: skip
        found: list[tuple[float, float, int]] = []
        for place, row in enumerate((self.dense, *self.rows)):
            size, drop = row.size(by), self.drop(row)
            if size is not None and drop is not None and drop <= within:
                found.append((size, drop, place))
        return (self.dense, *self.rows)[min(found)[2]] if found else self.dense

    def pareto(self, by: Saved = "params") -> tuple[Row, ...]:
        """The rows that no other beats: from small to large, each better than all that are smaller."""
        told = [(row.size(by), self.drop(row), place) for place, row in enumerate((self.dense, *self.rows))]
        found: list[Row] = []
        least = float("inf")
        for size, drop, place in sorted(one for one in told if one[0] is not None and one[1] is not None):
            if size is not None and drop is not None and drop < least:
                least = drop
                found.append((self.dense, *self.rows)[place])
        return tuple(found)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """A picture: the score against parameters, and against latency where it was measured. Needs matplotlib.

        Args:
            path: also written there; the suffix says in which format (``.png``, ``.svg``, ``.pdf``).

        Returns:
            The ``matplotlib.figure.Figure``.
        """
        from .trade_offs import pareto

        fronts = {by: self.pareto(by) for by in SIZES}
        return pareto(self.dense, self.rows, fronts, higher_is_better=self.higher_is_better, path=path)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready mapping; options that JSON has no form for are told by their ``repr``."""
        ways = {name: {key: _ready(value) for key, value in options.items()} for name, options in self.ways.items()}
        rows = [fields.to_dict(row) for row in self.rows]
        better = self.higher_is_better
        return {"dense": fields.to_dict(self.dense), "rows": rows, "ways": ways, "higher_is_better": better}

    def to_json(self) -> str:
        """JSON, keys sorted."""
        return fields.document(FORMAT, VERSION, self.to_dict())

    @classmethod
    def from_json(cls, text: str | bytes) -> Sweep:
        """Reads :meth:`to_json`'s text, trusting nothing.

        Raises:
            OptionError: malformed.
        """
        with fields.opened(text, FORMAT, VERSION, OptionError, "write it with to_json") as found:
            fields.mapping("file", found, {"dense", "rows", "ways", "higher_is_better"})
            rows, ways = tuple(read_row(one) for one in fields.array("rows", found["rows"])), found["ways"]
            if not isinstance(ways, dict):
                fields.fail("ways", "a mapping", ways)
            for name, options in ways.items():
                if not isinstance(options, dict):
                    fields.fail(f"ways.{name}", "a mapping", options)
            better = fields.boolean("higher_is_better", found["higher_is_better"])
            return cls(read_row(found["dense"]), rows, ways, better)

    def _cells(self) -> Iterator[list[str]]:
        for row in (self.dense, *self.rows):
            whole = row is self.dense
            drop = self.drop(row)
            change = "" if whole or drop is None else f"{0.0 - drop if self.higher_is_better else drop:+.4g}"
            cells = [row.way, "" if whole else f"{row.ratio:g}", "" if whole else _said(row.achieved, "{:.1%}"),
                     _said(row.score, "{:.5g}"), change]  # fmt: skip
            for by in ("params", "macs", "latency", "memory"):
                size, base = row.size(by), self.dense.size(by)
                if whole:
                    cells.append(_milliseconds(row.seconds) if by == "latency" else _said(size, "{:,.0f}"))
                else:
                    cells.append("-" if size is None or not base else f"x {size / base:.3f}")
            yield cells

    @property
    def _faults(self) -> list[str]:
        ratios: dict[tuple[str, str], list[str]] = {}
        for row in self.rows:
            if row.error:
                ratios.setdefault((row.way, row.error), []).append(f"{row.ratio:g}")
        return [f"{way}, {', '.join(own)}: {error}" for (way, error), own in ratios.items()]

    @property
    def _columns(self) -> list[int]:
        """The columns that hold something."""
        bare = {"multiply-adds": "macs", "latency": "latency", "memory": "memory"}
        return [i for i, name in enumerate(COLUMNS) if name not in bare or getattr(self.dense, bare[name]) is not None]

    def __str__(self) -> str:
        shown = self._columns
        head, dense, *lines = aligned([[cells[i] for i in shown] for cells in ([*COLUMNS], *self._cells())])
        rule = "-" * len(head)
        return "\n".join([head, rule, dense, rule, *lines, *self._faults])

    def _repr_html_(self) -> str:
        shown = self._columns
        rows = ([cells[i] for i in shown] for cells in self._cells())
        return html_table([COLUMNS[i] for i in shown], rows, self._faults)


def _said(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _milliseconds(seconds: float | None) -> str:
    return _said(None if seconds is None else 1000 * seconds, "{:.2f} ms")


def _ready(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _ready(one) for key, one in value.items()}
    return [_ready(one) for one in value] if isinstance(value, Sequence) else repr(value)
