"""A directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .atomic import check_parent, fsync_directory, output_error
from .errors import OutputError
from .leftovers import claim, prefix, remove_tree, sweep
from .unfinished import unfinished

_REPLACED: Final = "replaced"
"""What the old directory is called, in the temporary one, where the two cannot change places at once."""

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Makes a directory within a temporary one beside `path`, and renames it to `path` at the end.

    On leaving the block without an exception its files are flushed to the disk; it takes its place, or, where one stands there,
    changes places with that in one operation of the system, and the old one is removed. On an exception, Ctrl-C included,
    nothing is left and whatever stood at `path` is untouched. After SIGKILL a hidden `.NAME.*.tmp` may be left, which the next
    to write `path` removes. A system or filesystem that cannot exchange two directories (Linux can) takes two renames; if it
    is killed between them, the next to write `path` puts the old directory back first.

    Args:
        path: the target; the directory above must exist.
        overwrite: whether a directory that stands there may be replaced.

    Raises:
        OutputError: the target exists, cannot be written, or the disk is full.
    """
    target = Path(path).absolute()
    check_parent(target)
    sweep(target, lambda temporary: _discard(temporary, target))
    if target.exists() and not overwrite:
        raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")
    try:
        temporary, descriptor = _temporary(target)
    except OSError as error:
        raise output_error(target, error) from error
    try:
        with unfinished(lambda: _discard(temporary, target)):
            made = temporary / target.name
            made.mkdir()
            yield made
            _flush(made)
            if target.exists() and not overwrite:
                raise OutputError(f"{path}: exists already; choose another name or pass --overwrite")
            _put(made, target)
    except OSError as error:
        if error.filename is None or temporary in Path(os.fsdecode(error.filename)).parents:
            raise output_error(Path(path), error) from error
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)
    fsync_directory(target.parent)


def _temporary(target: Path) -> tuple[Path, int | None]:
    """A new directory beside the target, and the descriptor that marks it as in use."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=prefix(target), suffix=".tmp", dir=target.parent))
        if sys.platform == "win32":  # directories cannot be opened
            return temporary, None
        with contextlib.suppress(FileNotFoundError):  # swept before it was marked
            descriptor = os.open(temporary, os.O_RDONLY)
            if claim(descriptor):
                return temporary, descriptor
            os.close(descriptor)


def _flush(directory: Path) -> None:
    for path in directory.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    fsync_directory(directory)


def _put(made: Path, target: Path) -> None:
    """Renames a directory to a target that may be there."""
    if not target.exists():
        made.rename(target)
    elif not _exchange(made, target):
        target.rename(made.with_name(_REPLACED))
        made.rename(target)


def _exchange(one: Path, other: Path) -> bool:
    """Whether two directories changed places: whoever looks sees one or the other, always."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _discard(temporary: Path, target: Path) -> None:
    """Removes a temporary directory; what was to be replaced is put back if nothing has taken its place."""
    replaced = temporary / _REPLACED
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    remove_tree(temporary)
