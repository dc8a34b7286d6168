"""Seeded mutations of dense checkpoints: whatever comes in, tensors or one line of an error of ours come out.

The long version is `python -m tests.benchmarks.fuzz_sources`.
"""

from __future__ import annotations

import random
import tracemalloc
from pathlib import Path

import pytest

from tests.hostile_sources import KINDS, refusal

MUTATIONS = 400
LEAST = 64 << 20


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", KINDS)
def test_spoiled_sources_are_read_or_refused(name: str, seed: int, tmp_path: Path) -> None:
    rng, kind = random.Random(seed), KINDS[name]
    path, refused, peak = tmp_path / "file", 0, 0
    for _ in range(MUTATIONS):
        data = kind.spoil(rng)
        tracemalloc.start()
        try:
            refused += refusal(kind, path, data) is not None
            peak = max(peak, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert 0 < refused < MUTATIONS, "the mutations neither all break the file nor all leave it whole"
    assert peak < LEAST


@pytest.mark.parametrize("name", KINDS)
def test_a_sound_source_is_read(name: str, tmp_path: Path) -> None:
    assert refusal(KINDS[name], tmp_path / "file", KINDS[name].sound()) is None
