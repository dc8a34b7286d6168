"""Who opens a file, Rust and C included: Linux's inotify through the C library."""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
from collections.abc import Iterator
from pathlib import Path

_OPEN, _EVENT = 0x20, struct.Struct("iIII")  # IN_OPEN; wd, mask, cookie, length of the name


@contextlib.contextmanager
def opened_in(directory: Path) -> Iterator[set[str]]:
    """Within: the names of the files of a directory that any process opens; the set is filled at the end."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(directory), _OPEN) < 0:
        raise OSError(ctypes.get_errno(), "no inotify")
    names: set[str] = set()
    try:
        yield names
        with contextlib.suppress(BlockingIOError):  # nothing more to read
            while events := os.read(descriptor, 1 << 16):
                place = 0
                while place < len(events):
                    length = _EVENT.unpack_from(events, place)[3]
                    name = events[place + _EVENT.size : place + _EVENT.size + length].rstrip(b"\0")
                    names.add(os.fsdecode(name) or ".")
                    place += _EVENT.size + length
    finally:
        os.close(descriptor)
