"""What this process has taken, by the operating system's account."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system does not tell (Windows).

    On Linux the high-water mark of this process's own address space: `ru_maxrss` also remembers that of the process
    that started it, from before the `exec`.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _from_rusage()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return int(match[1]) * 1024 if match else _from_rusage()


def _from_rusage() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
