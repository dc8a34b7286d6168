"""One process at a time writes one output."""

from __future__ import annotations

import contextlib
import errno
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from filelock import FileLock, Timeout

from .errors import OutputError
from .unfinished import unfinished

_PATIENCE: Final = 0.2
"""Seconds until a lock counts as held: a process that ends removes its file while others may have opened it."""

_NO_LOCKS: Final = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
"""What a filesystem answers that has no locks."""


@contextlib.contextmanager
def output_lock(path: str | os.PathLike[str]) -> Iterator[None]:
    """Holds `.NAME.lock` beside an output, a file or a directory, while it is made.

    The lock is the operating system's (flock), so that of a killed process is free again, whatever it left lying. It holds
    this process's id and machine, for the message. The file goes away on leaving the block. On a filesystem without locks
    none is held: outputs are renamed into place whole, so two of them do not mix, and the last one stands.

    Args:
        path: the output; its directory must exist.

    Raises:
        OutputError: another process, or another thread of this one, holds it; its file cannot be written, or the directory
            does not exist.
    """
    target = Path(path)
    place = target.parent / f".{target.name[:200]}.lock"
    if not target.parent.is_dir():  # or filelock would make it
        raise OutputError(f"{target}: the directory {target.parent} does not exist; create it first")
    lock = FileLock(place, timeout=_PATIENCE, fallback_to_soft=False, thread_local=False, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout:
        raise OutputError(
            f"{target}: {_holder(place)} is writing it and holds {place}; wait until it has ended, or write elsewhere"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OutputError(f"{target}: cannot be locked by {place} ({error.strerror or error})") from None
        yield
        return
    try:
        with unfinished(place.unlink):  # goes while it is held, or another's would; Windows refuses, and then it stays
            yield
    finally:
        lock.release()


def _sign(descriptor: int) -> None:
    os.ftruncate(descriptor, 0)  # what a killed process wrote
    os.write(descriptor, f"{os.getpid()} {platform.node()}\n".encode())


def _holder(place: Path) -> str:
    """Who holds a lock, as far as its file says."""
    try:
        pid, _, machine = place.read_text(encoding="utf-8").partition(" ")
    except (OSError, ValueError):
        return "another process"
    if not pid.isdecimal():
        return "another process"
    elsewhere = machine.strip() not in ("", platform.node())
    return f"process {pid}" + (f" on {machine.strip()!r:.80}" if elsewhere else "")
