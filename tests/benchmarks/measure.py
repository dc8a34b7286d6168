"""What the benchmark scripts share: versions and medians."""

from __future__ import annotations

import gc
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def header(title: str) -> None:
    """Prints what was measured with."""
    import torch

    names = ("torch", "numpy", "safetensors", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{title}\nPython {platform.python_version()}, {versions}; {torch.get_num_threads()} threads\n", flush=True)


def median_seconds(*works: Callable[[], object], runs: int = 5) -> list[float]:
    """Median wall time of each of some works, run in turn, after one round that does not count.

    In turn, so that what else the machine does falls on all of them alike; what a run leaves behind is collected before
    the next one's clock starts.
    """
    times: list[list[float]] = [[] for _ in works]
    for run in range(runs + 1):
        for work, seconds in zip(works, times, strict=True):
            gc.collect()
            start = time.perf_counter()
            work()
            if run:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]
