"""Strict readers for JSON that nobody vouches for: each returns a typed value, or says what is wrong where."""

from __future__ import annotations

import json
from math import isfinite
from reprlib import Repr
from typing import Any, NoReturn

from ..errors import PlanFormatError

MAX_COUNT = 1 << 20  # the largest number of heads, channels or widths that a file may claim
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 60


def fail(where: str, expected: str, found: object) -> NoReturn:
    """Raises PlanFormatError, with what was found cut to 80 characters."""
    shown = _SHORT.repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    raise PlanFormatError(
        f"plan: {where}", expected, shown, "write plans with Plan.to_json; this one was changed or cut"
    )


def mapping(where: str, value: object, keys: set[str]) -> dict[str, Any]:
    """A mapping with exactly these keys."""
    if not isinstance(value, dict) or set(value) != keys:
        fail(where, f"a mapping with keys {sorted(keys)}", sorted(value) if isinstance(value, dict) else value)
    return value


def array(where: str, value: object, length: int | None = None) -> list[Any]:
    """A list, of this length if one is given."""
    if not isinstance(value, list) or (length is not None and len(value) != length):
        fail(where, "a list" if length is None else f"a list of {length}", value)
    return value


def integer(where: str, value: object, low: int = 0, high: int = MAX_COUNT) -> int:
    """A whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(where, f"a whole number from {low} to {high}", value)
    return value


def string(where: str, value: object) -> str:
    """A string."""
    if not isinstance(value, str):
        fail(where, "a string", value)
    return value


def number(where: str, value: object) -> float:
    """A finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        fail(where, "a finite number", value)
    return float(value)


def positive(where: str, value: object) -> float:
    """A finite number above 0."""
    found = number(where, value)
    if not found > 0:
        fail(where, "a number above 0", value)
    return found


def boolean(where: str, value: object) -> bool:
    """True or false."""
    if not isinstance(value, bool):
        fail(where, "true or false", value)
    return value


def integers(where: str, value: object, low: int = 0) -> tuple[int, ...]:
    """A list of whole numbers."""
    return tuple(integer(f"{where}[{i}]", each, low=low) for i, each in enumerate(array(where, value)))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        fail("keys", "each key once", [key for key, _ in pairs])
    return found


def _integer(text: str) -> int:
    if len(text) > 30:
        fail("numbers", "whole numbers of at most 30 digits", text)
    return int(text)


def _float(text: str) -> float:
    if not isfinite(found := float(text)):
        fail("numbers", "finite numbers", text)
    return found


def _constant(text: str) -> NoReturn:
    fail("numbers", "finite numbers", text)


def load(text: str | bytes, most: int = 1 << 23) -> object:
    """Parses JSON; a key given twice, numbers that are not finite, absurd nesting and bad text are refused.

    Args:
        text: the text.
        most: how many values it may hold, counted by commas and brackets before anything is parsed.
    """
    try:
        values = sum(text.count(mark) if isinstance(text, str) else text.count(mark.encode()) for mark in ",[{")
        if values > most:
            fail("file", f"at most {most} values", values)
        return json.loads(
            text, object_pairs_hook=_unique, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except PlanFormatError:
        raise
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise PlanFormatError("plan", "JSON text", str(error)[:80], "write plans with Plan.to_json") from error
