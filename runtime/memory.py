"""What this process has taken, by the operating system's account."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Final

_M_TRIM_THRESHOLD: Final = -1
_M_TOP_PAD: Final = -2
_M_MMAP_THRESHOLD: Final = -3
_M_MMAP_MAX: Final = -4
"""glibc's malloc.h."""


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system does not tell (Windows).

    On Linux the high-water mark of this process's own address space: `ru_maxrss` also remembers that of the process
    that started it, from before the `exec`.
    """
    return _from_status("VmHWM") or _from_rusage()


def rss_bytes() -> int:
    """The resident set of this process now, in bytes; its peak where the system tells no more, 0 where not even that."""
    return _from_status("VmRSS") or _from_rusage() or 0


def release_free() -> None:
    """Hands memory that was freed back to the system.

    glibc keeps freed blocks of up to 32 MiB for later; after a pass over a text these are hundreds of megabytes of
    activations, which count as resident while something large is allocated. Nothing where the C library has no such call.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def large_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Has torch ask Linux for pages of 2 MiB for what is larger, in a process that has not imported torch yet.

    Steps of training allocate and free the same large tensors again and again. At multiples of 2 MiB they fit where others
    were, and they are mapped with few faults: a step of SmolLM2, 4 x 256 tokens, peaks at 2.48 GB in place of 2.73, a lean one at
    1.45 in place of 1.76; steps of 8 blocks of Llama-3-70B's shape take 1.8 s in place of 2.4.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within, memory that was freed stays with the process for what is allocated next.

    glibc's own way is neither this nor the opposite: it keeps blocks of up to 32 MiB wherever they lie and maps larger ones
    anew each time. Where steps allocate the same activations again and again, faulting their pages in is a fifth of the time
    if they go (`python -m tests.benchmarks.training`), and over half of it in a lean step of large factors. Nothing where
    the C library has no such call.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        yield
        return
    release_free()
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)  # never
    mallopt(_M_TOP_PAD, 64 << 20)
    try:
        yield
    finally:
        mallopt(_M_MMAP_MAX, 65536)
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adaptation ends up
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        mallopt(_M_TOP_PAD, 128 << 10)
        release_free()


def installed_bytes() -> int:
    """Memory that this process may use: the machine's, or the least that a control group above it allows."""
    total = _physical_bytes()
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(path).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 16 << 30  # a system that does not tell (Windows): an ordinary machine


def _from_status(key: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    match = re.search(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _from_rusage() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
