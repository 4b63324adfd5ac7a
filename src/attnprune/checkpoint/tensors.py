"""The safetensors format, one tensor at a time: headers that are checked, reads and writes that copy nothing twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import OptionError
from ..values import fields
from .folder import LONGEST, Folder, reading, refuse

_BLOCK = 1 << 20
_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
}  # fmt: skip
DTYPES: Mapping[str, torch.dtype] = {key: getattr(torch, name) for key, name in _NAMES.items() if hasattr(torch, name)}
KEYS = {dtype: key for key, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """What a file says about a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int = 0
    """Its first byte in the file."""

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: BinaryIO, where: str) -> dict[str, Entry]:
    """Every tensor of a safetensors file, by name; no byte of the file belongs to none or to two of them.

    Raises:
        CheckpointError: not such a file, or one whose header and size contradict each other.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(_exactly(file, 8, where), "little")
    if length > min(size - 8, LONGEST):
        refuse(where, f"a header of at most {min(size - 8, LONGEST)} bytes", str(length))
    with reading(where):
        header = fields.load(_exactly(file, length, where), most=1 << 21)
        if not isinstance(header, dict):
            fields.fail("header", "a mapping", header)
        found = {key: _entry(key, one, 8 + length) for key, one in header.items() if key != "__metadata__"}
    place = 8 + length
    for key, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != place:
            refuse(f"{where}: {key[:60]}", f"data from byte {place}", str(entry.start))
        place += entry.size
    if place != size:
        refuse(where, f"{place} bytes, as its header says", str(size))
    return found


def _entry(key: str, raw: object, base: int) -> Entry:
    found = fields.mapping(key, raw, {"dtype", "shape", "data_offsets"})
    dtype = DTYPES.get(fields.string(f"{key}.dtype", found["dtype"]))
    if dtype is None:
        fields.fail(f"{key}.dtype", f"one of {', '.join(DTYPES)}", found["dtype"])
    sizes = fields.array(f"{key}.shape", found["shape"])
    if len(sizes) > 16:
        fields.fail(f"{key}.shape", "at most 16 dimensions", len(sizes))
    shape = tuple(fields.integer(f"{key}.shape", one, high=1 << 40) for one in sizes)
    offsets = fields.array(f"{key}.data_offsets", found["data_offsets"], 2)
    start, stop = (fields.integer(f"{key}.data_offsets", one, high=1 << 60) for one in offsets)
    entry = Entry(dtype, shape, base + start)
    if stop - start != entry.size:
        fields.fail(f"{key}.data_offsets", f"{entry.size} bytes", stop - start)
    return entry


def _exactly(file: BinaryIO, count: int, where: str) -> bytes:
    found = bytearray(count)
    _fill(file, memoryview(found), where)
    return bytes(found)


def _fill(file: BinaryIO, view: memoryview, where: str) -> None:
    done = 0
    while done < len(view):
        count = file.readinto(view[done : done + (1 << 30)])  # type: ignore[attr-defined]
        if not count:
            refuse(where, f"{len(view) - done} more bytes", "the end of the file")
        done += count


class Weights:
    """The tensors of a checkpoint of one or more files, read one at a time."""

    def __init__(self, folder: Folder, names: Sequence[str]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self.entries: dict[str, Entry] = {}
        self._home: dict[str, str] = {}
        try:
            for name in names:
                self._files[name] = file = folder.open(name)
                for key, entry in read_header(file, name).items():
                    if key in self.entries:
                        refuse(f"{name}: {key[:60]}", f"no tensor of {self._home[key]} again", "one")
                    self.entries[key], self._home[key] = entry, name
        except BaseException:
            self.close()
            raise

    def home(self, key: str) -> str:
        """The file that holds a tensor."""
        return self._home[key]

    def digest(self, name: str) -> str:
        """SHA-256 of a file."""
        found, file, block = hashlib.sha256(), self._files[name], bytearray(_BLOCK)
        file.seek(0)
        while count := file.readinto(block):  # type: ignore[attr-defined]
            found.update(memoryview(block)[:count])
        return found.hexdigest()

    def read(self, key: str) -> Tensor:
        """A tensor with memory of its own."""
        entry, file = self.entries[key], self._files[self._home[key]]
        tensor = torch.empty(entry.shape, device="cpu", dtype=entry.dtype)
        file.seek(entry.start)
        _fill(file, _bytes(tensor), f"{self._home[key]}: {key[:60]}")
        return tensor

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def __enter__(self) -> Weights:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data) if tensor.numel() else memoryview(b"")


class Item(NamedTuple):
    """A tensor to write: what it will be, and how to get it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return Entry(self.dtype, self.shape).size


def shards(items: Iterable[Item], limit: int) -> list[list[Item]]:
    """Runs of at most ``limit`` bytes; a tensor that is larger has one to itself.

    >>> items = [Item(name, torch.uint8, (4,), lambda: torch.zeros(4)) for name in "abc"]
    >>> [[item.name for item in run] for run in shards(items, 8)]
    [['a', 'b'], ['c']]
    """
    found: list[list[Item]] = [[]]
    room = limit
    for item in items:
        if found[-1] and item.size > room:
            found.append([])
            room = limit
        found[-1].append(item)
        room -= item.size
    return found


def write_tensors(file: BinaryIO, items: Sequence[Item]) -> str:
    """Writes a safetensors file front to back, holding one tensor at a time; returns its SHA-256."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ordered = sorted(items, key=lambda item: -item.dtype.itemsize)  # stable; keeps every tensor aligned
    place = 0
    for item in ordered:
        if item.dtype not in KEYS:
            raise OptionError(item.name, "a dtype that safetensors has", str(item.dtype), "convert the model first")
        end = place + item.size
        header[item.name] = {"dtype": KEYS[item.dtype], "shape": list(item.shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    for data in (len(text).to_bytes(8, "little"), text):
        _write(file, memoryview(data), digest)
    for item in ordered:
        tensor = item.make().detach().to("cpu").contiguous()
        assert (tensor.dtype, tuple(tensor.shape)) == (item.dtype, item.shape), item.name
        _write(file, _bytes(tensor), digest)
    return digest.hexdigest()


def _write(file: BinaryIO, data: memoryview, digest: Any) -> None:
    for start in range(0, len(data), _BLOCK):
        block = data[start : start + _BLOCK]
        digest.update(block)
        while block:
            block = block[file.write(block) :]
