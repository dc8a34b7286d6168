"""What this process has begun to write and not finished, so that it can end at once and still leave nothing half-written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

_removals: dict[object, Callable[[], None]] = {}
_notes: list[Callable[[], str | None]] = []
_last_works: list[object] = []


@contextlib.contextmanager
def unfinished(remove: Callable[[], None]) -> Iterator[None]:
    """Within, something half-written may be on the disk, which `remove` takes away, if it is there; it is called on leaving, too.

    Where Ctrl-C comes just then, it stays on the list, and `abandon` calls it once more.
    """
    key = object()
    _removals[key] = remove
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            remove()
        _removals.pop(key, None)


@contextlib.contextmanager
def last_work() -> Iterator[None]:
    """Within, what an interrupted command still has to do is done: it is not cut short."""
    key = object()
    _last_works.append(key)
    try:
        yield
    finally:
        _last_works.remove(key)


@contextlib.contextmanager
def noted(
    note: Callable[[], str | None], *, but: type[BaseException] | tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Adds a note, if there is one, to whatever exception leaves the block, and to the last line of a process that just ends.

    Errors of the kind `but` say themselves what to do.
    """
    _notes.append(note)
    try:
        yield
    except BaseException as error:
        if not isinstance(error, but) and (text := note()):
            error.add_note(text)
        raise
    finally:
        _notes.remove(note)


def is_unwinding() -> bool:
    """Whether anything is still to be cleaned up or done last."""
    return bool(_removals or _last_works)


def abandon() -> list[str]:
    """Removes all that is half-written, for a process that ends now; returns the notes of what is kept."""
    while _removals:
        _, remove = _removals.popitem()
        with contextlib.suppress(OSError):
            remove()
    return [text for note in list(_notes) if (text := note())]
