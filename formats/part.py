"""What a stopped writer left at `NAME.part`."""

from __future__ import annotations

import os
from pathlib import Path

from .atomic import part_path
from .errors import NotSctError, OutputError, TrailingDataError
from .layout import HEAD_BYTES, Head
from .reader import SctFile


def check_part(path: str | os.PathLike[str], *, overwrite: bool, resume: bool) -> None:
    """Refuses to begin a file where a stopped one would be lost.

    Raises:
        OutputError: one stands at `NAME.part`, or something else does, and neither `resume` nor `overwrite` is set.
    """
    part = part_path(path)
    if resume or overwrite or not part.exists() or _is_empty(part):
        return
    raise OutputError(
        f"{part}: a stopped run's, {part.stat().st_size} bytes; go on with --resume, or pass --overwrite to begin again"
    )


def open_part(path: str | os.PathLike[str]) -> SctFile | None:
    """What can be gone on from; None where nothing is there or nothing was ever kept.

    Raises:
        FormatError: the file is damaged.
    """
    part = part_path(path)
    if not part.exists() or _is_empty(part):
        return None
    try:
        return SctFile(part, allow_incomplete=True)
    except TrailingDataError:  # stopped between the last head and the cut at its end
        with part.open("rb") as file:
            head = Head.unpack(file.read(HEAD_BYTES))
        os.truncate(part, head.committed)
        return SctFile(part, allow_incomplete=True)
    except NotSctError as error:
        raise OutputError(f"{error}; move it away or pass --overwrite") from None


def _is_empty(part: Path) -> bool:
    """Whether a writer began the file and was stopped before it kept anything."""
    if not part.is_file():
        return False
    with part.open("rb") as file:
        data = file.read(HEAD_BYTES)
    return Head().pack().startswith(data)
