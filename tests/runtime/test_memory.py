"""The peak is this process's own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from sctconv.runtime.memory import peak_rss_bytes, release_free, rss_bytes

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


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take freed memory back themselves")
def test_what_was_freed_goes_back_to_the_system() -> None:
    held = [torch.ones(1 << 20) for _ in range(64)]  # 4 MiB each: blocks that glibc keeps
    before = rss_bytes()
    del held
    release_free()
    assert rss_bytes() < before - (128 << 20)


def test_large_tensors_are_mapped_in_large_pages() -> None:
    """Asked for before torch is imported, which this module does not do."""
    choice = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not choice.exists() or "[madvise]" not in choice.read_text():
        pytest.skip("a system without large pages, or with them everywhere")
    code = (
        "import resource, sys\n"
        "from sctconv.runtime.memory import large_pages\n"
        "assert 'torch' not in sys.modules\n"
        "if sys.argv[1] == 'large': large_pages()\n"
        "import torch\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "kept = torch.ones(64 << 20)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    faults = {
        kind: int(subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, check=True).stdout)
        for kind in ("small", "large")
    }
    assert faults["large"] < 0.5 * faults["small"], faults
