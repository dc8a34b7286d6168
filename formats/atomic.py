"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError
from .leftovers import claim, prefix, sweep
from .unfinished import unfinished


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for reading and writing, and renames it to `path` at the end.

    On leaving the block without an exception the file is flushed to the disk (fsync), renamed, and the directory entry
    flushed. On an exception, Ctrl-C included, the temporary file is removed and whatever stood at `path` is untouched.
    After SIGKILL or a power cut a hidden `.NAME.*.tmp` may be left, which the next to write `path` removes; `path` is either
    the old file or the whole new one.

    Args:
        path: the target; its directory must exist.
        overwrite: whether a file that stands there may be replaced.

    Raises:
        OutputError: the target exists, is a directory, cannot be written, or the disk is full.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite)
    sweep(target)
    temporary = target.with_name(f"{prefix(target)}{secrets.token_hex(4)}.tmp")
    with unfinished(temporary.unlink):  # before it is there, or Ctrl-C might come between
        try:
            descriptor = _create(temporary)
        except OSError as error:
            raise output_error(target, error) from error
        with _placed(os.fdopen(descriptor, "w+b"), temporary, target, overwrite=overwrite) as file:
            yield file


def _create(temporary: Path) -> int:
    """Makes a new file, marked as in use, and returns its descriptor."""
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        if claim(descriptor):
            return descriptor
        os.close(descriptor)  # swept before it was marked


def part_path(path: str | os.PathLike[str]) -> Path:
    """Where a file is while it is made and may be gone on with: `NAME.part`."""
    return Path(path).with_name(f"{Path(path).name}.part")


@contextlib.contextmanager
def part_file(
    path: str | os.PathLike[str], *, overwrite: bool = False, is_worth_keeping: Callable[[], bool] = lambda: True
) -> Iterator[BinaryIO]:
    """As `atomic_file`, but under a name that another process finds: what stands at `part_path` is opened, not replaced.

    Args:
        path: the target; its directory must exist.
        overwrite: whether a file that stands there may be replaced.
        is_worth_keeping: asked after an exception: whether the unfinished file stays.

    Raises:
        OutputError: the target exists, is a directory, cannot be written, or the disk is full.
    """
    target, part = Path(path), part_path(path)
    check_target(target, overwrite=overwrite)
    try:
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    except OSError as error:
        raise output_error(part, error) from error
    with _placed(os.fdopen(descriptor, "r+b"), part, target, overwrite=overwrite, keeps=is_worth_keeping) as file:
        yield file


@contextlib.contextmanager
def _placed(
    file: BinaryIO, temporary: Path, target: Path, *, overwrite: bool, keeps: Callable[[], bool] = lambda: False
) -> Iterator[BinaryIO]:
    """Renames a file that is being written to its target at the end; or removes it, unless an exception is to keep it."""

    is_placed = False

    def remove() -> None:
        if not is_placed and not keeps():
            temporary.unlink()

    try:
        with unfinished(remove), _claimed(file):
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o666 & ~_umask())
            check_target(target, overwrite=overwrite)
            temporary.replace(target)
            is_placed = True
    except OSError as error:
        # An operation on an open file carries no name; one with another name failed on some other file.
        if error.filename is None or Path(error.filename) == temporary:
            raise output_error(target, error, is_kept=keeps()) from error
        raise
    fsync_directory(target.parent)


@contextlib.contextmanager
def _claimed(file: BinaryIO) -> Iterator[None]:
    """Within, what `claim` marked stays so when the file is closed: it is in use until it is renamed."""
    if sys.platform == "win32":  # where a file that is open cannot be renamed
        yield
        return
    copy = os.dup(file.fileno())
    try:
        yield
    finally:
        os.close(copy)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuses a target that cannot or must not be written.

    Raises:
        OutputError: `target` is a directory, a device or a pipe, its directory is missing or read-only, or it exists and may
            not be replaced.
    """
    try:
        is_directory, is_file, exists = target.is_dir(), target.is_file(), target.exists()
    except OSError as error:  # a name too long, a directory above that may not be entered
        raise output_error(target, error) from error
    if is_directory:
        raise OutputError(f"{target}: is a directory; name a file")
    if exists and not is_file:  # a rename would take the place of /dev/null itself
        raise OutputError(f"{target}: is a device or a pipe; name a file")
    if exists and not overwrite:
        raise OutputError(f"{target}: exists already; choose another name or pass --overwrite")
    check_parent(target)


def check_parent(target: Path) -> None:
    """Refuses a target whose directory is missing or read-only.

    Raises:
        OutputError: it is.
    """
    if not target.parent.is_dir():
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target}: no permission to write in {target.parent}")


def output_error(target: Path, error: OSError, *, is_kept: bool = False) -> OutputError:
    """An operating system's error while writing `target`, as one line with the way out."""
    end = "" if is_kept else "; nothing of it was kept"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{target}: no space left on the disk; free some or write elsewhere{end}")
    if error.errno == errno.EFBIG:
        return OutputError(f"{target}: file size limit reached (ulimit -f or the filesystem's){end}")
    if error.errno is None and "requested and" in str(error):  # numpy, which does not pass on the reason
        return OutputError(f"{target}: no room for all of it ({error}); free some space or write elsewhere{end}")
    return OutputError(f"{target}: cannot be written ({error.strerror or error}){end}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk, where that can be done."""
    # Not every filesystem and not Windows can open a directory; the rename itself stands in any case.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
