"""What this process has taken, by the operating system's account."""

from __future__ import annotations

import sys


def peak_rss_bytes() -> int | None:
    """The largest resident set of this process so far, in bytes; None where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
