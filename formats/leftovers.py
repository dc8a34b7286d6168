"""Temporaries that a killed process left behind: told from those in use by a lock that ends with its process."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

PREFIX_LENGTH = 50
"""How much of a target's name its temporaries bear, in characters."""


def prefix(target: Path) -> str:
    """What the names of a target's temporaries begin with; they end with `.tmp`."""
    return f".{target.name[:PREFIX_LENGTH]}."


def claim(descriptor: int) -> bool:
    """Marks a new temporary as in use, until every copy of its descriptor is closed.

    Returns:
        Whether it is still there: a sweep may have come before the mark.
    """
    if sys.platform == "win32":
        return True
    import fcntl

    with contextlib.suppress(OSError):  # a filesystem without locks, where nothing is swept either
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return os.fstat(descriptor).st_nlink > 0


def remove_tree(path: Path) -> None:
    """Removes a file or a directory."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sweep(target: Path, remove: Callable[[Path], None] = remove_tree) -> None:
    """Removes temporaries of a target that nobody uses any more; those of a running process stay."""
    if sys.platform == "win32":
        return
    import fcntl

    name = re.compile(re.escape(prefix(target)) + r"[a-z0-9_]{8}\.tmp")
    with contextlib.suppress(OSError):
        for path in target.absolute().parent.iterdir():
            if not name.fullmatch(path.name) or path.is_symlink():
                continue
            with contextlib.suppress(OSError):  # in use, or somebody else's
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove(path)
                finally:
                    os.close(descriptor)
