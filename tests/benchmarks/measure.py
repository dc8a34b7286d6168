"""What the benchmark scripts share: versions, medians, and peak memory of a process of its own."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def header(title: str) -> None:
    """Prints what was measured with."""
    import torch

    names = ("torch", "numpy", "safetensors", "transformers")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    print(f"{title}\nPython {platform.python_version()}, {versions}; {torch.get_num_threads()} threads\n", flush=True)


def median_seconds(work: Callable[[], object], runs: int = 5) -> float:
    """Median wall time of `work` over some runs after one that does not count."""
    work()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def in_own_process(code: str, *args: object) -> dict[str, Any]:
    """Runs code that prints one JSON object last, in a fresh process, so that its peak memory is its own."""
    command = [sys.executable, "-c", code, *map(str, args)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return dict(json.loads(result.stdout.strip().splitlines()[-1]))
