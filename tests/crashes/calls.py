"""What a process asks of the file system, call by call, and something that happens at the n-th."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

_EVENTS: Final = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

Act = Callable[[str, str], float]
"""Called before each call with its name and path; may raise, or end the process. Returns which share of a write is done."""


def install(room: Path, act: Act) -> None:
    """Calls `act` from now on at every call that changes something under `room`; this cannot be undone.

    Those are opening to write, renaming, removing and the like, each write and truncation of a raw file, and fsync. What a
    library in another language writes is not seen.
    """
    original, fsync = io.open, os.fsync

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and (not isinstance(arguments[2], int) or not arguments[2] & _WRITES):
            return
        if event != "open" and event not in _EVENTS:
            return
        if isinstance(arguments[0], str | bytes | os.PathLike):
            path = os.fsdecode(arguments[0])
            if Path(path).absolute().is_relative_to(room):  # a relative one may be of a directory by descriptor
                act(event, path)

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            view = memoryview(data).cast("B")
            share = act("write", str(self.name))
            return super().write(view[: max(1, int(share * len(view)))]) or 0

        def truncate(self, size: int | None = None) -> int:
            act("truncate", str(self.name))
            return super().truncate(size)

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or _is_elsewhere(file, room):
            return original(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    def synced(descriptor: int) -> None:
        act("fsync", str(descriptor))
        fsync(descriptor)

    sys.addaudithook(audit)
    io.open = builtins.open = opened
    os.fsync = synced  # type: ignore[assignment]


def _is_elsewhere(file: Any, room: Path) -> bool:
    if isinstance(file, int):
        return not Path(f"/proc/self/fd/{file}").readlink().is_relative_to(room)
    return not Path(os.fsdecode(file)).absolute().is_relative_to(room)


class Count:
    """Counts the calls, and those that write, and tells `watch` about each.

    Attributes:
        turns: places of the calls around which something else comes to stand: renames and what follows them, and flushes.
    """

    def __init__(self, watch: Callable[[str, str], None] = lambda event, path: None) -> None:
        self.calls = self.writes = 0
        self.turns: set[int] = set()
        self._watch = watch

    def __call__(self, event: str, path: str) -> float:
        self.calls += 1
        self.writes += event == "write"
        if event in ("os.rename", "fsync"):
            self.turns |= {self.calls, self.calls + (event == "os.rename")}
        self._watch(event, path)
        return 1.0


class At:
    """Does something at the n-th call."""

    def __init__(self, place: int, what: Callable[[str, str], None]) -> None:
        self._left, self._what = place, what

    def __call__(self, event: str, path: str) -> float:
        self._left -= 1
        if self._left == 0:
            self._what(event, path)
        return 1.0


class FailAt(At):
    """The n-th call fails. A removal does not: what cannot be removed stays, and is no write."""

    def __init__(self, place: int, code: int) -> None:
        super().__init__(place, lambda event, path: _fail(code, event, path))

    def __call__(self, event: str, path: str) -> float:
        return 1.0 if event in ("os.remove", "os.rmdir") else super().__call__(event, path)


def send(number: int) -> Callable[[str, str], None]:
    """A signal to itself."""
    return lambda event, path: os.kill(os.getpid(), number)


def _fail(code: int, event: str, path: str) -> None:
    raise OSError(code, os.strerror(code), *([] if event in ("write", "fsync", "truncate") else [path]))


class TornWrite:
    """SIGKILL in the middle of the n-th write."""

    def __init__(self, place: int, share: float) -> None:
        self._left, self._share = place, share

    def __call__(self, event: str, path: str) -> float:
        self._left -= event == "write"
        if self._left == 0:
            self._left = -1  # the next call, which is to write the rest, does not come about
            return self._share
        if self._left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return 1.0


class ShortWrites:
    """Each write does only some of what it is asked to, as the system may."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self, event: str, path: str) -> float:
        return self._random.choice((0.0, 0.5, 0.9, 1.0))


class FullDisk:
    """From the n-th call on nothing more can be written or made."""

    def __init__(self, place: int) -> None:
        self._left = place

    def __call__(self, event: str, path: str) -> float:
        self._left -= 1
        if self._left <= 0 and event in ("write", "open", "os.mkdir"):
            _fail(errno.ENOSPC, event, path)
        return 1.0
