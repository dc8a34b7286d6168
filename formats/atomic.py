"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Opens a temporary file beside `path` for reading and writing, and renames it to `path` at the end.

    On leaving the block without an exception the file is flushed to the disk (fsync), renamed, and the directory entry
    flushed. On an exception, Ctrl-C included, the temporary file is removed and whatever stood at `path` is untouched.
    After SIGKILL or a power cut a hidden `.NAME.*.tmp` may be left; `path` is either the old file or the whole new one.

    Args:
        path: the target; its directory must exist.
        overwrite: whether a file that stands there may be replaced.

    Raises:
        OutputError: the target exists, is a directory, cannot be written, or the disk is full.
    """
    target = Path(path)
    check_target(target, overwrite=overwrite)
    try:
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name[:50]}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise output_error(target, error) from error
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        check_target(target, overwrite=overwrite)
        temporary.replace(target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        # An operation on an open file carries no name; one with another name failed on some other file.
        if isinstance(error, OSError) and (error.filename is None or Path(error.filename) == temporary):
            raise output_error(target, error) from error
        raise
    _fsync_directory(target.parent)


def check_target(target: Path, *, overwrite: bool) -> None:
    """Refuses a target that cannot or must not be written.

    Raises:
        OutputError: `target` is a directory, its directory is missing or read-only, or it exists and may not be
            replaced.
    """
    try:
        is_directory, has_parent, exists = target.is_dir(), target.parent.is_dir(), target.exists()
    except OSError as error:  # a name too long, a directory above that may not be entered
        raise output_error(target, error) from error
    if is_directory:
        raise OutputError(f"{target}: is a directory; name a file")
    if not has_parent:
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    if exists and not overwrite:
        raise OutputError(f"{target}: exists already; choose another name or pass --overwrite")
    if not os.access(target.parent, os.W_OK):
        raise OutputError(f"{target}: no permission to write in {target.parent}")


def output_error(target: Path, error: OSError) -> OutputError:
    """An operating system's error while writing `target`, as one line with the way out."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(f"{target}: no space left on the disk; free some or write elsewhere; nothing was kept")
    if error.errno == errno.EFBIG:
        return OutputError(f"{target}: file size limit reached (ulimit -f or the filesystem's); nothing was kept")
    return OutputError(f"{target}: cannot be written ({error.strerror or error}); nothing was kept")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_directory(path: Path) -> None:
    # Not every filesystem and not Windows can open a directory; the rename itself stands in any case.
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
