"""A directory that nobody vouches for: files are opened with care and replaced in one step."""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NoReturn

from ..errors import AttnPruneError, CheckpointError
from ..nn.attempt import ending_with, undoing_with

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
LONGEST = 1 << 24
"""Bytes of a JSON file, and of the header of a file of weights."""
OTHER_SHAPE = (
    "pass a model of the class that was saved, and narrower=True where Torch-Pruning or the like made it smaller; of "
    "such models only what save_pruned wrote can be read"
)
"""What to do where shapes differ."""
_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[0-9a-f]{40}")
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

    Only in the cache of the Hugging Face Hub, where every file of a snapshot is a link to a blob beside the snapshots
    of the same model, such a link counts as the blob.

    >>> import tempfile
    >>> folder = Folder.make(tempfile.mkdtemp())
    >>> folder.replace("a.json", b"{}")
    >>> folder.read("a.json")
    b'{}'
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        place = Path(os.path.abspath(path))
        inside = _SNAPSHOT.fullmatch("/".join(place.parts[-3:]))
        self.blobs = None if inside is None else place.parents[1] / "blobs"
        self.hub_name = None if inside is None else "/".join(inside.groups())

    @classmethod
    def make(cls, path: str | os.PathLike[str]) -> Folder:
        """A directory to write to, made if it is not there."""
        where = Path(path)
        if where.exists() and not where.is_dir():
            refuse(str(path), "a directory", "a file", "give another path")
        if not where.exists():
            undoing_with(partial(_forget, where))
            where.mkdir(parents=True, exist_ok=True)
        return cls(where)

    @classmethod
    def at(cls, path: str | os.PathLike[str]) -> Folder:
        """A directory to read from."""
        where = Path(path)
        if not where.is_dir():
            raise CheckpointError.no_directory(path)
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
        path = self._blob(self.path / name)
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

    def _blob(self, path: Path) -> Path:
        """What a link of the Hub's cache stands for; any other path as it is."""
        if self.blobs is None or not path.is_symlink() or self.blobs.is_symlink():
            return path
        target = Path(os.path.normpath(Path(os.path.abspath(path)).parent / os.readlink(path)))
        return target if target.parent == self.blobs else path

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
        """Puts a small file in place in one step; the one before comes back where the call that is running fails."""
        path = self.path / name
        undoing_with(partial(_put_back, path, path.read_bytes() if path.is_file() else None))
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

    def alone(self) -> None:
        """Until the call that is running ends no other process of attnprune writes here; drafts that a killed one left
        are removed."""
        try:
            import fcntl

            handle = os.open(self.path, os.O_RDONLY)
        except (ImportError, OSError):  # no such locks on this system: writers must take turns by themselves
            return
        undoing_with(partial(_close, [handle]))
        ending_with(partial(os.close, handle))
        fcntl.flock(handle, fcntl.LOCK_EX)
        for path in self.path.iterdir():
            if _DRAFT.fullmatch(path.name):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes a file once the call that is running has succeeded."""
        ending_with(partial((self.path / name).unlink, missing_ok=True))

    def drafts(self) -> Path:
        """A directory inside for files to come, gone when the call that is running ends."""
        path = self.path / f".attnprune-{os.getpid()}-{len(os.listdir(self.path))}.draft"
        undoing_with(partial(shutil.rmtree, path, ignore_errors=True))
        ending_with(partial(shutil.rmtree, path, ignore_errors=True))
        path.mkdir()
        return path

    def receive(self, drafts: Path, stale: re.Pattern[str]) -> None:
        """Takes the files of :meth:`drafts` in, and removes those of the names that this makes ``stale``."""
        new, before = {path.name for path in drafts.iterdir()}, drafts / "before"
        before.mkdir()
        for name in sorted({path.name for path in self.path.iterdir() if stale.fullmatch(path.name)} | new):
            here, kept = self.path / name, before / name
            undoing_with(partial(_return, here, kept, here.exists()))
            if here.exists():
                os.replace(here, kept)
            if name in new:
                os.replace(drafts / name, here)


def _forget(where: Path) -> None:
    """A directory that was made goes, once what was put into it is gone; files of others in it stay."""
    with suppress(OSError):
        where.rmdir()


def _close(handles: list[int]) -> None:
    while handles:
        os.close(handles.pop())


def _put_back(path: Path, data: bytes | None) -> None:
    """The file as it was; None: there was none."""
    if data is None:
        path.unlink(missing_ok=True)
    else:
        draft = path.with_name(f".attnprune-{os.getpid()}-0.draft")
        draft.write_bytes(data)
        os.replace(draft, path)


def _return(here: Path, kept: Path, was: bool) -> None:
    """The file as it was, from where it is kept; unless it is there still."""
    if kept.exists():
        os.replace(kept, here)
    elif not was:
        here.unlink(missing_ok=True)
