"""A command in a process of its own that has imported everything already: a fork, so that hundreds of them take seconds.

Forking is safe only while there are no other threads: OMP_NUM_THREADS=1 must be set before torch is imported.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sctconv.cli import main

PATIENCE = 120.0
"""Processor seconds after which a child that does not end is killed, and that is a failure."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: exit code, or the signal's number as a negative one; what it said on stderr; processor seconds."""

    code: int
    said: str
    seconds: float


def run(
    room: Path,
    words: list[str],
    *,
    prepare: Callable[[], None] | None = None,
    finish: Callable[[], None] | None = None,
    kill_after: float | None = None,
) -> Ended:
    """Runs `sctconv WORDS` with `room` as working directory.

    Args:
        prepare, finish: called in the child before and after.
        kill_after: processor seconds until SIGKILL; those do not depend on what else the machine does.
    """
    with tempfile.TemporaryFile() as said:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            _command(room, words, said.fileno(), prepare, finish)
        status, seconds = _wait(child, PATIENCE if kill_after is None else kill_after)
        said.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), said.read().decode(errors="replace"), seconds)


def _wait(child: int, seconds: float) -> tuple[int, float]:
    """Waits for a child, and kills it when it has had so many processor seconds, or stands still for a long time."""
    deadline = time.monotonic() + 5 * PATIENCE
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage.ru_utime + usage.ru_stime
        if (
            time.clock_gettime((~child << 3) | 2) >= seconds or time.monotonic() > deadline
        ):  # Linux's clock of a process
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


def _command(
    room: Path,
    words: list[str],
    said: int,
    prepare: Callable[[], None] | None,
    finish: Callable[[], None] | None,
) -> None:
    code = 70
    try:
        os.chdir(room)
        os.dup2(said, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if prepare:
            prepare()
        main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            if finish:
                finish()
            sys.stderr.flush()
        finally:
            os._exit(code)
