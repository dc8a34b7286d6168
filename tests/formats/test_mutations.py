"""Seeded mutations of head, blobs, index and tail: a mutant is read as it says, or refused with a `FormatError`.

`python -m tests.benchmarks.fuzz` is the long version.
"""

from __future__ import annotations

import random
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.formats.mutations import BASES, Base, blobs, head_or_tail, length, outcome, text, values

MOST_BYTES = 64 << 20


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> Base:
    return BASES[request.param]()


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def outcomes(path: Path, base: Base, mutate: Callable[[random.Random, Base], bytes], seed: int, count: int) -> Counter:
    rng = random.Random(seed)
    return Counter(outcome(path, mutate(rng, base)) for _ in range(count))


@pytest.mark.parametrize("seed", range(4))
def test_bytes_of_head_and_tail(base, tmp_path, seed):
    assert len(outcomes(tmp_path / "a.sct", base, head_or_tail, seed, 300)) > 5


def test_bytes_of_blobs(base, tmp_path):
    assert set(outcomes(tmp_path / "a.sct", base, blobs, 0, 300)) >= {"ChecksumError"}


def test_bytes_too_many_or_too_few(base, tmp_path):
    assert len(outcomes(tmp_path / "a.sct", base, length, 0, 600)) > 3


@pytest.mark.parametrize("seed", range(4))
def test_text_of_the_index_with_a_right_hash(base, tmp_path, seed):
    assert outcomes(tmp_path / "a.sct", base, text, seed, 300)["IndexSyntaxError"] > 50


@pytest.mark.parametrize("seed", range(4))
def test_values_of_the_index_with_a_right_hash(base, tmp_path, seed, traced):
    found = outcomes(tmp_path / "a.sct", base, values, seed, 400)
    assert len(found) > 8 and 0 < found["read"] < 360  # the mutations neither all break the file nor all leave it whole
    assert tracemalloc.get_traced_memory()[1] < MOST_BYTES


def test_the_same_seed_gives_the_same_mutants(base):
    """So a failure can be found again; whatever other mutants were made before."""
    first, second = ([values(rng, base) for _ in range(500)] for rng in (random.Random(3), random.Random(3)))
    assert first == second


def test_the_file_survives_unchanged(base, tmp_path):
    assert outcome(tmp_path / "a.sct", base.signed()) == "read"
