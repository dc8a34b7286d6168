"""Where a test may write, and as whom."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Within: not root, whom no permission binds. Tests often run as root in a container; then this is nobody."""
    if os.getuid() != 0:
        yield
        return
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A temporary directory that everybody may enter, as pytest's own may not be."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory
        directory.chmod(0o755)


@contextlib.contextmanager
def other_filesystem(than: Path) -> Iterator[Path]:
    """A temporary directory on another filesystem; skips the test where there is none."""
    for place in (Path("/dev/shm"), Path("/run/user") / str(os.getuid()), Path("/tmp"), Path.cwd()):
        if place.is_dir() and os.access(place, os.W_OK) and place.stat().st_dev != than.stat().st_dev:
            with tempfile.TemporaryDirectory(dir=place) as name:
                yield Path(name)
            return
    pytest.skip("one filesystem only")
