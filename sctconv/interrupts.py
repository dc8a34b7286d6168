"""Ctrl-C and SIGTERM end a command within two seconds, also in the middle of a long call that Python cannot interrupt."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

from .formats.unfinished import abandon, is_unwinding

INTERRUPTED: Final = 130
"""The exit code."""

_PATIENCE: Final = 1.5
"""Seconds in which the main thread is to be on its way out."""

_LOOK: Final = 0.05
"""Seconds between looks at it."""


@contextlib.contextmanager
def interruptible(last_line: Callable[[list[str]], str]) -> Iterator[Callable[[], None]]:
    """Within, the two signals raise KeyboardInterrupt in the main thread, or end the process where that does not come out.

    Python raises it only when the call that the thread is in returns: a decomposition may take minutes. So another thread hears
    of the signal at once (`signal.set_wakeup_fd`). It gives the main one a second and a half; then, unless that is busy
    cleaning up, it removes what is half-written, prints the last line and ends the process. A call that never lets go of
    Python's lock holds up this thread too. Where an exception raised in the middle of a library is lost there (a bare `except`,
    C code that clears what a method of ours raised), the signal is sent again. One that was ignored on entry stays so (`nohup`,
    shells' background jobs).

    Args:
        last_line: of the notes on what was kept, what to print.

    Yields:
        A function to call last, when all is cleaned up and said: after a signal it ends the process there and then. What Python
        does at its end would wait for threads, or be aborted by one that is in a long call.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    watch = _Watch(last_line)
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
    old = {number: signal.signal(number, watch.interrupt) or signal.SIG_DFL for number in numbers}
    try:
        with watch if sys.platform != "win32" else contextlib.nullcontext():
            yield watch.leave
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class _Interrupt(KeyboardInterrupt):
    """Can be referred to weakly, so that it is known when it has gone."""


class _Watch:
    """Ends the process some time after a signal.

    Attributes:
        ends: whether the process is being ended.
    """

    def __init__(self, last_line: Callable[[list[str]], str]) -> None:
        self.ends = False
        self._last_line = last_line
        self._raised: weakref.ref[_Interrupt] | None = None  # once the main thread knows of the signal

    def interrupt(self, number: int, frame: FrameType | None) -> None:
        """The signals' handler."""
        while self.ends:  # nothing may be undone twice
            time.sleep(_LOOK)
        raise self._new(number)  # that no local name holds: it would outlive its being lost

    def _new(self, number: int) -> _Interrupt:
        error = _Interrupt(number)
        self._raised = weakref.ref(error)
        return error

    def leave(self) -> None:
        """Ends the process if a signal came."""
        if self._raised is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
                    stream.flush()
            os._exit(INTERRUPTED)

    def __enter__(self) -> None:
        self._heard, self._said = socket.socketpair()
        self._said.setblocking(False)
        self._old = signal.set_wakeup_fd(self._said.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._old)
        self._said.close()
        self._thread.join()
        self._heard.close()

    def _listen(self) -> None:
        deadline: float | None = None
        number = signal.SIGINT
        while True:
            self._heard.settimeout(None if deadline is None else _LOOK)
            try:
                heard = self._heard.recv(64)
            except TimeoutError:
                assert deadline is not None
                if time.monotonic() >= deadline:
                    self._end()
                elif self._raised is not None and self._raised() is None:  # lost
                    self._raised = None
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
                continue
            if not heard:
                return  # the command is over
            if to_end := {signal.SIGINT, signal.SIGTERM} & set(heard):
                number = min(to_end)
                deadline = deadline or time.monotonic() + _PATIENCE

    def _end(self) -> None:
        """Ends the process, unless the main thread is cleaning up."""
        self.ends = True
        if self._raised is not None and self._raised() is not None and is_unwinding():
            self.ends = False
            return
        end = "\n" if sys.stderr.isatty() else ""  # below what a progress bar has drawn
        os.write(2, f"{end}{self._last_line(abandon())}\n".encode())
        os._exit(INTERRUPTED)
