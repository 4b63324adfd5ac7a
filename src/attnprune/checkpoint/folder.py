"""A directory that nobody vouches for: files are opened with care and replaced in one step."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..errors import AttnPruneError, CheckpointError

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
LONGEST = 1 << 24
"""Bytes of a JSON file, and of the header of a file of weights."""
OTHER_SHAPE = (
    "pass a model of the class that was saved, and narrower=True where Torch-Pruning or the like made it smaller; of "
    "such models only what save_pruned wrote can be read"
)
"""What to do where shapes differ."""
_DRAFT = re.compile(r"\.attnprune-\d+-\d+\.draft")


def refuse(where: str, expected: str, found: str, remedy: str = "save the model anew with save_pruned") -> NoReturn:
    """Raises CheckpointError."""
    raise CheckpointError(where, expected, found, remedy)


@contextmanager
def reading(where: str, remedy: str = "save the model anew") -> Iterator[None]:
    """Errors of strict readers (:mod:`attnprune.values.fields`) as those of this file."""
    try:
        yield
    except CheckpointError:
        raise
    except AttnPruneError as error:
        raise CheckpointError(f"{where}: {error.where[:80]}", error.expected, error.found, remedy) from error


@contextmanager
def foreign(where: str, expected: str, remedy: str = "save the model anew") -> Iterator[None]:
    """Whatever code of others raises about a file that nobody vouches for, as an error of that file."""
    try:
        yield
    except AttnPruneError:
        raise
    except Exception as error:
        raise CheckpointError(where, expected, str(error)[:80], remedy) from error


class Folder:
    """A directory of plain files. Links, devices, pipes and names that lead elsewhere are refused.

    >>> import tempfile
    >>> folder = Folder.make(tempfile.mkdtemp())
    >>> folder.replace("a.json", b"{}")
    >>> folder.read("a.json")
    b'{}'
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def make(cls, path: str | os.PathLike[str]) -> Folder:
        """A directory to write to, made if it is not there."""
        where = Path(path)
        if where.exists() and not where.is_dir():
            refuse(str(path), "a directory", "a file", "give another path")
        where.mkdir(parents=True, exist_ok=True)
        return cls(where)

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Folder:
        """A directory to read from."""
        where = Path(path)
        if not where.is_dir():
            refuse(str(path), "a directory", "a file" if where.exists() else "nothing", "check the path")
        return cls(where)

    def has(self, name: str) -> bool:
        """Whether there is anything of this name, a broken link too."""
        return os.path.lexists(self.path / name)

    def open(self, name: str) -> BinaryIO:
        """A regular file for reading, unbuffered.

        Raises:
            CheckpointError: none, a link, a directory, a pipe or a device, or a name that is not one of this directory.
        """
        if not NAME.fullmatch(name):
            refuse("name of a file", "letters, digits, dots, dashes and underscores", repr(name)[:60])
        path = self.path / name
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                refuse(name, "a file", "a link, a directory, a pipe or a device", "copy the file itself there")
            file = os.fdopen(os.open(path, flags), "rb", buffering=0)
        except OSError as error:
            raise CheckpointError(name, "a file that can be read", str(error)[:80], "check the path") from error
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # replaced in between
            file.close()
            refuse(name, "a file", "something else")
        return file

    def read(self, name: str, most: int = LONGEST) -> bytes:
        """All of a small file."""
        with self.open(name) as file:
            size = os.fstat(file.fileno()).st_size
            if size > most:
                refuse(name, f"at most {most} bytes", str(size))
            found = file.read(most + 1) or b""
            while len(found) <= most and (more := file.read(most + 1 - len(found))):
                found += more
            return found

    def replace(self, name: str, data: bytes) -> None:
        """Puts a small file in place in one step."""
        with self.draft() as draft:
            draft.write(data)
            self.put(draft, name)

    @contextmanager
    def draft(self) -> Iterator[BinaryIO]:
        """A file for writing, gone when the block ends unless it was :meth:`put` in place."""
        number = 0
        while self.has(name := f".attnprune-{os.getpid()}-{number}.draft"):
            number += 1
        path = self.path / name
        try:
            with path.open("xb", buffering=0) as file:
                yield file
        finally:
            path.unlink(missing_ok=True)

    def put(self, draft: BinaryIO, name: str) -> None:
        """Gives a draft its name, in one step; what it holds is on the disk by then."""
        os.fsync(draft.fileno())
        os.replace(draft.name, self.path / name)
        self._sync()

    def _sync(self) -> None:
        """Names are on the disk, where the system can say so of directories."""
        if hasattr(os, "O_DIRECTORY"):
            handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block no other process of attnprune writes here; drafts that a killed one left are removed."""
        try:
            import fcntl

            handle = os.open(self.path, os.O_RDONLY)
        except (ImportError, OSError):  # no such locks on this system: writers must take turns by themselves
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            for path in self.path.iterdir():
                if _DRAFT.fullmatch(path.name):
                    path.unlink(missing_ok=True)
            yield
        finally:
            os.close(handle)
