"""Files and directories that appear when a command has succeeded, and not before: :class:`Outputs`."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from ..errors import OptionError

_MODEL = {"config.json", "attnprune.json"}


class Outputs:
    """Hands out drafts; on leaving the block without an error each takes its place, else all are removed.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with Outputs() as outputs:
    ...     _ = outputs.file(folder / "a.txt").write_text("done")
    ...     (folder / "a.txt").exists()
    False
    >>> (folder / "a.txt").read_text()
    'done'
    """

    def __init__(self) -> None:
        self._drafts: list[tuple[Path, Path, Path]] = []

    def __enter__(self) -> Outputs:
        return self

    def file(self, target: Path) -> Path:
        """A path to write a file to, of the same suffix.

        Raises:
            OptionError: a directory stands there, or there is none to hold it.
        """
        if target.is_dir():
            raise OptionError(str(target), "a file to write", "a directory", "give a name in it")
        return self._draft(target)

    def folder(self, target: Path, overwrite: bool) -> Path:
        """An empty directory to write to.

        Args:
            target: where it goes: nothing, an empty directory, or with ``overwrite`` one that holds a model.
            overwrite: whether a model may be replaced.

        Raises:
            OptionError: something else stands there.
        """
        target = Path(os.path.normpath(target.absolute()))
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise OptionError(str(target), "a directory to write", "a file or a link", "give another path")
        held = {path.name for path in target.iterdir()} if target.is_dir() else set()
        if held and not overwrite:
            raise OptionError(
                str(target), "no such directory, or an empty one", f"{len(held)} files", "use --overwrite"
            )
        if held and not held & _MODEL:
            raise OptionError(str(target), "a model to replace", f"{sorted(held)[:3]}", "give another path")
        draft = self._draft(target)
        draft.mkdir()
        return draft

    def _draft(self, target: Path) -> Path:
        if not target.absolute().parent.is_dir():
            raise OptionError(str(target), "a directory to write in", "none", f"make {target.parent} first")
        place = Path(tempfile.mkdtemp(prefix=".attnprune-", dir=target.absolute().parent))
        self._drafts.append((place, place / target.name, target))
        return place / target.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            for place, draft, target in self._drafts if kind is None else ():
                if target.is_dir():
                    os.replace(target, place / "old")
                os.replace(draft, target)
        finally:
            for place, *_ in self._drafts:
                shutil.rmtree(place, ignore_errors=True)
