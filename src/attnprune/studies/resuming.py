"""Finished rows of a sweep on the disk: :class:`Finished`, and what tells one sweep from another (:func:`digest`)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AttnPruneError, OptionError
from ..nn.attempt import undoing_with
from ..report.rows import Row, read_row
from ..values import fields

FORMAT, VERSION = "attnprune.sweep.finished", 1
DEEP = 8
"""How far objects inside objects are looked at."""


class Finished:
    """Rows by what they are of, kept in a file; of a model, options or data that changed there is none.

    The file is replaced in one step after every row, so that an interrupt loses the row that was being made. Rows of
    other sweeps stay in it.

    Args:
        path: of the file; None: nothing is kept.

    Raises:
        OptionError: there is a file that no sweep wrote, or no directory to hold one.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self.path = None if path is None else Path(path)
        self._rows: dict[str, Row] = {}
        if self.path is not None and self.path.exists():
            self._rows = _read(self.path)
        elif self.path is not None and not self.path.absolute().parent.is_dir():
            remedy = f"make {self.path.absolute().parent} first"
            raise OptionError("resume", "a file in a directory that exists", repr(str(path))[:120], remedy)

    def get(self, key: str) -> Row | None:
        """The row of this fingerprint, if it is finished."""
        return self._rows.get(key)

    def add(self, key: str, row: Row) -> None:
        """Keeps a row."""
        self._rows[key] = row
        if self.path is None:
            return
        rows = {key: fields.to_dict(one) for key, one in self._rows.items()}
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}.draft")
        undoing_with(partial(draft.unlink, missing_ok=True))
        text = json.dumps({"format": FORMAT, "version": VERSION, "rows": rows}, indent=1, allow_nan=False)
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, self.path)


def _read(path: Path) -> dict[str, Row]:
    try:
        found = fields.mapping("file", fields.load(path.read_bytes()), {"format", "version", "rows"})
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            fields.fail("format", f"{FORMAT} of version {VERSION}", (found["format"], found["version"]))
        if not isinstance(found["rows"], dict):
            fields.fail("rows", "a mapping", found["rows"])
        return {key: read_row(one) for key, one in found["rows"].items()}
    except AttnPruneError as error:
        remedy = "give another path, or delete the file to begin anew"
        where = f"resume: {error.where.removeprefix('plan: ')}"
        raise OptionError(where, f"{error.expected}, as sweep writes it", error.found, remedy) from error
    except OSError as error:
        found_text = f"{path.name}: {error.strerror}"
        raise OptionError("resume", "a file that sweep wrote", found_text, "give another path") from error


def digest(*values: object) -> str:
    """A fingerprint of values: equal for equal ones in every process, another one where something differs.

    Tensors count by what they hold, modules by their classes, settings and tensors, functions by their name, code,
    defaults, and the tensors, numbers and texts of their closure, other objects by their class and attributes.

    >>> digest({"a": 1, "b": torch.ones(2)}) == digest({"b": torch.ones(2), "a": 1})
    True
    >>> digest(torch.ones(2)) == digest(torch.zeros(2)), digest(nn.ReLU()) == digest(nn.GELU())
    (False, False)
    """
    found = hashlib.sha256()
    _add(found, values, DEEP)
    return found.hexdigest()


def _add(found: Any, value: object, depth: int) -> None:
    """Feeds a hash with a value."""
    found.update(f"<{type(value).__qualname__}>".encode())
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta:
            found.update(_bytes(value))
    elif isinstance(value, nn.Module):
        found.update(repr(value).encode())
        _add(found, {**dict(value.named_parameters()), **dict(value.named_buffers())}, depth - 1)
        config = getattr(value, "config", None)
        _add(found, getattr(config, "__dict__", None), depth - 1)
    elif isinstance(value, Mapping):
        for key, one in sorted(value.items(), key=lambda pair: str(pair[0])):
            found.update(f"{key!s}=".encode())
            _add(found, one, depth)
    elif isinstance(value, (list, tuple)):
        for one in value:
            _add(found, one, depth)
    elif value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        found.update(repr(value).encode())
    elif isinstance(value, (set, frozenset)):
        _add(found, sorted(map(repr, value)), depth)
    elif isinstance(value, partial):
        _add(found, [value.func, value.args, value.keywords], depth - 1)
    elif isinstance(code := getattr(value, "__code__", None), CodeType):
        found.update(f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}".encode())
        _add_code(found, code)
        if depth > 0:  # of objects in a closure the class alone counts: counters and loggers change from run to run
            cells = [one.cell_contents for one in getattr(value, "__closure__", None) or ()]
            held = (getattr(value, key, None) for key in ("__self__", "__defaults__", "__kwdefaults__"))
            _add(found, [*cells, *held], 0)
    elif callable(getattr(value, "tobytes", None)):  # arrays
        found.update(f"{getattr(value, 'dtype', '')}{getattr(value, 'shape', '')}".encode() + value.tobytes())  # type: ignore[attr-defined]
    elif depth > 0 and hasattr(value, "__dict__") and not isinstance(value, type):
        _add(found, vars(value), depth - 1)
    elif hasattr(value, "__qualname__"):
        found.update(f"{getattr(value, '__module__', '')}.{value.__qualname__}".encode())


def _add_code(found: Any, code: CodeType) -> None:
    """Feeds a hash with what a function does, and with nothing of where it was written."""
    found.update(code.co_code + repr(code.co_names).encode())
    for one in code.co_consts:
        if isinstance(one, CodeType):
            _add_code(found, one)
        elif one is None or isinstance(one, (bool, int, float, str, bytes)):
            found.update(repr(one).encode())


def _bytes(value: Tensor) -> bytes:
    whole = value.detach().cpu().contiguous().reshape(-1)
    return bytes(whole.view(torch.uint8).numpy().tobytes()) if whole.numel() else b""
