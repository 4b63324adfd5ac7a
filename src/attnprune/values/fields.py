"""Strict readers for JSON that nobody vouches for: each returns a typed value, or says what is wrong where."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from functools import lru_cache, partial
from math import isfinite
from reprlib import Repr
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)  # fmt: skip

from ..errors import AttnPruneError, PlanFormatError

MAX_COUNT = 1 << 20  # the largest number of heads, channels or widths that a file may claim
T = TypeVar("T")
Reader = Callable[[str, object], Any]
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


def _from_0(where: str, value: object) -> float:
    found = number(where, value)
    if found < 0:
        fail(where, "a number from 0", value)
    return found


Size = Annotated[int, partial(integer, low=1)]
"""A field of a class that :func:`read` reads: a whole number from 1 to :data:`MAX_COUNT`; plain ``int``: from 0."""
Positive = Annotated[float, positive]
"""A field: a finite number above 0; plain ``float``: any finite one."""
From0 = Annotated[float, _from_0]
"""A field: a finite number from 0."""


def read(cls: type[T], raw: object, where: str = "") -> T:
    """A value of a dataclass or named tuple from a mapping with exactly its fields, each read by its annotation.

    Fields are ``bool``, ``str``, ``int``, ``float``, :data:`Size`, :data:`Positive`, :data:`From0`, a ``Literal``,
    tuples and mappings from text of these, other such classes (by their ``from_dict``, if they have one), or None.

    >>> from typing import NamedTuple
    >>> class Shape(NamedTuple):
    ...     name: str
    ...     dims: tuple[Size, ...]
    >>> read(Shape, {"name": "a", "dims": [3, 4]})
    Shape(name='a', dims=(3, 4))

    Raises:
        PlanFormatError: a missing, unknown or malformed field.
    """
    return cls(**checked(cls, raw, where))


def checked(cls: Any, raw: object, where: str = "") -> dict[str, Any]:
    """The fields that :func:`read` gives to the class, for checks that come before it."""
    readers = _readers(cls)
    found = mapping(where or "file", raw, set(readers))
    return {name: reader(f"{where}.{name}".lstrip("."), found[name]) for name, reader in readers.items()}


def to_dict(value: Any) -> dict[str, Any]:
    """The JSON-ready mapping that :func:`read` reads."""
    cls: Any = type(value)
    return {name: _to_json(getattr(value, name)) for name in _readers(cls)}


def _to_json(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if is_dataclass(value) or hasattr(value, "_asdict"):
        return to_dict(value)
    if isinstance(value, tuple):
        return [_to_json(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


@lru_cache
def _readers(cls: type[Any]) -> dict[str, Reader]:
    hints = get_type_hints(cls, include_extras=True)
    names = [one.name for one in dataclass_fields(cls)] if is_dataclass(cls) else cls._fields
    return {name: _reader(hints[name]) for name in names}


def _reader(kind: Any) -> Reader:
    """What reads a field of this type."""
    origin, inner = get_origin(kind), get_args(kind)
    if kind in _PLAIN:
        return _PLAIN[kind]
    if origin is Annotated:
        reader: Reader = inner[1]
        return reader
    if origin is Literal:
        return partial(_choice, inner)
    if origin in (Union, UnionType):
        (some,) = (_reader(one) for one in inner if one is not NoneType)
        return lambda where, value: None if value is None else some(where, value)
    if origin is tuple and inner[-1] is Ellipsis:
        return partial(_each, _reader(inner[0]))
    if origin is tuple:
        return partial(_all, [_reader(one) for one in inner])
    if origin is Mapping:
        return partial(_table, _reader(inner[1]))
    own = getattr(kind, "from_dict", None)
    return lambda where, value: read(kind, value, where) if own is None else own(value, where)


def _choice(words: tuple[str, ...], where: str, value: object) -> str:
    if value not in words or not isinstance(value, str):
        fail(where, f"one of {', '.join(words)}", value)
    return value


def _each(reader: Reader, where: str, value: object) -> tuple[Any, ...]:
    return tuple(reader(f"{where}[{i}]", one) for i, one in enumerate(array(where, value)))


def _all(readers: list[Reader], where: str, value: object) -> tuple[Any, ...]:
    given = array(where, value, len(readers))
    return tuple(reader(f"{where}[{i}]", one) for i, (reader, one) in enumerate(zip(readers, given, strict=True)))


def _table(reader: Reader, where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        fail(where, "a mapping", value)
    return {key: reader(f"{where}.{key}", one) for key, one in value.items()}


_PLAIN: dict[Any, Reader] = {bool: boolean, str: string, int: integer, float: number}


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


def document(kind: str, version: int, value: Mapping[str, Any]) -> str:
    """JSON text of a value that says what it is, keys sorted; :func:`opened` reads it."""
    return json.dumps({"format": kind, "version": version, **value}, sort_keys=True, allow_nan=False)


@contextmanager
def opened(
    text: str | bytes, kind: str, version: int, error: type[AttnPruneError], remedy: str
) -> Iterator[dict[str, Any]]:
    """What :func:`document` wrote, without what says what it is; a fault that is found inside the block is told as one
    of the document.

    Raises:
        AttnPruneError: of the type ``error``: malformed, or of another kind or version.
    """
    try:
        raw = load(text)
        found = dict(raw) if isinstance(raw, dict) else {}
        said = found.pop("format", None), found.pop("version", None)
        if said != (kind, version) or isinstance(said[1], bool):
            fail("format", f"{kind} of version {version}", said)
        yield found
    except AttnPruneError as fault:
        where = f"{kind.removeprefix('attnprune.')}: {fault.where.removeprefix('plan: ')}"
        raise error(where, fault.expected, fault.found, remedy) from fault


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
