"""The peak is this process's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from sctconv.runtime.memory import peak_rss_bytes

ROOT = Path(__file__).parent.parent.parent


def test_it_grows_with_what_is_touched_and_stays() -> None:
    before = peak_rss_bytes()
    assert before is not None
    np.ones(200 << 20, np.uint8)
    after = peak_rss_bytes()
    assert after is not None and after >= 150 << 20 and after >= before


def test_a_large_parent_does_not_show_in_a_child() -> None:
    ballast = np.ones(600 << 20, np.uint8)
    code = "from sctconv.runtime.memory import peak_rss_bytes; print(peak_rss_bytes())"
    # without torch: the module itself is light, but its package is not needed either
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(child.stdout) < 500 << 20 < ballast.nbytes
